"""Packed weights: which tensors are numbers only beside others, which those are, and by what scheme."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Protocol

from builder.base.errors import Problem, SourceError, clipped
from builder.base.files import parse_json
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor

# Several numbers in a byte, or scales: no plain cast says what their elements are worth.
OPAQUE = {DType.F4, DType.F6_E2M3, DType.F6_E3M2, DType.F8_E8M0}


class Scheme(NamedTuple):
    """A way to pack a layer's weight: by names, after the layer's own, of tensors that lie beside it.

    One of `told_by` tells the scheme; `beside` are what else belongs to it and means nothing alone. The
    numbers lie in `weight`.
    """

    name: str
    told_by: tuple[str, ...]
    beside: tuple[str, ...] = ()
    weight: str = "weight"


_TABLES = tuple(f"weight.{n}" for n in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))
GENERIC = "scaled"  # whose name the type of the weight completes
# The first of them that is told is meant: several share names.
SCHEMES = (
    Scheme("NVFP4", ("weight_scale_2",), ("weight_scale", "input_scale", "pre_quant_scale", "comfy_quant")),
    Scheme(
        "compressed-tensors",
        ("weight_packed", "weight_global_scale"),
        ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_global_scale"),
        "weight_packed",
    ),
    Scheme("W4A8", ("weight_s_rel", "weight_s_channel", "weight_codebook"), ("comfy_quant",)),
    Scheme(
        "SVDQuant",
        ("wscales", "wtscale", "wcscales"),
        ("qweight", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"),
        "qweight",
    ),
    Scheme("GPTQ or AWQ", ("qweight", "qzeros"), ("scales", "g_idx"), "qweight"),
    Scheme("bitsandbytes NF4", ("weight.quant_state.bitsandbytes__nf4",), _TABLES),
    Scheme("bitsandbytes FP4", ("weight.quant_state.bitsandbytes__fp4",), _TABLES),
    Scheme("bitsandbytes", (*_TABLES, "SCB"), ("weight_format",)),
    Scheme("block FP8", ("weight_scale_inv",), ("input_scale",)),
    Scheme("scaled FP8", ("scaled_fp8", "scale_weight", "scale_input")),
    Scheme(GENERIC, ("comfy_quant", "weight_scale", "input_scale", "pre_quant_scale")),
    Scheme("MLX", ("biases",), ("scales",)),
)
MARKER = "scaled_fp8"  # speaks of all that lies under its prefix
DESCRIPTION = "comfy_quant"  # of a layer, as JSON
IN_HEADER = "_quantization_metadata"  # metadata that hold the descriptions of all layers

OF_INPUT = {MARKER, DESCRIPTION, "input_scale", "scale_input"}  # say nothing of what a weight is worth

# Every such name by its last part.
_SIDES = {side.rpartition(".")[2]: side for s in SCHEMES for side in (*s.told_by, *s.beside)}
_MAX_DESCRIPTION = 1 << 12  # bytes
_TRIED = 8  # layers that a header speaks of, to find what stands before all

Shape = tuple[int, ...]
Alike = Callable[[Shape, Shape], bool]


class Spec(Protocol):
    """What is known of a tensor before it is read; a `LazyTensor` is one."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> DType: ...


class Stored(NamedTuple):
    """A packed weight as a spec: `shape` is that of what is stored, not that of the numbers.

    `alike` says whether numbers of another shape may be stored so.
    """

    shape: Shape
    dtype: DType
    alike: Alike

    def holds(self, shape: Shape) -> bool:
        """Whether numbers of this shape may be stored so."""
        return self.alike(self.shape, shape)


def up(size: int, step: int) -> int:
    """A size with what is padded to a multiple of `step`."""
    return -(-size // step) * step


def _padded(step: int, a_byte: int = 1) -> Alike:
    """Matrices with both sides padded to `step`, so many numbers a byte."""

    def alike(stored: Shape, shape: Shape) -> bool:
        rows, columns = shape if len(shape) == 2 else (0, 0)
        return rows > 0 and stored in (
            (rows, columns // a_byte),
            (up(rows, step), up(columns, step) // a_byte),
        )

    return alike


def _halves(stored: Shape, shape: Shape) -> bool:
    """As many bytes as two numbers each take, in any shape."""
    return prod(stored) == -(-prod(shape) // 2) > 0


def stored(specs: Mapping[str, Spec]) -> Mapping[str, Spec]:
    """The same, packed weights that have not the shape of their numbers as `Stored`; nothing is read."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in companions(specs):
        layer, side = split(name)
        layers[layer].add(side)
    found: dict[str, Spec] = {}
    for layer, sides in layers.items():
        spec = specs.get(name := f"{layer}.weight" if layer else "weight")
        if spec is None:
            continue
        alike: Alike | None = None
        if any(side.startswith("weight.quant_state.") for side in sides):
            alike = _halves
        elif spec.dtype is DType.U8 and "weight_scale_2" in sides:
            alike = _padded(16, 2)
        elif spec.dtype is DType.I8 and "weight_scale" in sides:
            alike = _padded(1, 2)
        elif spec.dtype is DType.F8_E4M3 and "weight_scale" in sides:
            alike = _padded(32)
        if alike is not None:
            found[name] = Stored(spec.shape, spec.dtype, alike)
    return {**specs, **found} if found else specs


@dataclass(frozen=True)
class Packing:
    """The packed tensors of a model or a part of one, by full name.

    `weights` are those that mean nothing by themselves, each with its companions: types that are packed in
    themselves have none. `companions` are all there are, each with its scheme.
    """

    tensors: Mapping[str, LazyTensor]
    weights: Mapping[str, tuple[str, ...]]
    companions: Mapping[str, Scheme]

    def __bool__(self) -> bool:
        return bool(self.weights or self.companions)

    @property
    def names(self) -> set[str]:
        """All of them: no cast may touch any."""
        return {*self.weights, *self.companions}

    @cached_property
    def by_scheme(self) -> Mapping[str, tuple[str, ...]]:
        """The weights by what they are packed by, in words.

        Of weights that look alike one description is read, which is small.
        """
        said: dict[object, str] = {}
        found: dict[str, list[str]] = defaultdict(list)
        for name, beside in self.weights.items():
            sides = [(split(b)[1], self.tensors[b].nbytes * b.endswith(DESCRIPTION)) for b in beside]
            alike = self.tensors[name].dtype, tuple(sides)
            if alike not in said:
                said[alike] = self._scheme(name, beside)
            found[said[alike]].append(name)
        return {scheme: tuple(names) for scheme, names in found.items()}

    @property
    def schemes(self) -> tuple[str, ...]:
        """What the weights are packed by, in words, or what companions without weights are of."""
        return tuple(self.by_scheme or dict.fromkeys(scheme.name for scheme in self.companions.values()))

    @property
    def named(self) -> str:
        """The schemes as words."""
        return " and ".join(self.schemes)

    @property
    def evidence(self) -> str:
        """How many weights there are, and one of them, or of the companions."""
        for name, beside in self.weights.items():
            with_ = f" beside `{beside[0]}`" if beside else ""
            many = f"{len(self.weights):,} such tensors, as " if len(self.weights) > 1 else ""
            return f"{many}`{name}` ({self.tensors[name].dtype.code}){with_}"
        return f"`{next(iter(self.companions))}` is no weight, but says what others are worth"

    def scheme(self, name: str) -> str:
        """What a weight is packed by, in words; its description, which is small, is read."""
        return self._scheme(name, self.weights[name])

    def refused(self, what: str, hint: str) -> SourceError:
        """The error that these weights, by the name of their scheme, `what` cannot be done with."""
        return SourceError(Problem(f"{self.named} weights {what}", evidence=(self.evidence,), hint=hint))

    def _scheme(self, name: str, beside: tuple[str, ...]) -> str:
        code = self.tensors[name].dtype.code
        for side in beside:
            said = description(self.tensors[side]) if side.endswith(DESCRIPTION) else None
            if said is not None and isinstance(called := said.get("format"), str):
                return clipped(called, 40)
        told = (self.companions[n].name for n in (name, *beside) if n in self.companions)
        scheme = next(told, code)
        return f"scaled {code.partition('_')[0]}" if scheme == GENERIC else scheme


def packing(tensors: Mapping[str, LazyTensor]) -> Packing:
    """What of some tensors is packed; nothing is read."""
    found = companions(tensors)
    beside: dict[str, list[str]] = defaultdict(list)
    for name in found:
        beside[split(name)[0]].append(name)
    marked = _marked(found, (n for n, t in tensors.items() if _is_eight(t) and n not in found))
    weights = {}
    for name, tensor in tensors.items():
        layer, _, own = name.rpartition(".")
        few = _is_eight(tensor) or not tensor.dtype.floating
        sides = beside.get(layer, []) if own == "weight" and few else []
        if name in found and own == found[name].weight:
            sides = [side for side in beside[layer] if side != name]
        if sides or name in marked or (tensor.dtype in OPAQUE and name not in found):
            weights[name] = tuple(dict.fromkeys((*sides, *marked.get(name, ()))))
    return Packing(tensors, weights, found)


def _is_eight(tensor: LazyTensor) -> bool:
    return tensor.dtype.bits == 8 and tensor.dtype.floating


def _marked(companions: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str]]:
    """Of names those that lie under a marker, each with the nearest."""
    markers = [(n.removesuffix(MARKER), n) for n in companions if split(n)[1] == MARKER]
    if not markers:
        return {}
    found: dict[str, tuple[str]] = {}
    around: list[tuple[str, str]] = []
    # Sorted, all that lies under a marker follows it: one look at a name, however many markers there are.
    for text, marker in sorted([*markers, *((n, "") for n in names)]):
        while around and not text.startswith(around[-1][0]):
            around.pop()
        if marker:
            around.append((text, marker))
        elif around:
            found[text] = (around[-1][1],)
    return found


def companions(names: Iterable[str]) -> dict[str, Scheme]:
    """Of all names those of companions of packed weights, each with its scheme, in the order of the names.

    What else may be a companion is one too beside those that tell a scheme, whether or not it is known there.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    places = {name: at for name in names if (at := split(name))[1]}
    for layer, side in places.values():
        sides[layer].add(side)
    told = {at: next((s for s in SCHEMES if held & {*s.told_by}), None) for at, held in sides.items()}
    return {name: scheme for name, (layer, _) in places.items() if (scheme := told[layer]) is not None}


def split(name: str) -> tuple[str, str]:
    """The layer that a companion is of, and what it is; of any other tensor, nothing."""
    side = _SIDES.get(name.rpartition(".")[2], "")
    layer = name.removesuffix(side)
    return (layer.removesuffix("."), side) if side and layer != name and layer[-1:] in ("", ".") else ("", "")


def description(tensor: LazyTensor) -> dict[str, Any] | None:
    """What a tensor of JSON says of a layer; None where it says nothing that can be read."""
    if tensor.nbytes > _MAX_DESCRIPTION:
        return None
    try:
        said = parse_json(bytes(tensor.tobytes()))
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


class Described(NamedTuple):
    """Descriptions of layers as tensors beside them, and the text less those; None: nothing is left."""

    tensors: dict[str, LazyTensor]
    rest: str | None


def described(tensors: Mapping[str, LazyTensor], text: str) -> Described | None:
    """What a header holds as `IN_HEADER`, of the layers that there are, as the tensors that say the same.

    `text` is JSON of `{"layers": {LAYER: {"format": …, …}}}`; programs turn it into these tensors when they
    load a file, and may take a denoiser's prefix away before: names may be without one. None where it is
    anything else, or speaks of no layer of `tensors`.
    """
    try:
        said = parse_json(text.encode())
    except ValueError:
        return None
    layers = said.get("layers") if isinstance(said, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        return None
    prefix = _prefix(tensors, layers)
    made: dict[str, LazyTensor] = {}
    for layer in [n for n in layers if f"{prefix}{n}.weight" in tensors]:
        data = json.dumps(layers.pop(layer)).encode()
        made[f"{prefix}{layer}.{DESCRIPTION}"] = MemoryTensor(DType.U8, (len(data),), data)
    return Described(made, json.dumps(said) if layers else None) if made else None


def _prefix(names: Collection[str], layers: Iterable[str]) -> str:
    """What stands before the names of layers: nothing where some are there so, or where it may be several."""
    wanted = tuple(f"{layer}.weight" for layer in layers)
    if any(name in names for name in wanted):
        return ""
    for end in wanted[:_TRIED]:
        if found := [name.removesuffix(end) for name in names if name.endswith(f".{end}")]:
            return found[0] if len(found) == 1 else ""
    return ""
