"""Checkpoints on other machines: their tables of contents, and parts of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from builder.base.addresses import Address, LocalFile, parse_address
from builder.base.errors import FetchError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats import safetensors
from builder.formats.blob import BlobTensor, FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.formats.write_safetensors import plan_layout
from builder.sources.net.client import PIECE, Response, Session
from builder.sources.net.failure import Failure, StartOver
from builder.sources.net.hosts import download_url
from builder.sources.net.ranges import RangedFile, content_range, refuse_encoded, strong_etag
from builder.sources.net.text import file_name, shown
from builder.tensors.digests import Row, component_digest, tensor_digest

T = TypeVar("T")

HEAD = 256 << 10  # bytes fetched first: the table of contents of most checkpoints fits
GAP = 16 << 10  # bytes between two tensors that are cheaper read along than asked for around
REQUEST = 8 << 20  # bytes of one request; also what each connection holds in memory


class RemoteBlob:
    """A file on a host, read in parts; its beginning is read at once and kept.

    Every part is of the version seen first: by its strong ETag, else by its size and date. Reading
    raises FetchError.
    """

    def __init__(self, session: Session, url: str, address: str) -> None:
        self._session = session
        self._address = address
        self.name = address
        self.file_name = ""
        self.size = 0
        self._head = b""
        self._file = RangedFile(session, url, 0, None)
        self._attempt(self._open)

    def _open(self) -> None:
        response = self._session.request("GET", self._file.url, {"Range": f"bytes=0-{HEAD - 1}"})
        try:
            if response.status == 416:
                raise Failure("the file is empty")
            if response.status not in {200, 206}:
                raise response.failure()
            refuse_encoded(response)
            self.file_name = file_name(response.headers, self._file.url)
            start = response.read()
            response.refuse_pages(start)
            self._head = start + self._rest(response, len(start))
        finally:
            response.close()

    def _rest(self, response: Response, have: int) -> bytes:
        span = content_range(response)
        if response.status == 206 and span is not None and span.first == 0 and span.total is not None:
            self.size, length = span.total, min(span.last + 1, HEAD)
        elif response.status == 200 and response.length is not None and response.length <= HEAD:
            self.size = length = response.length
        else:
            raise Failure("the host does not serve parts of the file", hint="download it, and use the file")
        url, modified = self._file.url, response.headers.get("Last-Modified")
        self._file = RangedFile(self._session, url, self.size, strong_etag(response), modified)
        self._file.near = response.url
        rest = b""
        while have + len(rest) < length and (piece := response.read()):
            rest += piece
        return rest[: length - have]

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on, in one request; nothing is asked for what is in the beginning."""
        known = self._head[offset : offset + len(out)]
        out[: len(known)] = known
        done = len(known)
        while done < len(out):
            done += self._attempt(partial(self._part, offset + done, out[done:]))

    def _part(self, start: int, out: memoryview) -> int:
        """Fill as much as comes before the connection is dropped; something, or Failure."""
        if start + len(out) > self.size:
            raise Failure(f"bytes {start:,} to {start + len(out):,} of {self.size:,} are not there")
        response = self._file.part(start, start + len(out))
        done = 0
        try:
            while done < len(out) and (piece := response.read(min(PIECE, len(out) - done))):
                out[done : done + len(piece)] = piece
                done += len(piece)
        except Failure as failure:
            if not done or not failure.retry:
                raise
        finally:
            response.close()
        if not done:
            raise Failure("the body is empty", retry=True)
        return done

    def _attempt(self, ask: Callable[[], T]) -> T:
        try:
            return self._session.retrying(ask)
        except StartOver:
            raise self._error(
                "the file changed while it was read, or its host stopped serving parts"
            ) from None
        except Failure as failure:
            raise self._error(failure.fact, failure.hint) from None

    def _error(self, fact: str, hint: str | None = None) -> FetchError:
        return _unreadable(self._session, self._address, fact, hint)

    def close(self) -> None:
        """Let go of the beginning; connections are the session's."""
        self._head = b""


def _unreadable(session: Session, address: object, fact: str, hint: str | None) -> FetchError:
    return FetchError(Problem(session.scrub(f"`{address}` cannot be read: {fact}"), hint=hint))


def open_remote(address: Address | str, *, session: Session) -> Checkpoint:
    """The table of contents of a safetensors file on a host; its tensors are read when they are pulled.

    Raises FetchError, UsageError for what is no address of a host, and SourceError for a file that is
    no safetensors file.
    """
    address = parse_address(address) if isinstance(address, str) else address
    if isinstance(address, LocalFile):
        raise SourceError(Problem(f"`{address}` is on this machine", hint="open it by its path"))
    try:
        url = download_url(address, session)
    except Failure as failure:
        raise _unreadable(session, address, failure.fact, failure.hint) from None
    blob = RemoteBlob(session, url, shown(url) if str(address).startswith("http") else str(address))
    start = bytearray(min(9, blob.size))
    blob.read_into(0, memoryview(start))
    if start[8:9] != b"{":
        raise SourceError(
            Problem(
                "only safetensors files can be read on their hosts",
                Place(blob.name),
                (f"it begins with {bytes(start)!r}",),
                "download it, and use the file",
            )
        )
    return safetensors.from_blob(blob, blob.name)


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
    sha256: str | None = None,
    connections: int = 4,
    reporter: Reporter = SILENT,
    task: str = "",
) -> Checkpoint:
    """Tensors of a remote safetensors file as a local one at `path`, without the rest of the file.

    `names` are the names that tensors get here and the names they have there; `sha256` is the
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
            if os.pwrite(file, part, move.to) != len(part):
                raise OSError(0, "not all could be written")
            reporter.advance(task, move.length)

    reporter.start(task, layout.size - len(layout.head))
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(file, layout.head, 0)
            os.ftruncate(file, layout.size)
            with ThreadPoolExecutor(connections) as pool:
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
        _verify(local, sha256)
        return local
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FetchError(Problem("the download cannot be written", evidence=(str(error.strerror),))) from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        reporter.finish(task)


def _verify(local: Checkpoint, sha256: str | None) -> None:
    if sha256 is None:
        return
    found = component_digest({n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in local.items()}).sha256
    if found != sha256:
        local.close()
        raise SourceError(
            Problem(
                "a component on its host is not what was pinned",
                Place(local.name),
                (f"pinned SHA-256: {sha256}", f"received:       {found}"),
                "`ckpt lock --upgrade` takes the file as it is now",
            )
        )
