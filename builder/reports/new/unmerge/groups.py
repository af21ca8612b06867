"""Tensors that have one weight of each parent: those of a block, and single ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from builder.operations.registry import Setting
from builder.reports.new.unmerge.formulas import free
from builder.reports.new.unmerge.least_squares import Products, total
from builder.reports.new.unmerge.origin import BASE

WITHIN = 8.0  # times what one rounding leaves: as much as a few roundings do
WITHIN_FEW = 32.0  # of few elements, whose roundings may all be large
FEW = 16  # elements, that tell no weight of their own
LARGEST = 8  # tensors of a block whose weights may be those of the others


class Group(NamedTuple):
    """Tensors of one weight of each parent: those of a block, or `alone` one that its block's is not for."""

    block: str
    alone: bool
    names: tuple[str, ...]
    products: Products

    def fits(self, weights: Sequence[float]) -> bool:
        """Whether weights explain all but rounding."""
        return explains(weights, self.products)


def explains(weights: Sequence[float], products: Products) -> bool:
    """Whether the sum with these weights leaves no more of a tensor than a few roundings do."""
    within = WITHIN if products.count >= FEW else WITHIN_FEW
    return products.residual(weights) <= within * products.noise


def blocks_of(names: Sequence[str], setting: Setting) -> dict[str, list[str]]:
    """Tensors by block."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(setting.block(name) or BASE, []).append(name)
    return found


def nearest(products: Products) -> tuple[float, ...]:
    """The weights, 1 together, whose sum is nearest by least squares."""
    formula = free(len(products.gram))
    return formula.weights(formula.fit(products).factors, len(products.gram))


def groups_of(products: Mapping[str, Products], setting: Setting) -> Iterator[Group]:
    """Blocks, and single tensors that have other weights than most of their block.

    A block whose tensors have not all some weights that explain them is left as it is: it is no sum.
    """
    everywhere = nearest(total(products.values()))
    for block, names in blocks_of([*products], setting).items():
        pooled = nearest(total(products[n] for n in names))
        large = sorted(names, key=lambda n: (-products[n].count, n))[:LARGEST]
        ways = [pooled, everywhere, *(nearest(products[n]) for n in large)]
        held = max(([n for n in names if explains(w, products[n])] for w in ways), key=len)
        apart = [n for n in names if n not in held]
        if 2 * len(held) < len(names) or not all(explains(nearest(products[n]), products[n]) for n in apart):
            held, apart = names, []
        yield Group(block, False, tuple(held), total(products[n] for n in held))
        yield from (Group(block, True, (n,), products[n]) for n in apart)
