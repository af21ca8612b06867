"""`ckpt sweep`: variants of a recipe, built as one, each with a recipe of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.base.disk import write_bytes
from builder.base.errors import ExitCode, printable
from builder.build.many import read_recipes
from builder.cli.build import build_several
from builder.cli.command import Command
from builder.cli.options import (
    NAME,
    RECIPE,
    format_option,
    json_option,
    open_workspace,
    outside_option,
    quiet_option,
)
from builder.cli.several import local
from builder.cli.terminal import out
from builder.toolkit.command_recipe import check_vacant, place_in
from builder.toolkit.sweep import parse_axis, variants
from builder.workspace import find_lock


@click.command("sweep", cls=Command)
@click.argument("recipe", type=RECIPE, metavar="RECIPE")
@click.argument("axes", nargs=-1, required=True, metavar="KEY=VALUES...")
@click.option("-o", "--output", type=NAME, metavar="FOLDER", help="The folder that all outputs go into.")
@click.option("--no-build", is_flag=True, help="Write the recipes, and build nothing.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--keep-going", is_flag=True, help="Build all variants that can be built.")
@click.option("--explain", "explained", is_flag=True, help="Say why each step is done or not.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipe: Path | str,
    axes: tuple[str, ...],
    output: str | None,
    no_build: bool,
    offline: bool,
    keep_going: bool,
    explained: bool,
    threads: int | None,
    outside: bool,
    quiet: bool,
) -> int:
    """Build RECIPE once for each combination of values of its keys.

    VALUES are a range FIRST:LAST:STEP, or values with commas between them. Each variant is a recipe of its
    own, written beside RECIPE; all are built as one: what they share is read and made once.

    Example: ckpt sweep mix.toml steps.half.alpha=0.1:0.9:0.1
    """
    path = local(recipe, "`ckpt sweep`")
    asked = [parse_axis(axis) for axis in axes]
    place = place_in(output) if output is not None else None
    with open_workspace(quiet, offline=offline, outside=outside) as workspace, workspace.sources() as sources:
        read = workspace.recipe(path)
        made = variants(path, read, asked, workspace.catalog, find_lock(read))
        new = [v for v in made if not check_vacant(v.path, v.text.encode())]
        for variant in new:
            write_bytes(variant.path, variant.text.encode())
        if no_build:
            state = {v.path: "written" if v in new else "unchanged" for v in made}
            data = [{"recipe": str(p), "state": s} for p, s in state.items()]
            text = "\n".join(f"{s:<9}  {printable(str(p))}" for p, s in state.items())
            out().result({"recipes": data}, text)
            return ExitCode.DONE
        found = read_recipes(workspace, [v.path for v in made])
        how: dict[str, Any] = {"keep_going": keep_going, "explained": explained, "threads": threads}
        build_several(workspace, found, sources, place=place, **how)
    return ExitCode.DONE
