"""What builds leave in the store: where components lie, copies of them only where that is asked for."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from builder.recipe.lock import read_lock
from builder.store import Store
from builder.store.entries import At, Entry, identity
from builder.store.upkeep import items
from builder.workspace import STORE_SIZE
from tests.help.building import UNET, VAE, Folder, content, files, model, save, save_dirty

KEEP = {"CKPT_STORE_KEEP": "all"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """The miniature recipe with its sources, in a folder with a store of its own."""
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def product(folder: Folder) -> bytes:
    """What the recipe makes; it is in its place."""
    folder.build()
    return (folder / "tiny.safetensors").read_bytes()


def entries(folder: Folder) -> Iterator[Entry]:
    with Store(folder.store) as store:
        for digest in sorted(folder.components()):
            entry = store.entry(digest)
            assert entry is not None
            yield entry


def rot(folder: Folder, file: str, name: str) -> None:
    """Flip a bit of a tensor, as a failing disk does: nothing about the file says so."""
    path = folder / file
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little") + header[name]["data_offsets"][0]
    with path.open("r+b") as stream:
        stream.seek(start)
        byte = stream.read(1)[0]
        stream.seek(start)
        stream.write(bytes([byte ^ 1]))
    with Store(folder.store) as store:
        for entry in entries(folder):
            for at in entry.places:
                if at.path == str(path):
                    store.place(entry, At(at.path, identity(path.stat()), at.offsets))


def restored(folder: Folder, name: str) -> Path:
    """A store packed with tar and unpacked elsewhere: all inodes and times are others."""
    archive, root = folder.path.parent / f"{name}.tar", folder.path.parent / name
    with tarfile.open(archive, "w") as packed:
        for path in sorted(p for p in folder.store.rglob("*") if p.is_file()):
            info = packed.gettarinfo(path, str(path.relative_to(folder.store)))
            info.mtime = 1
            with path.open("rb") as file:
                packed.addfile(info, file)
    with tarfile.open(archive) as packed:
        packed.extractall(root, filter="data")
    return root


# -- places


def test_a_build_leaves_places_and_no_copies(folder: Folder, product: bytes) -> None:
    assert not folder.blobs()
    assert sum(p.stat().st_size for p in folder.store.rglob("*") if p.is_file()) < 10_000
    held = content(folder / "tiny.safetensors")
    for entry in entries(folder):
        [at] = entry.places
        assert at.path == str(folder / "tiny.safetensors")
        for (name, row), offset in zip(sorted(entry.rows.items()), at.offsets, strict=True):
            lying = [
                d for _, shape, d in held.values() if shape == row.shape and product[offset:].startswith(d)
            ]
            assert blake3(lying[0]).hexdigest() == row.digest, name


def test_another_output_is_made_from_the_first(folder: Folder, product: bytes) -> None:
    again = folder.build("tiny.toml", "-o", "again.safetensors")
    assert (again["outputs"][0]["state"], again["made"]) == ("written", [])
    assert (folder / "again.safetensors").read_bytes() == product
    (folder / "tiny.safetensors").unlink()
    third = folder.build("tiny.toml", "-o", "third.safetensors")
    assert third["made"] == [], "the second serves as well"
    assert (folder / "third.safetensors").read_bytes() == product


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.rename(p.with_name("moved.safetensors")),
        lambda p: p.write_bytes(p.read_bytes()),
        lambda p: save(p, model("VAE-tiny", seed=9)),
        lambda p: p.unlink(),
    ],
    ids=["moved", "written again", "another file", "gone"],
)
def test_what_is_not_in_its_place_is_made_again(
    folder: Folder, product: bytes, change: Callable[[Path], object]
) -> None:
    change(folder / "tiny.safetensors")
    said = folder("build", "tiny.toml", "--json", "-o", "again.safetensors")
    assert len(said.json["made"]) == 3
    assert "damaged" not in said.err
    assert (folder / "again.safetensors").read_bytes() == product


@pytest.mark.parametrize("part", [UNET, VAE])
def test_damaged_bytes_are_noticed_and_made_again(folder: Folder, product: bytes, part: str) -> None:
    """Also where all that is known says that the file is as it was."""
    name = next(n for n in content(folder / "tiny.safetensors") if n.startswith(part))
    rot(folder, "tiny.safetensors", name)
    assert (folder / "tiny.safetensors").read_bytes() != product
    said = folder("build", "tiny.toml", "--json", "-o", "again.safetensors")
    assert "is damaged" in said.json["warnings"][0]["fact"]
    assert said.json["made"]
    assert (folder / "again.safetensors").read_bytes() == product
    assert not (folder.store / "quarantine").exists(), "a file of somebody's is left where it is"
    third = folder("build", "tiny.toml", "--json", "-o", "third.safetensors")
    assert "damaged" not in third.err and third.json["made"] == []
    assert (folder / "third.safetensors").read_bytes() == product


def test_an_output_is_replaced_by_one_that_takes_from_it(folder: Folder, product: bytes) -> None:
    """What stays the same is read from the old file while the new one is written."""
    save(folder / "vae.safetensors", model("VAE-tiny", seed=7))
    made = folder.build()
    assert made["outputs"][0]["state"] == "written"
    assert len(made["made"]) == 1, "the VAE alone"
    fresh = folder.beside("fresh", store="fresh store")
    (fresh / "tiny.safetensors").unlink()
    fresh.build()
    replaced = (folder / "tiny.safetensors").read_bytes()
    assert replaced == (fresh / "tiny.safetensors").read_bytes() != product

    # Now the old VAE is nowhere, and what the new file holds is there.
    places = {e.cls: [p.path for p in e.places] for e in entries(folder) if e.places}
    with Store(folder.store) as store:
        held = [e for e in entries(folder) if store.holds(e.digest)]
    assert sorted(e.cls for e in held) == sorted(places) == ["CLIP-tiny", "UNET-tiny", "VAE-tiny"]
    save(folder / "vae.safetensors", model("VAE-tiny", seed=2))
    assert len(folder.build()["made"]) == 1
    assert (folder / "tiny.safetensors").read_bytes() == product


def test_a_build_that_fails_leaves_the_old_places(folder: Folder, product: bytes) -> None:
    folder.write(
        "bad.toml", (folder / "tiny.toml").read_text() + '[output]\nexpect.sha256 = "' + "0" * 64 + '"\n'
    )
    before = files(folder.store / "components")
    said = folder("build", "bad.toml", "-o", "tiny.safetensors")
    assert said.code != 0
    assert (folder / "tiny.safetensors").read_bytes() == product
    assert files(folder.store / "components") == before
    assert folder.build("tiny.toml", "-o", "again.safetensors")["made"] == []


# -- copies, where they are asked for


def test_keep_all_serves_where_no_product_is(folder: Folder) -> None:
    """As in a CI, where the store is all that is cached: packed with tar, restored elsewhere."""
    first = replace(folder, environment=KEEP)
    assert len(first.build()["made"]) == 3
    assert first.blobs().keys() == first.components() and len(first.blobs()) == 3
    product = (first / "tiny.safetensors").read_bytes()

    other = replace(first.beside("other"), store=restored(first, "restored"))
    (other / "tiny.safetensors").unlink()
    (first / "tiny.safetensors").unlink()
    said = other("build", "tiny.toml", "--json")
    assert said.code == 0, said.err
    assert said.json["made"] == []
    assert (other / "tiny.safetensors").read_bytes() == product
    assert other("store", "check").code == 0


def test_a_damaged_copy_is_noticed_and_made_again(folder: Folder) -> None:
    kept = replace(folder, environment=KEEP)
    kept.build()
    product = (kept / "tiny.safetensors").read_bytes()
    (kept / "tiny.safetensors").unlink()
    path = max(kept.blobs().values(), key=lambda p: p.stat().st_size)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = kept("build", "tiny.toml", "--json")
    assert "is damaged" in said.json["warnings"][0]["fact"] and len(said.json["made"]) == 1
    assert (kept / "tiny.safetensors").read_bytes() == product
    assert len(kept.blobs()) == 3, "the copy too"
    assert kept("store", "check").code == 0


# -- the cap


def bytes_of(folder: Folder) -> int:
    """How much a store holds, as it counts itself."""
    with Store(folder.store) as store:
        return sum(i.size for i in items(store))


def locked(folder: Folder) -> set[str]:
    """The digests of what the lock says the product is made of."""
    return {c.blake3 for c in read_lock(folder / "tiny.lock.toml").components}


def test_a_store_that_grew_is_kept_within_its_cap(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for longest goes first: what this build has made or used stays."""
    monkeypatch.setattr("builder.workspace.STORE_SIZE", 1_000_000)
    grown = replace(folder, environment=KEEP)
    grown.build()
    old = locked(grown)
    assert grown.blobs().keys() == old
    for path in (*grown.blobs().values(), *grown.store.glob("components/*/*.json")):
        os.utime(path, (1, 1))
    save_dirty(grown / "dirty.ckpt", seed=1)
    assert len(grown.build()["made"]) == 2
    new = locked(grown)
    assert len(new & old) == 1, "the VAE, which was used"
    assert bytes_of(grown) <= 1_000_000
    assert new <= grown.blobs().keys() and not old <= grown.blobs().keys()


def test_a_store_that_did_not_grow_is_left_alone(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever filled it may have had a reason; and a build with nothing to do is over at once."""
    replace(folder, environment=KEEP).build()
    before = folder.blobs()
    monkeypatch.setattr("builder.workspace.STORE_SIZE", 1000)
    folder.build("tiny.toml", "-o", "again.safetensors")
    folder.build()
    assert folder.blobs() == before


def test_the_cap_is_20_gb() -> None:
    assert STORE_SIZE == 20 * 10**9


# -- what is said of it


def test_the_list_says_of_what_a_component_was_made_and_where_it_lies(folder: Folder, product: bytes) -> None:
    """Not only that there are three UNETs, but which is whose."""
    found = folder("store", "list", "--json").json
    said = {i["class"]: (i["source"], i["places"], i["size"]) for i in found["items"]}
    where = [str(folder / "tiny.safetensors")]
    assert said == {
        "UNET-tiny": ("dirty.ckpt", where, 0),
        "CLIP-tiny": ("dirty.ckpt", where, 0),
        "VAE-tiny": ("vae.safetensors", where, 0),
    }
    assert found["bytes"] == 0
    folder.build("tiny.toml", "-o", "again.safetensors")
    (folder / "tiny.safetensors").unlink()
    folder.write("vae.toml", 'format = 1\nname = "v"\nbase = "vae"\nsources.vae.file = "vae.safetensors"\n')
    replace(folder, environment=KEEP).build("vae.toml", "-o", "v.safetensors")
    (folder / "v.safetensors").unlink()
    rows = [re.split(r"\s{2,}", line) for line in folder("store", "list").out.splitlines()]
    assert rows[0] == ["COMPONENT", "SIZE", "DIGEST", "LAST USED", "MADE OF", "LIES IN"]
    assert sorted([row[0], *row[4:]] for row in rows[1:4]) == [
        ["CLIP-tiny-SD", "dirty.ckpt", "again.safetensors"],
        ["UNET-tiny-SD", "dirty.ckpt", "again.safetensors"],
        ["VAE-tiny-SD", "vae.safetensors", "the store, again.safetensors"],
    ]
    (folder / "again.safetensors").unlink()
    lines = folder("store", "list").out.splitlines()
    lying = {line.split()[0]: line.split("  ")[-1].strip() for line in lines[1:4]}
    assert lying == {"CLIP-tiny-SD": "nowhere", "UNET-tiny-SD": "nowhere", "VAE-tiny-SD": "the store"}
    assert "again" not in "".join(lines)
