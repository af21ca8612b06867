"""A store from elsewhere: what stands in the place of its files holds nothing up and leads nowhere."""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.store import Made, Store
from builder.store.records import read_record, write_record
from builder.store.strays import FOLDERS, strays
from builder.store.upkeep import collect
from tests.help.building import Folder, content, model, save, values
from tests.help.special_files import pipe, socket, zeros

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such files")

RECIPE = """
format = 1
name = "m"
base = "a"
sources.a.file = "a.safetensors"
output.keep = ["own"]
"""
SOUND = b"the user's own, and none of the store's\n"


def _folder(path: Path) -> None:
    (path / "in").mkdir(parents=True)
    (path / "in" / "it").write_bytes(SOUND)


def _empty(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    path.symlink_to(_precious(path))


def _precious(path: Path) -> Path:
    return next(p for p in path.parents if (p / "own").is_dir()) / "own" / "ab" / "precious.json"


SPECIAL = [pipe, zeros, socket, _folder, _empty, _link]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path).tiny()
    own = tmp_path / "own" / "ab"
    own.mkdir(parents=True)
    (own / "precious.json").write_bytes(SOUND)
    made.build()
    return made


def _is_whole(folder: Folder) -> None:
    own = folder.path.parent / "own"
    assert [p.read_bytes() for p in own.rglob("*.json")] == [SOUND]
    assert sorted(p.name for p in own.rglob("*")) == ["ab", "precious.json"]


@pytest.mark.parametrize("special", SPECIAL, ids=lambda make: make.__name__.strip("_"))
def test_what_is_no_record_is_none(folder: Folder, special: Callable[[Path], None]) -> None:
    """Something else is where a record was: it is made again, found by a check, removed by a collection."""
    records = [p for p in folder.store.rglob("*.json") if p.is_file()]
    assert {p.relative_to(folder.store).parts[0] for p in records} == {
        "actions",
        "components",
        "facts",
        "files",
    }

    def spoil() -> None:
        for path in records:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            special(path)

    spoil()
    (folder / "tiny.safetensors").unlink()
    assert folder.build()["outputs"][0]["state"] == "written"
    left = {p.relative_to(folder.store).parts[0] for p in strays(folder.store)}
    assert left <= {"files"}, "each was replaced when it was written anew, but that of the file that is gone"
    assert folder.build()["outputs"][0]["state"] == "unchanged"

    spoil()
    said = folder("store", "check")
    assert said.code == 1 and said.err.count("stands where another thing is due") == len(records)
    assert folder("store", "check").code == 0
    folder("store", "gc")
    spoil()
    assert f"removed {len(records)} things" in folder("store", "gc").out
    assert folder("store", "check").code == 0 and not strays(folder.store)
    folder("store", "gc")
    assert not list((folder.store / "quarantine").iterdir())
    _is_whole(folder)


@pytest.mark.parametrize("special", [pipe, zeros, _link], ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_folder_of_the_store_that_is_none(
    folder: Folder, name: str, special: Callable[[Path], None]
) -> None:
    place = folder.store / name

    def spoil() -> None:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.parent.mkdir(exist_ok=True)
        if not place.is_symlink() and not place.exists():
            special(place)

    spoil()
    (folder / "tiny.safetensors").unlink()
    assert folder("build", "tiny.toml").code == 0
    spoil()
    assert folder("store", "check").code == 1
    assert folder("store", "check").code == 0
    spoil()
    assert folder("store", "gc").code == 0
    assert folder("store", "check").code == 0
    _is_whole(folder)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_link_to_a_folder_of_the_users_is_not_followed(folder: Folder, name: str) -> None:
    """Nothing below it is taken for the store's: neither set aside nor removed, nor written to."""
    own, place = folder.path.parent / "own", folder.store / name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    for words in (
        ("store", "check"),
        ("store", "gc", "--max-size", "0"),
        ("store", "list"),
        ("build", "tiny.toml"),
    ):
        place.unlink(missing_ok=True) if place.is_symlink() else shutil.rmtree(place, ignore_errors=True)
        place.symlink_to(own)
        (folder / "tiny.safetensors").unlink(missing_ok=True)
        assert folder(*words).code in (0, 1)
        _is_whole(folder)


def _whole(folder: Folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    for made in ("tiny.safetensors", "tiny.lock.toml"):
        (folder / made).unlink(missing_ok=True)
    assert folder("build", "tiny.toml").code == 0
    return content(folder / "tiny.safetensors")


def test_a_record_under_the_key_of_another_is_none(folder: Folder) -> None:
    """Of the same kind, of another component, or of another form: what it says is of something else."""
    folder = replace(folder, store=folder.path.parent / "all", environment={"CKPT_STORE_KEEP": "all"})
    save(folder / "evil.safetensors", model("VAE-tiny", seed=9))
    folder.write("evil.toml", (folder / "tiny.toml").read_text().replace("vae.safe", "evil.safe"))
    folder.know("dirty.ckpt", "vae.safetensors", "evil.safetensors")
    sound = _whole(folder)
    assert folder("build", "evil.toml").code == 0
    sealed = {
        p: p.read_bytes() for kind in ("actions", "facts") for p in folder.store.rglob(f"{kind}/**/*.json")
    }
    kinds = {p.parent.parent.name for p in sealed}
    assert kinds >= {"actions", "output"}
    for other in sealed.values():
        for path, own in sealed.items():
            path.write_bytes(other)
            if other != own:
                assert read_record(path) is None
        assert _whole(folder) == sound
        for path, own in sealed.items():
            path.write_bytes(own)
    [vae, *_] = [p for p in sealed if p.parent.parent.name == "actions" and b"VAE" in sealed[p]]
    unet = next(p for p in sealed if p.parent.parent.name == "actions" and b"UNET" in sealed[p])
    shutil.copyfile(unet, vae)
    said = folder("store", "check")
    assert (
        said.code == 1
        and "a record is damaged, or another's" in said.err
        and str(vae) in said.err.replace("\n", "")
    )


def test_a_record_of_another_class_is_not_that_of_the_plan(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.record("a" * 64, Made("UNET-v1-SD", "UNET-v1", "b" * 64, 1, 2))
    assert store.lookup("a" * 64, "VAE-v1") is None
    assert store.lookup("a" * 64, "UNET-v1") is not None


def test_a_download_is_gathered_in_no_file_of_the_users(tmp_path: Path) -> None:
    """Links in the places of an unfinished download, of its journal and of its lock."""
    own = tmp_path / "own"
    own.write_bytes(SOUND)
    store = Store(tmp_path / "store")
    partial = store.partial_path("https://example.com/x")
    places = [partial, *(partial.with_name(f"{partial.name}.{end}") for end in ("journal", "lock"))]
    for place in places:
        place.symlink_to(own)
    assert store.partial_path("https://example.com/x") == partial
    assert not any(p.is_symlink() for p in places)
    partial.write_bytes(b"abc")
    finished = store.download_path("a" * 64)
    finished.mkdir()
    assert store.keep_download(partial, "a" * 64).read_bytes() == b"abc"
    assert own.read_bytes() == SOUND


def test_a_collection_says_what_it_cannot_remove(folder: Folder) -> None:
    _folder(folder.store / "actions" / "ab" / f"{'ab' * 32}.json")
    done = collect(Store(folder.store))
    assert done.strays == 1
    held = folder.store / "quarantine"
    assert [p.read_bytes() for p in held.rglob("it")] == [SOUND], "what it held is kept until the next one"
    assert json.loads(folder("store", "gc", "--json").out)["freed"] == 0


ODD = (None, 7, -1, 1e999, "", "zz", "\x1b[31m", "\0", "\ud800", "a/" * 3000, [], [[]], {}, {"x": 1})


def _others(value: Any) -> Iterator[Any]:
    """A value of JSON with each of those in it another, or gone, in turn."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        left = copy.copy(value)
        del left[key]
        yield left
        for other in _others(value[key]):
            changed = copy.copy(value)
            changed[key] = other
            yield changed


def test_facts_of_another_form_are_none(tmp_path: Path) -> None:
    """Sealed, as by another version or by somebody else."""
    folder = Folder.below(tmp_path)
    beside = {"v_pred": values(np.ones(1), "<f2"), "own": values(np.ones(2), "<f2")}
    save(folder / "a.safetensors", {**model(), **beside})
    folder.write("m.toml", RECIPE)
    folder.know("a.safetensors")
    folder.build("m.toml")
    facts = {path.parts[-3]: path for path in folder.store.glob("facts/*/*/*.json")}
    assert {"beside", "metric", "output", "prediction"} <= facts.keys()
    chance = random.Random(5)
    for kind, path in facts.items():
        sound = read_record(path)
        assert sound is not None
        others = [other for other in _others(sound) if isinstance(other, dict)]
        for other in chance.sample(others, min(len(others), 12)):
            write_record(path, other)
            for words in (("plan", "m.toml"), ("build", "m.toml")):
                said = folder(*words)
                assert said.code == 0 and "\x1b" not in said.out + said.err, (kind, other, said)
