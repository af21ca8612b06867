"""Miniature sources as strangers' files are, and a recipe that makes a clean checkpoint of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from builder.base.disk import write_bytes, write_text
from builder.base.errors import OutputError, Problem
from builder.base.files import read_bounded
from builder.formats.write_safetensors import write
from builder.formats.write_torch import writing_torch
from builder.models.samples import CLEAN, DIRTY, Model, make
from builder.tensors.lazy import DType
from builder.tensors.scan import carry_out

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


DIRTY_FILE, GOOD, OTHER, NAMED = "dirty.ckpt", "good.vae.safetensors", "other.vae.safetensors", "demo.toml"
PRODUCTS = ("demo.safetensors", "demo.lock.toml")


def write_sources(folder: Path) -> dict[str, str]:
    """Write the demo's files into `folder`; what each is, by name.

    A PyTorch Lightning checkpoint with EMA, junk and broken position ids, two VAEs, and the recipe.
    Raises OutputError, also where something else has one of the demo's names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ckpt-demo-") as temp:
        said = _write(Path(temp))
        made = {name: (Path(temp) / name).read_bytes() for name in said}
    _check_names(folder, made)
    for name, data in made.items():
        write_bytes(folder / name, data, durable=False)
    return said


def swap_vaes(folder: Path) -> None:
    """Put each VAE in the place of the other."""
    good, other = ((folder / name).read_bytes() for name in (GOOD, OTHER))
    write_bytes(folder / GOOD, other, durable=False)
    write_bytes(folder / OTHER, good, durable=False)


def _check_names(folder: Path, made: Mapping[str, bytes]) -> None:
    """Raise OutputError unless what has a name of the demo's was left by one; products go with the recipe."""
    allowed = {name: {data} for name, data in made.items()}
    allowed[GOOD] = allowed[OTHER] = {made[GOOD], made[OTHER]}  # a demo that was stopped left them so
    ours = _holds(folder / NAMED, allowed[NAMED])
    for name in (*allowed, *PRODUCTS):
        path = folder / name
        left = _holds(path, allowed[name]) if name in allowed else ours and path.is_file()
        if os.path.lexists(path) and not left:
            fact = f"`{path}` exists already, and is none of the demo's"
            raise OutputError(Problem(fact, hint="give the demo a folder of its own"))


def _holds(path: Path, contents: Collection[bytes]) -> bool:
    """Whether a file holds one of `contents`."""
    try:
        return read_bounded(path, max(map(len, contents))) in contents
    except OSError:
        return False


def _write(folder: Path) -> dict[str, str]:
    dirty = make("SD-mini", precision=DType.F32, seed=1, dirt=DIRTY)
    path, nesting, extras = folder / DIRTY_FILE, dirty.nesting, dirty.extras
    carry_out(writing_torch(path, dirty.tensors, nesting=nesting, extras=extras, durable=False))
    for seed, name in ((2, GOOD), (3, OTHER)):
        _write_vae(folder / name, make("VAE-mini", precision=DType.F32, seed=seed, dirt=CLEAN))
    write_text(folder / NAMED, RECIPE, durable=False)
    return {
        DIRTY_FILE: "a training checkpoint: Lightning entries, EMA, junk, a broken position id",
        GOOD: "the VAE it was meant to have",
        OTHER: "another VAE, for later",
        NAMED: "the recipe",
    }


def _write_vae(path: Path, model: Model) -> None:
    write(path, model.tensors, sha256=False, durable=False)
