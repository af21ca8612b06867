"""Looking after a store: what is in it, making room, and checking all of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from builder.base.disk import sweep
from builder.base.errors import OutputError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats.hashes import sha256_file
from builder.store import DamagedEntry, Store
from builder.store.entries import is_at
from builder.store.records import read_record
from builder.store.strays import files, kind_of, set_aside, strays
from builder.tensors.scan import scan

_RECORDS = ("files", "actions", "components", "facts")

# A partial download that was written to more recently may be in the making.
IDLE = 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a store keeps.

    `kind` is `component`, `download`, `partial` (an unfinished download) or `fact` (a few bytes that save
    work, such as the digest of a file, or what an action made); `digest` is of its content or, for a fact,
    of what it is about; `records` are files that go with it. `size` is in bytes, `used` in nanoseconds since
    the epoch. Of a component, `source` says what it was made of, and `places` are the files that it lies in,
    beside the store's own blob.
    """

    kind: str
    path: Path
    digest: str
    size: int
    used: int
    component: str = ""
    cls: str = ""
    source: str = ""
    places: tuple[str, ...] = ()
    records: tuple[Path, ...] = ()


@dataclass(slots=True)
class Collected:
    """What a collection removed, and what it left; `litter` is in bytes.

    `strays` counts what was no file where one is due.
    """

    removed: list[Item] = field(default_factory=list)
    litter: int = 0  # of damaged entries and of what dead processes left
    strays: int = 0
    kept: list[Item] = field(default_factory=list)


def items(store: Store) -> list[Item]:
    """What a store keeps, the least recently used first."""
    found = [*_components(store), *_downloads(store), *_facts(store)]
    return sorted(found, key=lambda i: (i.used, i.digest))


def to_json(store: Store, found: Sequence[Item]) -> dict[str, Any]:
    """What is kept in a store, as plain values."""
    total = sum(i.size for i in found)
    return {"schema": 1, "root": str(store.root), "bytes": total, "items": [item_json(i) for i in found]}


def item_json(item: Item) -> dict[str, Any]:
    """One thing that a store keeps, as plain values."""
    used = datetime.fromtimestamp(item.used // 10**9, timezone.utc).isoformat()
    row = {"kind": item.kind, "digest": item.digest, "size": item.size, "used": used}
    if item.kind != "component":
        return row
    more = {"component": item.component, "class": item.cls, "source": item.source}
    return row | more | {"places": list(item.places)}


def collect(store: Store, max_size: int | None = None) -> Collected:
    """Remove litter, and with `max_size` (bytes) what was not used for longest until no more is kept.

    What a running build has open stays readable to it until it closes it, and a build that finds a
    component gone makes it again. Raises OutputError when the store cannot be written to.
    """
    done = Collected()
    try:
        _clear(store, done)
        _evict(store, max_size, done)
    except OSError as error:
        raise OutputError(
            Problem("cannot remove from the store", Place(str(store.root)), (str(error.strerror),))
        ) from None
    return done


def _clear(store: Store, done: Collected) -> None:
    """Remove litter, and what is not what is due in its place; a folder that holds something is set aside."""
    folders = []
    for path in strays(store.root):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif any(path.iterdir()):
            folders.append(path)
            continue
        else:
            path.rmdir()
        done.strays += 1
    quarantine = store.root / "quarantine"
    done.litter = sweep(store.root / "tmp")
    for path in sorted(quarantine.iterdir()) if quarantine.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            done.litter += _remove(path)
        else:
            shutil.rmtree(path)
    for path in folders:
        set_aside(store.root, path)
        done.strays += 1


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

    Components are compared by the BLAKE3 of every tensor, downloads by their SHA-256, records by their
    seals and places. What another process removes meanwhile is passed over, and so are files that were
    built and are no longer as they were.
    """
    problems = [p for i in items(store) if (p := _check(store, i, threads, reporter)) is not None]
    for path in _record_files(store):
        if read_record(path) is None and path.exists():
            store.quarantine(path)
            problems.append(Problem("a record is damaged, or another's", Place(str(path))))
    for path in strays(store.root):
        problems.append(Problem(f"{kind_of(path)} stands where another thing is due", Place(str(path))))
        store.quarantine(path)
    return problems


def _check(store: Store, item: Item, threads: int, reporter: Reporter) -> Problem | None:
    if item.kind == "component":
        return _check_component(store, item, threads, reporter)
    if item.kind != "download":
        return None
    try:
        found = sha256_file(item.path, reporter=reporter).sha256
    except SourceError as error:
        found = error.problems[0].fact
    if found == item.digest or not item.path.exists():
        return None
    store.quarantine(item.path)
    fact = f"the download `{item.digest[:12]}` is damaged"
    return Problem(fact, Place(str(item.path)), (f"SHA-256 of the file: {found}",))


def _check_component(store: Store, item: Item, threads: int, reporter: Reporter) -> Problem | None:
    damage: list[Problem] = []
    stored = store.open(item.digest, warn=damage.append)
    if stored is None:
        return damage[0] if damage else None
    task = f"checking {item.component} {item.digest[:12]}"
    try:
        scan(stored.tensors, numbers=False, threads=threads, reporter=reporter, task=task)
    except DamagedEntry as damaged:
        store.set_aside(damaged, warn=damage.append)
    finally:
        stored.close()
    return damage[0] if damage else None


def _components(store: Store) -> Iterator[Item]:
    known = set()
    for record in files(store.root, "components", ".json"):
        entry, stat = store.entry(record.stem), _stat(record)
        if entry is None or stat is None:
            continue
        known.add(record.stem)
        blob = store.blob_path(record.stem)
        size = held.st_size if (held := _stat(blob)) is not None else 0
        yield Item(
            "component",
            blob,
            record.stem,
            size,
            max(stat.st_mtime_ns, held.st_mtime_ns if held is not None else 0),
            entry.component,
            entry.cls,
            entry.source,
            tuple(at.path for at in entry.places if is_at(at)),
            (record,),
        )
    for blob in files(store.root, "blobs", ".safetensors"):
        stat = _stat(blob)
        if stat is not None and blob.stem not in known:
            yield Item("component", blob, blob.stem, stat.st_size, stat.st_mtime_ns)


def _downloads(store: Store) -> Iterator[Item]:
    for path in files(store.root, "downloads"):
        if (stat := _stat(path)) is not None:
            remembered = _stat(store.memory.path(stat))
            used = max(stat.st_mtime_ns, remembered.st_mtime_ns if remembered is not None else 0)
            yield Item("download", path, path.name, stat.st_size, used)
    # An unfinished download may have files beside it, such as its lock: they live and go together.
    unfinished = files(store.root, "downloads/partial")
    for name, group in groupby(unfinished, key=lambda p: p.name.partition(".")[0]):
        stats = {path: stat for path in group if (stat := _stat(path)) is not None}
        if stats:
            size, used = sum(s.st_size for s in stats.values()), max(s.st_mtime_ns for s in stats.values())
            yield Item("partial", next(iter(stats)), name, size, used, records=tuple(stats))


def _facts(store: Store) -> Iterator[Item]:
    for path in _record_files(store):
        if (stat := _stat(path)) is not None and path.parent.parent.name != "components":
            yield Item("fact", path, path.stem, stat.st_size, stat.st_mtime_ns)


def _record_files(store: Store) -> list[Path]:
    return [p for folder in _RECORDS for p in files(store.root, folder, ".json")]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _remove(path: Path) -> int:
    """Remove a file if it is still there; the number of bytes freed."""
    stat = _stat(path)
    path.unlink(missing_ok=True)
    return stat.st_size if stat is not None else 0
