"""Writing safetensors files: the layout is known before data moves, and the data streams through."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from builder.base.disk import replacing, write_all
from builder.base.errors import CkptError, OutputError, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats.safetensors import MAX_HEADER, METADATA, Entry
from builder.tensors.digests import Digest, TensorHasher
from builder.tensors.lazy import WINDOW, DType, LazyTensor

_ALIGN = 16  # bytes; of windows, so that no element is cut
_FLUSH = 1 << 20  # bytes from which telling the system about a write is worth a call
_ORDER = {dtype: index for index, dtype in enumerate(DType)}


class Layout(NamedTuple):
    """Where everything of a file will be: `head` is its first bytes, `tensors` in the order of theirs.

    Offsets of tensors count from the end of `head`; `size` is of the whole file, in bytes.
    """

    head: bytes
    tensors: dict[str, Entry]
    size: int


class Written(NamedTuple):
    """A file that was written: its SHA-256 and the digests of its tensors, where asked for.

    `stat` is its state before it got its name.
    """

    path: Path
    size: int
    sha256: str | None
    tensors: dict[str, Digest]
    data_offset: int
    stat: os.stat_result


def plan_layout(
    specs: Mapping[str, tuple[DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """The layout of a safetensors file of these dtypes and shapes, without touching any data.

    It is the reference implementation's: widest dtype first, then by name; a compact header, padded with
    spaces to a multiple of 8. Metadata is sorted, where the reference leaves the order to chance.
    Raises OutputError for what the format cannot hold.
    """
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    tensors: dict[str, Entry] = {}
    at = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda s: (-_ORDER[s[1][0]], s[0])):
        if name == METADATA or "\0" in name:
            raise OutputError(Problem(f"a tensor cannot be named `{name}` in a safetensors file"))
        bits = dtype.bits
        for extent in shape:
            bits *= extent
        if bits % 8:
            raise OutputError(
                Problem(
                    f"tensor `{name}` is not a whole number of bytes",
                    evidence=(f"{dtype.code} {list(shape)}",),
                )
            )
        tensors[name] = Entry(dtype, shape, at, at + bits // 8)
        header[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": (at, at + bits // 8)}
        at += bits // 8
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        name = str(error.object)[max(0, error.start - 40) : error.end]
        raise OutputError(
            Problem("a name is not valid Unicode and cannot be written", evidence=(f"…{name!r}",))
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(
            Problem(
                "names and metadata are too long for a safetensors file",
                evidence=(f"a header of {len(text):,} bytes; the format allows {MAX_HEADER:,}",),
            )
        )
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, tensors, len(head) + at)


def write(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    tensor_digests: bool = False,
    sha256: bool = True,
    file_digest: bool = True,
    threads: int = 2,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
    reporter: Reporter = SILENT,
    task: str = "",
    max_memory: int = 256 << 20,
    accept: Callable[[Written], object] = lambda written: None,
) -> Written:
    """Write tensors as a safetensors file, which takes the place of `path` whole or not at all.

    Tensors are pulled in windows by `threads` threads, each window being read, hashed and written while
    it is warm; at most `max_memory` bytes of windows exist at once. The bytes depend on the tensors and
    the metadata alone. `reporter` hears of `task` in bytes of tensors. Without `sha256`, digests of
    tensors are XXH3 alone. `accept` sees what was written before it takes its place, and may raise.
    Raises OutputError when the file cannot be written or `path` is one of `inputs`, and what the tensors'
    `read_into` raises, with the tensor named. Of several failures the first in the order of the work is
    raised.
    """
    path = Path(path)
    layout = plan_layout({n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    data_offset = len(layout.head)
    spans = [_Span(n, tensors[n], data_offset + e.start, e.end - e.start) for n, e in layout.tensors.items()]
    reporter.start(task, layout.size - data_offset)
    try:
        with replacing(path, durable=durable, inputs=inputs) as fd:
            _check_room(path, fd, layout.size)
            write_all(fd, memoryview(layout.head), 0)
            job = _Job(fd, durable, reporter, task, threads, max_memory)
            hasher = partial(TensorHasher, sha256) if tensor_digests else None
            whole = hashlib.sha256(layout.head) if file_digest else None
            digests = (
                _by_tensor(job, spans, hasher) if whole is None else _in_order(job, spans, whole, hasher)
            )
            digest = whole.hexdigest() if whole is not None else None
            written = Written(path, layout.size, digest, digests, data_offset, os.fstat(fd))
            accept(written)
    finally:
        reporter.finish(task)
    return written


class _Span(NamedTuple):
    """A tensor, and where in the file it goes."""

    name: str
    tensor: LazyTensor
    offset: int
    length: int

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.tensor.dtype.itemsize

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


class _Job:
    """The file being made, the means to make it, and who hears of it."""

    def __init__(
        self, fd: int, durable: bool, reporter: Reporter, task: str, threads: int, max_memory: int
    ) -> None:
        self.fd, self.durable, self.reporter, self.task = fd, durable, reporter, task
        self.window = max(_ALIGN, min(WINDOW, max_memory) // _ALIGN * _ALIGN)
        self.most = max(1, max_memory // self.window)
        self.threads = max(1, min(threads, self.most))

    def write(self, data: memoryview, offset: int) -> None:
        write_all(self.fd, data, offset)
        if self.durable and len(data) >= _FLUSH and hasattr(os, "posix_fadvise"):
            # Starts the way to the disk at once and without waiting, so that little is left for fsync.
            os.posix_fadvise(self.fd, offset, len(data), os.POSIX_FADV_DONTNEED)
        self.reporter.advance(self.task, len(data))


def _by_tensor(
    job: _Job, spans: list[_Span], make_hasher: Callable[[], TensorHasher] | None
) -> dict[str, Digest]:
    """Write each tensor in one thread that digests it too; largest first, so that threads end together."""
    found: dict[str, Digest] = {}
    order = sorted(spans, key=lambda span: -span.length)

    def work(index: int, buffer: memoryview) -> None:
        span = order[index]
        hasher = make_hasher() if make_hasher else None
        for start in range(0, span.length, len(buffer)):
            piece = buffer[: span.length - start]
            span.read_into(start, piece)
            if hasher:
                hasher.update(piece)
            job.write(piece, span.offset + start)
        if hasher:
            found[span.name] = hasher.digest()

    with _Team(job, len(order), work, buffers=job.threads, hold=False) as team:
        for _ in team:
            pass
    return {span.name: found[span.name] for span in spans} if make_hasher else {}


def _in_order(
    job: _Job, spans: list[_Span], whole: hashlib._Hash, make_hasher: Callable[[], TensorHasher] | None
) -> dict[str, Digest]:
    """Write chunks of the file in threads, while this thread digests them in the order of the file."""
    chunks = list(_chunks(spans, job.window))

    def work(index: int, buffer: memoryview) -> None:
        at = 0
        for span, start, length in chunks[index].parts:
            span.read_into(start, buffer[at : at + length])
            at += length
        job.write(buffer[:at], chunks[index].offset)

    found: dict[str, Digest] = {}
    hasher = make_hasher() if make_hasher else None
    with _Team(job, len(chunks), work, buffers=min(2 * job.threads + 2, job.most), hold=True) as team:
        for chunk, buffer in zip(chunks, team, strict=False):
            whole.update(buffer[: chunk.length])
            at = 0
            for span, start, length in chunk.parts if make_hasher else ():
                assert make_hasher is not None and hasher is not None
                hasher.update(buffer[at : at + length])
                at += length
                if start + length == span.length:
                    found[span.name] = hasher.digest()
                    hasher = make_hasher()
    return found


class _Chunk(NamedTuple):
    """Parts of spans (span, start, length) that lie side by side in the file from `offset` on."""

    offset: int
    length: int
    parts: list[tuple[_Span, int, int]]


def _chunks(spans: list[_Span], size: int) -> Iterator[_Chunk]:
    """The spans in the order of the file, cut and gathered into chunks of at most `size` bytes."""
    parts: list[tuple[_Span, int, int]] = []
    filled = 0
    for span in spans:
        start = 0
        while True:
            length = min(span.length - start, (size - filled) // span.itemsize * span.itemsize)
            if length or not span.length:
                parts.append((span, start, length))
            start += length
            filled += length
            if start == span.length:
                break
            yield _Chunk(span.offset + start - filled, filled, parts)
            parts, filled = [], 0
    if parts:
        yield _Chunk(spans[-1].offset + spans[-1].length - filled, filled, parts)


class _Team:
    """Threads that do numbered tasks, handed out in order, each with a buffer to work in.

    Iterating yields the buffers of the tasks in order as they are done, each until the next is asked
    for; without `hold` a buffer serves on as soon as its task is done, and what is yielded means nothing.
    At the end of the `with` block no thread runs any more. The failure of the first task that failed is
    raised: since all tasks before it were handed out before, it is the same one every time.
    """

    def __init__(
        self, job: _Job, count: int, work: Callable[[int, memoryview], None], *, buffers: int, hold: bool
    ) -> None:
        self._count, self._work, self._size, self._hold = count, work, job.window, hold
        # Buffers are few and made once: touching fresh memory costs as much as reading into it.
        self._unmade = buffers
        self._free: list[memoryview] = []
        self._done: dict[int, memoryview] = {}
        self._failed: dict[int, BaseException] = {}
        self._next = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"writer-{n}") for n in range(min(job.threads, count))
        ]

    def __enter__(self) -> _Team:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __iter__(self) -> Iterator[memoryview]:
        for index in range(self._count):
            with self._changed:
                self._changed.wait_for(lambda: index in self._done or self._stopped)  # noqa: B023
                if self._stopped:
                    return
                buffer = self._done.pop(index)
            yield buffer
            if self._hold:
                with self._changed:
                    self._free.append(buffer)
                    self._changed.notify_all()

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._stopped = self._stopped or exception[0] is not None
            self._changed.notify_all()
        for thread in self._threads:
            _join(thread)
        if exception[0] is None and self._failed:
            raise self._failed[min(self._failed)]

    def _run(self) -> None:
        while (task := self._take()) is not None:
            index, buffer = task
            try:
                self._work(index, buffer)
            except BaseException as error:
                with self._changed:
                    self._failed[index] = error
                    self._stopped = True
                    self._changed.notify_all()
                return
            with self._changed:
                self._done[index] = buffer
                if not self._hold:
                    self._free.append(buffer)
                self._changed.notify_all()

    def _take(self) -> tuple[int, memoryview] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._next == self._count or self._free or self._unmade
            )
            if self._stopped or self._next == self._count:
                return None
            self._next += 1
            if self._free:
                return self._next - 1, self._free.pop()
            self._unmade -= 1
            return self._next - 1, memoryview(bytearray(self._size))


def _join(thread: threading.Thread) -> None:
    """Wait for a thread through any interruption: it writes to a descriptor that is closed next."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()


def _check_room(path: Path, fd: int, size: int) -> None:
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < size:  # some network file systems say that they have no blocks at all
        raise OutputError(
            Problem(
                f"there is no room to write `{path}`",
                evidence=(f"it needs {size:,} bytes, {free:,} are free",),
                hint="make room there, or write to another folder",
            )
        )
