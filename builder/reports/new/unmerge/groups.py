"""Tensors that have one weight of each parent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from builder.operations.registry import Setting
from builder.reports.new.unmerge.formulas import Formula
from builder.reports.new.unmerge.least_squares import Products, total
from builder.reports.new.unmerge.origin import BASE
from builder.reports.new.unmerge.parents import (
    WITHIN,
)

LEAST = 16  # elements that tell a weight of their own


class Group(NamedTuple):
    """Tensors of one weight: those of a block, or `alone` one that its block's is not for."""

    block: str
    alone: bool
    names: tuple[str, ...]
    products: Products

    def fits(self, weights: Sequence[float]) -> bool:
        """Whether weights explain all but rounding."""
        return explains(self.products, weights)


def explains(products: Products, weights: Sequence[float]) -> bool:
    """Whether weights explain all but rounding."""
    return products.residual(weights) <= WITHIN * products.noise


def blocks_of(names: Sequence[str], setting: Setting) -> dict[str, list[str]]:
    """Tensors by block."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(setting.block(name) or BASE, []).append(name)
    return found


def groups_of(products: Mapping[str, Products], setting: Setting) -> Iterator[Group]:
    """Tensors of one weight each: blocks, and single tensors where most of a block has another."""
    size = len(next(iter(products.values())).gram)
    form = Formula("", (), 0, tuple((i, 0) for i in range(1, size)))
    for block, names in blocks_of([*products], setting).items():

        def weights(of: Products) -> tuple[float, ...]:
            return form.weights(form.fit(of).factors, size)

        pooled = weights(total(products[n] for n in names))
        large = sorted(names, key=lambda n: (-products[n].count, n))[:8]
        ways = [pooled, *(weights(products[n]) for n in large)]
        held = max(
            ([n for n in names if products[n].count < LEAST or explains(products[n], w)] for w in ways),
            key=len,
        )
        apart = [n for n in names if n not in held]
        if 2 * len(held) < len(names) or not all(explains(products[n], weights(products[n])) for n in apart):
            held, apart = names, []
        yield Group(block, False, tuple(held), total(products[n] for n in held))
        yield from (Group(block, True, (n,), products[n]) for n in apart)
