"""Weights that ggml packs in blocks: decoded exactly as its reference does, and encoded to Q8_0."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from builder.tensors.lazy import WINDOW, DType, LazyTensor
from builder.tensors.scratch import scratch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

SMALL, LARGE = 32, 256  # elements of a block
_NIBBLES, _CRUMBS, _BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))


class Numbers(NamedTuple):
    """What blocks hold: `whole` times `scale`, less `offset` where there is one.

    `whole` are integers `[blocks, groups, elements]`, the others float32 `[blocks, groups]`.
    """

    whole: Array
    scale: Array
    offset: Array | None = None


class BlockType:
    """A way to pack `elements` numbers: the fields of a block in their order, and what they stand for."""

    def __init__(
        self, name: str, elements: int, fields: list[tuple[Any, ...]], numbers: Callable[[Array], Numbers]
    ) -> None:
        self.name = name
        self.elements = elements
        self.numbers = numbers
        self._fields = fields

    @cached_property
    def fields(self) -> np.dtype[Any]:
        """A block as a record of numpy, which is imported."""
        import numpy as np

        return np.dtype(self._fields)

    @property
    def itemsize(self) -> int:
        """Bytes of a block."""
        return sum(2 if kind == "<f2" else n for _, kind, n in (((*f, 1)[:3]) for f in self._fields))

    def decode(self, data: memoryview, out: memoryview) -> None:
        """Write the numbers of whole blocks, as float32, to `out`."""
        import numpy as np

        with np.errstate(all="ignore"):  # a scale may be no number: that is the file's own
            numbers = self.numbers(np.frombuffer(data, self.fields))
            made = np.frombuffer(out, "<f4").reshape(numbers.whole.shape)
            np.multiply(numbers.whole, numbers.scale[..., None], out=made, dtype="f4", casting="unsafe")
            if numbers.offset is not None:
                made -= numbers.offset[..., None]


def _f4(half: Array) -> Array:
    """Numbers of a block as float32 `[blocks, 1]`."""
    made: Array = half.astype("f4").reshape(-1, 1)
    return made


def _shifted(data: Array, shifts: tuple[int, ...], width: int, mask: int) -> Array:
    """Parts of bytes: of each `width` of them those at the first shift, then those at the next."""
    import numpy as np

    by = np.array(shifts, "u1").reshape(1, 1, -1, 1)
    made: Array = (data.reshape(len(data), -1, 1, width) >> by) & np.uint8(mask)
    return made


def _q4_0(b: Array) -> Numbers:
    return Numbers(_shifted(b["q"], _NIBBLES, 16, 15).reshape(-1, 1, 32).view("i1") - 8, _f4(b["d"]))


def _q4_1(b: Array) -> Numbers:
    return Numbers(_shifted(b["q"], _NIBBLES, 16, 15).reshape(-1, 1, 32), _f4(b["d"]), -_f4(b["m"]))


def _fives(b: Array) -> Array:
    import numpy as np

    high = np.unpackbits(b["h"], axis=1, bitorder="little")
    made: Array = _shifted(b["q"], _NIBBLES, 16, 15).reshape(-1, 32) | high << 4
    return made.reshape(-1, 1, 32)


def _q5_0(b: Array) -> Numbers:
    return Numbers(_fives(b).view("i1") - 16, _f4(b["d"]))


def _q5_1(b: Array) -> Numbers:
    return Numbers(_fives(b), _f4(b["d"]), -_f4(b["m"]))


def _q8_0(b: Array) -> Numbers:
    return Numbers(b["q"].reshape(-1, 1, 32), _f4(b["d"]))


def _q2_k(b: Array) -> Numbers:
    whole = _shifted(b["q"], _CRUMBS, 32, 3).reshape(-1, 16, 16)
    return Numbers(whole, _f4(b["d"]) * (b["s"] & 15), _f4(b["m"]) * (b["s"] >> 4))


def _q3_k(b: Array) -> Numbers:
    low = _shifted(b["q"], _CRUMBS, 32, 3).reshape(-1, 16, 16)
    high = _shifted(b["h"], _BITS, 32, 1).reshape(-1, 16, 16)  # set where nothing is taken away
    scale = (
        _shifted(b["s"][:, :8], _NIBBLES, 8, 15)
        | _shifted(b["s"][:, 8:], _CRUMBS, 4, 3).reshape(-1, 1, 2, 8) << 4
    )
    return Numbers((low | high << 2).view("i1") - 4, _f4(b["d"]) * (scale.reshape(-1, 16).view("i1") - 32))


def _scales(b: Array) -> tuple[Array, Array]:
    """Scale and offset of eight groups: 6 bits each of both in 12 bytes."""
    import numpy as np

    first, second, rest = b["s"][:, :4], b["s"][:, 4:8], b["s"][:, 8:]
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=1)
    offset = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=1)
    return _f4(b["d"]) * scale, _f4(b["m"]) * offset


def _q4_k(b: Array) -> Numbers:
    return Numbers(_shifted(b["q"], _NIBBLES, 32, 15).reshape(-1, 8, 32), *_scales(b))


def _q5_k(b: Array) -> Numbers:
    low = _shifted(b["q"], _NIBBLES, 32, 15).reshape(-1, 8, 32)
    return Numbers(low | _shifted(b["h"], _BITS, 32, 1).reshape(-1, 8, 32) << 4, *_scales(b))


def _q6_k(b: Array) -> Numbers:
    low = _shifted(b["q"], _NIBBLES, 64, 15).reshape(-1, 16, 16)
    high = _shifted(b["h"], _CRUMBS, 32, 3).reshape(-1, 16, 16)
    return Numbers((low | high << 4).view("i1") - 32, _f4(b["d"]) * b["s"])


_D, _M = ("d", "<f2"), ("m", "<f2")

BLOCKS = {
    t.name: t
    for t in (
        BlockType("Q4_0", SMALL, [_D, ("q", "u1", 16)], _q4_0),
        BlockType("Q4_1", SMALL, [_D, _M, ("q", "u1", 16)], _q4_1),
        BlockType("Q5_0", SMALL, [_D, ("h", "u1", 4), ("q", "u1", 16)], _q5_0),
        BlockType("Q5_1", SMALL, [_D, _M, ("h", "u1", 4), ("q", "u1", 16)], _q5_1),
        BlockType("Q8_0", SMALL, [_D, ("q", "i1", 32)], _q8_0),
        BlockType("Q2_K", LARGE, [("s", "u1", 16), ("q", "u1", 64), _D, _M], _q2_k),
        BlockType("Q3_K", LARGE, [("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), _D], _q3_k),
        BlockType("Q4_K", LARGE, [_D, _M, ("s", "u1", 12), ("q", "u1", 128)], _q4_k),
        BlockType("Q5_K", LARGE, [_D, _M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)], _q5_k),
        BlockType("Q6_K", LARGE, [("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _D], _q6_k),
    )
}


class _Bytes(Protocol):
    """Where blocks lie."""

    def read_into(self, offset: int, out: memoryview) -> None: ...


class BlockTensor(LazyTensor):
    """A tensor that lies in blocks, from `offset` of a blob on: its numbers as FP32."""

    __slots__ = ("blob", "blocks", "offset")

    def __init__(self, blocks: BlockType, shape: tuple[int, ...], blob: _Bytes, offset: int) -> None:
        super().__init__(DType.F32, shape)
        assert self.numel % blocks.elements == 0
        self.blocks = blocks
        self.blob = blob
        self.offset = offset

    @property
    def computed(self) -> bool:
        """True: scales are multiplied, with denormal numbers as they are."""
        return True

    @property
    def stored(self) -> tuple[str, int]:
        """The name of its blocks, and their bytes."""
        return self.blocks.name, self.numel // self.blocks.elements * self.blocks.itemsize

    def read_into(self, start: int, out: memoryview) -> None:
        """Decode the blocks that the range touches, a scratch buffer at a time."""
        size, width = self.blocks.itemsize, self.blocks.elements * 4  # bytes of a block, packed and not
        step = WINDOW // width * width
        with scratch() as packed:
            for at in range(start // width * width, start + len(out), step):
                end = min(at + step, -(-(start + len(out)) // width) * width)
                data = packed[: (end - at) // width * size]
                self.blob.read_into(self.offset + at // width * size, data)
                first, last = max(at, start), min(end, start + len(out))
                target = out[first - start : last - start]
                if (first, last) == (at, end):
                    self.blocks.decode(data, target)
                else:  # a block's part
                    with scratch() as whole:
                        self.blocks.decode(data, whole[: end - at])
                        target[:] = whole[first - at : last - at]


def encode_q8_0(values: Array) -> Array:
    """Finite float32 numbers `[n × 32]` as Q8_0: records of a scale and 32 integers, a half rounded away.

    Numbers so small that their scale has no inverse are zeros, as that scale is.
    """
    import numpy as np

    blocks = values.reshape(-1, SMALL)
    made = np.empty(len(blocks), BLOCKS["Q8_0"].fields)
    with np.errstate(all="ignore"):
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        inverse = np.float32(1) / scale
        inverse[np.isinf(inverse)] = 0
        scaled = blocks * inverse
        size = np.abs(scaled)
        floor = np.floor(size)
        rounded = np.copysign(floor + np.floor(2 * (size - floor)), scaled)
        made["d"] = scale[:, 0]
        made["q"] = rounded
    return made
