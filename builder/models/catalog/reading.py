"""The catalog's files: component tables, architectures, optional keys and well-known weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from builder.base.braces import BraceError, beginnings, expand
from builder.base.errors import CatalogError, Place, Problem, did_you_mean
from builder.base.toml import Document, Keys, load, parse
from builder.base.words import fits_pattern
from builder.formats.layouts.rules import OtherName
from builder.models.catalog.tables import (
    NAMINGS,
    PARTS,
    RANK,
    Adapters,
    Architecture,
    Extracted,
    Gguf,
    KindRule,
    KnownFile,
    KnownMetric,
    KnownPart,
    Later,
    ModelRule,
    ModelSpec,
    Names,
    Patterns,
    Scale,
    TensorRule,
    Traits,
    elements,
)
from builder.tensors.lazy import BY_CODE

if TYPE_CHECKING:
    from builder.formats.layouts.rules import Change

Shape = tuple[int, ...]
T = TypeVar("T")

PRECISIONS = ("fp16", "bf16", "fp32", "keep")
MAX_TENSORS = 100_000  # of a table; the largest known have some thousands
MAX_LOOKS = 2_000_000  # at names, for those that a pattern with `*` means
MAX_DIMS = 64
MAX_RULES = 100_000  # other names of a class's modules
MAX_PREFIXES = 100
MAX_BLOCKS_IN_ALL = 100_000  # of all classes
MAX_PATTERNS = 500  # that tell kinds of files; those built in are about 180
MAX_BLOCKS = 1000  # of a class; the largest known have some dozens

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
_ARCHITECTURE = {
    "slots": list,
    "aliases": list,
    "may_lack": list,
    "only": list,
    "modelspec": dict,
    "diffusers": str,
    "sidecars_v": dict,
    "reads_markers": list,
    "tells_v": list,
    "note": str,
}
_ALONE = {"prefix": str, "without": str}
_PREFIXES = {"prefixes": list, "wrappers": list, "respelt": dict}
_MODELSPEC = {"architecture": str, "v": str, "resolution": int, "resolution_v": int}
_CLASS = {
    "metric": dict,
    "precision": str,
    "kept": list,
    "overflows": list,
    "unquantized": list,
    "widens": str,
    "fixes": list,
    "blocks": dict,
    "lists": list,
    "constants": list,
    "adapters": dict,
    "gguf": dict,
}
_GGUF = {"architecture": str, "reshaped": bool, "full": list, "whole": list}
_ADAPTERS = {"prefixes": list, "rules": str, "within": str, "names": dict, "extracted": dict}
_EXTRACTED = {
    "modules": list,
    "convolutions": list,
    "own_names": bool,
    "metadata": dict,
    "metadata_v": dict,
}
_OTHER_NAME = re.compile(r"(?:(\d{1,9})\+([1-9]\d{0,8})/([1-9]\d{0,8}) |(linear|transposed|swapped) )?(\S+)")
_SCALE = {"part": str, "base": float, "k": int, "having": list, "lacking": list}
_RULE = {"shape": list, "dtype": str, "optional": bool}
_METRIC = {"name": str, "class": str, "value": str}
_FILE = {
    "name": str,
    "sha256": str,
    "architecture": str,
    "hf": str,
    "civitai_version": int,
    "note": str,
    "fix": str,
}
_KIND = {
    "kind": str,
    "called": str,
    "any": list,
    "all": list,
    "only": list,
    "rank": list,
    "says": dict,
    "most": int,
    "last": list,
    "rows": int,
}
_MODEL = {"name": str, "of": list, "said": list, "any": list, "all": list, "sizes": dict}
_PART = {"name": str, "class": str, "blake3": str, "note": str, "fix": str}
_NUMBERS = ("shape", "last")  # fields that are lists of them
_WORDS = {
    str: "a string",
    int: "a number",
    float: "a number with a point",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


class Fields:
    """One table of a catalog file, checked against the fields that it may have."""

    def __init__(self, document: Document, keys: Keys, allowed: Mapping[str, type], *needed: str) -> None:
        table: Any = document.data
        for key in keys:
            table = table[key]
        self.document = document
        self.keys = keys
        if not isinstance(table, dict):
            self.fail("a table is due here")
        self.table: dict[str, Any] = table
        for name, value in table.items():
            if name not in allowed:
                self.fail(f"unknown field `{name}`", name, hint=did_you_mean(name, allowed))
            if type(value) is not allowed[name]:
                self.fail(f"`{name}` is not {_WORDS[allowed[name]]}", name, value=True)
            if type(value) is int and not 0 <= value < 1 << 63:
                self.fail(f"`{name}` is not a number that can be right", name, value=True)
            if type(value) is list and name not in _NUMBERS and not all(isinstance(v, str) for v in value):
                self.fail(f"`{name}` is not a list of strings", name, value=True)
            if name in ("name", "class", "kind", "called") and not _is_name(value):
                self.fail(f"`{name}` is not a word that can be shown", name, value=True)
        for name in needed:
            if name not in table:
                self.fail(f"`{name}` is missing")

    def get(self, name: str) -> Any:
        """The field's value, or None."""
        return self.table.get(name)

    def strings(self, name: str) -> tuple[str, ...]:
        """The field's strings, none if it is not given."""
        return tuple(self.table.get(name, ()))

    def inner(self, name: str, allowed: Mapping[str, type], *needed: str) -> Fields | None:
        """A table inside, or None."""
        return Fields(self.document, (*self.keys, name), allowed, *needed) if name in self.table else None

    def texts(self, name: str) -> dict[str, str]:
        """A table inside that has nothing but strings, empty if it is not given."""
        for key, value in self.table.get(name, {}).items():
            if not isinstance(value, str):
                self.fail(f"`{key}` is not a string", name, key, value=True)
        return dict(self.table.get(name, {}))

    def expand(self, pattern: str, *keys: str | int) -> tuple[list[str], int]:
        """What a pattern of this table, at these keys, stands for, as `braces.expand` gives it."""
        try:
            return expand(pattern)
        except BraceError as wrong:
            self.fail(str(wrong), *keys)

    def patterns(self, name: str) -> tuple[str, ...]:
        """What the field's strings stand for, their braces expanded."""
        return tuple(p for n, word in enumerate(self.strings(name)) for p in self.expand(word, name, n)[0])

    def precision(self) -> str | None:
        """The field `precision`, or None."""
        said: str | None = self.get("precision")
        if said not in (None, *PRECISIONS):
            hint = f"there are {', '.join(PRECISIONS)}"
            self.fail(f"unknown precision `{said}`", "precision", value=True, hint=hint)
        return said

    def place(self, *keys: str | int, value: bool = False) -> Place:
        """Where a field of this table stands."""
        return self.document.place(*self.keys, *keys, value=value)

    def fail(self, fact: str, *keys: str | int, value: bool = False, **more: Any) -> NoReturn:
        """Raise CatalogError about a field, or about the table as a whole."""
        raise CatalogError(Problem(fact, self.place(*keys, value=value), **more))


def _is_name(text: object) -> bool:
    return isinstance(text, str) and text.strip() != "" and text.isprintable()


_PLAIN = re.compile(r"""[^\s./\\:*?"<>|~-][^/\\:*?"<>|]{0,99}""")


def is_plain(text: object) -> bool:
    """Whether a name of a component, a class or an architecture may become part of a file's."""
    return _is_name(text) and isinstance(text, str) and _PLAIN.fullmatch(text) is not None


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

    def _shape(self, shape: Any, keys: Keys) -> Shape:
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
        if not _is_name(model):
            fields.fail(f"`{marker}` is of no model", "marks", marker, value=True)
    for index, model in enumerate(fields.strings("models")):
        if not _is_name(model):
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


def modelspec(fields: Fields) -> ModelSpec | None:
    """What a table says of ModelSpec metadata."""
    said = fields.inner("modelspec", _MODELSPEC, "architecture")
    return ModelSpec(**said.table) if said is not None else None


def alone(fields: Fields) -> Names | None:
    """What a component's table says of the names that it has in a file of its own."""
    said = fields.inner("alone", _ALONE)
    return Names(**said.table) if said is not None else None


def read_prefixes(path: Path, name: str) -> tuple[list[str], list[str], dict[str, str]]:
    """What may stand before the names of a component, what wrappers put behind that, and what names may
    begin with in place of what the tables have."""
    fields = Fields(load(path, CatalogError, name), (), _PREFIXES)
    found: list[list[str]] = []
    for key in ("prefixes", "wrappers"):
        found.append([])
        for index, pattern in enumerate(fields.strings(key)):
            found[-1] += fields.expand(pattern, key, index)[0]
            if len(found[-1]) > MAX_PREFIXES or "" in found[-1]:
                fields.fail(f"`{key}` holds nothing, or more than {MAX_PREFIXES}", key, index, value=True)
    respelt = fields.texts("respelt")
    if len(respelt) > MAX_PREFIXES or "" in respelt:
        fields.fail(f"`respelt` holds nothing, or more than {MAX_PREFIXES}", "respelt")
    return found[0], found[1], respelt


def read_classes(path: Path, name: str) -> Iterator[tuple[str, Traits, Fields]]:
    """What a file says of classes: one table each."""
    document = load(path, CatalogError, name)
    for cls in document.data:
        fields = Fields(document, (cls,), _CLASS)
        traits = Traits(
            scale=_scale(fields),
            fixes=fields.strings("fixes"),
            block_of=_blocks(fields),
            lists=fields.strings("lists"),
            constants=fields.strings("constants"),
            adapters=_adapters(fields),
            gguf=_gguf(fields),
            widens=fields.get("widens"),
            precision=fields.precision(),
            kept=_several(fields, "kept"),
            overflows=_several(fields, "overflows"),
            unquantized=_several(fields, "unquantized"),
            path=name,
        )
        if traits.lists and not traits.blocks:
            fields.fail("`lists` needs `blocks`", "lists")
        yield cls, traits, fields


def _several(fields: Fields, name: str) -> Patterns:
    found = fields.patterns(name)
    if len(found) > MAX_PATTERNS:
        fields.fail(f"more than {MAX_PATTERNS:,} patterns", name)
    return Patterns(found)


def _gguf(fields: Fields) -> Gguf | None:
    said = fields.inner("gguf", _GGUF, "architecture")
    if said is None:
        return None
    full, whole = (_several(said, key).all for key in ("full", "whole"))
    return Gguf(said.get("architecture"), said.get("reshaped") or False, full, whole)


def _adapters(fields: Fields) -> Adapters | None:
    said = fields.inner("adapters", _ADAPTERS, "prefixes")
    if said is None:
        return None
    rules, within = said.get("rules"), said.get("within") or ""
    names = Later(partial(other_names, said, "names"))
    return Adapters(said.strings("prefixes"), rules, within, names, _extracted(said))


def other_names(fields: Fields, key: str) -> dict[str, tuple[OtherName, ...]]:
    """What modules are called elsewhere, by a table of patterns: each of one name, or of several."""
    made: dict[str, tuple[OtherName, ...]] = {}
    for pattern, value in (fields.get(key) or {}).items():
        modules = fields.expand(pattern, key, pattern)[0]
        if doubled := next((module for module in modules if module in made), None):
            fields.fail(f"`{doubled}` has names already", key, pattern)
        for word in value if isinstance(value, list) else [value]:
            found = _OTHER_NAME.fullmatch(word) if isinstance(word, str) else None
            first, count, of, change, name = found.groups() if found is not None else (None,) * 5
            share = (int(first), int(count or 1), int(of or 1)) if first is not None else (0, 1, 1)
            if name is None or share[0] + share[1] > share[2]:
                hint = "a name, `FIRST+COUNT/OF NAME` for shares of the rows, or `swapped NAME`"
                fields.fail(f"`{word}` is no name of a module", key, pattern, value=True, hint=hint)
            others = fields.expand(name, key, pattern)[0]
            if len(others) != len(modules):
                fact = f"{len(others):,} names do not pair with {len(modules):,}"
                fields.fail(fact, key, pattern, value=True)
            for module, other in zip(modules, others, strict=True):
                also = OtherName(other, cast("Change", change or "same"), *share)
                made[module] = (*made.get(module, ()), also)
            if len(made) > MAX_RULES:
                fields.fail(f"more than {MAX_RULES:,} modules", key, pattern)
    return made


def _extracted(adapters: Fields) -> Extracted | None:
    said = adapters.inner("extracted", _EXTRACTED, "modules")
    if said is None:
        return None
    own, plain = said.get("own_names") or False, said.texts("metadata")
    of_v = said.texts("metadata_v") or plain
    return Extracted(said.patterns("modules"), said.patterns("convolutions"), own, plain, of_v)


def _blocks(fields: Fields) -> dict[str, str]:
    """Which block the tensors of a prefix belong to; raises CatalogError where that is not clear."""
    found: dict[str, str] = {}
    for pattern, named in fields.texts("blocks").items():
        prefixes = fields.expand(pattern, "blocks", pattern)[0]
        blocks = fields.expand(named, "blocks", pattern)[0]
        if len(blocks) not in (1, len(prefixes)):
            fact = f"{len(blocks):,} blocks do not pair with {len(prefixes):,} prefixes"
            fields.fail(fact, "blocks", pattern, value=True)
        for prefix, block in zip(prefixes, blocks * (len(prefixes) // len(blocks)), strict=True):
            if not re.fullmatch(r"[A-Z]+[0-9]*", block):
                fact, hint = f"`{block}` is no name of a block", "capitals and a number, as `IN04`"
                fields.fail(fact, "blocks", pattern, value=True, hint=hint)
            found[prefix] = block
            if len(found) > MAX_BLOCKS:
                fields.fail(f"more than {MAX_BLOCKS:,} blocks", "blocks", pattern)
    for one, other in pairwise(sorted(found)):
        if other.startswith(one):
            fields.fail(f"`{other}` and `{one}` may both be of one name", "blocks")
    return found


def _scale(fields: Fields) -> Scale | None:
    said = fields.inner("metric", _SCALE, "part", "base", "k")
    if said is None:
        return None
    part, base, k = (said.get(key) for key in ("part", "base", "k"))
    if part not in PARTS:
        said.fail(f"a metric has no part `{part}`", "part", value=True, hint=f"it has {', '.join(PARTS)}")
    for key in ("base", "k"):
        if not said.get(key) or not isfinite(said.get(key)):
            said.fail(f"`{key}` is nothing to compare with", key, value=True)
    return Scale(part, base, k, said.strings("having"), said.strings("lacking"))


def read_programs(path: Path, name: str, beside: bool) -> Iterator[tuple[str, Mapping[str, str], Fields]]:
    """Where programs keep their models: a table each, of folders by the kind of what a file is.

    With `beside`, a folder may lie beside that of all models, as `../NAME`.
    """
    document = load(path, CatalogError, name)
    fields = Fields(document, (), dict.fromkeys(document.data, dict))
    for program in document.data:
        folders = fields.texts(program)
        for kind, folder in folders.items():
            below = PurePath(folder.removeprefix("../") if beside else folder)
            if not _is_name(folder) or below.is_absolute() or ".." in below.parts or not below.parts:
                fields.fail(f"`{kind}` is no folder below that of all models", program, kind, value=True)
        yield program, folders, fields


def read_sites(path: Path, name: str) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """What sites that publish models call them: of a site, `models` and `kinds` by our own names."""
    document = load(path, CatalogError, name)
    for site in document.data:
        fields = Fields(document, (site,), {"models": dict, "kinds": dict})
        for table in ("models", "kinds"):
            yield site, table, fields.texts(table)


def read_architectures(path: Path, name: str) -> Iterator[tuple[Architecture, Fields]]:
    """The architectures of a file: one table each."""
    document = load(path, CatalogError, name)
    for key in document.data:
        fields = Fields(document, (key,), _ARCHITECTURE, "slots")
        slots = fields.strings("slots")
        if not is_plain(key):
            fields.fail("an architecture's name is no word that files can be named by")
        if not slots or len(set(slots)) < len(slots):
            fields.fail("`slots` does not name each class once", "slots", value=True)
        for index, slot in enumerate(fields.strings("may_lack")):
            if slot not in slots[1:]:
                hint = did_you_mean(slot, slots[1:])
                fields.fail(f"`{slot}` is none of the slots after the first", "may_lack", index, hint=hint)
        yield (
            Architecture(
                name=key,
                slots=slots,
                aliases=fields.strings("aliases"),
                may_lack=fields.strings("may_lack"),
                only=fields.strings("only"),
                modelspec=modelspec(fields),
                diffusers=fields.get("diffusers"),
                sidecars_v=_beside(fields, "sidecars_v", path),
                reads_markers=fields.strings("reads_markers"),
                tells_v=fields.strings("tells_v"),
                note=fields.get("note"),
                path=name,
            ),
            fields,
        )


def _beside(fields: Fields, name: str, path: Path) -> dict[str, Path]:
    """Configurations that a table names and that lie beside its own file, at `path`.

    They are copied beside models, so a link is none: unless all are, as some installers have it.
    """
    found = {}
    for key, file in fields.texts(name).items():
        found[key] = path.parent / file
        plain = Path(file).name == file and file.endswith(".yaml") and "\0" not in file
        if not plain or not found[key].is_file() or (found[key].is_symlink() and not path.is_symlink()):
            fields.fail(f"there is no configuration `{file}` beside this file", name, key, value=True)
    return found


def read_optional(path: Path, name: str) -> dict[str, Shape | None]:
    """Keys that any full checkpoint may hold, with their shapes; None where the file says "any"."""
    document = load(path, CatalogError, name)
    found: dict[str, Shape | None] = {}
    for key, shape in document.data.items():
        if shape != "any" and not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise CatalogError(
                Problem('a shape is a list of numbers, or "any"', document.place(key, value=True))
            )
        found[key] = None if shape == "any" else tuple(shape)
    return found


def read_known(path: Path, name: str) -> Iterator[KnownMetric | KnownFile | KnownPart]:
    """The well-known weights of a file: [[metric]], [[file]] and [[component]]."""
    return _entries(
        path,
        name,
        {
            "metric": (_metric, _METRIC, ("name", "value")),
            "file": (_file, _FILE, ("name", "sha256")),
            "component": (_part, _PART, ("name", "class")),
        },
    )


def read_kinds(path: Path, name: str, patterns: int) -> Iterator[KindRule | ModelRule]:
    """What tells the kinds of files, and which models they go with: [[kind]] and [[model]].

    `patterns` is how many other files have: every name in a file may be compared with all of them.
    """

    def counted(make: Callable[[Fields], KindRule | ModelRule]) -> Callable[[Fields], KindRule | ModelRule]:
        def made(fields: Fields) -> KindRule | ModelRule:
            nonlocal patterns
            rule = make(fields)
            patterns += rule.patterns
            if patterns > MAX_PATTERNS:
                fields.fail(f"more than {MAX_PATTERNS:,} patterns tell kinds of files")
            return rule

        return made

    return _entries(
        path,
        name,
        {
            "kind": (counted(_kind), _KIND, ("kind", "called")),
            "model": (counted(_model), _MODEL, ("name", "of")),
        },
    )


def _entries(
    path: Path, name: str, makers: Mapping[str, tuple[Callable[[Fields], T], Mapping[str, type], Keys]]
) -> Iterator[T]:
    """What a file of lists of tables holds; `makers` are by the lists' names, with fields and needed ones."""
    document = load(path, CatalogError, name)
    for kind, entries in document.data.items():
        if kind not in makers:
            hint = did_you_mean(kind, makers)
            raise CatalogError(Problem(f"unknown kind `{kind}`", document.place(kind), hint=hint))
        if not isinstance(entries, list):
            hint = f"write `[[{kind}]]`"
            raise CatalogError(Problem(f"`{kind}` is not a list of tables", document.place(kind), hint=hint))
        make, allowed, needed = makers[kind]
        for index in range(len(entries)):
            yield make(Fields(document, (kind, index), allowed, *map(str, needed)))


def _kind(fields: Fields) -> KindRule:
    told = ("any", "all", "only", "says", "last")
    if not any(fields.get(key) for key in told):
        hint = f"give it one of {', '.join(f'`{key}`' for key in told)}"
        fields.fail("nothing tells a file of it from others", hint=hint)
    last = fields.get("last") or ()
    if not all(type(n) is int and n > 0 for n in last):
        fields.fail("`last` is not a list of sizes", "last", value=True)
    return KindRule(
        fields.get("kind"),
        fields.get("called"),
        Patterns(fields.strings("any")),
        tuple(Patterns([p]) for p in fields.strings("all")),
        Patterns(fields.strings("only")),
        Patterns(fields.strings("rank")),
        {key: Patterns([p]) for key, p in fields.texts("says").items()},
        fields.get("most"),
        tuple(last),
        fields.get("rows"),
    )


def _model(fields: Fields) -> ModelRule:
    sizes = fields.get("sizes") or {}
    for pattern, size in sizes.items():
        if type(size) is not int:
            fields.fail(f"`{pattern}` is no size", "sizes", pattern, value=True)
    return ModelRule(
        fields.get("name"),
        fields.strings("of"),
        fields.strings("said"),
        Patterns(fields.strings("any")),
        tuple(Patterns([p]) for p in fields.strings("all")),
        tuple((Patterns([pattern]), size) for pattern, size in sizes.items()),
    )


def _metric(fields: Fields) -> KnownMetric:
    value, cls = fields.get("value"), fields.get("class")
    if not re.fullmatch(r"\d{4}" if cls else r"(\d{4}|----)(/(\d{4}|----)){2}", value):
        fields.fail("a metric has four digits, or three times four with `/` for a model", "value", value=True)
    return KnownMetric(fields.get("name"), cls, value)


def _digest(fields: Fields, name: str, digits: int) -> str | None:
    value = fields.get(name)
    if value is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
        fields.fail(f"`{name}` is not {digits} lower-case hex digits", name, value=True)
    return str(value) if value is not None else None


def _file(fields: Fields) -> KnownFile:
    sha256 = _digest(fields, "sha256", 64)
    assert sha256 is not None
    return KnownFile(
        fields.get("name"),
        sha256,
        fields.get("hf"),
        fields.get("civitai_version"),
        fields.get("note"),
        fields.get("fix"),
        fields.get("architecture"),
    )


def _part(fields: Fields) -> KnownPart:
    blake3 = _digest(fields, "blake3", 64)
    if blake3 is None:
        fields.fail("`blake3` is missing")
    return KnownPart(
        fields.get("name"), fields.get("class"), str(blake3), fields.get("note"), fields.get("fix")
    )
