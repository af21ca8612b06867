"""Folders for files in the making, which the next user of the store removes when their owner died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Where locks do not work, only age tells: nobody takes this long to make one component.
OLD = 24 * 3600


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, gone at the end with all that is left in it; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    made, lock = _new_folder(folder)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def sweep(folder: Path) -> int:
    """Remove what dead processes left in `folder`; the number of bytes freed."""
    freed = 0
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError):
                freed += _sweep(path)
    return freed


def _new_folder(folder: Path) -> tuple[Path, int]:
    """A new folder and a descriptor that holds it locked, if locks work here."""
    while True:
        made = Path(tempfile.mkdtemp(dir=folder))
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for litter, as below
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return made, lock
        os.close(lock)


def _sweep(path: Path) -> int:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.time() - path.stat().st_mtime < OLD:
                return 0
        freed = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        shutil.rmtree(path)
        return freed
    finally:
        os.close(lock)
