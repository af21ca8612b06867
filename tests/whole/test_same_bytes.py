"""The same recipe and sources give the same bytes, whatever is around them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.help.building import RECIPE, Folder, content, model, save, save_dirty


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def mini(tmp_path: Path) -> Folder:
    """Of many tensors, which threads can share out in many ways."""
    return Folder.below(tmp_path).mini()


def fresh(folder: Folder, name: str) -> Folder:
    return Folder(folder.path, folder.path.parent / name, folder.environment)


def test_any_number_of_threads(mini: Folder) -> None:
    made = {}
    for threads in (1, 2, 8):
        cold = fresh(mini, f"store-{threads}")
        assert len(cold.build("mini.toml", "--threads", threads)["made"]) == 3
        made[threads] = (mini / "mini.safetensors").read_bytes()
        (mini / "mini.safetensors").unlink()
    assert made[1] == made[2] == made[8]


def test_any_process(mini: Folder) -> None:
    """Folder, umask, hash seed, locale, time zone and temporary folder have no part in the bytes."""
    mini.build("mini.toml")
    other = mini.beside("elsewhere/with a space", store="other-store")
    (other / "mini.safetensors").unlink()
    (other / "mini.lock.toml").unlink()
    said = other.process(
        "build",
        other / "mini.toml",
        before="import os; os.umask(0o077); os.chdir('/')",
        PYTHONHASHSEED="12345",
        TZ="Asia/Kathmandu",
        LC_ALL="C",
    )
    assert said.code == 0, said.err
    assert (other / "mini.safetensors").read_bytes() == (mini / "mini.safetensors").read_bytes()
    assert (other / "mini.lock.toml").read_bytes() == (mini / "mini.lock.toml").read_bytes()
    assert (other / "mini.safetensors").stat().st_mode & 0o777 == 0o600
    again = fresh(mini, "third-store").process(
        "build", "mini.toml", "-o", "again.safetensors", PYTHONHASHSEED="0"
    )
    assert again.code == 0, again.err
    assert (mini / "again.safetensors").read_bytes() == (mini / "mini.safetensors").read_bytes()


def test_a_cold_and_a_warm_store(folder: Folder) -> None:
    folder.build()
    cold = (folder / "tiny.safetensors").read_bytes()
    # What is known of components is no part of them.
    (folder / "tiny.safetensors").unlink()
    assert len(folder.build()["made"]) == 3
    assert (folder / "tiny.safetensors").read_bytes() == cold
    # From where they lie in another file, and from what the store keeps.
    folder.build("tiny.toml", "-o", "other.ckpt")
    (folder / "tiny.safetensors").unlink()
    assert folder.build()["made"] == []
    assert (folder / "tiny.safetensors").read_bytes() == cold
    (folder / "other.ckpt").unlink()
    (folder / "tiny.safetensors").unlink()
    folder = Folder(folder.path, folder.store, {"CKPT_STORE_KEEP": "all"})
    assert len(folder.build()["made"]) == 3
    (folder / "tiny.safetensors").unlink()
    assert folder.build()["made"] == []
    assert (folder / "tiny.safetensors").read_bytes() == cold
    # Warm with the components of another recipe.
    (folder / "tiny.safetensors").unlink()
    part = fresh(folder, "part")
    folder.write("part.toml", RECIPE.replace('"tiny"', '"part"', 1))
    part.build("part.toml")
    (folder / "part.safetensors").unlink()
    assert part.build()["made"] == []
    assert (folder / "tiny.safetensors").read_bytes() == cold


def test_any_container_of_the_same_tensors(folder: Folder) -> None:
    folder.build()
    expected = (folder / "tiny.safetensors").read_bytes()
    made = {}
    for form in ("safetensors", "ckpt"):
        other = Folder(folder.path.parent / form, folder.path.parent / f"store-{form}")
        save_dirty(other.path / f"dirty.{form}")
        save(other.path / "vae.pt", model("VAE-tiny", seed=2), nesting="state_dict")
        text = RECIPE.replace("dirty.ckpt", f"dirty.{form}").replace("vae.safetensors", "vae.pt")
        other.write("tiny.toml", text)
        other.build()
        made[form] = (other / "tiny.safetensors").read_bytes()
    assert made["safetensors"] == made["ckpt"] == expected


def test_another_order_of_tensors(folder: Folder) -> None:
    folder.build()
    expected = content(folder / "tiny.safetensors")
    tensors = model("VAE-tiny", seed=2)
    save(folder / "vae.pt", dict(reversed(tensors.items())))
    folder.write("tiny.toml", RECIPE.replace("vae.safetensors", "vae.pt"))
    folder.build()
    assert content(folder / "tiny.safetensors") == expected


def test_check_builds_twice_and_leaves_nothing(folder: Folder) -> None:
    said = folder("build", "tiny.toml", "--check")
    assert said.code == 0
    assert "built a second time without the store: the same bytes" in said.err
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "dirty.ckpt",
        "tiny.lock.toml",
        "tiny.safetensors",
        "tiny.toml",
        "vae.safetensors",
    ]
    assert not list(folder.store.glob("tmp/*"))


def test_check_says_when_the_bytes_differ(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fix that does something else each time is caught, and the component that differs is named."""
    from dataclasses import replace

    from builder.operations import fixes
    from builder.tensors.lazy import DType, MemoryTensor

    count = iter(range(100))

    def fickle(tensors: fixes.Tensors) -> fixes.Fixed:
        made = MemoryTensor(DType.I64, (1, 77), bytes([next(count)]) * 77 * 8)
        return fixes.Fixed({**tensors, fixes.POSITION_IDS: made}, ("something else",))

    real = fixes.FIXES["clip-position-ids"]
    monkeypatch.setitem(fixes.FIXES, "clip-position-ids", replace(real, apply=fickle))
    said = folder("build", "tiny.toml", "--check")
    assert said.code == 8
    assert "building `tiny.safetensors` again gave another file" in said.err
    assert "CLIP-tiny of `tiny`: blake3" in said.err
    assert "VAE-tiny of" not in said.err


def test_sources_found_elsewhere(folder: Folder) -> None:
    folder.build()
    expected = (folder / "tiny.safetensors").read_bytes()
    models = folder.path.parent / "models"
    moved = folder.beside("moved", store="moved-store")
    (moved / "tiny.safetensors").unlink()
    models.mkdir()
    for name in ("dirty.ckpt", "vae.safetensors"):
        shutil.move(moved / name, models / name)
    Folder(moved.path, moved.store, {"CKPT_MODELS": os.fspath(models)}).build()
    assert (moved / "tiny.safetensors").read_bytes() == expected
