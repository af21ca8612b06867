"""`ckpt replace`: a checkpoint with components of other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode
from builder.cli.options import FILE, making, open_workspace, recipe_path, save_option
from builder.toolkit.command_recipe import output_path, run
from builder.toolkit.made import note_changes, note_left_out, to_json, to_text
from builder.toolkit.replace import architecture_of, parse_part, replacement


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
        architecture = architecture_of(file, sources.open(sources.file(file)).identity, workspace.catalog)
        asked = [parse_part(part, architecture) for part in parts]
        recipe = replacement(file, architecture, asked, sources, fixes, **options)
        output_path(output, recipe.sources.values())
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
