"""Folders and sets of files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from builder.base.disk import output_error
from builder.base.errors import OutputError, Problem

_TEMP = re.compile(r"\.ckpt-[0-9a-f]{16}\.new")


@contextmanager
def making_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends, and vanishes when the block fails.

    Until then it lies beside `path` under a temporary name; what a killed process left of one is removed
    by the next. An existing folder is never replaced, unless it is empty. With `durable` names are on
    disk at the end; files are their writers' concern.
    Raises OutputError when `path` is taken, and for every OSError of making the folder or of the block.
    """
    if os.path.lexists(path) and not _is_empty_folder(path):
        raise _taken(path)
    with _staging(path) as temp:
        yield temp
        if durable:
            for folder, _, _ in os.walk(temp):
                _sync(Path(folder))
        temp.rename(path)
        if durable:
            _sync(path.parent)


@contextmanager
def making_set(index: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new folder whose files are moved beside `index` when the block ends, and `index`, one of them, last.

    So the index never names a file that is not there. Existing files are never replaced.
    Raises OutputError when `index` or another name is taken, and as `making_folder` does.
    """
    if os.path.lexists(index):
        raise _taken(index)
    with _staging(index) as temp:
        yield temp
        made = sorted(temp.iterdir(), key=lambda p: (p.name == index.name, p.name))
        moved: list[Path] = []
        try:
            for file in made:
                target = index.with_name(file.name)
                if os.path.lexists(target):
                    raise _taken(target)
                file.rename(target)
                moved.append(target)
        except BaseException:
            for target in moved:
                target.unlink()
            raise
        if durable:
            _sync(index.parent)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, locked while it is in use."""
    try:
        _remove_stale(path.parent)
        temp, lock = _locked_folder(path.parent)
        try:
            yield temp
        finally:
            shutil.rmtree(temp, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise output_error(path, error) from None


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        temp = parent / f".ckpt-{secrets.token_hex(8)}.new"
        temp.mkdir()
        lock = os.open(temp, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: its folders are then never found stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temp.exists():  # else another process took it for stale before it was locked
            return temp, lock
        os.close(lock)


def _remove_stale(parent: Path) -> None:
    for found in parent.iterdir():
        if _TEMP.fullmatch(found.name) is None:
            continue
        with suppress(OSError):
            fd = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(fd)


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and next(path.iterdir(), None) is None
    except OSError:
        return False


def _taken(path: Path) -> OutputError:
    fact = f"`{path}` exists already"
    return OutputError(Problem(fact, hint="remove it first, or give the output another name"))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
