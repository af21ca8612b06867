"""Stored components: what their files say of themselves, and reading them without trusting them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from builder.base.errors import Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats.blob import BlobTensor, FileBlob
from builder.formats.safetensors import read_header
from builder.tensors.digests import Digest, Row, component_digest, tensor_digest
from builder.tensors.lazy import WINDOW, DType, LazyTensor

# Keys of an entry's metadata. The digests of its tensors stand there one after the other, in the order
# of the sorted names: the file's name is the digest over them, so the table of contents checks itself.
COMPONENT, CLASS, SHA256 = "ckpt.component", "ckpt.class", "ckpt.sha256"
TENSOR_XXH3, TENSOR_SHA256 = "ckpt.tensor_xxh3", "ckpt.tensor_sha256"


class DamagedEntry(SourceError):
    """A stored component is not what was stored; give it to `Store.set_aside` and make it again."""

    def __init__(self, path: Path, digest: str, evidence: str, seen: os.stat_result | None = None) -> None:
        super().__init__(
            Problem(
                f"the stored component `{digest[:12]}` is damaged",
                Place(str(path)),
                (evidence,),
                "building again makes it anew",
            )
        )
        self.path = path
        self.digest = digest
        self.seen = seen


class VerifiedTensor(LazyTensor):
    """A tensor of a stored component, whose bytes are digested as they are read.

    Read from first to last, whether by `windows` or by `read_into` from any number of threads, it costs
    no second read: the last piece is given out only when the digest of all is right. Any other order has
    the whole tensor read once more. Raises DamagedEntry when the bytes are not those stored.
    """

    __slots__ = (
        "_entry",
        "_hasher",
        "_next",
        "_path",
        "_reading",
        "_seen",
        "_tensor",
        "_turn",
        "_verified",
        "digest",
        "name",
    )

    def __init__(
        self, name: str, tensor: LazyTensor, digest: Digest, path: Path, entry: str, seen: os.stat_result
    ) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self.name = name
        self.digest = digest
        self._path, self._entry, self._seen = path, entry, seen
        self._tensor = tensor
        self._hasher = xxhash.xxh3_128()
        self._next = 0  # up to where bytes were digested
        self._reading = 0  # threads whose bytes are on the way
        self._verified = False
        self._turn = threading.Condition()

    @property
    def unchecked(self) -> LazyTensor:
        """The same without digests, for a reader that compares its own; what cannot be read is damage."""
        return _Unchecked(self.dtype, self.shape, self._read)

    def read_into(self, start: int, out: memoryview) -> None:
        """Read, and digest when all before was."""
        if self._verified:
            self._read(start, out)
            return
        with self._turn:
            self._reading += 1
        try:
            self._read(start, out)
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
        hasher, done = xxhash.xxh3_128(), 0
        total = self.nbytes
        buffer = memoryview(bytearray(min(size, total)))
        while done < total:
            piece = buffer[: min(size, total - done)]
            self._read(done, piece)
            hasher.update(piece)
            done += len(piece)
            if done == total:
                self._check(hasher.hexdigest())
            yield piece

    def damaged(self, evidence: str) -> DamagedEntry:
        """That the entry is not what was stored."""
        return DamagedEntry(self._path, self._entry, evidence, self._seen)

    def _check(self, found: str) -> None:
        if found != self.digest.xxh3:
            raise self.damaged(f"the XXH3 of tensor `{self.name}` is {found}, {self.digest.xxh3} was stored")
        self._verified = True

    def _read(self, start: int, out: memoryview) -> None:
        try:
            self._tensor.read_into(start, out)
        except SourceError as error:
            raise self.damaged("; ".join(p.fact for p in error.problems)) from None


class _Unchecked(LazyTensor):
    __slots__ = ("_read",)

    def __init__(self, dtype: DType, shape: tuple[int, ...], read: Callable[[int, memoryview], None]) -> None:
        super().__init__(dtype, shape)
        self._read = read

    def read_into(self, start: int, out: memoryview) -> None:
        """Read, and raise DamagedEntry when that fails."""
        self._read(start, out)


@dataclass(frozen=True)
class Entry:
    """A stored component's table of contents, in agreement with the file's name and size."""

    path: Path
    component: str
    cls: str
    digest: Digest
    rows: Mapping[str, Row]
    tensors: dict[str, LazyTensor]
    blob: FileBlob

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(t.nbytes for t in self.tensors.values())


def open_entry(path: Path, digest: str) -> Entry:
    """Open a stored component and check its table of contents; no tensor is read.

    Raises FileNotFoundError when there is none, and DamagedEntry when it disagrees with itself.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        blob = FileBlob(path)
    except SourceError as error:
        if not path.exists():
            raise FileNotFoundError(path) from None
        raise DamagedEntry(path, digest, _facts(error)) from None
    try:
        return _read_entry(path, digest, blob)
    except DamagedEntry:
        blob.close()
        raise
    except SourceError as error:
        blob.close()
        raise DamagedEntry(path, digest, _facts(error), blob.stat) from None
    except BaseException:
        blob.close()
        raise


def _read_entry(path: Path, digest: str, blob: FileBlob) -> Entry:
    header = read_header(blob)
    said = header.metadata
    names = sorted(header.tensors)
    xxh3 = _cut(said.get(TENSOR_XXH3, ""), 32, len(names))
    sha256 = _cut(said.get(TENSOR_SHA256, ""), 64, len(names))
    rows: dict[str, Row] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, fast, strong in zip(names, xxh3, sha256, strict=True):
        dtype, shape, start, _ = header.tensors[name]
        rows[name] = Row(dtype, shape, Digest(fast, strong))
        plain = BlobTensor(dtype, shape, blob, header.data_offset + start)
        tensors[name] = VerifiedTensor(name, plain, rows[name].digest, path, digest, blob.stat)
    found = component_digest(rows)
    if found != Digest(digest, said.get(SHA256)):
        raise DamagedEntry(path, digest, "its table of contents is not the one stored", blob.stat)
    return Entry(path, said.get(COMPONENT, ""), said.get(CLASS, ""), found, rows, tensors, blob)


def damage(
    entry: Entry, sha256: bool, threads: int = 1, reporter: Reporter = SILENT, task: str = ""
) -> DamagedEntry | None:
    """Read every tensor of an entry; the damage found, or None."""

    def read(name: str) -> DamagedEntry | None:
        tensor = entry.tensors[name]
        assert isinstance(tensor, VerifiedTensor)
        try:
            found = tensor_digest(tensor, sha256)
        except DamagedEntry as error:
            return error
        reporter.advance(task, tensor.nbytes)
        if sha256 and found != tensor.digest:
            return tensor.damaged(
                f"the SHA-256 of tensor `{name}` is {found.sha256}, {tensor.digest.sha256} was stored"
            )
        return None

    with ThreadPoolExecutor(threads) as pool:
        return next((d for d in pool.map(read, entry.tensors) if d is not None), None)


def stored_size(path: Path, nbytes: int) -> bool:
    """Whether a component with `nbytes` of tensors may lie whole at `path`, going by its size alone."""
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(8)
            return len(head) == 8 and os.fstat(file.fileno()).st_size == (
                8 + int.from_bytes(head, "little") + nbytes
            )
    except OSError:
        return False


def _cut(text: str, width: int, count: int) -> list[str]:
    # A text of the wrong length gives wrong digests, which the digest over them shows.
    return [text[i * width : (i + 1) * width] for i in range(count)]


def _facts(error: SourceError) -> str:
    return "; ".join(fact for p in error.problems for fact in (p.fact, *p.evidence))
