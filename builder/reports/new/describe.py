"""What a model is made of: its components, and the known files that they are equal to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from builder.base.errors import CkptError, Problem, SourceError, UsageError
from builder.base.progress import SILENT, Reporter, human_bytes
from builder.base.words import counted as number
from builder.models.catalog import Architecture, Catalog
from builder.models.cut import cut
from builder.models.identify import EMA, Match
from builder.models.metric import Metric, counted, label
from builder.models.prediction import EMPTY, MARKERS
from builder.operations.fixes import FIXES, POSITION_IDS, exact_position_ids
from builder.recipe.names import SUFFIXES
from builder.sources.find import files_below
from builder.sources.opened import OpenSource, Sources
from builder.store import Store
from builder.store.records import digest
from builder.tensors.cast import PRECISIONS, Faults, Precision, cast_all
from builder.tensors.digests import Row, component_digest, expression_key, tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.packed import packing
from builder.tensors.scan import Scan, scan

PROBES = 3
PROBE = 1 << 18  # elements; a tensor of no more is read whole to see whether it is worth reading all


@dataclass(frozen=True, eq=False)
class File:
    """A checkpoint file, opened and identified; its SHA-256 is computed when it is first asked for."""

    path: Path
    opened: OpenSource
    sources: Sources = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, or over the shards of a set; raises SourceError."""
        return str(self.sources.hash(self.sources.file(self.path)).sha256)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.opened.checkpoint.size

    @property
    def whole(self) -> bool:
        """Whether this is a full model rather than a component alone."""
        identity = self.opened.identity
        return identity.intact and sum(bool(m.under) for m in identity.matches if not m.ema) > 1

    def plain(self, match: Match, cls: str) -> dict[str, LazyTensor]:
        """A component's tensors under the catalog's own names and shapes, without its position ids."""
        found = cut(self.opened.checkpoint, self.opened.identity, match, cls).tensors
        return {n: t for n, t in found.items() if n != POSITION_IDS}

    def positions(self, match: Match, cls: str) -> LazyTensor | None:
        """A text encoder's position ids."""
        return cut(self.opened.checkpoint, self.opened.identity, match, cls).tensors.get(POSITION_IDS)


@dataclass(frozen=True)
class Taken:
    """What fills a slot: a component of a file, and how what is described there is equal to it.

    `how` is `exact`, `rounded` or empty: the file is the described one itself. `promoted`: it is the
    file's average.
    """

    cls: str
    file: File
    match: Match
    how: str = ""

    @property
    def promoted(self) -> bool:
        """Whether this is an average that takes the place of the component that it averages."""
        return self.match.component.cls != self.cls


@dataclass(frozen=True)
class Draft:
    """A model explained: everything that a recipe says of it.

    `parts` is what is described, `taken` what its recipe takes, by class in the order of the slots.
    `fixes` gives a reason for each; `left` says what of the file the recipe does not bring back. `markers`
    are those that the recipe names, where they are others than the denoiser comes with.
    `tensor_digest` is the product's, where everything is explained; `faithful` says that it has then every
    tensor of the file, and no other. `searched`: there were files to be explained by; `unused` are those of
    the command line that explain nothing.
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
        files = [*([self.base] if self.base else []), *(t.file for t in self.taken.values())]
        return tuple(dict.fromkeys(files))


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
    opened = [_open(path, sources) for path in reversed(once.values())]
    catalog = sources.catalog
    model = opened[0]
    architecture = _architecture(model, catalog)
    parts, whole = _parts(opened, architecture)
    precision = _precision(Taken(c, model, m) for c, m in _matches(model, architecture).items())
    scanned = _scan(parts, precision, catalog, threads, reporter)
    shelf = [*whole, *_shelf(library, files, architecture, sources, reporter)]
    taken = _explain(parts, precision, shelf, scanned, sources, threads, reporter)
    extras = _extras(model)
    markers, told = _markers(model, taken, catalog)
    base, keep, brought = _base(architecture, taken, extras, catalog)
    fixes = _fixes(parts, taken)
    left = _left(model, [n for n in (*extras, *_markers_of(model)) if n not in (*brought, *told)])
    explained = bool(taken) and all(t.how for t in taken.values())
    rows = _rows(parts, taken, architecture, precision, scanned, catalog, {**brought, **told})
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
        explained and _faithful(rows, model),
        bool(shelf),
        tuple(f for f in whole if f not in {t.file for t in taken.values()}),
    )


def _open(path: Path, sources: Sources) -> File:
    return File(path, sources.open(sources.file(path)), sources)


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


def _matches(file: File, architecture: Architecture) -> dict[str, Match]:
    found = {m.component.cls: m for m in file.opened.identity.matches}
    return {cls: found[cls] for cls in architecture.slots if cls in found}


def _parts(files: Sequence[File], architecture: Architecture) -> tuple[dict[str, Taken], list[File]]:
    """What fills each slot, and the files that are whole models beside the first."""
    parts = {cls: Taken(cls, files[0], m) for cls, m in _matches(files[0], architecture).items()}
    whole = []
    for file in files[1:]:
        if file.whole:
            whole.append(file)
            continue
        matches = _matches(file, architecture)
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
    components = {cls: _rounded(p.file.plain(p.match, cls), precision) for cls, p in parts.items()}
    flat = {f"{cls}/{bare}": t for cls, tensors in components.items() for bare, t in tensors.items()}
    names = {cls: {b: f"{cls}/{b}" for b in tensors} for cls, tensors in components.items()}
    groups = counted(names, catalog)
    name = next(iter(parts.values())).file.path.name if parts else ""
    return scan(flat, groups=groups, digests=True, threads=threads, reporter=reporter, task=f"reading {name}")


def _rounded(tensors: Mapping[str, LazyTensor], precision: Precision) -> dict[str, LazyTensor]:
    dtype = PRECISIONS[precision]
    if dtype is None or all(t.dtype is dtype for t in tensors.values()):
        return dict(tensors)
    cast = cast_all(tensors, precision, faults=Faults(), overflow="keep", non_finite="keep")
    return {n: tensors[n] if tensors[n].dtype is t.dtype else t for n, t in cast.items()}


# -- the library


def _shelf(
    folders: Sequence[Path],
    files: Sequence[Path],
    architecture: Architecture,
    sources: Sources,
    reporter: Reporter,
) -> Iterator[File]:
    """The files below folders that have a component the architecture has a slot for."""
    mine = {(s.st_dev, s.st_ino) for s in (f.stat() for f in files)}
    strangers = 0
    for path, stat in files_below(folders, reporter):
        if path.suffix not in SUFFIXES or (stat.st_dev, stat.st_ino) in mine:
            continue
        mine.add((stat.st_dev, stat.st_ino))
        try:
            file = _open(path, sources)
        except SourceError:
            strangers += 1
            continue
        if any(
            _fits(m, cls, sources.catalog) for m in file.opened.identity.matches for cls in architecture.slots
        ):
            yield file
        else:
            sources.drop(sources.file(path))
    if strangers:
        reporter.note(f"{strangers:,} files of the library are no checkpoints")


def _fits(match: Match, cls: str, catalog: Catalog) -> bool:
    base = match.component.base
    return match.component.cls == cls or (base is not None and catalog.component(base).cls == cls)


def _explain(
    parts: Mapping[str, Taken],
    precision: Precision,
    shelf: Sequence[File],
    scanned: Scan,
    sources: Sources,
    threads: int,
    reporter: Reporter,
) -> dict[str, Taken]:
    """For each slot the known file that it is equal to, else what is described itself."""
    found: dict[str, list[Taken]] = {}
    for cls, part in parts.items():
        tensors = part.file.plain(part.match, cls)
        wanted = _digest(
            {n: scanned.tensors[f"{cls}/{n}"].digest for n in tensors}, _rounded(tensors, precision)
        )
        for file in shelf:
            for match in file.opened.identity.matches:
                candidate = Taken(cls, file, match, "exact")
                if not _looks_alike(candidate, tensors, precision):
                    continue
                if _remembered(candidate, precision, sources.store, threads, reporter) == wanted:
                    same = _types(file.plain(match, cls)) == _types(tensors)
                    found.setdefault(cls, []).append(
                        candidate if same else Taken(cls, file, match, "rounded")
                    )
    # What is published others can have too; and one file that explains much is likelier the origin than
    # several that explain a part each.
    shares = Counter(file for choices in found.values() for file in {t.file for t in choices})

    def rank(taken: Taken) -> tuple[object, ...]:
        unknown = sources.catalog.known.file(taken.file.sha256) is None
        return unknown, -shares[taken.file], taken.promoted, taken.how != "exact", str(taken.file.path)

    return {cls: min(found.get(cls, [part]), key=rank) for cls, part in parts.items()}


def _types(tensors: Mapping[str, LazyTensor]) -> dict[str, DType]:
    return {n: t.dtype for n, t in tensors.items()}


def _looks_alike(taken: Taken, tensors: Mapping[str, LazyTensor], precision: Precision) -> bool:
    """Whether names, shapes and a few small tensors speak for a component being the one described."""
    try:
        theirs = _rounded(taken.file.plain(taken.match, taken.cls), precision)
    except CkptError:  # packed numbers, which no cast reads
        return False
    mine = _rounded(tensors, precision)
    if {n: (t.dtype, t.shape) for n, t in theirs.items()} != {n: (t.dtype, t.shape) for n, t in mine.items()}:
        return False
    small = sorted(n for n, t in mine.items() if t.dtype.floating and 1 < t.numel <= PROBE)
    chosen = small[:: max(1, len(small) // PROBES)] if small else []
    return all(mine[n].tobytes() == theirs[n].tobytes() for n in chosen)


def _remembered(taken: Taken, precision: Precision, store: Store, threads: int, reporter: Reporter) -> str:
    """The digest of a component after rounding, read once for as long as its file is the same."""
    key = expression_key(
        "rounded",
        3,
        source=taken.file.sha256,
        component=taken.match.component.name,
        prefix=taken.match.prefix,
        cls=taken.cls,
        precision=precision,
    )
    known = store.recall("component", key, lambda fact: digest(fact["blake3"]))
    if known is not None:
        return known
    tensors = _rounded(taken.file.plain(taken.match, taken.cls), precision)
    found = scan(
        tensors, digests=True, threads=threads, reporter=reporter, task=f"reading {taken.file.path.name}"
    )
    read = _digest({n: s.digest for n, s in found.tensors.items()}, tensors)
    store.note("component", key, {"blake3": read})
    return read


def _digest(digests: Mapping[str, str | None], tensors: Mapping[str, LazyTensor]) -> str:
    return component_digest(
        {n: Row(t.dtype, t.shape, d) for n, t in tensors.items() if (d := digests[n]) is not None}
    )


# -- what goes around the components


def _extras(file: File) -> dict[str, LazyTensor]:
    """What a file may hold besides, and is of no component."""
    held = file.opened.checkpoint
    own = (n for n in file.opened.identity.optional if n not in MARKERS and not n.startswith(EMA))
    return {n: held[n] for n in own}


def _markers_of(file: File) -> dict[str, LazyTensor]:
    held = file.opened.checkpoint
    return {n: held[n] for n in MARKERS if n in held}


def _markers(
    model: File, taken: Mapping[str, Taken], catalog: Catalog
) -> tuple[tuple[str, ...] | None, dict[str, LazyTensor]]:
    """The markers that a recipe must name, None where the denoiser brings them; and those of its product."""
    wanted = _markers_of(model)
    denoiser = next((t for cls, t in taken.items() if cls in catalog.denoisers), None)
    brought = _markers_of(denoiser.file) if denoiser is not None else {}
    if wanted.keys() == brought.keys() or not {*EMPTY, *brought} >= wanted.keys():
        return None, brought
    empty = MemoryTensor(DType.F32, (0,), b"")
    return tuple(wanted), {n: brought.get(n, empty) for n in wanted}


def _base(
    architecture: Architecture,
    taken: Mapping[str, Taken],
    extras: Mapping[str, LazyTensor],
    catalog: Catalog,
) -> tuple[File | None, tuple[str, ...] | None, Mapping[str, LazyTensor]]:
    """The source to start from, when one has all or brings the extras; what to keep of its extras; those."""
    if not taken.keys() >= {*architecture.due}:  # a base would fill the slots that are to stay open
        return None, None, {}
    files = list(dict.fromkeys(t.file for t in taken.values()))
    whole = [f for f in files if f.opened.identity.intact and _is(f, architecture, catalog)]
    if len(files) != 1 or any(t.promoted for t in taken.values()):
        whole = [f for f in whole if extras]
    for file in whole:
        held = _extras(file)
        if all(n in held and _same(held[n], t) for n, t in extras.items()):
            return file, tuple(sorted(extras)) if held.keys() - extras.keys() else None, extras
    return (files[0], (), {}) if len(files) == 1 and files[0] in whole else (None, None, {})


def _is(file: File, architecture: Architecture, catalog: Catalog) -> bool:
    name = file.opened.identity.architecture
    return name is not None and catalog.architecture(name).name == architecture.name


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _fixes(parts: Mapping[str, Taken], taken: Mapping[str, Taken]) -> dict[str, str]:
    """The fixes that the recipe needs, each with why, in the order of the registry."""
    needed: dict[str, str] = {}
    for cls, part in parts.items():
        source = taken[cls]
        mine, theirs = part.file.positions(part.match, cls), source.file.positions(source.match, cls)
        if mine is not None and not _same(mine, exact_position_ids()):
            needed["clip-position-ids"] = f"the position ids of {cls} are damaged, or no integers"
        elif mine is not None and theirs is None:
            needed["position-ids-present"] = f"{cls} has position ids, `{source.file.path.name}` has none"
        elif mine is not None and theirs is not None and not _same(mine, theirs):
            needed["clip-position-ids"] = f"those of `{source.file.path.name}` are damaged"
        elif mine is None and theirs is not None:
            needed.setdefault("position-ids-absent", f"{cls} has no position ids")
        if any(p.match.diffusers_attention for p in (part, source)):
            needed["vae-attention-shape"] = f"the attention of {cls} is laid out as diffusers does it"
    if "position-ids-present" in needed:
        needed.pop("position-ids-absent", None)
    return {name: needed[name] for name in FIXES if name in needed}


def _left(model: File, extras: Sequence[str]) -> tuple[str, ...]:
    """What the file holds and the recipe does not bring back."""
    identity = model.opened.identity
    kinds = {
        "EMA, which only training needs": identity.ema,
        "junk that no program reads": identity.junk,
        "tensors that nothing explains": identity.unknown,
        "extras that no source has": extras,
    }
    checkpoint = model.opened.checkpoint
    return tuple(
        f"{reason}: {human_bytes(sum(checkpoint[n].nbytes for n in names))} in {number(len(names), 'tensor')}"
        for reason, names in kinds.items()
        if names
    )


def _faithful(rows: Mapping[str, Row], model: File) -> bool:
    """Whether a product is the file's tensors; position ids, which may be mended, are looked at."""
    checkpoint = model.opened.checkpoint
    same = {n: (r.dtype, r.shape) for n, r in rows.items()} == {
        n: (t.dtype, t.shape) for n, t in checkpoint.items()
    }
    ids = [n for n in rows if n.endswith(POSITION_IDS)]
    return same and all(tensor_digest(checkpoint[n]) == rows[n].digest for n in ids)


def _rows(
    parts: Mapping[str, Taken],
    taken: Mapping[str, Taken],
    architecture: Architecture,
    precision: Precision,
    scanned: Scan,
    catalog: Catalog,
    added: Mapping[str, LazyTensor],
) -> dict[str, Row]:
    """What the product's tensors will be."""
    rows: dict[str, Row] = {}
    for cls, part in parts.items():
        prefix = "" if architecture.bare else catalog.component_for(cls, architecture).prefix
        for bare, tensor in _rounded(part.file.plain(part.match, cls), precision).items():
            found = scanned.tensors[f"{cls}/{bare}"].digest
            assert found is not None
            rows[prefix + bare] = Row(tensor.dtype, tensor.shape, found)
        if part.file.positions(part.match, cls) is not None:
            exact = exact_position_ids()
            rows[prefix + POSITION_IDS] = Row(exact.dtype, exact.shape, tensor_digest(exact))
    return rows | {n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in added.items()}
