"""Downloading one file from one address: in segments, resumed, hashed while it arrives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from builder.base.disk import read_at, try_lock, write_all
from builder.base.files import parse_json, read_bounded
from builder.base.progress import Reporter
from builder.sources.net.client import Response, Session
from builder.sources.net.failure import Failure, StartOver
from builder.sources.net.ranges import RangedFile, content_range, refuse_encoded, strong_etag
from builder.sources.net.text import file_name, safe_name

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a stranger's store may have some there
_READ_BACK = 1 << 20  # bytes hashed at a time
_SPARE = 64 << 20  # bytes left free on the disk
_NOTED = 1 << 20  # bytes after which the journal says how far a segment is
_LONGEST_JOURNAL = 8 << 20  # bytes; each megabyte that arrives adds some ten


class Received(NamedTuple):
    """A file that has arrived, not yet compared with anything."""

    sha256: str
    size: int
    name: str
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What is downloaded, and the size that it must have, where that is known."""

    url: str
    size: int | None
    task: str


def download(session: Session, remote: RemoteFile, partial: Path, reporter: Reporter) -> Received:
    """Gather the file in `partial`, from where an earlier download of the same URL left off.

    Resumes only with a strong ETag; an interruption leaves what can be resumed and nothing else.
    Raises Failure.
    """
    journal = _read_journal(partial, remote.url, session.limits.segment)
    if journal is not None and remote.size in {None, journal.size}:
        with contextlib.suppress(StartOver):
            received = _Segments(session, remote, partial, reporter, journal, None).run()
            return received._replace(resumed=True)
    for ranged in (True, True, False):  # a file may change once; after that, parts are no good
        discard(partial)
        with contextlib.suppress(StartOver):
            return _afresh(session, remote, partial, reporter, ranged=ranged)
    raise AssertionError("a download in one piece does not start over")


def discard(partial: Path) -> None:
    """Delete a partial download and its journal."""
    for path in (partial, _journal_path(partial)):
        path.unlink(missing_ok=True)


def settle(partial: Path) -> None:
    """Delete the journal of a download that is complete."""
    _journal_path(partial).unlink(missing_ok=True)


def _journal_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".journal")


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to gather a download in `partial`, which no other process does at the same time.

    `sha256` is what came of the download of another process that was waited for.
    """

    partial: Path
    sha256: str | None = None
    lock: int | None = None

    def tell(self, sha256: str) -> None:
        """Say to those who wait what came of the download."""
        if self.lock is not None:
            write_all(self.lock, sha256.encode(), 0)


@contextlib.contextmanager
def sole(partial: Path, session: Session, reporter: Reporter, task: str) -> Iterator[Turn]:
    """The turn to gather a download in `partial`, by a lock. Raises Failure once the session is stopped.

    Where the system has no locks it is a name of its own, which is deleted in the end: two processes
    never write to one file, with or without locks.
    """
    path = partial.with_name(partial.name + ".lock")
    found = _locked(path, session, reporter, task)
    if found is None:
        own = partial.with_name(f"{partial.name}.{secrets.token_hex(4)}")
        try:
            yield Turn(own)
        finally:
            discard(own)
        return
    lock, sha256 = found
    try:
        yield Turn(partial, sha256, lock)
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _locked(path: Path, session: Session, reporter: Reporter, task: str) -> tuple[int, str | None] | None:
    """A descriptor that holds the lock, and what its holder before left in it; None without locks."""
    left, told = None, False
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_LINK, 0o644)
        try:
            while not (locked := try_lock(lock)):
                if locked is None:
                    os.close(lock)
                    path.unlink(missing_ok=True)
                    return None
                if not told:
                    reporter.note(f"another process is downloading {task}: waiting for it")
                    told = True
                session.wait(0.1)
            # Whoever held the lock has deleted its file: a lock on a deleted file keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock, left
            said = memoryview(bytearray(64))
            left = bytes(said[: read_at(lock, said, 0)]).decode("ascii", "replace") or left
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


class _Journal(NamedTuple):
    """What a partial file is a part of, and how many bytes of each segment are there."""

    etag: str
    size: int
    segment: int
    name: str
    done: dict[int, int]


def _read_journal(partial: Path, url: str, segment: int) -> _Journal | None:
    """The journal of a partial download of this very URL; None when it is none, or makes no sense.

    Whatever it claims, the whole file is hashed in the end.
    """
    try:
        raw = read_bounded(_journal_path(partial), _LONGEST_JOURNAL, follow=False)
        head, *lines = raw.decode("utf-8").splitlines()
        said = parse_json(head)
        size = partial.stat().st_size
        if (said["of"], said["size"], said["segment"]) != (_fingerprint(url), size, segment):
            return None
        journal = _Journal(str(said["etag"]), size, segment, safe_name(str(said["name"])), {})
        for line in lines:
            index, _, count = line.partition(" ")
            if index.isdecimal() and count.isdecimal():
                journal.done[int(index)] = min(int(count), segment)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return journal if size else None


def _fingerprint(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _afresh(
    session: Session, remote: RemoteFile, partial: Path, reporter: Reporter, *, ranged: bool
) -> Received:
    response = session.retrying(lambda: _opened(session, remote, ranged=ranged))
    try:
        span = content_range(response) if response.status == 206 else None
        etag = strong_etag(response)
        if response.status == 206 and not (span and span.first == 0 and span.total and etag):
            # Ranges that cannot be trusted to fit together: the file is asked for in one piece.
            response.close()
            response = session.retrying(lambda: _opened(session, remote, ranged=False))
            span = None
        if span is None or span.total is None or etag is None:
            return session.retrying(_Stream(session, remote, partial, reporter, response).run)
        _check_size(session, remote, span.total, response)
        name = file_name(response.headers, remote.url)
        journal = _Journal(etag, span.total, session.limits.segment, name, {})
        return _Segments(session, remote, partial, reporter, journal, response).run()
    finally:
        response.close()


def _opened(session: Session, remote: RemoteFile, *, ranged: bool) -> Response:
    """The first answer: a 206 for the first segment, or a 200."""
    headers = {"Range": f"bytes=0-{session.limits.segment - 1}"} if ranged else {}
    response = session.request("GET", remote.url, headers)
    if response.status == 416 and ranged:  # a range of an empty file
        response.explanation()
        response.close()
        return _opened(session, remote, ranged=False)
    if response.status not in ({200, 206} if ranged else {200}):
        raise response.failure()
    refuse_encoded(response)
    return response


def _check_size(session: Session, remote: RemoteFile, size: int, response: Response) -> None:
    if remote.size is not None and size != remote.size:
        response.refuse_pages(response.read(1 << 12))
        response.close()
        raise Failure(f"the file has {size:,} bytes, {remote.size:,} are pinned", mismatch=True)
    if remote.size is None and size > session.limits.max_bytes:
        raise Failure(f"the file has {size:,} bytes, more than the {session.limits.max_bytes:,} allowed")


def _check_room(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed + _SPARE > free:
        raise Failure(f"the disk has no room: {needed:,} bytes are to come, {free:,} are free")


def _unwritable(error: OSError) -> Failure:
    return Failure(f"the download cannot be written: {error.strerror}")


class _Stream:
    """A download in one piece, which cannot be resumed; each run but the first asks anew."""

    def __init__(
        self, session: Session, remote: RemoteFile, partial: Path, reporter: Reporter, first: Response
    ) -> None:
        self.session, self.remote, self.partial, self.reporter = session, remote, partial, reporter
        self.first: Response | None = first

    def run(self) -> Received:
        response, self.first = self.first, None
        if response is None:
            response = _opened(self.session, self.remote, ranged=False)
        task = self.remote.task
        try:
            if not response.delimited and self.remote.size is None:
                raise Failure("the host tells no length: a file that was cut off could not be noticed")
            start = response.read()
            response.refuse_pages(start)
            if response.length is not None:
                _check_size(self.session, self.remote, response.length, response)
                _check_room(self.partial, response.length)
            self.reporter.start(task, response.length or self.remote.size or 0)
            try:
                return self._receive(response, start)
            finally:
                self.reporter.finish(task)
        except BaseException:
            discard(self.partial)
            raise
        finally:
            response.close()

    def _receive(self, response: Response, piece: bytes) -> Received:
        most = self.session.limits.max_bytes if self.remote.size is None else self.remote.size
        digest, size = hashlib.sha256(), 0
        try:
            with self.partial.open("wb", buffering=0) as file:
                while piece:
                    size += len(piece)
                    if size > most:
                        raise Failure(
                            f"the body goes on after {most:,} bytes", mismatch=self.remote.size is not None
                        )
                    file.write(piece)
                    digest.update(piece)
                    self.reporter.advance(self.remote.task, len(piece))
                    piece = response.read()
        except OSError as error:
            raise _unwritable(error) from None
        if self.remote.size is not None and size < self.remote.size:
            fact = f"the body ends after {size:,} bytes, {self.remote.size:,} are pinned"
            raise Failure(fact, retry=not response.delimited, mismatch=response.delimited)
        return Received(digest.hexdigest(), size, file_name(response.headers, self.remote.url))


class _Segments:
    """A download in segments over several connections, with a journal of what is there.

    The segments are received by threads and written where they belong; the calling thread hashes what
    has arrived without a gap, by reading it back from the system's memory.
    """

    def __init__(
        self,
        session: Session,
        remote: RemoteFile,
        partial: Path,
        reporter: Reporter,
        journal: _Journal,
        first: Response | None,
    ) -> None:
        self.session, self.remote, self.partial, self.reporter = session, remote, partial, reporter
        self.journal = journal
        self.resuming = first is None
        self.first = first
        self.ranges = RangedFile(session, remote.url, journal.size, journal.etag)
        if first is not None:
            self.ranges.near = first.url
        count = -(-journal.size // journal.segment)
        self.done = [min(journal.done.get(i, 0), self._length(i)) for i in range(count)]
        self.pending = deque(i for i in range(count) if self.done[i] < self._length(i))
        self.news = threading.Condition()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.responses: set[Response] = set()
        self.there = self.received = sum(self.done)
        self.full = 0  # segments from the first on that are complete

    def _length(self, index: int) -> int:
        return min(self.journal.segment, self.journal.size - index * self.journal.segment)

    def run(self) -> Received:
        size, task = self.journal.size, self.remote.task
        _check_room(self.partial, size - self.there)
        if self.there:
            self.reporter.note(f"{task}: {self.there:,} of {size:,} bytes are there already")
        self.reporter.start(task, size - self.there)
        try:
            self._open()
            return Received(self._work(), size, self.journal.name)
        except OSError as error:
            raise _unwritable(error) from None
        finally:
            self.reporter.finish(task)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_LINK
        self.file = os.open(self.partial, flags, 0o666)
        try:
            os.ftruncate(self.file, self.journal.size)
            # From here on lines are added only, each in one write: a torn one is skipped when read.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | _NO_LINK
            self.log = os.open(
                _journal_path(self.partial), flags | (0 if self.resuming else os.O_TRUNC), 0o666
            )
        except BaseException:
            os.close(self.file)
            raise
        if not self.resuming:
            about = {
                "of": _fingerprint(self.remote.url),
                "etag": self.journal.etag,
                "size": self.journal.size,
                "segment": self.journal.segment,
                "name": self.journal.name,
            }
            os.write(self.log, json.dumps(about).encode() + b"\n")

    def _work(self) -> str:
        count = min(self.session.limits.connections, max(1, len(self.pending)))
        threads = [threading.Thread(target=self._receive, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            return self._hash()
        finally:
            self.stop.set()
            with self.news:
                for response in self.responses:
                    response.abort()
            deadline = time.monotonic() + 1.0
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            # A thread that hangs while it connects may yet wake up: its files must not be another's then.
            if not any(thread.is_alive() for thread in threads):
                os.close(self.file)
                os.close(self.log)

    def _hash(self) -> str:
        digest, hashed, told = hashlib.sha256(), 0, self.there
        buffer = memoryview(bytearray(_READ_BACK))
        while hashed < self.journal.size:
            with self.news:
                wanted = min(hashed + _READ_BACK, self.journal.size)
                self.news.wait_for(lambda: self.error or self._frontier() >= wanted, 0.2)  # noqa: B023
                frontier, received, error = self._frontier(), self.received, self.error
            if error is not None:
                raise error
            self.session.go_on()
            self.reporter.advance(self.remote.task, received - told)
            told = received
            while hashed < frontier:
                piece = buffer[: min(len(buffer), frontier - hashed)]
                count = read_at(self.file, piece, hashed)
                if count == 0:
                    raise StartOver
                digest.update(piece[:count])
                hashed += count
        return digest.hexdigest()

    def _frontier(self) -> int:
        """How many bytes are there from the beginning on, without a gap."""
        while self.full < len(self.done) and self.done[self.full] == self._length(self.full):
            self.full += 1
        partly = self.done[self.full] if self.full < len(self.done) else 0
        return min(self.full * self.journal.segment + partly, self.journal.size)

    def _receive(self) -> None:
        try:
            while not self.stop.is_set():
                with self.news:
                    if not self.pending:
                        return
                    index = self.pending.popleft()
                self._segment(index)
        except BaseException as error:
            with self.news:
                self.error = self.error or error
                self.news.notify_all()
            self.stop.set()

    def _segment(self, index: int) -> None:
        failures = 0
        while not self.stop.is_set() and self.done[index] < self._length(index):
            before = self.done[index]
            try:
                self._pull(index)
            except Failure as failure:
                # What trickles in is no progress: a host could go on so for ever.
                got = self.done[index] - before
                failures = 1 if got >= self.session.limits.slowest else failures + 1
                if not failure.retry or failures >= self.session.limits.attempts:
                    raise
                self.stop.wait(self.session.pause(failures, failure))
            finally:
                if self.done[index] > before:
                    self._note(index)

    def _note(self, index: int) -> None:
        os.write(self.log, f"{index} {self.done[index]}\n".encode())

    def _first(self, index: int) -> Response | None:
        """The response that the download began with, once: it holds the first segment."""
        with self.news:
            if index or self.first is None:
                return None
            response, self.first = self.first, None
            return response

    def _pull(self, index: int) -> None:
        """Receive what is missing of a segment, as far as one response brings it."""
        start = index * self.journal.segment + self.done[index]
        end = index * self.journal.segment + self._length(index)
        noted = self.done[index]
        response = self._first(index) or self.ranges.part(start, end)
        with self.news:
            self.responses.add(response)
        try:
            while start < end and not self.stop.is_set():
                piece = response.read()
                if self.stop.is_set():
                    return
                if not piece:
                    raise Failure(f"the body ends {end - start:,} bytes early", retry=True)
                if start == 0:
                    response.refuse_pages(piece)
                piece = piece[: end - start]
                write_all(self.file, piece, start)
                start += len(piece)
                with self.news:
                    self.done[index] += len(piece)
                    self.received += len(piece)
                    self.news.notify_all()
                if self.done[index] - noted >= _NOTED:
                    noted = self.done[index]
                    self._note(index)
        finally:
            with self.news:
                self.responses.discard(response)
            response.close()
