"""Rules that lead from the names of one layout to those of another, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from builder.base.braces import expand
from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Joined, Reshaped, Rows, Transposed

Change = Literal["same", "linear", "transpose", "qkv"]


@dataclass(frozen=True)
class Rule:
    """Modules or tensors by their names in both layouts, as patterns with braces that pair in order.

    `change` is what becomes of the tensors in diffusers' layout: a 1x1 convolution is a `linear` layer; a
    matrix is `transpose`d; the rows of `qkv` are three tensors, whose names have q, k and v for the `*`.
    """

    original: str
    diffusers: str
    change: Change = "same"


class Place(NamedTuple):
    """Where a module is in the other layout; `part` is its number among those that one was split into."""

    module: str
    change: Change
    part: int = 0


class Rules:
    """The rules of one part of a model; the longest name that a rule knows decides.

    `without` are tensors of the original that diffusers makes itself, `read_also` other names that its
    files may have.
    """

    def __init__(self, *rules: Rule, without: Sequence[str] = (), read_also: Sequence[Rule] = ()) -> None:
        self._rules = rules
        self._read_also = read_also
        self._without = frozenset(without)

    @cached_property
    def _to_diffusers(self) -> dict[str, Place]:
        return {o: Place(d, rule.change) for rule in self._rules for o, d in _pairs(rule)}

    @cached_property
    def _to_original(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for rule in (*self._rules, *self._read_also):
            for original, diffusers in _pairs(rule):
                for part, name in enumerate(_split(diffusers)):
                    found[name] = Place(original, rule.change, part)
        return found

    def to_diffusers(self, name: str, tensor: LazyTensor) -> dict[str, LazyTensor] | None:
        """The tensors that one of the original is in diffusers' layout; None: it has none there."""
        place, rest = (None, "") if name in self._without else _longest(self._to_diffusers, name)
        if place is None:
            return None
        shape = tensor.shape
        if place.change == "qkv":
            if not shape or shape[0] % 3:
                return None
            third = shape[0] // 3
            names = _split(place.module + rest)
            return {n: Rows(tensor, part * third, third) for part, n in enumerate(names)}
        if place.change == "transpose":
            if len(shape) != 2:
                return None
            tensor = Transposed(tensor)
        elif place.change == "linear" and shape[2:] == (1, 1):
            tensor = Reshaped(tensor, shape[:2])
        return {place.module + rest: tensor}

    def to_original(self, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
        """The tensors of the original that diffusers' are; and the names of those that are none there.

        Raises ValueError when two are the same.
        """
        made: dict[str, LazyTensor] = {}
        split: dict[str, dict[int, str]] = {}
        strange: list[str] = []
        for name, tensor in tensors.items():
            place, rest = _longest(self._to_original, name)
            if place is None or (place.change == "transpose" and len(tensor.shape) != 2):
                strange.append(name)
                continue
            original = place.module + rest
            if original in made or place.part in split.get(original, ()):
                raise ValueError(original)
            if place.change == "qkv":
                split.setdefault(original, {})[place.part] = name
            elif place.change == "transpose":
                made[original] = Transposed(tensor)
            elif place.change == "linear" and len(tensor.shape) == 2:
                made[original] = Reshaped(tensor, (*tensor.shape, 1, 1))
            else:
                made[original] = tensor
        for original, names in split.items():
            parts = [tensors[names[part]] for part in sorted(names)]
            alike = len({(p.dtype, p.shape) for p in parts}) == 1 and parts[0].shape
            if len(parts) == 3 and alike:
                made[original] = Joined(parts)
            else:
                strange += names.values()
        return made, strange


@dataclass(frozen=True)
class Part:
    """A part of a model: its folder in diffusers' layout, and its prefix in an original file."""

    folder: str
    prefix: str
    rules: Rules


def _pairs(rule: Rule) -> list[tuple[str, str]]:
    return list(zip(expand(rule.original)[0], expand(rule.diffusers)[0], strict=True))


def _split(name: str) -> list[str]:
    return [name.replace("*", letter) for letter in "qkv"] if "*" in name else [name]


def _longest(places: Mapping[str, Place], name: str) -> tuple[Place | None, str]:
    """The place of the longest module that a name begins with, and the rest of the name."""
    module = name
    while module not in places:
        module, dot, _ = module.rpartition(".")
        if not dot:
            return None, ""
    return places[module], name[len(module) :]
