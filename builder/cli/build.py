"""`ckpt build`: from a recipe to its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.build import build_recipe
from builder.build.many import Outcome, build_recipes, read_recipes
from builder.cli.forms import Case
from builder.cli.options import (
    NAME,
    format_option,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipes_argument,
)
from builder.cli.several import are_several, one_only, told
from builder.cli.terminal import out
from builder.plan import Plan, explain, joined
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import place_of
from builder.toolkit.made import (
    note_changes,
    note_left_out,
    note_steps,
    several_to_json,
    several_to_text,
    to_json,
    to_text,
)
from builder.workspace import Workspace


@click.command("build")
@recipes_argument
@click.option("-o", "--output", type=NAME, help="Where the output goes; its name says in which form.")
@click.option("--locked", is_flag=True, help="Fail if the lock would change, and show how.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--frozen", is_flag=True, help="Both --locked and --offline.")
@click.option("--partial", is_flag=True, help="Fetch only parts of files, on the lock's word.")
@click.option("--check", is_flag=True, help="Build everything a second time without the store, and compare.")
@click.option("--explain", "explained", is_flag=True, help="Say why each step is done or not.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@click.option("--keep-going", is_flag=True, help="Of several recipes, build all that can be built.")
@locking
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipes: tuple[Path, ...],
    output: str | None,
    locked: bool,
    offline: bool,
    frozen: bool,
    partial: bool,
    check: bool,
    explained: bool,
    threads: int | None,
    keep_going: bool,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Build the files of RECIPE; what is made already is reused, what is unchanged is left alone.

    Several recipes, or all in a folder and below it, are built as one: what they share is read and made once.
    """
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

        how: dict[str, Any] = {
            "locked": locked or frozen,
            "partial": partial,
            "check": check,
            "explained": explained,
            "threads": threads,
        }
        if are_several(recipes):
            one_only(recipes, output=output, lock=lock)
            found = read_recipes(workspace, recipes, lock_place(lock, no_lock))
            build_several(workspace, found, sources, keep_going=keep_going, **how)
            return ExitCode.DONE
        read = workspace.recipe(recipes[0], lock_place(lock, no_lock))
        made = build_recipe(workspace, read, sources, place=place_of(read, output), before=before, **how)
        note_changes(made, workspace.reporter)
    out().cases.append(Case(str(recipes[0])))
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE


def build_several(
    workspace: Workspace, outcomes: Sequence[Outcome], sources: Sources, *, explained: bool, **how: Any
) -> None:
    """Build recipes, and say what became of each; raises SeveralError where one has failed."""

    def before(plans: Sequence[Plan]) -> None:
        if explained and out().as_json:
            data = explain.to_json(joined(plans), [p.recipe for p in plans])
            out().data.setdefault("plans", []).append(data)
        elif explained:
            out().message(explain.to_text(joined(plans)))
        for plan in plans:
            note_left_out(plan, workspace.reporter)
            note_steps(plan, workspace.reporter)

    build_recipes(workspace, outcomes, sources, before=before, explained=explained, **how)
    for outcome in outcomes:
        if outcome.made is not None:
            note_changes(outcome.made, workspace.reporter)
    out().result(several_to_json(outcomes), several_to_text(outcomes))
    told(outcomes)
