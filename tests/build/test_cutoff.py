"""Nothing is made again that need not be: what decides is content, not where or when or what it is called."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.help.building import RECIPE, Folder, content, model, save, save_dirty

PARTS = ("UNET-tiny of dirty", "VAE-tiny of vae", "CLIP-tiny of dirty")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).built()


def nothing(folder: Folder, recipe: str = "tiny.toml") -> None:
    """Neither made nor written; not even hashed, nor touched."""
    known, written = folder.components(), (folder / "tiny.safetensors").stat()
    lock = (folder / "tiny.lock.toml").stat()
    made = folder.build(recipe)
    assert made["made"] == [] and [o["state"] for o in made["outputs"]] == ["unchanged"]
    assert folder.components() == known
    assert os.path.samestat((folder / "tiny.safetensors").stat(), written)
    assert (folder / "tiny.lock.toml").stat().st_mtime_ns == lock.st_mtime_ns


def only(made: Iterable[str], *expected: str) -> None:
    assert sorted(made) == sorted(expected)


def test_nothing_changed(folder: Folder) -> None:
    assert folder.states() == {
        "source dirty": "known",
        "source vae": "known",
        **dict.fromkeys(PARTS, "stored"),
        "output tiny.safetensors": "unchanged",
    }
    nothing(folder)


def test_a_comment_and_another_order(folder: Folder) -> None:
    folder.write("tiny.toml", "# better\n" + "\n".join(reversed(RECIPE.splitlines())))
    nothing(folder)
    os.utime(folder / "tiny.toml", (1, 1))
    nothing(folder)


def test_a_touched_source(folder: Folder) -> None:
    """It is hashed again, and then known to be the same."""
    os.utime(folder / "dirty.ckpt", (1, 1))
    assert folder.states()["source dirty"] == "hash"
    nothing(folder)


def test_a_copy_of_a_source(folder: Folder) -> None:
    shutil.copy(folder / "vae.safetensors", folder / "copy")
    (folder / "copy").replace(folder / "vae.safetensors")
    nothing(folder)


def test_a_source_elsewhere(folder: Folder) -> None:
    (folder / "deep").mkdir()
    (folder / "dirty.ckpt").rename(folder / "deep" / "dirty.ckpt")
    folder.write("tiny.toml", RECIPE.replace('"dirty.ckpt"', '"deep/dirty.ckpt"'))
    made = folder.build()
    assert made["made"] == [] and made["outputs"][0]["state"] == "unchanged"


def test_another_folder_with_the_same_store(folder: Folder) -> None:
    other = folder.beside("other")
    (other / "tiny.safetensors").unlink()
    made = other.build()
    assert made["made"] == []
    assert (other / "tiny.safetensors").read_bytes() == (folder / "tiny.safetensors").read_bytes()


def test_a_copy_of_the_output_is_known_by_its_digest(folder: Folder) -> None:
    shutil.copy(folder / "tiny.safetensors", folder / "copy")
    (folder / "copy").replace(folder / "tiny.safetensors")
    assert folder.states()["output tiny.safetensors"] == "hash"
    made = folder.build()
    assert made["made"] == [] and made["outputs"][0]["state"] == "unchanged"


def test_the_same_content_from_another_container(folder: Folder) -> None:
    """The component is taken again, turns out to be the same, and so does the output."""
    before, known = (folder / "tiny.safetensors").stat(), folder.components()
    save(folder / "vae.pt", model("VAE-tiny", seed=2), nesting="state_dict")
    folder.write("tiny.toml", RECIPE.replace("vae.safetensors", "vae.pt"))
    made = folder.build()
    only(made["made"], "VAE-tiny of vae")
    assert made["outputs"][0]["state"] == "unchanged"
    assert os.path.samestat((folder / "tiny.safetensors").stat(), before)
    assert folder.components() == known


@pytest.mark.parametrize("keep", ["", "all"])
def test_another_vae(folder: Folder, keep: str) -> None:
    folder = replace(folder, environment={"CKPT_STORE_KEEP": keep})
    if keep:
        shutil.rmtree(folder.store)
        (folder / "tiny.safetensors").unlink()
        folder.know("dirty.ckpt")
        folder.build()
    known = folder.components()
    before = content(folder / "tiny.safetensors")
    save(folder / "vae.safetensors", model("VAE-tiny", seed=3))
    states = folder.states()
    assert states["source dirty"] == "known" and states["source vae"] == "hash"
    assert [states[p] for p in PARTS] == ["stored", "make", "stored"]
    assert states["output tiny.safetensors"] == "make"
    made = folder.build()
    only(made["made"], "VAE-tiny of vae")
    assert made["outputs"][0]["state"] == "written"
    assert folder.components() > known and len(folder.components()) == 4
    assert len(folder.blobs()) == (4 if keep else 0)
    after = content(folder / "tiny.safetensors")
    assert {n for n in before if before[n] != after[n]} == {
        n for n in before if n.startswith("first_stage_model.")
    }
    # And back again: all is known, and what was overwritten is made again unless it was kept.
    save(folder / "vae.safetensors", model("VAE-tiny", seed=2))
    only(folder.build()["made"], *([] if keep else ["VAE-tiny of vae"]))
    assert len(folder.components()) == 4
    assert content(folder / "tiny.safetensors") == before


def test_why_is_said(folder: Folder) -> None:
    save(folder / "vae.safetensors", model("VAE-tiny", seed=3))
    folder.know("vae.safetensors")
    why = {s["label"]: s["why"] for s in folder.plan()["steps"]}
    assert why["VAE-tiny of vae"].startswith("`vae` is another file than before: ")
    assert why["UNET-tiny of dirty"] == "made before from the same inputs"
    assert "`VAE-tiny of vae`" in why["output tiny.safetensors"]
    said = folder("build", "tiny.toml", "--explain")
    assert "make" in said.err and why["VAE-tiny of vae"] in said.err


def test_what_decides_only_about_some(folder: Folder) -> None:
    """A fix of the text encoder is no business of the others; metadata is none of any component."""
    folder.write("tiny.toml", RECIPE + 'output.metadata.author = "someone"\n')
    made = folder.build()
    assert made["made"] == [] and made["outputs"][0]["state"] == "written"
    folder.write("tiny.toml", RECIPE.replace('fixes = ["clip-position-ids"]', "fixes = []"))
    only(folder.build()["made"], "CLIP-tiny of dirty")
    folder.write("tiny.toml", RECIPE + 'output.precision = "bf16"\n')
    only(folder.build()["made"], *PARTS)


def test_another_name_of_the_output(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE + 'output.file = "other.safetensors"\n')
    made = folder.build()
    assert made["made"] == []
    assert (folder / "other.safetensors").read_bytes() == (folder / "tiny.safetensors").read_bytes()


def test_other_names_of_sources(folder: Folder) -> None:
    """Components are known by content: only the provenance in the metadata is another."""
    folder.write(
        "tiny.toml",
        RECIPE.replace("dirty.", "other.").replace('"dirty"', '"other"').replace("other.ckpt", "dirty.ckpt"),
    )
    assert folder.build()["made"] == []
    assert content(folder / "tiny.safetensors")


def test_two_recipes_share_what_is_the_same(folder: Folder) -> None:
    save(folder / "other-vae.safetensors", model("VAE-tiny", seed=3))
    folder.write(
        "two.toml", RECIPE.replace('"tiny"', '"two"', 1).replace("vae.safetensors", "other-vae.safetensors")
    )
    only(folder.build("two.toml")["made"], "VAE-tiny of vae")
    assert len(folder.components()) == 4


def test_two_outputs_share_what_is_the_same(folder: Folder) -> None:
    folder.write(
        "both.toml",
        RECIPE.replace('"tiny"', '"both"', 1)
        + '[[output]]\nname = "a"\n[[output]]\nname = "b"\nmetadata.author = "someone"\n'
        + '[[output]]\nname = "c"\nprecision = "fp32"\ncomponents.UNET-tiny = "dirty"\n',
    )
    shutil.rmtree(folder.store)
    made = folder.build("both.toml")
    only(made["made"], *PARTS, *(f"{p} #2" for p in PARTS))
    assert len(folder.components()) == 6
    assert [Path(o["path"]).name for o in made["outputs"]] == [
        "both-a.safetensors",
        "both-b.safetensors",
        "both-c.safetensors",
    ]
    assert content(folder / "both-a.safetensors") == content(folder / "both-b.safetensors")


def test_a_component_that_was_collected_is_made_again(folder: Folder) -> None:
    expected = (folder / "tiny.safetensors").read_bytes()
    shutil.rmtree(folder.store)
    folder = replace(folder, environment={"CKPT_STORE_KEEP": "all"})
    (folder / "tiny.safetensors").unlink()
    folder.build()
    entry = next(
        e
        for e in folder.store.glob("components/*/*.json")
        if json.loads(e.read_text())["class"] == "VAE-tiny"
    )
    for gone in ([folder.blobs()[entry.stem]], [folder.blobs()[entry.stem], entry]):
        for path in gone:
            path.unlink()
        (folder / "tiny.safetensors").unlink()
        only(folder.build()["made"], "VAE-tiny of vae")
        assert (folder / "tiny.safetensors").read_bytes() == expected


def test_what_lay_in_an_output_that_is_gone_is_made_again(folder: Folder) -> None:
    expected = (folder / "tiny.safetensors").read_bytes()
    (folder / "tiny.safetensors").unlink()
    states = folder.states()
    assert [states[p] for p in PARTS] == ["make"] * 3
    only(folder.build()["made"], *PARTS)
    assert (folder / "tiny.safetensors").read_bytes() == expected


def test_a_missing_source_is_not_missed_when_all_is_stored(folder: Folder) -> None:
    """With pins, or a lock, what was made of a source can be used without it."""
    shas = {
        n: s["sha256"]
        for s in folder.plan()["steps"]
        if (n := s["label"].removeprefix("source ")) != s["label"]
    }
    pinned = RECIPE + "".join(f'sources.{n}.sha256 = "{s}"\n' for n, s in shas.items())
    pinned = pinned.replace('base = "dirty"', 'base = "NEW SD-tiny"') + (
        'components.UNET-tiny = "dirty"\ncomponents.CLIP-tiny = "dirty"\n'
    )
    folder.write("pinned.toml", pinned.replace('"tiny"', '"pinned"', 1))
    (folder / "dirty.ckpt").unlink()
    (folder / "vae.safetensors").unlink()
    said = folder("build", "pinned.toml", "--offline", "--json")
    assert said.json["made"] == []
    assert len(content(folder / "pinned.safetensors")) == 12


def test_a_base_that_lost_what_lay_beside(folder: Folder) -> None:
    """Optional tensors of a base are content, too."""
    before = content(folder / "tiny.safetensors")
    save_dirty(folder / "dirty.ckpt", seed=5)
    folder.build()
    after = content(folder / "tiny.safetensors")
    assert before.keys() == after.keys()
    assert before["alphas_cumprod"] != after["alphas_cumprod"]
