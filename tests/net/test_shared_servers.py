"""Shared stores on servers: bazel-remote's HTTP, with all that can go wrong there, and an S3."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from builder.sources.net import buckets
from builder.sources.net.wire import Limits
from builder.store import Store
from builder.store.shared import Shared, Unavailable
from tests.help.bazel import BazelRemote
from tests.help.building import Folder
from tests.help.servers import Route, Server, dribble, endless, floods, garbage, redirects, says, silent
from tests.store.test_shared import elsewhere
from tests.store.test_store import A, Listener, content, model, opened, put

QUICK = Limits(connect=1, headers=0.5, read=0.5, slowest=64 << 10, patience=0.5)
SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def far(server: Server) -> BazelRemote:
    return BazelRemote(server)


def shared(far: BazelRemote, heard: Listener, *, token: str = "", writing: bool = True) -> Shared:
    environment = {"CKPT_SHARED_TOKEN": token}
    return Shared(
        lambda: buckets.BazelRemote(far.url, environment, QUICK), far.url, writing=writing, reporter=heard
    )


def filled(far: BazelRemote, path: Path) -> None:
    """Have one machine put there what an action made."""
    with Store(path, shared=shared(far, Listener(), token=far.token or "")) as store:
        store.share(A, put(store))


def test_what_one_made_another_has(far: BazelRemote, tmp_path: Path) -> None:
    filled(far, tmp_path / "first")
    assert {k for k, _ in far.held} == {"ac", "cas"} and len(far.held) == 3
    with Store(tmp_path / "second", shared=shared(far, Listener(), writing=False)) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None
        with closing(opened(store, made)) as found:
            assert content(found.tensors) == content(model())
        for _ in range(3):  # what is known is not asked again
            assert store.lookup(A, "UNET-v1") == made
    assert far.asked("PUT") == 3


def test_a_blob_that_is_gone_by_then_is_not_put(far: BazelRemote, tmp_path: Path) -> None:
    with (
        closing(buckets.BazelRemote(far.url, {}, QUICK)) as bucket,
        pytest.raises(Unavailable, match="No such"),
    ):
        bucket.put(f"cas/{A}", tmp_path / "gone")
    assert not far.held


def test_a_token_goes_to_its_own_host_only(far: BazelRemote, tmp_path: Path) -> None:
    far.token = SECRET
    filled(far, tmp_path / "first")
    assert len(far.held) == 3
    heard = Listener()
    with Server() as other:
        far.instead["ac"] = redirects(other.url("/ac/x"))
        with Store(tmp_path / "second", shared=shared(far, heard, token=SECRET)) as store:
            assert store.lookup(A, "UNET-v1") is None
        assert not other.seen
    assert len(heard.warnings) == 1 and SECRET not in str(heard.warnings)


def test_who_may_not_is_told_once(far: BazelRemote, tmp_path: Path) -> None:
    far.token, heard = SECRET, Listener()
    with Store(tmp_path / "first", shared=shared(far, heard)) as store:
        store.share(A, put(store))
        assert store.lookup("b" * 64, "UNET-v1") is None
    assert [w.fact for w in heard.warnings] == [
        "the shared store is not used any more: what it has is made here"
    ]
    assert len(far.server.seen) == 1


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "another": lambda body: bytes(len(body)),
    "a flipped bit": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "cut short": lambda body: body[:-9],
    "longer": lambda body: body + b"x" * 9,
    "nothing": lambda body: b"",
    "a page": lambda body: b"<html>log in</html>",
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("kind", ["ac", "cas"])
def test_what_is_not_right_is_not_used(kind: str, what: str, far: BazelRemote, tmp_path: Path) -> None:
    filled(far, tmp_path / "first")
    far.lies[kind] = WRONG[what]
    heard = Listener()
    with Store(tmp_path / "second", shared=shared(far, heard), reporter=heard) as store:
        made = store.lookup(A, "UNET-v1")
        if (kind, what) == ("ac", "longer"):
            return  # fields that a cache may add
        assert made is None or store.open(made.digest) is None
        assert not list((tmp_path / "second").rglob("*.safetensors"))
    assert len(heard.warnings) == (kind == "cas")


def cut_off(handler: object) -> None:
    """A body that ends before its length."""
    from tests.help.servers import Handler

    assert isinstance(handler, Handler)
    handler.send_response(200)
    handler.send_header("Content-Length", "932")
    handler.end_headers()
    handler.send(b"x" * 400)
    handler.cut()


FAILS: dict[str, Route] = {
    "slow": dribble,
    "silent": silent,
    "no HTTP": garbage,
    "cut off": cut_off,
    "an error": says(500, b"\x1b[31moops"),
    "busy": says(503, Retry_After="3600"),
    "no access": says(403),
    "elsewhere": redirects("http://127.0.0.2:1/"),
    "itself": redirects("/ac/" + "0" * 64),
    "without end": endless,
    "headers without end": floods(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("what", FAILS)
@pytest.mark.parametrize("kind", ["ac", "cas"])
def test_what_fails_is_said_once_and_soon_over(
    kind: str, what: str, far: BazelRemote, tmp_path: Path
) -> None:
    filled(far, tmp_path / "first")
    far.instead[kind] = FAILS[what]
    heard, began = Listener(), time.monotonic()
    with Store(tmp_path / "second", shared=shared(far, heard), reporter=heard) as store:
        for action in (A, "b" * 64):
            made = store.lookup(action, "UNET-v1")
            assert made is None or store.open(made.digest) is None
        store.share(A, put(store))
    assert time.monotonic() - began < 5
    assert len(heard.warnings) <= 1, heard.warnings
    assert "\x1b" not in str(heard.warnings)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    work = Folder.below(tmp_path).tiny()
    said = work("build", "tiny.toml", "--store", f"http://127.0.0.1:{port}", "--store-write")
    assert said.code == 0 and said.err.count("is not used any more") == 1
    assert (work / "tiny.safetensors").exists()


def test_an_upload_that_is_not_taken(far: BazelRemote, tmp_path: Path) -> None:
    """Who sends does not wait for ever either."""

    def deaf(handler: object) -> None:
        time.sleep(2)

    heard, began = Listener(), time.monotonic()
    far.server.prefixes = {"/cas/": deaf, "/": far}  # type: ignore[dict-item]
    with Store(tmp_path / "first", shared=shared(far, heard)) as store:
        store.share(A, put(store, size=20_000_000))
    assert time.monotonic() - began < 10 and len(heard.warnings) == 1


def test_builds_with_a_server(far: BazelRemote, tmp_path: Path) -> None:
    work = Folder.below(tmp_path).tiny()
    work.know("dirty.ckpt", "vae.safetensors")
    work.build("tiny.toml", "--store", far.url, "--store-write")
    other = elsewhere(work)
    assert other.build("tiny.toml", "--store", far.url)["made"] == []
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()
    far.lies["cas"] = WRONG["a flipped bit"]
    third = elsewhere(work, "third")
    said = third("build", "tiny.toml", "--store", far.url, "--json")
    assert len(said.json["made"]) == 3 and len(said.json["warnings"]) == 3
    assert (third / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()
    asked = len(far.server.seen)
    fourth = elsewhere(work, "fourth")
    fourth.build("tiny.toml", "--store", far.url, "--offline")
    assert len(far.server.seen) == asked


# -- an S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of one who uses an S3 of this machine, with a bucket in it."""
    for package in ("obstore", "moto", "flask", "flask_cors"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `pip install -e '.[dev]'`")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    running = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urlopen(Request(f"{endpoint}/models", method="PUT"), timeout=5).close()
                break
            except OSError:
                assert running.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
    finally:
        running.terminate()
        running.wait()
        log.close()


def test_an_s3(s3: dict[str, str], tmp_path: Path) -> None:
    url = "s3://models/shared"
    work = Folder.below(tmp_path).tiny()
    work = Folder(work.path, work.store, s3)
    work.know("dirty.ckpt", "vae.safetensors")
    work.build("tiny.toml", "--store", url, "--store-write")
    other = elsewhere(work)
    assert other.build("tiny.toml", "--store", url)["made"] == []
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()


def test_an_s3_whose_objects_are_others(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs of several ranges and parts, and what an object store gives that is not what was put there."""
    import obstore
    from obstore.store import from_url

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    heard = Listener()

    def there(writing: bool = True) -> Shared:
        url = "s3://models/others"
        return Shared(lambda: buckets.Objects(url, s3, buckets.LIMITS), url, writing=writing, reporter=heard)

    with Store(tmp_path / "first", shared=there()) as store:
        made = put(store, size=20_000_000)
        store.share(A, made)
    with Store(tmp_path / "second", shared=there(False), reporter=heard) as store:
        assert store.lookup(A, "UNET-v1") == made
        opened(store, made).close()
    direct = from_url("s3://models/others", client_options={"allow_http": True})
    names = [o["path"] for batch in obstore.list(direct, "cas") for o in batch]
    assert len(names) == 1
    for body in (bytes(40_000_924), b"short", b""):
        obstore.put(direct, names[0], body)
        with Store(tmp_path / f"third{len(body)}", shared=there(False), reporter=heard) as store:
            assert store.lookup(A, "UNET-v1") == made and store.open(made.digest) is None
    assert len(heard.warnings) == 3


def test_without_obstore_it_is_said_what_to_install(tmp_path: Path) -> None:
    if find_spec("obstore") is not None:
        pytest.skip("obstore is installed")
    work = Folder.below(tmp_path).tiny()
    said = work("build", "tiny.toml", "--store", "s3://models/x")
    assert said.code == 2 and "ckpt-build[remote]" in said.err
