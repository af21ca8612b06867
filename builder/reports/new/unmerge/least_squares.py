"""Least squares of a tensor as a weighted sum of others, from the products of its differences to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import inf, isfinite, ldexp, sqrt
from typing import TYPE_CHECKING, NamedTuple

from builder.operations.sums import fold
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.merged import windows

if TYPE_CHECKING:
    import torch

DEPENDENT = 1e-9  # of a direction's own square: what is left of one that the others hold already
SKEW = 10.0  # times the square of what rounding changes: by trials in FP16 and BF16
ROUNDING_OF_WEIGHTS = 2.0**-24
CHUNK = 1 << 16  # elements whose products fit a processor's cache, those of many pairs too
# Bits below a number's first, and the exponent of the least number.
_LAST_BITS = {DType.F16: (10, -24), DType.BF16: (7, -133), DType.F32: (23, -149)}
_BIAS = 127  # of FP32's exponents


@dataclass(frozen=True)
class Products:
    """Sums over `count` elements of a tensor T, in FP64.

    `gram` holds those of (Cᵢ − T)·(Cⱼ − T) for the candidates C, `energy` that of T², and `rounding` is what
    rounding T to its own type once adds to the square of a residual, on average.
    """

    gram: tuple[tuple[float, ...], ...]
    energy: float
    rounding: float
    count: int

    def __add__(self, other: Products) -> Products:
        gram = tuple(
            tuple(a + b for a, b in zip(r, s, strict=True))
            for r, s in zip(self.gram, other.gram, strict=True)
        )
        sums = self.energy + other.energy, self.rounding + other.rounding, self.count + other.count
        return Products(gram, *sums)

    @property
    def noise(self) -> float:
        """What rounding leaves of the square of a residual, that of the weights to FP32 too."""
        return self.rounding + ROUNDING_OF_WEIGHTS**2 * self.energy

    @property
    def finite(self) -> bool:
        """Whether all sums are numbers."""
        return all(map(isfinite, (self.energy, self.rounding, *(v for row in self.gram for v in row))))

    def between(self, a: int, b: int, c: int, d: int) -> float:
        """The sum of (Cₐ − C_b)·(C_c − C_d)."""
        g = self.gram
        return (g[a][c] - g[a][d]) - (g[b][c] - g[b][d])

    def residual(self, weights: Sequence[float]) -> float:
        """Σ wᵢ·wⱼ·gramᵢⱼ: the square of Σ wᵢ·Cᵢ − T, for weights that are 1 together.

        NaN where the weights are no numbers, which is no less than anything.
        """
        pairs = zip(weights, self.gram, strict=True)
        found = sum(w * v * g for w, row in pairs for v, g in zip(weights, row, strict=True))
        return 0.0 if found < 0 else found


def total(products: Iterable[Products]) -> Products:
    """The sums over several tensors, at least one."""
    first, *others = products
    for other in others:
        first = first + other
    return first


def products_of(target: LazyTensor, candidates: Sequence[LazyTensor | None]) -> Products:
    """The products of a tensor with others of its shape, window by window; None stands for zeros.

    All are of any floating types, taken as FP32; products and sums are FP64, added in an order that hangs on
    neither threads nor processors.
    """
    pairs = [*combinations_with_replacement(range(len(candidates)), 2)]
    sums, rounding = [0.0] * (len(pairs) + 1), 0.0
    for values in windows([target, *(c for c in candidates if c is not None)]):
        aim, *others = values
        rounding += _rounding(aim, target.dtype)
        for at in range(0, values.count, CHUNK):
            some = (other[at : at + CHUNK] for other in others)
            found = _products(
                aim[at : at + CHUNK], [None if c is None else next(some) for c in candidates], pairs
            )
            sums = [a + b for a, b in zip(sums, found, strict=True)]
    gram = [[0.0] * len(candidates) for _ in candidates]
    for (i, j), value in zip(pairs, sums, strict=False):
        gram[i][j] = gram[j][i] = value
    return Products(tuple(map(tuple, gram)), sums[-1], rounding, target.numel)


def _products(
    aim: torch.Tensor, others: Sequence[torch.Tensor | None], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """The sums of (Cᵢ − T)·(Cⱼ − T) over FP32 elements `[n]`, for each of the pairs, and that of T²."""
    import torch

    t = aim.double()
    apart = [-t if other is None else other.double().sub_(t) for other in others]
    made = torch.empty(len(pairs) + 1, len(t), dtype=torch.float64)
    for row, (i, j) in zip(made, pairs, strict=False):
        torch.mul(apart[i], apart[j], out=row)
    torch.mul(t, t, out=made[-1])
    found: list[float] = fold(made).tolist()
    return found


def _rounding(values: torch.Tensor, dtype: DType) -> float:
    """The sum of a twelfth of the square of each FP32 element's last place in a type.

    That is the mean square of an error that is anything up to half a last place either way (Widrow 1956).
    Elements are counted by exponent, so that the sum is the same everywhere.
    """
    import torch

    digits, least = _LAST_BITS[dtype]
    exponents = (values.view(torch.int32) >> 23).bitwise_and_(0xFF)
    counts: list[int] = torch.bincount(exponents, minlength=256).tolist()
    places = (max(e - _BIAS - digits, least) for e in range(len(counts)))
    return sum(n * ldexp(1 / 12, 2 * place) for n, place in zip(counts, places, strict=True))


class Fit(NamedTuple):
    """Factors of directions, and their standard errors: infinite where nothing tells them."""

    factors: list[float]
    errors: list[float]


def fit(products: Products, base: int, directions: Sequence[tuple[int, int]]) -> Fit:
    """The factors pⱼ by which C_base + Σ pⱼ·dⱼ, for the directions dⱼ = C_a − C_b, is nearest to T.

    Ordinary least squares: with D the matrix of Σ dᵢ·dⱼ, and y that of Σ dᵢ·(T − C_base), the solution of
    D·p = y by Gauss-Jordan elimination, which leaves D⁻¹ beside it. The standard error of pⱼ is
    sqrt(D⁻¹ⱼⱼ)·s, s² being what is left per degree of freedom. A direction that others hold already has the
    factor 0 and an infinite error.
    """
    size = len(directions)
    square = [[products.between(*d, *e) for e in directions] for d in directions]
    aim = [products.gram[b][base] - products.gram[a][base] for a, b in directions]
    rows = [[*row, aim[i], *(float(i == j) for j in range(size))] for i, row in enumerate(square)]
    free = []
    for i, row in enumerate(rows):
        if not row[i] > DEPENDENT * square[i][i]:
            free.append(i)
            continue
        rows[i] = row = [v / row[i] for v in row]
        for j, other in enumerate(rows):
            if j != i:
                rows[j] = [v - other[i] * w for v, w in zip(other, row, strict=True)]
    factors = [0.0 if i in free else rows[i][size] for i in range(size)]
    rest = products.gram[base][base] - 2 * sum(f * a for f, a in zip(factors, aim, strict=True))
    rest += sum(
        f * g * s for f, r in zip(factors, square, strict=True) for g, s in zip(factors, r, strict=True)
    )
    # What is left is noise, but no less than rounding makes it; and rounding is not by chance alone: it
    # hangs on values where the exponent changes, and on directions of few last places, which bias p.
    noise = sqrt(max(rest, products.noise) / max(1, products.count - size))
    skew = SKEW * products.rounding / sqrt(products.energy) if products.energy else 0.0
    errors = [inf] * size
    for i in set(range(size)).difference(free):
        inverse = max(0.0, rows[i][size + 1 + i])
        errors[i] = sqrt(inverse) * (noise + skew) + products.rounding * inverse / 2
    return Fit(factors, errors)
