"""What a set of named tensors is: matched against the catalog by exact names and shapes, never guessed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from builder.models.catalog import RANK, Architecture, Catalog, Component
from builder.tensors.packed import companions

Shape = tuple[int, ...]

# What training leaves behind and no loader asks for. Whatever else matches nothing stays "unknown".
JUNK = re.compile(
    r"(?:first_stage_model\.|vae\.)?loss\."  # perceptual loss and discriminator of the autoencoder
    r"|optimizers?[._]|lr_schedulers|callbacks\.|loops\.|(?:native_)?amp_scaling_state"
)
EMA = "model_ema."
# Attention of an autoencoder as diffusers spells it. A linear layer's weights are a 1x1 convolution's
# less two dimensions, so either shape holds the same numbers.
_ATTENTION = re.compile(r"(.*\bmid\.attn_1\.)(q|k|v|proj_out)(\.(?:weight|bias))")
DIFFUSERS_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


class Spec(Protocol):
    """All that identification looks at; a `LazyTensor` is one."""

    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True)
class Match:
    """A component found whole.

    `prefix` is the component's own inside a full checkpoint, or empty for bare names. `names` gives, for
    each tensor of the catalog's table that is present, its full name in the file. `companions` are tensors
    that belong to it beyond the table, such as scales: they lie under its prefix, and are known by their
    names less that. `renamed` holds the
    few tables' names that the file spells otherwise, with the file's spelling less the prefix;
    `reshaped` those whose shape is a linear layer's where the table has a 1x1 convolution.
    `rank` is the least and the greatest rank of a LoRA. `usual_prefix` is set where loaders expect the
    same names under another prefix. `broken`: prefixed, in a checkpoint that misses other parts.
    """

    component: Component
    prefix: str
    names: Mapping[str, str]
    missing_optional: tuple[str, ...] = ()
    companions: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    rank: tuple[int, int] | None = None
    usual_prefix: str | None = None
    broken: bool = False

    @property
    def whole(self) -> dict[str, str]:
        """The full name of every tensor of the component, by its unprefixed one."""
        return {**self.names, **self.companions}

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


@dataclass(frozen=True)
class Identity:
    """What the tensors are.

    `architecture` is an architecture's name; a class's name for one bare component; a class's name and
    `-BROKEN` for the largest part of a checkpoint that misses others, `incomplete` then being the
    architecture it is nearest to and `absent` the classes it misses; None: unknown. `rejected` comes
    nearest first. `optional`, `ema`, `scales`, `junk` and `unknown` are full names of tensors, in the
    file's order: keys that a full checkpoint may also hold; every averaged weight, known component or
    not; companions of packed weights, of a component or none; what no loader reads; what nothing explains.
    `duplicates` are second matches of a class, which are junk. `astray` are the matches in a whole
    checkpoint, averages aside, that its architecture has no slot for. `notes` say how ambiguities were
    resolved.
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

    @property
    def companions(self) -> tuple[str, ...]:
        """Full names of the tensors that components of the model have beyond their tables."""
        return tuple(full for m in self.matches if not m.ema for full in m.companions.values())

    @property
    def runner_up(self) -> Rejection | None:
        """The component that came nearest without being chosen."""
        return self.rejected[0] if self.rejected else None

    @property
    def vae_attention_shape(self) -> bool:
        """Whether an autoencoder's attention is named or shaped as diffusers does it."""
        return any(m.diffusers_attention for m in self.matches)

    def find(self, cls: str) -> Match | None:
        """The match of a class, or None."""
        return next((m for m in self.matches if m.component.cls == cls), None)


def identify(specs: Mapping[str, Spec], catalog: Catalog) -> Identity:
    """Find the catalog's components among named tensors, under their prefix and under bare names.

    A component matches when every required tensor is there in exactly its shape. Of components that fit
    the same tensors the one that explains most of them is chosen; of equals, the one whose class most
    architectures have a slot for. A class is filled by what is prefixed, then by its standard component.
    Touches no tensor data.
    """
    found, rejected = _candidates(specs, catalog)
    matches, duplicates, outdone, notes = _choose(found, catalog)
    architecture, intact, incomplete, absent = _architecture(matches, catalog)
    if home := catalog.architectures.get((architecture if intact else incomplete) or ""):
        place = {slot: index for index, slot in enumerate(home.slots)}
        matches.sort(key=lambda m: place.get(m.component.cls, len(place)))
        matches = [replace(m, usual_prefix=_usual_prefix(m, home, catalog)) for m in matches]
    if not intact:
        matches = [replace(m, broken=m.prefix != "" and not m.ema) for m in matches]
    own = _companions(specs, [*matches, *duplicates], catalog)
    complete = [replace(m, companions=own[i]) for i, m in enumerate([*matches, *duplicates])]
    matches, duplicates = complete[: len(matches)], complete[len(matches) :]
    rest = _sort_leftovers(specs, matches, duplicates, catalog)
    return Identity(
        architecture,
        intact,
        tuple(matches),
        tuple(sorted(rejected + outdone, key=lambda r: (-r.present / r.total, -r.present))),
        tuple(notes),
        optional=tuple(rest["optional"]),
        ema=tuple(rest["ema"]),
        scales=tuple(companions(specs)),
        junk=tuple(rest["junk"]),
        unknown=tuple(rest["unknown"]),
        duplicates=tuple(duplicates),
        incomplete=incomplete,
        absent=absent,
        astray=tuple(m for m in matches if intact and home and not (m.ema or m.component.cls in home.slots)),
    )


def _candidates(specs: Mapping[str, Spec], catalog: Catalog) -> tuple[list[Match], list[Rejection]]:
    prefixes = sorted({c.prefix for c in catalog.components.values() if c.prefix})
    local: dict[str, dict[str, str]] = {
        p: {name[len(p) :]: name for name in specs if name.startswith(p)} for p in prefixes
    }
    inside = {full for names in local.values() for full in names.values()}
    # Bare tables need no look where every name has a place in a full checkpoint.
    bare = any(name not in inside and name not in catalog.optional for name in specs)
    local[""] = {name: name for name in specs} if bare else {}

    matches, rejections = [], []
    for component in catalog.components.values():
        for prefix in dict.fromkeys((component.prefix, "")):
            result = _compare(component, prefix, local[prefix], specs)
            if isinstance(result, Match):
                matches.append(result)
            elif result is not None:
                rejections.append(result)
    return matches, rejections


def _compare(
    component: Component, prefix: str, local: Mapping[str, str], specs: Mapping[str, Spec]
) -> Match | Rejection | None:
    """The component against the names under a prefix; None when nothing of it is there."""
    if not local:
        return None
    names: dict[str, str] = {}
    renamed: dict[str, str] = {}
    reshaped: list[str] = []
    missing: list[str] = []
    missing_optional: list[str] = []
    misshapen: list[Misshapen] = []
    ranks: dict[str, int] = {}
    for name, rule in component.tensors.whole.items():
        full = local.get(name)
        if full is not None and specs[full].shape == rule.shape:
            names[name] = full
            continue
        here, attention = name, _ATTENTION.fullmatch(name) if ".attn_1." in name else None
        if attention and full is None:
            stem, layer, kind = attention.groups()
            here = stem + DIFFUSERS_ATTENTION[layer] + kind
            full = local.get(here)
        if full is None:
            (missing_optional if rule.optional else missing).append(name)
            continue
        shape = specs[full].shape
        linear = attention is not None and rule.shape in (shape, (*shape, 1, 1))
        rank = _rank(rule.shape, shape)
        if linear or (rank is not None and ranks.setdefault(name.partition(".")[0], rank) == rank):
            names[name] = full
            if here != name:
                renamed[name] = here
            if linear and shape != rule.shape:
                reshaped.append(name)
        elif rule.optional:
            missing_optional.append(name)
        else:
            misshapen.append(Misshapen(name, rule.shape, shape))
    if not names:
        return None
    if not missing and not misshapen:
        bounds = (min(ranks.values()), max(ranks.values())) if ranks else None
        return Match(component, prefix, names, tuple(missing_optional), {}, renamed, tuple(reshaped), bounds)
    present = sum(not component.tensors.whole[name].optional for name in names)
    total = present + len(missing) + len(misshapen)
    if present * 20 < total:
        return None
    return Rejection(component, prefix, present, total, tuple(missing), tuple(misshapen))


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
    for match in sorted(found, key=lambda m: (-len(m.names), order[m.component.name], m.prefix == "")):
        name, cls = match.component.name, match.component.cls
        rival = next((owner[n] for n in match.names.values() if n in owner), None)
        if rival is None:
            fitting[cls].append(match)
            owner.update(dict.fromkeys(match.names.values(), match))
            continue
        count, more = len(match.names), len(rival.names)
        why = (
            f"which explains {more} tensors, not {count}"
            if more > count
            else "whose class is the more common"
        )
        if cls != rival.component.cls or more > count:
            notes.append(f"`{name}` fits the tensors of `{rival.component.name}` too, {why}")
        outdone.append(
            Rejection(match.component, match.prefix, count, count, outdone_by=rival.component.name)
        )
    chosen, duplicates = [], []
    for rivals in fitting.values():
        # Loaders take what is under the prefix, however whole a bare copy may be.
        rivals.sort(key=lambda m: (m.prefix != m.component.prefix, order[m.component.name]))
        chosen.append(rivals[0])
        duplicates += rivals[1:]
    chosen.sort(key=lambda m: order[m.component.name])
    return chosen, duplicates, outdone, notes


def _order(catalog: Catalog) -> dict[str, tuple[int, str, int]]:
    """Where a component stands among equals: most shared class first, then its class's standard one."""
    slots = Counter(slot for a in catalog.architectures.values() for slot in a.slots)
    return {
        component.name: (-slots[cls], cls, index)
        for cls, members in catalog.classes.items()
        for index, component in enumerate(members)
    }


def _architecture(
    matches: Sequence[Match], catalog: Catalog
) -> tuple[str | None, bool, str | None, tuple[str, ...]]:
    """The architecture, whether it is whole, and otherwise which it is nearest to and what that lacks."""
    model = [m for m in matches if not m.ema] or list(matches)
    bare = [m for m in model if m.prefix != m.component.prefix]
    placed = {m.component.cls: m for m in model if m.prefix == m.component.prefix}

    def filled(architecture: Architecture) -> list[Match]:
        return [
            m
            for slot in architecture.slots
            if (m := placed.get(slot)) and m.component in catalog.candidates(slot, architecture)
        ]

    def explained(architecture: Architecture) -> tuple[int, int]:
        parts = filled(architecture)
        return sum(len(m.names) for m in parts), len(parts) - len(architecture.slots)

    whole = [a for a in catalog.architectures.values() if len(filled(a)) == len(a.slots)]
    if whole:
        return max(whole, key=explained).name, True, None, ()
    if len(model) == 1 and (bare or not model[0].prefix):
        return model[0].component.cls, True, None, ()
    prefixed = [m for m in placed.values() if m.prefix]
    if not prefixed:
        return None, False, None, ()
    largest = max(prefixed, key=lambda m: len(m.names)).component.cls
    near = max(catalog.architectures.values(), key=explained)
    parts = {m.component.cls for m in filled(near)}
    if not parts:
        return f"{largest}-BROKEN", False, None, ()
    return f"{largest}-BROKEN", False, near.name, tuple(s for s in near.slots if s not in parts)


def _usual_prefix(match: Match, home: Architecture, catalog: Catalog) -> str | None:
    """The prefix that loaders expect of the same tensors, when it is another one."""
    component = match.component
    if not match.prefix or component.cls not in home.slots:
        return None
    usual = catalog.component_for(component.cls, home)
    other = usual.prefix != match.prefix and usual.tensors.keys() == component.tensors.keys()
    return usual.prefix if other else None


def _companions(
    specs: Mapping[str, Spec], matches: Sequence[Match], catalog: Catalog
) -> dict[int, dict[str, str]]:
    """By each match's place, the tensors beyond its table that belong to it: unprefixed names to full ones.

    What lies under several prefixes is of the longest. Under bare names it is of the component with which it
    shares most of its path; of the only one, where it shares none and lies under no component's prefix.
    """
    taken = {full for m in matches for full in m.names.values()}
    prefixed = sorted(((m.prefix, i) for i, m in enumerate(matches) if m.prefix), reverse=True)
    paths: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, match in enumerate(matches):
        for full in () if match.prefix else match.names.values():
            parts = full.split(".")
            for depth in range(1, len(parts)):
                paths[tuple(parts[:depth])].add(index)
    deepest = max(map(len, paths), default=0)
    strange = (EMA, *(c.prefix for c in catalog.components.values() if c.prefix))
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name, spec in specs.items():
        if name in taken or _is_optional(name, spec, catalog) or JUNK.match(name):
            continue
        owner = next((i for prefix, i in prefixed if name.startswith(prefix)), None)
        if owner is None and len(prefixed) < len(matches):
            parts = name.split(".", deepest)[:-1]
            near = (paths.get(tuple(parts[:depth]), set()) for depth in range(len(parts), 0, -1))
            shared = next((owners for owners in near if owners), set())
            if not shared and len(matches) == 1 and not name.startswith(strange):
                shared = {0}
            owner = next(iter(shared)) if len(shared) == 1 else None
        if owner is not None:
            bare = name[len(matches[owner].prefix) :]
            found[owner][_respelled(bare, matches[owner])] = name
    return found


def _respelled(bare: str, match: Match) -> str:
    """The name of a companion beside a tensor that the file spells otherwise than the table."""
    for ours, theirs in match.renamed.items():
        layer, own = theirs.rpartition(".")[0], ours.rpartition(".")[0]
        if bare.startswith(f"{layer}.") and (new := own + bare[len(layer) :]) not in match.names:
            return new
    return bare


def _is_optional(name: str, spec: Spec, catalog: Catalog) -> bool:
    return name in catalog.optional and catalog.optional[name] in (None, spec.shape)


def _sort_leftovers(
    specs: Mapping[str, Spec], matches: Iterable[Match], duplicates: Iterable[Match], catalog: Catalog
) -> dict[str, list[str]]:
    """Every tensor that is no part of the model, by what it is."""
    rest: dict[str, list[str]] = defaultdict(list)
    model = [m for m in matches if not m.ema] or list(matches)  # an average alone is the model
    explained = {full for m in model for full in m.whole.values()}
    averaged = {full for m in matches for full in m.whole.values()} - explained
    second = {full for m in duplicates for full in m.whole.values()}
    scales = companions(specs)
    for name, spec in specs.items():
        if name in explained:
            continue
        if name in averaged:
            kind = "ema"
        elif _is_optional(name, spec, catalog):
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
