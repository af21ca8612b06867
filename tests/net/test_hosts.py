"""Hugging Face and Civitai: what they state, what they ask for, and what is here already."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from builder.base.addresses import parse_address
from builder.base.errors import CkptError, FetchError, SourceError, render
from builder.base.files import parse_json
from builder.sources.net.acquire import fetch, lookup_by_hash, resolve
from builder.sources.net.client import Session
from builder.sources.net.hosts import Pin, download_url, hugging_face_cache
from builder.sources.net.wire import Limits
from builder.store import Store
from tests.help.servers import COMMIT, File, Server, civitai, hugging_face, in_turn, redirects, says

DATA = random.Random(2).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = Limits(connect=5, read=5, attempts=3, backoff=0.01, longest_wait=1.0, segment=1 << 16)


class Place:
    """A hub, Civitai and a storage of their own, and an environment that leads there."""

    def __init__(self, hub: Server, site: Server, storage: Server, folder: Path) -> None:
        self.hub, self.site, self.storage, self.folder = hub, site, storage, folder
        self.store = Store(folder / "store")
        self.environ = {
            "CKPT_ALLOW_PRIVATE": "1",
            "HF_ENDPOINT": hub.url(),
            "CIVITAI_ENDPOINT": site.url(),
            "HF_HOME": str(folder / "hf"),
        }

    def session(self, offline: bool = False, **environ: str) -> Session:
        return Session(self.environ | environ, offline=offline, limits=QUICK)

    def resolve(self, address: str, **environ: str) -> Pin:
        with self.session(**environ) as session:
            return resolve(address, session=session)

    def fetch(
        self, *addresses: str, sha256: str | None = None, offline: bool = False, **environ: str
    ) -> bytes:
        with self.session(offline, **environ) as session:
            found = fetch(addresses, sha256=sha256, store=self.store, session=session, name="m")
        assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
        return found.path.read_bytes()

    def refused(self, *addresses: str, sha256: str | None = None, **environ: str) -> str:
        with pytest.raises(CkptError) as raised:
            self.fetch(*addresses, sha256=sha256, **environ)
        return "\n".join(render(p) for p in raised.value.problems)

    @property
    def requests(self) -> int:
        return len(self.hub.seen) + len(self.site.seen) + len(self.storage.seen)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Server() as hub, Server() as site, Server() as storage:
        yield Place(hub, site, storage, tmp_path)


# Hugging Face.


def test_the_hub_states_digest_size_and_commit(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/name", "vae/m.safetensors", DATA)
    pin = place.resolve("hf://org/name/vae/m.safetensors")
    assert pin == Pin(f"hf://org/name@{COMMIT}/vae/m.safetensors", SHA256, len(DATA), COMMIT)
    assert place.resolve(pin.url) == pin
    assert {s.method for s in place.hub.seen} == {"HEAD"} and not place.storage.seen


def test_a_file_outside_lfs_has_a_commit_but_no_digest(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/name", "m.bin", DATA, lfs=False)
    pin = place.resolve("hf://org/name/m.bin")
    assert (pin.sha256, pin.revision) == (None, COMMIT)
    assert place.fetch("hf://org/name/m.bin") == DATA


def test_a_renamed_repository_is_followed(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/new", "m.bin", DATA)
    place.hub.routes["/org/old/resolve/main/m.bin"] = redirects("/org/new/resolve/main/m.bin", 307)
    assert place.resolve("hf://org/old/m.bin").sha256 == SHA256


def test_a_file_of_the_hub_is_downloaded(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/name", "m.bin", DATA, token="hf_secret")
    assert place.fetch("hf://org/name/m.bin", HF_TOKEN="hf_secret") == DATA
    gets = [s for s in place.hub.seen if s.method == "GET"]
    assert len(gets) == 1, "the storage is asked directly for later parts"
    assert all(s.headers.get("Authorization") == "Bearer hf_secret" for s in place.hub.seen)
    assert place.storage.seen and not any("Authorization" in s.headers for s in place.storage.seen)


def test_a_gated_file_says_what_to_do(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/name", "m.bin", DATA, token="hf_secret")
    said = place.refused("hf://org/name/m.bin", sha256=SHA256)
    assert "answers 401, login needed: “Access to model org/name is restricted.”" in said
    assert "hint: accept the model's terms on its page, then set `HF_TOKEN`" in said
    said = place.refused("hf://org/name/m.bin", sha256=SHA256, HF_TOKEN="hf_wrong")
    assert "hint: the token in `HF_TOKEN` does not open it" in said and "hf_wrong" not in said
    with pytest.raises(FetchError, match="cannot be resolved"):
        place.resolve("hf://org/name/m.bin")


def test_another_kind_of_host_is_noticed(place: Place) -> None:
    place.hub.prefixes["/"] = says(200, b"hello")
    with pytest.raises(FetchError) as raised:
        place.resolve("hf://org/name/m.bin")
    assert "without a commit" in raised.value.problems[0].evidence[0]


def test_offline_mode_of_the_hub_is_honoured(place: Place) -> None:
    assert "`HF_HUB_OFFLINE` is set" in place.refused(
        "hf://org/name/m.bin", sha256=SHA256, HF_HUB_OFFLINE="1"
    )
    assert place.requests == 0


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_the_hub_s_tools_have_it(environ: dict[str, str], folder: str) -> None:
    assert hugging_face_cache(environ) == Path(folder)


def test_links_out_of_the_cache_are_not_followed(place: Place) -> None:
    snapshot = place.folder / "hf/hub/models--org--name/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place.folder / "secret").write_bytes(b"secret")
    (snapshot / "m.bin").symlink_to(place.folder / "secret")
    hugging_face(place.hub, place.storage, "org/name", "m.bin", DATA, lfs=False)
    assert place.fetch(f"hf://org/name@{COMMIT}/m.bin") == DATA


def test_a_path_that_no_file_has_is_no_failure_of_the_cache(place: Place) -> None:
    said = place.refused(f"hf://org/name@{COMMIT}/{'m' * 3000}", sha256=SHA256)
    assert "answers 404" in said


OFFICIAL = """
import sys
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
about = get_hf_file_metadata(hf_hub_url("org/name", "vae/m.safetensors"))
print(about.commit_hash, about.etag, about.size)
print(hf_hub_download("org/name", "vae/m.safetensors"))
"""


def official_client(place: Place) -> list[str]:
    """The official client downloads a file into its cache; its lines of output."""
    pytest.importorskip("huggingface_hub")
    clean = {
        k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")
    }
    environ = clean | place.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL], env=environ, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_official_client_and_ours_agree_and_share_a_cache(place: Place) -> None:
    hugging_face(place.hub, place.storage, "org/name", "vae/m.safetensors", DATA)
    about, path = official_client(place)
    pin = place.resolve("hf://org/name/vae/m.safetensors")
    assert about.split() == [pin.revision, pin.sha256, str(pin.size)]
    assert Path(path).read_bytes() == DATA
    before = place.requests
    assert place.fetch("hf://org/other/x.bin", sha256=SHA256) == DATA, "by digest, from any repository"
    assert place.fetch(pin.url, sha256=SHA256, offline=True) == DATA
    assert place.requests == before
    assert not list((place.folder / "store").rglob("*.part"))
    blob = Path(path).resolve()
    blob.write_bytes(b"damaged")
    assert place.fetch(pin.url, sha256=SHA256) == DATA
    assert place.requests > before


# Civitai.


def test_civitai_states_digest_and_size(place: Place) -> None:
    civitai(place.site, place.storage, 128713, 95, DATA)
    pin = place.resolve("civitai:128713")
    assert pin == Pin("civitai:128713@95", SHA256, len(DATA), "128713")
    assert place.resolve("urn:air:sd1:checkpoint:civitai:7@128713+95") == pin
    assert place.resolve("sd1:model:civitai:7.safetensor") == pin
    assert not place.storage.seen


def test_the_file_that_is_meant_is_chosen(place: Place) -> None:
    others = [
        {"id": 93, "name": "m.ckpt", "metadata": {"format": "PickleTensor"}, "hashes": {"SHA256": "A" * 64}},
        {"id": 94, "name": "m.vae.pt", "hashes": {}, "sizeKB": 0.3},
    ]
    civitai(place.site, place.storage, 1, 95, DATA, others=others)
    assert place.resolve("civitai:1").url == "civitai:1@95", "the primary one"
    assert place.resolve("civitai:1@93").sha256 == "a" * 64
    for name in ("ckpt", "PickleTensor"):
        assert place.resolve(f"urn:air:sd1:checkpoint:civitai:7@1.{name}").url == "civitai:1@93"
    assert place.resolve("civitai:1@94") == Pin("civitai:1@94", None, None, "1"), "a rounded size is none"
    with pytest.raises(FetchError) as raised:
        place.resolve("civitai:1@99")
    assert "is not among the files of version 1" in raised.value.problems[0].evidence[0]


def test_a_file_of_civitai_is_downloaded(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA, token="cv_secret")
    for variable in ("CIVITAI_TOKEN", "CIVITAI_API_TOKEN"):
        assert place.fetch("civitai:1", **{variable: "cv_secret"}) == DATA
        (place.store.root / "downloads" / SHA256).unlink()
    asked = [s.path for s in place.site.seen if "download" in s.path]
    assert set(asked) == {"/api/download/models/1?fileId=95"}
    assert not any("Authorization" in s.headers for s in place.storage.seen)


def test_the_name_that_a_host_gives_is_made_safe(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    with place.session() as session:
        assert fetch(["civitai:1"], store=place.store, session=session).name == "model v1.safetensors"


def test_a_file_behind_a_login_says_what_to_do(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA, token="cv_secret")
    said = place.refused("civitai:1")
    assert "answers 401, login needed: “The creator of this asset requires you to be logged in”" in said
    assert "hint: set `CIVITAI_TOKEN` to a token of your Civitai account" in said
    assert "cv_wrong" not in place.refused("civitai:1", CIVITAI_TOKEN="cv_wrong")


def test_a_login_page_instead_of_a_model(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    place.site.routes["/api/download/models/1"] = redirects("/login?returnUrl=x")
    place.site.routes["/login"] = says(200, "<!DOCTYPE html><title>Login | Civitai</title>")
    said = place.refused("civitai:1")
    assert "sends an HTML page instead of the file: “Login | Civitai”" in said
    assert "set `CIVITAI_TOKEN`" in said


def test_a_source_without_address_is_looked_up(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    with place.session() as session:
        pin = lookup_by_hash(SHA256, session=session)
        assert pin == Pin("civitai:1@95", SHA256, len(DATA), "1")
        assert lookup_by_hash("0" * 64, session=session) is None
    assert place.fetch(sha256=SHA256) == DATA
    assert "nothing is known of it" in place.refused(sha256="0" * 64)


def test_what_is_found_by_a_digest_must_have_it(place: Place) -> None:
    place.site.prefixes["/api/v1/model-versions/by-hash/"] = says(
        200, '{"id": 1, "files": [{"id": 2, "hashes": {"SHA256": "' + "B" * 64 + '"}}]}'
    )
    with place.session() as session:
        assert lookup_by_hash(SHA256, session=session) is None


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{}",
        "<html>",
        '{"id": "x", "files": [{"id": 1}]}',
        '{"id": 1, "files": 5}',
        "[" * 99_999,
        '{"a":' * 3_000_000,
        "[]," * 1_000_000,
        '{"id": 1, "files": ' + "[" * 100 + "]" * 100 + "}",
        '{"id": 1, "files": [], "name": "' + "x" * (4 << 20) + '"}',
        '{"id": 1' + "0" * 5000 + "}",
        '{"id": 1, "files": [{"id": -1}]}',
        '{"id": 1, "files": [{"id": true, "hashes": 3}]}',
    ],
)
def test_answers_that_make_no_sense_are_failures(place: Place, body: str) -> None:
    place.site.routes["/api/v1/model-versions/1"] = says(200, body)
    with pytest.raises(FetchError, match="cannot be resolved"):
        place.resolve("civitai:1")


def test_answers_cost_memory_and_time_in_proportion(place: Place) -> None:
    """Fifteen megabytes of lists within lists took 730 MB; four are read, and nothing is built of them."""
    deep, wide, words = (
        b"[" * (15 << 20),
        b"[" + b"[]," * (1 << 20) + b"[]]",
        b'["' + b'\\\\\\"' * (1 << 20) + b'"]',
    )
    before = time.process_time()
    tracemalloc.start()
    for answer in (deep, deep[: 4 << 20], wide, words):
        with suppress(ValueError):
            parse_json(answer)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(words)
    tracemalloc.stop()
    assert time.process_time() - before < 10
    assert parse_json(b'{"a": "[[[\\"[", "b": [{}]}') == {"a": '[[["[', "b": [{}]}


def test_civitai_has_several_hosts(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    pin = place.resolve("https://civitai.red/api/download/models/1")
    assert pin.url == "https://civitai.red/api/download/models/1?fileId=95", "it stays at its host"
    assert place.fetch(pin.url) == DATA
    with Session({}) as session:
        for host in ("civitai.com", "civitai.red", "civitai.green"):
            address = parse_address(f"https://{host}/api/download/models/1?fileId=2")
            assert download_url(address, session) == f"https://{host}/api/download/models/1?fileId=2"
            known = session.host_of(f"https://{host}/")
            assert known is session.civitai
        for url in (
            "https://civitai.red:444/",
            "http://civitai.red/",
            "https://x.civitai.red/",
            "https://civitai.re/",
        ):
            assert session.host_of(url) is None


def test_a_busy_civitai_is_asked_again(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    route = place.site.routes["/api/v1/model-versions/1"]
    place.site.routes["/api/v1/model-versions/1"] = in_turn(says(503), says(429, Retry_After="0"), route)
    assert place.resolve("civitai:1").sha256 == SHA256


def test_a_host_that_states_another_digest_than_it_sends(place: Place) -> None:
    civitai(place.site, place.storage, 1, 95, DATA)
    place.storage.routes[f"/bucket/{SHA256}"] = File(bytes(len(DATA)))
    with pytest.raises(SourceError, match="is not what was pinned"):
        place.fetch("civitai:1")


def test_secrets_are_nowhere(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    hugging_face(place.hub, place.storage, "org/name", "m.bin", DATA, token="hf_secret")
    civitai(place.site, place.storage, 1, 95, DATA, token="cv_secret")
    tokens = {"HF_TOKEN": "hf_secret", "CIVITAI_TOKEN": "cv_secret"}
    pins = [place.resolve(a, **tokens) for a in ("hf://org/name/m.bin", "civitai:1")]
    place.storage.routes.clear()
    place.storage.prefixes["/"] = says(500, "hf_secret cv_secret http://s/x?X-Amz-Signature=secret-signature")
    said = place.refused(*[p.url for p in pins], sha256=SHA256, **tokens)
    assert "***" in said
    kept = [p.read_text("utf-8", "replace") for p in place.folder.rglob("*") if p.is_file()]
    everything = "\n".join([said, *map(repr, pins), *kept, *capfd.readouterr()])
    for secret in ("hf_secret", "cv_secret", "secret-signature"):
        assert secret not in everything
