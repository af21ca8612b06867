"""Tensors that do not lie in a blob as they are: strided views, and other byte orders."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from builder.formats.blob import Blob, BlobTensor
from builder.tensors.lazy import DType, LazyTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What lies between elements is read with them where that is cheaper than a call for each: up to so many
# bytes at once, and so many for each run of elements that lie together.
_MOST, A_CALL = 8 << 20, 64 << 10


class Axis(NamedTuple):
    """One dimension of a view; the stride in elements."""

    size: int
    stride: int


def tensor_at(
    blob: Blob,
    offset: int,
    dtype: DType,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    big_endian: bool = False,
) -> LazyTensor:
    """The tensor whose first element is at byte `offset` of a blob; strides in elements, not negative."""
    axes = _merge(shape, strides)
    tensor: LazyTensor
    if 0 in shape or not axes or (len(axes) == 1 and axes[0].stride == 1):
        tensor = BlobTensor(dtype, shape, blob, offset)
    else:
        tensor = StridedTensor(dtype, shape, axes, blob, offset)
    return SwappedTensor(tensor) if big_endian and dtype.itemsize > 1 else tensor


def _merge(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Axis, ...]:
    """The fewest axes that visit the same elements in the same order."""
    axes: list[Axis] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1].stride == size * stride:
            axes[-1] = Axis(axes[-1].size * size, stride)
        else:
            axes.append(Axis(size, stride))
    return tuple(axes)


class Box(NamedTuple):
    """A block of a view: elements to skip in the storage, and the axes left."""

    skip: int
    axes: tuple[Axis, ...]


def _boxes(axes: tuple[Axis, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements from `start` to `stop` in C order, as at most two blocks a dimension."""
    inner = [prod(a.size for a in axes[d + 1 :]) for d in range(len(axes))]
    while start < stop:
        skip, rest = 0, start
        for d, axis in enumerate(axes):
            index, rest = divmod(rest, inner[d])
            skip += index * axis.stride
            count = min((stop - start) // inner[d], axis.size - index)
            if not rest and count:
                yield Box(skip, (Axis(count, axis.stride), *axes[d + 1 :]))
                start += count * inner[d]
                break


class StridedTensor(LazyTensor):
    """A view with strides, such as a transposed or expanded tensor, gathered in bounded memory.

    numpy is imported when such a tensor is read.
    """

    __slots__ = ("axes", "blob", "offset")

    def __init__(
        self, dtype: DType, shape: tuple[int, ...], axes: tuple[Axis, ...], blob: Blob, offset: int
    ) -> None:
        super().__init__(dtype, shape)
        self.axes = axes
        self.blob = blob
        self.offset = offset

    def read_into(self, start: int, out: memoryview) -> None:
        """Gather the elements, block by block."""
        import numpy as np

        size = self.dtype.itemsize
        flat = np.frombuffer(out, dtype=f"V{size}")
        for box in _boxes(self.axes, start // size, (start + len(out)) // size):
            count = prod(a.size for a in box.axes)
            self._gather(box, flat[:count].reshape([a.size for a in box.axes]))
            flat = flat[count:]

    def _gather(self, box: Box, out: NDArray[np.void]) -> None:
        import numpy as np

        size = self.dtype.itemsize
        todo = [(box, out)]
        while todo:
            (skip, axes), target = todo.pop()
            span = (sum((a.size - 1) * a.stride for a in axes) + 1) * size
            if span <= min(_MOST, A_CALL * prod(a.size for a in axes if a.stride > 1)):
                buffer = bytearray(span)
                self.blob.read_into(self.offset + skip * size, memoryview(buffer))
                target[...] = np.lib.stride_tricks.as_strided(
                    np.frombuffer(buffer, dtype=target.dtype),
                    [a.size for a in axes],
                    [a.stride * size for a in axes],
                )
                continue
            # Halve the axis that reaches farthest; what is left lies closer together.
            d = max(range(len(axes)), key=lambda d: (axes[d].size - 1) * axes[d].stride)
            axis, half = axes[d], axes[d].size // 2
            before = (slice(None),) * d
            first = (*axes[:d], Axis(half, axis.stride), *axes[d + 1 :])
            second = (*axes[:d], Axis(axis.size - half, axis.stride), *axes[d + 1 :])
            todo.append((Box(skip, first), target[(*before, slice(half))]))
            todo.append((Box(skip + half * axis.stride, second), target[(*before, slice(half, None))]))


class SwappedTensor(LazyTensor):
    """A tensor whose elements another kind of machine wrote, with their bytes turned round."""

    __slots__ = ("inner",)

    def __init__(self, inner: LazyTensor) -> None:
        super().__init__(inner.dtype, inner.shape)
        self.inner = inner

    def read_into(self, start: int, out: memoryview) -> None:
        """Read, then swap; a complex number's two parts each for itself."""
        self.inner.read_into(start, out)
        size = 4 if self.dtype is DType.C64 else self.dtype.itemsize
        swapped = array({2: "H", 4: "I", 8: "Q"}[size], bytes(out))
        swapped.byteswap()
        out[:] = memoryview(swapped).cast("B")
