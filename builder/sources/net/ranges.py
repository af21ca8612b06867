"""Files on hosts, read in parts that must all be of the same version."""

from __future__ import annotations

import re
from typing import NamedTuple

from builder.sources.net.client import Response, Session
from builder.sources.net.failure import Failure, StartOver

# What hosts answer when the address that a redirect led to is no longer good.
_EXPIRED = frozenset({400, 401, 403, 404, 410})


class Range(NamedTuple):
    """A Content-Range: the first and last byte, and the whole size, None where it is not told."""

    first: int
    last: int
    total: int | None


def content_range(response: Response) -> Range | None:
    """The range that a partial answer holds, or None when it does not say so properly."""
    said = response.headers.get("Content-Range") or ""
    found = re.fullmatch(r"\s*bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*", said, re.ASCII | re.IGNORECASE)
    if found is None:
        return None
    total = None if found[3] == "*" else int(found[3])
    span = Range(int(found[1]), int(found[2]), total)
    sound = span.first <= span.last and (total is None or span.last < total)
    return span if sound else None


def strong_etag(response: Response) -> str | None:
    """The validator by which parts of a file may be put together, or None."""
    tag = response.headers.get("ETag") or ""
    return tag if re.fullmatch(r'"[\x21\x23-\x7e]*"', tag) else None


def refuse_encoded(response: Response) -> None:
    """Raise Failure for a body that is not the file's own bytes."""
    coding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    if coding != "identity":
        response.close()
        raise Failure(f"the host sends the file packed (`{coding[:40]}`), although asked for it as it is")


class RangedFile:
    """A file that a host serves in parts; every part must be of the version that was seen first.

    `etag` is a strong validator, sent along so that the host answers 200 when the file has changed, or
    None where only the time of the last change (`modified`) and the size can be compared.
    """

    def __init__(
        self, session: Session, url: str, size: int, etag: str | None, modified: str | None = None
    ) -> None:
        self.session, self.url, self.size = session, url, size
        self.etag, self.modified = etag, modified
        self.near = url  # where redirects led to: asked directly from the second part on

    def part(self, start: int, end: int) -> Response:
        """The response whose body begins with the bytes from `start` to before `end`.

        Raises StartOver when the host no longer serves the same file in parts, and Failure.
        """
        asked = {"Range": f"bytes={start}-{end - 1}"} | ({"If-Range": self.etag} if self.etag else {})
        near = self.near
        response = self.session.request("GET", near, asked)
        if response.status in _EXPIRED and near != self.url:
            response.close()
            self.near = self.url
            response = self.session.request("GET", self.url, asked)
        if response.status == 200:
            response.close()
            raise StartOver
        if response.status != 206:
            raise response.failure()
        try:
            refuse_encoded(response)
            self._check(response, start)
        except BaseException:
            response.close()
            raise
        self.near = response.url
        return response

    def _check(self, response: Response, start: int) -> None:
        span = content_range(response)
        if span is None or span.first != start or span.total not in {None, self.size}:
            raise StartOver
        if self.etag is not None and response.headers.get("ETag") not in {None, self.etag}:
            raise StartOver
        if self.etag is None and response.headers.get("Last-Modified") != self.modified:
            raise StartOver
