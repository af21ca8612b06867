"""Who is answered: security of the server, against clients that are no browser of the user's."""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.web import server as module
from builder.web.routes import API, PAGES, POSTS
from builder.web.server import HOST, MAX_BODY, MOST_CONNECTIONS
from builder.web.session import Session
from tests.help.building import Folder, files
from tests.help.pages import Client, served


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def client(folder: Folder) -> Iterator[Client]:
    with served(folder) as client:
        yield client


def test_it_listens_on_this_machine_alone(client: Client) -> None:
    assert client.server.socket.getsockname()[0] == "127.0.0.1"


def test_every_answer_has_the_headers_that_protect_it(client: Client) -> None:
    answers = [
        client.get(""),
        client.get("static/page.js"),
        client.get("api/library"),
        client.get("nowhere"),
        client.post("cancel", id="7"),
        client.ask("GET", "/", headers={"Cookie": None}),
        client.ask("BREW", "/"),
    ]
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_pages_need_no_script_or_style_within_them(client: Client) -> None:
    for view in PAGES:
        text = client.get(view).text
        assert " style=" not in text and "<style" not in text and " onclick=" not in text
        assert text.count("<script") == text.count('<script src="static/page.js"')


def test_the_token_opens_the_page_once_it_is_a_cookie(client: Client) -> None:
    path = client.server.session.path
    bare: dict[str, str | None] = {"Cookie": None, "Sec-Fetch-Site": "none"}
    assert client.ask("GET", path, headers=bare).status == 403
    assert client.ask("GET", f"{path}?token=wrong", headers=bare).status == 403
    opened = client.ask("GET", f"{path}?token={client.server.session.token}", headers=bare)
    assert opened.status == 303 and opened.headers["Location"] == path, "the token leaves the address"
    cookie = opened.headers["Set-Cookie"]
    assert {p.strip() for p in cookie.split(";")[1:]} == {f"Path={path}", "HttpOnly", "SameSite=Strict"}
    assert client.ask("GET", path, headers={"Cookie": cookie.partition(";")[0]}).status == 200


def test_the_ticket_of_a_browser_that_is_started_opens_once(client: Client) -> None:
    """Whoever reads it later from the list of processes comes too late."""
    bare: dict[str, str | None] = {"Cookie": None, "Sec-Fetch-Site": "none"}
    address = client.server.address_once.partition(f":{client.server.port}")[2]
    assert client.server.session.token not in address
    opened = client.ask("GET", address, headers=bare)
    assert opened.status == 303 and client.server.session.token in opened.headers["Set-Cookie"]
    assert client.ask("GET", address, headers=bare).status == 403
    assert client.ask("GET", f"{client.server.session.path}?token=", headers=bare).status == 403


@pytest.mark.parametrize("cookie", [None, "", "ckpt=", "ckpt=x", "ckpt", "other=1", 'ckpt="\\', "ckpt=é"])
def test_without_the_cookie_there_is_nothing(client: Client, folder: Folder, cookie: str | None) -> None:
    before = files(folder.path)
    path = client.server.session.path
    bad = {"Cookie": cookie}
    for view in (*PAGES, *(f"api/{name}" for name in API), "static/page.css", "events"):
        answer = client.ask("GET", path + view, headers=bad)
        assert answer.status == 403 and "tiny" not in answer.text
    for view in POSTS:
        assert client.ask("POST", path + view, b"file=work%2Fdirty.ckpt", headers=bad).status == 403
    assert files(folder.path) == before


def test_another_run_has_another_address_and_token(client: Client) -> None:
    other = Session()
    assert other.path != client.server.session.path and other.token != client.server.session.token
    assert len(other.token) >= 43, "256 bits"
    assert client.ask("GET", other.path, headers={"Cookie": f"ckpt={other.token}"}).status == 404


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}", "evil.example:{port}",
             "127.0.0.1:{port}.evil.example", "localhost.evil.example:{port}", "[::1]:{port}"]
)  # fmt: skip
def test_a_name_that_leads_here_is_not_ours(client: Client, host: str | None) -> None:
    """DNS rebinding: a page of another host that has its name resolved to 127.0.0.1."""
    said = host.format(port=client.server.port) if host is not None else None
    path = client.server.session.path
    assert client.ask("GET", path, headers={"Host": said}).status in (400, 403)
    assert client.ask(
        "POST", path + "read", b"", headers={"Host": said, "Origin": f"http://{said}"}
    ).status in (
        400,
        403,
    )


def test_localhost_is_ours(client: Client) -> None:
    host = f"localhost:{client.server.port}"
    assert client.ask("GET", client.server.session.path, headers={"Host": host}).status == 200
    same: dict[str, str | None] = {"Host": host, "Origin": f"http://{host}"}
    assert client.post("check", same, text="", file="").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_what_has_an_effect_comes_from_a_page_of_ours(
    client: Client, folder: Folder, headers: dict[str, str | None]
) -> None:
    before = files(folder.path)
    said = {k: v and v.format(port=client.server.port) for k, v in headers.items()}
    for view in POSTS:
        answer = client.post(view, said, file="work/dirty.ckpt", folder="work", name="x.safetensors")
        assert answer.status == 403, view
    assert files(folder.path) == before
    assert client.get("api/job", id="1").status == 422, "no work was begun"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_cannot_even_ask(client: Client, site: str) -> None:
    """As an image, a frame or a script of another page would, were the cookie sent along."""
    path = client.server.session.path
    assert client.ask("GET", path, headers={"Sec-Fetch-Site": site}).status == 403
    assert client.ask("GET", path + "static/page.js", headers={"Sec-Fetch-Site": site}).status == 403
    other = {"Sec-Fetch-Site": None, "sec-fetch-site": site}  # names of headers have no case
    assert client.ask("GET", path, headers=other).status == 403


def test_no_get_has_an_effect(client: Client, folder: Folder) -> None:
    before = files(folder.path)
    fields = {
        "file": "work/dirty.ckpt",
        "folder": "work",
        "name": "x.safetensors",
        "id": "1",
        "base": "NEW SD-tiny",
    }
    for view in POSTS:
        assert client.get(view, **fields).status in (200, 404, 422), view
    assert files(folder.path) == before
    assert list(client.server.site.jobs.all()) == []


def test_what_is_no_form_is_not_taken(client: Client) -> None:
    path = client.server.session.path + "check"
    for headers, body, status in (
        ({"Content-Type": "text/plain"}, b"text=", 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"text=", 415),
        ({"Content-Type": None}, b"text=", 415),
        ({"Content-Length": None, "Transfer-Encoding": "chunked"}, None, 411),
        ({"Content-Length": "-1"}, None, 411),
        ({"Content-Length": "1e3"}, None, 411),
        ({"Content-Length": str(MAX_BODY + 1)}, None, 413),
        ({"Content-Length": "9" * 4000}, None, 413),
        ({}, b"text=%FF%FE", 400),
        ({}, b"text=\xc3\xa9", 400),
        ({}, b"&".join(b"a%d=1" % n for n in range(1000)), 400),
    ):
        said: dict[str, str | None] = dict(headers)  # type: ignore[call-overload]
        assert client.ask("POST", path, body, said).status == status, headers


def test_a_slow_client_is_not_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with socket.create_connection((HOST, client.server.port)) as slow:
        slow.settimeout(10)
        slow.sendall(b"GET / HTTP/1.1\r\n")
        began = time.monotonic()
        gone = False
        while not gone and time.monotonic() < began + 5:  # a byte now and then is no progress
            try:
                slow.sendall(b"X")
                time.sleep(0.1)
                slow.setblocking(False)
                gone = slow.recv(100) == b""
            except BlockingIOError:
                pass
            except OSError:
                gone = True
            slow.setblocking(True)
        assert gone
    assert client.get("").status == 200


def test_connections_are_bounded(client: Client) -> None:
    held = [socket.create_connection((HOST, client.server.port)) for _ in range(MOST_CONNECTIONS)]
    try:
        deadline = time.monotonic() + 10
        while client.server._room._value and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises((http.client.HTTPException, OSError)):
            client.get("")
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 10
    while client.server._room._value < MOST_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.get("").status == 200


@pytest.mark.parametrize(
    "reference",
    [
        "work/../store", "work/../../etc/passwd", "/etc/passwd", "etc/passwd", "../work/dirty.ckpt", "..",
        ".", "work//etc/passwd", "work/\0", "work/link.ckpt", "work/out/other.ckpt", "work/./../x.ckpt",
    ],
)  # fmt: skip
def test_paths_stay_in_the_folders(folder: Folder, reference: str) -> None:
    outside = folder.path.parent / "elsewhere"
    outside.mkdir()
    (outside / "other.ckpt").write_bytes((folder / "dirty.ckpt").read_bytes())
    (outside / "secret.toml").write_text("format = 1\nsecret = 42\n")
    (folder / "link.ckpt").symlink_to(outside / "other.ckpt")
    (folder / "out").symlink_to(outside)
    before = files(folder.path.parent)
    with served(folder) as client:
        assert (
            "link.ckpt" not in client.get("").text and "2 links out of these folders" in client.get("").read
        )
        for view, name in (("report", "file"), ("prune", "file"), ("extract", "file"), ("recipe", "file"),
                           ("replace", "base"), ("inbox", "inbox"), ("api/inspect", "file"),
                           ("api/plan", "recipe"), ("api/prune", "file")):  # fmt: skip
            answer = client.get(view, **{name: reference})
            assert answer.status == 422, view
            assert "42" not in answer.text
        for view, fields in (
            ("prune", {"file": "work/dirty.ckpt", "folder": reference, "name": "x.safetensors"}),
            ("extract", {"file": "work/dirty.ckpt", "folder": reference, "component": "VAE-tiny"}),
            ("save", {"folder": reference, "name": "x.toml", "text": ""}),
            ("inbox", {"inbox": reference, "into": "work"}),
            ("inbox", {"inbox": "work", "into": reference}),
            ("diff", {"a": reference, "b": reference}),
        ):
            assert client.post(view, **fields).status == 422, view
    assert {f for f in files(folder.path.parent) if not f.startswith("store")} == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x.ckpt", "a/b.ckpt", "a\\b.ckpt", "x\0.ckpt", "\u202ex.ckpt"]
)
def test_names_of_new_files_are_plain(client: Client, folder: Folder, name: str) -> None:
    before = files(folder.path.parent)
    sent = client.post("prune", file="work/dirty.ckpt", folder="work", name=name)
    assert sent.status == 422
    assert client.post("save", folder="work", name=name, text="x").status in (303, 422)
    made = files(folder.path.parent) - before
    assert all(f in ("work/.toml", "work/..toml", "work/...toml") or f.startswith("store") for f in made), (
        made
    )


def test_a_link_is_not_written_through(folder: Folder) -> None:
    outside = folder.path.parent / "keep.toml"
    outside.write_text("format = 1\n")
    (folder / "link.toml").symlink_to(outside)
    with served(folder) as client:
        assert client.post("save", file="work/link.toml", text="changed", seen="").status == 422
        assert client.get("recipe", file="work/link.toml").status == 422
    assert outside.read_text() == "format = 1\n"


def test_hostile_names_are_escaped(folder: Folder) -> None:
    """Names of files and of tensors, metadata and recipes: whatever they hold, it is text."""
    bad = "<img src=x onerror=alert(1)>\"'&amp;\u202e.ckpt"
    (folder / "dirty.ckpt").rename(folder / bad)
    from builder.formats.write_safetensors import write
    from builder.tensors.lazy import DType, MemoryTensor

    evil = "</script><script>alert(1)</script>"
    write(
        folder / "evil.safetensors",
        {evil: MemoryTensor(DType.U8, (1,), b"a")},
        metadata={evil: evil, "format": "pt"},
        durable=False,
    )
    (folder / "evil.toml").write_text(f'format = 1\nname = "{evil}</textarea>"\n')
    reference = f"work/{bad}"
    with served(folder) as client:
        pages = [
            client.get(""),
            client.get("report", file=reference),
            client.get("prune", file=reference),
            client.get("extract", file=reference),
            client.get("replace", base=reference),
            client.get("report", file="work/evil.safetensors"),
            client.get("prune", file="work/evil.safetensors"),
            client.get("recipe", file="work/evil.toml"),
            client.get("inbox", inbox="work"),
            client.get("report", file=f"work/{evil}"),
            client.get(evil),
            client.get("", q=evil),
            client.get("merge", op=evil, **{"in.a": reference}),
            client.post("check", text=evil, file=""),
        ]
        pages += [client.job("read")[1], client.get("jobs")]
        for page in pages:
            text = re.sub(r' value="[^"<>]*"', "", page.text)  # which goes back as it is
            assert "<img" not in text and "<script>" not in text and "\u202e" not in text
            assert page.text.count("</textarea>") <= 1
        assert "\\u202e" in pages[0].text, "what turns text around is shown as what it is"


def test_what_is_no_checkpoint_is_not_shown(folder: Folder) -> None:
    (folder / "secret.ckpt").write_text("password = hunter2\n" * 20)
    with served(folder) as client:
        for page in (client.get(""), client.get("report", file="work/secret.ckpt")):
            assert "hunter2" not in page.text


def test_a_folder_is_given_once_and_has_to_be_one(folder: Folder) -> None:
    from builder.base.errors import UsageError
    from builder.web.folders import Folders

    with pytest.raises(UsageError):
        Folders([folder / "dirty.ckpt"])
    twice = Folders([folder.path, folder.path / "."])
    assert list(twice.roots) == ["work"]
    (folder / "work").mkdir()
    assert list(Folders([folder.path, folder / "work"]).roots) == ["work", "work-2"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_holds_nothing_up(folder: Folder) -> None:
    os.mkfifo(folder / "pipe.ckpt")
    os.mkfifo(folder / "pipe.toml")
    with served(folder) as client:
        assert client.get("").status == 200
        assert client.get("report", file="work/pipe.ckpt").status == 422
        assert client.get("recipe", file="work/pipe.toml").status == 422
