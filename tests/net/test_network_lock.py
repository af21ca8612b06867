"""Pinning from the network: what hosts state is taken from them, and a pin moves on purpose only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

from tests.help.building import Folder
from tests.help.network import TOKEN, Net, dirty, downloads, hosts, sha256, vae
from tests.help.servers import COMMIT, File, civitai, hugging_face, says

MOVED = "f" * 40
HUB = 'urls = ["hf://org/model/dirty.ckpt"]', 'urls = ["hf://org/vae/vae.safetensors"]'


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with hosts(tmp_path) as running:
        yield running


@pytest.fixture
def hub(net: Net) -> Net:
    """With both sources of the recipe at Hugging Face."""
    hugging_face(net.hub, net.storage, "org/model", "dirty.ckpt", dirty())
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    net.write(*HUB)
    return net


def _sources(folder: Folder) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "tiny.lock.toml").read_text())["sources"]
    return found


def test_what_a_host_states_is_not_downloaded(hub: Net) -> None:
    said = hub.folder("lock", "tiny.toml")
    assert said.code == 0, said.err
    assert said.out.splitlines()[0].split() == ["written", "tiny.lock.toml"]
    assert _sources(hub.folder) == {
        "dirty": {
            "requested": "hf://org/model/dirty.ckpt",
            "resolved": f"hf://org/model@{COMMIT}/dirty.ckpt",
            "sha256": sha256(dirty()),
            "size": len(dirty()),
        },
        "vae": {
            "requested": "hf://org/vae/vae.safetensors",
            "resolved": f"hf://org/vae@{COMMIT}/vae.safetensors",
            "sha256": sha256(vae()),
            "size": len(vae()),
        },
    }
    assert not hub.storage.seen and not downloads(hub.folder)

    again = hub.folder("lock", "tiny.toml")
    assert again.out.split()[0] == "unchanged"
    said = hub.folder("build", "tiny.toml", "--locked")
    assert said.code == 4, "a lock of sources alone does not say what is made of them"
    assert "component: `VAE-tiny-SD` is new" in said.err and not (hub.folder / "tiny.safetensors").exists()
    pinned = _sources(hub.folder)
    hub.folder.build()
    assert _sources(hub.folder) == pinned
    assert hub.folder("build", "tiny.toml", "--locked").code == 0
    made = (hub.folder / "tiny.lock.toml").read_text()
    assert "[[components]]" in made and hub.folder("lock", "tiny.toml").out.split()[0] == "unchanged"
    assert (hub.folder / "tiny.lock.toml").read_text() == made, "what a build pinned stays"


def test_a_pytorch_base_is_not_downloaded_either(hub: Net) -> None:
    text = 'format = 1\nname = "tiny"\nbase = "dirty"\n[sources.dirty]\n'
    hub.folder.write("tiny.toml", text + HUB[0])
    assert hub.folder("lock", "tiny.toml").code == 0
    assert not hub.storage.seen


def test_civitai_states_digests(net: Net) -> None:
    civitai(net.civitai, net.storage, 42, 99, vae())
    hugging_face(net.hub, net.storage, "org/model", "dirty.ckpt", dirty())
    net.write(HUB[0], 'urls = ["air:sd1:checkpoint:civitai:7"]')
    assert net.folder("lock", "tiny.toml").code == 0
    assert _sources(net.folder)["vae"]["resolved"] == "civitai:42@99"
    assert _sources(net.folder)["vae"]["sha256"] == sha256(vae())
    assert not net.storage.seen


def test_what_no_host_states_is_downloaded_once(net: Net) -> None:
    """A file of a plain host, and one that Hugging Face keeps outside of LFS."""
    net.storage.routes["/dirty.ckpt"] = File(dirty())
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae(), lfs=False)
    url = net.storage.url("/dirty.ckpt")
    net.write(f'urls = ["{url}"]', HUB[1])
    assert net.folder("lock", "tiny.toml").code == 0
    found = _sources(net.folder)
    assert found["dirty"] == {
        "requested": url,
        "resolved": url,
        "sha256": sha256(dirty()),
        "size": len(dirty()),
    }
    assert found["vae"]["resolved"] == f"hf://org/vae@{COMMIT}/vae.safetensors"
    assert found["vae"]["sha256"] == sha256(vae())
    assert net.storage.sent == len(dirty())
    asked = net.requests
    assert net.folder("build", "tiny.toml", "--offline").code == 0
    assert net.folder("build", "tiny.toml", "--frozen").code == 0
    assert net.requests == asked


def test_what_the_recipe_pins_is_not_downloaded(net: Net) -> None:
    net.storage.routes["/dirty.ckpt"] = File(dirty())
    civitai(net.civitai, net.storage, 42, 99, vae())
    pinned = f'sha256 = "{sha256(dirty())}"\nurls = ["{net.storage.url("/dirty.ckpt")}"]'
    net.write(pinned, f'sha256 = "{sha256(vae())}"')
    assert net.folder("lock", "tiny.toml").code == 0
    found = _sources(net.folder)
    assert found["dirty"]["sha256"] == sha256(dirty())
    assert found["vae"] == {
        "requested": f"sha256:{sha256(vae())}",
        "resolved": "civitai:42@99",
        "sha256": sha256(vae()),
        "size": found["vae"]["size"],
    }
    assert not net.storage.seen
    said = net.folder("build", "tiny.toml")
    assert said.code == 0 and "became" not in said.err, "sizes that were unknown are no change"
    assert _sources(net.folder)["dirty"]["size"] == len(dirty())
    assert net.folder("build", "tiny.toml", "--locked").code == 0


def test_where_a_source_was_had_from_makes_no_lock_stale(net: Net) -> None:
    """One who had the file, or another host of it, wrote the lock: what it is decides."""
    for name in ("/a.safetensors", "/b.safetensors"):
        net.storage.routes[name] = File(vae())
    here, there = (net.storage.url(name) for name in ("/a.safetensors", "/b.safetensors"))
    (net.folder / "dirty.ckpt").write_bytes(dirty())
    (net.folder / "vae.safetensors").write_bytes(vae())
    net.write('file = "dirty.ckpt"', f'file = "vae.safetensors"\nurls = ["{here}", "{there}"]')
    assert net.folder("build", "tiny.toml").code == 0
    others = [net.machine(name) for name in ("fetched", "anew")]
    for other in others:
        (other / "dirty.ckpt").write_bytes(dirty())
    assert others[0]("build", "tiny.toml", "--locked").code == 0
    assert others[1]("build", "tiny.toml").code == 0
    (net.folder / "tiny.lock.toml").write_bytes((others[1] / "tiny.lock.toml").read_bytes())
    assert _sources(net.folder)["vae"]["resolved"] == here
    net.storage.routes["/a.safetensors"] = says(404, "gone")
    another = net.machine("another-host")
    (another / "dirty.ckpt").write_bytes(dirty())
    assert another("build", "tiny.toml", "--locked").code == 0


def test_the_first_host_that_answers_pins(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    hugging_face(net.hub, net.storage, "org/model", "dirty.ckpt", dirty())
    net.write(HUB[0], 'urls = ["hf://org/gone/v.safetensors", "hf://org/vae/vae.safetensors"]')
    assert net.folder("lock", "tiny.toml").code == 0
    assert _sources(net.folder)["vae"]["resolved"] == f"hf://org/vae@{COMMIT}/vae.safetensors"


def test_failures_leave_the_lock_as_it_was(hub: Net) -> None:
    hugging_face(hub.hub, hub.storage, "org/vae", "vae.safetensors", vae(), token=TOKEN)
    said = hub.folder("lock", "tiny.toml")
    assert said.code == 5
    assert "`vae` could not be fetched" in said.err and "set `HF_TOKEN`" in said.err
    assert not (hub.folder / "tiny.lock.toml").exists()
    granted = hub.machine("second", HF_TOKEN=TOKEN)
    assert granted("lock", "tiny.toml").code == 0
    before = (granted / "tiny.lock.toml").read_text()
    hub.hub.routes.clear()
    assert granted("lock", "tiny.toml", "--upgrade").code == 5
    assert (granted / "tiny.lock.toml").read_text() == before


def test_a_pin_moves_on_purpose_only(hub: Net) -> None:
    folder = hub.folder
    folder.build()
    before = (folder / "tiny.lock.toml").read_text()
    hugging_face(hub.hub, hub.storage, "org/model", "dirty.ckpt", dirty() + b"x", commit=MOVED)
    hugging_face(hub.hub, hub.storage, "org/vae", "vae.safetensors", vae(seed=9), commit=MOVED)
    assert folder("lock", "tiny.toml").out.split()[0] == "unchanged"
    assert hub.machine("second")("lock", "tiny.toml").out.split()[0] == "unchanged", "the commit is asked for"
    assert (folder / "tiny.lock.toml").read_text() == before

    said = folder("lock", "tiny.toml", "--upgrade", "vae")
    assert said.code == 0
    assert said.out.splitlines()[0].split() == ["written", "tiny.lock.toml"]
    assert f"source `vae`: sha256: {sha256(vae())[:12]}… became {sha256(vae(seed=9))[:12]}…" in said.out
    assert f"hf://org/vae@{MOVED}/vae.safetensors" in said.out
    assert "source `dirty`" not in said.out
    assert _sources(folder)["dirty"]["sha256"] == sha256(dirty())
    assert folder.build()["made"] == ["VAE-tiny of vae"]

    everything = folder("lock", "tiny.toml", "--upgrade")
    assert "source `dirty`: sha256" in everything.out and "source `vae`" not in everything.out
    assert folder("lock", "tiny.toml", "--upgrade").out.split()[0] == "unchanged"


def test_a_pin_whose_file_is_gone(hub: Net) -> None:
    hub.folder("lock", "tiny.toml")
    hub.hub.routes.clear()
    hugging_face(hub.hub, hub.storage, "org/model", "dirty.ckpt", dirty())
    hugging_face(hub.hub, hub.storage, "org/vae", "vae.safetensors", vae(seed=9), commit=MOVED)
    said = hub.machine("second")("lock", "tiny.toml")
    assert said.code == 6
    assert "`vae` is not what was pinned" in said.err and sha256(vae(seed=9)) in said.err
    assert "`ckpt lock --upgrade` takes it as it is now" in said.err
    assert not hub.storage.seen

    hub.hub.routes[f"/org/vae/resolve/{COMMIT}/vae.safetensors"] = says(410, "taken down")
    hub.hub.routes["/org/vae/resolve/main/vae.safetensors"] = says(404)
    said = hub.machine("third")("lock", "tiny.toml")
    assert said.code == 5 and "410" in said.err and "404" in said.err


def test_what_the_recipe_pins_no_upgrade_moves(hub: Net) -> None:
    hub.write(f'sha256 = "{sha256(dirty())}"\n{HUB[0]}', HUB[1])
    assert hub.folder("lock", "tiny.toml").code == 0
    hugging_face(hub.hub, hub.storage, "org/model", "dirty.ckpt", dirty() + b"x", commit=MOVED)
    said = hub.folder("lock", "tiny.toml", "--upgrade")
    assert said.code == 6 and sha256(dirty() + b"x") in said.err
    assert "--upgrade" not in said.err, "which would not help"


def test_an_upgrade_of_what_there_is_not(hub: Net) -> None:
    said = hub.folder("lock", "tiny.toml", "--upgrade", "vea")
    assert said.code == 2
    hub.folder("lock", "tiny.toml")
    said = hub.folder("lock", "tiny.toml", "--upgrade", "vea")
    assert said.code == 2
    assert "the recipe has no source `vea`" in said.err and "did you mean `vae`?" in said.err


def test_files_of_this_machine_follow_what_is_there(net: Net) -> None:
    """A source without an address is pinned by what it is, in the lock of the one who has it."""
    (net.folder / "dirty.ckpt").write_bytes(dirty())
    (net.folder / "vae.safetensors").write_bytes(vae())
    net.write('file = "dirty.ckpt"', 'file = "vae.safetensors"')
    assert net.folder("lock", "tiny.toml").code == 0
    assert _sources(net.folder)["vae"] == {
        "requested": "vae.safetensors",
        "sha256": sha256(vae()),
        "size": len(vae()),
    }
    (net.folder / "vae.safetensors").write_bytes(vae(seed=9))
    said = net.folder("lock", "tiny.toml")
    assert f"became {sha256(vae(seed=9))[:12]}…" in said.out
    assert net.requests == 0
