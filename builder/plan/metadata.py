"""An output's metadata: what its recipe, its base and its components say, and never a time or a place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.formats.checkpoint import Checkpoint
    from builder.models.catalog import Architecture
    from builder.recipe import Output, Recipe

# Of a base's own metadata, what would be untrue of what is made from it.
_UNTRUE = ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail", "sshs_", "ckpt.")

# What a base says of its kind.
_OWN = ("modelspec.architecture", "modelspec.implementation", "modelspec.resolution")


def canonical(data: Any) -> str:
    """JSON of one form: sorted, compact, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def carried_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """A checkpoint's own metadata; of a PyTorch file, which has none, what its tensors are for."""
    if checkpoint.container.startswith("torch"):
        return {"format": "pt"}  # what transformers insists on, and every tool for PyTorch writes
    return checkpoint.metadata


def stated_metadata(
    recipe: Recipe,
    output: Output,
    architecture: Architecture,
    carried: Mapping[str, str],
    environment: Mapping[str, str],
) -> dict[str, str]:
    """What is known before anything is made: ModelSpec 1.0.1, the recipe's own, the base's, provenance.

    A source's file name and digest appear where the recipe pins it: an unpinned source is known by its
    content alone, so that the same tensors from another container give the same bytes.
    """
    said = {k: v for k, v in carried.items() if not k.startswith(_UNTRUE)}
    said["format"] = "pt"
    v = "v_pred" in output.markers
    spec = architecture.modelspec
    if spec is not None:
        said |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": spec.name(v),
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": recipe.name,
        }
        if pixels := spec.pixels(v):
            said["modelspec.resolution"] = f"{pixels}x{pixels}"
        if recipe.description:
            said["modelspec.description"] = recipe.description
        if v:
            said["modelspec.prediction_type"] = "v"
        elif not any(cls in architecture.slots for cls in output.components):
            # Nothing of the base is replaced: it knows best what it is, such as an inpainting model.
            said |= {key: carried[key] for key in _OWN if key in carried}
        for key in ("author", "license", "tags", "usage_hint"):
            if key in output.metadata:
                said[f"modelspec.{key}"] = output.metadata[key]
        epoch = environment.get("SOURCE_DATE_EPOCH", "")
        if epoch.isdecimal():
            said["modelspec.date"] = datetime.fromtimestamp(int(epoch), timezone.utc).strftime("%Y-%m-%d")
    near, _ = recipe.reached(output)
    sources = {
        n: {"file": PurePosixPath(s.file).name, "sha256": s.sha256} if s.file else {"sha256": s.sha256}
        for n, s in recipe.sources.items()
        if n in near and s.sha256 is not None
    }
    said |= {"ckpt.recipe": recipe.name, "ckpt.recipe_sha256": recipe.closure(output)}
    if sources:
        said["ckpt.sources"] = canonical(sources)
    return said | dict(output.metadata)
