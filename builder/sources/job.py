"""A source of a recipe as a value: how it is known, and how it can be found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import Place
from builder.tensors.digests import expression_key

if TYPE_CHECKING:
    from builder.recipe.lock import LockedSource


@dataclass(frozen=True)
class SourceJob:
    """A source to be had, and to be hashed where its digest is not known.

    `identity` is what it is known by in a plan: the digest that is pinned, else the file that it is,
    else where it may be had from. All else says how to find it: `folder` is that of the recipe, `file`
    relative to it; `sha256`, `size` and `urls` are the recipe's, `locked` is what the lock says. `name` is
    what the recipe calls it, `entry` what the lock does, `place` where the recipe says it.
    """

    identity: str
    name: str = field(compare=False)
    entry: str = field(compare=False)
    folder: Path = field(compare=False)
    file: str | None = field(compare=False)
    sha256: str | None = field(compare=False)
    size: int | None = field(compare=False)
    urls: tuple[str, ...] = field(compare=False)
    locked: LockedSource | None = field(compare=False)
    place: Place | None = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """The key of this node of a plan."""
        return expression_key("source", 1, identity=self.identity)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The keys of what this is made of: nothing."""
        return ()


def entry_name(names: tuple[str, ...]) -> str:
    """What a source is called in the lock: its name after those of the sources that lead to its recipe."""
    return "/".join(n.replace("%", "%25").replace("/", "%2F") for n in names)
