"""The formulas that make a component of its parents, as least squares sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import inf, sqrt
from typing import NamedTuple

from builder.reports.new.unmerge.least_squares import Fit, Products, fit

NEAR_ONE = 1e-3  # a second share so near to 1 hides the first


class Formula(NamedTuple):
    """An operation of inputs, which are parents by their place.

    But for rounding it is C_base + Σ pⱼ·(C_a − C_b), over the directions (a, b): each formula of
    docs/recipes.md, multiplied out. Its parameters are the pⱼ; where it sums `twice`,
    (a·(1 − α) + b·α)·(1 − β) + c·β = a + α(1 − β)·(b − a) + β·(c − a), they are α and β.
    """

    op: str
    inputs: tuple[int, ...]
    base: int
    directions: tuple[tuple[int, int], ...]
    twice: bool = False

    def fit(self, products: Products) -> Fit:
        """The parameters, and their standard errors: those of α = p₀ / (1 − p₁) to the first order."""
        found = fit(products, self.base, self.directions)
        if not self.twice:
            return found
        (first, beta), (error, other) = found
        if abs(1 - beta) < NEAR_ONE:
            return Fit([0.0, beta], [inf, other])
        alpha = first / (1 - beta)
        return Fit([alpha, beta], [sqrt(error**2 + (alpha * other) ** 2) / abs(1 - beta), other])

    def weights(self, params: Sequence[float], size: int) -> tuple[float, ...]:
        """How much there is of each of `size` parents; together 1."""
        factors = (params[0] * (1 - params[1]), params[1]) if self.twice else params
        found = [0.0] * size
        found[self.base] = 1.0
        for factor, (a, b) in zip(factors, self.directions, strict=True):
            found[a] += factor
            found[b] -= factor
        return tuple(round(w, 12) + 0.0 for w in found)


def free(size: int) -> Formula:
    """Any sum of so many parents, with weights that are 1 together: what is nearest by any formula."""
    return Formula("", (), 0, tuple((i, 0) for i in range(1, size)))


def formulas(parents: Sequence[int], nothing: int | None, settled: Sequence[int]) -> Iterator[Formula]:
    """The formulas of so many parents, the simplest first; the first parents rather as the first inputs.

    `nothing` is the place of what holds zeros, for weights that are not 1 together. A sum of many has its
    inputs by their places, but for the `settled` ones, which stay in the order that they have there.
    """
    if nothing is not None or len(parents) not in (2, 3):
        held = iter([i for i in settled if i in parents])
        inputs = tuple(next(held) if i in settled else i for i in sorted(parents))
        base = inputs[0] if nothing is None else nothing
        yield Formula("linear", inputs, base, tuple((i, base) for i in inputs if i != base))
    elif len(parents) == 2:
        a, b = parents
        yield Formula("weighted-sum", (a, b), a, ((b, a),))
        yield Formula("add-difference", (a, b, a), a, ((b, a),))
        yield Formula("add-difference", (b, a, b), b, ((a, b),))
    else:
        for a, b, c in permutations(parents):
            yield Formula("add-difference", (a, b, c), a, ((b, c),))
        for c in reversed(parents):
            a, b = (i for i in parents if i != c)
            yield Formula("triple-sum", (a, b, c), a, ((b, a), (c, a)))
            yield Formula("sum-twice", (a, b, c), a, ((b, a), (c, a)), twice=True)


def orders(formula: Formula, settled: Sequence[int]) -> Iterator[Formula]:
    """The same sum in every other order that rounds otherwise, as far as `settled` leaves a choice.

    That the first two change places changes nothing.
    """
    for inputs in permutations(formula.inputs):
        held = [i for i in settled if i in inputs]
        swapped = len(inputs) > 1 and inputs[0] > inputs[1] and not {*inputs[:2]} <= {*held}
        if inputs != formula.inputs and not swapped and held == [i for i in inputs if i in held]:
            yield formula._replace(inputs=inputs)
