"""`ckpt replace`: checkpoints with components of other files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from builder.formats import open_checkpoint
from builder.tensors.lazy import DType, MemoryTensor
from tests.help.building import CLIP, UNET, VAE, Folder, content, model, save, save_dirty
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save_dirty(made / "a.ckpt")
    save(made / "vae.pt", model("VAE-tiny", DType.F16, seed=5))
    return made


def part(path: Path, prefix: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n[len(prefix) :]: t for n, t in content(path).items() if n.startswith(prefix)}


def test_a_file_with_two_endings_gives_a_recipe_that_can_be_read(folder: Folder) -> None:
    (folder / "a.ckpt").rename(folder / "a.CKPT.ckpt")
    args = ("replace", "a.CKPT.ckpt", "VAE-tiny=vae.pt", "-o", "b.safetensors", "--save-recipe", "b.toml")
    assert folder(*args).code == 0
    assert 'name = "a"' in (folder / "b.toml").read_text()
    assert folder("build", "b.toml").code == 0


def test_only_what_is_named_is_replaced(folder: Folder) -> None:
    said = folder("replace", "a.ckpt", "VAE-tiny=vae.pt", "-o", "b.safetensors")
    assert said.code == 0, said.err
    assert "left out of `a`: EMA" in said.err and "left out of `a`: junk" in said.err
    made = folder / "b.safetensors"
    assert part(made, VAE) == content(folder / "vae.pt")
    folder("extract", "a.ckpt", "unet", "-o", "unet.safetensors")
    assert part(made, UNET) == content(folder / "unet.safetensors")
    with open_checkpoint(made) as checkpoint:
        assert "ckpt.sources" not in checkpoint.metadata, "nothing pins them"
    # Of a recipe that is kept they are pinned, and it says so.
    saved = folder("replace", "a.ckpt", "VAE-tiny=vae.pt", "-o", "b.safetensors", "--save-recipe", "b.toml")
    assert saved.code == 0, saved.err
    with open_checkpoint(made) as checkpoint:
        sources = json.loads(checkpoint.metadata["ckpt.sources"])
        digest = hashlib.sha256((folder / "vae.pt").read_bytes()).hexdigest()
        assert sources.keys() == {"a", "vae"} and sources["vae"] == {"file": "vae.pt", "sha256": digest}


def test_a_component_of_a_file_that_has_several(folder: Folder) -> None:
    said = folder("replace", "a.ckpt", "unet=a.ckpt:UNET-tiny-EMA", "vae=vae.pt:vae", "-o", "b.safetensors")
    assert said.code == 0, said.err
    folder("extract", "a.ckpt", "EMA", "-o", "ema.safetensors")
    assert part(folder / "b.safetensors", UNET) == content(folder / "ema.safetensors")


@pytest.mark.parametrize("name", ["a:b.pt", "vae=x.pt", "a=b:c=d.pt", "x:VAE-tiny", "mit Lücke.safetensors"])
def test_names_with_colons_and_equal_signs(folder: Folder, name: str) -> None:
    save(folder / name, model("VAE-tiny", seed=9))
    for word in (name, f"{name}:VAE-tiny-SD"):
        said = folder("replace", "a.ckpt", f"VAE-tiny={word}", "-o", "b.safetensors", "--precision", "keep")
        assert said.code == 0, said.err
        assert part(folder / "b.safetensors", VAE) == content(folder / name)


def test_two_files_of_one_name_and_a_file_named_twice(folder: Folder) -> None:
    save(folder / "sub/vae.pt", model("CLIP-tiny-SD", seed=5))
    (folder / "link.pt").symlink_to("vae.pt")
    args = ("VAE-tiny=link.pt", "CLIP-tiny=sub/vae.pt", "UNET-tiny=./a.ckpt")
    said = folder("replace", "a.ckpt", *args, "-o", "b.safetensors", "--save-recipe", "b.toml")
    assert said.code == 0, said.err
    text = (folder / "b.toml").read_text()
    assert text.count("sha256 =") == 3 and 'UNET-tiny = "a"' in text
    assert part(folder / "b.safetensors", CLIP).keys() == content(folder / "sub/vae.pt").keys()


def test_an_open_slot_is_filled(folder: Folder) -> None:
    whole = model("SD-tiny", DType.F16)
    save(folder / "unet.safetensors", {n: t for n, t in whole.items() if not n.startswith(VAE)})
    said = folder("replace", "unet.safetensors", "VAE=vae.pt", "-o", "b.safetensors", "--json")
    assert said.code == 0, said.err
    assert folder("inspect", "b.safetensors", "--no-metric").code == 0
    missing = folder("replace", "unet.safetensors", "UNET=a.ckpt", "-o", "c.safetensors")
    assert missing.code == 3 and "nothing fills the slot `VAE-tiny`" in missing.err


def test_a_new_model_of_the_parts_of_others(folder: Folder) -> None:
    line = ("NEW SDtiny", "UNET=a.ckpt", "clip=a.ckpt", "vae.pt")
    said = folder("replace", *line, "-o", "b.safetensors", "--save-recipe", "b.toml")
    assert said.code == 0, said.err
    assert part(folder / "b.safetensors", VAE) == content(folder / "vae.pt")
    assert folder("inspect", "b.safetensors", "--json").json["files"][0]["architecture"] == "SD-tiny"
    assert folder("new", *line, "-o", "c.toml").code == 0
    assert folder("build", "c.toml").code == 0
    assert content(folder / "c.safetensors") == content(folder / "b.safetensors")
    made = (folder / "b.safetensors").read_bytes()
    assert folder("build", "b.toml", "-o", "again.safetensors").code == 0
    assert (folder / "again.safetensors").read_bytes() == made


def test_the_saved_recipe_makes_the_same_bytes(folder: Folder) -> None:
    args = ("replace", "a.ckpt", "VAE-tiny=vae.pt", "--fix", "clip-position-ids", "--profile", "kohya")
    assert folder(*args, "-o", "out/b.safetensors", "--save-recipe", "b.toml").code == 0
    first = (folder / "out/b.safetensors").read_bytes()
    assert folder(*args, "-o", "plain.safetensors").code == 0
    (folder / "out/b.safetensors").unlink()
    assert folder("build", "b.toml").code == 0
    assert (folder / "out/b.safetensors").read_bytes() == first
    assert content(folder / "plain.safetensors") == content(folder / "out/b.safetensors")


def test_a_folder_to_write_in(folder: Folder) -> None:
    for args, name in (
        (("replace", "a.ckpt", "VAE-tiny=vae.pt"), "a.safetensors"),
        (("extract", "a.ckpt", "clip"), "a-1089.clip.safetensors"),
        (("prune", "a.ckpt"), "a-pruned.safetensors"),
    ):
        said = folder(*args, "-o", "new/folder/")
        assert said.code == 0, said.err
        assert [p.name for p in (folder / "new" / "folder").iterdir()] == [name]
        (folder / "new" / "folder" / name).unlink()
    assert folder("replace", "a.ckpt", "VAE-tiny=vae.pt:UNET", "-o", "none/").code == 2
    assert not (folder / "none").exists()


def test_saving_below_a_link(folder: Folder) -> None:
    """`..` leads out of what a link leads to, so paths are taken from there."""
    (folder / "deep/down").mkdir(parents=True)
    (folder / "link").symlink_to("deep/down")
    args = ("replace", "a.ckpt", "VAE-tiny=vae.pt", "-o", "b.safetensors", "--save-recipe", "link/b.toml")
    assert folder(*args).code == 0
    assert folder("build", "link/b.toml", "--allow-outside").code == 0
    assert (folder / "deep/down/b.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_refusals(folder: Folder) -> None:
    save(folder / "strange.safetensors", {"x": MemoryTensor(DType.F32, (2,), bytes(8))})
    folder.write("page.pt", "<!doctype html><html>401</html>")
    (folder / "link.safetensors").symlink_to("a.ckpt")
    (folder / "hard.safetensors").hardlink_to(folder / "vae.pt")
    before = sorted(p.name for p in folder.path.iterdir())
    told = []
    for args in (
        ["a.ckpt", "VAE=vae.pt"],
        ["a.ckpt", "-o", "b.safetensors"],
        ["a.ckpt", "a.ckpt", "-o", "b.safetensors"],
        ["a.ckpt", "=vae.pt", "-o", "b.safetensors"],
        ["NEW SD-tiny", "VAE=vae.pt", "-o", "b.safetensors"],
        ["NEW SD-tny", "VAE=vae.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=", "-o", "b.safetensors"],
        ["a.ckpt", "VAE-tny=vae.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=missing.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=vae.pt:CLIP-tiny", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=vae.pt:what", "-o", "b.safetensors"],
        ["a.ckpt", "UNET=vae.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=page.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=vae.pt", "vae-tiny=a.ckpt", "-o", "b.safetensors"],
        ["strange.safetensors", "VAE=vae.pt", "-o", "b.safetensors"],
        ["vae.pt", "VAE=vae.pt", "-o", "b.safetensors"],
        ["a.ckpt", "VAE=vae.pt", "-o", "a.ckpt"],
        ["a.ckpt", "VAE=vae.pt", "-o", "link.safetensors"],
        ["a.ckpt", "VAE=vae.pt", "-o", "hard.safetensors"],
        ["a.ckpt", "VAE=vae.pt", "-o", "b"],
        ["a.ckpt", "VAE=vae.pt:UNET", "-o", "b.safetensors"],
    ):
        said = folder("replace", *args)
        told.append(f"$ ckpt replace {' '.join(args)}\n{said.err}[{said.code}]\n")
        assert said.code in (2, 3, 6, 7) and "Traceback" not in said.err and not said.out
    assert sorted(p.name for p in folder.path.iterdir()) == before
    text = "\n".join(told).replace(str(folder.path), "…")
    assert text == golden(GOLDEN / "replace.txt", text)


def test_names_that_no_recipe_can_hold(folder: Folder) -> None:
    for name in ("line\nbreak.pt", os.fsdecode(b"\xff.pt")):
        save(folder / name, model("VAE-tiny"))
        said = folder("replace", "a.ckpt", f"VAE={name}", "-o", "b.safetensors", "--save-recipe", "b.toml")
        assert said.code != 0 and "Traceback" not in said.err and said.err.startswith("error: ")
        assert not (folder / "b.toml").exists()
