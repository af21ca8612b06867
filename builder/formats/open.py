"""Opening a checkpoint of whatever kind, which its leading bytes tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import Place, Problem, SourceError
from builder.base.words import listed
from builder.formats import safetensors, sniff
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint, unwrapped

if TYPE_CHECKING:
    from builder.formats.layouts import Layout

CONFIG = "config.json"  # of a part of a model, beside its weights
_MODELS = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf"}  # suffixes, for a hint alone
NONE: Mapping[str, Layout] = {}


def open_checkpoint(
    path: Path | str,
    layouts: Mapping[str, Layout] = NONE,
    *,
    repair: bool = False,
) -> Checkpoint:
    """Open a checkpoint: its table of contents is read, its tensors are not.

    `path` is a safetensors file, a PyTorch file (zip, legacy or tar), a GGUF file, the index of a sharded
    set, a folder that holds exactly one such index, or the weights of a part of a model beside its
    `config.json`, or a model's folder in one of diffusers' `layouts`, whose tensors get the names of the
    original layout. Which it is, is told by its leading bytes, never by its suffix. With `repair`, faults of
    a safetensors file from which no tensor suffers are passed over, and are in `mended`. Close it, or use it
    in `with`.
    Raises SourceError for anything else, saying what it is.
    """
    path = Path(path)
    name = str(path)
    # Of os.path, which answers where pathlib raises: a name may be too long, a folder out of reach.
    if os.path.isfile(path / "model_index.json"):  # noqa: PTH113
        from builder.formats.diffusers import open_folder

        return open_folder(path, name, layouts.values(), partial(_open_file, repair=repair))
    return _open_file(_weights_in(path) if os.path.isdir(path) else path, name, repair)  # noqa: PTH112


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint's tensors lie in, sorted; raises as `open_checkpoint` with `repair`."""
    if os.path.isfile(path / "model_index.json"):  # noqa: PTH113
        from builder.formats.diffusers import files_in

        return files_in(path, partial(_open_file, repair=True))
    with open_checkpoint(path, repair=True) as checkpoint:
        return sorted(Path(blob.name) for blob in checkpoint.blobs)


def _open_file(path: Path, name: str, repair: bool = False) -> Checkpoint:
    blob = FileBlob(path)
    try:
        checkpoint = unwrapped(_open(blob, path, name, repair))
        if blob not in checkpoint.blobs:
            blob.close()
        return checkpoint
    except BaseException:
        blob.close()
        raise


def _open(blob: FileBlob, path: Path, name: str, repair: bool) -> Checkpoint:
    head = blob.read(0, min(blob.size, sniff.HEAD))
    if sniff.is_safetensors(head):
        return safetensors.from_blob(blob, name, repair=repair)
    if sniff.is_gguf(head):
        from builder.formats import gguf

        return gguf.from_blob(blob, name)
    from builder.formats import sharded  # not needed for most files, so not loaded at the start
    from builder.formats.torch.containers import looks_like_torch, open_torch

    if looks_like_torch(head) and not sniff.is_npz(head):
        return open_torch(blob, name)
    if head.lstrip()[:1] == b"{" and (index := sharded.read_index(blob)) is not None:
        return sharded.from_index(index, blob, path, name, repair=repair)
    stranger = sniff.stranger(head)
    if stranger is not None and path.suffix == ".toml":
        stranger = stranger._replace(hint="if it is a recipe, `ckpt build RECIPE` makes its files")
    if stranger is not None:
        problem = Problem(f"this is no checkpoint but {stranger.what}", Place(blob.name), *stranger[1:])
        raise SourceError(problem)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return safetensors.from_blob(blob, name, repair=repair)  # which says what is wrong with it
    raise SourceError(
        Problem(
            "this is no checkpoint, nor any kind of file that is known",
            Place(blob.name),
            (f"{blob.size:,} bytes",),
        )
    )


def is_model(folder: Path) -> bool:
    """Whether a folder is itself a checkpoint, rather than one that holds some."""
    from builder.formats.diffusers import has_weights

    if (folder / "model_index.json").exists() or any(folder.glob("*.index.json")):
        return True
    return (folder / CONFIG).is_file() and has_weights(folder)


def _weights_in(folder: Path) -> Path:
    from builder.formats.diffusers import has_weights, weights_in

    if os.path.isfile(folder / CONFIG) and has_weights(folder):  # noqa: PTH113
        return weights_in(folder)
    found = sorted(folder.glob("*.index.json"))
    if len(found) == 1:
        return found[0]
    found = found or sorted(p for p in folder.iterdir() if p.suffix.lower() in _MODELS)
    have = listed(tuple(p.name for p in found)) or "no file `*.index.json`"
    fact = f"`{folder}` is a folder that does not hold one sharded set"
    hint = f"give a file, such as `{found[0]}`" if found else "give a file"
    raise SourceError(Problem(fact, evidence=(f"it holds {have}",), hint=hint))
