"""sd-mecha's recipes in both dialects: a node a line, each made of those before it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from builder.base.errors import Place, Problem, SourceError, clipped
from builder.reports.imports.sketch import Sketch, file_name, number, with_suffix

_MOST = 5000  # nodes
_TOKEN = re.compile(r'\s*(?:([A-Za-z_][\w.]*)=)?("(?:[^"\\\n]|\\.)*"|&\d{1,6}|[^\s"&#=]+)')
_REMARK = re.compile(r"\s*#")
_BLOCK = re.compile(r"(IN|OUT|M)\d\d")
# The words of components that are told apart, as classes begin.
_PARTS = {"unet": "UNET", "diffuser": "UNET", "vae": "VAE", "txt": "CLIP", "clip": "CLIP", "te": "CLIP"}


class _Ref(NamedTuple):
    """The n-th node."""

    node: int


class _Node(NamedTuple):
    """A line: its word, its values in order, and those with a name."""

    line: int
    kind: str
    values: tuple[Any, ...]
    named: Mapping[str, Any]


class _Difference(NamedTuple):
    b: str
    c: str


class _Sum(NamedTuple):
    """Several differences from one base, to be added to it in one go."""

    op: str
    differences: tuple[_Difference, ...]
    params: Mapping[str, Any]


class _Part(NamedTuple):
    model: str
    word: str


class _Adapter(NamedTuple):
    source: str


class _Mask(NamedTuple):
    """Where `train_difference_mask` lets a difference through, at a strength."""

    alpha: Any


def draw(sketch: Sketch, text: str, name: str) -> None:
    """What a recipe's last line makes; raises SourceError for what is no such recipe."""
    nodes = _nodes(text, name)
    reader = _Reader(sketch, name)
    for node in nodes:
        reader.add(node)
    sketch.base = reader.model(reader.made[-1])


def _nodes(text: str, name: str) -> list[_Node]:
    found: list[_Node] = []
    for number_, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(("#", "version ")):
            continue
        kind, _, rest = line.partition(" ")
        at = 0
        values: list[Any] = []
        named: dict[str, Any] = {}
        while at < len(rest) and not _REMARK.match(rest, at):
            match = _TOKEN.match(rest, at)
            if match is None or len(values) + len(named) > 500:
                raise _wrong(name, number_, clipped(line[:200], 60))
            at = match.end()
            value = _value(match[2])
            if match[1] is None:
                values.append(value)
            else:
                named[match[1]] = value
        if kind not in ("model", "dict", "literal", "merge", "parameter", "recipe") or len(found) == _MOST:
            raise _wrong(name, number_, clipped(line[:200], 60))
        found.append(_Node(number_, kind, tuple(values), named))
    if not found:
        raise SourceError(Problem(f"`{name}` holds no sd-mecha recipe"))
    return found


def _wrong(name: str, line: int, text: str) -> SourceError:
    return SourceError(Problem("no line of an sd-mecha recipe", Place(name, line), (text,)))


def _value(word: str) -> Any:
    if word[0] == '"':
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    if word[0] == "&":
        return _Ref(int(word[1:]))
    if word in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word]
    found = number(word)
    return word if found is None else found


class _Reader:
    """`made` is what each node so far makes: a source's or step's name, weights, or what is for others."""

    def __init__(self, sketch: Sketch, name: str) -> None:
        self.sketch, self.name = sketch, name
        self.made: list[Any] = []

    def model(self, made: object) -> str:
        """The source or step that a node made, or what stands for what is none by itself."""
        if isinstance(made, _Part):
            return self.sketch.instead(f"the {made.word} by itself", made.model)
        if isinstance(made, _Difference):
            return self.sketch.instead("a difference of models by itself", made.b)
        if isinstance(made, _Sum):
            return self.sketch.instead("differences by themselves", made.differences[0].b)
        if isinstance(made, _Adapter):
            return made.source
        return made if isinstance(made, str) else self.sketch.source()

    def add(self, node: _Node) -> None:
        """Have what the next node makes."""
        values = tuple(self._value(v, node) for v in node.values)
        named = {k: self._value(v, node) for k, v in node.named.items()}
        self.made.append(self._made(node._replace(values=values, named=named)))

    def _value(self, said: object, node: _Node) -> Any:
        if not isinstance(said, _Ref):
            return said
        if said.node >= len(self.made):
            raise _wrong(self.name, node.line, f"&{said.node} is no node above")
        return self.made[said.node]

    def _made(self, node: _Node) -> Any:
        values, named = node.values, node.named
        first = values[0] if values else None
        if node.kind in ("model", "parameter"):
            kind = " ".join(str(v) for v in (*values[1:], *named.values())).lower()
            adapter = node.kind == "model" and "lora" in kind
            source = self.sketch.source(with_suffix(file_name(first)), role="lora" if adapter else "model")
            return _Adapter(source) if adapter else source
        if node.kind == "dict":
            return dict(named)
        if node.kind == "literal":
            return first
        return self._merge(str(first), list(values[1:]), named)

    def _merge(self, method: str, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        sketch = self.sketch
        if method.startswith("convert_") or method in ("cast", "exchange_ema", "omit_non_finite"):
            return args[0] if args else sketch.source()
        if method == "subtract" and len(args) == 2:
            return _Difference(self.model(args[0]), self.model(args[1]))
        if method in ("pick_component", "extract_component") and args:
            word = str(args[1] if len(args) > 1 else kwargs.get("component"))
            known = next((w for k, w in _PARTS.items() if word.lower().startswith(k)), None)
            model = self.model(args[0])
            return _Part(model, known) if known else sketch.instead(f"the component `{word[:40]}`", model)
        if method == "fallback" and len(args) == 2:
            if isinstance(args[0], _Part):
                own, other = args[0], self.model(args[1])
                return sketch.step(
                    f"{other}-{own.word}", "weighted-sum", a=other, b=own.model, alpha={own.word: 1}
                )
            return args[0]
        if method == "train_difference_mask" and len(args) >= 3:
            return _Mask(self._weights(args, kwargs, 3, "alpha", 1.0))
        if method in ("ties_sum", "ties_sum_with_dropout"):
            differences = tuple(a for a in args if isinstance(a, _Difference))
            if differences and len(differences) == len(args):
                return _Sum(method, differences, kwargs)
        if method == "add_difference" and len(args) >= 2:
            return self._added(args, kwargs)
        if method in _PLAIN:
            op, inputs, params, differs = _PLAIN[method]
            if len(args) >= len(inputs):
                if differs:
                    sketch.miss(f"sd-mecha's `{method}`: `{op}` differs from it {differs}")
                return self._step(op, inputs, args, kwargs, **params)
        if method == "n_average" and args:
            models = [self.model(a) for a in args]
            return sketch.step("average", "linear", of=dict.fromkeys(models, 1), VAE=True)
        return sketch.instead(f"`{method[:60]}`", self.model(args[0]) if args else sketch.source())

    def _added(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """A model with what is added to it."""
        sketch, a, added = self.sketch, self.model(args[0]), args[1]
        alpha = self._weights(args, kwargs, 2, "alpha", 1.0)
        if isinstance(added, _Adapter):
            return sketch.step(f"{a}-{added.source}", "apply-lora", a=a, loras={added.source: alpha})
        if isinstance(added, _Difference):
            raw = args[2] if len(args) > 2 else kwargs.get("alpha")
            op = "train-difference" if isinstance(raw, _Mask) else "add-difference"
            return sketch.step(f"{a}-{added.b}", op, a=a, b=added.b, c=added.c, alpha=alpha, VAE=True)
        if isinstance(added, _Sum) and {d.c for d in added.differences} == {a}:
            of = dict.fromkeys((d.b for d in added.differences), 1)
            scale = alpha if isinstance(alpha, float) and alpha != 1 else None
            if added.op == "ties_sum":
                share = sketch.weight(added.params.get("k", 1.0), "the `k` of ties_sum", 1.0)
                return sketch.step(f"{a}-ties", "ties", base=a, of=of, density=share, scale=scale, VAE=True)
            sketch.miss("sd-mecha's random draw, one for all tensors: another stands in its place")
            drop = sketch.weight(added.params.get("probability", 0.9), "the probability of a dropout", 0.9)
            keep = min(1.0, max(0.01, round(1 - drop, 12)))
            seed = number(added.params.get("seed")) or 0
            return sketch.step(
                f"{a}-dare",
                "dare",
                base=a,
                of=of,
                density=keep,
                vote=True,
                seed=abs(int(seed)),
                scale=scale,
                VAE=True,
            )
        return sketch.instead("`add_difference` of what is no difference", a)

    def _step(self, op: str, inputs: str, args: list[Any], kwargs: Mapping[str, Any], **params: float) -> str:
        models = {k: self.model(v) for k, v in zip(inputs, args, strict=False)}
        weights = {}
        for index, (key, otherwise) in enumerate(params.items()):
            there = {"alpha": "width", "beta": "offset"}[key] if op == "tensor-sum" else key
            weights[key] = self._weights(args, kwargs, len(inputs) + index, there, otherwise)
        name = f"{models['a']}-{models.get('b', op)}"
        return self.sketch.step(name, op, **models, **weights, VAE=True)

    def _weights(
        self, args: list[Any], kwargs: Mapping[str, Any], index: int, key: str, otherwise: float
    ) -> Any:
        """A number, or weights of blocks by name."""
        said = args[index] if len(args) > index else kwargs.get(key, otherwise)
        if isinstance(said, _Mask):
            return said.alpha
        if not isinstance(said, dict):
            return self.sketch.weight(said, f"a weight `{key}`", otherwise)
        if len(said) == 1 and not _BLOCK.fullmatch(next(iter(said)).upper()):
            return self.sketch.weight(next(iter(said.values())), f"a weight `{key}`", otherwise)
        found, strange = {}, []
        for block, weight in said.items():
            word = {"BASE": "base", "VAE": "VAE"}.get(block.upper(), block.upper())
            if (value := number(weight)) is None or (word == block.upper() and not _BLOCK.fullmatch(word)):
                strange.append(block)
            else:
                found[word] = value
        if strange:
            self.sketch.miss(f"the weights of {', '.join(strange[:5])}, which are no blocks of a UNET")
        return {"base": 0, **found}


# Operation, inputs, weights with what they are by default, and how it differs, if so.
_PLAIN: dict[str, tuple[str, str, dict[str, float], str]] = {
    "weighted_sum": ("weighted-sum", "ab", {"alpha": 0.5}, ""),
    "slerp": ("slerp", "ab", {"alpha": 0.5}, ""),
    "clamp": ("clamp", "abc", {}, ""),
    "tensor_sum": (
        "tensor-sum",
        "ab",
        {"alpha": 0.5, "beta": 0.0},
        "by a row where shares of rows are halves",
    ),
    "train_difference": ("train-difference", "abc", {"alpha": 1.0}, ""),
    "sum_twice": ("sum-twice", "abc", {"alpha": 0.5, "beta": 0.5}, ""),
    "triple_sum": ("triple-sum", "abc", {"alpha": 1 / 3, "beta": 1 / 3}, ""),
}
