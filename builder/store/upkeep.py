"""Looking after a store: what is in it, making room, and checking all of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from builder.base.errors import OutputError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.base.staging import sweep
from builder.formats.hashes import sha256_file
from builder.store import Store
from builder.store.entries import DamagedEntry, damage, open_entry
from builder.store.records import made_from_record, read_record

# A partial download that was written to more recently may be in the making.
IDLE = 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a store keeps.

    `kind` is `component`, `download`, `partial` (an unfinished download) or `fact` (a few bytes that save
    work, such as the digest of a file); `digest` is of its content or, for a fact, of what it is about;
    `records` are files that go with it; `component` and `cls` are empty but for components. `size` is in
    bytes, `used` in nanoseconds since the epoch.
    """

    kind: str
    path: Path
    digest: str
    size: int
    used: int
    component: str = ""
    cls: str = ""
    records: tuple[Path, ...] = ()


@dataclass(slots=True)
class Collected:
    """What a collection removed, and what it left."""

    removed: list[Item] = field(default_factory=list)
    records: int = 0
    litter: int = 0  # bytes of damaged entries and of what dead processes left
    kept: list[Item] = field(default_factory=list)


def items(store: Store) -> list[Item]:
    """What a store keeps, the least recently used first."""
    made, _ = _records(store)
    found = [*_components(store, made), *_downloads(store), *_facts(store)]
    return sorted(found, key=lambda i: (i.used, i.digest))


def collect(store: Store, max_size: int | None = None) -> Collected:
    """Remove litter, and with `max_size` (bytes) what was not used for longest until no more is kept.

    What a running build has open stays readable to it until it closes it, and a build that finds a
    component gone makes it again. Raises OutputError when the store cannot be written to.
    """
    done = Collected()
    try:
        done.litter = sweep(store.root / "tmp") + sum(
            _remove(p) for p in _files(store.root / "quarantine", "*")
        )
        _, orphans = _records(store)
        done.records = len(orphans)
        for path in orphans:
            _remove(path)
        _evict(store, max_size, done)
    except OSError as error:
        raise OutputError(
            Problem("cannot remove from the store", Place(str(store.root)), (str(error.strerror),))
        ) from None
    return done


def _evict(store: Store, max_size: int | None, done: Collected) -> None:
    found = items(store)
    total = sum(i.size for i in found)
    now = time.time_ns()
    for item in found:
        busy = item.kind == "partial" and now - item.used < IDLE
        if max_size is None or total <= max_size or busy:
            done.kept.append(item)
            continue
        for record in item.records:
            _remove(record)
        _remove(item.path)
        total -= item.size
        done.removed.append(item)


def check(store: Store, *, threads: int = 1, reporter: Reporter = SILENT) -> list[Problem]:
    """Read everything in the store and set aside what is damaged; a problem for each.

    Components are compared by the XXH3 and the SHA-256 of every tensor, downloads by their SHA-256,
    records by their seals. What another process removes meanwhile is passed over.
    """
    problems = [p for i in items(store) if (p := _check(store, i, threads, reporter)) is not None]
    for path in _files(store.root / "actions", "*/*.json") + _fact_files(store):
        if read_record(path) is None and path.exists():
            store.quarantine(path)
            problems.append(Problem("a record is damaged", Place(str(path))))
    return problems


def _check(store: Store, item: Item, threads: int, reporter: Reporter) -> Problem | None:
    problem = None
    if item.kind == "component":
        damaged = _damaged(item, threads, reporter)
        problem = damaged.problems[0] if damaged is not None else None
    elif item.kind == "download":
        try:
            found = sha256_file(item.path, reporter=reporter).sha256
        except SourceError as error:
            found = str(error)
        if found != item.digest:
            fact = f"the download `{item.digest[:12]}` is damaged"
            problem = Problem(fact, Place(str(item.path)), (f"SHA-256 of the file: {found}",))
    if problem is None or not item.path.exists():
        return None
    store.quarantine(item.path)
    return problem


def _damaged(item: Item, threads: int, reporter: Reporter) -> DamagedEntry | None:
    try:
        entry = open_entry(item.path, item.digest)
    except FileNotFoundError:
        return None
    except DamagedEntry as error:
        return error
    task = f"checking {item.component} {item.digest[:12]}"
    reporter.start(task, entry.nbytes)
    try:
        return damage(entry, sha256=True, threads=threads, reporter=reporter, task=task)
    finally:
        reporter.finish(task)
        entry.blob.close()


def _components(store: Store, made: dict[str, list[tuple[Path, int]]]) -> Iterator[Item]:
    for path in _files(store.root / "components", "*/*.safetensors"):
        digest = path.stem
        records = made.get(digest, [])
        try:
            stat = path.stat()
            entry = open_entry(path, digest)
            entry.blob.close()
            names = entry.component, entry.cls
        except FileNotFoundError:
            continue
        except DamagedEntry:
            names = "", ""
        used = max([stat.st_mtime_ns, *(t for _, t in records)])
        yield Item("component", path, digest, stat.st_size, used, *names, tuple(p for p, _ in records))


def _downloads(store: Store) -> Iterator[Item]:
    for path in _files(store.root / "downloads", "*"):
        if (stat := _stat(path)) is not None:
            remembered = _stat(store.memory.path(stat))
            used = max(stat.st_mtime_ns, remembered.st_mtime_ns if remembered is not None else 0)
            yield Item("download", path, path.name, stat.st_size, used)
    # An unfinished download may have files beside it, such as its lock: they live and go together.
    unfinished = _files(store.root / "downloads" / "partial", "*")
    for name, group in groupby(unfinished, key=lambda p: p.name.partition(".")[0]):
        stats = {path: stat for path in group if (stat := _stat(path)) is not None}
        if stats:
            size, used = sum(s.st_size for s in stats.values()), max(s.st_mtime_ns for s in stats.values())
            yield Item("partial", next(iter(stats)), name, size, used, records=tuple(stats))


def _facts(store: Store) -> Iterator[Item]:
    for path in _fact_files(store):
        if (stat := _stat(path)) is not None:
            yield Item("fact", path, path.stem, stat.st_size, stat.st_mtime_ns)


def _fact_files(store: Store) -> list[Path]:
    return _files(store.memory.folder, "*/*.json") + _files(store.root / "facts", "*/*/*.json")


def _records(store: Store) -> tuple[dict[str, list[tuple[Path, int]]], list[Path]]:
    """Records of actions and their times by the component they made, and those whose component is gone."""
    made: dict[str, list[tuple[Path, int]]] = {}
    orphans = []
    for path in _files(store.root / "actions", "*/*.json"):
        record, stat = read_record(path), _stat(path)
        found = made_from_record(record) if record is not None else None
        if found is None or stat is None or not store.component_path(found.digest.xxh3).exists():
            orphans.append(path)
        else:
            made.setdefault(found.digest.xxh3, []).append((path, stat.st_mtime_ns))
    return made, orphans


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if p.is_file())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _remove(path: Path) -> int:
    """Remove a file if it is still there; the number of bytes freed."""
    stat = _stat(path)
    path.unlink(missing_ok=True)
    return stat.st_size if stat is not None else 0
