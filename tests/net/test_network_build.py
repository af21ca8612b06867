"""Building from the network alone, on machines that have none of the files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generate import make
from builder.cli import terminal
from builder.formats import open_checkpoint
from builder.tensors.lazy import DType
from tests.help.building import ROOT, VAE, Folder, catalog, model, save, values
from tests.help.network import TOKEN, Net, bulky, dirty, downloads, hosts, saved, sha256, vae
from tests.help.servers import COMMIT, File, Handler, answer, civitai, hugging_face, says

ONE = """\
format = 1
name = "tiny"
base = "NEW VAE-tiny"
[sources.vae]
{vae}
[components]
VAE-tiny = "vae"
"""


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with hosts(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the recipe makes of the same files where they lie beside it."""
    with hosts(tmp_path_factory.mktemp("expected")) as net:
        (net.folder / "dirty.ckpt").write_bytes(dirty())
        (net.folder / "vae.safetensors").write_bytes(vae())
        net.write('file = "dirty.ckpt"', 'file = "vae.safetensors"')
        net.folder.build()
        return _tensors(net.folder)


def _tensors(folder: Folder, file: str = "tiny.safetensors") -> bytes:
    """All of a product but its header, which holds the recipe's digest."""
    data = (folder / file).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def _lock(folder: Folder) -> str:
    return (folder / "tiny.lock.toml").read_text()


def _one(net: Net, said: str) -> Folder:
    """A recipe of one small source."""
    net.folder.write("tiny.toml", ONE.format(vae=said))
    return net.folder


# -- from where


def test_a_recipe_of_addresses_builds_where_nothing_is(net: Net, expected: bytes) -> None:
    net.storage.routes |= {"/dirty.ckpt": File(dirty()), "/vae": File(vae())}
    net.write(f'urls = ["{net.storage.url("/dirty.ckpt")}"]', f'urls = ["{net.storage.url("/vae")}"]')
    first = net.folder
    assert first.build()["outputs"][0]["state"] == "written"
    assert _tensors(first) == expected
    assert downloads(first) == {sha256(dirty()), sha256(vae())}, "nothing else is left"
    asked = net.requests
    assert first.build()["outputs"][0]["state"] == "unchanged"
    assert set(first.states().values()) == {"known", "stored", "unchanged"}
    assert net.requests == asked, "nothing is asked for again"

    second = net.machine("second")
    assert second("build", "tiny.toml", "--locked").code == 0
    assert (second / "tiny.safetensors").read_bytes() == (first / "tiny.safetensors").read_bytes()
    assert _lock(second) == _lock(first)


def test_hugging_face(net: Net, expected: bytes) -> None:
    """A gated repository: the token goes to the hub alone, and the branch becomes a commit."""
    hugging_face(net.hub, net.storage, "org/model", "sub/dirty.ckpt", dirty(), token=TOKEN)
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(), lfs=False)
    net.write('urls = ["hf://org/model/sub/dirty.ckpt"]', 'urls = ["hf://org/vae/vae.safetensors"]')
    refused = net.folder("build", "tiny.toml")
    assert refused.code == 5
    assert "login needed: “Access to model org/model is restricted.”" in refused.err
    assert "set `HF_TOKEN` to a token of your Hugging Face account" in refused.err

    granted = net.machine("granted", HF_TOKEN=TOKEN)
    granted.build()
    assert _tensors(granted) == expected
    assert f'resolved = "hf://org/model@{COMMIT}/sub/dirty.ckpt"' in _lock(granted)
    assert f'resolved = "hf://org/vae@{COMMIT}/vae.safetensors"' in _lock(granted)
    assert all("Authorization" not in s.headers for s in net.storage.seen)


def test_a_pinned_source_is_resolved_too(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    folder = _one(net, f'sha256 = "{sha256(vae())}"\nurls = ["hf://org/vae/vae.safetensors"]')
    folder.build()
    assert f'resolved = "hf://org/vae@{COMMIT}/vae.safetensors"' in _lock(folder)


def test_what_hugging_faces_tools_have_downloaded_is_used(net: Net, tmp_path: Path) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    _one(net, 'urls = ["hf://org/vae/vae.safetensors"]')
    blob = tmp_path / "second" / "no-cache" / "models--org--vae" / "blobs" / sha256(vae())
    folder = net.machine("second")
    # `Folder` names the cache beside itself.
    blob = folder.path.parent / "no-cache" / "models--org--vae" / "blobs" / sha256(vae())
    blob.parent.mkdir(parents=True)
    blob.write_bytes(vae())
    folder.build()
    assert not net.storage.seen, "not downloaded again"
    assert not downloads(folder)
    assert f'resolved = "hf://org/vae@{COMMIT}/vae.safetensors"' in _lock(folder)

    shutil.copy(folder / "tiny.lock.toml", net.folder / "tiny.lock.toml")
    offline = net.machine("offline", HF_HUB_OFFLINE="1")
    asked = net.requests
    said = offline("build", "tiny.toml")
    assert said.code == 5 and "not asked: `HF_HUB_OFFLINE` is set" in said.err
    shutil.copytree(blob.parents[2], offline.path.parent / "no-cache")
    offline.build()
    assert net.requests == asked


@pytest.mark.parametrize(
    "address",
    ["civitai:42", "civitai:42@99", "urn:air:sd1:checkpoint:civitai:7@42", "air:sd1:checkpoint:civitai:7"],
)
def test_civitai(net: Net, address: str) -> None:
    civitai(net.civitai, net.storage, 42, 99, vae(), token=TOKEN)
    _one(net, f'urls = ["{address}"]')
    folder = net.machine("second", CIVITAI_API_TOKEN=TOKEN)
    folder.build()
    assert 'resolved = "civitai:42@99"' in _lock(folder)
    assert sha256(vae()) in _lock(folder)


def test_a_file_address_leaves_no_path_in_the_lock(net: Net, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "v.safetensors").write_bytes(vae())
    folder = _one(net, f'urls = ["file://{tmp_path}/models/v.safetensors"]')
    assert folder("build", "tiny.toml").code == 3, "a path of one machine is no source unless that is meant"
    folder.build("tiny.toml", "--allow-outside")
    assert str(tmp_path) not in _lock(folder)
    assert 'requested = "v.safetensors"' in _lock(folder)
    _one(net, 'urls = ["file:../../models/v.safetensors"]')
    relative = net.machine("second")
    assert relative("build", "tiny.toml", "--allow-outside").code == 5
    shutil.copytree(tmp_path / "models", relative.path.parent.parent / "models", dirs_exist_ok=True)
    assert relative("build", "tiny.toml", "--allow-outside").code == 0


def test_a_source_given_by_its_digest_alone(net: Net, tmp_path: Path) -> None:
    folder = _one(net, f'sha256 = "{sha256(vae())}"')
    civitai(net.civitai, net.storage, 42, 99, vae())
    folder.build()
    assert 'resolved = "civitai:42@99"' in _lock(folder)

    # The lock's size tells which of the files in a folder of models to hash, whatever they are called.
    models = tmp_path / "models"
    (models / "sub").mkdir(parents=True)
    (models / "other.safetensors").write_bytes(b"x")
    (models / "sub" / "renamed.bin").write_bytes(vae())
    asked = net.requests
    second = net.machine("second", CKPT_MODELS=str(models))
    assert second.states()["source vae"] == "hash", "a plan reads no file whole"
    second.build()
    assert net.requests == asked and not downloads(second)

    net.civitai.routes.clear()
    unknown = net.machine("third")
    (unknown / "tiny.lock.toml").unlink()
    said = unknown("build", "tiny.toml")
    assert said.code == 5
    assert (
        "Civitai: nothing is known of it" in said.err and "give the source an address in `urls`" in said.err
    )


def test_addresses_are_tried_in_order(net: Net) -> None:
    net.storage.routes |= {
        "/page": says(200, "<!doctype html><title>Log in</title>", Content_Type="text/html"),
        "/other": File(vae(seed=9)),
        "/right": File(vae()),
    }
    urls = [net.storage.url(p) for p in ("/gone", "/page", "/other", "/right")]
    folder = _one(net, f'sha256 = "{sha256(vae())}"\nurls = {json.dumps(urls)}')
    folder.build()
    assert f'resolved = "{urls[-1]}"' in _lock(folder)
    assert downloads(folder) == {sha256(vae())}


def test_every_address_and_why_it_failed(net: Net) -> None:
    net.storage.routes |= {
        "/page": says(200, "<!doctype html><title>Log in</title>", Content_Type="text/html"),
        "/json": says(200, '{"error": "Model archived"}', Content_Type="application/json"),
        "/410": says(410, "taken down"),
    }
    urls = [*(net.storage.url(p) for p in ("/404", "/page", "/json", "/410")), "hf://org/none/x.ckpt"]
    said = _one(net, f"urls = {json.dumps(urls)}")("build", "tiny.toml")
    assert said.code == 5
    for url in urls:
        assert url in said.err
    for words in ("404, not there", "an HTML page", "“Log in”", "“Model archived”", "“taken down”"):
        assert words in said.err
    assert not (net.folder / "tiny.safetensors").exists() and not (net.folder / "tiny.lock.toml").exists()
    assert not downloads(net.folder)


def test_downloads_count_for_the_cap_of_the_store(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.workspace.STORE_SIZE", len(vae()) + 30_000)
    net.storage.routes |= {"/one": File(vae()), "/two": File(vae(seed=9))}
    folder = _one(net, f'urls = ["{net.storage.url("/one")}"]')
    folder.build()
    assert downloads(folder) == {sha256(vae())}
    for path in folder.store.rglob("*"):
        os.utime(path, (1, 1))
    (folder / "tiny.lock.toml").unlink()
    _one(net, f'urls = ["{net.storage.url("/two")}"]').build()
    assert downloads(folder) == {sha256(vae(seed=9))}, "the older one had to go"


@pytest.mark.parametrize("option", ["--offline", "--frozen"])
def test_without_the_network(net: Net, option: str) -> None:
    net.storage.routes["/vae"] = File(vae())
    folder = _one(net, f'urls = ["{net.storage.url("/vae")}"]')
    said = folder("build", "tiny.toml", "--offline")
    assert said.code == 5 and "the network is off" in said.err and net.storage.url("/vae") in said.err
    assert net.requests == 0
    folder.build()
    (folder / "tiny.safetensors").unlink()
    shutil.rmtree(folder.store / "components")
    asked = net.requests
    assert folder("build", "tiny.toml", option).code == 0, "what was downloaded is there"
    assert net.requests == asked


# -- what is not what it should be


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_another_file_than_the_pinned_one(net: Net, suffix: str) -> None:
    net.storage.routes[f"/vae.{suffix}"] = File(vae(seed=9))
    folder = _one(net, f'sha256 = "{sha256(vae())}"\nurls = ["{net.storage.url(f"/vae.{suffix}")}"]')
    said = folder("build", "tiny.toml")
    assert said.code == 6
    assert "`vae` is not what was pinned" in said.err
    assert sha256(vae()) in said.err and sha256(vae(seed=9)) in said.err
    assert not downloads(folder)
    assert not (folder / "tiny.safetensors").exists() and not (folder / "tiny.lock.toml").exists()


def test_a_host_that_states_another_digest_sends_nothing(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(seed=9))
    folder = _one(net, f'sha256 = "{sha256(vae())}"\nurls = ["hf://org/vae/vae.safetensors"]')
    said = folder("build", "tiny.toml")
    assert said.code == 6 and sha256(vae(seed=9)) in said.err
    assert not net.storage.seen


def test_a_lock_pins_what_a_recipe_does_not(net: Net) -> None:
    """An address that gives another file now: the build fails until the pin is moved on purpose."""
    net.storage.routes["/vae"] = File(vae())
    _one(net, f'urls = ["{net.storage.url("/vae")}"]').build()
    before = _lock(net.folder)
    net.storage.routes["/vae"] = File(vae(seed=9))
    second = net.machine("second")
    said = second("build", "tiny.toml")
    assert said.code == 6 and "`ckpt lock --upgrade` takes it as it is now" in said.err
    assert _lock(second) == before and not downloads(second)
    assert net.folder.build()["outputs"][0]["state"] == "unchanged", "the pinned file is here still"

    moved = second("lock", "tiny.toml", "--upgrade", "vae")
    assert moved.code == 0, moved.err
    assert f"source `vae`: sha256: {sha256(vae())[:12]}… became {sha256(vae(seed=9))[:12]}…" in moved.out
    assert second("build", "tiny.toml").code == 0


def test_a_commit_is_built_from_when_the_branch_has_moved(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    _one(net, 'urls = ["hf://org/vae/vae.safetensors"]').build()
    moved = "f" * 40
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(seed=9), commit=moved)
    second = net.machine("second")
    assert second("build", "tiny.toml", "--locked").code == 0, "the old commit is still served"
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()

    del net.hub.routes[f"/org/vae/resolve/{COMMIT}/vae.safetensors"]
    third = net.machine("third")
    said = third("build", "tiny.toml")
    assert said.code == 6, "the commit is gone, and the branch has another file"
    assert f"hf://org/vae@{COMMIT}/vae.safetensors: " in said.err and "404" in said.err


# -- parts of files


PARTS = """\
format = 1
name = "tiny"
base = "{base}"
[sources.bulky]
urls = ["{url}"]
[sources.vae]
file = "vae.safetensors"
[components]
{components}
"""


def _in_parts(net: Net, components: dict[str, str], base: str = "NEW SD-tiny") -> Net:
    lines = "\n".join(f'{c} = "{s}"' for c, s in components.items())
    url = net.storage.url("/bulky.safetensors")
    net.folder.write("tiny.toml", PARTS.format(base=base, url=url, components=lines))
    (net.folder / "vae.safetensors").write_bytes(vae())
    return net


ALONE = 'format = 1\nname = "tiny"\nbase = "NEW VAE-tiny"\ncomponents.VAE-tiny = "bulky"\n[sources.bulky]\n'


def _alone(net: Net, more: str = "") -> None:
    """One small component out of a file of which most is something else."""
    net.storage.routes["/bulky.safetensors"] = File(bulky())
    net.folder.write("tiny.toml", f'{ALONE}urls = ["{net.storage.url("/bulky.safetensors")}"]\n{more}')
    net.folder.build()


def _fetched(net: Net, build: Callable[[], object]) -> int:
    before = net.storage.sent
    build()
    return net.storage.sent - before


def test_only_the_component_travels(net: Net) -> None:
    _alone(net)
    assert net.storage.sent >= len(bulky()), "without a lock, the whole file"
    second = net.machine("second")
    wanted = sum(t.nbytes for t in model("VAE-tiny").values())
    assert (
        wanted
        < _fetched(net, lambda: second.build("tiny.toml", "--locked", "--partial"))
        < wanted + (320 << 10)
    )
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()
    assert _lock(second) == _lock(net.folder)
    assert not downloads(second) and not list((second.store / "tmp").iterdir()), "no part is left"
    assert all("Range" in s.headers for s in net.storage.seen[-3:])


def test_a_component_that_changed_on_its_host(net: Net) -> None:
    _alone(net)
    net.storage.routes["/bulky.safetensors"] = File(bulky(seed=4))
    second = net.machine("second")
    sent = net.storage.sent
    said = second("build", "tiny.toml", "--partial")
    assert said.code == 6
    assert "`VAE-tiny of bulky` is not what the lock says" in said.err
    assert net.storage.sent - sent < len(bulky()) // 2
    assert not (second / "tiny.safetensors").exists()
    again = second("build", "tiny.toml", "--partial")
    assert again.code == 6, "nothing of it is remembered"


def test_nothing_is_taken_on_the_locks_word_unasked(net: Net) -> None:
    """A part of a file cannot be compared with the file's digest: without `--partial` all of it is had."""
    _alone(net)
    second = net.machine("second")
    assert _fetched(net, lambda: second.build("tiny.toml", "--locked")) >= len(bulky())
    assert downloads(second) == {sha256(bulky())}


def test_what_was_taken_on_the_locks_word_is_not_remembered(net: Net) -> None:
    """A lock that lies poisons no later build of the same pinned source."""
    _alone(net)
    lock = _lock(net.folder)
    other = net.machine("other")
    net.storage.routes["/bulky.safetensors"] = File(bulky(seed=4))
    (other / "tiny.lock.toml").unlink()
    other.build()
    lies = _lock(other).replace(sha256(bulky(seed=4)), sha256(bulky()))
    assert lies != lock

    second = net.machine("second")
    second.write("tiny.lock.toml", lies)
    said = second("build", "tiny.toml", "--partial")
    assert said.code == 0 and "only the lock says" in said.err
    assert (second / "tiny.safetensors").read_bytes() == (other / "tiny.safetensors").read_bytes()
    net.storage.routes["/bulky.safetensors"] = File(bulky())
    second.write("tiny.lock.toml", lock)
    assert second.build()["outputs"][0]["state"] == "written"
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()


def test_a_part_is_taken_where_the_whole_file_was_seen(net: Net) -> None:
    """What the pinned file gives is known of this store's own seeing, and no lock is believed."""
    _alone(net)
    before = (net.folder / "tiny.safetensors").read_bytes()
    (net.folder / "tiny.safetensors").unlink()
    shutil.rmtree(net.folder.store / "downloads")
    wanted = sum(t.nbytes for t in model("VAE-tiny").values())
    assert wanted < _fetched(net, net.folder.build) < wanted + (320 << 10)
    assert (net.folder / "tiny.safetensors").read_bytes() == before
    assert not downloads(net.folder)

    # It came over the network, so its bytes are kept.
    (net.folder / "tiny.safetensors").unlink()
    assert _fetched(net, net.folder.build) == 0
    assert (net.folder / "tiny.safetensors").read_bytes() == before

    (net.folder / "tiny.safetensors").unlink()
    shutil.rmtree(net.folder.store / "blobs")
    net.storage.routes["/bulky.safetensors"] = File(bulky(seed=4))
    said = net.folder("build", "tiny.toml")
    assert said.code == 6 and "is not what it was when the whole file was read" in said.err
    assert not (net.folder / "tiny.safetensors").exists()


@pytest.mark.parametrize("change", [lambda d: d + b"x", lambda d: dirty()], ids=["longer", "no safetensors"])
def test_a_file_of_another_size_is_not_even_read(net: Net, change: Callable[[bytes], bytes]) -> None:
    _alone(net)
    net.storage.routes["/bulky.safetensors"] = File(change(bulky()))
    second = net.machine("second")
    said = second("build", "tiny.toml", "--partial")
    assert said.code == 6 and f"{len(bulky()):,}" in said.err


def test_a_recipe_that_says_something_new_takes_no_parts(net: Net) -> None:
    """What the lock says of components is of the recipe that it was made of."""
    _alone(net)
    net.folder.write(
        "tiny.toml", (net.folder / "tiny.toml").read_text().replace("[", 'output.precision = "fp32"\n[', 1)
    )
    second = net.machine("second")
    assert _fetched(net, lambda: second.build("tiny.toml", "--partial")) >= len(bulky())
    with open_checkpoint(second / "tiny.safetensors") as made:
        assert {t.dtype for t in made.values()} == {DType.F32}


def test_outputs_in_two_precisions_share_what_is_fetched(net: Net) -> None:
    more = '[[output]]\nname = "half"\n[[output]]\nname = "full"\nprecision = "fp32"\n'
    _alone(net, more)
    second = net.machine("second")
    wanted = sum(t.nbytes for t in model("VAE-tiny").values())
    assert _fetched(net, lambda: second.build("tiny.toml", "--locked", "--partial")) < wanted + (320 << 10)
    for file in ("tiny-half.safetensors", "tiny-full.safetensors"):
        assert (second / file).read_bytes() == (net.folder / file).read_bytes()


def test_most_of_a_file_is_fetched_whole(net: Net) -> None:
    data = saved(model("SD-tiny", seed=3))
    net.storage.routes["/bulky.safetensors"] = File(data)
    _in_parts(net, {"UNET-tiny": "bulky", "CLIP-tiny": "bulky", "VAE-tiny": "vae"}).folder.build()
    second = net.machine("second")
    (second / "vae.safetensors").write_bytes(vae())
    assert _fetched(net, lambda: second.build("tiny.toml", "--locked", "--partial")) >= len(data)
    assert downloads(second) == {sha256(data)}


def test_a_pytorch_file_is_fetched_whole(net: Net) -> None:
    net.storage.routes |= {"/dirty.ckpt": File(dirty()), "/vae": File(vae())}
    net.write(f'urls = ["{net.storage.url("/dirty.ckpt")}"]', f'urls = ["{net.storage.url("/vae")}"]')
    net.folder.build()
    second = net.machine("second")
    second.build("tiny.toml", "--locked", "--partial")
    assert sha256(dirty()) in downloads(second)


@pytest.mark.parametrize("metadata", [False, True], ids=["plain", "with metadata"])
def test_a_base_on_a_host(net: Net, metadata: bool) -> None:
    """A part of a base travels alone only where nothing else of it enters the product."""
    tensors = model("SD-tiny", seed=3)
    data = saved(tensors)
    if metadata:
        data = _with_metadata(data, {"author": "someone"})
    net.storage.routes["/bulky.safetensors"] = File(data)
    (net.folder / "unet.safetensors").write_bytes(saved(model("UNET-tiny", seed=5)))
    net.folder.write(
        "tiny.toml",
        f"""\
        format = 1
        name = "tiny"
        base = "host"
        sources.host.urls = ["{net.storage.url("/bulky.safetensors")}"]
        sources.unet.file = "unet.safetensors"
        components.UNET-tiny = "unet"
        """,
    )
    net.folder.build()
    second = net.machine("second")
    shutil.copy(net.folder / "unet.safetensors", second / "unet.safetensors")
    before = net.storage.sent
    plan = second.plan()
    assert net.storage.sent - before < (300 << 10), "a plan reads a table of contents at most"
    source = next(s for s in plan["steps"] if s["label"] == "source host")
    assert source["state"] == "fetch" and source["reads"] == len(data)
    sent = _fetched(net, lambda: second.build("tiny.toml", "--locked", "--partial"))
    assert (sent >= len(data)) == metadata
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()
    with open_checkpoint(second / "tiny.safetensors") as made:
        assert made.metadata.get("author") == ("someone" if metadata else None)


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def test_what_a_host_shows_of_a_base_is_not_believed(net: Net) -> None:
    """Metadata that changed on the host, in a file of the same size and the same tensors."""
    data = _with_metadata(saved(model("SD-tiny", seed=3)), {"author": "someone"})
    net.storage.routes["/b.safetensors"] = File(data)
    text = (
        f'format = 1\nname = "tiny"\nbase = "b"\nsources.b.urls = ["{net.storage.url("/b.safetensors")}"]\n'
    )
    net.folder.write("tiny.toml", text)
    net.folder.build()
    net.storage.routes["/b.safetensors"] = File(data.replace(b"someone", b"another"))
    second = net.machine("second")
    assert second("build", "tiny.toml", "--partial").code == 6
    assert not (second / "tiny.safetensors").exists()
    # Also when every component is stored already, and only the header is needed.
    shutil.rmtree(net.folder.store / "downloads")
    (net.folder / "tiny.safetensors").unlink()
    assert net.folder("build", "tiny.toml").code == 6


# -- plans


def test_a_plan_downloads_nothing(net: Net) -> None:
    net.storage.routes |= {"/dirty.ckpt": File(dirty()), "/vae": File(vae())}
    net.write(
        f'urls = ["{net.storage.url("/dirty.ckpt")}"]',
        f'urls = ["{net.storage.url("/vae")}"]\nsize = {len(vae())}',
    )
    steps = {s["label"]: s for s in net.folder.plan()["steps"]}
    assert steps["source dirty"]["state"] == steps["source vae"]["state"] == "fetch"
    assert steps["source vae"]["reads"] == len(vae()) and steps["source dirty"]["reads"] is None
    said = net.folder("plan", "tiny.toml").out
    assert net.storage.url("/vae") in said and "41.5 kB" in said
    assert net.storage.sent == 0 and not net.folder.store.exists()
    net.folder.build()
    second = net.machine("second")
    sizes = {s["label"]: s["reads"] for s in second.plan()["steps"] if s["kind"] == "source"}
    assert sizes == {"source dirty": len(dirty()), "source vae": len(vae())}, "as the lock knows"


def test_a_plan_without_the_network(net: Net) -> None:
    net.write('urls = ["https://nowhere.invalid/a.ckpt"]', 'urls = ["hf://org/vae/vae.safetensors"]')
    said = net.folder("plan", "tiny.toml", "--offline")
    assert said.code == 0 and "fetch" in said.out
    assert net.requests == 0


# -- what included recipes take


def test_sources_of_an_included_recipe_are_pinned(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    net.folder.write("inner.toml", ONE.format(vae='urls = ["hf://org/vae/vae.safetensors"]'))
    net.folder.write(
        "tiny.toml",
        'format = 1\nname = "tiny"\nbase = "NEW VAE-tiny"\n'
        'sources.inner.recipe = "inner.toml"\ncomponents.VAE-tiny = "inner"\n',
    )
    net.folder.build()
    assert f'resolved = "hf://org/vae@{COMMIT}/vae.safetensors"' in _lock(net.folder)
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(seed=9), commit="f" * 40)
    second = net.machine("second")
    assert second("build", "tiny.toml", "--locked").code == 0
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()
    moved = second("lock", "tiny.toml", "--upgrade", "inner")
    assert "source `inner/vae`: sha256" in moved.out


def test_building_a_second_time_to_compare_downloads_nothing_more(net: Net) -> None:
    net.storage.routes["/vae"] = File(vae())
    folder = _one(net, f'urls = ["{net.storage.url("/vae")}"]')
    said = folder("build", "tiny.toml", "--check")
    assert said.code == 0, said.err
    assert "the same bytes" in said.err
    assert net.storage.sent == len(vae())


# -- several processes, and ends of them


def _start(folder: Folder, *args: object) -> subprocess.Popen[str]:
    """`ckpt` as a process of its own, with small segments."""
    code = "import sys\nfrom builder.cli import run\nsys.exit(run(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        cwd=folder.path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **folder.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_builds_share_a_download(net: Net) -> None:
    data, gate = bulky(), threading.Event()

    def gated(handler: Handler) -> None:
        assert gate.wait(30)
        File(data)(handler)

    net.storage.routes["/b"] = gated
    net.folder.write("tiny.toml", f'{ALONE}urls = ["{net.storage.url("/b")}"]\n')
    other = replace(net.machine("second"), store=net.folder.store)
    with _start(net.folder, "build", "tiny.toml") as first:
        _until(lambda: bool(net.storage.seen))
        with _start(other, "build", "tiny.toml") as second:
            assert second.stderr is not None
            assert "another process is downloading bulky: waiting for it" in second.stderr.readline()
            gate.set()
            assert second.wait(60) == 0
        assert first.wait(60) == 0
    assert net.storage.sent == len(data)
    assert (other / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()
    assert _lock(other) == _lock(net.folder)


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_build_that_ends_early_is_resumed(net: Net, end: signal.Signals) -> None:
    data = bulky()
    net.storage.routes["/b"] = File(data, pause=0.02)
    net.folder.write("tiny.toml", f'{ALONE}urls = ["{net.storage.url("/b")}"]\n')
    running = _start(net.folder, "build", "tiny.toml")
    _until(lambda: net.storage.sent > len(data) // 3)
    running.send_signal(end)
    _, err = running.communicate(timeout=60)
    assert running.returncode == (130 if end is signal.SIGINT else -9), err
    if end is signal.SIGINT:
        assert err.strip().endswith("error: interrupted") and "Traceback" not in err
    sent = net.storage.sent
    assert sent < len(data), "it did not wait for the end"
    left = {n.rpartition(".")[2] for n in downloads(net.folder)}
    assert "journal" in left and not (net.folder / "tiny.safetensors").exists()

    net.storage.routes["/b"] = File(data)
    said = net.folder("build", "tiny.toml")
    assert said.code == 0, said.err
    assert "bytes are there already" in said.err
    assert net.storage.sent < len(data) * 1.3
    assert not net.storage.asked("/b")[-1].headers["Range"].startswith("bytes=0-")
    assert downloads(net.folder) == {sha256(data)}


def test_progress_is_told(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.01)
    net.storage.routes["/vae"] = File(saved(model()), pause=0.02)
    folder = _one(net, f'urls = ["{net.storage.url("/vae")}"]')
    said = folder("build", "tiny.toml")
    lines = [line for line in said.err.splitlines() if line.startswith("vae: ")]
    assert any("of 1.4 MB (" in line and "/s" in line for line in lines), said.err


# -- secrets


def test_a_token_is_nowhere(net: Net, tmp_path: Path) -> None:
    """In no file, message, JSON or argument that a run leaves behind, whether it succeeds or fails."""
    hugging_face(net.hub, net.storage, "org/model", "dirty.ckpt", dirty(), token=TOKEN)
    civitai(net.civitai, net.storage, 42, 99, vae(), token=TOKEN)
    net.hub.routes["/org/echo/resolve/main/x"] = lambda h: answer(
        h, 403, headers={"X-Error-Message": f"no: {h.headers['Authorization']}"}
    )
    net.write('urls = ["hf://org/model/dirty.ckpt"]', 'urls = ["civitai:42"]')
    folder = net.machine("second", HF_TOKEN=TOKEN, CIVITAI_TOKEN=TOKEN)
    folder.write("echo.toml", ONE.format(vae='urls = ["hf://org/echo/x"]'))
    said = [
        folder(*words)
        for words in (
            ("plan", "tiny.toml"),
            ("lock", "tiny.toml"),
            ("build", "tiny.toml", "--explain", "--json"),
            ("plan", "tiny.toml", "--json"),
            ("build", "echo.toml"),
            ("lock", "echo.toml"),
            ("inspect", "hf://org/echo/x", "--json"),
        )
    ]
    assert [s.code for s in said] == [0, 0, 0, 0, 5, 5, 5]
    assert "no: Bearer ***" in said[4].err
    assert not any(TOKEN in s.out + s.err for s in said)
    assert not any("secret-signature" in s.out + s.err for s in said), "nor is a signed address"
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 10
    for path in written:
        data = path.read_bytes()
        assert TOKEN.encode() not in data and b"secret-signature" not in data, path
    asked = [s for s in (*net.hub.seen, *net.civitai.seen) if s.headers.get("Authorization")]
    assert asked and all(s.headers["Authorization"] == f"Bearer {TOKEN}" for s in asked)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system lists processes otherwise")
def test_no_process_is_given_a_token(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(), token=TOKEN, lfs=False)
    _one(net, 'urls = ["hf://org/vae/vae.safetensors"]')
    folder = net.machine("second", HF_TOKEN=TOKEN)
    running = _start(folder, "lock", "tiny.toml")
    listed = []
    while running.poll() is None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                listed.append(process.read_bytes())
        time.sleep(0.05)
    running.communicate()
    assert running.returncode == 0 and any(b"tiny.toml" in text for text in listed)
    assert not any(TOKEN.encode() in text for text in listed)


def test_a_source_that_is_a_link_to_itself(net: Net) -> None:
    (net.folder / "loop").symlink_to("loop")
    (net.folder / "loop.toml").symlink_to("loop.toml")
    for source in ('file = "loop"', 'urls = ["file:loop"]', 'recipe = "loop.toml"'):
        _one(net, source)
        for command in (("plan",), ("build",), ("lock",)):
            said = net.folder(*command, "tiny.toml")
            assert said.code in {0, 3, 5} and "Traceback" not in said.err
    for words in (("build", "loop.toml"), ("new", "loop"), ("inspect", "loop")):
        said = net.folder(*words)
        assert said.code in {3, 6} and "symbolic links" in said.err


# -- full size


def test_a_large_component_travels_almost_alone(net: Net, tmp_path: Path) -> None:
    """A VAE of full size, out of a file that is a hole for the rest."""
    source = net.folder / "large.safetensors"
    vae = make("VAE-v1", precision=DType.F16, content="sparse", catalog=catalog()).tensors
    save(source, {**{VAE + n: t for n, t in vae.items()}, "bulk": values(np.zeros(50_000_000))})
    text = 'format = 1\nname = "tiny"\nbase = "NEW VAE-v1"\ncomponents.VAE-v1 = "large"\n[sources.large]\n'
    text += f'file = "large.safetensors"\nurls = ["{net.storage.url("/large")}"]\n'
    net.folder.write("tiny.toml", text)
    net.folder.build()
    with open_checkpoint(source) as checkpoint, source.open("rb") as file:
        wanted = sum(t.nbytes for n, t in checkpoint.items() if n.startswith(VAE))
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
    net.storage.routes["/large"] = File(data, etag='"large"', block=1 << 20)  # type: ignore[arg-type]
    second = net.machine("second")
    assert wanted <= _fetched(net, lambda: second.build("tiny.toml", "--locked", "--partial")) < 1.02 * wanted
    assert (second / "tiny.safetensors").read_bytes() == (net.folder / "tiny.safetensors").read_bytes()
