"""The files of a library, and which of them a model's components are equal to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from builder.base.errors import CkptError, SourceError
from builder.base.progress import Reporter
from builder.base.words import counted
from builder.formats.blob import TooManyOpen
from builder.models.catalog import Architecture, Catalog
from builder.models.identity import Match
from builder.recipe.names import SUFFIXES
from builder.reports.new.described import File, Taken, open_file, rounded
from builder.sources.find import files_below
from builder.sources.opened import Sources
from builder.store import Store
from builder.store.records import digest
from builder.tensors.cast import Precision
from builder.tensors.digests import Row, component_digest, expression_key
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.scan import Scan, scan

PROBES = 3
PROBE = 1 << 18  # elements; a tensor of no more is read whole to see whether it is worth reading all


def shelf_of(
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
        if path.suffix.lower() not in SUFFIXES or (stat.st_dev, stat.st_ino) in mine:
            continue
        mine.add((stat.st_dev, stat.st_ino))
        try:
            file = open_file(path, sources)
        except TooManyOpen:
            raise
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
        reporter.note(f"{counted(strangers, 'file')} of the library cannot be read as a checkpoint")


def _fits(match: Match, cls: str, catalog: Catalog) -> bool:
    base = match.component.base
    return match.component.cls == cls or (base is not None and catalog.component(base).cls == cls)


def explain(
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
            {n: scanned.tensors[f"{cls}/{n}"].digest for n in tensors}, rounded(tensors, precision)
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
        theirs = rounded(taken.file.plain(taken.match, taken.cls), precision)
    except CkptError:  # packed numbers, which no cast reads
        return False
    mine = rounded(tensors, precision)
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
    tensors = rounded(taken.file.plain(taken.match, taken.cls), precision)
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
