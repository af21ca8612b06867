"""What the catalog's files say of classes: metric, blocks, adapters, GGUF, and patterns for precisions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, cast

from builder.base.errors import CatalogError
from builder.base.toml import load
from builder.formats.layouts.rules import OtherName
from builder.models.catalog.fields import MAX_PATTERNS, Fields
from builder.models.catalog.tables import PARTS, Adapters, Extracted, Gguf, Later, Patterns, Scale, Traits

if TYPE_CHECKING:
    from builder.formats.layouts.rules import Change

MAX_RULES = 100_000  # other names of a class's modules
MAX_BLOCKS = 1000  # of a class; the largest known have some dozens
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
