"""Position ids of text encoders, which merges turn into floats and damage."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from builder.operations.fixes import POSITION_IDS, POSITIONS
from builder.tensors.lazy import DType, LazyTensor


@dataclass(frozen=True, slots=True)
class Position:
    """A position that does not hold its own number.

    `value` is what the file holds; `loaded` what a loader makes of it, truncating towards zero, or None
    where that is undefined, being no number or beyond int64. The right value, and what
    `clip-position-ids` makes it, is `position`.
    """

    tensor: str
    position: int
    value: float
    loaded: int | None

    @property
    def harmful(self) -> bool:
        """Whether loading goes wrong, too."""
        return self.loaded != self.position


@dataclass(frozen=True, slots=True)
class PositionIds:
    """Every `position_ids` tensor of a checkpoint by full name, and the positions that are wrong.

    `odd` names those whose type is not int64 or whose shape is not [1, 77]; ones of another count than 77
    are not read.
    """

    tensors: dict[str, LazyTensor]
    wrong: tuple[Position, ...]

    @property
    def odd(self) -> tuple[str, ...]:
        """Names of those of another type or shape than int64 [1, 77]."""
        return tuple(n for n, t in self.tensors.items() if (t.dtype, t.shape) != (DType.I64, (1, POSITIONS)))


def read_position_ids(tensors: Mapping[str, LazyTensor]) -> PositionIds:
    """Look at every `position_ids` there is; a few hundred bytes are read. Raises SourceError."""
    found = {n: t for n, t in tensors.items() if f".{n}".endswith(f".{POSITION_IDS}")}
    wrong = []
    for name, tensor in found.items():
        if tensor.numel != POSITIONS or tensor.dtype not in _NUMBERS:
            continue
        values = _NUMBERS[tensor.dtype](bytes(tensor.tobytes()))
        wrong += [
            Position(name, at, value, int(value) if abs(value) < 1 << 63 else None)
            for at, value in enumerate(values)
            if value != at
        ]
    return PositionIds(found, tuple(wrong))


def _packed(code: str) -> Callable[[bytes], list[float]]:
    return lambda data: [v for (v,) in struct.iter_unpack(f"<{code}", data)]


def _upper_half(code: str, size: int) -> Callable[[bytes], list[float]]:
    """Numbers that are the upper half of those of a wider type."""
    unpack, zeros = _packed(code), bytes(size)
    return lambda data: unpack(b"".join(zeros + data[i : i + size] for i in range(0, len(data), size)))


def _e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = math.ldexp(mantissa + 8 if exponent else mantissa, max(exponent, 1) - 10)
    return -size if byte & 128 else size


# Not with numpy or torch: importing them takes longer than everything else an inspection does.
_NUMBERS: dict[DType, Callable[[bytes], list[float]]] = {
    DType.BOOL: _packed("?"),
    DType.U8: _packed("B"),
    DType.I8: _packed("b"),
    DType.U16: _packed("H"),
    DType.I16: _packed("h"),
    DType.U32: _packed("I"),
    DType.I32: _packed("i"),
    DType.U64: _packed("Q"),
    DType.I64: _packed("q"),
    DType.F16: _packed("e"),
    DType.F32: _packed("f"),
    DType.F64: _packed("d"),
    DType.BF16: _upper_half("f", 2),
    DType.F8_E5M2: _upper_half("e", 1),
    DType.F8_E4M3: lambda data: [_e4m3(byte) for byte in data],
}
