"""What a model is made of: its components, and the known files that they are equal to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder.base.errors import Problem, SourceError, UsageError
from builder.base.progress import SILENT, Reporter
from builder.models.catalog import Architecture, Catalog
from builder.models.metric import Metric, counted, label
from builder.reports.new.around import (
    base_of,
    extras_of,
    fixes_of,
    is_faithful,
    left_of,
    markers_of,
    rows_of,
    told_markers,
)
from builder.reports.new.described import File, Taken, matches_of, open_file, rounded
from builder.reports.new.library import explain, shelf_of
from builder.reports.new.merged import Merged, joined, unmerge
from builder.sources.opened import Sources
from builder.tensors.cast import PRECISIONS, Precision
from builder.tensors.digests import component_digest
from builder.tensors.packed import packing
from builder.tensors.scan import Scan, scan

_HOW: Mapping[str, str] = {"exact": "merged", "rounding": "near"}


@dataclass(frozen=True)
class Draft:
    """A model explained: everything that a recipe says of it.

    `parts` is what is described, `taken` what its recipe takes, by class in the order of the slots.
    `fixes` gives a reason for each; `left` says what of the file the recipe does not bring back. `markers`
    are those that the recipe names, where they are others than the denoiser comes with.
    `tensor_digest` is the product's, where everything is explained; `faithful` says that it has then every
    tensor of the file, and no other. `searched`: there were files to be explained by; `unused` are those of
    the command line that explain nothing. `merges` are of the classes that are near to sums of others, those
    that no step makes too; `unsought` says of which classes none is looked for, and why.
    """

    model: File
    architecture: Architecture
    parts: Mapping[str, Taken]
    taken: Mapping[str, Taken]
    precision: Precision
    fixes: Mapping[str, str]
    base: File | None
    keep: tuple[str, ...] | None
    markers: tuple[str, ...] | None
    left: tuple[str, ...]
    scanned: Scan = field(repr=False)
    metric: Metric
    tensor_digest: str | None
    faithful: bool
    searched: bool
    unused: tuple[File, ...] = ()
    merges: Mapping[str, Merged] = field(default_factory=dict)
    unsought: Mapping[str, str] = field(default_factory=dict)

    @property
    def strange(self) -> bool:
        """Whether there are values that are no numbers, or that the precision cannot hold."""
        return any(s.nan or s.infinite for s in self.scanned.tensors.values())

    def known(self, cls: str, catalog: Catalog) -> str | None:
        """The name of a component's weights, where its metric is a published one."""
        value = getattr(self.metric, catalog.scales[cls].part) if cls in catalog.scales else ""
        return catalog.known.label(cls, int(value)) if value.isdigit() else None

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Classes that are equal to nothing known, and so are taken from the file itself."""
        return tuple(cls for cls, t in self.taken.items() if not t.how)

    @property
    def sources(self) -> tuple[File, ...]:
        """The files that the recipe takes from, the base first."""
        files = [*([self.base] if self.base else [])]
        for cls, taken in self.taken.items():
            files += [t.file for t in self.merges[cls].inputs] if taken.merged else [taken.file]
        return tuple(dict.fromkeys(files))

    @property
    def order(self) -> tuple[File, ...]:
        """The files whose names have to be in this order, as steps sum them by name."""
        order: list[File] = []
        for cls, taken in self.taken.items():
            if taken.merged:
                order = joined(order, self.merges[cls].summed)
        return tuple(order)


def describe(
    files: Sequence[Path],
    library: Sequence[Path],
    sources: Sources,
    *,
    threads: int = 2,
    reporter: Reporter = SILENT,
) -> Draft:
    """Explain the model that the first of `files` is, with components replaced by those of the others.

    A further file that is a whole model, and those below the folders of `library`, are what components may
    be equal to. Opened files are closed with `sources`. Raises SourceError for files that are refused or
    unknown, UsageError for those that have no place in the model.
    """
    for folder in library:
        if not folder.is_dir():
            raise UsageError(Problem(f"`{folder}` is not a folder", hint="a library is a folder of models"))
    sources.check_there(files)
    once = {os.path.realpath(path): path for path in reversed(files)}
    opened = [open_file(path, sources) for path in reversed(once.values())]
    catalog = sources.catalog
    model = opened[0]
    architecture = _architecture(model, catalog)
    parts, whole = _parts(opened, architecture)
    precision = _precision(Taken(c, model, m) for c, m in matches_of(model, architecture).items())
    scanned = _scan(parts, precision, catalog, threads, reporter)
    shelf = [*whole, *shelf_of(library, files, architecture, sources, reporter)]
    taken = explain(parts, precision, shelf, scanned, sources, threads, reporter)
    merges, unsought = unmerge(taken, precision, shelf, scanned, catalog, threads, reporter)
    taken |= {
        c: Taken(c, m.inputs[0].file, m.inputs[0].match, _HOW[m.origin.found])
        for c, m in merges.items()
        if m.inputs
    }
    extras = extras_of(model)
    markers, told = told_markers(model, taken, catalog)
    base, keep, brought = base_of(architecture, taken, extras, catalog)
    fixes = fixes_of(parts, taken)
    left = left_of(model, [n for n in (*extras, *markers_of(model)) if n not in (*brought, *told)])
    explained = bool(taken) and all(t.how not in ("", "near") for t in taken.values())
    used = {t.file for t in (*taken.values(), *(p for m in merges.values() for p in m.parents))}
    rows = rows_of(parts, taken, architecture, precision, scanned, catalog, {**brought, **told})
    return Draft(
        model,
        architecture,
        parts,
        taken,
        precision,
        fixes,
        base,
        keep,
        markers,
        left,
        scanned,
        label(scanned.histograms, catalog.scales),
        component_digest(rows) if explained else None,
        explained and is_faithful(rows, model),
        bool(shelf),
        tuple(f for f in whole if f not in used),
        merges,
        unsought,
    )


def _architecture(model: File, catalog: Catalog) -> Architecture:
    identity = model.opened.identity
    name = identity.incomplete or identity.architecture
    if name is None or name.endswith("-BROKEN"):
        raise SourceError(
            Problem(
                f"`{model.path.name}` is no model that the catalog knows",
                hint="`ckpt inspect --full` says what is in it; `ckpt components learn` makes it known",
            )
        )
    return catalog.architecture(name)


def _parts(files: Sequence[File], architecture: Architecture) -> tuple[dict[str, Taken], list[File]]:
    """What fills each slot, and the files that are whole models beside the first."""
    parts = {cls: Taken(cls, files[0], m) for cls, m in matches_of(files[0], architecture).items()}
    whole = []
    for file in files[1:]:
        if file.whole:
            whole.append(file)
            continue
        matches = matches_of(file, architecture)
        if not matches:
            held = ", ".join(m.component.name for m in file.opened.identity.matches)
            raise UsageError(
                Problem(
                    f"`{file.path.name}` has nothing that {architecture.name} has a slot for",
                    evidence=(f"it holds {held or 'nothing that the catalog knows'}",),
                    hint=f"the slots are {', '.join(architecture.slots)}",
                )
            )
        parts |= {cls: Taken(cls, file, m) for cls, m in matches.items()}
    return {cls: parts[cls] for cls in architecture.slots if cls in parts}, whole


def _precision(parts: Iterable[Taken]) -> Precision:
    """The precision that all numbers have, or `keep` where there are several."""
    held = [p.file.plain(p.match, p.cls) for p in parts]
    if any(packing(tensors).weights for tensors in held):
        return "keep"
    types = {t.dtype for tensors in held for t in tensors.values() if t.dtype.floating}
    by_type = {dtype: name for name, dtype in PRECISIONS.items() if dtype is not None}
    found = by_type.get(next(iter(types))) if len(types) == 1 else None
    return found or "keep"  # type: ignore[return-value]


def _scan(
    parts: Mapping[str, Taken],
    precision: Precision,
    catalog: Catalog,
    threads: int,
    reporter: Reporter,
) -> Scan:
    """One pass over all that is described, as it will be after rounding; names are `class/bare`."""
    components = {cls: rounded(p.file.plain(p.match, cls), precision) for cls, p in parts.items()}
    flat = {f"{cls}/{bare}": t for cls, tensors in components.items() for bare, t in tensors.items()}
    names = {cls: {b: f"{cls}/{b}" for b in tensors} for cls, tensors in components.items()}
    groups = counted(names, catalog)
    name = next(iter(parts.values())).file.path.name if parts else ""
    return scan(flat, groups=groups, digests=True, threads=threads, reporter=reporter, task=f"reading {name}")
