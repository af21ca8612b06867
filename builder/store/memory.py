"""Digests of large files, remembered so that an unchanged file is hashed once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import xxhash

from builder.base.errors import OutputError
from builder.base.progress import SILENT, Reporter
from builder.formats.hashes import sha256_file
from builder.store.records import read_record, write_record

# A file that changes twice within one tick of its file system's clock shows no trace of the second
# change (git calls this a racy timestamp). Ticks last up to 2 seconds, on FAT, where times are whole
# seconds; where they are not, a tick is one of the system's, of which there are at least 10 a second.
SECOND = 1_000_000_000
RACY, FINE = 2 * SECOND, SECOND // 10


class DigestMemory:
    """SHA-256 of files by (device, inode, size, mtime, ctime).

    One small file for each (device, inode), replaced at once: several processes may write at the same
    time, and what was known about the inode's earlier contents goes with the same stroke. Bytes that
    change below the file system (a bad disk, a mapped page, a copied card) leave all of these as they were:
    where that matters, `believed` is False, and only what this process has hashed itself is recalled.
    """

    def __init__(self, folder: Path, believed: bool = True) -> None:
        self.folder = folder
        self.believed = believed
        self._own: set[tuple[int, ...]] = set()  # what this very process has hashed

    def recall(self, stat: os.stat_result) -> str | None:
        """The SHA-256 of the file that `stat` describes; None when it is not known.

        Asking counts as a use: the record's own time is when it was last of service.
        """
        path = self.path(stat)
        if not self.believed and tuple(_identity(stat)) not in self._own:
            return None
        record = read_record(path)
        if record is None or record.get("is") != _identity(stat):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return str(record["sha256"])

    def remember(self, stat: os.stat_result, sha256: str, seen: int | None) -> bool:
        """Keep a digest, unless a change could hide behind the file's times; says whether it was kept.

        `stat` was taken at the time `seen` (nanoseconds since the epoch), before the first byte was read,
        and described the file just as well after the last; None vouches that nobody changes the file.
        Raises nothing: the memory only saves work.
        """
        if stat.st_ino == 0 or (seen is not None and seen < _calm(stat)):
            return False
        try:
            write_record(self.path(stat), {"is": _identity(stat), "sha256": sha256}, self.folder.parent)
        except (OSError, OutputError):
            return False
        self._own.add(tuple(_identity(stat)))
        return True

    def sha256(self, path: Path, reporter: Reporter = SILENT) -> str:
        """The SHA-256 of a file, recalled or computed; raises SourceError as `sha256_file` does."""
        try:
            known = self.recall(path.stat())
        except OSError:
            known = None
        if known is not None:
            return known
        try:
            seen = self.settle(path.stat())
        except OSError:
            seen = time.time_ns()
        found = sha256_file(path, reporter=reporter)
        self.remember(found.stat, found.sha256, seen)
        return found.sha256

    def settle(self, stat: os.stat_result, stop: threading.Event | None = None) -> int:
        """Wait until no change of a file could hide behind its times; the time then, in nanoseconds.

        That is a tenth of a second after its last change, or two where its file system counts in seconds:
        a little patience, for a digest that can be remembered. A file of the future is not waited for.
        """
        wait = _calm(stat) - time.time_ns()
        if 0 < wait <= RACY:
            (stop or threading.Event()).wait(wait / SECOND)
        return time.time_ns()

    def path(self, stat: os.stat_result) -> Path:
        """Where the record of a file lies."""
        key = xxhash.xxh3_128_hexdigest(f"{stat.st_dev}:{stat.st_ino}".encode())
        return self.folder / key[:2] / f"{key}.json"


def _calm(stat: os.stat_result) -> int:
    """The time from which on a change of a file is sure to change its times."""
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return max(times) + (FINE if any(t % SECOND for t in times) else RACY)


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
