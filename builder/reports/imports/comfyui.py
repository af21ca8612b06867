"""ComfyUI's graphs: models, text encoders and VAEs are merged apart, and a ratio is the first one's share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from builder.base.errors import Problem, SourceError
from builder.recipe.weights import MAX_PATTERNS
from builder.reports.imports.sketch import Sketch, file_name, number, text_of, with_suffix

_DEEPEST = 60  # nodes behind each other
_SAVES = ("CheckpointSave", "ModelSave", "ImageOnlyCheckpointSave")
_THROUGH = {  # nodes that hand a model on, by the input that it comes from
    "CLIPSetLastLayer": "clip",
    "ModelSamplingDiscrete": "model",
    "ModelSamplingFlux": "model",
}
_LOADERS = {
    "CheckpointLoaderSimple": "ckpt_name",
    "CheckpointLoader": "ckpt_name",
    "ImageOnlyCheckpointLoader": "ckpt_name",
    "UNETLoader": "unet_name",
    "CLIPLoader": "clip_name",
    "VAELoader": "vae_name",
}
_MERGES = (("ModelMerge", "UNET", "model1", "model2"), ("CLIPMerge", "CLIP", "clip1", "clip2"))
_BLOCKS = {"input": "IN*", "middle": "M00", "out": "OUT*"}
_PREFIX = re.compile(r"[A-Za-z0-9_.]{1,100}")


class _Difference(NamedTuple):
    """What `Subtract` makes: `times` the difference of two models."""

    b: str
    c: str
    times: float


def is_graph(said: Mapping[str, Any]) -> bool:
    """Whether this is a graph as ComfyUI's API takes it."""
    return bool(said) and all(isinstance(n, dict) and "class_type" in n for n in said.values())


def draw(sketch: Sketch, graph: Mapping[str, Any]) -> None:
    """What the first node that saves a model says of it; raises SourceError where there is none."""
    reader = _Reader(sketch, graph)
    saves = [n for n in graph.values() if n.get("class_type") in _SAVES]
    if not saves:
        raise SourceError(Problem("no node of the graph saves a model", evidence=(", ".join(_SAVES),)))
    if len(saves) > 1:
        sketch.miss(f"the other {len(saves) - 1} of the nodes that save a model")
    inputs = _inputs(saves[0])
    base = reader.model(inputs.get("model"))
    for word, key in (("CLIP", "clip"), ("VAE", "vae")):
        if key not in inputs:
            continue
        name = reader.model(inputs[key], key)
        if name != reader.own(base, word):
            base = sketch.fill(base, word, name)
    sketch.base = base


class _Reader:
    """`changed` holds, for each step, the model that it changes, and the first words of the classes."""

    def __init__(self, sketch: Sketch, graph: Mapping[str, Any]) -> None:
        self.sketch, self.graph = sketch, graph
        self.changed: dict[str, tuple[str, set[str]]] = {}
        self.done: dict[tuple[str, int], str | _Difference] = {}
        self.open: list[tuple[str, int]] = []

    def model(self, link: object, role: str = "model") -> str:
        """The source or step at the other end of a link."""
        made = self.at(link, role)
        if isinstance(made, _Difference):
            return self.sketch.instead("a difference of models by itself", made.b)
        return made

    def own(self, name: str, word: str) -> str:
        """The source or step whose text encoder or VAE a model has by itself."""
        while name in self.changed and word not in self.changed[name][1]:
            name = self.changed[name][0]
        return name

    def at(self, link: object, role: str) -> str | _Difference:
        """What a link leads to, made once."""
        if not (isinstance(link, list) and len(link) == 2 and isinstance(link[1], int)):
            return self.sketch.source(role=role)
        key = (str(link[0]), link[1])
        if key in self.done:
            return self.done[key]
        if key in self.open or len(self.open) >= _DEEPEST:
            raise SourceError(Problem("the nodes of the graph are made of each other"))
        self.open.append(key)
        node = self.graph.get(key[0])
        made = self._made(node if isinstance(node, dict) else {}, key, role)
        self.open.pop()
        self.done[key] = made
        return made

    def _made(self, node: Mapping[str, Any], key: tuple[str, int], role: str) -> str | _Difference:
        kind, inputs = text_of(node, "class_type"), _inputs(node)
        if kind in _LOADERS:
            return self.sketch.source(with_suffix(file_name(inputs.get(_LOADERS[kind]))), role=role)
        if kind in _THROUGH:
            if "v_prediction" in str(inputs.get("sampling")):
                self.sketch.miss('that it predicts v: `markers = ["v_pred"]` under [output] says so')
            return self.at(inputs.get(_THROUGH[kind]), role)
        if kind in ("LoraLoader", "LoraLoaderModelOnly"):
            return self._lora(inputs, key)
        for prefix, word, one, two in _MERGES:
            if kind.startswith(prefix):
                return self._merge(kind.removeprefix(prefix), word, inputs, (one, two))
        first = next((v for v in inputs.values() if isinstance(v, list)), None)
        taken = self.model(first, role) if first else self.sketch.source(role=role)
        return self.sketch.instead(f"the node `{kind[:60]}`", taken)

    def _merge(
        self, kind: str, word: str, inputs: Mapping[str, Any], keys: tuple[str, str]
    ) -> str | _Difference:
        one, two = self.model(inputs.get(keys[0])), self.at(inputs.get(keys[1]), "model")
        if kind == "Subtract" and isinstance(two, str):
            return _Difference(one, two, self.sketch.weight(inputs.get("multiplier"), "a multiplier", 1.0))
        if isinstance(two, _Difference):
            if kind != "Add":
                return self.sketch.instead(f"`{kind[:40]}` of a difference", one)
            return self._step(one, {word}, "add-difference", b=two.b, c=two.c, alpha={word: two.times})
        if kind == "Add":
            of = {one: {word: 1}, two: {word: 1}}
            name = self.sketch.step(f"{one}-merge", "linear", of=of, normalize=False)
            self.changed[name] = (one, {"UNET", "CLIP"})
            return name
        alpha = self._weights(kind, word, inputs, keys)
        if alpha is None:
            return self.sketch.instead(f"the node `{kind[:60]}`", one)
        return self._step(one, {word}, "weighted-sum", b=two, alpha=alpha)

    def _weights(self, kind: str, word: str, inputs: Mapping[str, Any], keys: tuple[str, str]) -> Any:
        """The second model's shares; None for a node of other inputs."""
        if kind == "Simple":
            return {word: self._share(inputs, "ratio")}
        if kind == "Blocks":
            by = {block: self._share(inputs, key) for key, block in _BLOCKS.items()}
            return {word: {"base": by["IN*"], **by}}
        said = {k: number(v) for k, v in inputs.items() if k not in keys and _PREFIX.fullmatch(k)}
        shares = {f"{k}*": _rest(v) for k, v in said.items() if v is not None}
        return {word: 0, "tensors": shares} if 0 < len(shares) <= MAX_PATTERNS else None

    def _share(self, inputs: Mapping[str, Any], key: str) -> float:
        """The second model's share: the ratio is the first one's."""
        return _rest(self.sketch.weight(inputs.get(key), f"the `{key}` of a merge", 1.0))

    def _lora(self, inputs: Mapping[str, Any], key: tuple[str, int]) -> str:
        """A model, or a text encoder, with a LoRA: one step for both where they come from one place."""
        sketch = self.sketch
        file = sketch.source(with_suffix(file_name(inputs.get("lora_name"))), role="lora")
        model = self.model(inputs.get("model"))
        unet = sketch.weight(inputs.get("strength_model", 1.0), f"the strength of `{file}`", 1.0)
        if "clip" not in inputs:
            return self._step(model, {"UNET"}, "apply-lora", loras={file: {"UNET": unet}})
        clip = self.model(inputs["clip"], "clip")
        own = sketch.weight(inputs.get("strength_clip", 1.0), f"the strength of `{file}`", 1.0)
        if clip != self.own(model, "CLIP"):
            first, word, strength = (clip, "CLIP", own) if key[1] == 1 else (model, "UNET", unet)
            return self._step(first, {word}, "apply-lora", loras={file: {word: strength}})
        both = unet if unet == own else {"UNET": unet, "CLIP": own}
        made = self._step(model, {"UNET", "CLIP"}, "apply-lora", loras={file: both})
        self.done |= {(key[0], 0): made, (key[0], 1): made}
        return made

    def _step(self, first: str, words: set[str], op: str, **said: Any) -> str:
        name = self.sketch.step(f"{first.removesuffix('-merge')}-merge", op, a=first, **said)
        self.changed[name] = (first, words)
        return name


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _rest(share: float) -> float:
    return round(1 - share, 12)  # no digits that only the subtraction made
