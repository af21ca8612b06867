"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from builder.base.errors import OutputError, Problem

NAMELESS = hasattr(os, "O_TMPFILE")  # whether to try files without a name; tests unset it

_NO_NAMELESS = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_TEMP = re.compile(r"\.ckpt-[0-9a-f]{16}\.tmp")
_HINTS = {
    errno.ENOENT: "make its folder first",
    errno.ENOSPC: "make room there, or write to another folder",
    errno.EDQUOT: "make room there, or write to another folder",
    errno.EFBIG: "files this large are not allowed there: write to another folder",
}


@contextmanager
def replacing(
    path: Path | str, *, durable: bool = True, inputs: Iterable[os.stat_result | Path | str] = ()
) -> Iterator[int]:
    """A new file that takes the place of `path` when the block ends, and vanishes when the block fails.

    Yields its descriptor, open for reading and writing. Where the system can, the file has no name until
    it is whole, so that even a killed process leaves nothing; elsewhere it has a temporary one, and the
    next file made in that folder removes what the dead left behind. A symbolic link at `path` is itself
    replaced: what it points at, such as a blob of a download cache, stays as it is. Permissions are those
    of any new file. With `durable`, the file and its name are on disk at the end.
    Raises OutputError when `path` is one of `inputs` (by path, link or inode) or no regular file, and for
    every OSError of making the file or of the block.
    """
    path = Path(path)
    try:
        may_replace(path, inputs)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _remove_stale(folder)
            with _new_file(folder, path.name, durable) as fd:
                yield fd
        finally:
            os.close(folder)
    except OSError as error:
        raise output_error(path, error) from None


def write_bytes(
    path: Path | str,
    data: bytes,
    *,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
) -> bool:
    """Make `path` hold `data`; False when it already does, and is left untouched. Raises as `replacing`."""
    path = Path(path)
    with suppress(OSError):
        if path.is_file() and path.read_bytes() == data:
            return False
    with replacing(path, durable=durable, inputs=inputs) as fd:
        write_all(fd, memoryview(data), 0)
    return True


def write_text(path: Path | str, text: str, *, durable: bool = True) -> bool:
    """Make `path` hold `text` as UTF-8; False when it already does, and is left untouched."""
    return write_bytes(path, text.encode("utf-8"), durable=durable)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def output_error(path: Path | str, error: OSError) -> OutputError:
    """What a person is told when writing `path` failed."""
    code = error.errno or 0
    return OutputError(
        Problem(f"cannot write `{path}`", evidence=(os.strerror(code),), hint=_HINTS.get(code))
    )


def may_replace(path: Path, inputs: Iterable[os.stat_result | Path | str]) -> None:
    """Raise OutputError when `path` is one of `inputs` (by path, link or inode), or no regular file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise OutputError(
            Problem(f"cannot write `{path}`", evidence=(f"it is {what}",), hint="give a file name")
        )
    for given in inputs:
        try:
            other = given if isinstance(given, os.stat_result) else Path(given).stat()
        except OSError:
            continue
        if os.path.samestat(found, other):
            name = path if isinstance(given, os.stat_result) else given
            raise OutputError(
                Problem(
                    f"the output `{path}` is one of the inputs",
                    evidence=(f"it is the same file as `{name}`",) if Path(name) != path else (),
                    hint="give the output another name",
                )
            )


@contextmanager
def _new_file(folder: int, name: str, durable: bool) -> Iterator[int]:
    fd = _nameless(folder)
    temp = None
    if fd is None:
        fd, temp = _named(folder)
    try:
        yield fd
        if durable:
            os.fsync(fd)
        if temp is None:
            try:
                _link(fd, folder, name)
            except FileExistsError:  # a link never replaces, so it takes a name to be renamed from
                temp = _temp_name()
                _link(fd, folder, temp)
        if temp is not None:
            os.rename(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
            temp = None
        if durable:
            os.fsync(folder)
    finally:
        if temp is not None:
            with suppress(OSError):
                os.unlink(temp, dir_fd=folder)
        os.close(fd)


def _nameless(folder: int) -> int | None:
    """A locked file without a name, or None where there are none or they could not get one later."""
    if not NAMELESS:
        return None
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return None
        raise
    if not Path(_by_descriptor(fd)).exists():
        os.close(fd)
        return None
    _lock(fd)
    return fd


def _named(folder: int) -> tuple[int, str]:
    """A locked file with a temporary name."""
    while True:
        name = _temp_name()
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666, dir_fd=folder)
        _lock(fd)
        if os.fstat(fd).st_nlink:  # else another process took it for stale before it was locked
            return fd, name
        os.close(fd)


def _temp_name() -> str:
    return f".ckpt-{secrets.token_hex(8)}.tmp"


def _by_descriptor(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _link(fd: int, folder: int, name: str) -> None:
    # `dst_dir_fd` makes Python call linkat, without which the link in /proc would not be followed.
    os.link(_by_descriptor(fd), name, dst_dir_fd=folder, follow_symlinks=True)


def _lock(fd: int) -> None:
    with suppress(OSError):  # a file system without locks: its files are then never found stale
        fcntl.flock(fd, fcntl.LOCK_EX)


def _remove_stale(folder: int) -> None:
    """Remove the temporary files of dead processes: those that nobody holds locked."""
    for name in filter(_TEMP.fullmatch, os.listdir(folder)):
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(fd)
