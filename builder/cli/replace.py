"""`ckpt replace`: a checkpoint with components of other files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Place, Problem, SourceError, UsageError, did_you_mean
from builder.base.words import spelling
from builder.cli.made import note_changes, note_left_out, to_json, to_text
from builder.cli.oneline import FILE, making, open_bench, output_keys, ready, recipe_path, save_option
from builder.models.catalog import Architecture, Catalog
from builder.models.parts import find_part, home, kind, look
from builder.quick import Quick, output_path, run
from builder.recipe.names import recipe_name


@click.command("replace")
@click.argument("file", type=FILE)
@click.argument("parts", nargs=-1, required=True, metavar="CLASS=FILE[:COMPONENT]…")
@click.option("-o", "--output", type=FILE, required=True, help="The file to write.")
@making
@save_option
def command(
    file: Path,
    parts: tuple[str, ...],
    output: Path,
    save_recipe: Path | None,
    fixes: tuple[str, ...],
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Write FILE with components of other files: each CLASS is that of the file after the `=`.

    \b
    ckpt replace anything.ckpt VAE-v1=nai.vae.pt -o anything-nai.safetensors
    ckpt replace anything.ckpt UNET=anything.ckpt:UNET-v1-EMA -o anything-ema.safetensors

    A slot that FILE leaves open may be filled. COMPONENT says which one, where the file has several.
    """
    save, target = recipe_path(save_recipe), output_path(output, [file])
    with open_bench(quiet) as bench:
        architecture = _architecture(file, bench.catalog)
        sources = {recipe_name(file): file}
        picks: dict[str, Any] = {}
        for part in parts:
            cls, path, component = _parse(part, architecture)
            if cls in picks:
                raise UsageError(Problem(f"`{cls}` is replaced twice", hint="name each class once"))
            match = find_part(component or cls, look(path, bench.catalog), path, bench.catalog)
            source = _named(path, sources)
            plain = match.component.cls == cls and component is None
            picks[cls] = source if plain else {"from": source, "component": match.component.name}
        output_path(output, sources.values())
        quick = Quick(
            recipe_name(output),
            recipe_name(file),
            sources,
            picks,
            fixes,
            output_keys(architecture.precision or "fp16", options),
        )
        quick = ready(quick, save, bench, pin=True)
        made = run(
            quick,
            target,
            catalog=bench.catalog,
            store=bench.store,
            threads=threads,
            before=lambda plan: note_left_out(plan, bench.reporter),
            reporter=bench.reporter,
        )
        note_changes(made, bench.reporter)
        if save is not None:
            quick.save(save, target)
    click.echo(json.dumps(to_json(made), indent=2) if as_json else to_text(made))
    return ExitCode.DONE


def _architecture(file: Path, catalog: Catalog) -> Architecture:
    """What a file is, whole or in part; raises SourceError where it has no slots to be filled."""
    identity = look(file, catalog)
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


def _parse(part: str, architecture: Architecture) -> tuple[str, Path, str | None]:
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


def _named(path: Path, sources: dict[str, Path]) -> str:
    """What the recipe calls a file, which is added where it is a new one."""
    for name, known in sources.items():
        if path.samefile(known):
            return name
    name = recipe_name(path, sources)
    sources[name] = path
    return name
