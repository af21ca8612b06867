"""mergekit's configurations: a method, its models and their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.base.errors import Problem, SourceError, clipped
from builder.base.files import decoded
from builder.recipe.names import SUFFIXES
from builder.reports.imports.sketch import Sketch, number, text_of, with_suffix

_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_DIFFERENCES: dict[
    str, tuple[str, dict[str, Any], dict[str, Any]]
] = {  # op, what is fixed, mergekit's defaults
    "task_arithmetic": ("dare", {"density": 1}, {"normalize": False}),
    "ties": ("ties", {}, {"normalize": True, "density": 1.0}),
    "dare_linear": ("dare", {}, {"normalize": False, "density": 1.0}),
    "dare_ties": ("dare", {"vote": True}, {"normalize": False, "density": 1.0}),
}


def draw(sketch: Sketch, said: Mapping[str, Any]) -> None:
    """What a configuration says; raises SourceError where it is none."""
    method = text_of(said, "merge_method")
    models = [m for m in said.get("models") or () if isinstance(m, dict)] if "models" in said else []
    if not method or not models:
        why = "it has `slices`, of layers of language models" if "slices" in said else ""
        fact = "no mergekit configuration with `merge_method` and `models`"
        raise SourceError(Problem(fact, evidence=(why,) if why else ()))
    shared = decoded(said.get("parameters"))
    base = _source(sketch, said["base_model"]) if said.get("base_model") is not None else None
    of: dict[str, dict[str, Any]] = {}
    for model in models:
        of[_source(sketch, model.get("model"))] = shared | decoded(model.get("parameters"))
    others = {n: p for n, p in of.items() if n != base}
    made = _step(sketch, method, base, of, others, shared)
    sketch.base = made
    dtype = said.get("out_dtype") or said.get("dtype")
    sketch.output["precision"] = _PRECISIONS.get(str(dtype), "keep")
    if method not in ("slerp", "linear") and said.get("dtype") != "float32":
        sketch.miss("mergekit's arithmetic: it computed in the files' type, this does in FP32")
    for key in ("tokenizer", "tokenizer_source", "chat_template"):
        if key in said:
            sketch.miss(f"`{key}`, which is of language models")


def _step(
    sketch: Sketch,
    method: str,
    base: str | None,
    of: Mapping[str, dict[str, Any]],
    others: Mapping[str, dict[str, Any]],
    shared: Mapping[str, Any],
) -> str:
    """The step of a method."""
    first, *rest = [*([base] if base else []), *(n for n in of if n != base)]
    normal = shared.get("normalize")
    if method == "linear":
        weights = {n: _weight(sketch, p.get("weight"), f"the weight of `{n}`", 1.0) for n, p in of.items()}
        return sketch.step("merge", "linear", of=weights, normalize=False if normal is False else None)
    if method == "slerp" and len(rest) == 1:
        sketch.miss("mergekit's slerp, which keeps no length: that of recipes keeps one between the two")
        alpha = _weight(sketch, shared.get("t"), "its `t`", 0.5)
        return sketch.step("merge", "slerp", a=first, b=rest[0], alpha=alpha)
    if method == "model_stock" and base and others:
        return sketch.step("merge", "model-stock", base=base, of=list(others))
    if method in _DIFFERENCES and base and others:
        op, fixed, defaults = _DIFFERENCES[method]
        weights = {
            n: _weight(sketch, p.get("weight"), f"the weight of `{n}`", 1.0) for n, p in others.items()
        }
        params = dict(fixed)
        if "density" in defaults:
            densities = {_density(p.get("density"), sketch) for p in others.values()}
            params["density"] = max(densities)
            if len(densities) > 1:
                sketch.miss(f"a density for each model: {max(densities)} stands for all")
        normalize = normal if isinstance(normal, bool) else defaults["normalize"]
        scale = shared.get("lambda")
        if method.startswith("dare"):
            sketch.miss(
                "mergekit's random draw, which hangs on the order of tensors: another stands in its place"
            )
        return sketch.step(
            "merge",
            op,
            base=base,
            of=weights,
            **params,
            normalize=None if normalize else False,
            scale=None if scale is None else sketch.weight(scale, "its `lambda`", 1.0),
        )
    if method == "passthrough" and len(of) == 1:
        return first
    return sketch.instead(f"mergekit's `{method[:40]}`", first)


def _source(sketch: Sketch, said: object) -> str:
    if isinstance(said, dict):
        said = said.get("model") or said.get("path")
    name = said if isinstance(said, str) else ""
    if "+" in name:
        name, _, lora = name.partition("+")
        sketch.miss(f"the LoRA `{lora}` that is added to `{name}`")
    made = sketch.source(with_suffix(name.partition("@")[0]))
    if name and not name.endswith(SUFFIXES):
        sketch.tell(made, f"`{clipped(name, 100)}` is a folder or a repository: name its file, or urls")
    return made


def _density(said: object, sketch: Sketch) -> float:
    found = 1.0 if said is None else _weight(sketch, said, "a density", 1.0)
    return min(1.0, max(0.01, found)) if isinstance(found, float) else 1.0


def _weight(sketch: Sketch, said: object, what: str, otherwise: float) -> Any:
    """A parameter: a number, numbers over layers, or values for tensors whose names hold a word."""
    if said is None:
        return otherwise
    if isinstance(said, list) and said and all(isinstance(i, dict) for i in said):
        pairs = [(i.get("filter"), number(i.get("value"))) for i in said[:100]]
        base = next((v for f, v in pairs if f is None and v is not None), None)
        # Of several that fit a name, mergekit takes the first, a recipe the last.
        words = {f"*{f}*": v for f, v in reversed(pairs) if isinstance(f, str) and v is not None and _fine(f)}
        if base is None or len(words) + 1 < len(pairs):
            sketch.miss(f"{what} in part: `{str(said)[:120]}`")
        base = otherwise if base is None else base
        return {"base": base, "tensors": words} if words else base
    if isinstance(said, list) and said and (found := [n for n in map(number, said) if n is not None]):
        sketch.miss(f"{what}, a gradient over layers: its mean stands in its place")
        return round(sum(found) / len(found), 12)
    return sketch.weight(said, what, otherwise)


def _fine(word: str) -> bool:
    return 0 < len(word) <= 200 and word.isprintable() and not set(word) & set("*?[]")
