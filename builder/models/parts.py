"""Which component of a file a word means, and how it is usually written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from builder.base.errors import Place, Problem, UsageError, did_you_mean
from builder.base.words import spelling
from builder.models.catalog import Architecture, Catalog
from builder.models.identity import Identity, Match
from builder.tensors.packed.decode import WIDER


def find_part(word: str, identity: Identity, path: Path, catalog: Catalog) -> Match:
    """The component of a file that is meant by its name, its class, or its kind (`VAE`) where it has one.

    Case, dashes and spaces do not matter. Raises UsageError when there is none.
    """
    said = spelling(word)
    ways = (
        [m for m in identity.matches if spelling(m.component.name) == said],
        [m for m in identity.matches if spelling(m.component.cls) == said],
        [m for m in identity.matches if spelling(kind(m.component.cls)) == said],
    )
    for found in ways:
        if len(found) == 1:
            return found[0]
    raise UsageError(_absent(word, ways[2], identity, path, catalog))


def words_for(match: Match) -> tuple[str, str]:
    """The words that mean a component of a file: its class and its name."""
    return match.component.cls, match.component.name


def slot_of(match: Match, catalog: Catalog) -> str:
    """The class that a component is of once it has ordinary names, as EMA does when it is taken."""
    base = match.component.base
    return catalog.component(base).cls if base is not None else match.component.cls


def meant(word: str, classes: Iterable[str]) -> tuple[str, ...]:
    """The classes that a word means: one by its name, else all of the kind (`VAE`)."""
    said, known = spelling(word), tuple(classes)
    named = tuple(cls for cls in known if spelling(cls) == said)
    return named or tuple(cls for cls in known if spelling(kind(cls)) == said)


def kind(cls: str) -> str:
    """The first word of a class: `VAE` of `VAE-v1`."""
    return cls.partition("-")[0]


def home(identity: Identity, catalog: Catalog) -> Architecture | None:
    """The architecture that a file is of, whole or in part; None for what is none."""
    name = identity.architecture if identity.intact else identity.incomplete
    return catalog.architectures.get(name or "")


def _absent(word: str, alike: list[Match], identity: Identity, path: Path, catalog: Catalog) -> Problem:
    held = [m.component for m in identity.matches]
    names = [w for c in held for w in (c.cls, c.name, kind(c.cls))]
    holds = f"it holds {', '.join(f'`{c.name}`' for c in held) or 'nothing that the catalog knows'}"
    place = Place(str(path))
    if alike:
        several = ", ".join(f"`{m.component.cls}`" for m in alike)
        return Problem(f"`{word}` may be {several}", place, hint="name the one you mean")
    said = spelling(word)
    words = (*catalog.components, *catalog.classes, *map(kind, catalog.classes))
    known = next((w for w in words if spelling(w) == said), None)
    if known is None:
        hint = did_you_mean(word, names) or did_you_mean(word, words)
        return Problem(f"no component or class is called `{word}`", place, (holds,), hint)
    rejected = [
        r for r in identity.rejected if known in (r.component.name, r.component.cls) and r.outdone_by is None
    ]
    near = [r.describe() for r in rejected]
    twin = next((c for c in held if c.base and known in (c.base, catalog.component(c.base).cls)), None)
    hint = rejected[0].hint if rejected else None
    hint = WIDER if identity.undecoded else hint
    hint = f"`{twin.name}` is an average that can take its place" if twin is not None else hint
    evidence = (*near[:2], holds, *identity.undecoded)
    return Problem(f"there is no `{known}` in this file", place, evidence, hint)
