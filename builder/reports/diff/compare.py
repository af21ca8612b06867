"""What comparing two checkpoints finds, and the finding of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from builder.base.parallel import run_windows
from builder.base.progress import SILENT, Reporter
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import Catalog, KnownPart
from builder.models.cut import joined
from builder.models.identify import identify
from builder.models.identity import Identity, Match
from builder.models.metric import counted, labels
from builder.reports.diff.pairs import Pair, pair_up, same_layout
from builder.reports.diff.values import Comparer, Spot, Values
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.scan import Scan, scan
from builder.tensors.torch_threads import exact_torch, lone_torch


@dataclass(frozen=True)
class Side:
    """One of the two files, but for its data.

    `known` names the weights of components that differ, by class, where they are published ones.
    """

    path: str
    checkpoint: Checkpoint = field(repr=False)
    identity: Identity = field(repr=False)
    known: Mapping[str, str] = field(default_factory=dict)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some of its tensors."""
        return sum(self.checkpoint[n].nbytes for n in names)


class TensorDiff(NamedTuple):
    """A tensor of both: the pair, type and shape on either side, and how values differ.

    `values` is None where the shapes say that they cannot be compared.
    """

    pair: Pair
    dtypes: tuple[DType, DType]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    values: Values | None

    @property
    def renamed(self) -> bool:
        """Whether it has another full name."""
        return self.pair.a != self.pair.b

    @property
    def identical(self) -> bool:
        """Whether name, type, shape and every bit are the same."""
        same = self.dtypes[0] is self.dtypes[1] and self.shapes[0] == self.shapes[1] and not self.renamed
        return same and self.values is not None and not self.values.differing

    @property
    def alike(self) -> bool:
        """Whether the numbers are the same, but for a rounding to another type."""
        return self.values is not None and self.values.alike

    @property
    def exact(self) -> bool:
        """Whether the numbers are the very same in another type."""
        rounding = self.values.rounding if self.values else ()
        return len({r.of for r in rounding if r.via is None}) == 2


@dataclass(frozen=True)
class Part:
    """A component on both sides, or on one; the last, of no class, is all that belongs to none."""

    cls: str
    a: Match | None
    b: Match | None
    tensors: tuple[TensorDiff, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What the catalog calls it, on either side."""
        return tuple(dict.fromkeys(m.component.name for m in (self.a, self.b) if m is not None))

    @cached_property
    def changed(self) -> tuple[TensorDiff, ...]:
        """Tensors whose numbers are others."""
        return tuple(t for t in self.tensors if not t.alike)

    @cached_property
    def total(self) -> Total:
        """Its values taken together."""
        return add_up(self.tensors)


@dataclass(frozen=True)
class Total:
    """The values of several tensors taken together; as in `Values`, each place with its tensor.

    `differing` leaves out what is but rounded; `unit` is None where units are mixed.
    """

    elements: int
    differing: int
    not_numbers: int
    unit: DType | None
    distances: tuple[int, ...]
    steps: int
    first: tuple[TensorDiff, Spot] | None
    farthest: tuple[TensorDiff, Spot] | None
    largest: tuple[TensorDiff, Spot] | None

    @property
    def typical(self) -> int:
        """The bit length of the distance that half of the differing values do not exceed; 0 without any."""
        half, seen = sum(self.distances) / 2, 0
        for bits, count in enumerate(self.distances):
            seen += count
            if count and seen >= half:
                return bits
        return 0


@dataclass(frozen=True)
class Diff:
    """All that tells two files apart.

    `parts` holds each component that either has, in the order of A, and at last all the rest.
    `promoted` are classes that one side (the second of the pair) has from the other's average.
    """

    a: Side
    b: Side
    parts: tuple[Part, ...]
    promoted: tuple[tuple[str, str], ...] = ()

    @cached_property
    def tensors(self) -> tuple[TensorDiff, ...]:
        """Every tensor that both have."""
        return tuple(t for p in self.parts for t in p.tensors)

    @cached_property
    def only_a(self) -> tuple[str, ...]:
        """Full names of what A alone has."""
        return tuple(n for p in self.parts for n in p.only_a)

    @cached_property
    def only_b(self) -> tuple[str, ...]:
        """Full names of what B alone has."""
        return tuple(n for p in self.parts for n in p.only_b)

    @cached_property
    def same(self) -> bool:
        """Whether the two hold the same tensors: names, types, shapes and every bit."""
        return not self.only_a and not self.only_b and all(t.identical for t in self.tensors)

    @property
    def same_header(self) -> bool:
        """Whether container, metadata and entries that are no tensors are the same."""
        a, b = self.a.checkpoint, self.b.checkpoint
        return (a.container, a.nesting, a.metadata, a.others) == (
            b.container,
            b.nesting,
            b.metadata,
            b.others,
        )

    @cached_property
    def total(self) -> Total:
        """The values of all tensors taken together."""
        return add_up(self.tensors)


def add_up(tensors: Sequence[TensorDiff]) -> Total:
    """Take the values of tensors together; of equals the first."""
    compared = [(t, t.values) for t in tensors if t.values is not None]
    changed = [(t, v) for t, v in compared if not v.alike]
    distances = [0] * max((len(v.distances) for _, v in changed), default=0)
    for _, values in changed:
        for bits, count in enumerate(values.distances):
            distances[bits] += count
    units = {v.unit for _, v in changed if v.unit is not None}
    far = max(changed, key=lambda c: c[1].steps, default=None)
    large = max(
        ((t, v.largest) for t, v in changed if v.largest), key=lambda c: c[1].difference, default=None
    )
    return Total(
        sum(v.elements for _, v in compared),
        sum(v.differing for _, v in changed),
        sum(v.not_numbers for _, v in changed),
        units.pop() if len(units) == 1 else None,
        tuple(distances),
        far[1].steps if far else 0,
        next(((t, v.first) for t, v in changed if v.first), None),
        (far[0], far[1].farthest) if far and far[1].farthest else None,
        large,
    )


def compare(
    a: Path | str,
    b: Path | str,
    *,
    catalog: Catalog,
    threads: int = 2,
    reporter: Reporter = SILENT,
) -> Diff:
    """Compare two checkpoint files, in any containers; reads every tensor that both have, once.

    The result does not depend on `threads`. Raises SourceError when a file is refused.
    """
    with open_checkpoint(a, catalog.layouts) as first, open_checkpoint(b, catalog.layouts) as second:
        return compare_open(
            first,
            second,
            names=(os.fspath(a), os.fspath(b)),
            catalog=catalog,
            threads=threads,
            reporter=reporter,
        )


def compare_open(
    a: Checkpoint,
    b: Checkpoint,
    *,
    names: tuple[str, str],
    catalog: Catalog,
    threads: int = 2,
    reporter: Reporter = SILENT,
) -> Diff:
    """Compare two open checkpoints; as `compare`, which see."""
    (a, first), (b, second) = (_joined(side, catalog) for side in (a, b))
    pairing = pair_up(a, first, b, second)
    readable = {p: (a[p.a], b[p.b]) for p in pairing.pairs if same_layout(a[p.a].shape, b[p.b].shape)}
    values = compare_values(readable, threads=threads, reporter=reporter)
    tensors = [
        TensorDiff(p, (a[p.a].dtype, b[p.b].dtype), (a[p.a].shape, b[p.b].shape), values.get(p))
        for p in pairing.pairs
    ]
    parts = tuple(_parts(first, second, tensors, pairing.only_a, pairing.only_b))
    sides = Side(names[0], a, first), Side(names[1], b, second)
    differing = [p for p in parts if p.a and p.b and p.changed]
    known = [_known(s, differing, catalog, threads, reporter) for s in sides]
    return Diff(
        Side(names[0], a, first, known[0]),
        Side(names[1], b, second, known[1]),
        parts,
        tuple(_promoted(sides, differing, catalog, reporter)),
    )


def _joined(checkpoint: Checkpoint, catalog: Catalog) -> tuple[Checkpoint, Identity]:
    """A checkpoint, each tensor of its components as one, and what it is."""
    tensors, identity = joined(checkpoint, identify(checkpoint, catalog))
    return replace(checkpoint, tensors=tensors), identity


def _parts(
    first: Identity,
    second: Identity,
    tensors: Sequence[TensorDiff],
    only_a: Sequence[str],
    only_b: Sequence[str],
) -> Iterable[Part]:
    by_class: dict[str, list[TensorDiff]] = {}
    for tensor in tensors:
        by_class.setdefault(tensor.pair.cls, []).append(tensor)
    left_a, left_b = dict.fromkeys(only_a), dict.fromkeys(only_b)
    classes = dict.fromkeys(m.component.cls for i in (first, second) for m in i.matches)
    for cls in classes:
        a, b = first.find(cls), second.find(cls)
        mine = [n for n in (a.full if a else ()) if n in left_a]
        yours = [n for n in (b.full if b else ()) if n in left_b]
        for names, left in ((mine, left_a), (yours, left_b)):
            for name in names:
                del left[name]
        yield Part(cls, a, b, tuple(by_class.get(cls, ())), tuple(mine), tuple(yours))
    rest = Part("", None, None, tuple(by_class.get("", ())), tuple(left_a), tuple(left_b))
    if rest.tensors or rest.only_a or rest.only_b:
        yield rest


def compare_values(
    pairs: Mapping[Pair, tuple[LazyTensor, LazyTensor]],
    *,
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "comparing",
) -> dict[Pair, Values]:
    """How the values of each pair of tensors differ, by a few threads."""
    # Largest first: what is left for the end is small, so no thread waits long for another.
    order = sorted(pairs.items(), key=lambda p: (-p[1][0].nbytes - p[1][1].nbytes, p[0]))
    found: dict[Pair, Values] = {}

    def work(index: int, buffer: memoryview) -> int:
        pair, (a, b) = order[index]
        found[pair] = Comparer(lambda count: reporter.advance(task, count)).compare(a, b)
        return 0

    reporter.start(task, sum(t.nbytes for both in pairs.values() for t in both))
    try:
        with lone_torch():
            run_windows(len(order), work, size=0, threads=threads, around=exact_torch)
    finally:
        reporter.finish(task)
    return found


def _known(
    side: Side, parts: Sequence[Part], catalog: Catalog, threads: int, reporter: Reporter
) -> dict[str, str]:
    """Names of the weights of components that differ; reads those of which any are published."""

    weights = {k.cls for k in catalog.known.parts}
    labelled = {k.cls for k in catalog.known.metrics}
    matches = [m for p in parts if (m := side.identity.find(p.cls)) is not None]
    groups = counted({m.component.cls: m.whole for m in matches if m.component.cls in labelled}, catalog)
    whole = {full for m in matches if m.component.cls in weights for full in m.full}
    if not groups and not whole:
        return {}
    held = {n: t for n, t in side.checkpoint.items() if n in groups or n in whole}
    found = scan(
        held,
        groups=groups,
        digests=bool(whole),
        threads=threads,
        reporter=reporter,
        task=f"what {Path(side.path).name} has",
    )
    digits = labels(found.histograms, catalog.scales)
    known = {}
    for match in matches:
        cls = match.component.cls
        published = _published(match, held, found, catalog) if cls in weights else None
        value = digits.get(cls, "")
        name = (
            published.name if published else catalog.known.label(cls, int(value)) if value.isdigit() else None
        )
        if name is not None:
            known[cls] = name
    return known


def _published(
    match: Match, held: Mapping[str, LazyTensor], found: Scan, catalog: Catalog
) -> KnownPart | None:
    rows = {
        bare: Row(held[full].dtype, held[full].shape, digest)
        for bare, full in match.whole.items()
        if (digest := found.tensors[full].digest) is not None
    }
    return catalog.known.part(component_digest(rows))


def _promoted(
    sides: tuple[Side, Side], parts: Sequence[Part], catalog: Catalog, reporter: Reporter
) -> Iterable[tuple[str, str]]:
    """Classes that differ as one side has there what is the other's average, with the letter of that side."""
    for part in parts:
        for letter, holder, other in (("B", sides[0], sides[1]), ("A", sides[1], sides[0])):
            spare = catalog.averages.get(part.cls)
            average = holder.identity.find(spare.cls) if spare is not None else None
            model = other.identity.find(part.cls)
            if average is None or model is None:
                continue
            promote = average.component.promote
            pairs = [
                (holder.checkpoint[full], other.checkpoint[model.names[promote[name]]])
                for name, full in average.names.items()
                if promote.get(name) in model.names
            ]
            if pairs and all_alike(pairs, reporter):
                yield part.cls, letter


def all_alike(pairs: Sequence[tuple[LazyTensor, LazyTensor]], reporter: Reporter = SILENT) -> bool:
    """Whether each pair is alike but for rounding; smallest first, up to the first that is not."""
    if any(not same_layout(a.shape, b.shape) for a, b in pairs):
        return False
    task = "comparing the average"
    comparer = Comparer(lambda count: reporter.advance(task, count))
    reporter.start(task, sum(a.nbytes + b.nbytes for a, b in pairs))
    try:
        return all(
            comparer.compare(a, b).alike for a, b in sorted(pairs, key=lambda p: p[0].nbytes + p[1].nbytes)
        )
    finally:
        reporter.finish(task)


def type_counts(names: Iterable[str], tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """How many of some tensors have each type, by code, most first."""
    return dict(Counter(tensors[n].dtype.code for n in names).most_common())
