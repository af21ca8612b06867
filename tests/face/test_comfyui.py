"""The node for ComfyUI, in a stand-in for what ComfyUI documents of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_build import CkptError, LockError, UsageError
from tests.help.building import ROOT, UNET, VAE, Folder, content, files, model, save, save_dirty
from tests.help.comfyui import Comfy, InterruptProcessingException, Linked, RejectedError, start

NODE = ROOT / "integrations" / "comfyui" / "ckpt_build_node.py"
RECIPE = """\
format = 1
name = "tiny"
base = "dirty"
sources.dirty.file = "dirty.ckpt"
sources.vae.file = "other.vae.safetensors"
components.VAE-tiny = "vae"
"""


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Comfy, Any]:
    """ComfyUI with a checkpoint, a VAE in the folder for those, and recipes in two places."""
    (tmp_path / "home").mkdir()
    for name, value in Folder(tmp_path / "home", tmp_path / "store").variables.items():
        monkeypatch.setenv(name, value)
    running, module = start(tmp_path / "ComfyUI", NODE, monkeypatch)
    models = running.root / "models"
    save_dirty(models / "checkpoints" / "dirty.ckpt")
    save(models / "vae" / "other.vae.safetensors", model("VAE-tiny", seed=2))
    for folder in ("recipes", "checkpoints/mine"):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / f"{Path(folder).name}.toml").write_text(RECIPE)
    return running, module.NODE_CLASS_MAPPINGS["CkptBuild"]


def test_recipes_of_all_folders_are_offered(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    running.run(node, recipe="recipes.toml")  # which leaves a lock, that is no recipe
    names, _ = node.INPUT_TYPES()["required"]["recipe"]
    assert names == [str(Path("mine", "mine.toml")), "recipes.toml"]
    assert (running.root / "models" / "recipes" / "recipes.lock.toml").is_file()


def test_a_recipe_becomes_a_model_a_clip_and_a_vae(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    unet, clip, vae = running.run(node, recipe="recipes.toml")
    made = running.root / "models" / "recipes" / "tiny.safetensors"
    assert running.loaded == [made] and node.RETURN_TYPES == ("MODEL", "CLIP", "VAE")
    assert {*unet, *clip, *vae} <= content(made).keys() and unet and clip and vae
    assert next(iter(unet)).startswith(UNET) and next(iter(vae)).startswith(VAE)
    assert running.bars[-1][0] == running.bars[-1][1] > 0


def test_it_runs_again_when_something_has_changed(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    recipe = running.root / "models" / "recipes" / "recipes.toml"
    first = running.run(node, recipe="recipes.toml")
    assert running.run(node, recipe="recipes.toml") is first
    recipe.write_text(RECIPE + "# a comment\n")
    assert running.run(node, recipe="recipes.toml") is first
    recipe.write_text(RECIPE + 'output.precision = "bf16"\n')
    second = running.run(node, recipe="recipes.toml")
    save(running.root / "models" / "vae" / "other.vae.safetensors", model("VAE-tiny", seed=3))
    third = running.run(node, recipe="recipes.toml")
    name = next(iter(second[2]))
    assert "bfloat16" in str(second[2][name].dtype) != str(first[2][name].dtype)
    assert not third[2][name].equal(second[2][name]) and len(running.loaded) == 3
    (running.root / "models" / "vae" / "other.vae.safetensors").unlink()
    with pytest.raises(CkptError, match=r"other\.vae\.safetensors"):
        running.run(node, recipe="recipes.toml")


def test_what_is_wrong_is_told_before_anything_runs(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    recipe = running.root / "models" / "recipes" / "recipes.toml"
    recipe.write_text(RECIPE.replace("base =", "bas ="))
    with pytest.raises(RejectedError, match=r"unknown key `bas`\n  --> .*recipes\.toml:3:1"):
        running.run(node, recipe="recipes.toml")
    assert not running.loaded and not running.bars


def test_a_recipe_that_another_node_names(comfy: tuple[Comfy, Any]) -> None:
    """Which it is shows when this one runs; so it runs each time."""
    running, node = comfy
    first = running.run(node, recipe=Linked("recipes.toml"))
    assert running.run(node, recipe=Linked("recipes.toml")) is not first and len(running.loaded) == 2
    with pytest.raises(UsageError, match="ComfyUI knows no recipe"):
        running.run(node, recipe=Linked("../secret.toml"))


@pytest.mark.parametrize("name", ["../secret.toml", "/etc/hostname", "recipes.lock.toml", "nothing.toml", ""])
def test_a_workflow_names_no_other_file(comfy: tuple[Comfy, Any], name: str) -> None:
    running, node = comfy
    (running.root / "models" / "secret.toml").write_text("token = 's3cr3t'\n")
    (running.root / "models" / "recipes" / "recipes.lock.toml").write_text("token = 's3cr3t'\n")
    with pytest.raises(RejectedError) as told:
        running.run(node, recipe=name)
    assert "ComfyUI knows no recipe" in str(told.value) and "s3cr3t" not in str(told.value)
    with pytest.raises(UsageError, match="ComfyUI knows no recipe"):
        node().build(name)


def test_the_button_cancels_and_nothing_is_left(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    before = files(running.root)
    running.cancel = lambda: True
    with pytest.raises(InterruptProcessingException):
        running.run(node, recipe="recipes.toml")
    assert files(running.root) == before and not running.loaded
    running.cancel = lambda: False
    assert running.run(node, recipe="recipes.toml")


def test_how_it_is_built(comfy: tuple[Comfy, Any]) -> None:
    running, node = comfy
    recipe = running.root / "models" / "recipes" / "recipes.toml"
    with pytest.raises(LockError, match="there is no lock"):
        running.run(node, recipe="recipes.toml", locked=True)
    recipe.write_text(RECIPE + '[[output]]\nname = "a"\n[[output]]\nname = "b"\nprecision = "bf16"\n')
    with pytest.raises(UsageError, match=r"several outputs\nhint: `output` is one of a, b"):
        running.run(node, recipe="recipes.toml")
    with pytest.raises(UsageError, match="has no output `c`"):
        running.run(node, recipe="recipes.toml", output="c")
    unet, *_ = running.run(node, recipe="recipes.toml", output="b")
    assert "bfloat16" in str(next(iter(unet.values())).dtype)
    recipe.write_text(RECIPE + 'output.file = "tiny.safetensors.index.json"\n')
    with pytest.raises(UsageError, match="ComfyUI loads single files"):
        running.run(node, recipe="recipes.toml")
