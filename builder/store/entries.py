"""Known components: a table of digests, and the places where their bytes lie, which are never trusted."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import BlobTensor, FileBlob
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import BY_CODE, WINDOW, LazyTensor

PLACES = 4  # that are remembered of a component: the newest


@dataclass(frozen=True)
class At:
    """Where a component's bytes lay when they were seen: in which file, as it was, and from which byte on.

    `file` is the file's identity as `identity` gives it; `offsets` follow the names in their order.
    """

    path: str
    file: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A component that was made: its name and class, its tensors, and where its bytes may lie.

    `source` says in words what it was made of, such as a file's name.
    """

    digest: str
    component: str
    cls: str
    source: str
    rows: Mapping[str, Row]
    places: tuple[At, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_nbytes(r) for r in self.rows.values())

    def record(self) -> dict[str, Any]:
        """The entry as a record holds it."""
        return {
            "component": self.component,
            "class": self.cls,
            "source": self.source,
            "tensors": [[n, r.dtype.code, list(r.shape), r.digest] for n, r in sorted(self.rows.items())],
            "places": [[p.path, list(p.file), list(p.offsets)] for p in self.places],
        }


def entry_from_record(digest: str, record: Mapping[str, Any]) -> Entry | None:
    """The entry of a record; None unless its table is the one that the digest is of."""
    try:
        rows = {
            str(name): Row(BY_CODE[code], tuple(map(int, shape)), str(sha))
            for name, code, shape, sha in record["tensors"]
        }
        places = tuple(
            At(str(path), tuple(map(int, file)), tuple(map(int, offsets)))
            for path, file, offsets in record["places"]
            if len(offsets) == len(rows)
        )
        if component_digest(rows) != digest:
            return None
        component, cls, source = (str(record[key]) for key in ("component", "class", "source"))
        return Entry(digest, component, cls, source, rows, places)
    except (KeyError, TypeError, ValueError):
        return None


def identity(stat: os.stat_result) -> tuple[int, ...]:
    """What tells a file, as it is now, from any other and from itself changed."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class DamagedEntry(SourceError):
    """Bytes are not those of the component that lay there; `Store.set_aside` takes the place out of use.

    `file` is the identity of the file that was read, None where it could not be opened.
    """

    def __init__(self, digest: str, path: str, evidence: str, file: tuple[int, ...] | None = None) -> None:
        super().__init__(
            Problem(
                f"the stored component `{digest[:12]}` is damaged",
                Place(path),
                (evidence,),
                "building again makes it anew",
            )
        )
        self.digest = digest
        self.path = path
        self.file = file

    def is_there(self) -> bool:
        """Whether the damaged file is still the one at its path: another may have been put there since."""
        try:
            now = identity(Path(self.path).stat())
        except OSError:
            return True
        return self.file is None or now[:2] == self.file[:2]


class VerifiedTensor(LazyTensor):
    """A tensor of a stored component, whose bytes are digested as they are read.

    Read from first to last, whether by `windows` or by `read_into` from any number of threads, it costs
    no second read: the last piece is given out only when the digest of all is right. Any other order has
    the whole tensor read once more. Raises DamagedEntry when the bytes are not those stored.
    """

    __slots__ = ("_hasher", "_next", "_reading", "_tensor", "_turn", "_verified", "digest", "entry", "name")

    def __init__(self, name: str, tensor: BlobTensor, digest: str, entry: str) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self.name = name
        self.digest = digest
        self.entry = entry
        self._tensor = tensor
        self._hasher = blake3()
        self._next = 0  # up to where bytes were digested
        self._reading = 0  # threads whose bytes are on the way
        self._verified = False
        self._turn = threading.Condition()

    @property
    def unchecked(self) -> LazyTensor:
        """The same without digests, for a reader that compares its own; what cannot be read is damage."""
        return _Unchecked(self)

    def read_into(self, start: int, out: memoryview) -> None:
        """Read, and digest when all before was."""
        if self._verified:
            self.read(start, out)
            return
        with self._turn:
            self._reading += 1
        try:
            self.read(start, out)
        except BaseException:
            with self._turn:
                self._reading -= 1
                self._turn.notify_all()
            raise
        with self._turn:
            self._reading -= 1
            self._turn.notify_all()
            # What comes before may be on the way in another thread.
            self._turn.wait_for(lambda: self._verified or self._next == start or self._reading == 0)
            if self._verified:
                return
            if self._next == start:
                self._hasher.update(out)
                self._next += len(out)
                if self._next == self.nbytes:
                    self._check(self._hasher.hexdigest())
            else:
                for _ in self.windows():
                    pass
            self._turn.notify_all()

    def windows(self, size: int = WINDOW) -> Iterator[memoryview]:
        """The bytes in pieces; the last comes only when all are right."""
        hasher, done = blake3(), 0
        total = self.nbytes
        buffer = memoryview(bytearray(min(size, total)))
        while done < total:
            piece = buffer[: min(size, total - done)]
            self.read(done, piece)
            hasher.update(piece)
            done += len(piece)
            if done == total:
                self._check(hasher.hexdigest())
            yield piece

    def damaged(self, evidence: str) -> DamagedEntry:
        """That the entry is not what was stored."""
        blob = self._tensor.blob
        file = identity(blob.stat) if isinstance(blob, FileBlob) else None
        return DamagedEntry(self.entry, blob.name, evidence, file)

    def read(self, start: int, out: memoryview) -> None:
        """Read without digesting; raises DamagedEntry when that fails."""
        try:
            self._tensor.read_into(start, out)
        except SourceError as error:
            raise self.damaged("; ".join(p.fact for p in error.problems)) from None

    def _check(self, found: str) -> None:
        if found != self.digest:
            raise self.damaged(
                f"the BLAKE3 of tensor `{self.name}` is {found[:12]}…, {self.digest[:12]}… was stored"
            )
        self._verified = True


class _Unchecked(LazyTensor):
    __slots__ = ("_tensor",)

    def __init__(self, tensor: VerifiedTensor) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self._tensor = tensor

    def read_into(self, start: int, out: memoryview) -> None:
        """Read, and raise DamagedEntry when that fails."""
        self._tensor.read(start, out)


@dataclass(frozen=True)
class Stored:
    """A component at one of its places, opened: tensors under bare names, each verified as it is read."""

    entry: Entry
    blob: FileBlob
    tensors: Mapping[str, VerifiedTensor] = field(default_factory=dict)

    def close(self) -> None:
        """Close the file."""
        self.blob.close()


def open_at(entry: Entry, at: At) -> Stored | None:
    """The component at a place; None when another file is there now, or the same one changed."""
    try:
        blob = FileBlob(at.path)
    except SourceError:
        return None
    if identity(blob.stat) != at.file or not _fits(entry, at.offsets, blob.size):
        blob.close()
        return None
    return stored_in(entry, blob, at.offsets)


def stored_in(entry: Entry, blob: FileBlob, offsets: Sequence[int]) -> Stored:
    """The component in an open file; `offsets` follow the names in their order."""
    tensors = {
        name: VerifiedTensor(name, BlobTensor(row.dtype, row.shape, blob, offset), row.digest, entry.digest)
        for (name, row), offset in zip(sorted(entry.rows.items()), offsets, strict=True)
    }
    return Stored(entry, blob, tensors)


def is_at(at: At) -> bool:
    """Whether a place is as it was, going by the file's identity alone; nothing is opened."""
    try:
        return identity(Path(at.path).stat()) == at.file
    except (OSError, ValueError):
        return False


def _fits(entry: Entry, offsets: Sequence[int], size: int) -> bool:
    rows = sorted(entry.rows.items())
    return all(0 <= offset <= size - _nbytes(row) for (_, row), offset in zip(rows, offsets, strict=True))


def _nbytes(row: Row) -> int:
    bits = row.dtype.bits
    for extent in row.shape:
        bits *= extent
    return bits // 8
