"""The formulas by which a component may have been merged, as least squares sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import sqrt
from typing import NamedTuple

from builder.reports.new.unmerge.least_squares import Fit, Products, fit
from builder.reports.new.unmerge.parents import (
    NOTHING,
)


class Formula(NamedTuple):
    """A formula: an operation of inputs, which are parents by their place.

    Without the last rounding it is C_base + Σ pⱼ·(C_a − C_b) for the directions (a, b), and `twice` says
    that its parameters are not pⱼ but the shares of one sum after the other.
    """

    op: str
    inputs: tuple[int, ...]
    base: int
    directions: tuple[tuple[int, int], ...]
    twice: bool = False

    def fit(self, products: Products) -> Fit:
        """The parameters, and their standard errors."""
        found = fit(products, self.base, self.directions)
        if not self.twice:
            return found
        (b, c), (error, other) = found
        if abs(1 - c) < 1e-3:
            return Fit([0.0, c], [float("inf"), other])
        alpha = b / (1 - c)
        return Fit([alpha, c], [sqrt(error**2 + (alpha * other) ** 2) / abs(1 - c), other])

    def weights(self, params: Sequence[float], size: int) -> tuple[float, ...]:
        """How much of each parent there is."""
        factors = (params[0] * (1 - params[1]), params[1]) if self.twice else params
        found = [0.0] * size
        found[self.base] = 1.0
        for factor, (a, b) in zip(factors, self.directions, strict=True):
            found[a] += factor
            found[b] -= factor
        return tuple(round(w, 12) + 0.0 for w in found)


def formulas(order: Sequence[int], parents: Sequence[int], names: Sequence[str]) -> Iterator[Formula]:
    """The formulas of so many parents, the simplest first."""
    if NOTHING in parents or len(order) not in (2, 3):
        called = {i: names[parents[i]] for i in order}
        if len({*called.values()}) < len(order):
            return
        named = tuple(sorted(order, key=called.__getitem__))
        base = parents.index(NOTHING) if NOTHING in parents else named[0]
        yield Formula("linear", named, base, tuple((i, base) for i in named if i != base))
    elif len(order) == 2:
        a, b = order
        yield Formula("weighted-sum", (a, b), a, ((b, a),))
        yield Formula("add-difference", (a, b, a), a, ((b, a),))
        yield Formula("add-difference", (b, a, b), b, ((a, b),))
    else:
        for a, b, c in permutations(order):
            yield Formula("add-difference", (a, b, c), a, ((b, c),))
        for c in reversed(order):
            a, b = (i for i in order if i != c)
            yield Formula("triple-sum", (a, b, c), a, ((b, a), (c, a)))
            yield Formula("sum-twice", (a, b, c), a, ((b, a), (c, a)), twice=True)
