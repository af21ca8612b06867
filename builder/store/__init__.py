"""The content-addressed store: what actions made and where it lies, remembered digests, downloads."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from builder.base.disk import scratch_folder, sweep
from builder.base.errors import CkptError, OutputError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats.blob import FileBlob
from builder.formats.safetensors import read_header
from builder.formats.write_safetensors import write
from builder.store.entries import (
    PLACES,
    At,
    DamagedEntry,
    Entry,
    Stored,
    entry_from_record,
    identity,
    is_at,
    open_at,
    stored_in,
)
from builder.store.memory import DigestMemory
from builder.store.records import (
    READ_ONLY,
    Made,
    default_root,
    is_digest,
    made_from_record,
    made_to_record,
    read_record,
    write_record,
)
from builder.store.shared import Claim, Shared, claim_from_record, claim_key
from builder.store.strays import make_way, set_aside
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import LazyTensor

T = TypeVar("T")

Warn = Callable[[Problem], object]

__all__ = ["DamagedEntry", "Made", "Store", "default_root"]


class Store:
    """Components by content and where their bytes lie, what each action made, digests of files, downloads.

    A component is a table of digests, and places: in a file that was built, or in a blob of the store's
    own, which only what is costly gets. Nothing is created before the first write. Several processes may
    use one store at the same time: every file appears whole, and is checked when it is read. A store that
    cannot be written to is read, and what it lacks goes to a temporary one that `close` deletes.
    `downloads` is the folder of another store's downloads, to be shared. `keep_all` has a blob made of
    every component, as for the cache of a CI. Without `trust_times`, files are hashed each time.

    What lies in a folder that others may write to is not believed: only what proves itself is read from
    there, which is components and downloads, by their digests, and not what actions made, nor digests of
    files.

    `shared` is a store that other machines share: it is asked for what is not here, and what it says of
    actions is used while it is the one that is set, but is not remembered as what they made.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        downloads: Path | None = None,
        keep_all: bool = False,
        trust_times: bool = True,
        shared: Shared | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.root = root if root is not None else default_root()
        self._downloads = downloads if downloads is not None else self.root / "downloads"
        self.keep_all = keep_all
        self.shared = shared
        self.reporter = reporter
        self.trusted = _is_ours(self.root, self.reporter)
        self.memory = DigestMemory(self.root / "files", trust_times and self.trusted)
        self.grown = 0  # bytes of blobs and downloads that this process has put here
        self._distrusted: set[Path] = set()
        self._overlay: Store | None = None
        self._writable: bool | None = None
        self._delete: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the temporary store, if there is one."""
        if self.shared is not None:
            self.shared.close()
        self._delete()
        self._overlay = None

    # What actions made.

    def lookup(self, action: str, cls: str) -> Made | None:
        """What the action of this key made of a class, whether or not its bytes are still anywhere.

        Counts as a use, of the component too.
        """
        if self._overlay is not None and (made := self._overlay.lookup(action, cls)) is not None:
            return made
        path = self.action_path(action)
        record = read_record(path) if self.trusted else None
        made = made_from_record(record) if record is not None else None
        if made is None:
            claim = self._claim(action)
            return claim.made if claim is not None and claim.made.cls == cls else None
        if made.cls != cls:
            return None
        for used in (path, self.entry_path(made.digest)):
            _touch(used)
        return made

    def claim(self, action: str, made: Made) -> None:
        """Keep what an action made of what the shared store had: known as long as that is the one set."""
        if self.shared is not None:
            self.shared.believe("action", action, Claim(made))
            self.note("claim", claim_key(self.shared.url, action), Claim(made).record())

    def is_claimed(self, action: str) -> bool:
        """Whether what this action made is known by the word of the shared store alone."""
        if self.shared is None:
            return False
        if self._overlay is not None and self._overlay.action_path(action).exists():
            return False
        own = self.trusted and read_record(self.action_path(action)) is not None
        return not own and self._claim(action) is not None

    def doubt(self, action: str, *evidence: str) -> bool:
        """Have what the shared store says of an action not believed; whether it was."""
        if not self.is_claimed(action):
            return False
        claim = self._claim(action)
        assert self.shared is not None and claim is not None
        self.shared.refuse(claim, *evidence)
        with contextlib.suppress(OSError):
            self._fact_path("claim", claim_key(self.shared.url, action)).unlink(missing_ok=True)
        return True

    def _claim(self, action: str) -> Claim | None:
        """What the shared store says that an action made; asked once, and then remembered."""
        if self.shared is None:
            return None
        key = claim_key(self.shared.url, action)
        if (known := self.recall("claim", key, claim_from_record)) is not None:
            self.shared.believe("action", action, known)
        elif (known := self.shared.action(action)) is not None:
            self.note("claim", key, known.record())
        return self.shared.action(action)

    def record(self, action: str, made: Made) -> None:
        """Keep what the action of this key made; in a store that cannot be written to, do nothing."""
        if self._can_write():
            try:
                write_record(self.action_path(action), made_to_record(made), self.root)
            except OSError as error:
                raise self._unwritable(error) from None
            except OutputError as error:
                raise self._full(error.problems[0].evidence) from None

    # Components.

    def entry(self, digest: str) -> Entry | None:
        """What is known of a component, without reading any of it; None when nothing is."""
        if self._overlay is not None and (entry := self._overlay.entry(digest)) is not None:
            return entry
        record = read_record(self.entry_path(digest)) if is_digest(digest) else None
        return entry_from_record(digest, record) if record is not None else None

    def open(self, digest: str, warn: Warn | None = None) -> Stored | None:
        """A component where it lies now, each tensor verified as it is read; None: it is nowhere.

        One that the shared store has is had from there first. Hand the DamagedEntry that reading may raise to
        `set_aside`, and make the component again.
        """
        stored = self._open_here(digest, warn)
        return stored or (self._open_here(digest, warn) if self.bring(digest) else None)

    def _open_here(self, digest: str, warn: Warn | None) -> Stored | None:
        entry = self.entry(digest)
        if entry is None:
            return None
        if (stored := self._open_blob(entry, warn)) is not None:
            return stored
        places = (p for p in entry.places if Path(p.path) not in self._distrusted)
        return next((s for at in places if (s := open_at(entry, at)) is not None), None)

    def holds(self, digest: str) -> bool:
        """Whether a component may lie somewhere, going by names and identities of files alone.

        Or by what the shared store says.
        """
        here = self._is_here(digest)
        return here or (self.shared is not None and self.shared.component(digest) is not None)

    def _is_here(self, digest: str) -> bool:
        if (entry := self.entry(digest)) is None:
            return False
        return self._blob_of(digest) is not None or any(map(is_at, entry.places))

    def bring(self, digest: str, threads: int = 1, stop: threading.Event | None = None) -> bool:
        """Have a component from the shared store, unless it is here; whether it was had.

        What comes is compared with the digest, and kept only where it is right; why it is not is said.
        """
        claim = self.shared.component(digest) if self.shared is not None else None
        if self.shared is None or claim is None or self._is_here(digest):
            return False
        made = claim.made
        try:
            place = self._place()
            with scratch_folder(place.root / "tmp") as folder:
                staged = folder / "component.safetensors"
                rows = self.shared.fetch(claim, staged, threads=threads, stop=stop)
                if rows is None:
                    return False
                entry = self.entry(digest)
                entry = entry or Entry(digest, made.component, made.cls, "the shared store", rows)
                self._keep_blob(place, staged, entry)
        except (OSError, OutputError) as error:
            self.shared.refuse(claim, str(error).partition("\n")[0])
            return False
        return True

    def share(
        self, action: str, made: Made, *, threads: int = 1, stop: threading.Event | None = None
    ) -> None:
        """Have the shared store know what an action made, and keep its bytes, where that is asked for.

        What lies here is verified on the way; where it cannot be read, nothing is shared.
        """
        if self.shared is None or not self.shared.writing:
            return
        claim = self._claim(action)
        if claim is not None and claim.made == made and claim.sha256:
            return  # that is where it is from

        def blob() -> Claim | None:
            if (stored := self._open_here(made.digest, None)) is None:
                return None
            with contextlib.closing(stored):
                written = write(staged, stored.tensors, durable=False, threads=threads, stop=stop)
            return Claim(made, str(written.sha256), written.size)

        try:
            with scratch_folder(self._place().root / "tmp") as folder:
                staged = folder / "component.safetensors"
                self.shared.offer(action, made, blob, staged)
        except DamagedEntry as damage:
            self.set_aside(damage)
        except (OSError, OutputError, SourceError):
            pass  # what was made is made

    def place(self, entry: Entry, at: At | None = None) -> None:
        """Remember a component and, with `at`, where its bytes lie; where that cannot be, do nothing."""
        if not self._can_write():
            return
        known = self.entry(entry.digest)
        places = known.places if known is not None else ()
        if at is not None:
            places = (at, *(p for p in places if p.path != at.path))
            self._distrusted.discard(Path(at.path))
        places = tuple(p for p in places if is_at(p))[:PLACES]
        if known is not None and known.places == places:
            return
        with contextlib.suppress(OSError, OutputError):
            self._write_entry(replace(entry, places=places))

    def save(
        self,
        component: str,
        cls: str,
        tensors: Mapping[str, LazyTensor],
        *,
        source: str = "",
        threads: int = 1,
        reporter: Reporter | None = None,
        task: str = "",
        stop: threading.Event | None = None,
        inputs: Iterable[os.stat_result | Path] = (),
        check: Callable[[], object] = lambda: None,
    ) -> Made:
        """Make a component by reading `tensors`, under bare names, and keep its bytes in a blob.

        `check` is called when all has been read and before it is kept, and may raise. Of two processes
        that put the same component both succeed. Raises what reading raises, and OutputError when there is
        no room. Nothing is flushed to the disk: a power cut may damage the blob, which its next use notices.
        """
        place = self._place()
        try:
            with scratch_folder(place.root / "tmp") as folder:
                staged = folder / "component.safetensors"
                written = write(
                    staged,
                    tensors,
                    digests=True,
                    sha256=False,
                    durable=False,
                    threads=threads,
                    inputs=inputs,
                    reporter=reporter or self.reporter,
                    task=task,
                    stop=stop,
                )
                check()
                rows = {n: Row(t.dtype, t.shape, written.digests[n]) for n, t in tensors.items()}
                entry = Entry(component_digest(rows), component, cls, source, rows)
                self._keep_blob(place, staged, entry)
        except OSError as error:
            raise self._unwritable(error) from None
        return Made(component, cls, entry.digest, len(tensors), entry.nbytes)

    def _keep_blob(self, place: Store, staged: Path, entry: Entry) -> None:
        """Put a component's blob, which lies at `staged`, in its place; raises OSError, OutputError."""
        size = staged.stat().st_size
        staged.chmod(0o444)
        path = place.blob_path(entry.digest)
        make_way(place.root, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Also in place of one that is there already: should that be damaged, this heals it.
        staged.replace(path)
        known = place.entry(entry.digest)
        places = known.places if known is not None else ()
        place._write_entry(replace(entry, places=places))
        self._distrusted.discard(path)
        if place is self:
            self.grown += size

    def set_aside(self, damaged: DamagedEntry, warn: Warn | None = None) -> None:
        """Take a place whose bytes are not what they were out of use, and say so; a blob is moved away.

        What somebody has put there since stays.
        """
        (warn or self.reporter.warn)(damaged.problems[0])
        if not damaged.is_there():
            return
        path = Path(damaged.path)
        self._distrusted.add(path)
        for store in (self, self._overlay):
            if store is None:
                continue
            if path == store.blob_path(damaged.digest):
                store.quarantine(path)
            elif (entry := store.entry(damaged.digest)) is not None:
                places = tuple(p for p in entry.places if p.path != damaged.path)
                with contextlib.suppress(OSError, OutputError):
                    store._write_entry(replace(entry, places=places))

    def quarantine(self, path: Path) -> None:
        """Move a file out of use; where that cannot be, it is not used by this process."""
        try:
            set_aside(self.root, path)
        except FileNotFoundError:
            pass  # someone else did
        except OSError:
            self._distrusted.add(path)

    # Small facts.

    def recall(self, kind: str, key: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
        """What `parse` makes of the fact kept under `kind` and `key` (hex); None where there is none.

        It may have been forgotten at any time, and one that `parse` fails on, as another version may have
        written, is none.
        """
        path = self._fact_path(kind, key)
        record = read_record(path) if self.trusted else None
        if record is None:
            return None
        try:
            fact = parse(record)
        except (LookupError, TypeError, ValueError, AttributeError):
            return None
        _touch(path)  # a use, which keeps it from being forgotten
        return fact

    def note(self, kind: str, key: str, fact: dict[str, Any]) -> None:
        """Keep a fact that saves work later; where that cannot be, do nothing."""
        with contextlib.suppress(OSError, OutputError):
            write_record(self._fact_path(kind, key), fact, self.root)

    # Digests of files.

    def remembered_sha256(self, stat: os.stat_result) -> str | None:
        """The SHA-256 of a file as it was when `stat` was taken; None when it is not known."""
        return self.memory.recall(stat)

    def sha256(self, path: Path, reporter: Reporter | None = None) -> str:
        """The SHA-256 of a file, hashed once for as long as it stays as it is; raises SourceError."""
        return self.memory.sha256(path, reporter or self.reporter)

    # Downloads.

    @property
    def downloads(self) -> Path:
        """The folder that downloads go to."""
        return self._place()._downloads

    def download_path(self, sha256: str) -> Path:
        """Where the finished download of this digest lies, if there is one."""
        if self._overlay is not None and (path := self._overlay.download_path(sha256)).exists():
            return path
        return self._downloads / sha256

    def partial_path(self, key: str) -> Path:
        """Where the download that `key` (such as an address) names is to be gathered; its folder exists."""
        folder = self.downloads / "partial"
        path = folder / xxhash.xxh3_128_hexdigest(key.encode())
        for place in (path, *folder.glob(f"{path.name}.*")):
            make_way(folder.parent.parent, place)
        folder.mkdir(parents=True, exist_ok=True)
        return path

    def keep_download(self, partial: Path, sha256: str) -> Path:
        """Put a gathered file, whose SHA-256 was computed while it arrived, among the finished downloads."""
        path = partial.parent.parent / sha256
        make_way(path.parent.parent, path)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a power cut may leave a file's times, and take what was not flushed
        partial.chmod(0o444)
        partial.replace(path)
        stat = path.stat()
        self.memory.remember(stat, sha256, seen=None)
        if path.parent == self._downloads:
            self.grown += stat.st_size
        return path

    # Where things lie.

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A new folder for what is in the making, gone at the end; the next user removes a dead one's."""
        return scratch_folder(self._place().root / "tmp")

    def entry_path(self, digest: str) -> Path:
        """Where what is known of the component of this digest lies."""
        return self.root / "components" / digest[:2] / f"{digest}.json"

    def blob_path(self, digest: str) -> Path:
        """Where the component of this digest lies, if the store keeps its bytes."""
        return self.root / "blobs" / digest[:2] / f"{digest}.safetensors"

    def action_path(self, action: str) -> Path:
        """Where the record of this action lies, if there is one."""
        return self.root / "actions" / action[:2] / f"{action}.json"

    def _fact_path(self, kind: str, key: str) -> Path:
        return self.root / "facts" / kind / key[:2] / f"{key}.json"

    def _write_entry(self, entry: Entry) -> None:
        write_record(self.entry_path(entry.digest), entry.record(), self.root)

    def _blob_of(self, digest: str) -> Path | None:
        path = self.blob_path(digest)
        return path if path not in self._distrusted and path.exists() else None

    def _open_blob(self, entry: Entry, warn: Warn | None) -> Stored | None:
        """The component from the store's own blob, which may have been moved or restored: bytes decide."""
        stores = [s for s in (self._overlay, self) if s is not None]
        path = next((p for s in stores if (p := s._blob_of(entry.digest)) is not None), None)
        if path is None:
            return None
        blob = None
        try:
            blob = FileBlob(path)
            header = read_header(blob)
            held = {n: (t.dtype, t.shape) for n, t in header.tensors.items()}
            if held != {n: (r.dtype, r.shape) for n, r in entry.rows.items()}:
                raise SourceError(Problem("its table of contents is not the one stored"))
            # Of the very file that was opened: another process may put its own there at any moment.
            return stored_in(
                entry, blob, [header.data_offset + header.tensors[n].start for n in sorted(held)]
            )
        except CkptError as error:
            file = None
            if blob is not None:
                file = identity(blob.stat)
                blob.close()
            if path.exists():
                self.set_aside(DamagedEntry(entry.digest, str(path), error.problems[0].fact, file), warn)
            return None

    def _can_write(self) -> bool:
        with self._lock:
            if self._writable is None:
                try:
                    make_way(self.root, self.root / "tmp" / "new")
                    with scratch_folder(self.root / "tmp"):
                        self._writable = True
                except OSError as error:
                    if error.errno not in READ_ONLY:
                        raise self._unwritable(error) from None
                    self._writable = False
                else:
                    sweep(self.root / "tmp")
            return self._writable

    def _place(self) -> Store:
        """The store that takes what is written: this one, or the temporary one."""
        if self._can_write():
            return self
        with self._lock:
            if self._overlay is None:
                folder = tempfile.mkdtemp(prefix="ckpt-store-")
                self._delete = weakref.finalize(self, shutil.rmtree, folder, True)
                self._overlay = Store(Path(folder), reporter=self.reporter)
                self.reporter.warn(
                    Problem(
                        "the store cannot be written to: what is made now is not kept",
                        Place(str(self.root)),
                        hint="set `CKPT_STORE` to a folder of yours",
                    )
                )
            return self._overlay

    def _unwritable(self, error: OSError) -> OutputError:
        return self._full((str(error.strerror),), error.errno in {errno.ENOSPC, errno.EDQUOT})

    def _full(self, evidence: tuple[str, ...], full: bool = True) -> OutputError:
        room = "`ckpt store gc --max-size SIZE` makes room; " if full else ""
        hint = f"{room}`CKPT_STORE` chooses another folder"
        return OutputError(Problem("cannot write to the store", Place(str(self.root)), evidence, hint))


def _touch(path: Path) -> None:
    """Note a use; a link's file is none of the store's."""
    with contextlib.suppress(OSError):
        if not path.is_symlink():
            os.utime(path)


def _is_ours(root: Path, reporter: Reporter) -> bool:
    """Whether nobody but the user may write to a store; others are warned of."""
    try:
        stat = root.stat()
    except OSError:
        return True  # there is nothing to be believed yet
    if not hasattr(os, "geteuid") or (stat.st_uid in {os.geteuid(), 0} and not stat.st_mode & 0o002):
        return True
    reporter.warn(
        Problem(
            "others may write to the store: what it remembers is not believed",
            Place(str(root)),
            hint=f"`chmod o-w {root}`, or set `CKPT_STORE` to a folder of yours",
        )
    )
    return False
