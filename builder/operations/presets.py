"""Block weights that the field knows by name, for the blocks of SD v1's UNET."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import cos, pi

V1_BLOCKS = 25  # IN00 to IN11, M00, OUT00 to OUT11


def _smooth(t: float) -> float:
    return 3 * t**2 - 2 * t**3


def _triangle(x: float) -> float:
    return 1 - abs(1 - x % 2)


def _between(low: float, high: float, weight: float = 1.0) -> Callable[[int], float]:
    """A weight for the blocks between two, counted from 0, and none for the others."""
    return lambda i: weight if low <= i <= high else 0.0


# With t from 0 at the first block to 1 at the last. Rounded to 12 decimals, as the tools that share them do.
_CURVES: dict[str, Callable[[float], float]] = {
    "GRAD_V": lambda t: abs(1 - 2 * t),
    "GRAD_A": lambda t: 1 - abs(1 - 2 * t),
    "FLAT_25": lambda t: 0.25,
    "FLAT_75": lambda t: 0.75,
    "COSINE": lambda t: (1 + cos(pi * t)) / 2,
    "REVERSE_COSINE": lambda t: (1 - cos(pi * t)) / 2,
    "SMOOTHSTEP": _smooth,
    "REVERSE-SMOOTHSTEP": lambda t: 1 - _smooth(t),
    "FAKE_CUBIC_HERMITE": lambda t: 19 / 3 * t**3 - 9.5 * t**2 + 25 / 6 * t,
    "FAKE_REVERSE_CUBIC_HERMITE": lambda t: 1 - (19 / 3 * t**3 - 9.5 * t**2 + 25 / 6 * t),
}
for _k in (2, 3, 4):
    _CURVES[f"SMOOTHSTEP*{_k}"] = lambda t, k=_k: _triangle(k * _smooth(t))  # type: ignore[misc]
    _CURVES[f"R_SMOOTHSTEP*{_k}"] = lambda t, k=_k: 1 - _triangle(k * _smooth(t))  # type: ignore[misc]
    _CURVES[f"SMOOTHSTEP/{_k}"] = lambda t, k=_k: _smooth(_triangle(k * t))  # type: ignore[misc]
    _CURVES[f"R_SMOOTHSTEP/{_k}"] = lambda t, k=_k: 1 - _smooth(_triangle(k * t))  # type: ignore[misc]

_STEPS: dict[str, Callable[[int], float]] = {
    "WRAP08": lambda i: 1 - _between(4, 20)(i),
    "WRAP12": lambda i: 1 - _between(6, 18)(i),
    "WRAP14": lambda i: 1 - _between(7, 17)(i),
    "WRAP16": lambda i: 1 - _between(8, 16)(i),
    "MID12_50": _between(5, 18, 0.5),
    "OUT07": _between(18, 24),
    "OUT12": _between(13, 24),
    "OUT12_5": lambda i: _between(13, 24)(i) + _between(12, 12, 0.5)(i),
    "RING08_SOFT": lambda i: _between(6, 8)(i) + _between(16, 18)(i) + 0.5 * (i in (5, 9, 15, 19)),
    "RING08_5": lambda i: _between(6, 9)(i) + _between(15, 18)(i),
    "RING10_5": lambda i: _between(5, 9)(i) + _between(15, 19)(i),
    "RING10_3": lambda i: _between(6, 10)(i) + _between(14, 18)(i),
    "ALL_A": lambda i: 0.0,
    "ALL_B": lambda i: 1.0,
}

# No polynomial: the numbers are all there is.
_HERMITE = (
    *(0, 0.199031876929, 0.325761959877, 0.424641927083, 0.498456790123, 0.549991560571, 0.58203125),
    *(0.597360869985, 0.598765432099, 0.589029947917, 0.570939429012, 0.54727888696, 0.520833333333),
    *(0.494387779707, 0.470727237654, 0.45263671875, 0.442901234568, 0.444305796682, 0.459635416667),
    *(0.491675106096, 0.543209876543, 0.617024739583, 0.71590470679, 0.842634789738, 1),
)

ALIASES = {
    "REVERSE_SMOOTHSTEP": "REVERSE-SMOOTHSTEP",
    "HALF_SMOOTHSTEP": "SMOOTHSTEP/2",
    "HALF_R_SMOOTHSTEP": "R_SMOOTHSTEP/2",
    "ONE_THIRD_SMOOTHSTEP": "SMOOTHSTEP/3",
    "ONE_THIRD_R_SMOOTHSTEP": "R_SMOOTHSTEP/3",
    "ONE_FOURTH_SMOOTHSTEP": "SMOOTHSTEP/4",
    "ONE_FOURTH_R_SMOOTHSTEP": "R_SMOOTHSTEP/4",
    **{f"{k}{r}SMOOTHSTEP": f"{r}SMOOTHSTEP*{k}" for k in (2, 3, 4) for r in ("", "R_")},
}


@cache
def presets() -> Mapping[str, tuple[float, ...]]:
    """The weights of every preset, by name: 25 numbers, from IN00 to OUT11.

    They say nothing of text encoders, whose weight the tools take as 0; that of ALL_B is 1.
    """
    last = V1_BLOCKS - 1
    found = {n: tuple(round(f(i / last), 12) for i in range(V1_BLOCKS)) for n, f in _CURVES.items()}
    found |= {n: tuple(float(f(i)) for i in range(V1_BLOCKS)) for n, f in _STEPS.items()}
    found["TRUE_CUBIC_HERMITE"] = tuple(map(float, _HERMITE))
    found["TRUE_REVERSE_CUBIC_HERMITE"] = tuple(round(1 - w, 12) for w in _HERMITE)
    return found | {alias: found[name] for alias, name in ALIASES.items()}


# Strengths of LoRAs by block name those with attention alone; the others have none.
LORA_BLOCKS: dict[int, tuple[str, ...]] = {
    17: (*(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(3, 12))),
    12: (*(f"IN{n:02}" for n in (4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(6))),
}
# The base, which is the text encoders', and a number for each of the 16 blocks of SD v1 that have attention.
LORA_PRESETS: dict[str, tuple[float, ...]] = {
    name: (base, *(float(low <= n <= high) * base for n in range(16)))
    for name, base, low, high in (
        ("NONE", 0.0, 0, 0),
        ("ALL", 1.0, 0, 15),
        ("ALL0.5", 0.5, 0, 15),
        ("INS", 1.0, 0, 2),
        ("IND", 1.0, 3, 5),
        ("INALL", 1.0, 0, 5),
        ("MIDD", 1.0, 3, 10),
        ("OUTD", 1.0, 7, 10),
        ("OUTS", 1.0, 11, 15),
        ("OUTALL", 1.0, 7, 15),
    )
}
