"""The numbers that a person may have meant by a weight that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from builder.operations.presets import presets

SPREAD = 5.0  # standard errors within which a weight is looked for
ROUNDED = 2e-7  # how much a weight of 1 differs where it is computed in FP32
LARGEST_DENOMINATOR = 12
MOST_NUMBERS = 12


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
