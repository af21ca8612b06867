"""A store that machines share: its records are claims, and its bytes are compared with their digests."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from builder.base.disk import new_file, write_all
from builder.base.errors import OutputError, Place, Problem, SourceError
from builder.base.files import parse_json
from builder.base.parallel import Cancelled
from builder.base.progress import SILENT, Reporter
from builder.formats.blob import BlobTensor, FileBlob
from builder.formats.safetensors import MAX_HEADER, read_header
from builder.store.action_result import decode, encode
from builder.store.records import Made, is_digest, made_from_record, made_to_record
from builder.store.records import size as as_size
from builder.tensors.digests import Row, component_digest
from builder.tensors.scan import scan

T = TypeVar("T")
_NOT_USED = "the shared store is not used any more: what it has is made here"

MAX_RECORD = 1 << 20  # bytes
PATIENCE = 60.0  # seconds that are waited for records in whole, where they take longer than `SLOW` each
SLOW = 1.0
FILE = "component.safetensors"  # what records call their blob

VERSION = 1  # of records; another one's are other names


class Absent(Exception):
    """There is nothing of this name."""


class Unavailable(Exception):
    """A shared store cannot be reached, or does not answer as it should; says why."""


class _Wrong(Exception):
    """A blob is not what was promised."""

    def __init__(self, *evidence: str) -> None:
        super().__init__(*evidence)
        self.evidence = evidence


class Bucket(Protocol):
    """Where names (`ac/HEX`, `cas/HEX`) lead to bytes, on another machine. Serves several threads.

    Methods raise Unavailable, and `get` Absent, when no more is to be had for the time being.
    """

    def get(self, name: str, most: int) -> Iterator[bytes]:
        """The bytes of a name in pieces; not many more than `most`."""

    def has(self, name: str) -> bool:
        """Whether there is something of a name."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Have bytes, or those of a file, under a name; at once, or not at all."""

    def close(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a shared store says was made, and the SHA-256 and size of the blob that holds it.

    `sha256` is empty for what was made here of what such a store had: its bytes may be nowhere.
    """

    made: Made
    sha256: str = ""
    size: int = 0

    def record(self) -> dict[str, Any]:
        """The claim as a record holds it."""
        return {**made_to_record(self.made), "sha256": self.sha256, "size": self.size}


def claim_from_record(record: Mapping[str, Any]) -> Claim:
    """The claim of a record; raises LookupError, TypeError, ValueError for what is none."""
    made = made_from_record(dict(record))
    if made is None or not (record["sha256"] == "" or is_digest(record["sha256"])):
        raise ValueError("no claim")
    return Claim(made, record["sha256"], as_size(record["size"]))


class Shared:
    """A shared store, asked for what others made, and told of it if `writing`. Serves several threads.

    Nothing here fails for its sake: once it cannot be reached, or takes too long, it is not asked again,
    which is said once, and what turns out to be other than it says is said and refused. What is not `known`
    is as if it were not there; what by its tensors is not what it is said to be does not fit (`fits`).
    """

    def __init__(
        self,
        connect: Callable[[], Bucket],
        url: str,
        *,
        writing: bool = False,
        known: Callable[[Made], bool] = lambda made: True,
        fits: Callable[[Made, Mapping[str, Row]], bool] = lambda made, rows: True,
        patience: float = PATIENCE,
        reporter: Reporter = SILENT,
    ) -> None:
        self.url = url
        self.writing = writing
        self._connect = connect
        self._known = known
        self._fits = fits
        self._patience = patience
        self._waited, self._asks = 0.0, 0  # for and of records
        self._reporter = reporter
        self._bucket: Bucket | None = None
        self._off = False
        self._claims: dict[tuple[str, str], Claim | None] = {}
        self._refused: set[tuple[str, str]] = set()  # digests of components and of blobs
        self._lock = threading.RLock()

    def close(self) -> None:
        """Let go of connections."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.close()
                self._bucket = None

    # -- what it says

    def action(self, key: str) -> Claim | None:
        """What the action of this key is said to have made."""
        return self._claim("action", key)

    def component(self, digest: str) -> Claim | None:
        """What is said of the component of this digest, with a blob; its bytes prove it or do not."""
        claim = self._claim("component", digest)
        return claim if claim is not None and claim.made.digest == digest and claim.sha256 else None

    def _claim(self, kind: str, key: str) -> Claim | None:
        with self._lock:
            known = (kind, key) in self._claims
            claim = self._claims.get((kind, key))
        if not known:
            claim = self._asked(kind, key)
            self.believe(kind, key, claim)
        return claim if claim is not None and not self._is_refused(claim) else None

    def _asked(self, kind: str, key: str) -> Claim | None:
        raw = self._soon(lambda bucket: _joined(bucket.get(_record_name(kind, key), MAX_RECORD)))
        if raw is None or len(raw) > MAX_RECORD:
            return None
        try:
            record = parse_json(decode(raw))
            if record["kind"] != kind or record["key"] != key:
                return None
            claim = claim_from_record(record)
            return claim if self._known(claim.made) else None
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None  # another version's, or damaged: made again, and written again by who may

    def believe(self, kind: str, key: str, claim: Claim | None) -> None:
        """Take a claim for what is said, without asking again."""
        with self._lock:
            self._claims[kind, key] = claim
            if claim is not None and claim.sha256:
                self._claims.setdefault(("component", claim.made.digest), claim)

    def refuse(self, claim: Claim, *evidence: str) -> None:
        """Have a claim not believed any more, which is said."""
        with self._lock:
            if self._is_refused(claim):
                return
            self._refused.add((claim.made.digest, claim.sha256))
        fact = f"what the shared store has for `{claim.made.component}` is not used: it is made here"
        self._reporter.warn(Problem(fact, Place(self.url), evidence))

    def _is_refused(self, claim: Claim) -> bool:
        return (claim.made.digest, claim.sha256) in self._refused

    # -- what it has

    def fetch(
        self, claim: Claim, path: Path, *, threads: int = 1, stop: threading.Event | None = None
    ) -> dict[str, Row] | None:
        """Have the blob of a claim at `path`: its tensors' rows, or None when it is not what it should be.

        The whole is compared with its SHA-256 as it comes, and what is in it with the component's digest.
        """
        made, task = claim.made, f"{claim.made.component} from the shared store"
        self._reporter.start(task, claim.size)
        try:
            if not made.bytes < claim.size <= made.bytes + 8 + MAX_HEADER:
                raise _Wrong(f"a blob of {claim.size:,} bytes for {made.bytes:,} of tensors")
            if not self._best(lambda bucket: self._copy(bucket, claim, path, task, stop)):
                with self._lock:  # gone since, which is nobody's fault
                    self._refused.add((made.digest, claim.sha256))
                return None
            rows = _rows(path, threads, stop)
            if (digest := component_digest(rows)) != made.digest:
                raise _Wrong(f"expected BLAKE3 {made.digest}", f"received BLAKE3 {digest}")
            if len(rows) != made.tensors or not self._fits(made, rows):
                raise _Wrong(f"its {len(rows):,} tensors are not those of such a component")
            return rows
        except (SourceError, OutputError) as error:
            self.refuse(claim, error.problems[0].fact, *error.problems[0].evidence)
        except _Wrong as wrong:
            self.refuse(claim, *wrong.evidence)
        finally:
            self._reporter.finish(task)
        return None

    def _copy(
        self, bucket: Bucket, claim: Claim, path: Path, task: str, stop: threading.Event | None
    ) -> bool:
        """Write a blob to `path`; raises _Wrong when it is not the one that was promised."""
        sha256, at = hashlib.sha256(), 0
        with new_file(path, durable=False) as file:
            file.reserve(claim.size)
            for piece in bucket.get(f"cas/{claim.sha256}", claim.size):
                if stop is not None and stop.is_set():
                    raise Cancelled
                at += len(piece)
                if at > claim.size:
                    break
                write_all(file.fd, piece, at - len(piece))
                sha256.update(piece)
                self._reporter.advance(task, len(piece))
            if at != claim.size:
                more = "more" if at > claim.size else f"{at:,}"
                raise _Wrong(f"{claim.size:,} bytes were promised, and {more} came")
            if (found := sha256.hexdigest()) != claim.sha256:
                raise _Wrong(f"expected SHA-256 {claim.sha256}", f"received SHA-256 {found}")
        return True

    # -- what it is told

    def offer(self, action: str, made: Made, blob: Callable[[], Claim | None], path: Path) -> None:
        """Have it known what an action made, and the bytes kept; `blob` writes them to `path` if need be.

        Raises what `blob` raises.
        """
        if not self.writing or self._off:
            return
        held = self.component(made.digest)
        if held is None or not self._has(held):
            if (held := blob()) is None:
                return
            if self._is_refused(held) or not self._has(held):  # what is there is not what it should be
                self._put(f"cas/{held.sha256}", path)
            self._tell("component", made.digest, held)
        said = Claim(made, held.sha256, held.size)
        if self.action(action) != said:
            self._tell("action", action, said)

    def _has(self, claim: Claim) -> bool:
        return bool(self._soon(lambda bucket: bucket.has(f"cas/{claim.sha256}")))

    def _tell(self, kind: str, key: str, claim: Claim) -> None:
        record = json.dumps({"kind": kind, "key": key, **claim.record()}, sort_keys=True)
        result = encode(record.encode(), FILE, claim.sha256, claim.size)
        self._put(_record_name(kind, key), result)
        with self._lock:
            self._refused.discard((claim.made.digest, claim.sha256))
        self.believe(kind, key, claim)

    def _soon(self, ask: Callable[[Bucket], T]) -> T | None:
        """What the bucket answers to a short question; it may not take long over many of them."""
        began = time.monotonic()
        found = self._best(ask)
        with self._lock:
            self._waited, self._asks = self._waited + time.monotonic() - began, self._asks + 1
            slow = self._waited > self._patience and self._waited > SLOW * self._asks
            said, self._off = self._off, self._off or slow
        if slow and not said:
            each = Unavailable(f"it takes {self._waited / self._asks:.1f} seconds for an answer")
            self._say(_NOT_USED, each)
        return found

    def _best(self, ask: Callable[[Bucket], T]) -> T | None:
        """What the bucket answers; None for what is not there, and once it cannot be reached."""
        if self._off:
            return None
        try:
            return ask(self._connected())
        except Absent:
            return None
        except Unavailable as error:
            with self._lock:
                said, self._off = self._off, True
            if not said:
                self._say(_NOT_USED, error)
            return None

    def _put(self, name: str, data: bytes | Path) -> None:
        """Put something, if that can be; where it cannot, no more is put."""
        try:
            if self.writing and not self._off:
                self._connected().put(name, data)
        except Unavailable as error:
            with self._lock:
                said, self.writing = not self.writing, False
            if not said:
                self._say("nothing more is put into the shared store", error)

    def _connected(self) -> Bucket:
        with self._lock:
            if self._bucket is None:
                self._bucket = self._connect()
            return self._bucket

    def _say(self, fact: str, error: Unavailable) -> None:
        self._reporter.warn(Problem(fact, Place(self.url), (str(error),)))


def _rows(path: Path, threads: int, stop: threading.Event | None) -> dict[str, Row]:
    """The tensors of a safetensors file, each with its digest; raises SourceError."""
    with closing(FileBlob(path)) as blob:
        header = read_header(blob)
        held = {
            n: BlobTensor(t.dtype, t.shape, blob, header.data_offset + t.start)
            for n, t in header.tensors.items()
        }
        found = scan(held, digests=True, numbers=False, threads=threads, stop=stop)
        return {n: Row(t.dtype, t.shape, str(found.tensors[n].digest)) for n, t in held.items()}


def _record_name(kind: str, key: str) -> str:
    """Where a record lies: its kind and its key in one digest, as names of bazel-remote are."""
    return "ac/" + hashlib.sha256(f"ckpt-build {VERSION} {kind} {key}".encode()).hexdigest()


def _joined(pieces: Iterator[bytes]) -> bytes:
    out = bytearray()
    for piece in pieces:
        out += piece
        if len(out) > MAX_RECORD:
            break
    return bytes(out)


def claim_key(url: str, action: str) -> str:
    """Under which a store remembers what another said."""
    return hashlib.sha256(f"{url}\n{action}".encode()).hexdigest()
