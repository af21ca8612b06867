"""`ckpt replace`: a checkpoint with components of other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.cli.options import FILE, making, open_workspace, output_keys, recipe_path, save_option
from builder.models.parts import find_part
from builder.recipe import Pick
from builder.recipe.names import recipe_name
from builder.toolkit.command_recipe import CommandRecipe, output_path, run
from builder.toolkit.made import note_changes, note_left_out, to_json, to_text
from builder.toolkit.replace import architecture_of, name_of, parse_part


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
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        catalog = workspace.catalog
        architecture = architecture_of(file, sources.open(sources.file(file)).identity, catalog)
        files = {recipe_name(file): file}
        picks: dict[str, Pick] = {}
        for part in parts:
            cls, path, component = parse_part(part, architecture)
            if cls in picks:
                raise UsageError(Problem(f"`{cls}` is replaced twice", hint="name each class once"))
            identity = sources.open(sources.file(path)).identity
            match = find_part(component or cls, identity, path, catalog)
            plain = match.component.cls == cls and component is None
            picks[cls] = Pick(cls, name_of(path, files), None if plain else match.component.name)
        output_path(output, files.values())
        recipe = CommandRecipe(
            recipe_name(file),
            files,
            recipe_name(file),
            components=picks,
            fixes=fixes,
            output=output_keys(architecture.precision or "fp16", options),
        )
        made = run(
            recipe,
            target,
            workspace,
            sources,
            save=save,
            threads=threads,
            before=lambda plan: note_left_out(plan, workspace.reporter),
        )
        note_changes(made, workspace.reporter)
    click.echo(json.dumps(to_json(made), indent=2) if as_json else to_text(made))
    return ExitCode.DONE
