"""Files that are moved, copied and compared as a whole; none is lost or replaced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from builder.base.disk import replacing, sync_folder
from builder.base.errors import OutputError, Place, Problem, SourceError
from builder.base.files import parse_json
from builder.formats import open_checkpoint
from builder.formats.hashes import sha256_file
from builder.recipe.names import numbered

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_HEADERS = 1 << 20  # bytes by which headers of the same tensors may differ, as names in metadata do


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """What stays the same until a file is another or is written to, whatever names it gets."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def unchanged(path: Path, status: os.stat_result) -> bool:
    """Whether a name is still that of the file, no link, that had this status, and of nothing newer."""
    try:
        return file_identity(path.lstat()) == file_identity(status)
    except OSError:
        return False


def remove(path: Path, status: os.stat_result) -> None:
    """Remove a file, if it is still the one of this status. Raises OSError, OutputError."""
    _insist(path, status)
    path.unlink()


def _insist(path: Path, status: os.stat_result) -> None:
    if not unchanged(path, status):
        raise OutputError(Problem("it has changed meanwhile", Place(str(path)), hint="it stays as it is"))


def move(path: Path, place: Path, status: os.stat_result) -> Path:
    """Give a file another name: `place`, or the first of `NAME(1).EXT`, … that is free. Never replaces one.

    On another file system it is copied, and the copy compared with it before it is removed. A process that
    is killed leaves the file under its old name, its new one, or both. What is no longer the file of this
    status keeps its old name. Raises OSError, OutputError.
    """
    for target in numbered(place):
        if os.path.lexists(target):
            if same_inode(target, path):
                break
            continue
        try:
            os.link(path, target, follow_symlinks=False)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno == errno.EXDEV:
                copy_file(path, target)
            elif error.errno in _NO_LINKS:
                _insist(path, status)
                path.rename(target)
                return target
            else:
                raise
        break
    sync_folder(target.parent)
    remove(path, status)
    return target


def copy_file(path: Path, target: Path) -> None:
    """Copy a file, and compare the copy with it. Raises OSError, OutputError."""
    digest = sha256_file(path).sha256
    with path.open("rb") as source, replacing(target) as fd, os.fdopen(os.dup(fd), "wb") as copy:
        shutil.copyfileobj(source, copy, 4 << 20)
    if on_disk(target) != digest:
        raise OutputError(
            Problem("the copy is not what was copied", Place(str(target)), hint="the original stays")
        )


def on_disk(path: Path) -> str:
    """The SHA-256 of a file, not from memory where the system can tell the two apart."""
    _forget(path)
    return sha256_file(path).sha256


def _forget(path: Path) -> None:
    """Have the system read a file from the disk when it is read next."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def same_file(path: Path, folder: Path, suffix: str) -> Path | None:
    """A file in a folder with the same content, read whole and compared now; None where there is none."""
    size = path.stat().st_size
    alike = [p for p in _others(path, folder, suffix) if p.stat().st_size == size]
    digest = sha256_file(path).sha256 if alike else ""
    return next((p for p in alike if on_disk(p) == digest), None)


def same_content(path: Path, folder: Path) -> Iterator[Path]:
    """Safetensors files in a folder with the same tensors, and the same metadata but for names of files."""
    size = path.stat().st_size
    alike = [p for p in _others(path, folder, path.suffix) if abs(p.stat().st_size - size) <= _HEADERS]
    mine = _contents(path) if alike else None
    return (p for p in alike if _contents(p) == mine and _same_data(path, p))


def same_inode(one: Path, other: Path) -> bool:
    """Whether two names are of one file."""
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except OSError:
        return False


def _others(path: Path, folder: Path, suffix: str) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.is_symlink()]
    return [p for p in files if p.suffix == suffix and not same_inode(p, path)]


def _contents(path: Path) -> Any:
    """Table and metadata of a file, less what is there of names; None where it cannot be read."""
    try:
        with open_checkpoint(path) as checkpoint:
            said = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("ckpt.")}
            if said.get("modelspec.title") == checkpoint.metadata.get("ckpt.recipe"):
                said.pop("modelspec.title", None)
            origin = parse_json(said.pop("pruned_from", "{}"))
            origin.pop("file", None)
            return {n: (t.dtype, t.shape) for n, t in checkpoint.items()}, said, origin
    except (SourceError, ValueError, AttributeError):
        return None


def _same_data(one: Path, other: Path) -> bool:
    """Whether two safetensors files have the same bytes behind their headers, on the disk."""
    _forget(other)
    with one.open("rb") as a, other.open("rb") as b:
        for file in (a, b):
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while data := a.read(4 << 20):
            if data != b.read(len(data)):
                return False
        return not b.read(1)
