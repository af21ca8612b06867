"""The pass over tensors: each window is read, looked at, digested and written while it is warm."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from blake3 import blake3

from builder.base.errors import CkptError, Problem, SourceError
from builder.base.parallel import Cancelled, Consume, run_windows
from builder.base.progress import SILENT, Reporter
from builder.tensors.conversions import copy_into, greatest
from builder.tensors.lazy import WINDOW, DType, LazyTensor
from builder.tensors.packed import OPAQUE
from builder.tensors.torch_threads import exact_torch, lone_torch
from builder.tensors.zeros import Stretch, joined, stretches

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BINS = 1 << 16  # the bit patterns of a float16


class Whole(Protocol):
    """Something that takes all bytes of a pass in order, such as a hash of `hashlib`."""

    def update(self, data: memoryview, /) -> object: ...


@dataclass(frozen=True, slots=True)
class TensorScan:
    """What one tensor holds.

    `digest` is the BLAKE3-256 of its bytes, None unless asked for. `nan` and `infinite` count elements;
    `overflow` counts the finite ones that FP16 rounds to infinity; `largest` is the greatest finite
    magnitude, 0.0 where there is none. They are zero where numbers were not asked for, and of integers and
    packed types. `zeros` are the stretches of its bytes that are zero (see `builder.tensors.zeros`).
    """

    digest: str | None = None
    nan: int = 0
    infinite: int = 0
    overflow: int = 0
    largest: float = 0.0
    zeros: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """`tensors` by name; `histograms` by group: int64 `[65536]`, how often each float16 pattern occurs.

    Both are in the order of what was asked for.
    """

    tensors: dict[str, TensorScan] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)


class Span(NamedTuple):
    """A tensor, and where its `length` bytes go: from `offset` on."""

    name: str
    tensor: LazyTensor
    offset: int
    length: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Read the tensor's bytes from `start` on; a failure names the tensor."""
        try:
            self.tensor.read_into(start, out)
        except OSError as error:  # said here, or it would be taken for a failure to write
            evidence = (os.strerror(error.errno or 0), f"tensor `{self.name}`")
            raise SourceError(Problem("reading failed", evidence=evidence)) from None
        except CkptError as error:
            mark = f"tensor `{self.name}`"
            error.problems = tuple(
                p
                if any(mark in text for text in (p.fact, *p.evidence))
                else replace(p, evidence=(*p.evidence, mark))
                for p in error.problems
            )
            raise


def scan(
    tensors: Mapping[str, LazyTensor],
    *,
    groups: Mapping[str, str] | None = None,
    digests: bool = False,
    numbers: bool = True,
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "reading",
    stop: threading.Event | None = None,
) -> Scan:
    """Read every tensor given, once.

    `groups` names the histogram that a tensor's elements, cast to float16, are counted in; integers and
    packed types are counted in none. `digests` asks for the BLAKE3-256 of each tensor, `numbers` for what
    `TensorScan` counts. The result does not depend on `threads`. Raises SourceError when bytes cannot be
    had.
    """
    spans = spans_of(tensors)
    reporter.start(task, sum(s.length for s in spans))
    try:
        found = run_pass(
            spans,
            groups=groups,
            digests=digests,
            numbers=numbers,
            threads=threads,
            stop=stop,
            advance=lambda count: reporter.advance(task, count),
        )
    finally:
        reporter.finish(task)
    return Scan({name: found.tensors[name] for name in tensors}, found.histograms)


def spans_of(tensors: Mapping[str, LazyTensor]) -> list[Span]:
    """Tensors side by side.

    Wide elements come first, as in a file: so every tensor begins at a multiple of its element's size.
    """
    spans, at = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        spans.append(Span(name, tensor, at, tensor.nbytes))
        at += tensor.nbytes
    return spans


@dataclass(frozen=True)
class Pass:
    """What is pulled in a pass, and who looks.

    `write` gets windows in any order, each with its offset; `whole` gets them from first to last. `groups`,
    `digests` and `numbers` are as for `scan`, and `checksums` gets the CRC-32 of each tensor. `advance` hears
    of bytes that are done.
    """

    spans: Sequence[Span]
    write: Callable[[memoryview, int], object] | None = None
    whole: Sequence[Whole] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    digests: bool = False
    checksums: dict[str, int] | None = None
    numbers: bool = False
    advance: Callable[[int], object] = lambda count: None


T = TypeVar("T")
# Work that asks for passes, some at once, and is given what each found, or why it failed.
Passing = Generator[Sequence[Pass], "Sequence[Scan | Exception]", T]


def run_pass(
    spans: Sequence[Span],
    *,
    groups: Mapping[str, str] | None = None,
    threads: int = 2,
    window: int = WINDOW,
    max_memory: int = 256 << 20,
    stop: threading.Event | None = None,
    **looking: Any,
) -> Scan:
    """Pull every span's bytes once, in windows of at most `window` bytes, and show them to all who look.

    `looking` is as for `Pass`. At most `max_memory` bytes of windows exist at once. Of several failures the
    first in the order of `spans` is raised.
    """
    asked = Pass(spans, groups=groups or {}, **looking)
    (found,) = run_passes([asked], threads=threads, window=window, max_memory=max_memory, stop=stop)
    if isinstance(found, Exception):
        raise found
    return found


def alone(asked: Pass) -> Passing[Scan]:
    """The work of one pass; raises why it failed."""
    (found,) = yield [asked]
    if isinstance(found, Exception):
        raise found
    return found


def together(works: Sequence[Passing[T]], *, keep_going: bool = False) -> Passing[list[T | CkptError | None]]:
    """Several pieces of work as one: all passes that they ask for are carried out side by side.

    Of each what came of it, or why it failed; None where it was given up because another one had failed, as
    no further pass is begun then, unless it is to `keep_going`. Raises Cancelled.
    """
    done: list[T | CkptError | None] = [None] * len(works)
    answers: dict[int, Sequence[Scan | Exception] | None] = dict.fromkeys(range(len(works)))
    with ExitStack() as opened:
        for work in works:
            opened.callback(work.close)
        while answers:
            asked = {}
            for n, answer in answers.items():
                try:
                    asked[n] = works[n].send(answer)  # type: ignore[arg-type]  # None begins it
                except StopIteration as finished:
                    done[n] = finished.value
                except Cancelled:
                    raise
                except CkptError as error:
                    done[n] = error
            if not asked or (not keep_going and any(isinstance(d, CkptError) for d in done)):
                break
            found = iter((yield [p for passes in asked.values() for p in passes]))
            answers = {n: list(islice(found, len(passes))) for n, passes in asked.items()}
    return done


def side_by_side(works: Sequence[Passing[T]]) -> Passing[list[T]]:
    """Several pieces of work as one, which raises what the first that fails raises."""
    made: list[T] = []
    for found in (yield from together(works)):
        if isinstance(found, CkptError):
            raise found
        made.append(cast("T", found))  # or another one has failed
    return made


def carry_out(work: Passing[T], **how: Any) -> T:
    """Do work that asks for passes; `how` is as for `run_passes`. Raises as the work does."""
    with closing(work):
        try:
            asked = next(work)
            while True:
                asked = work.send(run_passes(asked, **how))
        except StopIteration as done:
            made: T = done.value
            return made


def run_passes(
    passes: Sequence[Pass],
    *,
    threads: int = 2,
    window: int = WINDOW,
    max_memory: int = 256 << 20,
    stop: threading.Event | None = None,
) -> list[Scan | Exception]:
    """Carry out passes side by side, like beside like; of each what it found, or why it failed.

    Windows of tensors of one name, or made of one tensor, come one after the other in all passes that have
    them, as far as the order within each allows: so what several of them read can be read once. A failure
    ends its own pass alone: of several the first in the order of its spans is given. All else is as for
    `run_pass`.
    """
    window = max(16, min(window, max_memory) // 16 * 16)  # so that no element is cut
    works = [_Work(p, list(_chunks(p.spans, window))) for p in passes]
    order = _side_by_side(works)

    def produce(index: int, buffer: memoryview) -> int:
        return order[index][0].produce(order[index][1], buffer)

    consumers = [(work, each) for work in works for each in work.consumers]
    most = max(1, max_memory // window)
    threads = max(1, min(threads, most))
    ways = len(consumers) if len(works) == 1 else min(len(consumers), max(_CONSUMERS, threads))
    computes = any(w.computes for w in works)
    with lone_torch() if computes else _nothing():
        run_windows(
            len(order),
            produce,
            [_dealt(order, consumers[n::ways]) for n in range(ways)],
            size=min(window, max((sum(s.length for s in p.spans) for p in passes), default=0)),
            threads=threads,
            buffers=min(2 * threads + 2, most),
            around=exact_torch if computes else _nothing,
            stop=stop,
        )
    return [w.result() for w in works]


_CONSUMERS = 4  # threads that look at the windows of several passes in order, at least


class _Work:
    """A pass that is carried out."""

    def __init__(self, asked: Pass, chunks: list[_Chunk]) -> None:
        self.asked, self.chunks = asked, chunks
        self.counters = _Counters(asked.groups, asked.numbers)
        self.digests: dict[str, str] = {}
        self.failed: tuple[int, Exception] | None = None  # the first window that failed
        self._lock = threading.Lock()
        self.consumers = [_all_of(each) for each in asked.whole]
        if asked.digests:
            found = self.digests
            self.consumers.append(_each(chunks, blake3, lambda n, h: found.update({n: h.hexdigest()})))
        if (checksums := asked.checksums) is not None:
            self.consumers.append(_each(chunks, _Crc32, lambda n, crc: checksums.update({n: crc.value})))

    @property
    def computes(self) -> bool:
        """Whether torch computes in it."""
        asked = self.asked
        return bool(asked.groups) or asked.numbers or any(s.tensor.computed for s in asked.spans)

    def produce(self, index: int, buffer: memoryview) -> int:
        """Make a window; nothing of a pass that has failed before it."""
        if self.is_over(index):
            return 0
        chunk, at = self.chunks[index], 0
        try:
            for span, start, length in chunk.parts:
                span.read_into(start, buffer[at : at + length])
                at += length
            self.counters.count(chunk, buffer)
            if self.asked.write is not None:
                self.asked.write(buffer[:at], chunk.offset)
            self.asked.advance(at)
        except Cancelled:
            raise
        except Exception as error:
            with self._lock:
                if not self.is_over(index):
                    self.failed = index, error
            return 0
        return at

    def is_over(self, index: int) -> bool:
        """Whether a window before this one has failed."""
        return self.failed is not None and self.failed[0] < index

    def result(self) -> Scan | Exception:
        """What was found, or the failure of the first window that failed."""
        if self.failed is not None:
            return self.failed[1]
        return self.counters.result(self.asked.spans, self.digests)


def _side_by_side(works: Sequence[_Work]) -> list[tuple[_Work, int]]:
    """The windows of all passes in one order, which is each one's own, like beside like."""
    ranks = _ranks(works)

    def rank(n: int, index: int) -> tuple[int, float]:
        span, start, _ = works[n].chunks[index].parts[0]
        return ranks[n][span.name], start / span.length if span.length else 0.0

    order = []
    heads = [(rank(n, 0), n, 0) for n, w in enumerate(works) if w.chunks]
    heapify(heads)
    while heads:
        _, n, index = heads[0]
        order.append((works[n], index))
        if index + 1 < len(works[n].chunks):
            heapreplace(heads, (rank(n, index + 1), n, index + 1))
        else:
            heappop(heads)
    return order


def _ranks(works: Sequence[_Work]) -> dict[int, dict[str, int]]:
    """The place of each pass's tensors in the order of the largest pass that has them or their like."""
    known: dict[object, int] = {}
    ranks: dict[int, dict[str, int]] = {}
    for n in sorted(range(len(works)), key=lambda n: -sum(s.length for s in works[n].asked.spans)):
        ranks[n] = own = {}
        for span in works[n].asked.spans:
            like = [*map(id, _leaves(span.tensor)), span.name]
            own[span.name] = rank = next((known[k] for k in like if k in known), len(known))
            for key in like:
                known.setdefault(key, rank)
    return ranks


def _leaves(tensor: LazyTensor) -> Iterator[LazyTensor]:
    """The tensors that one is made of in the end."""
    near, seen = [tensor], {id(tensor)}
    while near:
        each = near.pop()
        if not each.made_of:
            yield each
        near += [t for t in each.made_of if id(t) not in seen]
        seen.update(map(id, each.made_of))


def _dealt(order: Sequence[tuple[_Work, int]], consumers: Sequence[tuple[_Work, Consume]]) -> Consume:
    """A consumer that shows each of these the windows of its pass."""

    def take(index: int, data: memoryview) -> None:
        work, own = order[index]
        for whose, consume in consumers:
            if whose is work and not work.is_over(own + 1):
                consume(own, data)

    return take


class _Chunk(NamedTuple):
    """Parts of spans (span, start, length) that lie side by side from `offset` on."""

    offset: int
    parts: list[tuple[Span, int, int]]


def _chunks(spans: Iterable[Span], size: int) -> Iterator[_Chunk]:
    """The spans in their order, cut and gathered into chunks of at most `size` bytes."""
    parts: list[tuple[Span, int, int]] = []
    filled, offset = 0, 0
    for span in spans:
        start = 0
        if parts and span.offset != offset + filled:  # there is something between them
            yield _Chunk(offset, parts)
            parts = []
        if not parts:
            filled, offset = 0, span.offset
        while True:
            itemsize = span.tensor.dtype.itemsize
            length = min(span.length - start, (size - filled) // itemsize * itemsize)
            if length or not span.length:
                parts.append((span, start, length))
            start += length
            filled += length
            if start == span.length:
                break
            yield _Chunk(offset, parts)
            parts, filled, offset = [], 0, span.offset + start
    if parts:
        yield _Chunk(offset, parts)


def _all_of(whole: Whole) -> Callable[[int, memoryview], object]:
    return lambda _, data: whole.update(data)


def _each(
    chunks: Sequence[_Chunk], new: Callable[[], Any], done: Callable[[str, Any], object]
) -> Callable[[int, memoryview], None]:
    """A consumer that has every tensor's bytes taken by an object of its own, given to `done` at the end."""
    taker = new()

    def take(index: int, data: memoryview) -> None:
        nonlocal taker
        at = 0
        for span, start, length in chunks[index].parts:
            taker.update(data[at : at + length])
            at += length
            if start + length == span.length:
                done(span.name, taker)
                taker = new()

    return take


class _Crc32:
    """The CRC-32 of what is taken."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview) -> None:
        self.value = zlib.crc32(data, self.value)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Scratch(threading.local):
    """A thread's buffers, whichever pass it works for: fresh memory costs more than what is done with it."""

    half: torch.Tensor | None = None
    index: torch.Tensor | None = None


_scratch = _Scratch()  # which a thread takes with it when it ends


class _Counters:
    """What is counted in the windows of a pass, by as many threads as there are."""

    def __init__(self, groups: Mapping[str, str], numbers: bool) -> None:
        self._groups, self._with_numbers = groups, numbers
        self._adding = threading.Lock()
        self._histograms: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, _Numbers] = {}
        self._zeros: dict[str, list[Stretch]] = {}

    def count(self, chunk: _Chunk, buffer: memoryview) -> None:
        """Count what a chunk holds."""
        at = 0
        run: tuple[str, DType, int, int] | None = None  # parts side by side are counted as one
        for span, start, length in chunk.parts:
            dtype = span.tensor.dtype
            if length and (zeros := stretches(buffer[at : at + length])):
                self._zeros.setdefault(span.name, []).extend((start + a, start + b) for a, b in zeros)
            if length and dtype.floating and dtype not in OPAQUE:
                if self._with_numbers:
                    self._number(span.name, dtype, buffer[at : at + length])
                if (group := self._groups.get(span.name)) is not None:
                    if run is not None and (run[0], run[1], run[3]) == (group, dtype, at):
                        run = group, dtype, run[2], at + length
                    else:
                        self._count(run, buffer)
                        run = group, dtype, at, at + length
            at += length
        self._count(run, buffer)

    def _number(self, name: str, dtype: DType, data: memoryview) -> None:
        import torch

        found = _Numbers()
        found.add(torch.frombuffer(data, dtype=dtype.torch))
        with self._adding:
            self._numbers.setdefault(name, _Numbers()).merge(found)

    def _count(self, run: tuple[str, DType, int, int] | None, buffer: memoryview) -> None:
        if run is None:
            return
        import torch

        group, dtype, start, stop = run
        values = torch.frombuffer(buffer[start:stop], dtype=dtype.torch)
        if _scratch.half is None or _scratch.index is None or len(_scratch.half) < len(values):
            _scratch.half = torch.empty(len(buffer), dtype=torch.float16)
            _scratch.index = torch.empty(len(buffer), dtype=torch.int32)
        half = values
        if dtype is not DType.F16:
            half = _scratch.half[: len(values)]
            copy_into(half, values)
        index = _scratch.index[: len(values)]
        index.copy_(half.view(torch.int16)).bitwise_and_(BINS - 1)
        counts = torch.bincount(index, minlength=BINS)
        with self._adding:
            known = self._histograms.get(group)
            self._histograms[group] = counts if known is None else known.add_(counts)

    def result(self, spans: Sequence[Span], digests: Mapping[str, str]) -> Scan:
        """All that was counted, by any thread."""
        tensors = {}
        for span in spans:
            total = self._numbers.get(span.name, _NO_NUMBERS)
            tensors[span.name] = TensorScan(
                digests.get(span.name),
                total.nan,
                total.infinite,
                total.overflow,
                total.largest,
                joined(self._zeros.get(span.name, ()), span.length),
            )
        found = ((g, self._histograms.get(g)) for g in dict.fromkeys(self._groups.values()))
        return Scan(tensors, {group: counts.numpy() for group, counts in found if counts is not None})


@dataclass(slots=True)
class _Numbers:
    nan: int = 0
    infinite: int = 0
    overflow: int = 0
    largest: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Count the numbers of a window."""
        import torch

        # NaN and infinity show in the greatest; only a window that has some is looked at value by value.
        top = greatest(values)
        if not math.isfinite(top):
            values = values if values.element_size() > 1 else values.float()
            self.nan += int(values.isnan().sum())
            self.infinite += int(values.isinf().sum())
            values = values[values.isfinite()]
            if not len(values):
                return
            top = greatest(values)
        self.largest = max(self.largest, top)
        if top > 65504.0:
            self.overflow += int(values.to(torch.float16).isinf().sum())

    def merge(self, other: _Numbers) -> None:
        """Count what was counted elsewhere."""
        self.nan += other.nan
        self.infinite += other.infinite
        self.overflow += other.overflow
        self.largest = max(self.largest, other.largest)


_NO_NUMBERS = _Numbers()
