"""Downloads from servers that work, and from servers that fail in every way that servers do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder.base.errors import CkptError, ExitCode, FetchError, Problem, SourceError, render
from builder.base.progress import Reporter
from builder.sources.net.acquire import Fetched, fetch
from builder.sources.net.client import Session
from builder.sources.net.wire import Limits
from builder.store import Store
from tests.help.servers import (
    File,
    Handler,
    Route,
    Server,
    answer,
    dribble,
    endless,
    garbage,
    in_turn,
    redirects,
    says,
    silent,
)

DATA = random.Random(1).randbytes(1_000_003)
SHA256 = hashlib.sha256(DATA).hexdigest()
SEGMENT = 1 << 16
QUICK = Limits(connect=5, read=5, patience=0.3, attempts=4, backoff=0.01, longest_wait=1.0, segment=SEGMENT)


class Heard(Reporter):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.warnings: list[Problem] = []

    def start(self, task: str, total: int) -> None:
        self.events.append(("start", total))

    def advance(self, task: str, count: int) -> None:
        self.events.append(("advance", count))

    def finish(self, task: str) -> None:
        self.events.append(("finish", 0))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, problem: Problem) -> None:
        self.warnings.append(problem)

    @property
    def advanced(self) -> int:
        return sum(count for event, count in self.events if event == "advance")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def environ(store: Store) -> dict[str, str]:
    return {"CKPT_ALLOW_PRIVATE": "1", "HOME": str(store.root), "CIVITAI_ENDPOINT": "http://127.0.0.1:9"}


def get(
    store: Store,
    *urls: str,
    sha256: str | None = None,
    size: int | None = None,
    reporter: Reporter | None = None,
    limits: Limits = QUICK,
) -> Fetched:
    with Session(environ(store), limits=limits) as session:
        return fetch(
            urls,
            sha256=sha256,
            size=size,
            store=store,
            session=session,
            reporter=reporter or Heard(),
            name="m",
        )


def refused(store: Store, *urls: str, **options: object) -> CkptError:
    with pytest.raises(CkptError) as raised:
        get(store, *urls, **options)  # type: ignore[arg-type]
    assert not leftovers(store)
    return raised.value


def leftovers(store: Store) -> list[str]:
    """What lies in the folder of downloads, whole or not."""
    return sorted(p.name for p in (store.root / "downloads").rglob("*") if p.is_file())


def said(error: CkptError) -> str:
    return "\n".join(render(p) for p in error.problems)


def good(fetched: Fetched, store: Store) -> bool:
    assert fetched.path.read_bytes() == DATA
    assert (fetched.sha256, fetched.size) == (SHA256, len(DATA))
    assert leftovers(store) == [SHA256]
    return True


WAYS = {
    "storage": File(DATA),
    "one piece": File(DATA, ranges=False),
    "chunked": File(DATA, ranges=False, chunked=True),
    "without validator": File(DATA, etag=""),
    "weak validator": File(DATA, etag='W/"x"'),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_is_downloaded(server: Server, store: Store, way: str, pinned: bool) -> None:
    server.routes["/m.ckpt"] = WAYS[way]
    heard = Heard()
    pins = {"sha256": SHA256, "size": len(DATA)} if pinned else {}
    fetched = get(store, server.url("/m.ckpt"), reporter=heard, **pins)  # type: ignore[arg-type]
    assert good(fetched, store)
    assert fetched.name == "m.ckpt"
    assert heard.advanced == len(DATA)
    assert [e for e, _ in heard.events if e != "advance"] == ["start", "finish"]


def test_large_files_come_over_several_connections(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA, pause=0.001)
    assert good(get(store, server.url("/m")), store)
    assert 1 < len({s.port for s in server.asked("/m")}) <= QUICK.connections
    assert server.sent == len(DATA), "every byte travels once"
    assert all("If-Range" in s.headers for s in server.asked("/m")[1:])


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1])
def test_files_of_any_size(server: Server, store: Store, size: int) -> None:
    server.routes["/m"] = File(DATA[:size])
    assert get(store, server.url("/m")).path.read_bytes() == DATA[:size]


def test_what_is_there_is_not_downloaded_again(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA)
    get(store, server.url("/m"))
    before = len(server.seen)
    fetched = get(store, server.url("/m"), sha256=SHA256)
    assert good(fetched, store) and fetched.address is None
    assert len(server.seen) == before


def test_a_damaged_download_is_made_again(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA)
    path = get(store, server.url("/m")).path
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    heard = Heard()
    assert good(get(store, server.url("/m"), sha256=SHA256, reporter=heard), store)
    assert "is not used" in heard.warnings[0].fact


DROPS = {
    "once": File(DATA, drops=[5000]),
    "often": File(DATA, drops=[10_000, 20_000, 0, 5_000, 60_000, 1, 2, 30_000] * 3),
    "in one piece": File(DATA, ranges=False, drops=[5000, 600_000]),
    "chunked": File(DATA, ranges=False, chunked=True, drops=[5000]),
}


@pytest.mark.parametrize("way", DROPS)
def test_dropped_connections_are_made_anew(server: Server, store: Store, way: str) -> None:
    server.routes["/m"] = DROPS[way]
    assert good(get(store, server.url("/m"), limits=replace(QUICK, attempts=9)), store)
    if way in {"once", "often"}:
        assert server.sent == len(DATA), "what came before a drop is kept"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_hosts_that_are_busy_are_asked_again(server: Server, store: Store, status: int) -> None:
    busy, file = says(status, Retry_After="0"), File(DATA)
    server.routes["/m"] = in_turn(busy, file, file, busy, busy, file)
    assert good(get(store, server.url("/m")), store)


MISBEHAVING: dict[str, Route] = {
    "a part from the wrong offset at once": File(DATA, shift=7),
    "200 to a range after a 206": in_turn(File(DATA), File(DATA, ranges=False)),
    "an ETag that changes": File(DATA, etags=['"a"', '"a"', '"b"', '"c"', '"d"', '"e"']),
    "an ETag that always changes": File(DATA, etags=[f'"{n}"' for n in range(50)]),
    "parts without a range": says(206, DATA, ETag='"x"'),
    "parts of an unknown whole": in_turn(
        says(206, DATA[:SEGMENT], Content_Range=f"bytes 0-{SEGMENT - 1}/*", ETag='"x"'), File(DATA)
    ),
    "a range that makes no sense": in_turn(
        says(206, DATA[:SEGMENT], Content_Range="bytes 9-3/2", ETag='"x"'), File(DATA)
    ),
}


@pytest.mark.parametrize("way", MISBEHAVING)
def test_parts_that_do_not_fit_are_never_put_together(server: Server, store: Store, way: str) -> None:
    route = MISBEHAVING[way]
    if way == "parts without a range":
        route = in_turn(route, File(DATA, ranges=False))
    server.routes["/m"] = route
    assert good(get(store, server.url("/m")), store)


def test_a_later_part_from_the_wrong_offset(server: Server, store: Store) -> None:
    right, wrong = File(DATA), File(DATA, shift=3)

    def route(handler: Handler) -> None:
        asked = handler.headers.get("Range") or "bytes=0-"
        (right if asked.startswith("bytes=0-") else wrong)(handler)

    server.routes["/m"] = route
    assert good(get(store, server.url("/m")), store)


def test_a_file_that_changes_under_a_download_is_taken_as_it_is_then(server: Server, store: Store) -> None:
    new = DATA[::-1]
    server.routes["/m"] = in_turn(*[File(DATA)] * 5, File(new))
    assert get(store, server.url("/m")).path.read_bytes() == new


FAILING: dict[str, tuple[Route, str]] = {
    "401": (says(401, '{"message": "Log in first"}'), "answers 401, login needed: “Log in first”"),
    "403": (says(403, "<html><title>Forbidden zone</title>"), "answers 403, no access: “Forbidden zone”"),
    "404": (says(404), "answers 404, not there"),
    "410": (says(410, "archived"), "answers 410, gone: removed or archived: “archived”"),
    "429 for long": (says(429, Retry_After="600"), "and asks to wait 600 seconds"),
    "500 for ever": (says(500, "Traceback: boom"), "answers 500, an error of its own: “Traceback: boom”"),
    "silence": (silent, "stopped answering"),
    "a trickle": (dribble, "sends almost nothing"),
    "no HTTP": (garbage, "does not speak HTTP"),
    "drops for ever": (File(DATA, ranges=False, drops=[10] * 99), "the body ended 999,993 bytes short"),
    "HTML": (
        says(200, "<!doctype html><title>Sign in</title>"),
        "sends an HTML page instead of the file: “Sign in”",
    ),
    "JSON": (
        says(200, '{"error": "The creator requires you to log in"}', Content_Type="application/json"),
        "sends a JSON message instead of the file: “The creator requires you to log in”",
    ),
    "packed": (File(DATA, encoding="gzip"), "sends the file packed (`gzip`)"),
    "no length": (File(DATA, ranges=False, length=False), "the host tells no length"),
    "to http elsewhere": (redirects("http://1.1.1.1/m"), "is asked for without encryption"),
    "to a file": (redirects("file:///etc/passwd"), "redirects to what is no web address"),
    "round and round": (redirects("/m"), "redirects to itself"),
}


@pytest.mark.parametrize("way", FAILING)
def test_failures_are_named_for_what_they_are(server: Server, store: Store, way: str) -> None:
    server.routes["/m"], fact = FAILING[way]
    limits = replace(QUICK, read=0.2) if way == "silence" else QUICK
    error = refused(store, server.url("/m"), limits=limits)
    assert isinstance(error, FetchError) and error.exit_code == ExitCode.FETCH
    assert error.problems[0].fact == "`m` could not be fetched"
    assert fact in said(error) and server.url("/m") in said(error)


@pytest.mark.parametrize("ranges", [True, False])
def test_pages_are_named_when_a_size_is_pinned_too(server: Server, store: Store, ranges: bool) -> None:
    server.routes["/m"] = File(b"<html><title>Sign in</title></html>", ranges=ranges)
    error = refused(store, server.url("/m"), sha256=SHA256, size=len(DATA))
    assert isinstance(error, FetchError)
    assert "sends an HTML page instead of the file: “Sign in”" in said(error)


SIZES: dict[str, tuple[Route, str]] = {
    "in parts": (File(DATA[:-3]), "the file has 1,000,000 bytes, 1,000,003 are pinned"),
    "in one piece": (File(DATA[:-3], ranges=False), "the file has 1,000,000 bytes, 1,000,003 are pinned"),
    "short, not told": (
        File(DATA[:-3], ranges=False, chunked=True),
        "the body ends after 1,000,000 bytes, 1,000,003 are pinned",
    ),
    "long, not told": (
        File(DATA + b"x", ranges=False, chunked=True),
        "the body goes on after 1,000,003 bytes",
    ),
    "endless": (endless, "the body goes on after 1,000,003 bytes"),
}


@pytest.mark.parametrize("way", SIZES)
def test_a_wrong_size_is_not_what_was_pinned(server: Server, store: Store, way: str) -> None:
    server.routes["/m"], fact = SIZES[way]
    error = refused(store, server.url("/m"), sha256=SHA256, size=len(DATA))
    assert isinstance(error, SourceError) and error.exit_code == ExitCode.SOURCE
    assert error.problems[0].fact == "`m` is not what was pinned"
    assert fact in said(error)
    assert server.sent < len(DATA) + (16 << 20), "what sockets buffer, and no more"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_wrong_digest_is_not_what_was_pinned(server: Server, store: Store, ranges: bool) -> None:
    other = bytes(len(DATA))
    server.routes["/m"] = File(other, ranges=ranges)
    error = refused(store, server.url("/m"), sha256=SHA256, size=len(DATA))
    assert isinstance(error, SourceError)
    assert SHA256 in said(error) and hashlib.sha256(other).hexdigest() in said(error)
    assert server.sent == len(other), "it is not downloaded twice"


@pytest.mark.parametrize("route", [endless, File(bytes(2 << 20)), File(bytes(2 << 20), ranges=False)])
def test_bytes_have_a_limit_where_no_size_is_pinned(server: Server, store: Store, route: Route) -> None:
    server.routes["/m"] = route
    limits = Limits(max_bytes=1 << 20, segment=SEGMENT)
    error = refused(store, server.url("/m"), limits=limits)
    assert "1,048,576" in said(error) and isinstance(error, FetchError)


def test_a_body_without_length_is_taken_when_its_size_is_pinned(server: Server, store: Store) -> None:
    cut = File(DATA, ranges=False, length=False, drops=[4000])
    server.routes["/m"] = cut
    assert good(get(store, server.url("/m"), size=len(DATA)), store)


def test_addresses_are_tried_in_order(server: Server, store: Store) -> None:
    server.routes["/gone"] = says(404)
    server.routes["/other"] = File(bytes(len(DATA)))
    server.routes["/m"] = File(DATA)
    urls = [server.url(p) for p in ("/gone", "/other", "/m", "/never")]
    fetched = get(store, *urls, sha256=SHA256)
    assert good(fetched, store) and fetched.address == urls[2]
    assert not server.asked("/never")
    (store.root / "downloads" / SHA256).unlink()
    error = refused(store, *urls[:2], sha256=SHA256)
    lines = error.problems[0].evidence
    assert lines[0].startswith(f"{urls[0]}: ") and "404" in lines[0]
    assert lines[1].startswith(f"{urls[1]}: ") and "another one" in lines[1]


def test_files_of_this_machine(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a model.ckpt").write_bytes(DATA)
    with Session(environ(store), limits=QUICK) as session:
        for address in ("file:a model.ckpt", f"file://{tmp_path}/a%20model.ckpt"):
            found = fetch([address], sha256=SHA256, store=store, session=session, base=tmp_path)
            assert (found.path, found.sha256) == (tmp_path / "a model.ckpt", SHA256)
        with pytest.raises(FetchError, match="could not be fetched"):
            fetch(["file:none.ckpt"], store=store, session=session, base=tmp_path)
        with pytest.raises(SourceError, match="is not what was pinned"):
            fetch(["file:a model.ckpt"], sha256="0" * 64, store=store, session=session, base=tmp_path)


def test_links_that_loop_and_names_that_no_file_has(store: Store, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    addresses = ["file:loop", "file:loop/m", f"file:{'m' * 3000}", "file:pipe", "file:."]
    with Session(environ(store), limits=QUICK) as session, pytest.raises(FetchError) as raised:
        fetch(addresses, store=store, session=session, base=tmp_path)
    reasons = [line.partition(": ")[2] for line in raised.value.problems[0].evidence]
    assert "symbolic links" in reasons[0] and "symbolic links" in reasons[1] and "too long" in reasons[2]
    assert reasons[3:] == ["it is not a regular file"] * 2


def test_a_byte_a_connection_is_no_progress(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA, drops=[SEGMENT, *[1] * 10_000])
    error = refused_in_parts(store, server.url("/m"))
    assert "short of its" in said(error)
    assert len(server.seen) <= 1 + QUICK.attempts * QUICK.connections


def refused_in_parts(store: Store, url: str) -> CkptError:
    with pytest.raises(CkptError) as raised:
        get(store, url)
    return raised.value


# Archives.


def from_archive(
    store: Store, archives: str, *urls: str, sha256: str | None = SHA256, offline: bool = False
) -> Fetched:
    variables = environ(store) | {"CKPT_ARCHIVE": archives}
    with Session(variables, limits=QUICK, offline=offline) as session:
        return fetch(urls, sha256=sha256, store=store, session=session, name="m")


def test_what_is_gone_is_found_at_an_archive(server: Server, store: Store, tmp_path: Path) -> None:
    server.routes["/gone"] = says(410)
    server.routes["/wrong"] = File(bytes(len(DATA)))
    server.routes[f"/a/{SHA256}"] = says(404)
    server.routes[f"/b/{SHA256[:2]}/{SHA256}"] = says(404)
    server.routes[f"/c/{SHA256}.bin"] = File(DATA)
    archives = f"{server.url('/a/{sha256}')}  {server.url('/c/{sha256}.bin')} {server.url('/never/{sha256}')}"
    for urls in ((), (server.url("/gone"),), (server.url("/wrong"),)):
        fetched = from_archive(store, archives, *urls)
        assert good(fetched, store)
        assert fetched.address is None, "it is in nobody's lock"
        fetched.path.unlink()
    assert not any(s.path.startswith("/never") for s in server.seen)
    kept = tmp_path / "archive"
    kept.mkdir()
    (kept / SHA256).write_bytes(DATA)
    assert from_archive(store, f"file://{kept}/{{sha256}}", offline=True).path == kept / SHA256


def test_an_archive_is_asked_last_and_believed_nothing(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA)
    server.routes[f"/a/{SHA256}"] = File(bytes(len(DATA)))
    archive = server.url("/a/{sha256}")
    assert good(from_archive(store, archive, server.url("/m")), store)
    (store.root / "downloads" / SHA256).unlink()
    assert not server.asked(f"/a/{SHA256}")
    archives = f"{archive} {server.url('/b')} nonsense:{{sha256}}"
    with pytest.raises(SourceError) as raised:
        from_archive(store, archives, server.url("/gone"))
    told = said(raised.value)
    assert f"archive {archive}: the file is another one" in told
    assert f"archive {server.url('/b')}: `{{sha256}}` is not in it" in told
    assert "archive nonsense:{sha256}: `nonsense:" in told
    assert not leftovers(store)
    with pytest.raises(FetchError):
        from_archive(store, archive, server.url("/gone"), sha256=None)


def test_offline_says_so(server: Server, store: Store) -> None:
    with Session(environ(store), offline=True) as session, pytest.raises(FetchError) as raised:
        fetch([server.url("/m"), "hf://org/name/m", "civitai:1"], store=store, session=session, name="m")
    assert said(raised.value).count("not asked: the network is off") == 3
    assert "hint: build without `--offline`" in said(raised.value)
    assert server.seen == []


# Resuming.


def broken_off(store: Store, server: Server, route: File, **pins: object) -> int:
    """Start a download that fails half way; returns the bytes that came."""
    stop = SEGMENT * 6
    refuse = says(403)

    def half(handler: Handler) -> None:
        first = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        (route if first < stop else refuse)(handler)

    server.routes["/m"] = half
    with pytest.raises(FetchError):
        get(store, server.url("/m"), **pins)  # type: ignore[arg-type]
    server.routes["/m"] = route
    sent, server.sent = server.sent, 0
    assert len(leftovers(store)) == 2, "the part and its journal"
    return sent


@pytest.mark.parametrize("pinned", [True, False])
def test_a_download_is_resumed(server: Server, store: Store, pinned: bool) -> None:
    pins = {"sha256": SHA256} if pinned else {}
    came = broken_off(store, server, File(DATA), **pins)
    assert came >= SEGMENT
    heard = Heard()
    assert good(get(store, server.url("/m"), reporter=heard, **pins), store)  # type: ignore[arg-type]
    assert server.sent <= len(DATA) - SEGMENT
    assert came + server.sent <= len(DATA) + QUICK.connections * SEGMENT
    assert heard.notes and "are there already" in heard.notes[0]
    assert heard.advanced == heard.events[0][1] < len(DATA)


def test_a_changed_file_is_not_resumed(server: Server, store: Store) -> None:
    broken_off(store, server, File(DATA))
    new = DATA[::-1]
    server.routes["/m"] = File(new)
    assert get(store, server.url("/m")).path.read_bytes() == new


@pytest.mark.parametrize("etag", ['W/"weak"', ""])
def test_without_a_strong_validator_nothing_is_kept(server: Server, store: Store, etag: str) -> None:
    server.routes["/m"] = File(DATA, etag=etag, drops=[0] + [50_000] * 9)
    refused(store, server.url("/m"))


def test_a_part_of_another_address_is_not_resumed(server: Server, store: Store) -> None:
    broken_off(store, server, File(DATA), sha256=SHA256)
    server.routes["/mirror"] = File(DATA)
    assert good(get(store, server.url("/mirror"), sha256=SHA256), store)
    assert server.sent == len(DATA)


@pytest.mark.parametrize("damage", ["bytes", "claims", "garbage", "size", "torn", "deep", "link"])
def test_a_damaged_part_is_noticed(server: Server, store: Store, damage: str) -> None:
    broken_off(store, server, File(DATA), sha256=SHA256)
    folder = store.root / "downloads" / "partial"
    journal = next(folder.glob("*.journal"))
    part = journal.with_suffix("")
    match damage:
        case "bytes":
            with part.open("r+b") as file:
                file.write(b"damaged")
        case "claims":
            journal.write_text(journal.read_text() + "".join(f"{n} 99999999\n" for n in range(99)))
        case "garbage":
            journal.write_bytes(b"\xff\xfe{")
        case "size":
            os.truncate(part, 10)
        case "torn":
            journal.write_text(journal.read_text() + "7 6553")
        case "deep":
            journal.write_text('{"of":' * 100_000)
        case "link":
            journal.unlink()
            journal.symlink_to("/dev/zero")
    assert good(get(store, server.url("/m"), sha256=SHA256), store)


def test_the_journal_holds_no_address_and_no_secret(server: Server, store: Store) -> None:
    server.routes["/m"] = File(DATA)
    broken_off(store, server, File(DATA))
    journal = next((store.root / "downloads" / "partial").glob("*.journal")).read_text()
    assert set(json.loads(journal.splitlines()[0])) == {"of", "etag", "size", "segment", "name"}
    assert "127.0.0.1" not in journal


def test_an_address_that_runs_out_is_asked_for_again(server: Server, store: Store) -> None:
    signatures = iter(range(100))
    file = File(DATA)
    uses: dict[str, int] = {}

    def signed(handler: Handler) -> None:
        uses[handler.path] = uses.get(handler.path, 0) + 1
        (file if uses[handler.path] <= 5 else says(403, "Request has expired"))(handler)

    server.routes["/m"] = lambda handler: answer(
        handler, 302, b"", {"Location": f"/signed?n={next(signatures)}"}
    )
    server.routes["/signed"] = signed
    assert good(get(store, server.url("/m")), store)
    assert len(server.asked("/m")) < len(server.asked("/signed"))


def test_no_room_on_the_disk(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes["/m"] = File(DATA)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 5})()
    )
    assert "the disk has no room: 1,000,003 bytes are to come, 5 are free" in said(
        refused(store, server.url("/m"))
    )


# Several processes.

CLIENT = """
import sys
from pathlib import Path
from builder.base.errors import CkptError
from builder.sources.net.acquire import fetch
from builder.sources.net.client import Session
from builder.sources.net.wire import Limits
from builder.store import Store

url, root, sha256 = sys.argv[1:]
session = Session({"CKPT_ALLOW_PRIVATE": "1", "HOME": root}, limits=Limits(segment=1 << 16))
print("ready", flush=True)
try:
    print(fetch([url], sha256=sha256 or None, store=Store(Path(root)), session=session).path)
except KeyboardInterrupt:
    sys.exit(130)
"""


def client(url: str, store: Store, sha256: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLIENT, url, str(store.root), sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("pin", [SHA256, ""])
def test_two_processes_share_one_download(server: Server, store: Store, pin: str) -> None:
    server.routes["/m"] = File(DATA, pause=0.05)
    running = [client(server.url("/m"), store, pin) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        assert Path(out.splitlines()[1]).read_bytes() == DATA
    assert leftovers(store) == [SHA256]
    if pin:
        assert server.sent == len(DATA)


def test_without_locks_two_processes_do_no_harm(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    server.routes["/m"] = File(DATA)
    assert good(get(store, server.url("/m"), sha256=SHA256), store)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_is_resumed(server: Server, store: Store, how: signal.Signals) -> None:
    server.routes["/m"] = File(DATA, pause=0.03)
    process = client(server.url("/m"), store, SHA256)
    while server.sent < len(DATA) // 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    process.communicate()
    kept = set(leftovers(store))
    assert {name.rpartition(".")[2] for name in kept} >= {"journal"} and SHA256 not in kept
    server.sent = 0
    assert good(get(store, server.url("/m"), sha256=SHA256), store)
    assert server.sent < len(DATA)
