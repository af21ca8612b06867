"""Components against the names and shapes of a file, in every way that programs spell them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from builder.formats.layouts.rules import Source
from builder.models.catalog import PLAIN, RANK, Catalog, Component, Names
from builder.models.identity import EMA, Match, Misshapen, Rejection
from builder.tensors.packed.schemes import Shape, Spec, Stored, companions, stored

if TYPE_CHECKING:
    from builder.models.catalog.tables import Renaming

# Attention of an autoencoder as diffusers spells it. A linear layer's weights are a 1x1 convolution's
# less two dimensions, so either shape holds the same numbers.
_ATTENTION = re.compile(r"(.*\bmid\.attn_1\.)(q|k|v|proj_out)(\.(?:weight|bias))")
DIFFUSERS_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def attention_changes(renamed: int, shapes: Iterable[Shape]) -> str:
    """What is done to an autoencoder's attention, in words; `shapes` are the new ones."""
    words = [f"{renamed} renamed"] * bool(renamed)
    kinds = Counter(len(shape) for shape in shapes)
    words += [f"{kinds[4]} reshaped to [n, n, 1, 1]"] * bool(kinds[4])
    words += [f"{kinds[1]} to [n]"] * bool(kinds[1])
    return ", ".join(words)


def candidates(specs: Mapping[str, Spec], catalog: Catalog) -> tuple[list[Match], list[Rejection]]:
    """Every component that is whole, and those that are not; first by the names that the catalog says."""
    own = sorted({c.prefix for c in catalog.components.values() if c.prefix})
    local = _under(specs, own)
    inside = {full for names in local.values() for full in names.values()}
    # Bare tables need no look where every name has a place in a full checkpoint.
    bare = any(name not in inside and name not in catalog.optional for name in specs)
    local[""] = {name: name for name in specs} if bare else {}

    found = _Found()
    begin = {prefix: _beginnings(names) for prefix, names in local.items()}
    for component in catalog.components.values():
        for prefix in dict.fromkeys((component.prefix, "")):
            if component.may_be(PLAIN, begin.get(prefix, set())):
                found.add(_compare(component, prefix, local[prefix], specs))
        if component.alone != PLAIN and component.may_be(component.alone, begin[""]):
            found.add(_compare(component, "", local[""], specs, alone=component.alone))
    whole = {full for match in found.matches for full in match.full}
    extra = {*catalog.optional, *companions(specs), *(n for n in specs if n.startswith(EMA))}
    if any(n not in whole and n not in extra for n in specs):
        placed = {full for match in found.matches if match.under for full in match.full}
        left = [n for n in specs if n not in placed and n not in extra]
        for prefix, names in {"": {n: n for n in left}, **_under(left, catalog.containers)}.items():
            for match in _spellings(catalog.components.values(), prefix, names, specs, catalog):
                found.add(match, again=True)
            if usual := _respelt(names, catalog):
                for match in _spellings(catalog.components.values(), prefix, usual, specs, catalog):
                    found.add(
                        replace(match, diffusers=True) if isinstance(match, Match) else match, again=True
                    )
    return found.matches, found.rejections


def _respelt(names: Mapping[str, str], catalog: Catalog) -> dict[str, str]:
    """Names as the tables have them where others begin otherwise, all else as it is; none: there are none."""
    begin = tuple(catalog.respelt)
    if not any(name.startswith(begin) for name in names):
        return {}
    found: dict[str, str] = {}
    for name, full in names.items():
        old = next((b for b in begin if name.startswith(b)), "")
        found.setdefault(catalog.respelt.get(old, "") + name[len(old) :], full)
    return found


def _under(names: Iterable[str], prefixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """By prefix, the full names that begin with it by what comes after; prefixes without any are left out."""
    starts: dict[str, list[str]] = defaultdict(list)  # by their first word: a file may have many names
    for prefix in prefixes:
        starts[prefix.partition(".")[0]].append(prefix)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for prefix in starts.get(name.partition(".")[0], ()):
            if name.startswith(prefix):
                found.setdefault(prefix, {})[name[len(prefix) :]] = name
    return found


def _beginnings(names: Iterable[str]) -> set[str]:
    """What names have before their first dots."""
    return {name.partition(".")[0] for name in names}


class _Found:
    """What comparing finds: of the same tensors one match of each component, and its rejections."""

    def __init__(self) -> None:
        self.matches: list[Match] = []
        self.rejections: list[Rejection] = []
        self._seen: set[object] = set()

    def add(self, result: Match | Rejection | None, again: bool = False) -> None:
        """Note a result; `again`: by names that are tried last, where a rejection is that of most tensors."""
        if isinstance(result, Match):
            key = (result.component.name, frozenset(result.full))
            if key not in self._seen:
                self.matches.append(result)
            self._seen.add(key)
        elif result is not None:
            same = [r for r in self.rejections if again and r.component is result.component]
            if all(r.present < result.present for r in same):
                self.rejections = [*(r for r in self.rejections if r not in same), result]


def _spellings(
    components: Iterable[Component],
    prefix: str,
    names: Mapping[str, str],
    specs: Mapping[str, Spec],
    catalog: Catalog,
) -> Iterator[Match | Rejection]:
    """Components against the names under a prefix, in each of the ways that they may be spelled."""
    wanted = {c.name: c for c in components}
    begin = _beginnings(names)
    for component in wanted.values():
        for alone in (a for a in dict.fromkeys((PLAIN, component.alone)) if component.may_be(a, begin)):
            if (result := _compare(component, prefix, names, specs, alone=alone)) is not None:
                yield result
    for renaming in catalog.renamings:
        if any(c.name in wanted for c in renaming.components) and renaming.rules.known_in(names):
            held, linear, made = _renamed(names, renaming, specs)
            called = _beginnings((*held, *made))
            for component in renaming.components:
                if component.name not in wanted or not component.may_be(PLAIN, called):
                    continue
                result = _compare(component, prefix, held, specs, linear=linear, made=made)
                if isinstance(result, Match):
                    result = replace(result, diffusers=True)
                if result is not None:
                    yield result


def _renamed(
    names: Mapping[str, str], renaming: Renaming, specs: Mapping[str, Spec]
) -> tuple[dict[str, str], set[str], dict[str, Source]]:
    """The full names by those of the table that diffusers' rules lead to; which of them are linear layers
    where the table has convolutions; and those that are not one tensor with its elements in that order."""
    held: dict[str, str] = {}
    linear: set[str] = set()
    made: dict[str, Source] = {}
    sources, _, _ = renaming.rules.sources({name: specs[full] for name, full in names.items()})
    for module, source in sources.items():
        bare = module.removeprefix(renaming.within)
        if not module.startswith(renaming.within):
            continue
        if source.plain:
            held[bare] = names[source.names[0]]
            linear |= {bare} if source.change == "linear" else set()
        else:
            made[bare] = source._replace(names=tuple(names[name] for name in source.names))
    return held, linear, made


def _compare(
    component: Component,
    prefix: str,
    local: Mapping[str, str],
    specs: Mapping[str, Spec],
    *,
    alone: Names = PLAIN,
    linear: Container[str] = (),
    made: Mapping[str, Source] | None = None,
) -> Match | Rejection | None:
    """The component against the names under a prefix; None when nothing of it is there."""
    if not local and not made:
        return None
    names: dict[str, str] = {}
    pieces: dict[str, Source] = {}
    renamed: dict[str, str] = {}
    reshaped: list[str] = []
    missing: list[str] = []
    missing_optional: list[str] = []
    misshapen: list[Misshapen] = []
    ranks: dict[str, int] = {}
    for name, rule in component.tensors.whole.items():
        called = alone.name(name)
        full = local.get(called)
        if full is not None and _fits(specs[full], rule.shape):
            names[name] = full
            continue
        here, attention = called, _ATTENTION.fullmatch(called) if ".attn_1." in called else None
        if attention and full is None:
            stem, layer, kind = attention.groups()
            here = stem + DIFFUSERS_ATTENTION[layer] + kind
            full = local.get(here)
        piece = made.get(name) if made and full is None else None
        if full is None and piece is None:
            (missing_optional if rule.optional else missing).append(name)
            continue
        shape = specs[full].shape if full is not None else piece.shape if piece else ()
        flat = (attention is not None or name in linear) and _extents(shape) == _extents(rule.shape)
        rank = _rank(rule.shape, shape)
        if piece is not None and shape == rule.shape:
            pieces[name] = piece
        elif full is not None and (
            flat
            or (rank is not None and rule.optional)
            or (rank is not None and ranks.setdefault(name.partition(".")[0], rank) == rank)
        ):
            names[name] = full
            if here != called:
                renamed[name] = here
            if flat and shape != rule.shape:
                reshaped.append(name)
        elif rule.optional:
            missing_optional.append(name)
        else:
            misshapen.append(Misshapen(name, rule.shape, shape))
    if not names and not pieces:
        return None
    if not missing and not misshapen:
        bounds = (min(ranks.values()), max(ranks.values())) if ranks else None
        found = Match(component, prefix, names, tuple(missing_optional), renamed, tuple(reshaped), bounds)
        return replace(found, made=pieces, alone=alone)
    present = sum(not component.tensors.whole[name].optional for name in (*names, *pieces))
    total = present + len(missing) + len(misshapen)
    if present * 20 < total:
        return None
    return Rejection(component, prefix + alone.prefix, present, total, tuple(missing), tuple(misshapen))


def _fits(spec: Spec, shape: Shape) -> bool:
    return spec.shape == shape or (isinstance(spec, Stored) and spec.holds(shape))


def _extents(shape: Shape) -> Shape:
    """A shape without dimensions of 1 at its end: a linear layer's is that of a 1x1 convolution."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def as_class(match: Match, cls: str, specs: Mapping[str, Spec], catalog: Catalog) -> Match | None:
    """The same tensors as a component of another class, whose table is equal but for optional ones."""
    if match.component.cls == cls:
        return match
    candidates = [c for c in catalog.classes[cls] if c.elements == match.component.elements]
    specs = stored(specs) if candidates else specs
    own = match.component.alone
    inside = () if match.alone == own else (match.under + own.without, match.under.removesuffix(own.prefix))
    usual = (c.prefix for c in candidates if c.prefix)
    for under in dict.fromkeys((*usual, match.under, match.prefix, *inside)) if candidates else ():
        names = {n[len(under) :]: n for n in specs if n.startswith(under)}
        for found in _spellings(candidates, under, names, specs, catalog):
            if isinstance(found, Match) and found.required and not set(match.full).isdisjoint(found.full):
                layers, held = table_layers(found), {*found.full}
                beyond = ((n, own_name(n, found, layers)) for n in match.companions.values())
                kept = {bare: n for n, bare in beyond if bare is not None and n not in held}
                return replace(found, companions=kept)
    return None


def _rank(expected: Shape, shape: Shape) -> int | None:
    """The size that stands where the table has -1, or None when the table has none or cannot fit."""
    if RANK not in expected or len(expected) != len(shape):
        return None
    rank = shape[expected.index(RANK)]
    return rank if rank > 0 and tuple(rank if e == RANK else e for e in expected) == shape else None


def table_layers(match: Match) -> dict[str, str]:
    """By the full name of each layer that holds tensors, what the table calls it."""
    inner = ((bare, full) for bare, full in match.names.items() if "." in bare)
    return {full.rpartition(".")[0]: bare.rpartition(".")[0] for bare, full in inner}


def own_name(full: str, match: Match, layers: Mapping[str, str]) -> str | None:
    """The unprefixed name of a companion: after its layer, where the file spells that otherwise than the
    table; None where diffusers' layer has no other name."""
    rest = full[len(match.prefix if full.startswith(match.prefix) else match.under) :]
    if match.renamed or match.diffusers or match.alone.without:
        for layer in layers_of(full):
            if layer in layers and (new := layers[layer] + full[len(layer) :]) not in match.component.tensors:
                return new
        if match.diffusers and "." in rest:
            return None
    return match.alone.without + rest


def layers_of(full: str) -> Iterator[str]:
    """Every layer that a name lies in, the innermost first."""
    while "." in full:
        full = full.rpartition(".")[0]
        yield full
