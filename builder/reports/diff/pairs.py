"""Which tensor of one checkpoint is which of the other: by component first, else by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from builder.models.identity import Identity, Match
from builder.tensors.lazy import LazyTensor

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """A tensor that both have; `cls` is the class of the component that it belongs to, `bare` its name there.

    Outside of components `cls` is empty, and the three names are one.
    """

    cls: str
    bare: str
    a: str
    b: str


@dataclass(frozen=True)
class Pairing:
    """Every tensor of two checkpoints: those that both have, and full names of those that one has alone."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def pair_up(
    a: Mapping[str, LazyTensor], first: Identity, b: Mapping[str, LazyTensor], second: Identity
) -> Pairing:
    """Pair the tensors of two checkpoints, whose identities are `first` and `second`.

    A component of the same class is the same component, whatever its prefix and spelling. What is left
    is the same where it has the same name, of the component that it is on either side. In the order of A,
    components first.
    """
    pairs: list[Pair] = []
    for match in first.matches:
        other = second.find(match.component.cls)
        if other is not None:
            pairs += _within(match, other)
    taken_a, taken_b = {p.a for p in pairs}, {p.b for p in pairs}
    # What is a component on one side alone, as one tensor has another shape on the other, is still that.
    for mine, theirs in ((first, second), (second, first)):
        alone = [m for m in mine.matches if theirs.find(m.component.cls) is None]
        pairs += [
            Pair(m.component.cls, bare, full, full)
            for m in alone
            for bare, full in m.names.items()
            if full in a and full in b and full not in taken_a and full not in taken_b
        ]
    taken_a, taken_b = {p.a for p in pairs}, {p.b for p in pairs}
    pairs += [
        Pair("", name, name, name) for name in a if name in b and name not in taken_a and name not in taken_b
    ]
    taken_a, taken_b = {p.a for p in pairs}, {p.b for p in pairs}
    return Pairing(
        tuple(pairs), tuple(n for n in a if n not in taken_a), tuple(n for n in b if n not in taken_b)
    )


def _within(match: Match, other: Match) -> list[Pair]:
    cls = match.component.cls
    theirs = other.whole
    return [Pair(cls, bare, full, theirs[bare]) for bare, full in match.whole.items() if bare in theirs]


def same_layout(a: Shape, b: Shape) -> bool:
    """Whether two shapes hold the same elements at the same places: they differ in dimensions of 1 alone."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]
