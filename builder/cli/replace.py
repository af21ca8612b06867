"""`ckpt replace`: a checkpoint with components of other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode
from builder.cli.command import Command
from builder.cli.options import FILE, PLACE, making, open_workspace, recipe_path, save_option
from builder.cli.terminal import out
from builder.recipe.names import Target
from builder.toolkit.command_recipe import output_path, run
from builder.toolkit.made import note_changes, note_left_out, to_json, to_text
from builder.toolkit.replace import parse_part, replacement


@click.command("replace", cls=Command)
@click.argument("file", type=FILE, metavar="FILE|'NEW ARCHITECTURE'")
@click.argument("parts", nargs=-1, required=True, metavar="[CLASS=]FILE[:COMPONENT]…")
@click.option("-o", "--output", type=PLACE, required=True, help="The file to write, or its folder.")
@making
@save_option
def command(
    file: Path,
    parts: tuple[str, ...],
    output: Target,
    save_recipe: Path | None,
    fixes: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Write FILE with components of other files: each CLASS is that of the file after the `=`.

    \b
    ckpt replace anything.ckpt VAE-v1=nai.vae.pt -o anything-nai.safetensors
    ckpt replace anything.ckpt UNET=anything.ckpt:UNET-v1-EMA -o anything-ema.safetensors
    ckpt replace "NEW SDv1" UNET=a.safetensors CLIP=b.safetensors VAE=c.vae.pt -o d.safetensors

    A slot that FILE leaves open may be filled; NEW and an architecture have all of them open. COMPONENT
    says which one, where a file has several; a file of one component needs no CLASS.
    """
    save = recipe_path(save_recipe)
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        recipe = replacement(file, map(parse_part, parts), sources, fixes, **options)
        target = output_path(output.file(f"{recipe.name}.safetensors"), recipe.sources.values())
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
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE
