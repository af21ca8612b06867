"""What the page knows of the files in its folders: a line each, kept as long as the file stays the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from builder.base.errors import CkptError, Problem
from builder.base.progress import SILENT, Reporter
from builder.models.catalog import Catalog
from builder.recipe.names import SUFFIXES
from builder.reports.inspect import Report, build_report, types_of
from builder.sources.find import recall_files
from builder.store import Store

REPORTS = 8  # of files that were read, which are large

Identity = tuple[int, ...]
Key = tuple[str, Identity]


@dataclass(frozen=True)
class PartLine:
    """A component in a line: `digest` is of its contents, None as long as they were not read."""

    cls: str
    name: str
    precision: str
    known: str | None
    digest: str | None


@dataclass(frozen=True)
class Line:
    """A file in a line. Sizes are in bytes, `spare` is what pruning would save.

    `sha256` is what is remembered of it; `read` is whether its weights were.
    """

    what: str
    architecture: str | None
    sound: bool
    size: int
    junk: int
    ema: int
    spare: int
    parts: tuple[PartLine, ...]
    faults: int
    metric: str
    sha256: str | None
    inode: Identity
    read: bool
    problems: tuple[Problem, ...] = ()

    @property
    def precision(self) -> str:
        """The number types of its components."""
        return ", ".join(dict.fromkeys(p.precision for p in self.parts))

    @property
    def known(self) -> str:
        """Names of the published weights that it has."""
        return ", ".join(f"{p.known} {p.cls.partition('-')[0]}" for p in self.parts if p.known)


class Shelf:
    """Lines by path and identity, and reports of the files that were read last. Serves several threads."""

    def __init__(self) -> None:
        self._lines: dict[Key, Line] = {}
        self._reports: OrderedDict[tuple[Key, bool], Report] = OrderedDict()
        self._guard = threading.Lock()

    def line(self, path: Path, catalog: Catalog, store: Store) -> Line:
        """What a file is, by its table of contents, or by more where that was read before."""
        key = _key(path)
        with self._guard:
            line = self._lines.get(key)
        if line is None:
            try:
                line = _line(build_report(path, catalog=catalog, metric=False), key)
            except CkptError as error:
                size = path.stat().st_size if path.is_file() else 0
                line = Line(
                    "refused", None, False, size, 0, 0, 0, (), 0, "", None, key[1][:2], False, error.problems
                )
            self._keep(key, line)
        if line.sha256 is None and not line.problems:
            line = replace(line, sha256=_remembered(path, store))
        return line

    def report(
        self,
        path: Path,
        catalog: Catalog,
        *,
        metric: bool = False,
        full: bool = False,
        hashes: bool = False,
        reporter: Reporter = SILENT,
    ) -> Report:
        """The report of a file, anew where what is known says less than is asked for."""
        key = _key(path)
        if not (metric or full or hashes):
            with self._guard:
                known = self._reports.get((key, True)) or self._reports.get((key, False))
            if known is not None:
                return known
        report = build_report(
            path, catalog=catalog, metric=metric, full=full, hashes=hashes, reporter=reporter
        )
        with self._guard:
            self._reports[key, metric or full] = report
            self._reports.move_to_end((key, metric or full))
            while len(self._reports) > REPORTS:
                self._reports.popitem(last=False)
        self._keep(key, _line(report, key))
        return report

    def _keep(self, key: Key, line: Line) -> None:
        with self._guard:
            known = self._lines.get(key)
            if known is None or line.read or not known.read:
                self._lines[key] = line


def twins(lines: dict[str, Line]) -> dict[str, list[tuple[str, str]]]:
    """By reference, the other files that hold the same, and what of it is the same.

    The whole file by its SHA-256, all components or some by their digests: nothing is guessed.
    """
    alike: dict[object, list[str]] = {}
    for reference, line in lines.items():
        for mark in _marks(line):
            alike.setdefault(mark, []).append(reference)
    found: dict[str, list[tuple[str, str]]] = {}
    for reference, line in lines.items():
        others = dict.fromkeys(o for mark in _marks(line) for o in alike[mark] if o != reference)
        found[reference] = [(other, _same(line, lines[other])) for other in others]
    return found


def _marks(line: Line) -> set[object]:
    """What two files may have in common."""
    digests = {(p.cls, p.digest) for p in line.parts if p.digest}
    return {line.inode, *digests, *([line.sha256] if line.sha256 else [])}


def _same(a: Line, b: Line) -> str:
    if a.inode == b.inode:
        return "the same file under two names"
    if a.sha256 is not None and a.sha256 == b.sha256:
        return "the same bytes"
    mine = {(p.cls, p.digest) for p in a.parts if p.digest}
    both = mine & {(p.cls, p.digest) for p in b.parts if p.digest}
    if len(both) == len(a.parts) == len(b.parts):
        return "the same components"
    return "the same " + ", ".join(sorted(cls for cls, _ in both))


def _key(path: Path) -> Key:
    """A path and what tells that its file is another: of a folder, of all that it holds."""
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (*SUFFIXES, ".json"))
    )
    stats = [f.stat() for f in files] or [path.stat()]
    return str(path), tuple(n for s in stats for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))


def _line(report: Report, key: Key) -> Line:
    identity = report.identity
    parts = tuple(
        PartLine(p.match.component.cls, p.match.component.name, types_of(p), p.known, p.digest)
        for p in report.parts
    )
    return Line(
        what=(report.kind and report.kind.text) or identity.architecture or "unknown",
        architecture=identity.architecture if identity.intact else identity.incomplete,
        sound=report.sound,
        size=report.size,
        junk=report.junk.bytes,
        ema=report.ema.bytes,
        spare=max(0, report.size - report.pruned) if identity.intact else 0,
        parts=parts,
        faults=len(report.faults),
        metric=report.metric.text if report.metric else "",
        sha256=report.hashes.get("SHA256"),
        inode=key[1][:2],
        read=report.metric is not None,
    )


def _remembered(path: Path, store: Store) -> str | None:
    try:
        return recall_files(path, store)[0]
    except CkptError:
        return None
