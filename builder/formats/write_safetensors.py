"""Writing safetensors files: the layout is known before data moves, and the data streams through."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.base.descriptors import files_at_once
from builder.base.disk import new_file, write_all, write_through
from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.formats.safetensors import MAX_HEADER, METADATA, Entry
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.scan import Pass, Passing, Scan, Span, alone, carry_out, side_by_side
from builder.tensors.zeros import Stretch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ORDER = {dtype: index for index, dtype in enumerate(DType)}


class Layout(NamedTuple):
    """Where everything of a file will be: `head` is its first bytes, `tensors` in the order of theirs.

    Offsets of tensors count from the end of `head`; `size` is of the whole file, in bytes.
    """

    head: bytes
    tensors: dict[str, Entry]
    size: int


class Written(NamedTuple):
    """A file that was written, as `accept` sees it before it has its name.

    `sha256` is the file's, `digests` are the BLAKE3-256 of its tensors, `histograms` those of `Pass`:
    each where asked for. `zeros` are stretches of zeros in tensors, `offsets` say where in the file each
    tensor's bytes begin. `path` is where it went, None where it was discarded. `stat` is its state before it
    got its name. `autov3` is the SHA-256 of all behind the header, where asked for.

    Of several files, `sha256` is that by which they are a source together, `size` is of all, and `files` has
    the SHA-256 and the state of each by its path beside `path`.
    """

    path: Path | None
    size: int
    sha256: str | None
    digests: Mapping[str, str]
    histograms: Mapping[str, NDArray[np.int64]]
    zeros: Mapping[str, tuple[Stretch, ...]]
    offsets: Mapping[str, int]
    stat: os.stat_result
    files: Mapping[str, tuple[str, os.stat_result]] = MappingProxyType({})
    autov3: str | None = None

    @classmethod
    def of(cls, path: Path, fd: int, sha256: str | None, found: Scan, offsets: Mapping[str, int]) -> Written:
        """What a pass found of the file of a descriptor, all of which is written."""
        stat = os.fstat(fd)
        tensors = found.tensors.items()
        digests = {n: t.digest for n, t in tensors if t.digest is not None}
        zeros = {n: t.zeros for n, t in tensors if t.zeros}
        return cls(path, stat.st_size, sha256, digests, found.histograms, zeros, offsets, stat)


Accept = Callable[[Written], "Path | None"]


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
    threads: int = 2,
    max_memory: int = 256 << 20,
    stop: threading.Event | None = None,
    **how: Any,
) -> Written:
    """Write tensors as a safetensors file, which takes the place of `path` whole or not at all.

    Tensors are pulled in windows by `threads` threads, each window being read, digested and written while
    it is warm; at most `max_memory` bytes of windows exist at once. All else is as for `writing`.
    """
    work = writing(path, tensors, metadata, **how)
    return carry_out(work, threads=threads, max_memory=max_memory, stop=stop)


def writing(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    sha256: bool = True,
    autov3: bool = False,
    digests: bool = False,
    groups: Mapping[str, str] | None = None,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
    reporter: Reporter = SILENT,
    task: str = "",
    accept: Accept = lambda written: written.path,
) -> Passing[Written]:
    """The work of writing a safetensors file in one pass.

    The bytes depend on the tensors and the metadata alone. `reporter` hears of `task` in bytes of tensors.
    `groups` are those of `Pass`.
    `accept` sees what was written before it has a name, and says where it goes (within the folder of
    `path`), or None to discard it; it may raise.
    Raises OutputError when the file cannot be written or its place is one of `inputs`, and what the tensors'
    `read_into` raises, with the tensor named. Of several failures the first in the order of the file is
    raised.
    """
    path = Path(path)
    layout = plan_layout({n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    spans = [
        Span(n, tensors[n], len(layout.head) + e.start, e.end - e.start) for n, e in layout.tensors.items()
    ]
    reporter.start(task, sum(s.length for s in spans))
    try:
        with new_file(path, durable=durable, inputs=inputs) as file:
            file.reserve(layout.size)
            write_all(file.fd, memoryview(layout.head), 0)
            whole, data = hashlib.sha256(layout.head), hashlib.sha256()
            found = yield from alone(
                Pass(
                    spans,
                    write=partial(write_through if durable else write_all, file.fd),
                    whole=[whole] * sha256 + [data] * autov3,
                    groups=groups or {},
                    digests=digests,
                    advance=lambda count: reporter.advance(task, count),
                )
            )
            digest = whole.hexdigest() if sha256 else None
            written = Written.of(path, file.fd, digest, found, {s.name: s.offset for s in spans})
            written = written._replace(autov3=data.hexdigest() if autov3 else None)
            file.path = accept(written)
    finally:
        reporter.finish(task)
    return written._replace(path=file.path)


def writing_files(works: Sequence[Passing[Written]]) -> Passing[list[Written]]:
    """The work of writing several files, as many side by side as may be; raises what the first raises."""
    made: list[Written] = []
    most = files_at_once()
    for at in range(0, len(works), most):
        made += yield from side_by_side(works[at : at + most])
    return made
