"""Rules that lead from the names of one layout to those of another, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Joined, Reshaped, Rows, Transposed

Change = Literal["same", "linear", "transpose", "qkv"]


CHANGES: tuple[Change, ...] = get_args(Change)
MAX_WORDS = 32  # of a rule's name; a stranger's may have any number


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
        self._to_diffusers = {r.original: Place(r.diffusers, r.change) for r in rules}
        self._to_original = {
            name: Place(rule.original, rule.change, part)
            for rule in (*rules, *read_also)
            for part, name in enumerate(_split(rule.diffusers))
        }

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

    def original(self, name: str) -> Place | None:
        """Where the tensor that diffusers has under this name is in the original; None: nowhere."""
        place, rest = _longest(self._to_original, name)
        if place is None and self._within:
            place, rest = _longest(self._to_original, self._within + name)
        return place._replace(module=place.module + rest) if place is not None else None

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


def _longest(places: Mapping[str, Place], name: str) -> tuple[Place | None, str]:
    """The place of the longest module that a name begins with, and the rest of the name."""
    words = name.split(".", MAX_WORDS)[:MAX_WORDS]
    for count in range(len(words), 0, -1):
        module = ".".join(words[:count])
        if module in places:
            return places[module], name[len(module) :]
    return None, ""
