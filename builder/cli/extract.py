"""`ckpt extract`: a component of a checkpoint as a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode
from builder.cli.made import note_changes, note_steps, to_json, to_text
from builder.cli.options import (
    FILE,
    PLACE,
    making,
    open_workspace,
    output_keys,
    quantize_option,
    recipe_path,
    save_option,
)
from builder.models.parts import find_part, kind, slot_of
from builder.recipe import Pick
from builder.recipe.names import SUFFIXES, Target, recipe_name
from builder.toolkit.command_recipe import CommandRecipe, run
from builder.toolkit.extract import target_of


@click.command("extract")
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
    quantize: str | None,
    threads: int | None,
    as_json: bool,
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
        source = recipe_name(file)
        packed = {"quantize": quantize} if quantize is not None else {}
        pick = Pick(cls, source, None if match.component.cls == cls else match.component.name)
        recipe = CommandRecipe(
            f"{source}.{kind(cls).lower()}",
            {source: file},
            new=cls,
            components={cls: pick},
            fixes=fixes,
            output=output_keys(options) | packed,
        )
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
    click.echo(json.dumps(to_json(made), indent=2) if as_json else to_text(made))
    return ExitCode.DONE
