"""A recipe's sources, found, opened and identified when they are first asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import CkptError, FetchError
from builder.formats import open_checkpoint
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.identify import Identity, Match, identify
from builder.progress import Reporter
from builder.sources import Found, find_source
from builder.tensors import LazyTensor

if TYPE_CHECKING:
    from builder.catalog import Catalog
    from builder.fetch.client import Session
    from builder.lock import Lock
    from builder.recipe import Recipe, Source
    from builder.store import Store


@dataclass
class OpenSource:
    """A source's table of contents, and what it is."""

    checkpoint: Checkpoint
    identity: Identity

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
    """The sources of one recipe."""

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
    ) -> None:
        self.recipe = recipe
        self.catalog = catalog
        self.store = store
        self._folders = model_folders
        self._reporter = reporter
        self._locked = lock.sources if lock is not None else {}
        self._network = network
        self._download = download
        self._found: dict[str, Found | FetchError] = {}
        self._open: dict[str, OpenSource] = {}
        self.resolved: dict[str, str] = {}

    def spec(self, name: str) -> Source:
        """What the recipe says of a source."""
        return self.recipe.sources[name]

    def find(self, name: str) -> Found | None:
        """The local file of a source, or None when it is nowhere on this machine."""
        if name not in self._found:
            folder = self.recipe.path.parent if self.recipe.path else Path()
            try:
                self._found[name] = find_source(
                    self.spec(name),
                    folder=folder,
                    model_folders=self._folders,
                    store=self.store,
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
        locked = self._locked.get(name)
        resolved = [locked.resolved] if locked is not None and locked.resolved else []
        return list(dict.fromkeys([*resolved, *self.spec(name).urls]))

    def remote(self, name: str) -> bool:
        """Whether a source is not here, but may be had from somewhere."""
        known = self.addresses(name) or self.spec(name).sha256 is not None
        return self.find(name) is None and self._network is not None and bool(known)

    def fetch(self, name: str) -> Found:
        """Download a source, or take it from a cache; raises FetchError, or SourceError for another file."""
        from builder.fetch.acquire import fetch

        if self._network is None or not self.remote(name):
            raise self.missing(name)
        spec = self.spec(name)
        got = fetch(
            self.addresses(name),
            sha256=self.pin(name),
            size=spec.size,
            store=self.store,
            session=self._network(),
            reporter=self._reporter,
            base=self.recipe.path.parent if self.recipe.path else None,
            name=name,
        )
        found = Found(got.path, got.sha256, got.size, got.address or "a cache")
        self.provide(name, found)
        if got.address is not None and not got.address.startswith("file:"):
            self.resolved[name] = got.address
        return found

    def pin(self, name: str) -> str | None:
        """The digest that a source must have, by the recipe or by the lock."""
        locked = self._locked.get(name)
        return self.spec(name).sha256 or (locked.sha256 if locked is not None else None)

    def provide(self, name: str, found: Found) -> None:
        """Say where a source is now, after it was fetched: from now on it is read from there."""
        if self.find(name) is None and name in self._open:
            self._open.pop(name).checkpoint.close()
        self._found[name] = found

    def sha256(self, name: str) -> str | None:
        """The digest of a source, pinned by the recipe or remembered; None: it is to be computed."""
        found = self.find(name)
        return self.spec(name).sha256 or (found.sha256 if found is not None else self.pin(name))

    def open(self, name: str) -> OpenSource:
        """A source's table of contents and identity; raises CkptError when it cannot be had."""
        if name not in self._open:
            found = self.find(name)
            checkpoint = open_checkpoint(found.path) if found is not None else self._open_remote(name)
            self._open[name] = OpenSource(checkpoint, identify(checkpoint, self.catalog))
        return self._open[name]

    def _open_remote(self, name: str) -> Checkpoint:
        """The table of contents of a safetensors file on its host; else the whole file, if that may be."""
        from builder.fetch.remote import open_remote

        if self._network is None or not self.remote(name):
            raise self.missing(name)
        refused: CkptError = self.missing(name)
        for address in self.addresses(name):
            try:
                return open_remote(address, session=self._network())
            except CkptError as error:
                refused = error
        if self._download:
            return open_checkpoint(self.fetch(name).path)
        raise refused

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
        return name in self._locked

    def close(self) -> None:
        """Close every file."""
        for opened in self._open.values():
            opened.checkpoint.close()
        self._open.clear()


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
