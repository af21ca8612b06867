"""What a host sends, held to a pace: headers in time, few informational answers, bodies not too slow."""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from builder.sources.net.failure import Failure

MAX_HEAD = 256 << 10  # bytes of status, headers and informational answers
MAX_INFORMATIONAL = 8  # answers such as `100 Continue` before the proper one
_BESIDE = 256 << 10  # bytes that one read may bring beside the body's own: sizes of chunks, trailers
_INFORMATIONAL = re.compile(rb"HTTP/\S+\s+1(?!01)\d\d\b")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, how often and how much; times in seconds, sizes in bytes.

    `headers` is for status and headers in whole, `read` for any next byte. A connection that brings less
    than `slowest` bytes a second over `patience`, of the time that it is waited for, is dropped and made
    anew. `attempts` are those in a row that bring less than `slowest` bytes. A wait that a host asks for
    and that is longer than `longest_wait` is a failure. `max_bytes` holds where no size is pinned.
    """

    connect: float = 15.0
    headers: float = 30.0
    read: float = 30.0
    slowest: int = 1024
    patience: float = 60.0
    attempts: int = 5
    backoff: float = 0.5
    longest_wait: float = 120.0
    max_bytes: int = 64 << 30
    connections: int = 4
    segment: int = 16 << 20


class Answer(http.client.HTTPResponse):
    """A response whose status and headers, and then its body, come within limits.

    Reading raises Failure where they do not, besides what a response raises.
    """

    def __init__(self, limits: Limits, host: str, sock: socket.socket, method: str | None = None) -> None:
        self.wire = Wire(sock, limits, host)
        super().__init__(self.wire, method=method)  # type: ignore[arg-type] # it wants a `makefile` only

    def begin(self) -> None:
        super().begin()
        self.wire.begin_body()


class Wire(io.RawIOBase):
    """A socket, read from; who reads a body says what is to come, and what of it was the body's own."""

    def __init__(self, sock: socket.socket, limits: Limits, host: str) -> None:
        self._socket, self._limits, self._host = sock, limits, host
        self._raw = sock.makefile("rb", buffering=0)
        self._until: float | None = time.monotonic() + limits.headers
        self._room = MAX_HEAD
        self._waited, self._brought = 0.0, 0

    def makefile(self, mode: str) -> _Stream:
        """What a response reads from."""
        assert mode == "rb"
        return _Stream(self, self._host)

    def begin_body(self) -> None:
        """The headers are there: from now on the pace counts."""
        self._until = None
        self._socket.settimeout(self._limits.read)

    def expect(self, most: int) -> None:
        """At most so many bytes of a body are asked for next."""
        self._room = most + _BESIDE

    def brought(self, count: int) -> None:
        """So many bytes of the body have come."""
        self._brought += count

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int | None:
        if self._room <= 0:
            raise Failure(f"`{self._host}` sends too much beside the file itself")
        began = time.monotonic()
        late = self._set_deadline(began)
        try:
            count = self._raw.readinto(memoryview(out)[: self._room])
        except TimeoutError:
            if late is not None:
                raise late from None
            raise
        self._room -= count or 0
        self._waited += time.monotonic() - began
        return count

    def _set_deadline(self, now: float) -> Failure | None:
        """What it means when the next bytes are late, if anything of its own; raises it when they are."""
        limits = self._limits
        if self._until is not None:
            left = self._until - now
            late = Failure(f"`{self._host}` takes more than {limits.headers:g} seconds to answer", retry=True)
            if left <= 0:
                raise late
            self._socket.settimeout(min(left, limits.read))
            return late if left < limits.read else None
        # Time that the reader takes for itself is not the host's: a slow disk blames no host.
        if self._waited >= limits.patience:
            if self._brought < limits.slowest * self._waited:
                raise Failure(f"`{self._host}` sends almost nothing", retry=True)
            self._waited, self._brought = 0.0, 0
        return None

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Stream(io.BufferedReader):
    """The bytes of one response; informational answers before it are passed over while they are few."""

    def __init__(self, wire: Wire, host: str) -> None:
        super().__init__(wire)
        self._host = host
        self._begun = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        passed = 0
        while not self._begun and _INFORMATIONAL.match(line):
            passed += 1
            if passed > MAX_INFORMATIONAL:
                raise Failure(f"`{self._host}` sends informational answers only", retry=True)
            while super().readline(size).strip():
                pass
            line = super().readline(size)
        self._begun = True
        return line
