"""sd-webui-supermerger: a mode, a way to compute it, weights by block and by element."""

from __future__ import annotations

from typing import Any

from builder.reports.imports.block_weights import Weights, with_elements, without
from builder.reports.imports.sketch import number, numbers, text_of
from builder.reports.imports.told import Drawn, Told

# By the way to compute (empty: any other) and the first word of the mode: the operation, its inputs, and
# whether it has a second weight.
_OPERATIONS: dict[tuple[str, str], tuple[str, str, bool]] = {
    ("normal", "Weight"): ("weighted-sum", "ab", False),
    ("normal", "Add"): ("add-difference", "abc", False),
    ("normal", "Triple"): ("triple-sum", "abc", True),
    ("normal", "Twice"): ("sum-twice", "abc", True),
    ("cosineA", "Weight"): ("cosine-a", "ab", False),
    ("cosineB", "Weight"): ("cosine-b", "ab", False),
    ("trainDifference", "Add"): ("train-difference", "abc", False),
    ("smoothAdd", "Add"): ("smooth-add", "abc", False),
    ("smoothAdd MT", "Add"): ("smooth-add", "abc", False),
    ("extract", "Add"): ("extract-features", "abc", True),
    ("tensor", "Weight"): ("tensor-sum", "ab", True),
}
# Of SDXL's second text encoder these are no weights to it: they stay.
_LEFT_ALONE = ("*text_projection", "*logit_scale", "*positional_embedding")


def draw(told: Told) -> Drawn:
    """What `sd-webui-supermerger` says; it merged the VAE with the base's weight, but for SDXL's by block."""
    said, sketch = told.said, told.sketch
    mode, way = text_of(said, "mode"), text_of(said, "calcmode") or "normal"
    word = next((w for w in ("Twice", "Triple", "Add", "Weight") if w in mode), "")
    found = _OPERATIONS.get((way, word))
    a = told.model("model_a", "a")
    if found is None:
        return Drawn(sketch.instead(f"`{mode[:40]}`, `{way}` of `{told.name}`", a))
    op, inputs, two = found
    models = {k: told.model(f"model_{k}", k) for k in inputs[1:]}
    sketch.miss("what supermerger does not write down: an adjustment, a baked VAE, the precision, a seed")
    if op == "extract-features":
        sketch.miss(f"the gamma of `{told.name}`: 1 stands in its place")
    vae = not op.startswith("cosine")
    params: dict[str, Any] = {}
    for key in ("alpha", "beta")[: 1 + two]:
        weights = _weights(told, key)
        if key == "alpha":
            with_elements(weights, said.get("elemental_merge"), sketch)
        for kind in ("Include", "Exclude"):
            if isinstance(words := said.get(kind), list) and without(
                weights, words[:200], kind == "Include", sketch
            ):
                vae = False
        if len(weights.blocks) == 20:
            vae = False
            if weights.base:
                weights.tensors |= dict.fromkeys(_LEFT_ALONE, 0.0)
        elif len(weights.blocks) == 61:
            vae = False
        params[key] = weights
    values = {k: w.value(vae) for k, w in params.items()}
    return Drawn(told.step(op, a=a, **models, **values, VAE=vae or None))


def _weights(told: Told, key: str) -> Weights:
    """The weights of one parameter: of all, or of the base and of each block."""
    said, sketch = told.said, told.sketch
    if said.get("mbw") is not True:
        return Weights(sketch.weight(said.get(f"base_{key}"), f"the {key} of `{told.name}`", 0.5))
    base, listed = number(said.get(f"base_{key}")) or 0.0, numbers(said.get(f"weights_{key}"))
    orig = numbers(said.get(f"weights_{key}_orig"))
    if listed is not None and len(listed) == 20:
        listed = listed[:19]  # the last is the VAE's
    weights = Weights.of([base, *listed] if listed else orig or [], base)
    if weights is not None:
        return weights
    sketch.miss(
        f"the weights by block of `{told.name}`: {len(listed or ())} numbers, the base's stands for all"
    )
    return Weights(base)
