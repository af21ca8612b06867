"""What a set of named tensors is: matched against the catalog by exact names and shapes, never guessed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from builder.models.catalog import PLAIN, Architecture, Catalog
from builder.models.identity import EMA, Identity, Match, Rejection
from builder.models.matching import as_class, candidates, own_name, table_layers
from builder.tensors.packed.decode import why_not
from builder.tensors.packed.schemes import GENERIC, Spec, companions, stored

# What training leaves behind and no loader asks for. Whatever else matches nothing stays "unknown".
JUNK = re.compile(
    r"(?:first_stage_model\.|vae\.)?loss\."  # perceptual loss and discriminator of the autoencoder
    r"|(?:model\.diffusion_model\.)?repa_projectors\."  # what a denoiser's features are compared with
    r"|optimizers?[._]|lr_schedulers|callbacks\.|loops\.|(?:native_)?amp_scaling_state"
)


def identify(specs: Mapping[str, Spec], catalog: Catalog) -> Identity:
    """Find the catalog's components among named tensors, under their prefix and under bare names.

    A component matches when every required tensor is there in exactly its shape. Of components that fit
    the same tensors the one that explains most of them is chosen; of equals, the one whose class most
    architectures have a slot for. A class is filled by what is prefixed, then by its standard component.
    A packed weight fits where its numbers would. Touches no tensor data.
    """
    specs = stored(specs)
    found, rejected = candidates(specs, catalog)
    matches, duplicates, outdone, notes = _choose(found, catalog)
    matches, architecture, intact, incomplete, absent = _architecture(matches, rejected, specs, catalog)
    if home := catalog.architectures.get((architecture if intact else incomplete) or ""):
        place = {slot: index for index, slot in enumerate(home.slots)}
        matches.sort(key=lambda m: place.get(m.component.cls, len(place)))
        matches = [replace(m, usual_prefix=_usual_prefix(m, home, catalog)) for m in matches]
    if not intact:
        matches = [replace(m, broken=m.under != "" and not m.ema) for m in matches]
    # What other components have besides, whose required tensors are these very ones.
    explained = {full for m in matches for full in m.full}
    besides = {full for m in found if not explained.isdisjoint(m.full) for full in m.full} - explained
    own = _companions(specs, [*matches, *duplicates], besides, catalog)
    complete = [replace(m, companions=own[i]) for i, m in enumerate([*matches, *duplicates])]
    matches, duplicates = complete[: len(matches)], complete[len(matches) :]
    rest = _sort_leftovers(specs, matches, duplicates, besides, catalog)
    sides = companions(specs)
    known = {full for m in (*matches, *duplicates) for full in m.companions.values()}
    schemes = dict.fromkeys(s.name for n, s in sides.items() if n not in known and s.name != GENERIC)
    return Identity(
        architecture,
        intact,
        tuple(matches),
        tuple(sorted(rejected + outdone, key=lambda r: (-r.present / r.total, -r.present))),
        tuple(notes),
        optional=tuple(rest["optional"]),
        ema=tuple(rest["ema"]),
        scales=tuple(sides),
        junk=tuple(rest["junk"]),
        unknown=tuple(rest["unknown"]),
        duplicates=tuple(duplicates),
        incomplete=incomplete,
        absent=absent,
        astray=tuple(m for m in matches if intact and home and not (m.ema or m.component.cls in home.slots)),
        undecoded=tuple(
            f"a weight packed by {s} is not decoded: {why}" for s in schemes if (why := why_not(s))
        ),
    )


def _choose(
    found: Iterable[Match], catalog: Catalog
) -> tuple[list[Match], list[Match], list[Rejection], list[str]]:
    """Matches that share no tensor and no class; second copies of a class; the outdone; notes."""
    order = _order(catalog)
    outdone: list[Rejection] = []
    notes: list[str] = []
    owner: dict[str, Match] = {}
    fitting: dict[str, list[Match]] = defaultdict(list)
    # Two tables that are equal but for optional tensors are one component.
    for match in sorted(
        found,
        key=lambda m: (
            -m.required,
            -len(m.full)
            * (m.prefix == m.component.prefix),  # in a full checkpoint, the one that is all of it
            m.alone != PLAIN or m.diffusers,
            order[m.component.name],
            -len(m.full),
            m.under == "",
        ),
    ):
        name, cls = match.component.name, match.component.cls
        rival = next((owner[n] for n in match.full if n in owner), None)
        if rival is None:
            fitting[cls].append(match)
            owner.update(dict.fromkeys(match.full, match))
            continue
        if rival.component is match.component:
            continue
        count, more = match.required, rival.required
        why = f"which explains {more} tensors, not {count}" if more > count else "which is the more common"
        if cls != rival.component.cls or more > count:
            notes.append(f"`{name}` fits the tensors of `{rival.component.name}` too, {why}")
        outdone.append(
            Rejection(match.component, match.prefix, count, count, outdone_by=rival.component.name)
        )
    chosen, duplicates = [], []
    for rivals in fitting.values():
        # Loaders take what is under the prefix, however whole a bare copy may be.
        rivals.sort(key=lambda m: (m.prefix != m.component.prefix, m.under == "", order[m.component.name]))
        chosen.append(rivals[0])
        duplicates += rivals[1:]
    chosen.sort(key=lambda m: order[m.component.name])
    return chosen, duplicates, outdone, notes


def _order(catalog: Catalog) -> dict[str, tuple[int, int, str, int]]:
    """Where a component stands among equals: first what others are made from, then the most shared class,
    then its class's standard one."""
    slots = Counter(slot for a in catalog.architectures.values() for slot in a.slots)
    heirs = Counter(component.extends for component in catalog.components.values())
    return {
        component.name: (-heirs[component.name], -slots[cls], cls, index)
        for cls, members in catalog.classes.items()
        for index, component in enumerate(members)
    }


def _architecture(
    matches: Sequence[Match], rejected: Iterable[Rejection], specs: Mapping[str, Spec], catalog: Catalog
) -> tuple[list[Match], str | None, bool, str | None, tuple[str, ...]]:
    """The matches, each of the class that it is there; the architecture, whether it is whole, and otherwise
    which it is nearest to and what that lacks."""
    model = [m for m in matches if not m.ema] or list(matches)
    placed = [m for m in model if m.under or not m.component.prefix]
    twins: dict[tuple[str, str], Match | None] = {}

    def fitting(match: Match, slot: str) -> Match | None:
        """A match, which lies where its class usually does not, as one of another class."""
        key = match.component.name, slot
        if key not in twins:
            twins[key] = as_class(match, slot, specs, catalog)
        return twins[key]

    def filled(architecture: Architecture) -> list[Match]:
        usual = {m.component.cls: m for m in placed}
        parts = [
            m
            for slot in architecture.slots
            if (m := usual.get(slot)) and m.component in catalog.candidates(slot, architecture)
        ]
        taken = {id(m) for m in parts}
        free = [m for m in placed if id(m) not in taken and m.component.cls not in architecture.slots]
        open_slots = [s for s in architecture.slots if s not in {m.component.cls for m in parts}]
        if parts and free:
            parts += [t for s in open_slots if (t := next(filter(None, (fitting(m, s) for m in free)), None))]
        return parts

    def explained(architecture: Architecture) -> tuple[int, int]:
        parts = filled(architecture)
        return sum(len(m.full) for m in parts), len(parts) - len(architecture.slots)

    def reclassed(architecture: Architecture) -> list[Match]:
        parts = filled(architecture)
        taken = {n for m in parts for n in m.full}
        return [*parts, *(m for m in matches if taken.isdisjoint(m.full))]

    def is_whole(architecture: Architecture) -> bool:
        held = {m.component.cls for m in filled(architecture)}
        many = len(held) == len(architecture.slots) or len(held) > 1
        return bool(held) and many and held.issuperset(architecture.due)

    whole = [a for a in catalog.architectures.values() if is_whole(a)]
    if whole:
        best = max(whole, key=explained)
        held = {m.component.cls for m in filled(best)}
        return reclassed(best), best.name, True, None, tuple(s for s in best.slots if s not in held)
    if len(model) == 1 and (model[0].prefix != model[0].component.prefix or not model[0].under):
        return list(matches), model[0].component.cls, True, None, ()
    prefixed = [m for m in placed if m.under]
    if not prefixed:
        return list(matches), None, False, None, ()
    largest = max(prefixed, key=lambda m: len(m.full)).component.cls
    almost: dict[str, int] = {}
    for part in rejected:
        almost[part.component.cls] = max(part.present, almost.get(part.component.cls, 0))

    def nearness(architecture: Architecture) -> tuple[int, int, int]:
        there, lacking = explained(architecture)
        return there, almost.get(architecture.slots[0], 0), lacking

    near = max(catalog.architectures.values(), key=nearness)
    parts = {m.component.cls for m in filled(near)}
    if not parts:
        return list(matches), f"{largest}-BROKEN", False, None, ()
    return (
        reclassed(near),
        f"{largest}-BROKEN",
        False,
        near.name,
        tuple(s for s in near.slots if s not in parts),
    )


def _usual_prefix(match: Match, home: Architecture, catalog: Catalog) -> str | None:
    """The prefix that loaders expect of the same tensors, when it is another one."""
    component = match.component
    if not match.under or component.cls not in home.slots:
        return None
    usual = catalog.component_for(component.cls, home)
    other = usual.prefix != match.prefix and usual.tensors.keys() == component.tensors.keys()
    return usual.prefix if other or match.diffusers else None


def _companions(
    specs: Mapping[str, Spec], matches: Sequence[Match], besides: Container[str], catalog: Catalog
) -> dict[int, dict[str, str]]:
    """By each match's place, the tensors beyond its table that belong to it: unprefixed names to full ones.

    What lies under several prefixes is of the longest. Under bare names, and others that several components
    share, it is of the component with which it shares most of its path; under bare names of the only one,
    where it shares none and lies under no component's prefix.
    """
    taken = {full for m in matches for full in m.full}
    at: dict[str, list[int]] = defaultdict(list)
    for index, match in enumerate(matches):
        at[match.under].append(index)
    places = sorted(at, reverse=True)
    paths: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index in (i for under, there in at.items() if not under or len(there) > 1 for i in there):
        for full in matches[index].full:
            parts = full.split(".")
            for depth in range(1, len(parts)):
                paths[tuple(parts[:depth])].add(index)
    deepest = max(map(len, paths), default=0)
    strange = (EMA, *(c.prefix for c in catalog.components.values() if c.prefix))
    layers: dict[int, dict[str, str]] = {}
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name, spec in specs.items():
        if name in taken or name in besides or _is_optional(name, spec, catalog) or JUNK.match(name):
            continue
        under = next((u for u in places if name.startswith(u)), None)
        owners = set(at[under]) if under is not None else set()
        if owners and (not under or len(owners) > 1):
            parts = name.split(".", deepest)[:-1]
            near = (paths.get(tuple(parts[:depth]), set()) & owners for depth in range(len(parts), 0, -1))
            lone = len(matches) == 1 and not name.startswith(strange)
            owners = next((shared for shared in near if shared), owners if lone else set())
        if len(owners) == 1:
            (owner,) = owners
            if owner not in layers:
                layers[owner] = table_layers(matches[owner])
            bare = own_name(name, matches[owner], layers[owner])
            if bare is not None:
                found[owner].setdefault(bare, name)
    return found


def _is_optional(name: str, spec: Spec, catalog: Catalog) -> bool:
    return name in catalog.optional and catalog.optional[name] in (None, spec.shape)


def _sort_leftovers(
    specs: Mapping[str, Spec],
    matches: Iterable[Match],
    duplicates: Iterable[Match],
    besides: Container[str],
    catalog: Catalog,
) -> dict[str, list[str]]:
    """Every tensor that is no part of the model, by what it is."""
    rest: dict[str, list[str]] = defaultdict(list)
    model = [m for m in matches if not m.ema] or list(matches)  # an average alone is the model
    explained = {full for m in model for full in m.full}
    averaged = {full for m in matches for full in m.full} - explained
    second = {full for m in duplicates for full in m.full}
    scales = companions(specs)
    for name, spec in specs.items():
        if name in explained:
            continue
        if name in averaged:
            kind = "ema"
        elif _is_optional(name, spec, catalog) or name in besides:
            kind = "optional"
        elif name.startswith(EMA):
            kind = "ema"
        elif name in scales:
            kind = "scales"
        elif name in second or JUNK.match(name):
            kind = "junk"
        else:
            kind = "unknown"
        rest[kind].append(name)
    return rest
