"""What it means to replace components: the slots there are, and the files for them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from builder.base.errors import Place, Problem, SourceError, UsageError, did_you_mean
from builder.models.catalog import Architecture, Catalog
from builder.models.identity import Identity
from builder.models.parts import find_part, home, kind, meant, slot_of
from builder.recipe import Pick
from builder.recipe.names import recipe_name
from builder.recipe.values import NEW
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import CommandRecipe, output_keys

Part = tuple[str, Path, str | None]  # a class or kind, if any, the file, and which component of that


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


def new_architecture(said: str, catalog: Catalog) -> Architecture | None:
    """What `NEW ARCHITECTURE` names; None for what is a file. Raises UsageError for an unknown one."""
    word, _, name = said.partition(" ")
    if word.upper() != NEW or os.path.lexists(said):
        return None
    if not name.strip():
        raise UsageError(Problem(f"`{said}` names no architecture", hint=f'as in `"{NEW} SD-v1"`'))
    return catalog.architecture(name.strip())


def check_filled(architecture: Architecture, given: Collection[str]) -> None:
    """Raise UsageError for slots of a new model that nothing fills."""
    if absent := [cls for cls in architecture.slots if cls not in given]:
        kinds = [kind(cls) for cls in architecture.slots]
        words = [kind(cls) if kinds.count(kind(cls)) == 1 else cls for cls in absent]
        fact = f"{architecture.name} has slots that nothing fills: {', '.join(f'`{cls}`' for cls in absent)}"
        raise UsageError(Problem(fact, hint=f"add {' '.join(f'`{word}=FILE`' for word in words)}"))


def find_parts(
    parts: Iterable[Part],
    architecture: Architecture,
    files: dict[str, Path],
    sources: Sources,
    catalog: Catalog,
) -> dict[str, Pick]:
    """What fills slots, by class; `files` gets the names of the files.

    Raises UsageError for a slot that there is not, or is filled twice, SourceError for a file that cannot be
    read.
    """
    picks: dict[str, Pick] = {}
    for word, path, component in parts:
        identity = sources.open(sources.file(path)).identity
        cls = slot(word, architecture) if word else _only_slot(path, identity, architecture, catalog)
        if cls in picks:
            raise UsageError(Problem(f"`{cls}` is filled twice", hint="name each class once"))
        match = find_part(component or cls, identity, path, catalog)
        plain = match.component.cls == cls and component is None
        picks[cls] = Pick(cls, name_of(path, files), None if plain else match.component.name)
    return picks


def parse_part(part: str) -> Part:
    """The class, if any, the file and the component of a part; what is a file as a whole is one."""
    word, equals, rest = part.partition("=")
    if not equals or os.path.lexists(part):
        word, rest = "", part
    if not rest or (equals and not word and rest != part):
        fact = f"`{part}` is not of the form CLASS=FILE or CLASS=FILE:COMPONENT"
        raise UsageError(Problem(fact, hint="as in `VAE-v1=nai.vae.pt`"))
    path, colon, component = rest.rpartition(":")
    if not colon or os.path.lexists(rest) or not os.path.lexists(path):
        return word, Path(rest), None
    return word, Path(path), component


def _only_slot(path: Path, identity: Identity, architecture: Architecture, catalog: Catalog) -> str:
    """The slot for the only component of a file."""
    slots = dict.fromkeys(slot_of(m, catalog) for m in identity.matches)
    found = [cls for cls in slots if cls in architecture.slots]
    if len(found) == 1:
        return found[0]
    held = f"it holds {', '.join(f'`{c}`' for c in slots) or 'nothing that the catalog knows'}"
    fact = f"`{path}` has {'several components' if found else 'no component'} for {architecture.name}"
    hint = f"say which: `{kind(found[0])}={path}`" if found else None
    raise UsageError(Problem(fact, evidence=(held,), hint=hint))


def slot(word: str, architecture: Architecture) -> str:
    """The slot that a word means: its class, or its kind (`VAE`); raises UsageError where there is none."""
    found = meant(word, architecture.slots)
    if len(found) == 1:
        return found[0]
    if found:
        several = " or ".join(f"`{cls}`" for cls in found)
        raise UsageError(Problem(f"`{word}` may be {several}", hint="name the one you mean"))
    slots = ", ".join(f"`{s}`" for s in architecture.slots)
    hint = did_you_mean(word, architecture.slots)
    raise UsageError(
        Problem(f"{architecture.name} has no slot `{word}`", evidence=(f"it has {slots}",), hint=hint)
    )


def replacement(
    file: str | Path, parts: Iterable[Part], sources: Sources, fixes: Sequence[str] = (), **output: str | None
) -> CommandRecipe:
    """The recipe of a file, or of `NEW ARCHITECTURE`, with components of others.

    `output` is as for `output_keys`. Raises UsageError for a slot that there is not, is filled twice or
    stays empty, SourceError for a file that cannot be read.
    """
    catalog, path, parts = sources.catalog, Path(file), list(parts)
    new = new_architecture(str(file), catalog)
    sources.check_there([*([] if new else [path]), *(part for _, part, _ in parts)])
    name = new.name.lower() if new else recipe_name(path)
    architecture = new or architecture_of(path, sources.open(sources.file(path)).identity, catalog)
    files = {} if new else {name: path}
    picks = find_parts(parts, architecture, files, sources, catalog)
    if new:
        check_filled(new, picks)
    return CommandRecipe(
        name,
        files,
        base="" if new else name,
        new=new.name if new else "",
        components=picks,
        fixes=fixes,
        output=output_keys(**output),
    )


def name_of(path: Path, sources: dict[str, Path]) -> str:
    """What the recipe calls a file, which is added where it is a new one."""
    for name, known in sources.items():
        if path.samefile(known):
            return name
    name = recipe_name(path, sources)
    sources[name] = path
    return name
