"""`ckpt extract`: a component of a checkpoint as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode
from builder.cli.command import Command
from builder.cli.options import (
    FILE,
    PLACE,
    making,
    open_workspace,
    quantize_option,
    recipe_path,
    save_option,
)
from builder.cli.terminal import out
from builder.models.parts import find_part, slot_of
from builder.recipe.names import SUFFIXES, Target
from builder.toolkit.command_recipe import run
from builder.toolkit.extract import extraction, target_of
from builder.toolkit.made import note_changes, note_steps, to_json, to_text


@click.command("extract", cls=Command)
@click.argument("file", type=FILE)
@click.argument("component", metavar="COMPONENT|CLASS")
@click.option("-o", "--output", type=PLACE, help="The file to write, or the folder to write it in.")
@click.option("--format", "form", type=click.Choice([s[1:] for s in SUFFIXES]), help="Of the file written.")
@making
@quantize_option
@save_option
def command(
    file: Path,
    component: str,
    output: Target | None,
    form: str | None,
    save_recipe: Path | None,
    fixes: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Write a component of FILE, by its name or class, as a file of its own, named as programs load it.

    FILE is a full checkpoint or a component alone. An average (EMA) comes out with the names of what it
    averages. Without -o the file goes beside FILE, named after it, the metric and the class, as in
    anything-2982.vae.safetensors; what has that name already stays.
    """
    save = recipe_path(save_recipe)
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        catalog = workspace.catalog
        identity = sources.open(sources.file(file)).identity
        match = find_part(component, identity, file, catalog)
        cls = slot_of(match, catalog)
        target, naming = target_of(file, match, cls, output, form, workspace)
        recipe = extraction(file, match, cls, fixes, **options)
        made = run(
            recipe,
            target,
            workspace,
            sources,
            naming=naming,
            save=save,
            hashing=False,
            threads=threads,
            before=lambda plan: note_steps(plan, workspace.reporter),
        )
        note_changes(made, workspace.reporter)
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE
