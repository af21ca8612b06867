"""How the files of adapters name modules, and what of a component each of those names means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

from builder.formats.layouts.rules import OtherName, Rules
from builder.models.catalog.tables import Adapters
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.moves import Reshaped


class Target(NamedTuple):
    """What of a component a name means: a tensor, or so many of its `rows` from `first` on (None: all).

    With `transposed` or `swapped`, the adapter sees its columns as rows, or the halves of its rows the other
    way round.
    """

    tensor: str
    first: int = 0
    rows: int | None = None
    transposed: bool = False
    swapped: bool = False


Kind = str  # what of a module: `weight` or `bias`
_KINDS = ("weight", "bias", "scale")


def targets(
    tensors: Mapping[str, LazyTensor], adapters: Adapters, rules: Rules | None
) -> dict[str, dict[Kind, Target]]:
    """What every spelling of every module of a component means: its weight, and its bias if it has one.

    Names are built from what there is, and looked up: what an adapter's file says is never taken apart.
    """
    found: dict[str, dict[Kind, Target]] = {}
    for name, tensor in tensors.items():
        for other, target in _names(name, tensor, adapters, rules):
            module, kind = _split(other)
            for prefix in adapters.prefixes:
                spelt = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
                found.setdefault(spelt, {}).setdefault(kind, target)
    return found


def extracted(
    tensors: Mapping[str, LazyTensor], adapters: Adapters, rules: Rules | None, *, convolutions: bool
) -> dict[str, Target]:
    """What adapters are extracted for, by the names that kohya's scripts give it."""
    said = adapters.extracted
    assert said is not None
    patterns = said.modules + (said.convolutions if convolutions else ())
    found: dict[str, Target] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or not _matches(name, patterns):
            continue
        own = said.own_names or rules is None
        names = [(adapters.within + name, Target(name))] if own else _diffusers(name, tensor, adapters, rules)
        for other, target in names:
            found[adapters.prefixes[0] + _split(other)[0].replace(".", "_")] = target
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _diffusers(
    name: str, tensor: LazyTensor, adapters: Adapters, rules: Rules | None
) -> Iterator[tuple[str, Target]]:
    """The names of a tensor in diffusers' layout, if there is one."""
    for other in rules.others(adapters.within + name) if rules is not None else ():
        yield from _named(other, name, tensor)


def _named(other: OtherName, name: str, tensor: LazyTensor) -> Iterator[tuple[str, Target]]:
    """Another name, and what it means of a tensor; nothing where the tensor has no such rows."""
    if other.of == 1:
        change = other.change
        yield other.name, Target(name, transposed=change == "transposed", swapped=change == "swapped")
    elif (rows := other.rows(tensor.shape[0]) if tensor.shape else None) is not None:
        yield other.name, Target(name, *rows)


def _names(
    name: str, tensor: LazyTensor, adapters: Adapters, rules: Rules | None
) -> Iterator[tuple[str, Target]]:
    """The names of a tensor in all layouts; of two that are alike, the one of more trainers first."""
    yield from _diffusers(name, tensor, adapters, rules)
    yield adapters.within + name, Target(name)
    module, kind = _split(name)
    for also in adapters.names.get(module, ()):
        yield from _named(also._replace(name=f"{also.name}.{kind}"), name, tensor)


def _split(name: str) -> tuple[str, Kind]:
    """A tensor's name as a module's and what it is of that; a name without one is a weight's."""
    for kind in _KINDS:
        for end in (f".{kind}", f"_{kind}"):
            if name.endswith(end):
                return name[: -len(end)], "weight" if kind == "scale" else kind
    return name, "weight"


class Shaped(LazyTensor):
    """A tensor of which no more than the shape is known."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(DType.F32, shape)

    def read_into(self, start: int, out: memoryview) -> None:
        """There is nothing to read."""
        raise AssertionError("a shape has no bytes")


# ── the tensors of a file ──

# What follows a module's name, and what that is: a part of what changes its weight, or its bias.
_PAIRS = {
    "up": (
        ".lora_up.weight",
        ".lora_B.weight",
        ".lora_B.default.weight",
        ".lora.up.weight",
        "_lora.up.weight",
        ".lora_linear_layer.up.weight",
        ".lora_B",
        ".up.weight",
    ),
    "down": (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_A.default.weight",
        ".lora.down.weight",
        "_lora.down.weight",
        ".lora_linear_layer.down.weight",
        ".lora_A",
        ".down.weight",
    ),
    "mid": (".lora_mid.weight",),
    "bias-up": (".lora_B.bias", ".lora_B.default.bias"),
    "alpha": (".alpha",),
    "lora_magnitude_vector": (
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default.weight",
    ),
    "oft_blocks": (".oft_blocks", ".oft_diag"),
    "bias-diff": (".diff_b", ".b_norm"),
    "diff": (".diff", ".w_norm"),
    **{n: (f".{n}.weight",) for n in ("a1", "a2", "b1", "b2")},
    **{
        n: (f".{n}",)
        for n in (
            *(f"hada_{w}{n}_{half}" for w in "w" for n in (1, 2) for half in "ab"),
            *(f"hada_t{n}" for n in (1, 2)),
            *(f"lokr_w{n}{half}" for n in (1, 2) for half in ("", "_a", "_b")),
            *("lokr_t2", "scale", "dora_scale", "magnitude", "set_weight", "rescale", "on_input"),
        )
    },
    "weight": (".weight",),  # of IA3
}
_SUFFIXES = sorted(((s, part) for part, ends in _PAIRS.items() for s in ends), key=lambda p: -len(p[0]))
_ATTENTION = ("to_q", "to_k", "to_v", "to_out")  # as `….processor.to_q_lora` has them


@dataclass
class Module:
    """One module of a file: its tensors by what they are, and the names that they have in the file."""

    name: str
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    spelt: dict[str, str] = field(default_factory=dict)  # by what they are


def modules(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, Module], list[str]]:
    """The modules of a file by their names there, and the names of tensors that are of none."""
    found: dict[str, Module] = {}
    strange = []
    for name, tensor in tensors.items():
        end, part = next(((s, p) for s, p in _SUFFIXES if name.endswith(s)), ("", ""))
        if not part:
            strange.append(name)
            continue
        module = _plain(name[: len(name) - len(end)])
        held = found.setdefault(module, Module(module))
        held.tensors[part] = tensor
        held.names.append(name)
        held.spelt[part] = name
    return found, strange


def _plain(module: str) -> str:
    """A module's name without diffusers' old processors."""
    head, processor, tail = module.rpartition(".processor.")
    attention = tail.removesuffix("_lora")
    if not processor or attention not in _ATTENTION:
        return module
    return f"{head}.{attention}{'.0' if attention == 'to_out' else ''}"


def flat(tensor: LazyTensor) -> LazyTensor:
    """A tensor of one row for each of its first dimension."""
    if len(tensor.shape) == 2:
        return tensor
    rows = tensor.shape[0] if tensor.shape else 1
    return Reshaped(tensor, (rows, tensor.numel // max(1, rows)))
