"""A recipe's sources, found, opened and identified when they are first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import CkptError, FetchError
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint
from builder.identify import Identity, Match, identify
from builder.progress import Reporter
from builder.sources import Found, find_source
from builder.tensors import LazyTensor

if TYPE_CHECKING:
    from builder.catalog import Catalog
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
        spells otherwise stay so: a fix mends them.
        """
        promoted = match.component.promote if match.component.cls != cls else {}
        return {
            promoted.get(bare, match.renamed.get(bare, bare)): self.checkpoint[full]
            for bare, full in match.names.items()
        }


class Sources:
    """The sources of one recipe."""

    def __init__(
        self,
        recipe: Recipe,
        catalog: Catalog,
        store: Store,
        model_folders: Sequence[Path],
        reporter: Reporter,
        pins: Mapping[str, str],
    ) -> None:
        self.recipe = recipe
        self.catalog = catalog
        self.store = store
        self._folders = model_folders
        self._reporter = reporter
        self._pins = pins
        self._found: dict[str, Found | FetchError] = {}
        self._open: dict[str, OpenSource] = {}

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

    def provide(self, name: str, found: Found) -> None:
        """Say where a source is now, after it was fetched."""
        self._found[name] = found

    def sha256(self, name: str) -> str | None:
        """The digest of a source, pinned by the recipe or remembered; None: it is to be computed."""
        pinned = self.spec(name).sha256
        if pinned is not None:
            return pinned
        found = self.find(name)
        return found.sha256 if found is not None else self._pins.get(name)

    def open(self, name: str) -> OpenSource:
        """A source's table of contents and identity; raises CkptError when it cannot be had."""
        if name not in self._open:
            found = self.find(name)
            if found is None:
                raise self.missing(name)
            checkpoint = open_checkpoint(found.path)
            self._open[name] = OpenSource(checkpoint, identify(checkpoint, self.catalog))
        return self._open[name]

    def pinned_by_lock(self, name: str) -> bool:
        """Whether the lock says which file this was when it was last built."""
        return name in self._pins

    def close(self) -> None:
        """Close every file."""
        for opened in self._open.values():
            opened.checkpoint.close()
        self._open.clear()
