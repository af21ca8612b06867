"""A node for ComfyUI that builds a recipe, where it has changed, and loads the checkpoint that it makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths

from ckpt_build import CkptError, Problem, Progress, UsageError, Workspace

RECIPES = "recipes"  # what ComfyUI calls the folders of recipes, also in extra_model_paths.yaml
# Where else sources are looked for, beside the recipe's folder and those that CKPT_MODELS names.
SOURCES = ("checkpoints", "diffusion_models", "unet", "vae", "text_encoders", "clip", "loras", "embeddings")
LOADED = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")  # what ComfyUI loads as a checkpoint


def _register() -> None:
    """Have ComfyUI list recipes: those in `models/recipes`, and those beside checkpoints."""
    known = folder_paths.folder_names_and_paths.get(RECIPES, ([], set()))[0]
    folders = [str(Path(folder_paths.models_dir) / RECIPES), *folder_paths.get_folder_paths("checkpoints")]
    folder_paths.folder_names_and_paths[RECIPES] = ([*dict.fromkeys([*known, *folders])], {".toml"})


_register()


def _names() -> list[str]:
    return [n for n in folder_paths.get_filename_list(RECIPES) if not n.endswith(".lock.toml")]


def _path(recipe: str | None) -> Path:
    """The file of a recipe of the list: a workflow, which may be a stranger's, names no other file."""
    path = folder_paths.get_full_path(RECIPES, recipe) if recipe and recipe in _names() else None
    if path is None:
        hint = "put it into `models/recipes`, or beside a checkpoint"
        raise UsageError(Problem(f"ComfyUI knows no recipe `{recipe}`", hint=hint))
    return Path(path)


def _workspace(offline: bool) -> Workspace:
    """What the environment says, and ComfyUI's own folders of models."""
    kinds = (k for k in SOURCES if k in folder_paths.folder_names_and_paths)
    folders = [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    named = [f for f in (os.environ.get("CKPT_MODELS", ""), *folders) if f]
    environment = {**os.environ, "CKPT_MODELS": os.pathsep.join(dict.fromkeys(named))}
    return Workspace(environment=environment, offline=offline)


class _Bar:
    """ComfyUI's progress bar, over all that a build reads, and its button to cancel."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(1)
        self._tasks: dict[str, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._tasks[progress.task] = progress
        done = sum(p.done for p in self._tasks.values())
        total = sum(p.total for p in self._tasks.values())
        self._bar.update_absolute(done, max(done, total))


class CkptBuild:
    """Build a recipe, and give what its checkpoint holds."""

    DESCRIPTION = "Builds a ckpt-build recipe, unless its checkpoint is there already, and loads it."
    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "build"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The recipes there are, and how they are built."""
        locked = "Fail if the lock beside the recipe would change."
        output = "Which output of a recipe that has several, by its name."
        return {
            "required": {"recipe": (_names(), {"tooltip": "In models/recipes, or beside a checkpoint."})},
            "optional": {
                "locked": ("BOOLEAN", {"default": False, "tooltip": locked}),
                "offline": ("BOOLEAN", {"default": False, "tooltip": "Use no network."}),
                "output": ("STRING", {"default": "", "tooltip": output}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, recipe: str | None = None) -> bool | str:
        """True, or all that is wrong with the recipe, as text; None is one that another node will name."""
        try:
            if recipe is not None:
                _workspace(offline=True).load(_path(recipe))
        except CkptError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(
        cls, recipe: str | None = None, locked: bool = False, offline: bool = False, output: str = ""
    ) -> object:
        """What the checkpoint depends on: the recipe's meaning and its sources, as they are now.

        No number, which equals nothing, where that cannot be told: then the node runs, and says why.
        """
        work = _workspace(offline=True)
        try:
            read = work.load(_path(recipe))
            sources = [n for n in work.plan(read).nodes if n.kind == "source"]
            own = [n.path for n in sources if n.path and work.store.path not in n.path.parents]
            states = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in own]
        except (CkptError, OSError):
            return float("nan")
        return repr((read.digest, [n.key for n in sources], states, locked, output))

    def build(
        self, recipe: str, locked: bool = False, offline: bool = False, output: str = ""
    ) -> tuple[Any, Any, Any]:
        """The model, the text encoder and the VAE of the checkpoint that the recipe makes."""
        work = _workspace(offline)
        made = work.build(work.load(_path(recipe)), locked=locked, progress=_Bar()).outputs
        chosen = [o for o in made if not output or o.name == output]
        if len(chosen) != 1:
            fact = f"`{recipe}` has no output `{output}`" if output else f"`{recipe}` has several outputs"
            raise UsageError(Problem(fact, hint=f"`output` is one of {', '.join(o.name for o in made)}"))
        path = chosen[0].path
        if path.suffix.lower() not in LOADED:
            raise UsageError(Problem(f"ComfyUI loads single files, and `{path.name}` is none"))
        loaded = comfy.sd.load_checkpoint_guess_config(
            str(path),
            output_vae=True,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
        return loaded[0], loaded[1], loaded[2]


NODE_CLASS_MAPPINGS = {"CkptBuild": CkptBuild}
NODE_DISPLAY_NAME_MAPPINGS = {"CkptBuild": "Build Checkpoint"}
