"""An output's metadata: what its recipe, its base and its components say, and never a time or a place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from builder.base.errors import Problem, UsageError, clipped
from builder.base.files import decoded
from builder.models.prediction import ARCHITECTURE, IMPLEMENTATION, WORDS
from builder.recipe.recipe import FromBase
from builder.tensors.packed import IN_HEADER

if TYPE_CHECKING:
    from builder.formats.checkpoint import Checkpoint
    from builder.models.catalog import ModelSpec
    from builder.recipe import Output, Recipe

# Of a base's own metadata, what would be untrue of what is made from it.
_UNTRUE = ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail", "sshs_", "ckpt.", IN_HEADER)
# Of a GGUF file, what says how it is to be read.
_OF_GGUF = ("general.architecture", "general.type", "tokenizer.", "quantize.")

DATE = "modelspec.date"
_RECIPE, _MODELS = "sd_merge_recipe", "sd_merge_models"
_LONGEST = 1 << 18  # characters of what a source tells of its own making; longer ones are no JSON when cut


def canonical(data: Any) -> str:
    """JSON of one form: sorted, compact, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def date_of(environment: Mapping[str, str]) -> str | None:
    """The day that SOURCE_DATE_EPOCH says; raises UsageError where that is no time in seconds."""
    said = environment.get("SOURCE_DATE_EPOCH", "")
    if not said:
        return None
    if not (said.isascii() and said.isdecimal()):
        fact = f"SOURCE_DATE_EPOCH is `{clipped(said, 40)}`, which is no time in whole seconds since 1970"
        raise UsageError(Problem(fact, hint="write digits alone, as in `1700000000`, or unset it"))
    try:
        return datetime.fromtimestamp(int(said), timezone.utc).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        fact = f"SOURCE_DATE_EPOCH is `{clipped(said, 40)}`, which is beyond the year 9999"
        hint = "it is in seconds since 1970: one in milliseconds is a thousand times too large"
        raise UsageError(Problem(fact, hint=hint)) from None


def carried_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """A checkpoint's own metadata; of a PyTorch file, which has none, what its tensors are for.

    What a GGUF file says of how it is to be read goes with its form.
    """
    if checkpoint.container == "gguf":
        return {k: v for k, v in checkpoint.metadata.items() if not k.startswith(_OF_GGUF)}
    if checkpoint.container.startswith("torch"):
        return {"format": "pt"}  # what transformers insists on, and every tool for PyTorch writes
    return checkpoint.metadata


def stated_metadata(
    recipe: Recipe,
    output: Output,
    spec: ModelSpec | None,
    denoiser: Mapping[str, str],
    carried: Mapping[str, str],
    environment: Mapping[str, str],
    told: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """What is known before anything is made: ModelSpec 1.0.1, the recipe's own, the base's, provenance.

    `told` is the metadata of the sources that a merge is made of, by name, as far as there is any.
    `denoiser` is what is said of what predicts, wherever that comes from, in place of what the base says in
    `carried`; `spec` is what the catalog says of such a model. A source's file name and digest appear where
    the recipe pins it: an unpinned source is known by its content alone, so that the same tensors from
    another container give the same bytes, and so does a build with a lock and one without.
    """
    said = {k: v for k, v in carried.items() if not k.startswith(_UNTRUE) and k not in WORDS} | dict(denoiser)
    said["format"] = "pt"  # what transformers insists on, and every tool for PyTorch writes
    if ARCHITECTURE in denoiser:
        model = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": recipe.name,
            IMPLEMENTATION: denoiser.get(IMPLEMENTATION, "https://github.com/Stability-AI/generative-models"),
        }
        said = said | model if spec is not None else model | said
        if recipe.description:
            said["modelspec.description"] = recipe.description
        for key in ("author", "license", "tags", "usage_hint"):
            if key in output.metadata:
                said[f"modelspec.{key}"] = output.metadata[key]
        if (date := date_of(environment)) is not None:
            said[DATE] = date
    near, _ = recipe.reached(output)
    sources = {
        n: {"file": PurePosixPath(s.file).name, "sha256": s.sha256} if s.file else {"sha256": s.sha256}
        for n, s in recipe.sources.items()
        if n in near and s.sha256 is not None
    }
    said |= {"ckpt.recipe": recipe.name, "ckpt.recipe_sha256": recipe.closure(output)}
    if sources:
        said["ckpt.sources"] = canonical(sources)
    said |= ancestry(recipe, output, told)
    return said | dict(output.metadata)


def ancestry(recipe: Recipe, output: Output, told: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What a merge is made of, as the programs that merge write it, for those that show it.

    Of the models in `sd_merge_models`, known by SHA-256, there are those that the recipe pins, each with the
    recipe that its own metadata tell of, and what these say of models before them.
    """
    _, steps = recipe.reached(output)
    if not steps:
        return {}
    merged = {n: recipe.sources[n] for n in recipe.merged(output)}
    files = {n: PurePosixPath(s.file or s.recipe or n).name for n, s in merged.items()}
    pins = {n: {"sha256": s.sha256} if s.sha256 else {} for n, s in merged.items()}
    said = {
        "type": "ckpt-build",
        "name": recipe.name,
        "models": {n: {"name": files[n], **pins[n]} for n in merged},
        "steps": {n: recipe.steps[n].meaning() for n in sorted(steps)},
        "base": output.base.name if isinstance(output.base, FromBase) else None,
        "components": {cls: pick.source for cls, pick in sorted(output.components.items())},
        "precision": output.precision,
    }
    models: dict[str, Any] = {}
    for n, s in merged.items():
        before = {k: decoded(told.get(n, {}).get(k, "")[:_LONGEST]) for k in (_RECIPE, _MODELS)}
        if s.sha256 is not None:
            models = before[_MODELS] | models
            parent = {"name": files[n], "legacy_hash": None, _RECIPE: before[_RECIPE] or None}
            models[s.sha256] = parent
    return {
        "modelspec.merged_from": ", ".join(PurePosixPath(f).stem for f in files.values()),
        _RECIPE: canonical(said),
        _MODELS: canonical(models),
    }
