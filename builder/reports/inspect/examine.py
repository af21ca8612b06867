"""What an inspection finds in one checkpoint file, and the finding of it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import Problem
from builder.base.progress import SILENT, Reporter
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint
from builder.formats.lost import Lost, find_lost
from builder.models.identify import identify
from builder.models.identity import EMA, Identity, Match
from builder.models.kinds_of_file import FileKind, kind_of_file
from builder.models.lineage import Lineage, lineage, main_part
from builder.models.prediction import Prediction, prediction
from builder.operations.fixes import match_types
from builder.reports.inspect.positions import PositionIds, read_position_ids
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed import Packing, packing
from builder.tensors.packed.decode import HALVES, why_not

if TYPE_CHECKING:
    from builder.models.catalog import Catalog, Known, KnownFile, KnownPart
    from builder.models.metric import Metric
    from builder.tensors.scan import TensorScan


@dataclass(frozen=True)
class Share:
    """Some of a file's tensors: their full names, and the bytes they take."""

    names: tuple[str, ...]
    bytes: int

    @property
    def keys(self) -> int:
        """How many they are."""
        return len(self.names)


@dataclass(frozen=True)
class Part:
    """A component of the file.

    `dtypes` counts its tensors by type code, as they lie in the file, most first. `digest` is the BLAKE3-256
    of its contents (see `builder.tensors.digests.component_digest`), None where its data was not read.
    `known` is the name of its weights, where contents or metric are a published one; `published` is the entry
    of the former.
    """

    match: Match
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    digest: str | None = None
    known: str | None = None
    published: KnownPart | None = None


@dataclass(frozen=True)
class Quantized:
    """Packed weights of a component (None: of nothing known), of so many weights, by scheme how many.

    `bits` are those that each number of them takes, with all that lies beside it; None where it is not
    known how many numbers they are.
    """

    component: str | None
    weights: int
    schemes: Mapping[str, int]
    bits: float | None


@dataclass(frozen=True)
class Report:
    """All that was found. Sizes are in bytes; names of tensors are the file's own.

    `packed` are packed weights. `lineage` is which published model its main component may be, or is.
    `metric` and `scans` are None and empty where no data was read. `published` is the entry of the very
    file, by its SHA-256; `model` the name of the published model that has the same metric.
    `kind` is what the file is to programs, None where that is unknown.
    `precision_waste` is what the precision that each is published in would save of the components that
    stay, and `pruned` the size of the tensors after pruning: no EMA, no junk, no wasted precision. `faults`
    are what a person should mend or know.
    """

    path: str
    container: str
    size: int
    identity: Identity
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    parts: tuple[Part, ...]
    positions: PositionIds
    prediction: Prediction
    metadata: Mapping[str, str]
    globals: tuple[str, ...]
    others: Mapping[str, str]
    nesting: str
    packed: Packing
    metric: Metric | None = None
    scans: Mapping[str, TensorScan] = field(default_factory=dict, repr=False)
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    published: KnownFile | None = None
    model: str | None = None
    kind: FileKind | None = None
    lineage: Lineage | None = None

    def share(self, names: Iterable[str]) -> Share:
        """Names together with their size."""
        kept = tuple(names)
        return Share(kept, sum(self.tensors[n].stored[1] for n in kept))

    @cached_property
    def types(self) -> Mapping[str, tuple[int, int]]:
        """How many tensors there are of each type in the file, and the bytes that they take, most first."""
        found: dict[str, tuple[int, int]] = {}
        for name, size in (t.stored for t in self.tensors.values()):
            count, total = found.get(name, (0, 0))
            found[name] = count + 1, total + size
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def blocks(self) -> bool:
        """Whether numbers lie in blocks, which 16 bits each would outgrow."""
        return any(t.stored[0] != t.dtype.code for t in self.tensors.values())

    @cached_property
    def quantized(self) -> tuple[Quantized, ...]:
        """What is packed, component by component."""
        by_scheme = self.packed.by_scheme
        found, rest = [], {n for names in by_scheme.values() for n in names}
        for match in self.identity.matches:
            rules = match.component.tensors
            numbers = {f: math.prod(rules[n].shape) for n, f in match.names.items() if f in rest}
            if numbers:
                all_ = sum(n.endswith("weight") and len(rules[n].shape) > 1 for n in match.names)
                found.append(self._quantized(match.component.name, numbers, all_))
                rest -= numbers.keys()
        halves = {n for scheme in HALVES for n in by_scheme.get(scheme, ())}
        numbers = {n: self.tensors[n].numel * (1 + (n in halves)) for n in rest}
        if rest:
            found.append(self._quantized(None, numbers, len(rest)))
        return tuple(found)

    def _quantized(self, component: str | None, numbers: Mapping[str, int], weights: int) -> Quantized:
        beside = {b for n in numbers for b in self.packed.weights[n]}
        size = sum(self.tensors[n].nbytes for n in (*numbers, *beside))
        schemes = {s: sum(n in numbers for n in names) for s, names in self.packed.by_scheme.items()}
        held = {s: n for s, n in schemes.items() if n}
        if component is None and any(map(why_not, held)):
            return Quantized(component, weights, held, None)
        return Quantized(component, weights, held, 8 * size / max(1, sum(numbers.values())))

    @cached_property
    def ema(self) -> Share:
        """Averaged weights that training kept beside the model's own."""
        return self.share(self.identity.ema)

    @cached_property
    def junk(self) -> Share:
        """What no loader reads."""
        return self.share(self.identity.junk)

    @cached_property
    def unknown(self) -> Share:
        """What nothing explains."""
        return self.share(self.identity.unknown)

    @cached_property
    def optional(self) -> Share:
        """What a full checkpoint may hold besides."""
        return self.share(self.identity.optional)

    @cached_property
    def astray(self) -> Share:
        """Components that the architecture has no slot for."""
        return self.share(n for m in self.identity.astray for n in m.full)

    @cached_property
    def precision_waste(self) -> int:
        """Bytes beyond the precision that components are published in, of those that pruning keeps."""
        return sum(held - size for t, size in self._finished if size < (held := t.stored[1]))

    @cached_property
    def pruned(self) -> int:
        """Bytes of tensors that pruning leaves."""
        kept = sum(t.stored[1] for n, t in self.tensors.items() if n not in self._gone)
        return kept + sum(size - t.stored[1] for t, size in self._finished)

    @cached_property
    def _gone(self) -> set[str]:
        """What pruning takes away: also the state of an average, but of one that is the model."""
        identity = self.identity
        alone = not identity.ema and any(m.ema for m in identity.matches)
        state = (n for n in identity.optional if n.startswith(EMA) and not alone)
        return {*identity.ema, *identity.junk, *self.astray.names, *state}

    @cached_property
    def _finished(self) -> list[tuple[LazyTensor, int]]:
        """The tensors of the components that pruning keeps, each with the bytes that it takes afterwards."""
        found = []
        for match in self.identity.matches:
            types = match_types(match, self.tensors, None, narrow=True)
            held = [(self.tensors[n], d) for n, d in types.items() if n not in self._gone]
            found += [(t, t.numel * d.bits // 8) for t, d in held]
        return found

    @cached_property
    def non_finite(self) -> Mapping[str, TensorScan]:
        """Tensors that hold NaN or infinity, among those that were read."""
        return {n: s for n, s in self.scans.items() if s.nan or s.infinite}

    @cached_property
    def lost(self) -> tuple[Lost, ...]:
        """Stretches of zeros where weights should be, in what was read and is no junk."""
        junk = {*self.identity.junk}
        zeros = {n: s.zeros for n, s in self.scans.items() if s.zeros and n not in junk}
        return find_lost(self.tensors, zeros)

    @property
    def sound(self) -> bool:
        """Whether the file is something known, and nothing wrong with it, as far as it was read."""
        return self.kind is not None and not self.non_finite

    @cached_property
    def faults(self) -> tuple[Problem, ...]:
        """What is wrong with the file, or will be on use; worst first."""
        from builder.reports.inspect.faults import find_faults

        return tuple(find_faults(self))


def build_report(
    path: Path | str,
    *,
    catalog: Catalog,
    full: bool = False,
    metric: bool = True,
    hashes: bool = False,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> Report:
    """Inspect one checkpoint file.

    With `metric`, the data of the model's components is read once: for the metric, for their digests,
    and for numbers that are none. `full` reads every tensor. Without it, only tables of contents are
    read, and torch is not imported. `hashes` reads the file once more, for its hashes.
    Raises SourceError when the file is refused.
    """
    with open_checkpoint(path, catalog.layouts) as checkpoint:
        found: Mapping[str, str | None] = {}
        if hashes and checkpoint.container not in (
            "safetensors-sharded",
            "diffusers",
        ):  # they are hashes of single files
            from builder.formats.hashes import file_hashes

            found = file_hashes(path, reporter=reporter)
        report = examine(checkpoint, catalog, full, metric, threads, reporter)
        published = catalog.known.file(found.get("SHA256") or "")
        return replace(report, path=os.fspath(path), hashes=found, published=published)


def examine(
    checkpoint: Checkpoint,
    catalog: Catalog,
    full: bool = False,
    metric: bool = True,
    threads: int | None = None,
    reporter: Reporter = SILENT,
    identity: Identity | None = None,
) -> Report:
    """Inspect an open checkpoint, wherever it lies; as `build_report`. `identity` is what it is, if known."""
    identity = identity or identify(checkpoint, catalog)
    packed = packing(checkpoint)
    _ = packed.by_scheme  # read as long as the file is open
    scans: Mapping[str, TensorScan] = {}
    label = None
    digits: Mapping[str, str] = {}
    if metric and len(checkpoint):
        scans, label, digits = _scan(identity, checkpoint, full, threads, catalog, reporter)
    parts = tuple(
        _part(m, checkpoint.tensors, scans, digits, catalog.known, packed.weights) for m in identity.matches
    )
    main = main_part(identity, catalog)
    published = next((p.published for p in parts if p.match is main), None)
    return Report(
        path=checkpoint.name,
        container=checkpoint.container,
        size=checkpoint.size,
        identity=identity,
        tensors=checkpoint.tensors,
        parts=parts,
        positions=read_position_ids(checkpoint),
        prediction=prediction(checkpoint, checkpoint.metadata, catalog),
        metadata=checkpoint.metadata,
        globals=checkpoint.globals,
        others=checkpoint.others,
        nesting=checkpoint.nesting,
        packed=packed,
        metric=label,
        scans=scans,
        model=catalog.known.model(label.text) if label else None,
        kind=kind_of_file(checkpoint, checkpoint.metadata, identity, catalog),
        lineage=lineage(main, checkpoint, checkpoint.metadata, catalog, published)
        if main is not None
        else None,
    )


def _scan(
    identity: Identity,
    checkpoint: Checkpoint,
    full: bool,
    threads: int | None,
    catalog: Catalog,
    reporter: Reporter,
) -> tuple[Mapping[str, TensorScan], Metric, Mapping[str, str]]:
    """One pass over the data, of the model's components or of everything; metric, and digits by class."""
    from builder.models.metric import counted, label, labels
    from builder.tensors.scan import scan

    components = {m.component.cls: m.whole for m in identity.matches}
    kept = {n for m in identity.matches for n in m.full} - set(identity.ema)
    found = scan(
        {name: tensor for name, tensor in checkpoint.items() if full or name in kept},
        groups=counted(components, catalog),
        digests=True,
        threads=threads or min(4, os.cpu_count() or 1),
        reporter=reporter,
        task=f"reading {Path(checkpoint.name).name}",
    )
    scales = catalog.scales
    return found.tensors, label(found.histograms, scales), labels(found.histograms, scales)


def _part(
    match: Match,
    tensors: Mapping[str, LazyTensor],
    scans: Mapping[str, TensorScan],
    digits: Mapping[str, str],
    known: Known,
    packed: Container[str],
) -> Part:
    held = {full: tensors[full] for full in match.full}
    whole = {full: math.prod(match.component.tensors[n].shape) for n, full in match.names.items()}
    rows = {
        bare: Row(held[full].dtype, held[full].shape, scanned.digest)
        for bare, full in match.whole.items()
        if (scanned := scans.get(full)) is not None and scanned.digest is not None
    }
    digest = component_digest(rows) if len(rows) == len(held) else None
    published = known.part(digest) if digest else None
    return Part(
        match,
        tensors=len(held),
        parameters=sum(whole[n] if n in packed else t.numel for n, t in held.items()),
        bytes=sum(t.stored[1] for t in held.values()),
        dtypes=dict(Counter(t.stored[0] for t in held.values()).most_common()),
        digest=digest,
        known=published.name if published else _labelled(match.component.cls, digits, known),
        published=published,
    )


def _labelled(cls: str, digits: Mapping[str, str], known: Known) -> str | None:
    """The name of the weights whose digits these are."""
    value = digits.get(cls, "")
    return known.label(cls, int(value)) if value.isdigit() else None
