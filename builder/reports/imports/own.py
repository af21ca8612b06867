"""What a build of ours wrote: the steps as the recipe means them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.base.errors import Problem, SourceError
from builder.base.files import decoded
from builder.operations import OPERATIONS
from builder.reports.imports.sketch import number, text_of, with_suffix
from builder.reports.imports.told import Drawn, Told

_DEEPEST = 64  # steps that are made of each other; a recipe has no more


def draw(told: Told) -> Drawn:
    """What `ckpt-build` says, with names as they were."""
    steps = {str(n): s for n, s in decoded(told.said.get("steps")).items() if isinstance(s, dict)}
    reader = _Reader(told, steps)
    base = told.said.get("base")
    used = {i for s in steps.values() for i in decoded(s.get("inputs")).values() if isinstance(i, str)}
    last = [n for n in steps if n not in used]
    if not isinstance(base, str):
        base = last[-1] if last else ""
    if not base:
        raise SourceError(Problem("the metadata of the build name no step"))
    made = reader.model(base)
    picks = decoded(told.said.get("components"))
    if picks and not told.outer:
        told.sketch.miss(f"the components of `{told.name}` that are of other models")
    if told.outer:
        told.sketch.components |= {
            str(cls)[:100]: reader.model(name) for cls, name in picks.items() if isinstance(name, str)
        }
    return Drawn(made, text_of(told.said, "precision") or None)


class _Reader:
    def __init__(self, told: Told, steps: Mapping[str, dict[str, Any]]) -> None:
        self.told, self.steps = told, steps
        self.files = decoded(told.said.get("models"))
        self.done: dict[str, str] = {}
        self.open: list[str] = []

    def model(self, name: str) -> str:
        """The source or step that had the name."""
        if name in self.done:
            return self.done[name]
        if name in self.open or len(self.open) >= _DEEPEST:
            raise SourceError(Problem("the steps of the metadata are made of each other"))
        self.open.append(name)
        made = self.step(name) if name in self.steps else self.source(name)
        self.open.pop()
        self.done[name] = made
        return made

    def source(self, name: str) -> str:
        sketch = self.told.sketch
        said = decoded(self.files.get(name))
        return sketch.source(with_suffix(text_of(said, "name")), said.get("sha256"), named=name)

    def step(self, name: str) -> str:
        said, sketch = self.steps[name], self.told.sketch
        op = OPERATIONS.get(text_of(said, "op"))
        inputs = {str(k): v for k, v in decoded(said.get("inputs")).items() if isinstance(v, str)}
        first = next(iter(inputs.values()), None)
        if op is None or not set(op.inputs) <= inputs.keys():
            what = f"`{text_of(said, 'op')[:40]}` of `{name[:60]}`"
            return sketch.instead(what, self.model(first) if first else sketch.source(role=name))
        params = decoded(said.get("params"))
        made: dict[str, Any] = {}
        for key in (*op.inputs, *op.optional_inputs):
            if key in inputs:
                made[key] = self.model(inputs[key])
        if op.many is not None:
            of = {v: self.model(v) for k, v in inputs.items() if k.startswith(f"{op.many}.")}
            weights = decoded(params.get(op.many))
            many = {n: self._weights(weights.get(old), 1.0) for old, n in of.items()}
            made[op.many] = many if op.weighted else list(many)
        for key, param in op.params.items():
            value = params.get(key, param.default)
            if param.kind == "weights":
                made[key] = self._weights(value, param.default)
            elif type(value) is type(param.default) and value != param.default:
                made[key] = value
        for key, kind in (("arithmetic", ("exact", "file")), ("precision", ("fp16", "bf16", "fp32", "keep"))):
            made[key] = said.get(key) if said.get(key) in kind else None
        classes = [c for c in said.get("components") or () if isinstance(c, str)][:20]
        return sketch.step(
            name, op.name, **made, VAE=said.get("vae") is True or None, components=classes or None
        )

    def _weights(self, said: object, otherwise: Any) -> Any:
        """Weights in their one form, as a recipe writes them."""
        if not isinstance(said, Mapping):
            found = number(said)
            return otherwise if found is None else found
        parts = {str(k): self._weights(v, 0.0) for k, v in decoded(said.get("parts")).items()}
        base = number(said.get("base")) or 0.0
        blocks = {str(k): number(v) or 0.0 for k, v in decoded(said.get("blocks")).items()}
        pairs = [p for p in said.get("tensors") or () if isinstance(p, list) and len(p) == 2]
        tensors = {str(k): number(v) or 0.0 for k, v in pairs}
        own = {"base": base} if blocks or base or not parts else {}
        return {**own, **blocks, **parts, **({"tensors": tensors} if tensors else {})}
