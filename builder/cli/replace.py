"""`ckpt replace`: a checkpoint with components of other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.cli.made import note_changes, note_left_out, to_json, to_text
from builder.cli.oneline import FILE, making, open_bench, output_keys, ready, recipe_path, save_option
from builder.models.parts import find_part
from builder.recipe.names import recipe_name
from builder.toolkit.look import look
from builder.toolkit.quick import Quick, output_path, run
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
    with open_bench(quiet) as bench:
        architecture = architecture_of(file, bench.catalog)
        sources = {recipe_name(file): file}
        picks: dict[str, Any] = {}
        for part in parts:
            cls, path, component = parse_part(part, architecture)
            if cls in picks:
                raise UsageError(Problem(f"`{cls}` is replaced twice", hint="name each class once"))
            match = find_part(component or cls, look(path, bench.catalog), path, bench.catalog)
            source = name_of(path, sources)
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
