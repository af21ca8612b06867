"""The catalog's files about diffusers' layouts: rules for names, and the models that they are of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from builder.base.errors import CatalogError, did_you_mean
from builder.base.inside import is_name
from builder.base.toml import load
from builder.formats.layouts import Layout, Part
from builder.formats.layouts.configs import SHAPES, is_size
from builder.formats.layouts.rules import Names, OtherName, Rules, all_rows
from builder.models.catalog.classes import other_names
from builder.models.catalog.fields import Fields

_RULES = {"extends": str, "names": dict, "read_also": dict, "without": list, "within": str}
_MODEL = {"library": str, "config": dict, "sizes": dict}
_LAYOUT = {
    "extends": str,
    "has": list,
    "lacks": list,
    "ranks": dict,
    "pipeline": str,
    "pipelines": dict,
    "pixels": int,
    "pixels_v": int,
    "index": dict,
    "absent": list,
    "scheduler": dict,
    "plain": dict,
    "zero_snr": dict,
    "unless": dict,
    "parts": dict,
}
_PART = {
    "model": str,
    "library": str,
    "prefix": str,
    "rules": str,
    "config": dict,
    "tokenizer": str,
    "tokenizer_model": str,
    "padding": str,
}
MAX_RULES = 100_000  # of all layouts
MAX_CHAIN = 8  # layouts that extend each other
LIBRARIES = ("diffusers", "transformers")


class Model(NamedTuple):
    """What is said of a class that loads parts: its library, its configuration, and what shapes tell of
    that."""

    library: str
    config: Mapping[str, Any] = MappingProxyType({})
    sizes: Mapping[str, str] = MappingProxyType({})


def read_layouts(files: Iterable[tuple[Path, str]]) -> tuple[dict[str, Rules], dict[str, Layout]]:
    """The rules and the layouts of files, each with its name in messages. Raises CatalogError."""
    said: dict[str, dict[str, Fields]] = {"rules": {}, "models": {}, "layouts": {}}
    for path, name in files:
        document = load(path, CatalogError, name)
        top = Fields(document, (), dict.fromkeys(said, dict))
        for kind, allowed, called in (
            ("rules", _RULES, "rules `{}` are"),
            ("models", _MODEL, "model `{}` is"),
            ("layouts", _LAYOUT, "layout `{}` is"),
        ):
            for word in top.get(kind) or ():
                fields = Fields(document, (kind, word), allowed)
                if (other := said[kind].setdefault(word, fields)) is not fields:
                    evidence = (f"in {other.document.path}",)
                    fields.fail(f"{called.format(word)} declared already", evidence=evidence)
    names: dict[str, Names] = {}
    for word, fields in said["rules"].items():
        names[word] = other_names(fields, "names")
        _few(fields, names.values())
    rules: dict[str, Rules] = {}
    for word, fields in said["rules"].items():
        rules[word] = _rules(word, said["rules"], names)
        _few(fields, (known for held in rules.values() for known in (held.names, held.read_also)))
    models = {word: _model(fields) for word, fields in said["models"].items()}
    return rules, {word: _layout(word, said["layouts"], rules, models) for word in said["layouts"]}


def _few(fields: Fields, names: Iterable[Names]) -> None:
    if sum(map(len, names)) > MAX_RULES:
        fields.fail(f"more than {MAX_RULES:,} rules in all")


def _chain(word: str, found: Mapping[str, Fields], what: str) -> list[Fields]:
    """What is said under a name, and under those that it extends, the nearest first."""
    chain = [found[word]]
    while (base := chain[-1].get("extends")) is not None:
        if base not in found or found[base] in chain:
            hint = did_you_mean(base, found.keys() - {word})
            chain[-1].fail(f"no {what} `{base}` to extend", "extends", value=True, hint=hint)
        chain.append(found[base])
        if len(chain) > MAX_CHAIN:
            chain[0].fail(f"more than {MAX_CHAIN} {what}s extend each other", "extends", value=True)
    return chain


def _held(chain: Sequence[Fields], key: str) -> Fields:
    """The first that says something of a key."""
    return next((fields for fields in chain if key in fields.table), chain[0])


def _rules(word: str, found: Mapping[str, Fields], names: Mapping[str, Names]) -> Rules:
    """The rules of this name: its own names, and those of the rules that they extend."""
    chain = _chain(word, found, "rules")
    also = _held(chain, "read_also")
    made: dict[str, Sequence[OtherName]] = {}
    for fields in reversed(chain):
        made |= names[str(fields.keys[-1])]
    read_also = other_names(also, "read_also")
    for key, known in (("names", made), ("read_also", read_also)):
        part = next((module for module, others in known.items() if not all_rows(others)), None)
        if part is not None:
            fact = f"the names of `{part}` are not those of all its rows, each once"
            _held(chain, key).fail(fact, key)
    without, within = _held(chain, "without").strings("without"), _held(chain, "within").get("within")
    return Rules(made, without=without, read_also=read_also, within=within or "")


def _model(fields: Fields) -> Model:
    library, sizes = fields.get("library"), fields.texts("sizes")
    if library not in LIBRARIES:
        fields.fail(f"`library` is one of {', '.join(LIBRARIES)}", "library", value="library" in fields.table)
    for key, size in sizes.items():
        if not is_size(size):
            hint = "such as `NAME.weight[0] / 2`, `count blocks`, `has NAME`"
            fields.fail(f"`{size}` tells no size", "sizes", key, value=True, hint=hint)
    _json(fields, "config")
    return Model(library, fields.get("config") or {}, sizes)


def _layout(
    word: str, found: Mapping[str, Fields], rules: Mapping[str, Rules], models: Mapping[str, Model]
) -> Layout:
    """The layout of this name: what it says itself, and the rest from the one that it extends."""
    chain = _chain(word, found, "layout")

    def held(key: str) -> Fields:
        return _held(chain, key)

    for key in ("has", "pipeline", "scheduler", "parts"):
        if key not in held(key).table:
            chain[0].fail(f"`{key}` is missing")
    said: dict[str, Any] = {
        key: held(key).get(key) or {} for key in ("index", "scheduler", "plain", "zero_snr", "unless")
    }
    for key in said:
        _json(held(key), key)
    for key in ("plain", "zero_snr"):
        if "_class_name" not in said["scheduler"] | said[key]:
            held(key).fail("the scheduler has no `_class_name`", key)
    for start, more in said["unless"].items():
        if not isinstance(more, dict):
            held("unless").fail(f"`{start}` is not a table", "unless", start, value=True)
    ranks = held("ranks").get("ranks") or {}
    for name, rank in ranks.items():
        if type(rank) is not int:
            held("ranks").fail(f"`{name}` is not a number of dimensions", "ranks", name, value=True)
    absent = held("absent").strings("absent")
    parts = [
        (folder, [f for f in chain if folder in f.table.get("parts", {})])
        for folder in dict.fromkeys(part for f in reversed(chain) for part in f.table.get("parts", {}))
        if folder not in absent
    ]
    return Layout(
        name=word,
        parts=tuple(_part(saying, folder, rules, models) for folder, saying in parts),
        has=held("has").strings("has"),
        lacks=held("lacks").strings("lacks"),
        ranks=ranks,
        pipeline=held("pipeline").get("pipeline"),
        pipelines=held("pipelines").texts("pipelines"),
        pixels=held("pixels").get("pixels"),
        pixels_v=held("pixels_v").get("pixels_v"),
        absent=absent,
        **said,
    )


def _json(fields: Fields, key: str) -> None:
    """Refuse what could not be written into a model's folder: dates, and numbers that are none."""
    try:
        json.dumps(fields.get(key), allow_nan=False)
    except (TypeError, ValueError):
        fields.fail(f"`{key}` holds what no JSON file can", key, value=True)


def _part(
    chain: Sequence[Fields], folder: str, rules: Mapping[str, Rules], models: Mapping[str, Model]
) -> Part:
    """A part of a layout: what the layout says of it, and the rest from those that it extends."""
    said = [Fields(f.document, (*f.keys, "parts", folder), _PART) for f in chain]
    if not is_name(folder):
        said[0].fail(f"`{folder}` is no folder of a model")
    for key in ("model", "prefix", "rules"):
        if key not in _held(said, key).table:
            said[0].fail(f"`{key}` is missing")
    named, model, library = (_held(said, key).get(key) for key in ("rules", "model", "library"))
    if named not in rules:
        hint = did_you_mean(named, rules)
        _held(said, "rules").fail(f"unknown rules `{named}`", "rules", value=True, hint=hint)
    known = models.get(model) or Model(SHAPES[model][0] if model in SHAPES else "")
    library = library or known.library
    if library not in LIBRARIES:
        hint = f"say it by `library`, one of {', '.join(LIBRARIES)}"
        fact = f"which library has `{model}` is not known"
        _held(said, "model").fail(fact, "model", value=True, hint=hint)
    _json(_held(said, "config"), "config")
    tokenizer = _held(said, "tokenizer").get("tokenizer")
    if tokenizer is not None and not is_name(tokenizer):
        _held(said, "tokenizer").fail(f"`{tokenizer}` is no folder of a model", "tokenizer", value=True)
    return Part(
        folder,
        _held(said, "prefix").get("prefix"),
        rules[named],
        model,
        library,
        {**known.config, **(_held(said, "config").get("config") or {})},
        known.sizes,
        tokenizer,
        _held(said, "tokenizer_model").get("tokenizer_model") or "CLIPTokenizer",
        _held(said, "padding").get("padding") or "",
    )
