"""`ckpt share`: what a page about a model needs."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError, printable
from builder.cli.command import Command
from builder.cli.options import (
    FILE,
    json_option,
    open_workspace,
    quiet_option,
    recipe_argument,
)
from builder.cli.terminal import out
from builder.toolkit.share import share


@click.command("share", cls=Command)
@recipe_argument
@click.option("-o", "--output", type=FILE, metavar="FOLDER", help="Default: NAME-page beside RECIPE.")
@click.option("--offline", is_flag=True, help="Ask no host about licences.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, help="Threads to use.")
@json_option
@quiet_option
def command(recipe: Path | str, output: Path | None, offline: bool, threads: int, quiet: bool) -> int:
    """Write a folder with what a page about the model of RECIPE needs.

    The recipe, its lock, a model card with front matter (README.md) and the fields that Civitai asks for
    (civitai.json). Licences that contradict each other are warned of.
    """
    if isinstance(recipe, str):
        raise UsageError(Problem("a recipe is shared from where it was built", hint="name its file"))
    with open_workspace(quiet, offline=offline) as workspace, workspace.sources() as sources:
        shared = share(workspace.recipe(recipe), workspace, sources, output, threads)
    data = {"folder": str(shared.folder), "files": list(shared.files), "page": shared.fields}
    lines = [f"made  {shared.folder}", *(f"      {name}" for name in shared.files)]
    out().result(data, "\n".join(map(printable, lines)))
    return ExitCode.DONE
