"""Folders for files in the making, which the next user of the store removes when their owner died."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# A folder is locked right after it is made; one that is older and not locked has no owner.
YOUNG = 60
# Where locks do not work, only age tells: nobody takes this long to make one component.
OLD = 24 * 3600


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, gone at the end with all that is left in it; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder))
    try:
        with _locked(made):
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(folder: Path) -> int:
    """Remove what dead processes left in `folder`; the number of bytes freed."""
    freed = 0
    now = time.time()
    for path in _children(folder):
        with contextlib.suppress(OSError):
            age = now - path.stat().st_mtime
            with _locked(path) as alone:
                if (alone and age > YOUNG) or age > OLD:
                    freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                    shutil.rmtree(path)
    return freed


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


if sys.platform == "win32":

    @contextlib.contextmanager
    def _locked(folder: Path) -> Iterator[bool]:
        yield False

else:
    import fcntl

    @contextlib.contextmanager
    def _locked(folder: Path) -> Iterator[bool]:
        """Hold the folder's lock, which ends with the process; says whether it could be had."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except OSError:
                alone = False
            yield alone
        finally:
            os.close(handle)
