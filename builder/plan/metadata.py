"""An output's metadata: what its recipe, its base and its components say, and never a time or a place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.models.catalog import Architecture
    from builder.recipe import Output, Recipe

# Of a base's own metadata, what would be untrue of what is made from it.
_UNTRUE = ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail", "sshs_", "ckpt.")

# What a base says of its kind.
_OWN = ("modelspec.architecture", "modelspec.implementation", "modelspec.resolution")


def canonical(data: Any) -> str:
    """JSON of one form: sorted, compact, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


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
    said["format"] = "pt"  # what transformers insists on, and every tool for PyTorch writes
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
    said |= ancestry(recipe, output)
    return said | dict(output.metadata)


def ancestry(recipe: Recipe, output: Output) -> dict[str, str]:
    """What a merge is made of, as the programs that merge write it, for those that show it.

    Of the models in `sd_merge_models`, known by SHA-256, there are those that the recipe pins.
    """
    sources, steps = recipe.reached(output)
    if not steps:
        return {}
    near = {n for step in steps for n in recipe.steps[step].inputs.values()}
    merged = {n: recipe.sources[n] for n in recipe.sources if n in near & sources}
    names = {n: PurePosixPath(s.file or s.recipe or n).stem for n, s in merged.items()}
    said = {
        "type": "ckpt-build",
        "name": recipe.name,
        "models": names,
        "steps": {n: recipe.steps[n].meaning() for n in sorted(steps)},
    }
    models = {
        s.sha256: {"name": names[n], "legacy_hash": None, "sd_merge_recipe": None}
        for n, s in merged.items()
        if s.sha256 is not None
    }
    return {
        "modelspec.merged_from": ", ".join(names.values()),
        "sd_merge_recipe": canonical(said),
        **({"sd_merge_models": canonical(models)} if models else {}),
    }
