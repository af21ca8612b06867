"""Checkpoint files that are described or compared, and what of them fills a slot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from builder.models.catalog import Architecture
from builder.models.cut import cut
from builder.models.identity import Match
from builder.operations.fixes import POSITION_IDS
from builder.recipe.names import recipe_name
from builder.sources.opened import OpenSource, Sources
from builder.tensors.cast import PRECISIONS, Faults, Precision, cast_all
from builder.tensors.lazy import LazyTensor


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

    `how` is `exact` or `rounded`; `merged` where a merge makes it to the last bit, `near` where it does but
    for rounding, the file being that of its first input; or empty: the file is the described one itself.
    `promoted`: it is the file's average.
    """

    cls: str
    file: File
    match: Match
    how: str = ""

    @property
    def promoted(self) -> bool:
        """Whether this is an average that takes the place of the component that it averages."""
        return self.match.component.cls != self.cls

    @property
    def merged(self) -> bool:
        """Whether a step makes it."""
        return self.how in ("merged", "near")


def lone_name(file: File) -> str:
    """What a recipe calls a file, if nothing else has that name."""
    name = re.sub(r"[^a-z0-9_-]+", "-", recipe_name(file.path).lower()).strip("-") or "model"
    parts = [m.component.cls.partition("-")[0].lower() for m in file.opened.identity.matches]
    return f"{name}-{parts[0]}" if len(parts) == 1 and parts[0] not in name else name


def open_file(path: Path, sources: Sources) -> File:
    """A file by its table of contents; raises SourceError."""
    return File(path, sources.open(sources.file(path)), sources)


def matches_of(file: File, architecture: Architecture) -> dict[str, Match]:
    """What of a file fills slots of an architecture, by class in the order of the slots."""
    found = {m.component.cls: m for m in file.opened.identity.matches}
    return {cls: found[cls] for cls in architecture.slots if cls in found}


def rounded(tensors: Mapping[str, LazyTensor], precision: Precision) -> dict[str, LazyTensor]:
    """Tensors in a precision, whatever becomes of their values; those that have it are given as they are."""
    dtype = PRECISIONS[precision]
    if dtype is None or all(t.dtype is dtype for t in tensors.values()):
        return dict(tensors)
    cast = cast_all(tensors, precision, faults=Faults(), overflow="keep", non_finite="keep")
    return {n: tensors[n] if tensors[n].dtype is t.dtype else t for n, t in cast.items()}
