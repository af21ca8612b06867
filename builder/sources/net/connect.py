"""Connections, opened to permitted addresses only."""

from __future__ import annotations

import base64
import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote, urlsplit

from builder.sources.net.failure import Failure
from builder.sources.net.wire import Answer, Limits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_MOST_TRIED = 8  # addresses of one name: each may take its time to refuse
_UNICAST = ipaddress.ip_network("2000::/3")


def private_kind(address: str) -> str | None:
    """What makes an IP address no public one, such as `a loopback address`; None for a public one.

    An address that wraps an IPv4 address (mapped, 6to4, NAT64) is judged by that one as well.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _wrapped(ip)
        if inner is not None:
            return private_kind(str(inner))
        if ip not in _UNICAST and not (ip.is_loopback or ip.is_link_local or ip.is_multicast):
            return "an address that is not public"
    if ip.is_unspecified:
        return "an unspecified address"
    if ip.is_loopback:
        return "a loopback address"
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast:
        return "a multicast address"
    return None if ip.is_global and not ip.is_reserved else "a private address"


def _wrapped(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None


def loopback_name(host: str) -> bool:
    """Whether a host's name says that it is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies that the environment asks for, by scheme, and the hosts that go without."""

    by_scheme: Mapping[str, str]
    bypass: str = ""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Proxies:
        """From `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in upper or lower case."""
        low = {k.lower(): v for k, v in environ.items() if k.lower().endswith("_proxy") and v}
        https = low.get("https_proxy") or low.get("all_proxy")
        return cls({"https": https} if https else {}, low.get("no_proxy", ""))

    def proxy_for(self, scheme: str, host: str) -> str | None:
        """The proxy's URL for a host, or None for a direct connection."""
        for name in (n.strip().lower().lstrip(".*") for n in self.bypass.split(",") if n.strip()):
            if not name or host == name or host.endswith("." + name):  # a lone `*` leaves nothing
                return None
        return self.by_scheme.get(scheme)


@dataclass(frozen=True, slots=True)
class Dialer:
    """Opens sockets: resolves a name, refuses what is not permitted, connects to what was checked."""

    allow_private: bool
    limits: Limits
    proxies: Proxies

    def dial(self, scheme: str, host: str, port: int) -> socket.socket:
        """A connected socket to the host, or through the proxy; no TLS yet. Raises Failure.

        Through a proxy the target is resolved by the proxy: only a target that is named by its IP
        address can be refused here.
        """
        proxy = self.proxies.proxy_for(scheme, host)
        if proxy is None:
            return self._connect(
                host, port, public=scheme == "https" and not self.allow_private, scheme=scheme
            )
        if not self.allow_private:
            _refuse_literal(host)
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if target.scheme != "http" or not target.hostname:
            raise Failure(
                f"the proxy `{target.scheme}://{target.hostname or ''}` is of a kind that is not supported",
                hint="`HTTPS_PROXY` takes an `http://` proxy",
            )
        connection = self._connect(target.hostname, target.port or 8080, public=False, scheme="https")
        try:
            _tunnel(connection, self.limits, host, port, target.username, target.password)
        except BaseException:
            connection.close()
            raise
        return connection

    def permitted(self, scheme: str, host: str, port: int) -> list[str]:
        """The IP addresses of a host, all of which may be connected to; none where a proxy resolves it.

        For programs that connect by themselves. Raises Failure.
        """
        if scheme == "http" and not self.allow_private:
            raise Failure(f"`{host}` is asked for without encryption", hint="use its `https://` address")
        if self.proxies.proxy_for(scheme, host) is not None:
            if not self.allow_private:
                _refuse_literal(host)
            return []
        found = [str(where[0]) for *_, where in _resolved(host, port, self.limits.connect)]
        for ip in found:
            if (refusal := self._refusal(ip, host, not self.allow_private, scheme)) is not None:
                raise refusal
        return list(dict.fromkeys(found))

    def _connect(self, host: str, port: int, *, public: bool, scheme: str) -> socket.socket:
        found = _resolved(host, port, self.limits.connect)
        refused: Failure | None = None
        failed: OSError | None = None
        for family, kind, protocol, _, where in found[:_MOST_TRIED]:
            refusal = self._refusal(str(where[0]), host, public, scheme)
            if refusal is not None:
                refused = refusal
                continue
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self.limits.connect)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.connect(where)
                return connection
            except OSError as error:
                failed = error
                connection.close()
            except BaseException:
                connection.close()
                raise
        if refused is not None and failed is None:
            raise refused
        why = (
            "timed out"
            if isinstance(failed, TimeoutError)
            else getattr(failed, "strerror", None) or "no address"
        )
        raise Failure(f"cannot connect to `{host}`: {why}", retry=True)

    def _refusal(self, ip: str, host: str, public: bool, scheme: str) -> Failure | None:
        kind = private_kind(ip)
        if public and kind is not None:
            return Failure(
                f"`{host}` leads to {ip}, {kind}",
                hint="set `CKPT_ALLOW_PRIVATE=1` if hosts of your own network are meant",
            )
        if scheme == "http" and kind is None:
            return Failure(f"`{host}` is asked for without encryption", hint="use its `https://` address")
        return None


def _resolved(host: str, port: int, seconds: float) -> list[Any]:
    """The addresses of a host. Raises Failure, at the latest when so many seconds are over.

    The system's resolver knows no deadline and cannot be stopped: a thread waits for it, and is left behind.
    """
    answers: SimpleQueue[list[Any] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except Empty:
        raise Failure(f"the name of the host `{host}` was not resolved within {seconds:g} seconds") from None
    if isinstance(found, (OSError, UnicodeError)):
        raise Failure(f"the host `{host}` is not known", retry=True)
    if isinstance(found, Exception):
        raise found
    return found


def _refuse_literal(host: str) -> None:
    try:
        kind = "a loopback address" if loopback_name(host) else private_kind(host)
    except ValueError:
        return
    if kind is not None:
        raise Failure(f"`{host}` is {kind}", hint="set `CKPT_ALLOW_PRIVATE=1` if it is meant")


def _tunnel(
    connection: socket.socket,
    limits: Limits,
    host: str,
    port: int,
    user: str | None,
    password: str | None,
) -> None:
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if user is not None:
        secret = base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode("ascii")
        lines.append(f"Proxy-Authorization: Basic {secret}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    answer = Answer(limits, "proxy", connection, method="CONNECT")
    try:
        answer.begin()
        if answer.status != 200:
            raise Failure(
                f"the proxy refuses to connect to `{host}` ({answer.status})", retry=answer.status >= 500
            )
    finally:
        answer.close()


def tls_context() -> ssl.SSLContext:
    """Verification against the system's certificates, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
