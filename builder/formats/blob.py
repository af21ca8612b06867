"""Bytes at positions: files, and tensors that are ranges of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from builder.base.descriptors import MORE
from builder.base.disk import read_at
from builder.base.errors import Place, Problem, SourceError, did_you_mean
from builder.base.files import NotRegular, open_regular
from builder.tensors.lazy import DType, LazyTensor


class Blob(Protocol):
    """Bytes that can be read at any position, from several threads at once."""

    name: str
    size: int

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on; raises SourceError when the bytes cannot be had."""

    def close(self) -> None:
        """Let go of what is open."""


class TooManyOpen(SourceError):
    """No further file can be opened, whatever is in it."""


_checking: ContextVar[Callable[[Path], object] | None] = ContextVar("checking", default=None)


@contextmanager
def checking(check: Callable[[Path], object] | None) -> Iterator[None]:
    """Have `check` see every file before a `FileBlob` opens it, and raise for what must not be opened."""
    token = _checking.set(check)
    try:
        yield
    finally:
        _checking.reset(token)


def _near(path: Path) -> str | None:
    """The hint that names what a file may have been meant that is not there."""
    try:
        return did_you_mean(path.name, os.listdir(path.parent))  # noqa: PTH208 - names alone
    except OSError:
        return None


class FileBlob:
    """A local file, read with positioned reads.

    Not mapped into memory: mapped pages count as the process's own, and a file that shrinks under a map
    kills the process where a read reports it.
    """

    def __init__(self, path: Path | str) -> None:
        self.name = os.fspath(path)
        if (check := _checking.get()) is not None:
            check(Path(path))
        try:
            self._fd, self.stat = open_regular(path)
        except NotRegular as error:
            raise SourceError(Problem(f"`{self.name}` is {error.strerror}")) from None
        except OSError as error:
            fact, why = f"cannot open `{self.name}`", str(error.strerror)
            if error.errno == errno.EMFILE:
                raise TooManyOpen(Problem(fact, None, (why,), f"{MORE}; or name fewer files")) from None
            hint = _near(Path(path)) if isinstance(error, FileNotFoundError) else None
            raise SourceError(Problem(fact, evidence=(why,), hint=hint)) from None
        self.size = self.stat.st_size

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on; raises SourceError when the file ends or fails before that."""
        done = 0
        while done < len(out):
            try:
                count = read_at(self._fd, out[done:], offset + done)
            except OSError as error:
                raise SourceError(
                    Problem(
                        "reading failed",
                        Place(self.name),
                        (f"{error.strerror}, at byte {offset + done:,}",),
                    )
                ) from None
            if count == 0:
                raise SourceError(
                    Problem(
                        "the file ends before its contents do",
                        Place(self.name),
                        (f"{len(out):,} bytes wanted from byte {offset:,} on, {done:,} are there",),
                        "it is truncated, or was changed while it was read",
                    )
                )
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range, at once."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def unchanged(self) -> bool:
        """Whether the file is still the one that was opened, by size and times."""
        now = os.fstat(self._fd)
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
            self.stat.st_size,
            self.stat.st_mtime_ns,
            self.stat.st_ctime_ns,
        )

    def close(self) -> None:
        """Close the file; reading ends."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlobTensor(LazyTensor):
    """A tensor that lies in a blob as it is: contiguous and little endian."""

    __slots__ = ("blob", "offset")

    def __init__(self, dtype: DType, shape: tuple[int, ...], blob: Blob, offset: int) -> None:
        super().__init__(dtype, shape)
        self.blob = blob
        self.offset = offset

    def read_into(self, start: int, out: memoryview) -> None:
        """Read the range from the blob."""
        self.blob.read_into(self.offset + start, out)
