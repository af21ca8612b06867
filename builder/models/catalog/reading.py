"""The catalog's other files: architectures, prefixes, programs, sites, kinds of files, well-known weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from builder.base.errors import CatalogError, Problem, did_you_mean
from builder.base.toml import Keys, load
from builder.models.catalog.fields import MAX_PATTERNS, Fields, is_name, is_plain, modelspec
from builder.models.catalog.tables import (
    Architecture,
    KindRule,
    KnownFile,
    KnownMetric,
    KnownPart,
    ModelRule,
    Patterns,
)

T = TypeVar("T")
MAX_PREFIXES = 100
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
_PREFIXES = {"prefixes": list, "wrappers": list, "respelt": dict}
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
            if not is_name(folder) or below.is_absolute() or ".." in below.parts or not below.parts:
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


def read_optional(path: Path, name: str) -> dict[str, tuple[int, ...] | None]:
    """Keys that any full checkpoint may hold, with their shapes; None where the file says "any"."""
    document = load(path, CatalogError, name)
    found: dict[str, tuple[int, ...] | None] = {}
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
