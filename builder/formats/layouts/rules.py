"""Rules that lead from the names of one layout to those of another, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Joined, Reshaped, Rows, Transposed

Change = Literal["same", "linear", "transpose", "qkv"]


CHANGES: tuple[Change, ...] = get_args(Change)
SOME = 1000  # names of a file that tell whether rules may be of use


class Rule(NamedTuple):
    """A module or tensor by its name in both layouts; what follows in a name is the same in both.

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
    files may have, `within` what may be left away at the beginning of a name there. `count` is of
    all its rules.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        without: Sequence[str] = (),
        read_also: Sequence[Rule] = (),
        within: str = "",
    ) -> None:
        self.count = len(rules) + len(read_also)
        self._without = frozenset(without)
        self._within = within
        self._to_diffusers = _Places({r.original: Place(r.diffusers, r.change) for r in rules})
        self._to_original = _Places(
            {
                name: Place(rule.original, rule.change, part)
                for rule in (*rules, *read_also)
                for part, name in enumerate(_split(rule.diffusers))
            }
        )

    def to_diffusers(self, name: str, tensor: LazyTensor) -> dict[str, LazyTensor] | None:
        """The tensors that one of the original is in diffusers' layout; None: it has none there."""
        place, rest = (None, "") if name in self._without else self._to_diffusers.longest(name)
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

    def original(self, name: str) -> Place | None:
        """Where the tensor that diffusers has under this name is in the original; None: nowhere."""
        place, rest = self._to_original.longest(name)
        if place is None and self._within:
            place, rest = self._to_original.longest(self._within + name)
        return place._replace(module=place.module + rest) if place is not None else None

    def known_in(self, names: Collection[str]) -> bool:
        """Whether some of the names are those of modules that these rules know in diffusers' layout."""
        modules = self._to_original.modules
        known = {*modules, *(m.removeprefix(self._within) for m in modules)}
        if any(m in names or f"{m}.weight" in names for m in known):
            return True
        return any(self.original(name) is not None for name in islice(names, SOME))

    def to_original(self, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
        """The tensors of the original that diffusers' are; and the names of those that are none there.

        Raises ValueError when two are the same.
        """
        made: dict[str, LazyTensor] = {}
        split: dict[str, dict[int, str]] = {}
        strange: list[str] = []
        for name, tensor in tensors.items():
            place = self.original(name)
            if place is None or (place.change == "transpose" and len(tensor.shape) != 2):
                strange.append(name)
                continue
            original = place.module
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


def _split(name: str) -> list[str]:
    return [name.replace("*", letter) for letter in "qkv"] if "*" in name else [name]


class _Places:
    """Places by the module that a name begins with: a tree of words, so that strange names cost little."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.modules = frozenset(places)
        self._most = max((module.count(".") + 1 for module in places), default=0)
        self._tree: dict[str, Any] = {}
        for module, place in places.items():
            node = self._tree
            for word in module.split("."):
                node = node.setdefault(word, {})
            node[""] = place

    def longest(self, name: str) -> tuple[Place | None, str]:
        """The place of the longest module that a name begins with, and the rest of the name."""
        node, at = self._tree, -1
        place, rest = None, ""
        for word in name.split(".", self._most)[: self._most]:
            node = node.get(word) if word else None  # type: ignore[assignment]
            if node is None:
                break
            at += 1 + len(word)
            if "" in node:
                place, rest = node[""], name[at:]
        return place, rest
