"""Tensors made of others by moving elements alone: parts, joins, transposes and other shapes."""

from __future__ import annotations

from collections.abc import Sequence

from builder.tensors.lazy import WINDOW, Derived, LazyTensor


class Reshaped(Derived):
    """The same elements in another shape."""

    __slots__ = ()

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        super().__init__(source, shape)
        assert self.numel == source.numel

    @property
    def stored(self) -> tuple[str, int]:
        """As the source."""
        return self.source.stored

    def read_into(self, start: int, out: memoryview) -> None:
        """Read from the source: the order of elements is the same."""
        self.source.read_into(start, out)


class Rows(Derived):
    """`count` of a tensor's rows, from row `first` on."""

    __slots__ = ("offset",)

    def __init__(self, source: LazyTensor, first: int, count: int) -> None:
        super().__init__(source, (count, *source.shape[1:]))
        assert first >= 0 and first + count <= source.shape[0]
        self.offset = first * (self.nbytes // count if count else 0)

    def read_into(self, start: int, out: memoryview) -> None:
        """Read the range from the source."""
        self.source.read_into(self.offset + start, out)


class Reordered(Derived):
    """A tensor's rows in another order: row `n` is the source's row `order[n]`."""

    __slots__ = ("order",)

    def __init__(self, source: LazyTensor, order: Sequence[int]) -> None:
        super().__init__(source, source.shape)
        assert len(order) == source.shape[0]
        self.order = order

    @property
    def stored(self) -> tuple[str, int]:
        """As the source."""
        return self.source.stored

    def read_into(self, start: int, out: memoryview) -> None:
        """Read what of each row the range touches."""
        width = self.nbytes // max(1, len(self.order))  # of no rows nothing is read
        at = 0
        while at < len(out):
            row, inside = divmod(start + at, width)
            count = min(len(out) - at, width - inside)
            self.source.read_into(self.order[row] * width + inside, out[at : at + count])
            at += count


class Joined(LazyTensor):
    """The rows of several tensors of one dtype, one tensor after the other."""

    __slots__ = ("sources",)

    def __init__(self, sources: Sequence[LazyTensor]) -> None:
        first = sources[0]
        super().__init__(first.dtype, (sum(s.shape[0] for s in sources), *first.shape[1:]))
        assert all(s.dtype is first.dtype and s.shape[1:] == first.shape[1:] for s in sources)
        self.sources = tuple(sources)

    @property
    def computed(self) -> bool:
        """Whether any source is."""
        return any(s.computed for s in self.sources)

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The sources."""
        return self.sources

    def read_into(self, start: int, out: memoryview) -> None:
        """Read from each source that the range touches."""
        for source in self.sources:
            if not len(out):
                return
            if start < source.nbytes:
                count = min(len(out), source.nbytes - start)
                source.read_into(start, out[:count])
                start, out = 0, out[count:]
            else:
                start -= source.nbytes


def swapped(tensor: LazyTensor) -> LazyTensor:
    """A tensor whose rows' second half comes first; their number is even."""
    half = tensor.shape[0] // 2
    return Joined([Rows(tensor, half, half), Rows(tensor, 0, half)])


class Transposed(Derived):
    """A matrix whose rows are the source's columns; numpy is imported when it is read."""

    __slots__ = ()

    def __init__(self, source: LazyTensor) -> None:
        height, width = source.shape
        super().__init__(source, (width, height))

    def read_into(self, start: int, out: memoryview) -> None:
        """Gather the columns from the source, a band of its rows at a time.

        The source is read whole for every call, so ask for much at a time.
        """
        import numpy as np

        if not len(out):
            return
        size = self.dtype.itemsize
        columns, rows = self.shape
        first, last = start // size // rows, -(-(start + len(out)) // size // rows)
        wanted = np.empty((last - first, rows), dtype=f"V{size}")
        step = max(1, WINDOW // (columns * size))
        buffer = memoryview(bytearray(min(step, rows) * columns * size))
        for row in range(0, rows, step):
            band = buffer[: min(step, rows - row) * columns * size]
            self.source.read_into(row * columns * size, band)
            values = np.frombuffer(band, dtype=f"V{size}").reshape(-1, columns)
            wanted[:, row : row + len(values)] = values[:, first:last].T
        skip = start - first * rows * size
        out[:] = wanted.tobytes()[skip : skip + len(out)]


class Columns(Derived):
    """`count` of what a tensor has along its second dimension, from `first` on, such as input channels."""

    __slots__ = ("inner", "offset")

    def __init__(self, source: LazyTensor, first: int, count: int) -> None:
        super().__init__(source, (source.shape[0], count, *source.shape[2:]))
        assert first >= 0 and first + count <= source.shape[1]
        self.inner = self.nbytes // max(1, source.shape[0])  # bytes of a row
        self.offset = first * (self.inner // count if count else 0)

    def read_into(self, start: int, out: memoryview) -> None:
        """Read the part of each row that the range touches."""
        whole = self.source.nbytes // max(1, self.shape[0])
        at = 0
        while at < len(out):
            row, inside = divmod(start + at, self.inner)
            count = min(len(out) - at, self.inner - inside)
            self.source.read_into(row * whole + self.offset + inside, out[at : at + count])
            at += count


class SideBySide(LazyTensor):
    """Tensors of one dtype joined along their second dimension."""

    __slots__ = ("sources",)

    def __init__(self, sources: Sequence[LazyTensor]) -> None:
        first = sources[0]
        super().__init__(first.dtype, (first.shape[0], sum(s.shape[1] for s in sources), *first.shape[2:]))
        assert all(s.dtype is first.dtype and s.shape[2:] == first.shape[2:] for s in sources)
        self.sources = tuple(sources)

    @property
    def computed(self) -> bool:
        """Whether any source is."""
        return any(s.computed for s in self.sources)

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The sources."""
        return self.sources

    def read_into(self, start: int, out: memoryview) -> None:
        """Read from each source what of each row the range touches."""
        rows = max(1, self.shape[0])
        widths = [s.nbytes // rows for s in self.sources]
        at = 0
        while at < len(out):
            row, inside = divmod(start + at, sum(widths))
            for source, width in zip(self.sources, widths, strict=True):
                if inside < width:
                    count = min(len(out) - at, width - inside)
                    source.read_into(row * width + inside, out[at : at + count])
                    at += count
                    break
                inside -= width
