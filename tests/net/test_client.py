"""Requests: where they may go, what they carry, and what becomes of redirects and failures."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder.base.errors import FetchError
from builder.base.progress import Reporter
from builder.sources.net.client import Session
from builder.sources.net.connect import Proxies, private_kind
from builder.sources.net.failure import Failure
from builder.sources.net.ranges import refuse_encoded
from builder.sources.net.remote import open_remote
from builder.sources.net.wire import Limits
from tests.help.servers import (
    File,
    Handler,
    Route,
    Server,
    answer,
    certificate,
    dribble,
    drips,
    endless,
    floods,
    garbage,
    in_turn,
    redirects,
    says,
    sends,
    silent,
    tls_server_context,
)

QUICK = Limits(connect=5, read=5, patience=0.3, attempts=3, backoff=0.01, longest_wait=1.0)
OPEN = {"CKPT_ALLOW_PRIVATE": "1"}
NOT_PUBLIC = """
    127.0.0.1 127.8.9.1 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1
    169.254.169.254 100.64.0.1 100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1
    203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
    ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 fe80::1 fe80::1%eth0 fec0::1 fc00::1
    fd12:3456::1 ff02::1 2001:db8::1 2001::1 2002:7f00:1::1 2002:a00:1::1 64:ff9b::7f00:1
    64:ff9b::a00:1 64:ff9b:1::1 100::1 4000::1
"""
PUBLIC = "1.1.1.1 8.8.8.8 172.32.0.1 100.128.0.1 192.169.0.1 2606:4700::1 ::ffff:8.8.8.8 64:ff9b::808:808"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def get(
    url: str, environ: dict[str, str] = OPEN, limits: Limits = QUICK, **options: bool
) -> tuple[int, bytes]:
    with Session(environ, limits=limits, **options) as session:
        response = session.request("GET", url)
        try:
            return response.status, response.read_all(1 << 20)
        finally:
            response.close()


def refusal(url: str, environ: dict[str, str] = OPEN, limits: Limits = QUICK, **options: bool) -> Failure:
    with pytest.raises(Failure) as raised:
        get(url, environ, limits, **options)
    return raised.value


@pytest.mark.parametrize(
    "address",
    NOT_PUBLIC.split(),
)
def test_addresses_that_are_not_public_are_known(address: str) -> None:
    assert private_kind(address) is not None


@pytest.mark.parametrize(
    "address",
    PUBLIC.split(),
)
def test_public_addresses_are_public(address: str) -> None:
    assert private_kind(address) is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "127.1", "[::ffff:127.0.0.1]"]
)
def test_no_connection_is_made_to_a_private_address(server: Server, host: str) -> None:
    failure = refusal(f"https://{host}:{server.port}/", {})
    assert "leads to" in failure.fact
    assert failure.hint is not None and "CKPT_ALLOW_PRIVATE=1" in failure.hint
    assert not failure.retry
    assert server.seen == []


def test_without_encryption_only_the_own_network_is_reached(server: Server) -> None:
    server.routes["/m"] = says(200, b"model")
    assert get(server.url("/m")) == (200, b"model")
    assert "without encryption" in refusal(server.url("/m"), {}).fact
    assert "without encryption" in refusal("http://1.1.1.1:9/m").fact


def test_a_name_that_is_never_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver knows no deadline; nobody waits for it, at the end of the process either."""
    hung = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hung.wait(60))
    before = time.monotonic()
    failure = refusal("https://example.com/x", limits=replace(QUICK, connect=0.2))
    assert "`example.com` was not resolved within 0.2 seconds" in failure.fact
    assert time.monotonic() - before < 30, "it does not wait for the name"
    assert all(t.daemon for t in threading.enumerate() if t.name == "resolve")
    hung.set()


def test_offline_opens_no_socket(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "getaddrinfo", opened)
    monkeypatch.setattr(socket.socket, "connect", opened)
    assert "the network is off" in refusal(server.url("/m"), OPEN, offline=True).fact


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, status: int) -> None:
    server.routes["/a"] = redirects("/b?x=1", status)
    server.routes["/b"] = says(200, b"there")
    assert get(server.url("/a")) == (200, b"there")
    assert len({seen.port for seen in server.seen}) == 1, "the connection is kept"


@pytest.mark.parametrize(
    ("location", "fact"),
    [
        ("file:///etc/passwd", "no web address"),
        ("ftp://example.org/m", "no web address"),
        ("//user:pw@example.org/m", "user name or password"),
        ("https://", "no host"),
        ("/a", "redirects to itself"),
    ],
)
def test_redirects_to_elsewhere_are_refused(server: Server, location: str, fact: str) -> None:
    server.routes["/a"] = redirects(location)
    assert fact in refusal(server.url("/a")).fact


def test_redirects_do_not_go_on_for_ever(server: Server) -> None:
    for step in range(20):
        server.routes[f"/{step}"] = redirects(f"/{step + 1}")
    assert "more than 10 redirects" in refusal(server.url("/0")).fact
    assert len(server.seen) == 11


def test_a_token_goes_to_its_own_host_only(server: Server) -> None:
    environ = OPEN | {"HF_ENDPOINT": server.url(), "HF_TOKEN": "hf_secret", "CIVITAI_TOKEN": "cv_secret"}
    with Server() as other:
        server.routes["/here"] = redirects("/there")
        server.routes["/there"] = redirects(other.url("/away"))
        # The same machine by another name is another host; and what leads back is not trusted again.
        other.routes["/away"] = redirects(server.url("/back"))
        server.routes["/back"] = redirects(server.url("/by-name", host="localhost"))
        server.routes["/by-name"] = says(200)
        assert get(server.url("/here"), environ) == (200, b"")
        carried = {s.path: s.headers.get("Authorization") for s in server.seen + other.seen}
    secret = "Bearer hf_secret"
    assert carried == {"/here": secret, "/there": secret, "/away": None, "/back": None, "/by-name": None}


def test_a_token_does_not_travel_unencrypted_to_another_machine() -> None:
    session = Session(OPEN | {"HF_ENDPOINT": "http://192.168.1.5", "HF_TOKEN": "hf_secret"}, limits=QUICK)
    origin = next(o for o in session._hosts if o.host == "192.168.1.5")
    assert not session._confidential(origin)
    assert session._confidential(origin._replace(scheme="https"))
    assert not session._confidential(origin._replace(host="127.0.0.1.example.org"))


def test_a_token_that_cannot_be_one_is_refused_and_not_shown(server: Server) -> None:
    environ = OPEN | {"HF_ENDPOINT": server.url(), "HF_TOKEN": "hf_one\r\nX-Other: two"}
    failure = refusal(server.url("/m"), environ)
    assert failure.fact == "`HF_TOKEN` holds characters that no token has"
    assert server.seen == []


def test_nothing_of_the_environment_but_what_is_named_is_sent(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pw\n")
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("hf_file")
    server.routes["/m"] = says(200, Set_Cookie="a=b")
    environ = OPEN | {"HOME": str(tmp_path), "HF_ENDPOINT": server.url()}
    with Session(environ, limits=QUICK) as session:
        for _ in range(2):
            response = session.request("GET", server.url("/m"))
            response.read_all(9)
            response.close()
    for seen in server.seen:
        assert set(seen.headers) == {"Host", "User-Agent", "Accept-Encoding"}


@pytest.mark.parametrize(
    ("status", "word", "retry"),
    [
        (400, "bad request", False),
        (401, "login needed", False),
        (403, "no access", False),
        (404, "not there", False),
        (410, "gone", False),
        (429, "too many requests", True),
        (500, "error of its own", True),
        (503, "not available now", True),
        (418, "no success", False),
    ],
)
def test_a_failure_is_told_in_the_words_of_the_host(
    server: Server, status: int, word: str, retry: bool
) -> None:
    body = '{"error": "E", "message": "see https://h/x?sig=1 and cv_secret"}'
    server.routes["/m"] = says(status, body, Retry_After="7")
    with Session(OPEN | {"CIVITAI_TOKEN": "cv_secret"}, limits=QUICK) as session:
        failure = session.request("GET", server.url("/m")).failure()
    assert f"answers {status}" in failure.fact and word in failure.fact
    assert "“see https://h/x?… and ***”" in failure.fact
    assert (failure.retry, failure.wait) == (retry, 7.0)


def test_a_failure_passes_by_waiting(server: Server) -> None:
    server.routes["/m"] = in_turn(says(429, Retry_After="0"), says(503), says(200, b"model"))

    def ask(session: Session) -> bytes:
        response = session.request("GET", server.url("/m"))
        try:
            if response.status != 200:
                raise response.failure()
            return response.read_all(99)
        finally:
            response.close()

    waits: list[float] = []
    with Session(OPEN, limits=QUICK) as session:
        assert session.retrying(lambda: ask(session), waits.append) == b"model"
    assert len(waits) == 2 and all(0 < w <= 0.02 for w in waits)


def test_a_long_wait_is_told() -> None:
    notes: list[str] = []

    class Heard(Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    with Session({}, reporter=Heard()) as session:
        assert session.pause(1, Failure("busy", retry=True, wait=30.0)) == 30.0
        assert session.pause(1, Failure("busy", retry=True)) <= session.limits.backoff
    assert notes == ["busy: trying again in 30 seconds"]


def test_waiting_has_an_end(server: Server) -> None:
    server.routes["/busy"] = says(503)
    server.routes["/later"] = says(429, Retry_After="3600")

    def ask(session: Session, path: str) -> None:
        raise session.request("GET", server.url(path)).failure()

    with Session(OPEN, limits=QUICK) as session:
        with pytest.raises(Failure, match="503"):
            session.retrying(lambda: ask(session, "/busy"))
        with pytest.raises(Failure, match="asks to wait 3,600 seconds"):
            session.retrying(lambda: ask(session, "/later"))
    assert len(server.asked("/busy")) == QUICK.attempts
    assert len(server.asked("/later")) == 1


@pytest.mark.parametrize(
    ("route", "fact"),
    [
        (silent, "stopped answering"),
        (dribble, "sends almost nothing"),
        (garbage, "does not speak HTTP"),
        (endless, "longer than 1,048,576 bytes"),
        (File(bytes(1000), drops=[300]), "700 bytes short of its 1,000"),
        (File(bytes(1000), chunked=True, drops=[300]), "dropped the connection"),
    ],
)
def test_hosts_that_misbehave_are_noticed(server: Server, route: object, fact: str) -> None:
    server.routes["/m"] = route  # type: ignore[assignment]
    limits = replace(QUICK, read=0.2) if route is silent else QUICK
    assert fact in refusal(server.url("/m"), limits=limits).fact


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW = "takes more than 0.3 seconds to answer"
INFORMATIONAL = "sends informational answers only"
TOO_MUCH = "sends too much beside the file itself"
STALLS = {
    "a status": (drips(b"HTTP/1.1 200 OK" + b" " * 999), SLOW),
    "a header": (drips(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), SLOW),
    "100 Continue, slowly": (drips(b"", CONTINUE, 0.01), SLOW),
    "100 Continue, a flood": (floods(b"", CONTINUE), INFORMATIONAL),
    "100 Continue in odd words": (floods(b"", b"HTTP/1.1 0100 Continue\r\n\r\n"), TOO_MUCH),
    "early hints, a flood": (floods(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), INFORMATIONAL),
    "headers of an informational answer": (floods(b"HTTP/1.1 100 Continue\r\n", b"A: b\r\n"), TOO_MUCH),
    "a body": (dribble, "sends almost nothing"),
    "the size of a chunk": (drips(CHUNKED, b"0", 0.005), "sends almost nothing"),
    "what is said of a chunk": (drips(CHUNKED + b"1;", b"a", 0.005), "sends almost nothing"),
    "trailers, a flood": (floods(CHUNKED + b"0\r\n", b"A: b\r\n"), TOO_MUCH),
    "trailers, slowly": (drips(CHUNKED + b"0\r\n", b"A: b\r\n", 0.005), "sends almost nothing"),
}


@pytest.mark.parametrize("what", STALLS)
def test_no_host_keeps_us_waiting_for_ever(server: Server, what: str) -> None:
    """Each of these goes on for ever; none lets a single byte fail to come within `read`."""
    server.routes["/m"], fact = STALLS[what]
    limits = replace(QUICK, patience=0.3, headers=0.3 if fact == SLOW else 10.0)
    failure = refusal(server.url("/m"), limits=limits)
    assert fact in failure.fact
    assert failure.retry == (fact != TOO_MUCH)


def test_a_few_informational_answers_are_passed_over(server: Server) -> None:
    def hinting(handler: Handler) -> None:
        handler.wfile.write(CONTINUE + b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" + CONTINUE)
        answer(handler, 200, b"model")

    server.routes["/m"] = hinting
    with Session(OPEN, limits=QUICK) as session:
        for _ in range(2):
            response = session.request("GET", server.url("/m"))
            assert (response.status, response.headers.get("Link")) == (200, None)
            assert response.read_all(99) == b"model"
            response.close()
    assert len({seen.port for seen in server.seen}) == 1, "and the connection is kept"


def test_a_slow_reader_blames_no_host(server: Server) -> None:
    server.routes["/m"] = File(bytes(3 << 20), block=1 << 20, chunked=True)
    with Session(OPEN, limits=replace(QUICK, patience=0.05, slowest=1 << 20)) as session:
        response = session.request("GET", server.url("/m"))
        size = 0
        while piece := response.read():
            size += len(piece)
            time.sleep(0.02)
        response.close()
    assert size == 3 << 20


@pytest.mark.parametrize("reply", [drips(b"", b"HTTP/1.1 200 OK"), drips(b"", CONTINUE, 0.01)])
def test_a_proxy_keeps_nobody_waiting_either(server: Server, reply: Route) -> None:
    server.connect = reply
    limits = replace(QUICK, headers=0.3, connect=5)
    failure = refusal("https://h.example/m", OPEN | {"HTTPS_PROXY": server.url()}, limits)
    assert failure.fact.startswith("`proxy` takes more than 0.3 seconds")


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("9" * 5000, 999_999_999.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 1999 23:59:59 +999999999999", None),
        ("Fri, 31 Dec 9999 23:59:59 -9959", None),
        ("Fri, 99 Dec 2999 23:59:59 GMT", None),
        ("Fri, 31 Foo 2999 23:59:59 GMT", None),
        ("Fri, 31 Dec 0000 23:59:59 GMT", None),
        ("Fri, 31 Dec 2999 99:99:99 GMT", None),
        ("-7", None),
        ("1e9", None),
        ("inf", None),
        ("\xb2", None),
        (",", None),
        ("", None),
        ("0" * 60_000 + "x", None),
    ],
)
def test_any_time_to_wait_is_one_or_none(server: Server, value: str, wait: float | None) -> None:
    server.routes["/m"] = says(503, Retry_After=value)
    with Session(OPEN, limits=QUICK) as session:
        assert session.request("GET", server.url("/m")).failure().wait == wait


def test_a_date_to_come_is_waited_for(server: Server) -> None:
    server.routes["/m"] = says(503, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT")
    with Session(OPEN, limits=QUICK) as session:
        failure = session.request("GET", server.url("/m")).failure()
        assert failure.wait is not None and failure.wait > 1e11
        with pytest.raises(Failure, match="asks to wait"):
            session.pause(1, failure)


HOSTILE = "\x1b[31m\x9b2J\u202eMARK\u200b"


def test_what_a_host_says_is_escaped(server: Server) -> None:
    """A marker in every place where a host's words may get into a message."""
    raw = HOSTILE.encode()
    latin = raw.decode("latin-1")
    named = ("Content-Encoding", "Content-Type", "X-Error-Message", "ETag", "Content-Range", "Retry-After")
    everywhere = {name.replace("-", "_"): latin for name in named}
    notes: list[str] = []

    class Heard(Reporter):
        def note(self, message: str) -> None:
            notes.append(message)

    routes = {
        "/status": sends(b"HTTP/1.1 " + raw + b" OK\r\n\r\n"),
        "/reason": sends(b"HTTP/1.1 500 " + raw + b"\r\nContent-Length: 0\r\n\r\n"),
        "/header": sends(b"HTTP/1.1 500 OK\r\n" + raw + b"\r\n\r\n"),
        "/all": says(503, raw, **everywhere),
        "/json": says(404, json.dumps({"message": HOSTILE, "error": HOSTILE})),
        "/page": says(200, b"<html><title>" + raw + b"</title>"),
        "/packed": says(200, b"x", Content_Encoding=latin),
        "/away": redirects("ftp://" + latin),
        "/down": redirects("/" + latin, 302),
        "/there": redirects("http://1.1.1.1/" + latin),
        "/host": redirects("http://" + latin),
    }
    for path, route in routes.items():
        server.routes[path] = route
    failures = []
    with Session(OPEN, limits=replace(QUICK, longest_wait=9.0), reporter=Heard()) as session:
        for path in routes:
            with pytest.raises(Failure) as raised:
                response = session.request("GET", server.url(path))
                refuse_encoded(response)
                if response.status != 200:
                    raise response.failure()
                response.refuse_pages(response.read())
            failures.append(raised.value)
            session.pause(1, Failure(raised.value.fact + HOSTILE, wait=3.0 if path == "/all" else None))
            with pytest.raises(FetchError) as told:
                open_remote(server.url(path), session=session)
            failures += [Failure(p.fact) for p in told.value.problems]
            assert all(line.isprintable() for line in str(told.value).split("\n"))
    said = [text for f in failures for text in (str(f), f.fact, f.hint or "", *f.evidence)] + notes
    assert notes and sum("MARK" in text for text in said) > 8
    assert not [text for text in said if not text.isprintable()]


def test_a_stop_ends_what_is_under_way_and_nothing_later(server: Server) -> None:
    server.routes["/m"] = says(200, b"model")
    server.routes["/slow"] = silent
    with Session(OPEN, limits=QUICK) as first:
        second, waiting = first.anew(), first.request("GET", server.url("/slow"))
        response = first.request("GET", server.url("/m"))
        response.read_all(99)
        response.close()
        (kept,) = [c for idle in first._pool.idle.values() for c in idle]
        other = second.request("GET", server.url("/m"))
        first.stop()
        with pytest.raises(Failure):
            waiting.read_all(1 << 20)
        waiting.close()
        for ended in (lambda: first.request("GET", server.url("/m")), lambda: first.wait(0)):
            with pytest.raises(Failure, match="stopped"):
                ended()
        assert other.read_all(99) == b"model", "taken over from the first, and not broken off with it"
        assert other._socket is kept.sock
        other.close()
        third = first.anew()
        response = third.request("GET", server.url("/m"))
        assert response.read_all(99) == b"model"
        assert response._socket is kept.sock, "connections are shared"
        response.close()
        second.stop()
        third.go_on()


def test_a_host_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failure = refusal(f"http://127.0.0.1:{port}/m")
    assert "cannot connect" in failure.fact and failure.retry


def test_a_kept_connection_that_was_closed_is_made_anew(server: Server) -> None:
    server.routes["/m"] = says(200, b"model")
    with Session(OPEN, limits=QUICK) as session:
        for _ in range(2):
            response = session.request("GET", server.url("/m"))
            assert response.read_all(99) == b"model"
            response.close()
            for kept in session._pool.idle.values():
                kept[0].sock.shutdown(socket.SHUT_RDWR)
    assert len({seen.port for seen in server.seen}) == 2


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    try:
        certificate(folder)
    except (OSError, ValueError):
        pytest.skip("no `openssl` program")
    return folder


def test_tls_is_verified(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(tls=tls_server_context(tls)) as secure:
        secure.routes["/m"] = says(200, b"model")
        url = secure.url("/m", host="localhost")
        failure = refusal(url)
        assert "is not trusted" in failure.fact and "SSL_CERT_FILE" in str(failure.hint)
        assert not failure.retry
        monkeypatch.setenv("SSL_CERT_FILE", str(tls / "server.pem"))
        assert get(url) == (200, b"model")
        assert "is not trusted" in refusal(secure.url("/m", host="127.0.0.1")).fact


def test_https_never_becomes_http(tls: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "server.pem"))
    server.routes["/m"] = says(200, b"model")
    with Server(tls=tls_server_context(tls)) as secure:
        secure.routes["/down"] = redirects(server.url("/m?sig=secret"))
        secure.routes["/up"] = says(200, b"model")
        server.routes["/up"] = redirects(secure.url("/up", host="localhost"))
        failure = refusal(secure.url("/down", host="localhost"))
        assert "without encryption" in failure.fact and "secret" not in failure.fact
        assert server.seen == []
        assert get(server.url("/up")) == (200, b"model")


def test_proxies_come_from_the_environment() -> None:
    proxies = Proxies.of({"HTTPS_PROXY": "http://p:3128", "no_proxy": "localhost, .corp.example,10.0.0.1"})
    assert proxies.proxy_for("https", "huggingface.co") == "http://p:3128"
    assert proxies.proxy_for("http", "huggingface.co") is None
    for host in ("localhost", "corp.example", "hub.corp.example", "10.0.0.1"):
        assert proxies.proxy_for("https", host) is None
    assert proxies.proxy_for("https", "notcorp.example") is not None
    assert Proxies.of({"ALL_PROXY": "http://p", "NO_PROXY": "*"}).proxy_for("https", "a.example") is None


class Proxy:
    """A proxy that takes CONNECT, and remembers what it was asked."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n", to: int = 0) -> None:
        self.answer, self.to, self.asked = answer, to, b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:p%40ss@127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Proxy:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.thread.join(2)

    def run(self) -> None:
        client, _ = self.socket.accept()
        with client:
            while b"\r\n\r\n" not in self.asked:
                self.asked += client.recv(4096)
            client.sendall(self.answer)
            if self.to:
                with socket.create_connection(("127.0.0.1", self.to)) as target:
                    back = threading.Thread(target=_pump, args=(target, client), daemon=True)
                    back.start()
                    _pump(client, target)
                    back.join(2)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_proxy_is_asked_to_connect(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "server.pem"))
    with Server(tls=tls_server_context(tls)) as secure, Proxy(to=secure.port) as proxy:
        secure.routes["/m"] = says(200, b"model", Connection="close")
        assert get(f"https://localhost:{secure.port}/m", OPEN | {"HTTPS_PROXY": proxy.url}) == (200, b"model")
        assert proxy.asked.startswith(f"CONNECT localhost:{secure.port} HTTP/1.1\r\n".encode())
        assert b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in proxy.asked


def tunnels(to: int) -> Route:
    """A proxy by which every host is the server at one port of this machine."""

    def route(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with socket.create_connection(("127.0.0.1", to)) as target:
            back = threading.Thread(target=_pump, args=(target, handler.connection), daemon=True)
            back.start()
            _pump(handler.connection, target)
            back.join(2)

    return route


def test_a_token_of_civitai_goes_to_the_host_of_the_address_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["civitai.com", "civitai.red", "civitai.green", "civitai.example"]
    try:
        made = certificate(tmp_path, ",".join(f"DNS:{n}" for n in names))
    except (OSError, ValueError):
        pytest.skip("no `openssl` program")
    monkeypatch.setenv("SSL_CERT_FILE", str(made))
    environ = {"HTTPS_PROXY": server.url(), "CIVITAI_TOKEN": "cv_secret"}
    with Server(tls=tls_server_context(tmp_path)) as site:
        server.connect = tunnels(site.port)
        site.routes["/m"] = says(200, b"model")
        carried = {}
        for host in names:
            assert get(f"https://{host}/m", environ) == (200, b"model")
            carried[host] = site.seen[-1].headers.get("Authorization")
        assert carried == {**dict.fromkeys(names[:3], "Bearer cv_secret"), "civitai.example": None}
        for host in names[1:]:
            site.routes["/away"] = redirects(f"https://{host}/m")
            assert get("https://civitai.com/away", environ) == (200, b"model")
            assert site.seen[-1].headers["Host"] == host
            assert "Authorization" not in site.seen[-1].headers


def test_a_proxy_that_refuses_and_targets_that_are_refused() -> None:
    with Proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        environ = {"HTTPS_PROXY": proxy.url}
        assert (
            "`169.254.169.254` is a link-local address" in refusal("https://169.254.169.254/", environ).fact
        )
        assert "`localhost` is a loopback address" in refusal("https://localhost/", environ).fact
        assert "the proxy refuses" in refusal("https://example.org/", environ).fact
    assert "not supported" in refusal("https://example.org/", {"HTTPS_PROXY": "socks5://127.0.0.1:1"}).fact
