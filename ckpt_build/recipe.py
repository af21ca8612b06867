"""A recipe, read from a file or a text, or composed of Python values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from builder.base.disk import write_bytes
from builder.base.errors import Problem
from builder.base.toml import escaped
from builder.recipe import recipe as model
from builder.recipe.recipe import FORMAT


@dataclass(frozen=True)
class Recipe:
    """A valid recipe.

    `text` is its TOML. `file` is where it was read from, and `address` where it was fetched from, None for
    one that was not; `folder` is where its relative paths begin and its outputs go. `digest` is the SHA-256,
    in hex, of its meaning: comments, order and the places of pinned sources are no part of that. `outputs`
    are the files that it makes, and `sources` what it takes from, by name: a path as it is written, or None
    where there are addresses alone. `notes` are remarks on it that are no errors.
    """

    name: str
    description: str
    text: str = field(repr=False)
    file: Path | None
    folder: Path
    digest: str
    outputs: tuple[str, ...]
    sources: Mapping[str, str | None]
    notes: tuple[Problem, ...]
    address: str | None = None
    inner: model.Recipe = field(repr=False, compare=False, kw_only=True)

    @property
    def where(self) -> str:
        """What it is known by among several: its file or address, else its name."""
        return self.address or (str(self.file) if self.file is not None else self.name)

    def save(self, file: str | Path) -> Path:
        """Write its text as a file of its own, whose folder it then speaks of; gives the path.

        Raises OutputError when it cannot be written; a file of that name is replaced.
        """
        write_bytes(Path(file), self.text.encode())
        return Path(file)


def made_of(inner: model.Recipe, file: Path | None) -> Recipe:
    """A recipe that was read; `file` is where it was, if it was a file."""
    return Recipe(
        inner.name,
        inner.description,
        inner.document.text,
        file,
        inner.path.parent if inner.path is not None and inner.address is None else Path(),
        inner.digest,
        tuple(o.file for o in inner.outputs),
        {n: s.file or s.recipe for n, s in inner.sources.items()},
        inner.notes,
        inner.address,
        inner=inner,
    )


def composed(said: Mapping[str, Any]) -> str:
    """The TOML of a recipe's keys and values; raises TypeError for a value that TOML has not."""
    keys = {"format": FORMAT, **said}
    if isinstance(sources := said.get("sources"), Mapping):
        keys["sources"] = {n: {"file": s} if isinstance(s, str | Path) else s for n, s in sources.items()}
    return escaped(tomli_w.dumps(_plain(keys)))


def _plain(value: object) -> Any:
    """A value as TOML has it: paths are strings, and what is None is not said."""
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
