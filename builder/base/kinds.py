"""Kinds of values: each reads a value from a document, says what is wrong with it, and states its schema."""

from __future__ import annotations

import datetime
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

from builder.base.errors import Problem, RecipeError, clipped, did_you_mean
from builder.base.toml import Document, Keys
from builder.base.words import spelling

WRONG: Final = object()  # what reading gives for a value whose problem is on the list
Schema = dict[str, Any]
MAX_PROBLEMS = 100
MAX_ENTRIES = 1000  # of a table, or tables of an array; what is checked of one is looked up in others
LARGEST = 2**63 - 1  # of TOML's integers; no number in a recipe comes near
FEW = 12  # words that a hint can list and still be read
MANY = 40  # words that are listed where they all matter
LONG = 100  # characters of a word in a list

_TYPES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "a table",
    datetime.datetime: "a date",
    datetime.date: "a date",
    datetime.time: "a time",
}


def listed(words: Iterable[str]) -> str:
    """Words in backticks, with commas; of many, the first ones and their number."""
    words = list(words)
    more = f" and {len(words) - MANY:,} more" if len(words) > MANY else ""
    return ", ".join(f"`{clipped(w, LONG)}`" for w in words[:MANY]) + more


def note(problems: list[Problem], problem: Problem) -> None:
    """Add to the list; raises RecipeError when it gets longer than anyone reads."""
    if len(problems) == MAX_PROBLEMS:
        more = Problem(f"there are more problems than the {MAX_PROBLEMS} above")
        raise RecipeError(*problems, more)
    problems.append(problem)


@dataclass(frozen=True)
class At:
    """Where in a document a value stands, and the list that its problems go to."""

    document: Document
    problems: list[Problem]
    keys: Keys = ()

    def down(self, *keys: str | int) -> At:
        """The place of something inside this."""
        return At(self.document, self.problems, self.keys + keys)

    def wrong(
        self, fact: str, *evidence: str, hint: str | None = None, key: bool = False, show: bool = True
    ) -> Any:
        """Note a problem with the value, or with its key; gives `WRONG`. `show`: with the line itself."""
        place = self.document.place(*self.keys, value=not key)
        place = place if show else replace(place, text=None)
        note(self.problems, Problem(fact, place, evidence, hint))
        return WRONG

    @property
    def name(self) -> str:
        """What a message calls the value."""
        if self.keys and isinstance(self.keys[-1], int):
            above = [k for k in self.keys if isinstance(k, str)]
            return f"an element of `{above[-1]}`"
        return f"`{self.keys[-1]}`" if self.keys else "the recipe"


class Kind(ABC):
    """What values a key takes. `noun` names it in messages, `label` in the reference."""

    noun: str
    label: str
    types: tuple[type, ...]

    def takes(self, value: object) -> bool:
        """Whether the value has one of the kind's TOML types."""
        return type(value) in self.types

    def read(self, value: Any, at: At) -> Any:
        """The canonical value; `WRONG` after noting what is wrong with it."""
        if self.takes(value):
            return self.check(value, at)
        found = _TYPES.get(type(value), "something else")
        return at.wrong(f"{at.name} must be {self.noun}, not {found}", hint=self.advice(value))

    def advice(self, value: object) -> str | None:
        """One thing to do about a value of the wrong type."""
        return None

    @abstractmethod
    def check(self, value: Any, at: At) -> Any:
        """Read a value that has the right type."""

    @abstractmethod
    def schema(self, defs: Schema) -> Schema:
        """The JSON Schema of the values; named parts go to `defs`."""


@dataclass(frozen=True)
class Rule:
    """A pattern that strings must match, or with `forbid` must not; in the syntax Python and ECMA share.

    `fact` may hold `{key}`, the value's name in messages, and `{count}`, its length. With `secret` the
    message does not show the line.
    """

    pattern: str
    fact: str
    hint: str | None = None
    forbid: bool = False
    secret: bool = False

    def broken_by(self, value: str) -> bool:
        """Whether a string breaks this rule."""
        return bool(re.search(self.pattern, value)) is self.forbid

    def schema(self) -> Schema:
        """The JSON Schema of strings that keep it."""
        return {"not": {"pattern": self.pattern}} if self.forbid else {"pattern": self.pattern}


NOT_EMPTY = Rule(r".", "{key} is empty")
NO_CONTROLS = Rule(r"[\x00-\x1f\x7f]", "{key} holds a control character", forbid=True)


@dataclass(frozen=True)
class Text(Kind):
    """A string that keeps rules; the first rule broken is the one reported."""

    rules: tuple[Rule, ...] = ()
    lower: bool = False
    examples: tuple[str, ...] = ()
    most: int | None = None  # characters
    noun: str = "a string"
    label: str = "string"
    types: tuple[type, ...] = (str,)

    def advice(self, value: object) -> str | None:
        if type(value) in (int, float):
            return f'write it in quotes: "{value}"'
        return None

    def holds(self, value: str) -> bool:
        """Whether a document can say this string here: one in UTF-8, in which half a character is none."""
        whole = not any("\ud800" <= c <= "\udfff" for c in value)
        return whole and not any(rule.broken_by(value) for rule in self.rules)

    def check(self, value: str, at: At) -> Any:
        if self.most is not None and len(value) > self.most:
            return at.wrong(f"{at.name} is longer than {self.most:,} characters", show=False)
        for rule in self.rules:
            if rule.broken_by(value):
                fact = rule.fact.format(key=at.name, count=len(value))
                return at.wrong(fact, hint=rule.hint, show=not rule.secret)
        return value.lower() if self.lower else value

    def schema(self, defs: Schema) -> Schema:
        rules = [r.schema() for r in self.rules]
        most = {} if self.most is None else {"maxLength": self.most}
        examples = {"examples": list(self.examples)} if self.examples else {}
        return {"type": "string", **most, **({"allOf": rules} if rules else {}), **examples}


@dataclass(frozen=True)
class Choice(Kind):
    """One word of some; `open`: the words are a catalog's, to which a user's own may add."""

    what: str
    words: Mapping[str, str]  # and what each means
    open: bool = False
    noun: str = "a string"
    types: tuple[type, ...] = (str,)

    @property
    def label(self) -> str:  # type: ignore[override]
        few = len(self.words) <= 4
        return " or ".join(f'`"{w}"`' for w in self.words) if few else f"{self.what}"

    def check(self, value: str, at: At) -> Any:
        if value in self.words:
            return value
        same = self._spelt.get(spelling(value), []) if self.open else []
        if len(same) == 1:
            return same[0]
        return at.wrong(f"unknown {self.what} `{value}`", hint=self.hint(value, at))

    def hint(self, value: str, at: At) -> str | None:
        """What may have been meant."""
        near = did_you_mean(value, self.words)
        return near or (f"known: {listed(self.words)}" if 0 < len(self.words) <= FEW else None)

    @cached_property
    def _spelt(self) -> dict[str, list[str]]:
        """The words by how they are compared."""
        found: dict[str, list[str]] = {}
        for word in self.words:
            found.setdefault(spelling(word), []).append(word)
        return found

    def schema(self, defs: Schema) -> Schema:
        if self.open:
            return {"anyOf": [{"enum": list(self.words)}, {"type": "string", "minLength": 1}]}
        if any(self.words.values()):
            return {"oneOf": [{"const": w, "description": d} for w, d in self.words.items()]}
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Boolean(Kind):
    """True or false."""

    noun: str = "a boolean"
    label: str = "boolean"
    types: tuple[type, ...] = (bool,)

    def check(self, value: bool, at: At) -> Any:
        return value

    def schema(self, defs: Schema) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number(Kind):
    """A finite number within bounds (inclusive)."""

    minimum: float | None = None
    maximum: float | None = None
    whole: bool = False

    @property
    def noun(self) -> str:  # type: ignore[override]
        return "an integer" if self.whole else "a number"

    @property
    def label(self) -> str:  # type: ignore[override]
        return "integer" if self.whole else "number"

    @property
    def types(self) -> tuple[type, ...]:  # type: ignore[override]
        return (int,) if self.whole else (int, float)

    def advice(self, value: object) -> str | None:
        if type(value) is str and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", value):
            return f"write it without quotes: {value}"
        return None

    def check(self, value: int | float, at: At) -> Any:
        if not -LARGEST <= value <= LARGEST:  # nor is NaN
            return at.wrong(f"{at.name} must be a finite number, of 64 bits at most")
        if self.minimum is not None and value < self.minimum:
            return at.wrong(f"{at.name} must be at least {self.minimum:g}")
        if self.maximum is not None and value > self.maximum:
            return at.wrong(f"{at.name} must be at most {self.maximum:g}")
        return value if self.whole else float(value)

    def schema(self, defs: Schema) -> Schema:
        minimum = -LARGEST if self.minimum is None else self.minimum
        maximum = LARGEST if self.maximum is None else self.maximum
        return {"type": self.label, "minimum": minimum, "maximum": maximum}


@dataclass(frozen=True)
class Array(Kind):
    """Values of one kind, no string twice; gives a tuple."""

    of: Kind
    minimum: int = 0
    types: tuple[type, ...] = (list,)

    @property
    def noun(self) -> str:  # type: ignore[override]
        return "an array"

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"array of: {self.of.label}"

    def advice(self, value: object) -> str | None:
        return f'write it in brackets: ["{value}"]' if type(value) is str and self.of.takes(value) else None

    def check(self, value: list[Any], at: At) -> Any:
        if len(value) < self.minimum:
            return at.wrong(f"{at.name} is empty")
        if isinstance(self.of, Struct) and len(value) > MAX_ENTRIES:
            return at.wrong(f"{at.name} has {len(value):,} tables, more than {MAX_ENTRIES:,}")
        found: list[Any] = []
        words: set[str] = set()
        for index, item in enumerate(value):
            read = self.of.read(item, at.down(index))
            if isinstance(read, str) and read in words:
                at.down(index).wrong(f"`{read}` is listed twice", hint="remove one of the two")
            elif read is not WRONG:
                found.append(read)
                words |= {read} if isinstance(read, str) else set()
        return tuple(found)

    def schema(self, defs: Schema) -> Schema:
        size = {"minItems": self.minimum} if self.minimum else {}
        unique = {} if isinstance(self.of, Struct) else {"uniqueItems": True}
        return {"type": "array", "items": self.of.schema(defs), **size, **unique}


class Item(NamedTuple):
    """A value of a table whose keys are free, and where it stands."""

    value: Any
    keys: Keys


@dataclass(frozen=True)
class Table(Kind):
    """A table with free keys that are all of one kind; gives an `Item` by canonical key."""

    name: str  # of its part of the schema
    key: Text | Choice
    of: Kind
    minimum: int = 0
    noun: str = "a table"
    types: tuple[type, ...] = (dict,)

    @property
    def label(self) -> str:  # type: ignore[override]
        return "table"

    def check(self, value: dict[str, Any], at: At) -> Any:
        if len(value) < self.minimum:
            return at.wrong(f"{at.name} is empty")
        if len(value) > MAX_ENTRIES:
            return at.wrong(f"{at.name} has {len(value):,} entries, more than {MAX_ENTRIES:,}")
        found: dict[str, Item] = {}
        for raw, item in value.items():
            below = at.down(raw)
            name = self.key.check(raw, _KeyAt(below.document, below.problems, below.keys))
            read = self.of.read(item, below)
            if name is WRONG or read is WRONG:
                continue
            if name in found:
                first = str(found[name].keys[-1])
                below.wrong(
                    f"`{name}` is filled twice",
                    f"`{first}` and `{raw}` are the same",
                    hint="remove one of the two",
                    key=True,
                )
                continue
            found[name] = Item(read, below.keys)
        return found

    def schema(self, defs: Schema) -> Schema:
        if self.name not in defs:
            size = {"minProperties": self.minimum} if self.minimum else {}
            defs[self.name] = {"type": "object", **self._keys(defs), **size}
        return {"$ref": f"#/$defs/{self.name}"}

    def _keys(self, defs: Schema) -> Schema:
        values = self.of.schema(defs)
        if isinstance(self.key, Choice):
            return {"properties": dict.fromkeys(self.key.words, values), "additionalProperties": values}
        names = {k: v for k, v in self.key.schema(defs).items() if k != "type"}
        return {"propertyNames": names, "additionalProperties": values}


class _KeyAt(At):
    """Problems with a name, not with what it names."""

    def wrong(
        self, fact: str, *evidence: str, hint: str | None = None, key: bool = True, show: bool = True
    ) -> Any:
        return super().wrong(fact, *evidence, hint=hint, key=True, show=show)

    @property
    def name(self) -> str:
        return f"the name `{self.keys[-1]}`"


@dataclass(frozen=True)
class Key:
    """A key of a table: the kind of its value, what it means and what holds without it."""

    kind: Kind
    doc: str
    example: str
    required: bool = False
    default: Any = None
    otherwise: str = ""  # the default in words, where it follows from something else


@dataclass(frozen=True)
class Struct(Kind):
    """A table whose keys are known; gives a dict that holds every key whose value could be read.

    `any_of`: one of these must be given. `excludes`: with the key, none of those may be. `needs`: with the
    key, that one must be.
    """

    name: str
    heading: str
    keys: Mapping[str, Key]
    any_of: tuple[str, ...] = ()
    excludes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    what: str = "where to find it"  # that `any_of` say
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # keys of other tables: the table's heading
    noun: str = "a table"
    label: str = "table"
    types: tuple[type, ...] = (dict,)

    def check(self, value: dict[str, Any], at: At) -> Any:
        for name in value:
            if name not in self.keys:
                self._unknown(name, at.down(name))
        found: dict[str, Any] = {}
        for name, key in self.keys.items():
            if name in value:
                read = key.kind.read(value[name], at.down(name))
                if read is not WRONG:
                    found[name] = read
            elif key.required:
                at.wrong(f"`{name}` is missing", hint=f"add `{name} = {key.example}`", key=True)
            else:
                found[name] = key.default
        self._together(value, at)
        return found

    def _unknown(self, name: str, at: At) -> None:
        home = self.elsewhere.get(name)
        hint = f"`{name}` belongs under `{home}`" if home else did_you_mean(name, self.keys)
        if hint is None and len(self.keys) <= FEW:
            hint = f"known: {listed(self.keys)}"
        at.wrong(f"unknown key `{name}`", hint=hint, key=True)

    def _together(self, value: Mapping[str, Any], at: At) -> None:
        if self.any_of and not any(k in value for k in self.any_of):
            at.wrong(f"{at.name} says nothing of {self.what}", hint=f"give {_either(self.any_of)}", key=True)
        for name, others in self.excludes.items():
            for other in others:
                if name in value and other in value:
                    at.down(other).wrong(
                        f"`{other}` cannot go with `{name}`", hint=f"remove `{other}` or `{name}`", key=True
                    )
        for name, other in self.needs.items():
            if name in value and other not in value:
                at.down(name).wrong(f"`{name}` needs `{other}`", hint=f"add `{other}`", key=True)

    def schema(self, defs: Schema) -> Schema:
        if self.name in defs:
            return {"$ref": f"#/$defs/{self.name}"}
        made: Schema = {"type": "object", "additionalProperties": False}
        defs[self.name] = made
        made["properties"] = {n: _described(k, defs) for n, k in self.keys.items()}
        if required := [n for n, k in self.keys.items() if k.required]:
            made["required"] = required
        if self.any_of:
            made["anyOf"] = [{"required": [k]} for k in self.any_of]
        if self.excludes:
            made["dependentSchemas"] = {
                name: {"not": {"anyOf": [{"required": [o]} for o in others]}}
                for name, others in self.excludes.items()
            }
        if self.needs:
            made["dependentRequired"] = {name: [other] for name, other in self.needs.items()}
        return {"$ref": f"#/$defs/{self.name}"}


def _either(words: tuple[str, ...]) -> str:
    marked = [f"`{w}`" for w in words]
    return f"{', '.join(marked[:-1])} or {marked[-1]}"


def _described(key: Key, defs: Schema) -> Schema:
    default = {} if key.default in (None, (), {}) else {"default": key.default}
    return {"description": key.doc, **key.kind.schema(defs), **default}


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of several kinds that differ in their TOML type."""

    kinds: tuple[Kind, ...]
    name: str = ""  # of its part of the schema, where it has one

    @property
    def noun(self) -> str:  # type: ignore[override]
        return " or ".join(k.noun for k in self.kinds)

    @property
    def label(self) -> str:  # type: ignore[override]
        return " or ".join(k.label for k in self.kinds)

    @property
    def types(self) -> tuple[type, ...]:  # type: ignore[override]
        return tuple(t for k in self.kinds for t in k.types)

    def check(self, value: Any, at: At) -> Any:
        return next(k for k in self.kinds if k.takes(value)).check(value, at)

    def schema(self, defs: Schema) -> Schema:
        either = {"oneOf": [k.schema(defs) for k in self.kinds]}
        if not self.name:
            return either
        defs[self.name] = either
        return {"$ref": f"#/$defs/{self.name}"}
