"""sd-webui-model-mixer: one model after the other merged into the first."""

from __future__ import annotations

from typing import Any

from builder.reports.imports.block_weights import Weights, with_elements
from builder.reports.imports.sketch import numbers
from builder.reports.imports.told import Drawn, Told

_LETTERS = "bcdefghijklmnopqrst"  # of the models that are merged into `model_a`


def draw(told: Told) -> Drawn:
    """What `sd-webui-model-mixer` says: models by title, a mode and weights for each."""
    said, sketch, ancestors = told.said, told.sketch, told.ancestors
    made = ancestors.by_name(said.get("model_a"), "a")
    keys = [k for k in (f"model_{letter}" for letter in _LETTERS) if isinstance(said.get(k), str)]
    for index, key in enumerate(keys):
        mode, way = (str(_item(said.get(k), index)) for k in ("mode", "calcmode"))
        b = ancestors.by_name(said[key], key[-1])
        name = told.name if index == len(keys) - 1 else f"{made}-{b}"
        if way not in ("Normal", "None"):
            sketch.miss(f"`{way}`, the way in which `{b}` was merged: the plain one stands in its place")
        alpha = _weights(told, index, b)
        if mode == "Sum":
            made = sketch.step(name, "weighted-sum", a=made, b=b, alpha=alpha)
        elif mode == "Add-Diff":
            c = ancestors.by_name(said.get("base_model"), "base")
            made = sketch.step(name, "add-difference", a=made, b=b, c=c, alpha=alpha)
        elif mode == "DARE":
            sketch.miss(f"the random draw of `{b}`: another stands in its place")
            of = {b: alpha}
            made = sketch.step(name, "dare", base=made, of=of, density=0.5, normalize=False)
        else:
            made = sketch.instead(f"`{mode[:40]}` of `{b}`", made)
    if isinstance(adjust := said.get("adjust"), str) and adjust.strip(", 0"):
        sketch.miss(f"the adjustment `{adjust}`")
    return Drawn(made)


def _item(said: object, index: int) -> Any:
    return said[index] if isinstance(said, list) and index < len(said) else None


def _weights(told: Told, index: int, name: str) -> Any:
    said, sketch = told.said, told.sketch
    by_block = _item(said.get("use_mbws"), index)
    weights = None
    if by_block is not False:
        weights = Weights.of(numbers(_item(said.get("weights_alpha"), index)) or [], 0.0)
    if weights is None:
        what = f"the alpha of `{name}`"
        weights = Weights(sketch.weight(_item(said.get("alpha"), index), what, 0.5))
        if by_block is True:
            sketch.miss(f"the weights by block of `{name}`: one stands for all")
    if _item(said.get("use_elemental"), index) is True:
        with_elements(weights, _item(said.get("elemental"), index), sketch)
    if weights.blocks and len(set(weights.blocks.values())) == 1:
        weights = Weights(weights.base, {}, weights.tensors)
    return weights.value()
