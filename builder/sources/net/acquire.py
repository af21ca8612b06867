"""Having a source: from what is here already, or from the first of its addresses that gives it."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from builder.base.addresses import Address, LocalFile, check_address, is_pinned, parse_address
from builder.base.errors import FetchError, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.sources.net.client import Session
from builder.sources.net.download import Received, RemoteFile, discard, download, settle, sole
from builder.sources.net.failure import Failure
from builder.sources.net.hosts import Pin, by_hash, cached, download_url, pin_of
from builder.sources.net.text import safe_name


class Downloads(Protocol):
    """Where downloads go: a store."""

    def download_path(self, sha256: str) -> Path:
        """Where the finished download of this digest lies, if there is one."""

    def partial_path(self, key: str) -> Path:
        """Where the download that `key` names is gathered; its folder exists."""

    def keep_download(self, partial: Path, sha256: str) -> Path:
        """Put a gathered file among the finished downloads, in one step."""

    def sha256(self, path: Path, reporter: Reporter | None = None) -> str:
        """The SHA-256 of a file, which may be remembered."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is here and is what was asked for.

    `address` is where anybody can have it from, None when no host was asked, or an archive; `name` is
    what its host calls it.
    """

    path: Path
    sha256: str
    size: int
    address: str | None
    name: str


def resolve(address: Address | str, *, session: Session) -> Pin:
    """What the host of an address states of its file, without downloading it.

    Hugging Face states the commit and, for files in LFS, the SHA-256; Civitai the SHA-256. Other hosts
    state nothing, and are not asked. Raises FetchError.
    """
    address = parse_address(address) if isinstance(address, str) else address
    try:
        return pin_of(address, session)
    except Failure as failure:
        raise _unfetched(session, f"`{address}` cannot be resolved", [(address, failure)]) from None


def lookup_by_hash(sha256: str, *, session: Session) -> Pin | None:
    """The file of this SHA-256 at Civitai, or None when it is not known there. Raises FetchError."""
    try:
        return by_hash(sha256, session)
    except Failure as failure:
        fact = f"the SHA-256 `{sha256[:12]}…` cannot be looked up"
        raise _unfetched(session, fact, [(session.civitai.name, failure)]) from None


def fetch(
    addresses: Sequence[Address | str],
    *,
    sha256: str | None = None,
    size: int | None = None,
    store: Downloads,
    session: Session,
    reporter: Reporter = SILENT,
    base: Path | None = None,
    name: str = "source",
) -> Fetched:
    """The file that `addresses` lead to, tried in order; `sha256` and `size` are what it must be.

    What is in the store's downloads, or in Hugging Face's cache, is not downloaded again. Without a
    digest the host's is taken where it states one. Without an address, Civitai is asked for the digest.
    What nobody else gives is asked for by its digest at the archives that `CKPT_ARCHIVE` names.
    `base` is the recipe's folder, `name` what messages call the file. Raises FetchError, with what every
    address came to, or SourceError when the last word is that a file is not what was pinned.
    """
    wanted = [parse_address(a) if isinstance(a, str) else a for a in addresses]
    request = _Request(store, session, reporter, base, name, sha256, size)
    if sha256 is not None and (found := request.here(None)) is not None:
        return found
    tried: list[tuple[object, Failure]] = []
    for address in wanted or _looked_up(request, tried):
        try:
            return request.get(address)
        except Failure as failure:
            tried.append((address, failure))
    for template in session.archives if sha256 is not None else ():
        try:
            return request.from_archive(template)
        except Failure as failure:
            tried.append((f"archive {template}", failure))
    wrong = any(failure.mismatch for _, failure in tried)
    fact = f"`{name}` is not what was pinned" if wrong else f"`{name}` could not be fetched"
    raise _unfetched(session, fact, tried)


def _looked_up(request: _Request, tried: list[tuple[object, Failure]]) -> list[Address]:
    try:
        pin = by_hash(request.sha256, request.session) if request.sha256 is not None else None
        if pin is None:
            raise Failure("nothing is known of it", hint="give the source an address in `urls`")
        return [parse_address(pin.url)]
    except Failure as failure:
        tried.append((request.session.civitai.name, failure))
        return []


def _unfetched(
    session: Session, fact: str, tried: Sequence[tuple[object, Failure]]
) -> FetchError | SourceError:
    evidence = [line for where, failure in tried for line in (f"{where}: {failure.fact}", *failure.evidence)]
    hint = next((failure.hint for _, failure in tried if failure.hint), None)
    kind = SourceError if any(failure.mismatch for _, failure in tried) else FetchError
    return kind(Problem(fact, evidence=tuple(session.scrub(line) for line in evidence), hint=hint))


@dataclass(frozen=True, slots=True)
class _Request:
    store: Downloads
    session: Session
    reporter: Reporter
    base: Path | None
    name: str
    sha256: str | None
    size: int | None

    def get(self, address: Address) -> Fetched:
        if isinstance(address, LocalFile):
            return self._local(address.under(self.base), str(address))
        if self.sha256 is not None and is_pinned(address):
            return self.here(address) or self.download(address)
        pin = pin_of(address, self.session)
        if pin.sha256 is not None:
            self._compare(pin.sha256)
        address = parse_address(pin.url)
        request = replace(self, sha256=self.sha256 or pin.sha256, size=self.size or pin.size)
        return request.here(address) or request.download(address)

    def from_archive(self, template: str) -> Fetched:
        """The file by its digest, at an archive of the user's, which is nobody else's business."""
        if "{sha256}" not in template:
            raise Failure("`{sha256}` is not in it", hint="`CKPT_ARCHIVE` is like `https://host/{sha256}`")
        problem = check_address(text := template.replace("{sha256}", str(self.sha256)))
        if problem is not None:
            raise Failure(problem.fact, hint=problem.hint)
        return replace(self.get(parse_address(text)), address=None)

    def _local(self, path: Path, address: str) -> Fetched:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise Failure("it is not a regular file")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no file can have this name"
            raise Failure(f"there is no such file ({why})") from None
        return self._verified(path, address)

    def _verified(self, path: Path, address: str | None) -> Fetched:
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            raise Failure(f"the file has {size:,} bytes, {self.size:,} are pinned", mismatch=True)
        sha256 = self.store.sha256(path, self.reporter)
        self._compare(sha256)
        return Fetched(path, sha256, size, address, safe_name(path.name))

    def _compare(self, sha256: str) -> None:
        if self.sha256 is not None and sha256 != self.sha256:
            digests = (f"pinned SHA-256: {self.sha256}", f"received:       {sha256}")
            raise Failure("the file is another one", mismatch=True, evidence=digests)

    def here(self, address: Address | None) -> Fetched | None:
        """What needs no download, verified; a damaged file is passed over, with a warning."""
        kept = self.store.download_path(self.sha256) if self.sha256 is not None else None
        for path in (kept, cached(self.session, address, self.sha256)):
            if path is None or not path.is_file():
                continue
            try:
                return self._verified(path, str(address) if address is not None else None)
            except Failure as failure:
                problem = Problem(f"`{path}` is not used: {failure.fact}", evidence=failure.evidence)
                self.reporter.warn(problem)
        return None

    def download(self, address: Address) -> Fetched:
        remote = RemoteFile(download_url(address, self.session), self.size, self.name)
        try:
            partial = self.store.partial_path(self.sha256 or str(address))
            with sole(partial, self.session, self.reporter, self.name) as turn:
                # Another process may have finished while this one waited for its turn.
                done = replace(self, sha256=self.sha256 or turn.sha256)
                if done.sha256 is not None and (found := done.here(address)) is not None:
                    return found
                received = self._received(remote, turn.partial)
                settle(turn.partial)
                path = self.store.keep_download(turn.partial, received.sha256)
                turn.tell(received.sha256)
        except OSError as error:
            raise Failure(f"the download cannot be kept: {error.strerror}") from None
        return Fetched(path, received.sha256, received.size, str(address), received.name)

    def _received(self, remote: RemoteFile, partial: Path) -> Received:
        while True:
            received = download(self.session, remote, partial, self.reporter)
            try:
                self._compare(received.sha256)
                return received
            except Failure:
                # Not kept, under any name: it would only be taken for the right one some day.
                discard(partial)
                if not received.resumed:
                    raise
