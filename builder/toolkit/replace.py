"""What it means to replace components: the slots there are, and the files for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from builder.base.errors import Place, Problem, SourceError, UsageError, did_you_mean
from builder.base.words import spelling
from builder.models.catalog import Architecture, Catalog
from builder.models.identify import Identity
from builder.models.parts import find_part, home, kind
from builder.recipe import Pick
from builder.recipe.names import recipe_name
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import CommandRecipe, output_keys

Part = tuple[str, Path, str | None]  # a class, the file that fills it, and which component of that


def architecture_of(file: Path, identity: Identity, catalog: Catalog) -> Architecture:
    """What a file is, whole or in part; raises SourceError where it has no slots to be filled."""
    found = home(identity, catalog)
    if found is not None:
        return found
    what = f"it is `{identity.architecture}`" if identity.architecture else "nothing in the catalog matches"
    raise SourceError(
        Problem(
            "this is no full checkpoint whose components could be replaced",
            Place(str(file)),
            (what,),
            "`ckpt inspect` says what is in it",
        )
    )


def parse_part(part: str, architecture: Architecture) -> Part:
    """The class, file and component of `CLASS=FILE[:COMPONENT]`; what is a file as a whole is one."""
    word, equals, rest = part.partition("=")
    if not (word and equals and rest):
        fact = f"`{part}` is not of the form CLASS=FILE or CLASS=FILE:COMPONENT"
        raise UsageError(Problem(fact, hint="as in `VAE-v1=nai.vae.pt`"))
    cls = slot(word, architecture)
    path, colon, component = rest.rpartition(":")
    if not colon or os.path.lexists(rest) or not os.path.lexists(path):
        return cls, Path(rest), None
    return cls, Path(path), component


def slot(word: str, architecture: Architecture) -> str:
    """The slot that a word means: its class, or its kind (`VAE`); raises UsageError where there is none."""
    said = spelling(word)
    for found in (
        [s for s in architecture.slots if spelling(s) == said],
        [s for s in architecture.slots if spelling(kind(s)) == said],
    ):
        if len(found) == 1:
            return found[0]
    slots = ", ".join(f"`{s}`" for s in architecture.slots)
    hint = did_you_mean(word, architecture.slots)
    raise UsageError(
        Problem(f"{architecture.name} has no slot `{word}`", evidence=(f"it has {slots}",), hint=hint)
    )


def replacement(
    file: Path | None,
    architecture: Architecture,
    parts: Iterable[Part],
    sources: Sources,
    fixes: Sequence[str] = (),
    **output: str | None,
) -> CommandRecipe:
    """The recipe of a file with components of others; `output` as for `output_keys`.

    Without a file, that of a new model of the architecture, every slot of which is to be filled. Raises
    UsageError for a class that is replaced twice, and for what a file does not have.
    """
    name = recipe_name(file) if file is not None else "model"
    files = {name: file} if file is not None else {}
    picks: dict[str, Pick] = {}
    for cls, path, component in parts:
        if cls in picks:
            raise UsageError(Problem(f"`{cls}` is replaced twice", hint="name each class once"))
        identity = sources.open(sources.file(path)).identity
        match = find_part(component or cls, identity, path, sources.catalog)
        plain = match.component.cls == cls and component is None
        picks[cls] = Pick(cls, _name_of(path, files), None if plain else match.component.name)
    keys = output_keys(architecture.precision or "fp16", **output)
    base, new = (name, "") if file is not None else ("", architecture.name)
    return CommandRecipe(name, files, base, new, components=picks, fixes=fixes, output=keys)


def _name_of(path: Path, sources: dict[str, Path]) -> str:
    """What the recipe calls a file, which is added where it is a new one."""
    for name, known in sources.items():
        if path.samefile(known):
            return name
    name = recipe_name(path, sources)
    sources[name] = path
    return name
