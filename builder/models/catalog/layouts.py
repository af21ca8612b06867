"""The catalog's files about diffusers' layouts: rules for names, and the models that they are of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from builder.base.errors import CatalogError, did_you_mean
from builder.base.toml import load
from builder.formats.layouts import Layout, Part
from builder.formats.layouts.configs import SHAPES
from builder.formats.layouts.rules import CHANGES, Rule, Rules
from builder.models.catalog.reading import Fields

_READ_ALSO: dict[str, type] = dict.fromkeys(CHANGES, dict)
_RULES = {**_READ_ALSO, "read_also": dict, "without": list, "within": str}
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
    "parts": dict,
}
_PART = {
    "model": str,
    "library": str,
    "prefix": str,
    "rules": str,
    "config": dict,
    "tokenizer": str,
    "padding": str,
}
MAX_RULES = 100_000  # of all layouts
MAX_CHAIN = 8  # layouts that extend each other
LIBRARIES = ("diffusers", "transformers")


def read_layouts(files: Iterable[tuple[Path, str]]) -> tuple[dict[str, Rules], dict[str, Layout]]:
    """The rules and the layouts of files, each with its name in messages. Raises CatalogError."""
    rules: dict[str, Rules] = {}
    found: dict[str, Fields] = {}
    total = 0
    for path, name in files:
        document = load(path, CatalogError, name)
        top = Fields(document, (), {"rules": dict, "layouts": dict})
        for word in top.get("rules") or ():
            fields = Fields(document, ("rules", word), _RULES)
            if word in rules:
                fields.fail(f"rules `{word}` are declared already")
            rules[word] = _rules(fields)
            total += rules[word].count
            if total > MAX_RULES:
                fields.fail(f"more than {MAX_RULES:,} rules in all")
        for word in top.get("layouts") or ():
            fields = Fields(document, ("layouts", word), _LAYOUT)
            if word in found:
                evidence = (f"in {found[word].document.path}",)
                fields.fail(f"layout `{word}` is declared already", evidence=evidence)
            found[word] = fields
    return rules, {word: _layout(word, found, rules) for word in found}


def _rules(fields: Fields) -> Rules:
    also = fields.inner("read_also", _READ_ALSO)
    return Rules(
        _pairs(fields),
        without=fields.strings("without"),
        read_also=_pairs(also) if also is not None else (),
        within=fields.get("within") or "",
    )


def _pairs(fields: Fields) -> list[Rule]:
    """The rules of a table, each for one module; patterns stand for equally many, which pair in order."""
    made: dict[str, Rule] = {}
    for change in CHANGES:
        for original, diffusers in fields.texts(change).items():
            ours, theirs = (fields.expand(p, change, original)[0] for p in (original, diffusers))
            if len(ours) != len(theirs):
                fact = f"{len(ours)} names do not pair with {len(theirs)}"
                fields.fail(fact, change, original, value=True)
            if len(made) + len(ours) > MAX_RULES:
                fields.fail(f"more than {MAX_RULES:,} rules", change, original)
            for one, other in zip(ours, theirs, strict=True):
                if one in made:
                    fields.fail(f"`{one}` has a rule already", change, original)
                if (change == "qkv") is not ("*" in other):
                    fields.fail("a `*` is for what `qkv` splits", change, original, value=True)
                made[one] = Rule(one, other, change)
    return list(made.values())


def _layout(word: str, found: dict[str, Fields], rules: dict[str, Rules]) -> Layout:
    """The layout of this name: what it says itself, and the rest from the one that it extends."""
    chain = [found[word]]
    while (base := chain[-1].get("extends")) is not None:
        if base not in found or found[base] in chain:
            hint = did_you_mean(base, found.keys() - {word})
            chain[-1].fail(f"no layout `{base}` to extend", "extends", value=True, hint=hint)
        chain.append(found[base])
        if len(chain) > MAX_CHAIN:
            chain[0].fail(f"more than {MAX_CHAIN} layouts extend each other", "extends", value=True)

    def held(key: str) -> Fields:
        return next((fields for fields in chain if key in fields.table), chain[0])

    for key in ("has", "pipeline", "pixels", "scheduler", "parts"):
        if key not in held(key).table:
            chain[0].fail(f"`{key}` is missing")
    said: dict[str, Any] = {
        key: held(key).get(key) or {} for key in ("index", "scheduler", "plain", "zero_snr")
    }
    for key in said:
        _json(held(key), key)
    for key in ("plain", "zero_snr"):
        if "_class_name" not in said["scheduler"] | said[key]:
            held(key).fail("the scheduler has no `_class_name`", key)
    ranks = held("ranks").get("ranks") or {}
    for name, rank in ranks.items():
        if type(rank) is not int:
            held("ranks").fail(f"`{name}` is not a number of dimensions", "ranks", name, value=True)
    parts = held("parts")
    return Layout(
        name=word,
        parts=tuple(_part(parts, folder, rules) for folder in parts.get("parts")),
        has=held("has").strings("has"),
        lacks=held("lacks").strings("lacks"),
        ranks=ranks,
        pipeline=held("pipeline").get("pipeline"),
        pipelines=held("pipelines").texts("pipelines"),
        pixels=held("pixels").get("pixels"),
        pixels_v=held("pixels_v").get("pixels_v"),
        absent=held("absent").strings("absent"),
        **said,
    )


def _json(fields: Fields, key: str) -> None:
    """Refuse what could not be written into a model's folder: dates, and numbers that are none."""
    try:
        json.dumps(fields.get(key), allow_nan=False)
    except (TypeError, ValueError):
        fields.fail(f"`{key}` holds what no JSON file can", key, value=True)


def _part(layout: Fields, folder: str, rules: dict[str, Rules]) -> Part:
    fields = Fields(layout.document, (*layout.keys, "parts", folder), _PART, "model", "prefix", "rules")
    if Path(folder).name != folder:
        fields.fail(f"`{folder}` is no folder of a model")
    named, model, library = (fields.get(key) for key in ("rules", "model", "library"))
    if named not in rules:
        fields.fail(f"unknown rules `{named}`", "rules", value=True, hint=did_you_mean(named, rules))
    if library is None and model in SHAPES:
        library = SHAPES[model][0]
    if library not in LIBRARIES:
        hint = f"say it by `library`, one of {', '.join(LIBRARIES)}"
        fields.fail(f"which library has `{model}` is not known", "model", value=True, hint=hint)
    _json(fields, "config")
    return Part(
        folder,
        fields.get("prefix"),
        rules[named],
        model,
        library,
        fields.get("config") or {},
        fields.get("tokenizer"),
        fields.get("padding") or "",
    )
