"""Checkpoints on other machines: their tables of contents, and parts of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from builder.base.addresses import Address, Civitai, HuggingFace, LocalFile, Web, parse_address
from builder.base.disk import write_all
from builder.base.errors import CkptError, FetchError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats import safetensors
from builder.formats.blob import BlobTensor, FileBlob
from builder.formats.checkpoint import Checkpoint, unwrapped
from builder.formats.write_safetensors import plan_layout
from builder.sources.net.client import PIECE, Response, Session
from builder.sources.net.failure import Failure, StartOver
from builder.sources.net.hosts import download_url, pin_of
from builder.sources.net.ranges import RangedFile, content_range, refuse_encoded, strong_etag
from builder.sources.net.text import file_name, shown
from builder.tensors.digests import Row, component_digest, tensor_digest

HEAD = 256 << 10  # bytes fetched first: the table of contents of most checkpoints fits
GAP = 16 << 10  # bytes between two tensors that are cheaper read along than asked for around
CONNECTIONS = 4  # at a time, of one component
REQUEST = 8 << 20  # bytes of one request; also what each connection holds in memory


class _Seen(NamedTuple):
    """A file on a host as it was opened: its parts, its beginning, and the name its host gives it."""

    file: RangedFile
    head: bytes
    name: str


class RemoteBlob:
    """A file on a host, read in parts; its beginning is read at once and kept.

    The first of `addresses` is read from; when it fails, the others in turn, from where the last one ended.
    At one address every part is of the version seen first: by its strong ETag, else by its size and date.
    Another address must have the same size and the same beginning, and its host must not state another
    digest than `sha256`; hosts' tags say nothing of each other. What is made of the parts is to be
    compared with a digest in the end. Reading raises FetchError, with what became of each address.
    """

    def __init__(self, session: Session, addresses: Sequence[Address], sha256: str | None = None) -> None:
        self._session = session
        self._address, *self._others = addresses
        self._sha256 = sha256
        self._lock = threading.Lock()
        self._failed: list[tuple[Address, Failure]] = []
        self.name = _shown(self._address)
        try:
            self._seen = session.retrying(partial(self._look, self._address))
        except Failure as failure:
            raise _unreadable(session, [(self._address, failure)]) from None
        self.size = self._seen.file.size

    @property
    def file_name(self) -> str:
        """What its host calls the file."""
        return self._seen.name

    def _look(self, address: Address) -> _Seen:
        url = download_url(address, self._session)
        response = self._session.request("GET", url, {"Range": f"bytes=0-{HEAD - 1}"})
        try:
            if response.status == 416:
                raise Failure("the file is empty")
            if response.status not in {200, 206}:
                raise response.failure()
            refuse_encoded(response)
            start = response.read()
            response.refuse_pages(start)
            size, length = _extent(response)
            modified = response.headers.get("Last-Modified")
            file = RangedFile(self._session, url, size, strong_etag(response), modified)
            file.near = response.url
            head = bytearray(start)
            while len(head) < length and (piece := response.read()):
                head += piece
            return _Seen(file, bytes(head[:length]), file_name(response.headers, url))
        finally:
            response.close()

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on; nothing is asked for what is in the beginning."""
        head = self._seen.head
        known = head[offset : offset + len(out)]
        out[: len(known)] = known
        if offset + len(out) > self.size:
            fact = f"bytes {offset:,} to {offset + len(out):,} of {self.size:,} are not there"
            raise _unreadable(self._session, [(self._address, Failure(fact))])
        done, failures = len(known), 0
        while done < len(out):
            file = self._seen.file
            got, failure = self._part(file, offset + done, out[done:])
            done += got
            if failure is None:
                continue
            # What trickles in is no progress: a host could go on so for ever.
            failures = 1 if got >= self._session.limits.slowest else failures + 1
            try:
                if not failure.retry or failures >= self._session.limits.attempts:
                    raise failure
                self._session.wait(self._session.pause(failures, failure))
            except Failure as last:
                self._move_on(file, last)
                failures = 0

    def _part(self, file: RangedFile, start: int, out: memoryview) -> tuple[int, Failure | None]:
        """Fill what one response brings: how many bytes, and why they are not all."""
        done = 0
        try:
            response = file.part(start, start + len(out))
            try:
                while done < len(out):
                    piece = response.read(min(PIECE, len(out) - done))
                    if not piece:
                        raise Failure("the body ends early", retry=True)
                    out[done : done + len(piece)] = piece
                    done += len(piece)
            finally:
                response.close()
        except StartOver:
            fact = "the file changed while it was read, or its host stopped serving parts"
            return done, Failure(fact)
        except Failure as failure:
            return done, failure
        return done, None

    def _move_on(self, file: RangedFile, failure: Failure) -> None:
        """Read from the next address after `file` has failed; raises FetchError when there is none."""
        with self._lock:
            if file is not self._seen.file:  # another thread has moved on already
                return
            while self._others:
                address, *self._others = self._others
                try:
                    self._session.go_on()
                    seen = self._session.retrying(partial(self._same, address))
                except Failure as another:
                    self._failed.append((address, another))
                    continue
                said = f"`{self.name}` is read on from `{_shown(address)}`: {failure.fact}"
                self._session.reporter.note(self._session.scrub(said))
                self._failed.append((self._address, failure))
                self._address, self._seen = address, seen
                return
            raise _unreadable(self._session, [(self._address, failure), *self._failed])

    def _same(self, address: Address) -> _Seen:
        """The same file at another address. Raises Failure where it may be another one."""
        stated = None if self._sha256 is None else pin_of(address, self._session).sha256
        if stated not in {None, self._sha256}:
            raise Failure(f"its host states the SHA-256 {stated}", mismatch=True)
        seen = self._look(address)
        if seen.file.size != self.size:
            raise Failure(f"the file has {seen.file.size:,} bytes instead of {self.size:,}", mismatch=True)
        if seen.head != self._seen.head:
            raise Failure("the file begins otherwise", mismatch=True)
        return seen

    def close(self) -> None:
        """Let go of the beginning; connections are the session's."""
        self._seen = self._seen._replace(head=b"")


def _extent(response: Response) -> tuple[int, int]:
    """The size of the file whose beginning a response holds, and how many bytes of that there are."""
    span = content_range(response)
    if response.status == 206 and span is not None and span.first == 0 and span.total is not None:
        return span.total, min(span.last + 1, HEAD)
    if response.status == 200 and response.length is not None and response.length <= HEAD:
        return response.length, response.length
    raise Failure("the host does not serve parts of the file", hint="download it, and use the file")


def _shown(address: Address) -> str:
    return shown(str(address)) if str(address).startswith("http") else str(address)


def _unreadable(session: Session, failed: Sequence[tuple[Address, Failure]]) -> FetchError:
    (first, failure), *others = failed
    evidence = (*failure.evidence, *(f"{_shown(a)}: {f.fact}" for a, f in others))
    hint = next((f.hint for _, f in failed if f.hint), None)
    fact = session.scrub(f"`{_shown(first)}` cannot be read: {failure.fact}")
    return FetchError(Problem(fact, evidence=tuple(session.scrub(line) for line in evidence), hint=hint))


def open_remote(
    addresses: Address | str | Sequence[Address | str],
    *,
    session: Session,
    size: int | None = None,
    sha256: str | None = None,
) -> Checkpoint:
    """The table of contents of a safetensors file on a host; its tensors are read when they are pulled.

    The file is had from the first of `addresses` that gives it, and read on from those after when that
    one fails; `size` in bytes and `sha256` are what it must be, as far as they are known. Raises
    FetchError, UsageError for what is no address of a host, and SourceError for a file of another size
    and for one that is no safetensors file; of several addresses, the problems of all.
    """
    if isinstance(addresses, (str, Web, HuggingFace, Civitai, LocalFile)):
        addresses = (addresses,)
    wanted = [parse_address(a) if isinstance(a, str) else a for a in addresses]
    errors: list[CkptError] = []
    for index in range(len(wanted)):
        try:
            return _open(wanted[index:], session, size, sha256)
        except (FetchError, SourceError) as error:
            errors.append(error)
    wrong = next((e for e in errors if isinstance(e, SourceError)), None)
    raise (SourceError if wrong else FetchError)(*(p for e in errors for p in e.problems))


def _open(addresses: Sequence[Address], session: Session, size: int | None, sha256: str | None) -> Checkpoint:
    first, *others = addresses
    if isinstance(first, LocalFile):
        raise SourceError(Problem(f"`{first}` is on this machine", hint="open it by its path"))
    blob = RemoteBlob(session, [first, *(a for a in others if not isinstance(a, LocalFile))], sha256)
    if size is not None and blob.size != size:
        fact = f"`{blob.name}` is not what was pinned"
        raise SourceError(Problem(fact, evidence=(f"{blob.size:,} bytes, {size:,} are pinned",)))
    start = bytearray(min(9, blob.size))
    blob.read_into(0, memoryview(start))
    if start[8:9] != b"{":
        raise SourceError(
            Problem(
                "only safetensors files can be read on their hosts",
                Place(blob.name),
                hint="download it, and use the file",
            )
        )
    return unwrapped(safetensors.from_blob(blob, blob.name))


class _Move(NamedTuple):
    """Bytes that go from a place in one file to a place in another."""

    start: int
    length: int
    to: int


def coalesce(moves: Iterable[_Move], gap: int = GAP, most: int = REQUEST) -> list[list[_Move]]:
    """Moves in the order of their sources, put together into requests of at most `most` bytes.

    Two are put together when at most `gap` bytes between them would be read in vain; longer ones than
    `most` are cut.
    """
    requests: list[list[_Move]] = []
    for move in sorted(moves):
        for done in range(0, move.length, most):
            part = _Move(move.start + done, min(most, move.length - done), move.to + done)
            if requests:
                first, last = requests[-1][0], requests[-1][-1]
                near = part.start - (last.start + last.length) <= gap
                if near and part.start + part.length - first.start <= most:
                    requests[-1].append(part)
                    continue
            requests.append([part])
    return requests


def fetch_component(
    remote: Checkpoint,
    names: Mapping[str, str],
    path: Path,
    *,
    digest: str | None = None,
    reporter: Reporter = SILENT,
    task: str = "",
) -> Checkpoint:
    """Tensors of a remote safetensors file as a local one at `path`, without the rest of the file.

    `names` are the names that tensors get here and the names they have there; `digest` is the
    component digest that they must have under their new names, compared before anything is returned.
    Nothing is left at `path` on failure. Raises FetchError; SourceError when the digest is another one.
    """
    layout = plan_layout({new: (remote[old].dtype, remote[old].shape) for new, old in names.items()})
    moves = []
    for new, entry in layout.tensors.items():
        tensor = remote[names[new]]
        assert isinstance(tensor, BlobTensor)
        moves.append(_Move(tensor.offset, tensor.nbytes, len(layout.head) + entry.start))
    blob = remote.blobs[0]
    done = threading.Event()

    def bring(request: list[_Move]) -> None:
        start = request[0].start
        data = memoryview(bytearray(request[-1].start + request[-1].length - start))
        if done.is_set():
            return
        blob.read_into(start, data)
        for move in request:
            part = data[move.start - start : move.start - start + move.length]
            write_all(file, part, move.to)
            reporter.advance(task, move.length)

    reporter.start(task, layout.size - len(layout.head))
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(file, layout.head, 0)
            os.ftruncate(file, layout.size)
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                try:
                    for _ in pool.map(bring, coalesce(moves)):
                        pass
                except BaseException:
                    done.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            os.close(file)
        local = safetensors.from_blob(FileBlob(path), remote.name)
        _verify(local, digest)
        return local
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FetchError(Problem("the download cannot be written", evidence=(str(error.strerror),))) from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        reporter.finish(task)


def _verify(local: Checkpoint, digest: str | None) -> None:
    if digest is None:
        return
    found = component_digest({n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in local.items()})
    if found != digest:
        local.close()
        raise SourceError(
            Problem(
                "a component on its host is not what was pinned",
                Place(local.name),
                (f"pinned BLAKE3: {digest}", f"received:      {found}"),
                "`ckpt lock --upgrade` takes the file as it is now",
            )
        )
