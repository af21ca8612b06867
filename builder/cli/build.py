"""`ckpt build`: from a recipe to its files."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.build import build_recipe
from builder.cli.options import (
    NAME,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipe_argument,
)
from builder.cli.terminal import out
from builder.plan import Plan, explain
from builder.toolkit.command_recipe import place_of
from builder.toolkit.made import note_changes, note_left_out, note_steps, to_json, to_text


@click.command("build")
@recipe_argument
@click.option("-o", "--output", type=NAME, help="Where the output goes; its name says in which form.")
@click.option("--locked", is_flag=True, help="Fail if the lock would change, and show how.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--frozen", is_flag=True, help="Both --locked and --offline.")
@click.option("--partial", is_flag=True, help="Fetch only parts of files, on the lock's word.")
@click.option("--check", is_flag=True, help="Build everything a second time without the store, and compare.")
@click.option("--explain", "explained", is_flag=True, help="Say why each step is done or not.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@locking
@outside_option
@json_option
@quiet_option
def command(
    recipe: Path,
    output: str | None,
    locked: bool,
    offline: bool,
    frozen: bool,
    partial: bool,
    check: bool,
    explained: bool,
    threads: int | None,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Build the files of RECIPE; what is made already is reused, what is unchanged is left alone."""
    if no_lock and (locked or frozen):
        raise UsageError(Problem("`--locked` needs a lock, and `--no-lock` has none"))
    with (
        open_workspace(quiet, offline=offline or frozen, outside=outside) as workspace,
        workspace.sources() as sources,
    ):

        def before(plan: Plan) -> None:
            if explained and out().as_json:
                out().data["plan"] = explain.to_json(plan)
            elif explained:
                out().message(explain.to_text(plan))
            note_left_out(plan, workspace.reporter)
            note_steps(plan, workspace.reporter)

        read = workspace.recipe(recipe, lock_place(lock, no_lock))
        made = build_recipe(
            workspace,
            read,
            sources,
            place=place_of(read, output),
            locked=locked or frozen,
            partial=partial,
            check=check,
            explained=explained,
            threads=threads,
            before=before,
        )
        note_changes(made, workspace.reporter)
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE
