"""Least squares of a tensor as a weighted sum of others, from the products of its differences to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, NamedTuple

from builder.operations.presets import presets
from builder.operations.sums import fold
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.merged import Values, windows

if TYPE_CHECKING:
    import torch

DEPENDENT = 1e-9  # of a direction's own square: what is left of one that the others hold already
SPREAD = 5.0  # standard errors within which a weight is looked for
SKEW = 10.0  # times the square of what rounding changes: by trials in FP16 and BF16
ROUNDED = 2e-7  # how much a weight of 1 differs where it is computed in FP32
ROUNDING_OF_WEIGHTS = 2.0**-24
LARGEST_DENOMINATOR = 12
MOST_NUMBERS = 12
# The exponents of the last bits of 1.0 (as `frexp` counts), and of the least number.
_LAST_BITS = {DType.F16: (11, -24), DType.BF16: (8, -133), DType.F32: (24, -149)}


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
        """The square of what T differs by from the sum with these weights, which are 1 together."""
        pairs = zip(weights, self.gram, strict=True)
        return max(0.0, sum(w * v * g for w, row in pairs for v, g in zip(weights, row, strict=True)))


def total(products: Iterable[Products]) -> Products:
    """The sums over several tensors, at least one."""
    first, *others = products
    for other in others:
        first = first + other
    return first


def products_of(target: LazyTensor, candidates: Sequence[LazyTensor | None]) -> Products:
    """The products of a tensor with others of its shape, window by window; None stands for zeros."""
    import torch

    held = [c for c in candidates if c is not None]
    sums: list[float] = []
    for values in windows([target, *held]):
        t = values[0].double()
        rest = (values[i + 1].double() for i in range(len(held)))
        apart = torch.stack([(-t if c is None else next(rest).sub_(t)) for c in candidates])
        found = [float(s) for i in range(len(apart)) for s in fold(apart[i] * apart[i:])]
        found += [float(fold(t * t)), float(fold(_rounding(values, target.dtype)))]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    size = len(candidates)
    upper = iter(sums)
    gram = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i, size):
            gram[i][j] = gram[j][i] = next(upper)
    return Products(tuple(map(tuple, gram)), next(upper), next(upper), target.numel)


def _rounding(values: Values, dtype: DType) -> torch.Tensor:
    """A twelfth of the square of each element's last place."""
    import torch

    digits, least = _LAST_BITS[dtype]
    exponents = torch.frexp(values[0])[1].sub_(digits).clamp_min_(least)
    return torch.ldexp(torch.full(exponents.shape, 1 / 12, dtype=torch.float64), 2 * exponents)


class Fit(NamedTuple):
    """Factors of directions, and their standard errors: infinite where nothing tells them."""

    factors: list[float]
    errors: list[float]


def fit(products: Products, base: int, directions: Sequence[tuple[int, int]]) -> Fit:
    """The factors pⱼ by which C_base + Σ pⱼ·(C_a − C_b), for the directions (a, b), is nearest to T.

    A direction that others hold already has the factor 0.
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
    # What is left is noise, but no less than rounding makes it. That is not by chance alone: it hangs on
    # values where the exponent changes, and on directions of few last places.
    noise = sqrt(max(rest, products.noise) / max(1, products.count - size))
    skew = SKEW * products.rounding / sqrt(products.energy) if products.energy else 0.0
    errors = [inf] * size
    for i in set(range(size)).difference(free):
        inverse = max(0.0, rows[i][size + 1 + i])
        errors[i] = sqrt(inverse) * (noise + skew) + products.rounding * inverse / 2
    return Fit(factors, errors)


def numbers_near(value: float, error: float) -> Iterator[float]:
    """What a person may have meant by a weight that was measured with an error; the simplest first.

    Decimals of two digits, fractions of small numbers, those of presets, further decimals, and at last the
    value itself as far as it is known.
    """
    reach = SPREAD * error + ROUNDED * max(1.0, abs(value))
    digits = next((d for d in range(15) if 10.0**-d < reach / SPREAD), 15)
    named = sorted({w for weights in presets().values() for w in weights}, key=lambda w: (abs(w - value), w))
    found = [
        *(n for d in range(3) for n in _decimals(value, d, reach)),
        *(float(Fraction(round(value * q), q)) for q in range(3, LARGEST_DENOMINATOR + 1)),
        *named[:2],
        *(n for d in range(3, 7) for n in _decimals(value, d, reach)),
    ]
    near = [*dict.fromkeys(n + 0.0 for n in found if abs(n - value) <= reach)][: MOST_NUMBERS - 1]
    yield from near
    if (own := round(value, digits) + 0.0) not in near:
        yield own


def _decimals(value: float, digits: int, reach: float) -> list[float]:
    """The nearest numbers of so many decimals."""
    unit = 10**digits
    nearest = round(value * unit)
    some = range(nearest - 1, nearest + 2) if reach * unit > 1 else (nearest,)
    return sorted((n / unit for n in some), key=lambda n: abs(n - value))
