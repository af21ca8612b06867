"""What a set of named tensors is: matched against the catalog by exact names and shapes, never guessed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from builder.formats.layouts.rules import Source
from builder.models.catalog import PLAIN, RANK, Architecture, Catalog, Component, Names
from builder.tensors.packed.decode import why_not
from builder.tensors.packed.schemes import GENERIC, Shape, Spec, Stored, companions, stored

if TYPE_CHECKING:
    from builder.models.catalog.tables import Renaming

# What training leaves behind and no loader asks for. Whatever else matches nothing stays "unknown".
JUNK = re.compile(
    r"(?:first_stage_model\.|vae\.)?loss\."  # perceptual loss and discriminator of the autoencoder
    r"|(?:model\.diffusion_model\.)?repa_projectors\."  # what a denoiser's features are compared with
    r"|optimizers?[._]|lr_schedulers|callbacks\.|loops\.|(?:native_)?amp_scaling_state"
)
EMA = "model_ema."
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


@dataclass(frozen=True)
class Match:
    """A component found whole.

    It lies `under` a prefix: the component's own inside a full checkpoint, another that programs write, or
    none. There it has the names of the catalog's table, or those of a file of its own (`alone`), or those
    that diffusers gives it (`diffusers`). `names` gives, for each tensor of the table that is present, its
    full name in the file, but for those of `made`: those that are not one tensor there with its elements in
    that order, whose sources have full names. `companions` are tensors that belong to it beyond the
    table, such as scales: they lie under its prefix, and are known by the table's name for their layer.
    `renamed` holds the few tables' names that the file spells otherwise, with the file's spelling less the
    prefix; `reshaped` those whose shape differs in dimensions of 1, as a linear layer's does from a 1x1
    convolution's. `rank` is the least and the greatest rank of a LoRA. `usual_prefix` is set where loaders
    expect the same tensors under another prefix. `broken`: prefixed, in a checkpoint that misses other parts.
    """

    component: Component
    under: str
    names: Mapping[str, str]
    missing_optional: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    rank: tuple[int, int] | None = None
    usual_prefix: str | None = None
    broken: bool = False
    made: Mapping[str, Source] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    alone: Names = PLAIN
    diffusers: bool = False

    @property
    def prefix(self) -> str:
        """What stands before every name of it."""
        return self.under + self.alone.prefix

    @cached_property
    def full(self) -> tuple[str, ...]:
        """The full names of all its tensors in the file, its companions' too."""
        made = (full for whole in self.made.values() for full in whole.names)
        return (*self.names.values(), *made, *self.companions.values())

    @property
    def whole(self) -> dict[str, str]:
        """The full name of every tensor of the component, but for those of `made`, by its unprefixed one."""
        return {**self.names, **self.companions}

    @property
    def required(self) -> int:
        """How many of the table's tensors are there that must be."""
        rules = self.component.tensors
        return sum(not rules[n].optional for n in (*self.names, *self.made))

    @property
    def usual(self) -> bool:
        """Whether it is named as the catalog has it, inside a full checkpoint or in a file of its own."""
        at_home = self.under == self.component.prefix and not self.alone.prefix
        return not self.diffusers and (at_home or (not self.under and self.alone == self.component.alone))

    @property
    def ema(self) -> bool:
        """Whether this is an average kept for training rather than the model itself."""
        return self.component.average_of is not None

    @property
    def diffusers_attention(self) -> bool:
        """Whether an autoencoder's attention is named or shaped as diffusers does it."""
        return bool(self.renamed or self.reshaped)


class Misshapen(NamedTuple):
    """A tensor that is there in another shape; -1 in `expected` is the rank, any size."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class Rejection:
    """A component that is not there, though some of it is (less than a twentieth counts as nothing).

    `present` counts required tensors of the right name and shape, `total` all required ones; `missing`
    are names of the table. `outdone_by` names the component that was chosen for the same tensors when
    this one is whole too.
    """

    component: Component
    prefix: str
    present: int
    total: int
    missing: tuple[str, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()
    outdone_by: str | None = None

    def describe(self) -> str:
        """What of it is not there, and what is there in another shape: in words, after its name."""
        said = []
        if self.missing:
            said.append(f"{len(self.missing):,} of {self.total:,} tensors are missing")
        if self.misshapen:
            name, expected, found = self.misshapen[0]
            more = f" and {len(self.misshapen) - 1:,} more" if len(self.misshapen) > 1 else ""
            said.append(f"`{name}` is {list(found)}, not {list(expected)}{more}")
        return f"{self.component.name}: {'; '.join(said)}"

    @property
    def hint(self) -> str | None:
        """What can be done where nothing but shapes is other."""
        if self.missing or not self.misshapen:
            return None
        return "if it is a model of another kind, `ckpt components learn FILE` makes it known"


@dataclass(frozen=True)
class Identity:
    """What the tensors are.

    `architecture` is an architecture's name; a class's name for one bare component; a class's name and
    `-BROKEN` for the largest part of a checkpoint that misses others, `incomplete` then being the
    architecture it is nearest to; None: unknown. `absent` are the classes it misses, in a whole model those
    that such often go without. `rejected` comes
    nearest first. `optional`, `ema`, `scales`, `junk` and `unknown` are full names of tensors, in the
    file's order: keys that a full checkpoint may also hold; every averaged weight, known component or
    not; companions of packed weights, of a component or none; what no loader reads; what nothing explains.
    `duplicates` are second matches of a class, which are junk. `astray` are the matches in a whole
    checkpoint, averages aside, that its architecture has no slot for. `notes` say how ambiguities were
    resolved. `undecoded` says of weights of no component by which schemes they are packed that nothing here
    decodes.
    """

    architecture: str | None
    intact: bool
    matches: tuple[Match, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]
    optional: tuple[str, ...]
    ema: tuple[str, ...]
    scales: tuple[str, ...]
    junk: tuple[str, ...]
    unknown: tuple[str, ...]
    duplicates: tuple[Match, ...] = ()
    incomplete: str | None = None
    absent: tuple[str, ...] = ()
    astray: tuple[Match, ...] = ()
    undecoded: tuple[str, ...] = ()

    @property
    def companions(self) -> tuple[str, ...]:
        """Full names of the tensors that components of the model have beyond their tables."""
        return tuple(full for m in self.matches if not m.ema for full in m.companions.values())

    @property
    def runner_up(self) -> Rejection | None:
        """The component that came nearest without being chosen."""
        return self.rejected[0] if self.rejected else None

    def find(self, cls: str) -> Match | None:
        """The match of a class, or None."""
        return next((m for m in self.matches if m.component.cls == cls), None)


def identify(specs: Mapping[str, Spec], catalog: Catalog) -> Identity:
    """Find the catalog's components among named tensors, under their prefix and under bare names.

    A component matches when every required tensor is there in exactly its shape. Of components that fit
    the same tensors the one that explains most of them is chosen; of equals, the one whose class most
    architectures have a slot for. A class is filled by what is prefixed, then by its standard component.
    A packed weight fits where its numbers would. Touches no tensor data.
    """
    specs = stored(specs)
    found, rejected = _candidates(specs, catalog)
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


def _candidates(specs: Mapping[str, Spec], catalog: Catalog) -> tuple[list[Match], list[Rejection]]:
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
                layers, held = _layers(found), {*found.full}
                beyond = ((n, _own_name(n, found, layers)) for n in match.companions.values())
                kept = {bare: n for n, bare in beyond if bare is not None and n not in held}
                return replace(found, companions=kept)
    return None


def _rank(expected: Shape, shape: Shape) -> int | None:
    """The size that stands where the table has -1, or None when the table has none or cannot fit."""
    if RANK not in expected or len(expected) != len(shape):
        return None
    rank = shape[expected.index(RANK)]
    return rank if rank > 0 and tuple(rank if e == RANK else e for e in expected) == shape else None


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
                layers[owner] = _layers(matches[owner])
            bare = _own_name(name, matches[owner], layers[owner])
            if bare is not None:
                found[owner].setdefault(bare, name)
    return found


def _layers(match: Match) -> dict[str, str]:
    """By the full name of each layer that holds tensors, what the table calls it."""
    inner = ((bare, full) for bare, full in match.names.items() if "." in bare)
    return {full.rpartition(".")[0]: bare.rpartition(".")[0] for bare, full in inner}


def _own_name(full: str, match: Match, layers: Mapping[str, str]) -> str | None:
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
