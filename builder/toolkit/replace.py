"""What it means to replace components: the slots there are, and the files for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.base.errors import Place, Problem, SourceError, UsageError, did_you_mean
from builder.base.words import spelling
from builder.models.catalog import Architecture, Catalog
from builder.models.identify import Identity
from builder.models.parts import find_part, home, kind
from builder.recipe import Pick
from builder.recipe.names import recipe_name
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import CommandRecipe, output_keys


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


def parse_part(part: str, architecture: Architecture) -> tuple[str, Path, str | None]:
    """The class, file and component of `CLASS=FILE[:COMPONENT]`; what is a file as a whole is one."""
    word, equals, rest = part.partition("=")
    if not (word and equals and rest):
        fact = f"`{part}` is not of the form CLASS=FILE or CLASS=FILE:COMPONENT"
        raise UsageError(Problem(fact, hint="as in `VAE-v1=nai.vae.pt`"))
    cls = _slot(word, architecture)
    path, colon, component = rest.rpartition(":")
    if not colon or os.path.lexists(rest) or not os.path.lexists(path):
        return cls, Path(rest), None
    return cls, Path(path), component


def _slot(word: str, architecture: Architecture) -> str:
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
    base: Path | str,
    parts: Iterable[tuple[str, Path, str | None]],
    sources: Sources,
    *,
    fixes: Sequence[str] = (),
    options: Mapping[str, Any],
) -> CommandRecipe:
    """The recipe of a file, or of a new architecture, with components of other files.

    `base` is the file or the architecture's name, `parts` are classes, files, and which component of a file
    where the class does not tell. `options` are as for `output_keys`. Raises CkptError.
    """
    catalog = sources.catalog
    if isinstance(base, str):
        architecture, files, name, new = catalog.architecture(base), {}, "model", base
    else:
        architecture = architecture_of(base, sources.open(sources.file(base)).identity, catalog)
        name, new = recipe_name(base), ""
        files = {name: base}
    picks: dict[str, Pick] = {}
    for cls, path, component in parts:
        if cls in picks:
            raise UsageError(Problem(f"`{cls}` is replaced twice", hint="name each class once"))
        identity = sources.open(sources.file(path)).identity
        match = find_part(component or cls, identity, path, catalog)
        plain = match.component.cls == cls and component is None
        picks[cls] = Pick(cls, name_of(path, files), None if plain else match.component.name)
    return CommandRecipe(
        name,
        files,
        "" if new else name,
        architecture.name if new else "",
        components=picks,
        fixes=fixes,
        output=output_keys(architecture.precision or "fp16", options),
    )


def name_of(path: Path, sources: dict[str, Path]) -> str:
    """What the recipe calls a file, which is added where it is a new one."""
    for name, known in sources.items():
        if path.samefile(known):
            return name
    name = recipe_name(path, sources)
    sources[name] = path
    return name
