"""Tensors that are computed of several others, window by window or as a whole."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from builder.tensors.conversions import copy_into
from builder.tensors.lazy import WINDOW, Derived, DType, LazyTensor
from builder.tensors.scratch import scratch

if TYPE_CHECKING:
    import torch

ELEMENTS = 1 << 18  # of a window: as FP32 it lies in the processor's cache, with those it is made of


class Values:
    """The windows of the tensors that something is made of, as FP32, loaded as they are asked for.

    They are the formula's own, to compute in. FP64 is rounded.
    """

    def __init__(self, sources: Sequence[LazyTensor], first: int, count: int, opened: ExitStack) -> None:
        self.first, self.count = first, count
        self._sources, self._opened = sources, opened

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._load(index, self._opened.enter_context(scratch()))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def each(self) -> Iterator[torch.Tensor]:
        """One after the other, each valid until the next is asked for: memory for one is enough."""
        with scratch() as buffer:
            for index in range(len(self)):
                yield self._load(index, buffer)

    def _load(self, index: int, buffer: memoryview) -> torch.Tensor:
        import torch

        source = self._sources[index]
        size = source.dtype.itemsize
        data = buffer[: 4 * self.count]
        values = torch.frombuffer(data, dtype=torch.float32)
        if source.dtype is DType.F32:
            source.read_into(4 * self.first, data)
            return values
        step = min(self.count, len(buffer) // size)
        with scratch() as raw:
            for at in range(0, self.count, step):
                count = min(step, self.count - at)
                part = raw[: size * count]
                source.read_into(size * (self.first + at), part)
                copy_into(values[at : at + count], torch.frombuffer(part, dtype=source.dtype.torch))
        return values


class Computed(LazyTensor):
    """A tensor whose windows are computed with torch, of tensors of any types."""

    __slots__ = ("sources",)

    def __init__(self, sources: Sequence[LazyTensor], dtype: DType, shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self.sources = tuple(sources)

    @property
    def computed(self) -> bool:
        """True."""
        return True

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The sources."""
        return self.sources

    def read_into(self, start: int, out: memoryview) -> None:
        """Compute the range, a window of elements at a time."""
        import torch

        size = self.dtype.itemsize
        for at in range(0, len(out), size * ELEMENTS):
            target = out[at : at + size * ELEMENTS]
            with ExitStack() as opened:
                made = self.window(Values(self.sources, (start + at) // size, len(target) // size, opened))
                torch.frombuffer(target, dtype=self.dtype.torch).copy_(made)

    @abstractmethod
    def window(self, values: Values) -> torch.Tensor:
        """The elements of a window, of any floating type."""


Formula = Callable[[Values], "torch.Tensor"]


class Elementwise(Computed):
    """What a formula makes of the elements at one place of tensors of one shape."""

    __slots__ = ("formula",)

    def __init__(self, sources: Sequence[LazyTensor], formula: Formula, dtype: DType = DType.F32) -> None:
        super().__init__(sources, dtype, sources[0].shape)
        self.formula = formula

    def window(self, values: Values) -> torch.Tensor:
        """What the formula makes of a window."""
        return self.formula(values)


Reduce = Callable[[Sequence[LazyTensor]], Any]


class Reducing(Computed):
    """What a formula makes of elements and of what was found, once, in a first pass over the whole tensors.

    That pass is one thread's, window after window: so its sums are the same however many threads there are.
    """

    __slots__ = ("_found", "_lock", "formula", "reduce")

    def __init__(
        self,
        sources: Sequence[LazyTensor],
        reduce: Reduce,
        formula: Callable[[Values, Any], torch.Tensor],
        dtype: DType = DType.F32,
    ) -> None:
        super().__init__(sources, dtype, sources[0].shape)
        self.reduce, self.formula = reduce, formula
        self._lock = threading.Lock()
        self._found: list[Any] = []

    def window(self, values: Values) -> torch.Tensor:
        """What the formula makes of a window and of what was found in all of them."""
        with self._lock:
            if not self._found:
                self._found.append(self.reduce(self.sources))
        return self.formula(values, self._found[0])


class Whole(Computed):
    """What a function makes of whole tensors, of FP32 and in their shapes; it gives one of the same shape.

    The result is kept until all of it was read: a pass reads it from first to last.
    """

    __slots__ = ("_lock", "_made", "_unread", "function")

    def __init__(
        self,
        sources: Sequence[LazyTensor],
        function: Callable[..., torch.Tensor],
        dtype: DType = DType.F32,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(sources, dtype, sources[0].shape if shape is None else shape)
        self.function = function
        self._lock = threading.Lock()
        self._made: torch.Tensor | None = None
        self._unread = 0

    def window(self, values: Values) -> torch.Tensor:
        """A window of the result, which is computed when it is first asked for."""
        with self._lock:
            if self._made is None:
                made = self.function(*map(whole, self.sources))
                assert tuple(made.shape) == self.shape, f"{tuple(made.shape)} for {self.shape}"
                self._made, self._unread = made.flatten(), self.numel
            found = self._made[values.first : values.first + values.count]
            self._unread -= values.count
            if self._unread <= 0:
                self._made = None
        return found


def whole(tensor: LazyTensor) -> torch.Tensor:
    """All of a tensor as FP32, in its shape."""
    return part(tensor, 0, tensor.numel).view(tensor.shape)


def part(tensor: LazyTensor, first: int, count: int) -> torch.Tensor:
    """Some of a tensor's elements as FP32, in memory of their own."""
    import torch

    made = torch.empty(count, dtype=torch.float32)
    for at in range(0, count, ELEMENTS):
        with ExitStack() as opened:
            window = Values([tensor], first + at, min(ELEMENTS, count - at), opened)
            made[at : at + window.count] = window[0]
    return made


def windows(sources: Sequence[LazyTensor]) -> Iterator[Values]:
    """The windows of tensors of one shape, from first to last; each is valid until the next is asked for."""
    total = sources[0].numel
    for first in range(0, total, ELEMENTS):
        with ExitStack() as opened:
            yield Values(sources, first, min(ELEMENTS, total - first), opened)


_KEPT = 32  # windows a thread keeps: those of as many tensors as a graph of merges uses at one place


class _Windows(threading.local):
    """The windows that a thread read last, of tensors that are used more than once."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[Shared, int, int], bytearray] = OrderedDict()


_windows = _Windows()


class Shared(Derived):
    """A tensor that several are made of: a thread reads each window of it once, not for each of them."""

    __slots__ = ()

    def __init__(self, source: LazyTensor) -> None:
        super().__init__(source, source.shape)

    def read_into(self, start: int, out: memoryview) -> None:
        """Copy the range, where it was read just before, else read it."""
        held, key = _windows.held, (self, start, len(out))
        data = held.pop(key, None)
        if data is None:
            self.source.read_into(start, out)
            while len(held) >= _KEPT:
                held.popitem(last=False)
            data = bytearray(out)
        else:
            out[:] = data
        held[key] = data


_RECENT = 64 << 20  # bytes of windows; as many as the outputs that are written at once read at one place


class _Window:
    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.data: bytearray | None = None


class Recent:
    """The windows that the threads of a pass read last of tensors that several outputs are made of."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Common, int], _Window] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def window(self, tensor: Common, index: int) -> bytearray:
        """A window of a tensor: read by the first thread that asks for it, while others wait."""
        key = tensor, index
        with self._lock:
            if (held := self._held.pop(key, None)) is None:
                held = _Window(min(WINDOW, tensor.nbytes - index * WINDOW))
                self._size += held.size
            self._held[key] = held
            while self._size > _RECENT and len(self._held) > 1:
                self._size -= self._held.popitem(last=False)[1].size
        with held.lock:
            if held.data is None:
                data = bytearray(held.size)
                tensor.source.read_into(index * WINDOW, memoryview(data))
                held.data = data
            return held.data


class Common(Derived):
    """A tensor that several outputs of a pass are made of: each window of it is read once for all of them."""

    __slots__ = ("_recent",)

    def __init__(self, source: LazyTensor, recent: Recent) -> None:
        super().__init__(source, source.shape)
        self._recent = recent

    def read_into(self, start: int, out: memoryview) -> None:
        """Copy the range from windows that were read just before, else read these."""
        done = 0
        while done < len(out):
            index, at = divmod(start + done, WINDOW)
            part = memoryview(self._recent.window(self, index))[at : at + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
