"""The kind of value that weighs a merge: a number, a preset, a list, or a table of such."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from builder.base.errors import did_you_mean, nearest
from builder.base.kinds import WRONG, At, Kind, Number, Schema
from builder.operations.presets import LORA_BLOCKS, LORA_PRESETS, V1_BLOCKS, presets

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

_NUMBER = r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
_RANGE = re.compile(r"([A-Z]+)([0-9]{1,3})-([A-Z]+)([0-9]{1,3})")
_NUMBERS = rf"\s*{_NUMBER}\s*(,\s*{_NUMBER}\s*)*"
_STRENGTH = {"strength", "blocks"}  # of a LoRA, as its users say it
BASE, TENSORS = "base", "tensors"
MAX_PATTERNS = 200  # over tensors' names; each is tried on every name


@dataclass(frozen=True)
class BlockWeights(Kind):
    """Weights; gives them in the canonical form of `builder.operations.weights`.

    `lists` are those that weigh whole models, by their length: what their first numbers are of, which is all
    that is in no block, or each text encoder, and the blocks. `parts` are the classes and their first words,
    with the blocks of each that has some.
    """

    weight: Number
    lists: Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]]
    parts: Mapping[str, tuple[tuple[str, ...], ...]]
    strengths: bool = False
    noun: str = "a number, the name of a preset, an array of numbers or a table"
    label: str = "number, name of a preset, array or string of a number for the base and each block, or table"
    types: tuple[type, ...] = (int, float, str, list, dict)

    @classmethod
    def of(cls, catalog: Catalog, weight: Number, *, strengths: bool = False) -> BlockWeights:
        """The weights that a catalog has words for."""
        parts: dict[str, dict[tuple[str, ...], None]] = {c: {} for c in catalog.classes}
        for word in catalog.classes:
            traits = catalog.traits.get(word)
            blocks = {traits.blocks: None} if traits is not None and traits.blocks else {}
            parts[word] |= blocks
            parts.setdefault(word.partition("-")[0], {}).update(blocks)
        return cls(weight, catalog.lists, {word: tuple(found) for word, found in parts.items()}, strengths)

    def check(self, value: Any, at: At) -> Any:
        if not isinstance(value, dict):
            return self._plain(value, at)
        if self.strengths and value.keys() & _STRENGTH:
            return self._strength(value, at)
        return self._table(value, at, inner=False)

    def _strength(self, value: dict[str, Any], at: At) -> Any:
        """A strength, times those of blocks: the blocks that a list does not name have none."""
        for key in value.keys() - _STRENGTH:
            return at.down(key).wrong(f"`{key}` cannot go with `strength` and `blocks`", key=True)
        strength = self.weight.read(value.get("strength", 1.0), at.down("strength"))
        said, below = value.get("blocks", "ALL"), at.down("blocks")
        if isinstance(said, str) and said in LORA_PRESETS:
            said = list(LORA_PRESETS[said])
        elif isinstance(said, str) and re.fullmatch(_NUMBERS, said):
            said = [float(word) for word in said.split(",")]
        if isinstance(said, str):
            hint = did_you_mean(said, LORA_PRESETS) or f"there are {', '.join(LORA_PRESETS)}"
            return below.wrong(f"unknown preset `{said}`", hint=hint)
        if not isinstance(said, list) or WRONG in (
            numbers := [self.weight.read(n, below.down(i)) for i, n in enumerate(said)]
        ):
            return below.wrong(f"{below.name} must be a preset's name or numbers")
        if len(numbers) not in LORA_BLOCKS:
            plain = self._list(numbers, below)
            return WRONG if WRONG in (plain, strength) else _scaled(plain, strength)
        if strength is WRONG:
            return WRONG
        named = dict(zip(LORA_BLOCKS[len(numbers)], numbers[1:], strict=True))
        every = {b: strength * named.get(b, 0.0) for b in self._v1}
        return _canonical(strength * numbers[0], every)

    # -- numbers, presets, lists

    def _plain(self, value: Any, at: At, part: str | None = None) -> Any:
        """What is no table: of whole models, where a list must begin with the base, or of a part."""
        if isinstance(value, str):
            if re.fullmatch(_NUMBERS, value):
                value = [float(word) for word in value.split(",")]
            elif (known := presets().get(value)) is not None:
                base = 1.0 if value == "ALL_B" else 0.0
                return _canonical(base, dict(zip(self._v1, known, strict=True)))
            else:
                hint = did_you_mean(value, presets()) or "write numbers with commas between, the base first"
                return at.wrong(f"unknown preset `{value}`", hint=hint)
        if not isinstance(value, list):
            return self.weight.read(value, at)
        numbers = [self.weight.read(item, at.down(index)) for index, item in enumerate(value)]
        return WRONG if WRONG in numbers else self._list(numbers, at, part)

    def _list(self, numbers: list[float], at: At, part: str | None = None) -> Any:
        """A list of numbers for whole models; or of a `part`, for the blocks that it has, the base before."""
        count = len(numbers)
        own = {b for b in self.parts.get(part or "", ()) if count - len(b) in (0, 1)}
        bare = [b for _, b in self.lists.values() if len(b) == count]
        if len(own) > 1:
            fact = f"{at.name} has {count} numbers, and classes of that name have other blocks"
            return at.wrong(fact, hint="name the class in full")
        bases: tuple[str, ...] = (BASE,)
        if own:
            blocks = own.pop()
        elif count in self.lists:
            bases, blocks = self.lists[count]
        elif bare and part is not None:
            blocks = bare[0]
        elif bare:
            hint = "put the base first: the weight of all that is in no block"
            return at.wrong(f"{at.name} has {count} numbers, of blocks alone", hint=hint)
        else:
            due = ", ".join(map(str, self.lists))
            comma = "a number has a point, as `0.5`" if count == 2 else None
            return at.wrong(f"{at.name} has {count} numbers, and lists have {due}", hint=comma)
        first = numbers[: count - len(blocks)]
        found = dict(zip(blocks, numbers[len(first) :], strict=True))
        if bases == (BASE,):
            return _canonical(first[0] if first else 0.0, found)
        return _canonical(0.0, found, dict(zip(bases, first, strict=True)))

    @property
    def _v1(self) -> tuple[str, ...]:
        return self.lists[V1_BLOCKS + 1][1]

    # -- tables

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(b for held in self.parts.values() for blocks in held for b in blocks))

    def _table(self, value: dict[str, Any], at: At, *, inner: bool) -> Any:
        base, parts, tensors = 0.0, {}, {}
        exact: dict[str, float] = {}
        wide: dict[str, float] = {}
        fine = True
        for key, item in value.items():
            below = at.down(key)
            if key == TENSORS and not inner:
                read = self._tensors(item, below)
                tensors = read
            elif key in self.parts and not inner:
                read = (
                    self._table(item, below, inner=True)
                    if isinstance(item, dict)
                    else self._plain(item, below, key)
                )
                parts[key] = read
            elif key == BASE:
                base = read = self.weight.read(item, below)
            else:
                names = self._meant(key)
                read = self._unknown(key, below, inner) if not names else self.weight.read(item, below)
                (exact if names == [key] else wide).update(dict.fromkeys(names, read))
            fine = fine and read is not WRONG
        if (exact or wide) and BASE not in value and not inner:
            hint = "add `base = 0.5`: the weight of all that is in no block"
            return at.wrong("`base` is missing", hint=hint)
        return _canonical(base, {**wide, **exact}, parts, tensors) if fine else WRONG

    def _unknown(self, key: str, at: At, inner: bool) -> Any:
        names = (BASE, *self._names, *(() if inner else (TENSORS, *self.parts)))
        near = nearest(key, names)
        if near is not None and near in self.parts:
            near = near.partition("-")[0]  # its kind: of which architecture the models are is not known
        hint = f"did you mean `{near}`?" if near else "as `IN04`, `IN00-IN03` or `OUT*`"
        return at.wrong(f"unknown block or class `{key}`", hint=hint, key=True)

    def _meant(self, key: str) -> list[str]:
        """The blocks that a name, a range or a pattern means."""
        if key in self._names:
            return [key]
        if (ends := _RANGE.fullmatch(key)) is not None:
            kind, first, other, last = ends.groups()
            numbers = range(int(first), int(last) + 1)
            names = [n for n in self._names if n.startswith(kind) and n[len(kind) :].isdigit()]
            return [n for n in names if kind == other and int(n[len(kind) :]) in numbers]
        return [n for n in self._names if "*" in key and fnmatchcase(n, key)]

    def _tensors(self, value: Any, at: At) -> Any:
        if not isinstance(value, dict):
            return at.wrong(f"{at.name} must be a table of patterns over tensors' names")
        if len(value) > MAX_PATTERNS:
            return at.wrong(f"{at.name} has {len(value):,} patterns, more than {MAX_PATTERNS:,}")
        read = {key: self.weight.read(item, at.down(key)) for key, item in value.items()}
        return WRONG if WRONG in read.values() else read

    def schema(self, defs: Schema) -> Schema:
        number = self.weight.schema(defs)
        bounds = [str(n) for n in (self.weight.minimum, self.weight.maximum) if n is not None]
        name = "-".join(["strengths" if self.strengths else "weights", *bounds])
        if name not in defs:
            text = {"type": "string", "minLength": 1}
            numbers = {"type": "array", "items": number, "minItems": 2}
            plain = [number, text, numbers]
            inner = {"type": "object", "additionalProperties": number}
            part, tensors = f"{name}-of-a-part", inner | {"maxProperties": MAX_PATTERNS}
            defs[part] = {"oneOf": [*plain, inner]}
            known = {p: {"$ref": f"#/$defs/{part}"} for p in self.parts} | {BASE: number, TENSORS: tensors}
            if self.strengths:
                known |= {"strength": number, "blocks": {"oneOf": [text, numbers]}}
            table = {"type": "object", "properties": known, "additionalProperties": number}
            defs[name] = {"oneOf": [*plain, table]}
        return {"$ref": f"#/$defs/{name}"}


def _scaled(weights: Any, factor: float) -> Any:
    """Weights of a list, times a factor."""
    if not isinstance(weights, Mapping):
        return weights * factor
    blocks = {b: w * factor for b, w in weights.get("blocks", {}).items()}
    parts = {p: w * factor for p, w in weights.get("parts", {}).items()}
    return _canonical(weights["base"] * factor, blocks, parts)


def _canonical(
    base: float,
    blocks: Mapping[str, float],
    parts: Mapping[str, Any] | None = None,
    tensors: Mapping[str, float] | None = None,
) -> Any:
    """Weights in their one form: blocks that differ from the base, and nothing that says nothing."""
    said: dict[str, Any] = {
        "blocks": {b: w for b, w in blocks.items() if w != base},
        "parts": dict(parts or {}),
        "tensors": [[pattern, weight] for pattern, weight in (tensors or {}).items()],
    }
    said = {k: v for k, v in said.items() if v}
    return {"base": base, **said} if said else base
