"""Miniature sources as strangers' files are, and a recipe that makes a clean checkpoint of them."""

from __future__ import annotations

from pathlib import Path

from builder.base.disk import write_text
from builder.formats.write_safetensors import write
from builder.formats.write_torch import write_torch
from builder.models.samples import CLEAN, DIRTY, Model, make
from builder.tensors.lazy import DType

RECIPE = """\
format = 1
name = "demo"
description = "A dirty training checkpoint, cleaned, with the VAE it was meant to have"
base = "NEW SD-mini"                  # every slot of it is to be filled
fixes = ["clip-position-ids"]

[sources.dirty]
file = "dirty.ckpt"

[sources.vae]
file = "good.vae.safetensors"

[components]
UNET-mini = "dirty"
CLIP-mini = "dirty"
VAE-mini = "vae"
"""


def write_sources(folder: Path) -> dict[str, str]:
    """Write the demo's files into `folder`; what each is, by name.

    A PyTorch Lightning checkpoint with EMA, junk and broken position ids, two VAEs, and the recipe.
    Existing files of these names are replaced. Raises OutputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dirty = make("SD-mini", precision=DType.F32, seed=1, dirt=DIRTY)
    write_torch(
        folder / "dirty.ckpt", dirty.tensors, nesting=dirty.nesting, extras=dirty.extras, durable=False
    )
    for seed, name in ((2, "good.vae.safetensors"), (3, "other.vae.safetensors")):
        _write_vae(folder / name, make("VAE-mini", precision=DType.F32, seed=seed, dirt=CLEAN))
    write_text(folder / "demo.toml", RECIPE, durable=False)
    return {
        "dirty.ckpt": "a training checkpoint: Lightning entries, EMA, junk, a broken position id",
        "good.vae.safetensors": "the VAE it was meant to have",
        "other.vae.safetensors": "another VAE, for later",
        "demo.toml": "the recipe",
    }


def _write_vae(path: Path, model: Model) -> None:
    write(path, model.tensors, sha256=False, durable=False)
