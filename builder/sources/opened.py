"""A recipe's sources, found, opened and identified when they are first asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import CkptError, FetchError, Problem, SourceError
from builder.base.progress import Reporter
from builder.formats import open_checkpoint
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.models.identify import Identity, Match, identify
from builder.sources.find import Found, find_source
from builder.tensors.cast import PROFILE
from builder.tensors.lazy import DType, LazyTensor

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.recipe import Recipe, Source
    from builder.recipe.lock import Lock, LockedSource
    from builder.sources.net.client import Session
    from builder.store import Store


@dataclass
class OpenSource:
    """A source's table of contents, and what it is; who fetches tensors of a remote one holds `lock`."""

    checkpoint: Checkpoint
    identity: Identity
    lock: threading.Lock = field(default_factory=threading.Lock)

    def component(self, match: Match, cls: str) -> dict[str, LazyTensor]:
        """The tensors of a match under the unprefixed names of class `cls`.

        An averaged component that is promoted gets the names of the one it averages. Names that the file
        spells otherwise stay so: a fix mends them. Scales come along: 8-bit weights mean nothing without.
        """
        promoted = match.component.promote if match.component.cls != cls else {}
        return {
            promoted.get(bare, match.renamed.get(bare, bare)): self.checkpoint[full]
            for bare, full in self.names(match).items()
        }

    def names(self, match: Match) -> dict[str, str]:
        """The full name of each tensor of a match, and of the scales among them, by its unprefixed one."""
        at = len(match.prefix)
        scales = {n[at:]: n for n in self.identity.scales if n.startswith(match.prefix)}
        return {**match.names, **scales}


class Sources:
    """The sources of one recipe; `scope` stands before their names in the lock."""

    def __init__(
        self,
        recipe: Recipe,
        catalog: Catalog,
        store: Store,
        model_folders: Sequence[Path],
        reporter: Reporter,
        lock: Lock | None,
        network: Callable[[], Session] | None,
        download: bool,
        scope: str = "",
    ) -> None:
        self.recipe = recipe
        self.catalog = catalog
        self.store = store
        self._folders = model_folders
        self._reporter = reporter
        self.scope = scope
        self.lock = lock
        # What a lock says of components holds for the recipe that it was made of.
        self._parts = (
            lock is not None
            and (lock.recipe, lock.profile) == (recipe.digest, PROFILE)
            and all(output.name in lock.outputs for output in recipe.outputs)
        )
        self._network = network
        self._session: Session | None = None
        self._download = download
        self._found: dict[str, Found | FetchError] = {}
        self._open: dict[str, OpenSource] = {}
        self._unseen: dict[str, str | None] = {}
        self.resolved: dict[str, str] = {}

    def inner(self, name: str) -> Sources:
        """The sources of the recipe that a source is."""
        return Sources(
            self.recipe.included[name],
            self.catalog,
            self.store,
            self._folders,
            self._reporter,
            self.lock,
            self._network,
            self._download,
            f"{self.scope}{name}/",
        )

    def spec(self, name: str) -> Source:
        """What the recipe says of a source."""
        return self.recipe.sources[name]

    def locked(self, name: str) -> LockedSource | None:
        """What the lock says of a source."""
        return self.lock.sources.get(self.scope + name) if self.lock is not None else None

    def wanted(self, name: str) -> Source:
        """A source with the digest and the size that it must have, by the recipe or by the lock.

        A source without an address is a file of this machine, which may change; its lock follows.
        """
        spec, locked = self.spec(name), self.locked(name)
        if locked is None or spec.sha256 not in {locked.sha256, None}:
            return spec
        if spec.sha256 is None and not self.addresses(name):
            return spec
        return replace(spec, sha256=locked.sha256, size=spec.size or locked.size or None)

    def find(self, name: str) -> Found | None:
        """The local file of a source, or None when it is nowhere on this machine."""
        if name not in self._found:
            folder = self.recipe.path.parent if self.recipe.path else Path()
            try:
                self._found[name] = find_source(
                    self.wanted(name),
                    folder=folder,
                    model_folders=self._folders,
                    store=self.store,
                    hashing=self._download,
                    reporter=self._reporter,
                )
            except FetchError as error:
                self._found[name] = error
        found = self._found[name]
        return found if isinstance(found, Found) else None

    def missing(self, name: str) -> CkptError:
        """Why a source is nowhere to be found."""
        self.find(name)
        found = self._found[name]
        assert isinstance(found, FetchError)
        return found

    def addresses(self, name: str) -> list[str]:
        """Where a source can be had from: as the lock resolved it, then as the recipe says."""
        locked = self.locked(name)
        resolved = [locked.resolved] if locked is not None and locked.resolved else []
        return list(dict.fromkeys([*resolved, *self.spec(name).urls]))

    def remote(self, name: str) -> bool:
        """Whether a source is not here, but may be had from somewhere."""
        known = self.addresses(name) or self.spec(name).sha256 is not None
        return self.find(name) is None and self._network is not None and bool(known)

    def fetch(self, name: str) -> Found:
        """Download a source, or take it from a cache; raises FetchError, or SourceError for another file."""
        from builder.sources.net.acquire import fetch

        if not self.remote(name):
            raise self.missing(name)
        wanted = self.wanted(name)
        try:
            got = fetch(
                self.addresses(name),
                sha256=wanted.sha256,
                size=wanted.size,
                store=self.store,
                session=self.session(),
                reporter=self._reporter,
                base=self._folder,
                name=name,
            )
        except SourceError as error:
            if self.spec(name).sha256 is not None:
                raise
            hint = "the lock pins it: `ckpt lock --upgrade` takes it as it is now"
            raise SourceError(*(replace(p, hint=hint) for p in error.problems)) from None
        found = Found(got.path, got.sha256, got.size, got.address or "a cache")
        self.provide(name, found)
        if got.address is not None and not got.address.startswith("file:"):
            self.resolved[name] = got.address
        return found

    def session(self) -> Session:
        """The network, opened when it is first used."""
        assert self._network is not None
        self._session = self._network()
        return self._session

    def stop(self) -> None:
        """Break off whatever is being fetched."""
        if self._session is not None:
            self._session.stop()

    @property
    def _folder(self) -> Path | None:
        return self.recipe.path.parent if self.recipe.path else None

    def provide(self, name: str, found: Found) -> None:
        """Say where a source is now, after it was fetched: from now on it is read from there.

        Raises SourceError when it holds something else than was planned with.
        """
        if self.find(name) is None and name in self._open:
            with (
                open_checkpoint(found.path, self.catalog.layouts) as now,
                self._open.pop(name).checkpoint as before,
            ):
                if (_contents(now), now.metadata) != (_contents(before), before.metadata):
                    raise SourceError(
                        Problem(f"`{name}` is not what its host showed at first", hint="build again")
                    )
        self._found[name] = found

    def sha256(self, name: str) -> str | None:
        """The digest of a source, pinned by the recipe or remembered; None: it is to be computed."""
        found = self.find(name)
        return self.spec(name).sha256 or (found.sha256 if found is not None else self.wanted(name).sha256)

    def size(self, name: str) -> int | None:
        """The bytes of a source, as far as they are known."""
        if (found := self.find(name)) is not None:
            return found.size
        opened = self._open.get(name)
        return self.wanted(name).size or (opened.checkpoint.size if opened is not None else None)

    def open(self, name: str) -> OpenSource:
        """A source's table of contents and identity; raises CkptError when it cannot be had."""
        if name not in self._open:
            found = self.find(name)
            checkpoint = (
                open_checkpoint(found.path, self.catalog.layouts)
                if found is not None
                else self._open_remote(name)
            )
            self._open[name] = OpenSource(checkpoint, identify(checkpoint, self.catalog))
        return self._open[name]

    def _open_remote(self, name: str) -> Checkpoint:
        """The table of contents of a safetensors file on its host; else the whole file, if that may be.

        The whole file is what a build wants at once, unless it may be content with parts.
        """
        if not self.remote(name):
            raise self.missing(name)
        refused: CkptError = self.missing(name)
        for address in self.addresses(name) if self._parts or not self._download else ():
            try:
                return self._read_remote(name, address)
            except CkptError as error:
                refused = error
        if self._download:
            return open_checkpoint(self.fetch(name).path, self.catalog.layouts)
        raise refused

    def _read_remote(self, name: str, address: str) -> Checkpoint:
        from builder.base.addresses import LocalFile, parse_address
        from builder.sources.net.remote import open_remote

        where = parse_address(address)
        if isinstance(where, LocalFile):
            return open_checkpoint(where.under(self._folder), self.catalog.layouts)
        checkpoint = open_remote(where, session=self.session())
        size = self.wanted(name).size
        if size is not None and checkpoint.size != size:
            checkpoint.close()
            evidence = f"{address}: {checkpoint.size:,} bytes, {size:,} are pinned"
            raise SourceError(Problem(f"`{name}` is not what was pinned", evidence=(evidence,)))
        return checkpoint

    def metadata(self, name: str) -> Mapping[str, str]:
        """A source's own metadata; raises as `open`."""
        return self.open(name).checkpoint.metadata

    def known_architecture(self, name: str) -> str | None:
        """What a source is by its digest, when its contents cannot be seen; None when they can be.

        That is enough to plan with, and too little to build. Raises as `open` when nothing is known.
        """
        if self._download or self.find(name) is not None:
            return None
        if name not in self._unseen:
            try:
                self.open(name)
                self._unseen[name] = None
            except CkptError:
                file = self.catalog.known.file(self.wanted(name).sha256 or "")
                if file is None or file.architecture is None:
                    raise
                self._unseen[name] = file.architecture
        return self._unseen[name]

    def opened_remotely(self, name: str) -> bool:
        """Whether a source was planned with as its host shows it, and is still elsewhere."""
        return name in self._open and self.remote(name)

    def unchanged(self, name: str) -> bool:
        """Whether the files that were opened of a source lie where they lay, as they were then."""
        opened = self._open.get(name)
        return (
            opened is None
            or self.find(name) is None
            or all(_in_place(b) for b in opened.checkpoint.blobs if isinstance(b, FileBlob))
        )

    def pinned_by_lock(self, name: str) -> bool:
        """Whether the lock says which file this was when it was last built."""
        return self.locked(name) is not None

    def close(self) -> None:
        """Close every file."""
        for opened in self._open.values():
            opened.checkpoint.close()
        self._open.clear()


def _contents(checkpoint: Checkpoint) -> dict[str, tuple[DType, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.items()}


def _in_place(blob: FileBlob) -> bool:
    try:
        now = Path(blob.name).stat()
    except OSError:
        return False
    then = blob.stat
    return os.path.samestat(now, then) and (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
        then.st_size,
        then.st_mtime_ns,
        then.st_ctime_ns,
    )
