"""Chattiori-Model-Merger: a method by its name, weights in words that were rounded."""

from __future__ import annotations

import re
from typing import Any

from builder.operations.presets import presets
from builder.reports.imports.block_weights import Weights
from builder.reports.imports.sketch import number, numbers, text_of
from builder.reports.imports.told import Drawn, Told

_METHODS: dict[str, tuple[str, str, int]] = {  # operation, inputs, weights
    "Weighted Sum": ("weighted-sum", "ab", 1),
    "Add Difference": ("add-difference", "abc", 1),
    "Triple Sum": ("triple-sum", "abc", 2),
    "Sum Twice": ("sum-twice", "abc", 2),
    "Train Difference": ("train-difference", "abc", 1),
    "smooth Add Difference": ("smooth-add", "abc", 1),
    "Multiply Difference": ("multiply-difference", "abc", 2),
    "Similarity Add Difference": ("similarity-add-difference", "abc", 2),
    "Tensor Sum": ("tensor-sum", "ab", 2),
}
_HASHES = {"b": "secondary_model_hash", "c": "tertiary_model_hash"}
_PRESET = re.compile(r"preset\W{1,3}([A-Za-z0-9_*/-]{1,40})")
_LIST = re.compile(r"\[([-+0-9.eE, ]{1,4000})\]")
_FIRST = re.compile(r"(?:^|,)\s*([-+0-9.eE]{1,30})\s*(?:,|$)")
_ROUNDS = ("weighted-sum", "add-difference", "sum-twice", "triple-sum")


def draw(told: Told) -> Drawn:
    """What `merge-models-chattiori` says. It left the VAE alone, and computed in the files' own type."""
    said, sketch = told.said, told.sketch
    method, ways = text_of(said, "merge_method"), text_of(said, "calculation")
    made = told.model("primary_model_hash", "a")
    found = _METHODS.get(method)
    if found is not None and found[0] == "weighted-sum" and (way := re.search("cosine_([01])", ways)):
        found = ("cosine-" + "ab"[int(way[1])], "ab", 1)
    if found is not None:
        op, inputs, count = found
        models = {k: told.model(_HASHES[k], k) for k in inputs[1:]}
        weights = {k: _weights(told, k) for k in ("alpha", "beta")[:count]}
        file = "file" if op in _ROUNDS else None
        made = told.step(op, a=made, **models, **weights, arithmetic=file)
    elif method != "No Interpolation":
        made = sketch.instead(f"`{method[:40] or 'no method'}` of `{told.name}`", made)
    for word in ("use_dif_10", "use_dif_20", "use_dif_21", "fine"):
        if word in ways:
            sketch.miss(f"`{word}` of `{told.name}`, which no step says")
    made = told.bake(made, said.get("bake_in_vae"))
    kind = text_of(said, "fp")
    if kind == "fp8":
        sketch.miss(f"`{told.name}` was saved as FP8, which no output is")
    return Drawn(made, kind if kind in ("fp16", "fp32") else None)


def _weights(told: Told, key: str) -> Any:
    text = text_of(told.said, f"{key}_info")[:8000]
    listed, preset, first = _LIST.search(text), _PRESET.search(text), _FIRST.search(_PRESET.sub("", text))
    what = f"the {key} of `{told.name}`"
    base = told.sketch.weight(number(first[1]) if first else None, what, 0.5)
    told.sketch.miss(f"the exact weights of `{told.name}`: three decimals are said of them, and no seed")
    if preset and preset[1] in presets():
        return {"UNET": preset[1], "CLIP": base}
    if listed:
        blocks = numbers(listed[1])
        weights = Weights.of([base, *blocks], base) if blocks else None
        if weights is not None:
            return weights.value()
    if listed or preset or told.said.get("block_weights") is True:
        told.sketch.miss(f"{what} by block: that of the base stands for all")
    return base
