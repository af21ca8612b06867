"""A component's file: its fields, and its tensors, which are expanded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from builder.base.braces import BraceError, beginnings, expand
from builder.base.errors import CatalogError, did_you_mean
from builder.base.toml import Document, Keys, load, parse
from builder.base.words import fits_pattern
from builder.models.catalog.fields import Fields, is_name, is_plain
from builder.models.catalog.tables import NAMINGS, RANK, Names, TensorRule, elements
from builder.tensors.lazy import BY_CODE

MAX_TENSORS = 100_000  # of a table; the largest known have some thousands
MAX_LOOKS = 2_000_000  # at names, for those that a pattern with `*` means
MAX_DIMS = 64

_COMPONENT = {
    "name": str,
    "class": str,
    "prefix": str,
    "alone": dict,
    "note": str,
    "models": list,
    "marks": dict,
    "precision": str,
    "extends": str,
    "without": list,
    "naming": str,
    "average": bool,
    "mislabelled": bool,
    "modelspec": dict,
    "keys": int,
    "parameters": int,
    "tensors": dict,
}
_ALONE = {"prefix": str, "without": str}
_RULE = {"shape": list, "dtype": str, "optional": bool}


@dataclass(frozen=True, eq=False)
class Table:
    """A component's file: its fields, and its tensors not yet expanded."""

    fields: Fields
    name: str
    extends: str | None
    naming: str | None

    def beginnings(self, without: str = "") -> set[str]:
        """What the names of its own tensors, less a word that they may begin with, have before their first
        dots; few are expanded for that."""
        found: set[str] = set()
        for pattern, keys, _ in _leaves(self.fields.get("tensors") or {}, "", ("tensors",)):
            try:
                if set("{\\") & set(pattern[: len(without)]):
                    found |= {n.removeprefix(without).partition(".")[0] for n in expand(pattern)[0]}
                else:
                    found |= beginnings(pattern.removeprefix(without))
            except BraceError as wrong:
                self.fields.fail(str(wrong), *keys)
        return found

    def expand(self, base: Mapping[str, TensorRule]) -> dict[str, TensorRule]:
        """The tensors: those of `base` without some, under the naming, then the table's own.

        Raises CatalogError at the line of a bad brace, shape, dtype, a key twice or a wrong checksum.
        """
        without = self._left_out(base)
        rules = {name: rule for name, rule in base.items() if name not in without}
        if self.naming is not None:
            renamed = {NAMINGS[self.naming](name): rule for name, rule in rules.items()}
            if len(renamed) != len(rules):
                self.fields.fail(f"two tensors of `{self.extends}` get the same name", "naming", value=True)
            rules = renamed
        seen: dict[str, Keys] = {}
        for pattern, keys, value in _leaves(self.fields.get("tensors") or {}, "", ("tensors",)):
            for name, rule in self._rules(pattern, keys, value):
                if len(rules) >= MAX_TENSORS:
                    self.fields.fail(f"`{self.name}` has more than {MAX_TENSORS:,} tensors", *keys)
                if name in seen:
                    first = self.fields.place(*seen[name])
                    self.fields.fail(
                        f"`{name}` is declared twice", *keys, evidence=(f"first on line {first.line}",)
                    )
                seen[name] = keys
                rules[name] = rule
        self._checksums(rules)
        return rules

    def _left_out(self, base: Mapping[str, TensorRule]) -> set[str]:
        """The tensors of `base` that this table goes without."""
        found: set[str] = set()
        looks = 0
        for index, pattern in enumerate(self.fields.strings("without")):
            for name in self.fields.expand(pattern, "without", index)[0]:
                looks += len(base) if "*" in name else 1
                if looks > MAX_LOOKS:
                    self.fields.fail("`without` has too many names with `*`", "without", index)
                matches = {n for n in base if fits_pattern(name, n)} if "*" in name else {name} & base.keys()
                if not matches:
                    hint = did_you_mean(name, base)
                    self.fields.fail(f"`{self.extends}` has no tensor `{name}`", "without", index, hint=hint)
                found |= matches
        return found

    def _rules(self, pattern: str, keys: Keys, value: Any) -> Iterator[tuple[str, TensorRule]]:
        names, last = self.fields.expand(pattern, *keys)
        dtype, optional = None, False
        if isinstance(value, dict):
            rule = Fields(self.fields.document, (*self.fields.keys, *keys), _RULE, "shape")
            dtype, optional, value = rule.get("dtype"), rule.get("optional") or False, rule.get("shape")
            if dtype is not None and dtype not in BY_CODE:
                rule.fail(f"unknown dtype `{dtype}`", "dtype", value=True, hint=did_you_mean(dtype, BY_CODE))
            keys = (*keys, "shape")
        shapes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        rules = [TensorRule(self._shape(shape, keys), dtype, optional) for shape in shapes]
        if shapes is value and len(rules) != last:
            braces = (
                f"the last brace has {last} alternatives" if last > 1 else "there is no brace to pair with"
            )
            self.fields.fail(
                f"{len(rules)} shapes do not pair with the last brace", *keys, value=True, evidence=(braces,)
            )
        count = len(rules)
        return ((name, rules[index % count]) for index, name in enumerate(names))

    def _shape(self, shape: Any, keys: Keys) -> tuple[int, ...]:
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or not all(type(n) is int and (0 <= n < 1 << 63 or n == RANK) for n in shape)
        ):
            self.fields.fail("a shape is a list of numbers", *keys, value=True)
        return tuple(shape)

    def _checksums(self, rules: Mapping[str, TensorRule]) -> None:
        if self.fields.get("keys") != len(rules):
            self._mismatch("keys", len(rules), "tensors")
        said, total = self.fields.get("parameters"), elements(rules.values())
        if total is None and said is not None:
            self.fields.fail("a table with a rank has no number of `parameters`", "parameters")
        elif said != total:
            self._mismatch("parameters", total or 0, "elements")

    def _mismatch(self, field: str, found: int, what: str) -> NoReturn:
        said = self.fields.get(field)
        if said is None:
            self.fields.fail(f"`{field}` is missing", hint=f"the table has `{field} = {found:_}`")
        self.fields.fail(f"`{field}` is {said:_}, but the table has {found:_} {what}", field, value=True)


def _leaves(table: dict[str, Any], head: str, keys: Keys) -> Iterator[tuple[str, Keys, Any]]:
    """Each key with its headings joined by dots, its path in the document, and its value."""
    for key, value in table.items():
        name = f"{head}.{key}" if head else key
        if isinstance(value, dict) and not isinstance(value.get("shape"), list):
            yield from _leaves(value, name, (*keys, key))
        else:
            yield name, (*keys, key), value


def parse_table(text: str, name: str) -> Table:
    """A component's table, of a file called `name` in messages."""
    return _table(parse(text, name, CatalogError))


def read_table(path: Path, name: str) -> Table:
    """A component's file, called `name` in messages; its tensors are looked at when it is expanded."""
    return _table(load(path, CatalogError, name))


def _table(document: Document) -> Table:
    fields = Fields(document, (), _COMPONENT, "name", "keys")
    for key in ("name", "class"):
        if (said := fields.get(key)) is not None and not is_plain(said):
            fields.fail(f"`{key}` is no word that files can be named by", key, value=True)
    for marker, model in fields.texts("marks").items():
        if not is_name(model):
            fields.fail(f"`{marker}` is of no model", "marks", marker, value=True)
    for index, model in enumerate(fields.strings("models")):
        if not is_name(model):
            fields.fail("`models` holds a word that cannot be shown", "models", index, value=True)
    naming = fields.get("naming")
    if naming is not None and naming not in NAMINGS:
        fields.fail(f"unknown naming `{naming}`", "naming", value=True, hint=did_you_mean(naming, NAMINGS))
    if fields.get("extends") is None:
        for key in ("without", "naming"):
            if fields.get(key) is not None:
                fields.fail(f"`{key}` needs `extends`", key)
        if fields.get("class") is None:
            fields.fail("`class` is missing")
    if fields.get("average") and naming is None:
        fields.fail("`average` needs `naming`", "average")
    return Table(fields, fields.get("name"), fields.get("extends"), naming)


def alone(fields: Fields) -> Names | None:
    """What a component's table says of the names that it has in a file of its own."""
    said = fields.inner("alone", _ALONE)
    return Names(**said.table) if said is not None else None
