"""The hashes that people know files by, all from one reading."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from builder.base.errors import Problem, SourceError
from builder.base.parallel import run_windows
from builder.base.progress import SILENT, Reporter
from builder.formats.blob import FileBlob
from builder.formats.safetensors import MAX_HEADER
from builder.tensors.lazy import WINDOW

Take = Callable[[int, memoryview], None]  # the next bytes of a file, and their offset

_LEGACY = range(0x100000, 0x110000)  # the only bytes that AutoV1 looks at


class FileDigest(NamedTuple):
    """A whole file's SHA-256 as lower-case hex, its size in bytes, and its state while it was read."""

    sha256: str
    size: int
    stat: os.stat_result


def sha256_file(path: Path | str, *, reporter: Reporter = SILENT) -> FileDigest:
    """The SHA-256 of a file; raises SourceError if it cannot be read, or changes while it is."""
    with closing(FileBlob(path)) as blob:
        return FileDigest(sha256_blob(blob, reporter=reporter), blob.size, blob.stat)


def sha256_blob(blob: FileBlob, *, stop: threading.Event | None = None, reporter: Reporter = SILENT) -> str:
    """The SHA-256 of an open file, as hex; raises as `sha256_file`, and Cancelled once `stop` is set."""
    sha256 = hashlib.sha256()
    _read(blob, [lambda _, data: sha256.update(data)], reporter, stop)
    return sha256.hexdigest()


def data_sha256(path: Path | str, *, reporter: Reporter = SILENT) -> str | None:
    """The SHA-256 of a safetensors file without its header, as hex: AutoV3 has its first 12 digits.

    None for what does not begin like such a file. Raises as `sha256_file`.
    """
    with closing(FileBlob(path)) as blob:
        if (body := _after_header(blob)) is None:
            return None
        sha256 = hashlib.sha256()
        _read(blob, [lambda at, data: sha256.update(data[max(0, body - at) :])], reporter)
        return sha256.hexdigest()


def file_hashes(path: Path | str, *, reporter: Reporter = SILENT) -> dict[str, str | None]:
    """Every hash in use for a file, by kind; None where the kind means nothing for this file.

    Hex digits are lower case, those of CRC32 upper case. `AutoV1` needs a file of more than 1 MiB (below
    that it is one value for all); `AutoV3`, `sshs_model_hash` and `modelspec.hash_sha256` are over the
    bytes behind a safetensors header. Raises SourceError if the file cannot be read, or changes while it
    is.
    """
    from blake3 import blake3

    with closing(FileBlob(path)) as blob:
        body = _after_header(blob)
        whole, legacy, tensors, strong = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), blake3()
        crc = 0

        def take_crc(_: int, data: memoryview) -> None:
            nonlocal crc
            crc = zlib.crc32(data, crc)

        def take_legacy(offset: int, data: memoryview) -> None:
            legacy.update(data[max(0, _LEGACY.start - offset) : max(0, _LEGACY.stop - offset)])

        def take_tensors(offset: int, data: memoryview) -> None:
            if body is not None:
                tensors.update(data[max(0, body - offset) :])

        def take_strong(_: int, data: memoryview) -> None:
            strong.update(data)

        takes = [lambda _, data: whole.update(data), take_tensors, take_crc, take_strong, take_legacy]
        _read(blob, takes, reporter)
    sha256 = whole.hexdigest()
    data = tensors.hexdigest() if body is not None else None
    return {
        "SHA256": sha256,
        "AutoV1": legacy.hexdigest()[:8] if blob.size > _LEGACY.start else None,
        "AutoV2": sha256[:10],
        "AutoV3": data and data[:12],
        "sshs_model_hash": data,
        "modelspec.hash_sha256": data and f"0x{data}",
        "CRC32": f"{crc:08X}",
        "BLAKE3": strong.hexdigest(),
    }


def _read(
    blob: FileBlob, takes: Sequence[Take], reporter: Reporter, stop: threading.Event | None = None
) -> None:
    """Show each window of the file to all of `takes`, each in a thread of its own."""
    task = f"hashing {Path(blob.name).name}"

    def produce(index: int, buffer: memoryview) -> int:
        length = min(WINDOW, blob.size - index * WINDOW)
        blob.read_into(index * WINDOW, buffer[:length])
        reporter.advance(task, length)
        return length

    def consumer(take: Take) -> Callable[[int, memoryview], None]:
        return lambda index, data: take(index * WINDOW, data)

    reporter.start(task, blob.size)
    try:
        count = -(-blob.size // WINDOW)
        size = min(WINDOW, blob.size)
        run_windows(count, produce, [consumer(t) for t in takes], size=size, threads=1, stop=stop)
    finally:
        reporter.finish(task)
    if not blob.unchanged():
        raise SourceError(Problem(f"`{blob.name}` changed while it was read", hint="wait until it is whole"))


def _after_header(blob: FileBlob) -> int | None:
    """Where the data of a safetensors file begins, or None if the file does not begin like one."""
    if blob.size < 10:
        return None
    length = int.from_bytes(blob.read(0, 8), "little")
    begins = length <= min(MAX_HEADER, blob.size - 8) and blob.read(8, 1) == b"{"
    return 8 + length if begins else None
