"""Rules that lead from the names of one layout to those of another, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.moves import Joined, Reshaped, Rows, Transposed, swapped

Change = Literal["same", "linear", "transposed", "swapped"]
T = TypeVar("T")

SOME = 1000  # names of a file that tell whether rules may be of use


class Spec(Protocol):
    """What rules look at of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> DType: ...


class OtherName(NamedTuple):
    """What a module or tensor is called elsewhere, and what it is there.

    Of `of` equal shares of its rows, it is so many `shares` from `first` on; or, of all, the `change`: a 1x1
    convolution is a `linear` layer there, a matrix is `transposed`, the two halves of the rows are `swapped`.
    """

    name: str
    change: Change = "same"
    first: int = 0
    shares: int = 1
    of: int = 1

    def rows(self, total: int) -> tuple[int, int] | None:
        """Its first row and their number, of so many; None where they have no such shares."""
        share, rest = divmod(total, self.of)
        return None if rest else (self.first * share, self.shares * share)


Names = Mapping[str, Sequence[OtherName]]  # by the original's; of several, each is of some rows


class Source(NamedTuple):
    """What makes a tensor: whole ones, whose rows follow each other, or one that is changed."""

    names: tuple[str, ...]
    change: Change
    shape: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether it is one whose elements are in the same order."""
        return len(self.names) == 1 and self.change in ("same", "linear")

    def make(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """The tensor; nothing is read."""
        pieces = [tensors[name] for name in self.names]
        if len(pieces) > 1:
            return Joined(pieces)
        if self.change == "transposed":
            return Transposed(pieces[0])
        if self.change == "swapped":
            return swapped(pieces[0])
        return pieces[0] if pieces[0].shape == self.shape else Reshaped(pieces[0], self.shape)


class Rules:
    """The rules of one part of a model; the longest name that a rule knows decides.

    What follows in a name is the same in both layouts. `without` are tensors of the original that diffusers
    makes itself, `read_also` other names that its files may have, `within` what may be left away at the
    beginning of a name there.
    """

    def __init__(
        self,
        names: Names,
        *,
        without: Sequence[str] = (),
        read_also: Names | None = None,
        within: str = "",
    ) -> None:
        self.names, self.read_also = names, read_also or {}
        self.without = frozenset(without)
        self.within = within
        self._to_diffusers = _Places(names)
        self._to_original = _Places(
            {
                other.name: (original, other)
                for known in (self.read_also, names)
                for original, others in known.items()
                for other in others
            }
        )

    def others(self, name: str) -> list[OtherName]:
        """What a tensor of the original is called in diffusers' layout; nothing: it has no place there."""
        found = None if name in self.without else self._to_diffusers.longest(name)
        return [o._replace(name=o.name + found[1]) for o in found[0]] if found is not None else []

    def to_diffusers(self, name: str, tensor: LazyTensor) -> dict[str, LazyTensor] | None:
        """The tensors that one of the original is in diffusers' layout; None: it has none there."""
        made = {other.name: _changed(tensor, other) for other in self.others(name)}
        whole = {name: moved for name, moved in made.items() if moved is not None}
        return whole if whole and len(whole) == len(made) else None

    def original(self, name: str) -> tuple[str, OtherName] | None:
        """The original's name of the tensor that diffusers has under this one, and what it is of it."""
        found = self._to_original.longest(name)
        if found is None and self.within:
            found = self._to_original.longest(self.within + name)
        return (found[0][0] + found[1], found[0][1]) if found is not None else None

    def known_in(self, names: Collection[str]) -> bool:
        """Whether some of the names are those of modules that these rules know in diffusers' layout."""
        modules = self._to_original.modules
        known = {*modules, *(m.removeprefix(self.within) for m in modules)}
        if any(m in names or f"{m}.weight" in names for m in known):
            return True
        return any(self.original(name) is not None for name in islice(names, SOME))

    def sources(self, tensors: Mapping[str, Spec]) -> tuple[dict[str, Source], list[str], list[str]]:
        """What makes each of the original's tensors; the names of those that make none; and of the
        original's, those that are made twice."""
        made: dict[str, Source] = {}
        shares: dict[tuple[str, int], dict[int, tuple[int, str]]] = defaultdict(dict)
        strange: list[str] = []
        doubled: list[str] = []
        for name, tensor in tensors.items():
            place = self.original(name)
            shape = _original_shape(tensor.shape, place[1]) if place is not None else None
            if place is None or shape is None:
                strange.append(name)
                continue
            original, other = place
            if other.of > 1 and other.first not in (parts := shares[original, other.of]):
                parts[other.first] = other.shares, name
            elif other.of > 1 or original in made:
                doubled.append(original)
            else:
                made[original] = Source((name,), other.change, shape)
        for (original, of), parts in shares.items():
            names = tuple(parts[first][1] for first in sorted(parts))
            shape = _joined_shape({f: (count, tensors[n]) for f, (count, n) in sorted(parts.items())}, of)
            if shape is None:
                strange += names
            elif original in made:
                doubled.append(original)
            else:
                made[original] = Source(names, "same", shape)
        return made, strange, doubled

    def to_original(self, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
        """The tensors of the original that diffusers' are; and the names of those that are none there.

        Raises ValueError when two are the same.
        """
        made, strange, doubled = self.sources(tensors)
        if doubled:
            raise ValueError(doubled[0])
        return {name: source.make(tensors) for name, source in made.items()}, strange


def _changed(tensor: LazyTensor, other: OtherName) -> LazyTensor | None:
    """A tensor of the original as diffusers has it; None where its shape does not allow that."""
    shape = tensor.shape
    if other.of > 1:
        rows = other.rows(shape[0]) if shape else None
        return Rows(tensor, *rows) if rows is not None else None
    if other.change == "transposed":
        return Transposed(tensor) if len(shape) == 2 else None
    if other.change == "swapped":
        return swapped(tensor) if shape and shape[0] % 2 == 0 else None
    if other.change == "linear" and shape[2:] == (1, 1):
        return Reshaped(tensor, shape[:2])
    return tensor


def _original_shape(shape: tuple[int, ...], other: OtherName) -> tuple[int, ...] | None:
    """The shape that one of diffusers' tensors has in the original; None where it cannot be there."""
    if other.change == "transposed":
        return shape[::-1] if len(shape) == 2 else None
    if (other.change == "swapped" or other.of > 1) and not shape:
        return None
    if other.change == "swapped" and shape[0] % 2:
        return None
    return (*shape, 1, 1) if other.change == "linear" and len(shape) == 2 else shape


def _joined_shape(parts: Mapping[int, tuple[int, Spec]], of: int) -> tuple[int, ...] | None:
    """The shape of shares of rows, by their first and with their count, together; None: they are not all
    there, or do not fit together."""
    ends = [0, *(first + count for first, (count, _) in parts.items())]
    if list(parts) != ends[:-1] or ends[-1] != of:
        return None
    held = list(parts.values())
    if len({(spec.dtype, spec.shape[1:], spec.shape[0] / count) for count, spec in held}) != 1:
        return None
    return (sum(spec.shape[0] for _, spec in held), *held[0][1].shape[1:])


def all_rows(others: Sequence[OtherName]) -> bool:
    """Whether names are of all of a module: one that is the whole, or shares that follow each other."""
    shares = sorted(others, key=lambda other: other.first)
    follow = all(one.first + one.shares == other.first for one, other in pairwise(shares))
    ends = bool(shares) and shares[0].first == 0 and shares[-1].first + shares[-1].shares == shares[-1].of
    return follow and ends and len({other.of for other in shares}) == 1


class _Places(Generic[T]):
    """What is said of modules, by what a name begins with: a tree of words, so that strange names cost
    little."""

    def __init__(self, places: Mapping[str, T]) -> None:
        self.modules = frozenset(places)
        self._most = max((module.count(".") + 1 for module in places), default=0)
        self._tree: dict[str, Any] = {}
        for module, place in places.items():
            node = self._tree
            for word in module.split("."):
                node = node.setdefault(word, {})
            node[""] = place

    def longest(self, name: str) -> tuple[T, str] | None:
        """What is said of the longest module that a name begins with, and the rest of the name."""
        node, at = self._tree, -1
        found: tuple[T, str] | None = None
        for word in name.split(".", self._most)[: self._most]:
            node = node.get(word) if word else None  # type: ignore[assignment]
            if node is None:
                break
            at += 1 + len(word)
            if "" in node:
                found = node[""], name[at:]
        return found
