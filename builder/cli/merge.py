"""`ckpt merge`: a merge in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.cli.command import Command
from builder.cli.options import PLACE, making, open_workspace, recipe_path, save_option
from builder.cli.terminal import out
from builder.plan import Plan
from builder.recipe.names import Target
from builder.toolkit.command_recipe import output_path, run
from builder.toolkit.made import note_changes, note_left_out, note_steps, to_json, to_text
from builder.toolkit.merge import merges, merging, parse_file

OPTIONS = {  # by the words that a recipe has for them
    "VAE = true": "--vae",
    'unmatched = "ignore"': "--set unmatched=ignore",
}


def _merges(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    return [name for name in merges() if name.startswith(begun)]


@click.command("merge", cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="FILE[=WEIGHT]…")
@click.option(
    "--op",
    metavar="NAME",
    shell_complete=_merges,
    help="The merge; default: weighted-sum, or with weights linear.",
)
@click.option("--alpha", metavar="VALUE", help="How much of the second file: a number, blocks, a preset.")
@click.option("--beta", metavar="VALUE", help="The other weight of merges that have one.")
@click.option("--set", "more", multiple=True, metavar="KEY=VALUE", help="Any key of the step.")
@click.option("--vae", is_flag=True, help="Merge the VAE too.")
@click.option("-o", "--output", type=PLACE, required=True, help="The file to write, or its folder.")
@making
@save_option
def command(
    models: tuple[str, ...],
    op: str | None,
    alpha: str | None,
    beta: str | None,
    more: tuple[str, ...],
    vae: bool,
    **options: Any,
) -> int:
    """Merge files into one, as a recipe with one step does it.

    \b
    ckpt merge a.safetensors b.safetensors --alpha 0.5 -o c.safetensors
    ckpt merge a.ckpt b.ckpt c.ckpt --op add-difference --alpha UNET=GRAD_V,CLIP=0 -o d.safetensors
    ckpt merge a.safetensors=0.4 b.safetensors=0.3 c.safetensors=0.3 -o d.safetensors

    VALUE is what a recipe says, or numbers and KEY=VALUE with commas between them: 0.5, 26 weights of
    blocks, the name of a preset, UNET=0.5,CLIP=0, IN00-IN03=0.1,OUT*=0.4.
    """
    params = {"alpha": alpha, "beta": beta, "VAE": "true" if vae else None}
    for text in more:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(Problem(f"`{text}` is not of the form KEY=VALUE", hint="as in `--set seed=7`"))
        if params.get(key) is not None:
            raise UsageError(Problem(f"`{key}` is given twice", hint="say it once: the step has one of it"))
        params[key] = value
    return make(models, op, {k: v for k, v in params.items() if v is not None}, **options)


def make(
    models: Sequence[str],
    op: str | None,
    params: Mapping[str, str],
    *,
    output: Target,
    save_recipe: Path | None,
    fixes: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    words: Mapping[str, str] = OPTIONS,
    **options: Any,
) -> int:
    """Build the recipe of one step over the files, and say what was made; `words` of recipes are options."""
    files = [parse_file(model) for model in models]
    save = recipe_path(save_recipe)
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        recipe = merging(files, op, params, sources, fixes, **options)
        target = output_path(output.file(f"{recipe.name}.safetensors"), recipe.sources.values())

        def before(plan: Plan) -> None:
            note_left_out(plan, workspace.reporter)
            note_steps(plan, workspace.reporter, words)

        made = run(
            recipe, target, workspace, sources, save=save, threads=threads, before=before, options=words
        )
        note_changes(made, workspace.reporter)
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE
