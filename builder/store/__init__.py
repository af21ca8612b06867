"""The content-addressed store of made components, remembered digests and finished downloads."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from builder.base.errors import OutputError, Place, Problem
from builder.base.progress import SILENT, Reporter
from builder.base.staging import staging, sweep
from builder.formats.checkpoint import Checkpoint
from builder.formats.write_safetensors import write
from builder.store.entries import (
    CLASS,
    COMPONENT,
    SHA256,
    TENSOR_SHA256,
    TENSOR_XXH3,
    DamagedEntry,
    Entry,
    damage,
    open_entry,
    stored_size,
)
from builder.store.memory import DigestMemory
from builder.store.records import (
    READ_ONLY,
    Made,
    default_root,
    made_from_record,
    made_to_record,
    read_record,
    write_record,
)
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import LazyTensor

__all__ = ["DamagedEntry", "Made", "Store", "default_root"]


class Store:
    """Made components by content, what each action made, digests of files, and downloads.

    Nothing is created before the first write. Several processes may use one store at the same time:
    every file appears whole, under a name that its content gives, and is checked when it is read. A store
    that cannot be written to is read, and what it lacks goes to a temporary one that `close` deletes.
    `downloads` is the folder of another store's downloads, to be shared.
    """

    def __init__(
        self, root: Path | None = None, *, downloads: Path | None = None, reporter: Reporter = SILENT
    ) -> None:
        self.root = root if root is not None else default_root()
        self._downloads = downloads if downloads is not None else self.root / "downloads"
        self.reporter = reporter
        self.memory = DigestMemory(self.root / "files")
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
        self._delete()
        self._overlay = None

    # What actions made.

    def lookup(self, action: str) -> Made | None:
        """What the action of this key made, if its component is still there; reads no tensors.

        Counts as a use of the component.
        """
        if self._overlay is not None and (made := self._overlay.lookup(action)) is not None:
            return made
        path = self.action_path(action)
        record = read_record(path)
        made = made_from_record(record) if record is not None else None
        if made is None:
            return None
        component = self.component_path(made.digest.xxh3)
        if component in self._distrusted or not stored_size(component, made.bytes):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the component's own times stay, as readers take them for a change
        return made

    def record(self, action: str, made: Made) -> None:
        """Keep what the action of this key made; in a store that cannot be written to, do nothing."""
        if self._can_write():
            try:
                write_record(self.action_path(action), made_to_record(made))
            except OSError as error:
                raise self._unwritable(error) from None

    # Components.

    def open(self, made: Made | str, *, verify: bool = True) -> Checkpoint | None:
        """A stored component, by what was made or its XXH3; None when it is missing or damaged.

        With `verify` every tensor is read and its XXH3 compared now. Without, each tensor compares its
        own as it is read from first to last, and raises DamagedEntry: hand that to `set_aside` and make
        the component again. A damaged entry is set aside, with a warning.
        """
        digest = made if isinstance(made, str) else made.digest.xxh3
        entry = self._entry(digest)
        if entry is None:
            return None
        if verify and (damaged := damage(entry, sha256=False)) is not None:
            entry.blob.close()
            self.set_aside(damaged)
            return None
        return Checkpoint(entry.component, "safetensors", entry.blob.size, entry.tensors, blobs=(entry.blob,))

    def rows(self, made: Made | str) -> Mapping[str, Row] | None:
        """The digest of each tensor of a stored component, without reading any; None as for `open`."""
        entry = self._entry(made if isinstance(made, str) else made.digest.xxh3)
        if entry is None:
            return None
        entry.blob.close()
        return entry.rows

    def put(
        self,
        action: str | None,
        component: str,
        cls: str,
        tensors: Mapping[str, LazyTensor],
        *,
        threads: int = 1,
        reporter: Reporter | None = None,
        task: str = "",
        inputs: Iterable[os.stat_result | Path] = (),
        check: Callable[[], object] = lambda: None,
    ) -> Made:
        """Make a component by reading `tensors`, under bare names, and keep it as what `action` made.

        Without an action it is stored by its content alone; `record` can say later what made it.
        `check` is called when all has been read and before it is kept, and may raise.
        Of two processes that put the same component both succeed. Raises what reading raises, and
        OutputError when there is no room. Nothing is flushed to the disk: a power cut may damage the
        entry, which its next use notices.
        """
        place = self._place()
        blanks = {
            SHA256: "0" * 64,
            TENSOR_XXH3: "0" * 32 * len(tensors),
            TENSOR_SHA256: "0" * 64 * len(tensors),
        }
        try:
            with staging(place.root / "tmp") as folder:
                staged = folder / "component.safetensors"
                written = write(
                    staged,
                    tensors,
                    {COMPONENT: component, CLASS: cls, **blanks},
                    tensor_digests=True,
                    file_digest=False,
                    durable=False,
                    threads=threads,
                    inputs=inputs,
                    reporter=reporter or self.reporter,
                    task=task,
                    accept=lambda _: check(),
                )
                rows = {
                    n: Row(tensors[n].dtype, tensors[n].shape, written.tensors[n]) for n in sorted(tensors)
                }
                digest = component_digest(rows)
                values = {
                    SHA256: str(digest.sha256),
                    TENSOR_XXH3: "".join(r.digest.xxh3 for r in rows.values()),
                    TENSOR_SHA256: "".join(str(r.digest.sha256) for r in rows.values()),
                }
                _fill(staged, blanks, values)
                staged.chmod(0o444)
                path = place.component_path(digest.xxh3)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Also in place of one that is there already: should that be damaged, this heals it.
                staged.replace(path)
        except OSError as error:
            raise self._unwritable(error) from None
        self._distrusted.discard(path)
        made = Made(component, cls, digest, len(tensors), sum(t.nbytes for t in tensors.values()))
        if action is not None:
            place.record(action, made)
        return made

    def gone(self, made: Made) -> DamagedEntry:
        """That a component is no longer there."""
        digest = made.digest.xxh3
        return DamagedEntry(self.component_path(digest), digest, "it is no longer in the store")

    def set_aside(self, damaged: DamagedEntry) -> None:
        """Take a damaged entry out of use, unless another process has put a new one in its place."""
        self.reporter.warn(damaged.problems[0])
        path = damaged.path
        with contextlib.suppress(FileNotFoundError):
            if damaged.seen is None or os.path.samestat(path.stat(), damaged.seen):
                self.quarantine(path)

    def quarantine(self, path: Path) -> None:
        """Move a file out of use; where that cannot be, it is not used by this process."""
        try:
            folder = self.root / "quarantine"
            folder.mkdir(parents=True, exist_ok=True)
            path.replace(folder / f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        except FileNotFoundError:
            pass  # someone else did
        except OSError:
            self._distrusted.add(path)

    # Small facts.

    def recall(self, kind: str, key: str) -> dict[str, Any] | None:
        """The fact kept under `kind` and `key` (hex), or None; it may have been forgotten at any time."""
        path = self._fact_path(kind, key)
        fact = read_record(path)
        if fact is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # a use, which keeps it from being forgotten
        return fact

    def note(self, kind: str, key: str, fact: dict[str, Any]) -> None:
        """Keep a fact that saves work later; where that cannot be, do nothing."""
        with contextlib.suppress(OSError, OutputError):
            write_record(self._fact_path(kind, key), fact)

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
        folder.mkdir(parents=True, exist_ok=True)
        return folder / xxhash.xxh3_128_hexdigest(key.encode())

    def keep_download(self, partial: Path, sha256: str) -> Path:
        """Put a gathered file, whose SHA-256 was computed while it arrived, among the finished downloads."""
        path = partial.parent.parent / sha256
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a power cut may leave a file's times, and take what was not flushed
        partial.chmod(0o444)
        partial.replace(path)
        self.memory.remember(path.stat(), sha256, seen=None)
        return path

    # Places.

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A new folder for what is in the making, gone at the end; the next user removes a dead one's."""
        return staging(self._place().root / "tmp")

    def component_path(self, digest: str) -> Path:
        """Where the component of this XXH3 lies, if it is stored."""
        return self.root / "components" / digest[:2] / f"{digest}.safetensors"

    def action_path(self, action: str) -> Path:
        """Where the record of this action lies, if there is one."""
        return self.root / "actions" / action[:2] / f"{action}.json"

    def _fact_path(self, kind: str, key: str) -> Path:
        return self.root / "facts" / kind / key[:2] / f"{key}.json"

    def _entry(self, digest: str) -> Entry | None:
        if self._overlay is not None and (entry := self._overlay._entry(digest)) is not None:
            return entry
        path = self.component_path(digest)
        if path in self._distrusted:
            return None
        try:
            return open_entry(path, digest)
        except FileNotFoundError:
            return None
        except DamagedEntry as damaged:
            self.set_aside(damaged)
            return None

    def _can_write(self) -> bool:
        with self._lock:
            if self._writable is None:
                try:
                    with staging(self.root / "tmp"):
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
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        room = "`ckpt store gc --max-size SIZE` makes room; " if full else ""
        hint = f"{room}`CKPT_STORE` chooses another folder"
        fact = "cannot write to the store"
        return OutputError(Problem(fact, Place(str(self.root)), (str(error.strerror),), hint))


def _fill(path: Path, blanks: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Put values into a written header in the place of blanks of the same length."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        for key, value in values.items():
            # A quote inside of a name is escaped, so that no name looks like this.
            header = header.replace(f'"{key}":"{blanks[key]}"'.encode(), f'"{key}":"{value}"'.encode())
        assert len(header) == length
        file.seek(8)
        file.write(header)
