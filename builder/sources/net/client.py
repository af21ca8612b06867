"""HTTP as downloads need it: checked redirects, tokens for their own host only, no surprises."""

from __future__ import annotations

import contextlib
import copy
import http.client
import os
import random
import re
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urljoin

from builder import __version__
from builder.base.addresses import CIVITAI_HOSTS, DEFAULT_PORTS, split
from builder.base.progress import SILENT, Reporter
from builder.sources.net.connect import Dialer, Proxies, loopback_name, tls_context
from builder.sources.net.failure import Failure
from builder.sources.net.text import host_words, page_kind, scrub, shown
from builder.sources.net.wire import Answer, Limits

T = TypeVar("T")


class Body(Protocol):
    """What a request sends."""

    def read(self, size: int = ..., /) -> bytes:
        """The next bytes, at most `size`; empty at the end."""


REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 10
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
EXPLANATION = 64 << 10  # bytes of a failure's body that are read
PIECE = 1 << 20  # bytes asked of a socket at a time
_WORTH_A_NOTE = 2.0  # seconds of waiting


class Origin(NamedTuple):
    """Scheme, host and port: what a token belongs to and a connection leads to."""

    scheme: str
    host: str
    port: int


class Host(NamedTuple):
    """A host that is known by name: where it is, and the variables that may hold its token."""

    name: str
    endpoint: str
    variables: tuple[str, ...]


def origin_of(url: str) -> Origin:
    """The origin of a URL in canonical form."""
    parts = split(url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme])


class Session:
    """Everything that requests share: settings and tokens of the environment, and open connections.

    Reads `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `CIVITAI_ENDPOINT`, `CIVITAI_TOKEN` or
    `CIVITAI_API_TOKEN`, `CKPT_ARCHIVE`, `CKPT_ALLOW_PRIVATE`, and the proxy variables. May be used from
    several threads.
    """

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        offline: bool = False,
        limits: Limits | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.environ = dict(os.environ if environ is None else environ)
        self.offline = offline
        self.limits = limits or Limits()
        self.reporter = reporter
        self.archives = self.environ.get("CKPT_ARCHIVE", "").split()
        self.allow_private = self.environ.get("CKPT_ALLOW_PRIVATE") == "1"
        self.hugging_face = Host(
            "Hugging Face", self._endpoint("HF_ENDPOINT", "https://huggingface.co"), ("HF_TOKEN",)
        )
        self.civitai = Host(
            "Civitai",
            self.civitai_endpoint(),
            ("CIVITAI_TOKEN", "CIVITAI_API_TOKEN"),
        )
        self._hosts: dict[Origin, Host] = {
            Origin("https", "huggingface.co", 443): self.hugging_face,
            **{Origin("https", name, 443): self.civitai for name in CIVITAI_HOSTS},
        }
        for host in (self.hugging_face, self.civitai):
            try:
                self._hosts[origin_of(host.endpoint)] = host
            except ValueError:
                continue  # said by name when it is asked for
        self._dialer = Dialer(self.allow_private, self.limits, Proxies.of(self.environ))
        self._pool = _Pool()
        self._begin()

    def _begin(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def anew(self) -> Session:
        """The same session for another piece of work, such as the next build in one process.

        Settings, tokens and idle connections are shared; `stop` is not: each ends its own requests, and
        an earlier one ends none of this.
        """
        other = copy.copy(self)
        other._begin()
        return other

    def _endpoint(self, variable: str, default: str) -> str:
        return (self.environ.get(variable) or default).rstrip("/")

    def civitai_endpoint(self, host: str = CIVITAI_HOSTS[0]) -> str:
        """Where a host of Civitai's is asked: there itself, or at the mirror that the environment names."""
        return self._endpoint("CIVITAI_ENDPOINT", f"https://{host}")

    def host_of(self, url: str) -> Host | None:
        """The known host that a URL belongs to."""
        return self._hosts.get(origin_of(url))

    def token(self, host: Host) -> str | None:
        """The token that the environment holds for a host. Raises Failure for one that cannot be one."""
        for variable in host.variables:
            token = self.environ.get(variable, "").strip()
            if token:
                if not token.isascii() or not token.isprintable() or " " in token:
                    raise Failure(f"`{variable}` holds characters that no token has")
                return token
        return None

    def scrub(self, text: str) -> str:
        """`text` without any of the tokens, and without the queries of URLs."""
        variables = [*self.hugging_face.variables, *self.civitai.variables]
        return scrub(text, [t for v in variables if (t := self.environ.get(v, "").strip())])

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        across: bool = True,
        body: Callable[[], Body] | None = None,
    ) -> Response:
        """The response to a request, redirects followed; with any status. Raises Failure.

        Each hop is checked: never from https to http, never to an address that is not public unless
        allowed. The token of the first host goes to that host and, once a redirect has led elsewhere,
        to none. With `across` false, a redirect to another origin is returned, not followed. `body` gives
        what is sent, from its start each time; its size is among `headers`.
        """
        if self.offline:
            raise Failure("not asked: the network is off", hint="build without `--offline`")
        self.go_on()
        try:
            url = split(url).geturl()
        except ValueError as error:
            raise Failure(str(error)) from None
        first = origin_of(url)
        host = self._hosts.get(first)
        token = self.token(host) if host is not None and self._confidential(first) else None
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            here = origin_of(url)
            if here != first:
                token = None
            if here.scheme == "http" and not self.allow_private:
                raise Failure(f"`{shown(url)}` is without encryption", hint="use its `https://` address")
            sent = {
                "User-Agent": f"ckpt-build/{__version__}",
                "Accept-Encoding": "identity",
                **(headers or {}),
            }
            if token is not None:
                sent["Authorization"] = f"Bearer {token}"
            response = self._exchange(method, url, here, sent, body)
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or location is None:
                return response
            try:
                after = self._redirected(url, location)
                if not across and origin_of(after) != here:
                    return response
            except BaseException:
                response.close()
                raise
            response.explanation()
            response.close()
            url = after
            if url in seen:
                raise Failure(f"`{shown(url)}` redirects to itself")
            seen.add(url)
        raise Failure(f"`{shown(url)}` is the end of more than {MAX_REDIRECTS} redirects")

    def permitted(self, url: str) -> list[str]:
        """The IP addresses that another program may connect to for a URL; empty: a proxy finds them.

        Raises Failure where it may not be asked for, and when the network is off.
        """
        if self.offline:
            raise Failure("not asked: the network is off", hint="build without `--offline`")
        return self._dialer.permitted(*origin_of(url))

    def _confidential(self, origin: Origin) -> bool:
        return origin.scheme == "https" or (self.allow_private and loopback_name(origin.host))

    def _redirected(self, url: str, location: str) -> str:
        try:
            # Headers are read as Latin-1; what hosts write there is UTF-8 when it is not ASCII.
            after = split(
                urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
            ).geturl()
        except ValueError as error:
            raise Failure(f"`{shown(url)}` redirects to what is no web address: {error}") from None
        if url.startswith("https:") and not after.startswith("https:"):
            raise Failure(f"`{shown(url)}` redirects to `{shown(after)}`, without encryption")
        return after

    def _exchange(
        self,
        method: str,
        url: str,
        origin: Origin,
        headers: Mapping[str, str],
        body: Callable[[], Body] | None,
    ) -> Response:
        target = url.split("/", 3)[3] if url.count("/") > 2 else ""
        for fresh in (False, True):
            connection = (None if fresh else self._pool.take(origin)) or self._connection(origin)
            reused = connection.sock is not None
            try:
                if not reused:
                    connection.connect()
                sock = connection.sock  # of which the connection lets go when the answer is its last
                self._watch(sock)
                sent = body() if body is not None else None
                connection.request(method, "/" + target, sent, dict(headers))
                answer = connection.getresponse()
                assert isinstance(answer, Answer)
                return Response(answer, connection, sock, self, url)
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                connection.close()
                if not reused:  # a kept connection may have been closed meanwhile: that is no failure
                    raise _broken(origin, error) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise _broken(origin, error) from None
            except BaseException:
                connection.close()
                raise
        raise AssertionError

    def _connection(self, origin: Origin) -> _Connection:
        tls = self._pool.tls() if origin.scheme == "https" else None
        return _Connection(origin, self._dialer, tls, self.limits)

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose response has been read to its end."""
        with self._lock:
            self._sockets.discard(connection.sock)  # a later stop is none of its business
        if self._stopped.is_set():
            connection.close()
        else:
            self._pool.keep(connection)

    def _watch(self, opened: socket.socket) -> None:
        """Take note of a connection, which `stop` is to break off."""
        with self._lock:
            self._sockets.add(opened)
        if self._stopped.is_set():
            _break_off(opened)

    def stop(self) -> None:
        """End all requests soon, from any thread: they fail, and none is made again.

        What comes after takes a session of its own, from `anew`.
        """
        self._stopped.set()
        with self._lock:
            opened = list(self._sockets)
        for one in opened:
            _break_off(one)

    def go_on(self) -> None:
        """Raise Failure once the session is stopped."""
        if self._stopped.is_set():
            raise Failure("stopped")

    def wait(self, seconds: float) -> None:
        """Sleep. Raises Failure once the session is stopped."""
        self._stopped.wait(seconds)
        self.go_on()

    def close(self) -> None:
        """Close the idle connections, also those of sessions that were made `anew` of this one."""
        self._pool.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def retrying(self, ask: Callable[[], T], wait: Callable[[float], object] | None = None) -> T:
        """The result of `ask`, asked again after a pause while it fails in a way that may pass."""
        for attempt in range(1, self.limits.attempts):
            try:
                return ask()
            except Failure as failure:
                if not failure.retry:
                    raise
                (wait or self.wait)(self.pause(attempt, failure))
        return ask()

    def pause(self, attempt: int, failure: Failure) -> float:
        """Seconds to wait after a number of failures in a row. Raises Failure for a wait that is too long."""
        if failure.wait is not None and failure.wait > self.limits.longest_wait:
            fact = f"{failure.fact}, and asks to wait {failure.wait:,.0f} seconds"
            raise Failure(fact, hint="try again later", wait=failure.wait)
        doubled = min(self.limits.backoff * 2.0 ** (attempt - 1), self.limits.longest_wait)
        # Jitter keeps clients that failed together from coming back together.
        seconds = max(failure.wait or 0.0, doubled * random.uniform(0.5, 1.0))
        if seconds >= _WORTH_A_NOTE:
            self.reporter.note(self.scrub(f"{failure.fact}: trying again in {seconds:.0f} seconds"))
        return seconds


class _Pool:
    """What sessions that were made of each other share: idle connections, and what TLS trusts."""

    def __init__(self) -> None:
        self.idle: dict[Origin, list[_Connection]] = {}
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def take(self, origin: Origin) -> _Connection | None:
        """An idle connection to an origin, which is nobody else's from now on."""
        with self._lock:
            kept = self.idle.get(origin)
            return kept.pop() if kept else None

    def keep(self, connection: _Connection) -> None:
        """Have a connection ready for others."""
        with self._lock:
            self.idle.setdefault(connection.origin, []).append(connection)

    def tls(self) -> ssl.SSLContext:
        """Made once: reading the system's certificates takes time."""
        with self._lock:
            self._tls = self._tls or tls_context()
            return self._tls

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self.idle = self.idle, {}
        for connection in (c for kept in idle.values() for c in kept):
            connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection that is opened by a Dialer, over TLS when its origin says so."""

    def __init__(self, origin: Origin, dialer: Dialer, tls: ssl.SSLContext | None, limits: Limits) -> None:
        super().__init__(origin.host, origin.port, timeout=limits.read)
        # A port that goes without saying is not said: addresses may be signed with the host's name.
        self.default_port = DEFAULT_PORTS[origin.scheme]
        self.response_class = partial(Answer, limits, origin.host)  # type: ignore[assignment]
        self.origin = origin
        self._dialer = dialer
        self._tls = tls

    def connect(self) -> None:
        plain = self._dialer.dial(*self.origin)
        try:
            if self.origin.scheme == "https":
                assert self._tls is not None
                self.sock: socket.socket = self._tls.wrap_socket(plain, server_hostname=self.origin.host)
            else:
                self.sock = plain
            self.sock.settimeout(self.timeout)
        except BaseException:
            plain.close()
            raise


class Response:
    """Status, headers and body of an answer; `url` is where it came from in the end."""

    def __init__(
        self,
        raw: Answer,
        connection: _Connection,
        sock: socket.socket,
        session: Session,
        url: str,
    ) -> None:
        self._raw = raw
        self._connection = connection
        self._socket = sock
        self._session = session
        self._ended = False
        self._closed = False
        self.url = url
        self.status = raw.status
        self.headers = raw.headers
        self.length: int | None = raw.length
        self.left: int | None = raw.length
        # A body that ends when the connection does cannot be told from one that was cut off.
        self.delimited = raw.length is not None or raw.chunked

    def read(self, most: int = PIECE) -> bytes:
        """The next bytes as they come, at most `most`; empty at the body's end. Raises Failure."""
        if self.left == 0 or self._ended:
            self._ended = True
            return b""
        self._raw.wire.expect(most)
        try:
            data = self._raw.read1(most)
        except (OSError, http.client.HTTPException) as error:
            raise _broken(origin_of(self.url), error) from None
        except (AttributeError, ValueError):  # the body was closed by another thread that gives up
            raise Failure("given up") from None
        if not data:
            if self.left:
                raise Failure(f"the body ended {self.left:,} bytes short of its {self.length:,}", retry=True)
            self._ended = True
        elif self.left is not None:
            self.left -= len(data)
        self._raw.wire.brought(len(data))
        return data

    def read_all(self, most: int) -> bytes:
        """The whole body. Raises Failure when it is longer than `most` bytes."""
        body = bytearray()
        while piece := self.read():
            body += piece
            if len(body) > most:
                raise Failure(f"the answer of `{origin_of(self.url).host}` is longer than {most:,} bytes")
        return bytes(body)

    def explanation(self) -> bytes:
        """As much of a failure's body as is worth reading; never fails."""
        body = bytearray()
        with contextlib.suppress(Failure):
            while len(body) < EXPLANATION and (piece := self.read(EXPLANATION - len(body))):
                body += piece
        return bytes(body)

    def failure(self, body: bytes | None = None) -> Failure:
        """What a status other than success says, in the host's own words; ends the response."""
        body = self.explanation() if body is None else body
        self.close()
        host = origin_of(self.url).host
        known = self._session.host_of(self.url)
        fact = f"`{host}` answers {self.status}, {_MEANING.get(self.status, 'which is no success')}"
        words = self._session.scrub(host_words(self.headers, body))
        return Failure(
            fact + (f": “{words}”" if words else ""),
            hint=_login_hint(self._session, known) if self.status in {401, 403} else None,
            retry=self.status in TRANSIENT,
            wait=_retry_after(self.headers.get("Retry-After")),
        )

    def refuse_pages(self, start: bytes) -> None:
        """Raise Failure when the body, which begins with `start`, is a page or a message and no file."""
        kind = page_kind(start, self.headers.get("Content-Type") or "")
        if kind is not None:
            words = self._session.scrub(host_words(self.headers, start + self.explanation()))
            self.close()
            known = self._session.host_of(self.url)
            anonymous = known is not None and self._session.token(known) is None
            raise Failure(
                f"`{origin_of(self.url).host}` sends {kind} instead of the file"
                + (f": “{words}”" if words else ""),
                hint=_login_hint(self._session, known) if anonymous else None,
            )

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else close it."""
        if self._closed:
            return
        self._closed = True
        reusable = (self._ended or self.left == 0) and not self._raw.will_close
        self._raw.close()
        if reusable:
            self._session.keep(self._connection)
        else:
            self._connection.close()

    def abort(self) -> None:
        """Break the connection off, from any thread."""
        _break_off(self._socket)


def _break_off(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not the method of a TLS socket, which would let the rest be read undeciphered.
        socket.socket.shutdown(opened, socket.SHUT_RDWR)


_MEANING = {
    400: "bad request",
    401: "login needed",
    403: "no access",
    404: "not there",
    408: "timed out",
    410: "gone: removed or archived",
    416: "no such range",
    429: "too many requests",
    451: "withheld for legal reasons",
    500: "an error of its own",
    502: "an error of its own",
    503: "not available now",
    504: "timed out",
}


def _login_hint(session: Session, host: Host | None) -> str | None:
    if host is None:
        return None
    variable = host.variables[0]
    if session.token(host) is None:
        terms = "accept the model's terms on its page, then " if host is session.hugging_face else ""
        return f"{terms}set `{variable}` to a token of your {host.name} account"
    return f"the token in `{variable}` does not open it: see the model's page for what it asks for"


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DATE = re.compile(r"[A-Za-z]+, ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT")


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a number or of a date as HTTP writes it; None for anything else."""
    said = (value or "").strip()
    if re.fullmatch(r"[0-9]+", said):
        return float(said[:9])
    found = _DATE.fullmatch(said)
    if found is None or found[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(found[i]) for i in (1, 3, 4, 5, 6))
    try:
        month = _MONTHS.index(found[2]) + 1
        when = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())


def _broken(origin: Origin, error: Exception) -> Failure:
    host = origin.host
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure(
            f"the certificate of `{host}` is not trusted: {error.verify_message}",
            hint="`SSL_CERT_FILE` names the certificates to trust, where the system's are not found",
        )
    if isinstance(error, TimeoutError):
        return Failure(f"`{host}` stopped answering", retry=True)
    if isinstance(error, ssl.SSLError):
        return Failure(
            f"no secure connection to `{host}`: {(error.reason or 'TLS failed').lower().replace('_', ' ')}",
            retry=True,
        )
    if isinstance(error, (ConnectionError, http.client.IncompleteRead, http.client.RemoteDisconnected)):
        return Failure(f"`{host}` dropped the connection", retry=True)
    if isinstance(error, http.client.HTTPException):
        return Failure(f"`{host}` does not speak HTTP as it should ({type(error).__name__})", retry=True)
    return Failure(f"the connection to `{host}` failed: {error}", retry=True)
