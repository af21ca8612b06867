"""`ckpt extract`: a component of a checkpoint as a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode
from builder.cli.made import note_changes, to_json, to_text
from builder.cli.oneline import FILE, making, open_bench, output_keys, ready, recipe_path, save_option
from builder.models.parts import find_part, kind, slot_of, usual_precision
from builder.recipe.names import WRITTEN, recipe_name
from builder.toolkit.extract import target_of
from builder.toolkit.look import look
from builder.toolkit.quick import Quick, run


@click.command("extract")
@click.argument("file", type=FILE)
@click.argument("component", metavar="COMPONENT|CLASS")
@click.option("-o", "--output", type=FILE, help="The file to write, or the folder to write it in.")
@click.option("--format", "form", type=click.Choice([s[1:] for s in WRITTEN]), help="Of the file written.")
@making
@save_option
def command(
    file: Path,
    component: str,
    output: Path | None,
    form: str | None,
    save_recipe: Path | None,
    fixes: tuple[str, ...],
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Write a component of FILE, by its name or class, as a file of its own under unprefixed names.

    FILE is a full checkpoint or a component alone. An average (EMA) comes out with the names of what it
    averages. Without -o the file goes beside FILE, named after it, the metric and the class, as in
    anything-2982.vae.safetensors; what has that name already stays.
    """
    save = recipe_path(save_recipe)
    with open_bench(quiet) as bench:
        identity = look(file, bench.catalog)
        match = find_part(component, identity, file, bench.catalog)
        cls = slot_of(match, bench.catalog)
        target = target_of(file, match, cls, output, form, bench.catalog)
        source = recipe_name(file)
        pick = source if match.component.cls == cls else {"from": source, "component": match.component.name}
        quick = Quick(
            f"{source}.{kind(cls).lower()}",
            f"NEW {cls}",
            {source: file},
            {cls: pick},
            fixes,
            output_keys(usual_precision(cls, identity, bench.catalog), options),
        )
        quick = ready(quick, save, bench, pin=False)
        made = run(
            quick,
            target,
            catalog=bench.catalog,
            store=bench.store,
            hashing=save is not None,
            threads=threads,
            reporter=bench.reporter,
        )
        note_changes(made, bench.reporter)
        if save is not None:
            quick.save(save, made.outputs[0].path)
    click.echo(json.dumps(to_json(made), indent=2) if as_json else to_text(made))
    return ExitCode.DONE
