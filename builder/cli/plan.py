"""`ckpt plan`: what a build would do, and why."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.cli.options import (
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipe_argument,
)
from builder.cli.terminal import out
from builder.plan import explain
from builder.workspace import find_lock


@click.command("plan")
@recipe_argument
@click.option("--dot", "form", flag_value="dot", help="A drawing for Graphviz.")
@click.option("--mermaid", "form", flag_value="mermaid", help="A drawing for Markdown.")
@click.option("--offline", is_flag=True, help="Use no network.")
@locking
@outside_option
@json_option
@quiet_option
def command(
    recipe: Path,
    form: str | None,
    offline: bool,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Say what building RECIPE would do: each step, its inputs, and why it is made or not.

    Reads tables of contents only, never tensor data; downloads nothing.
    """
    said = out()
    if said.as_json and form is not None:
        raise UsageError(Problem(f"`--json` and `--{form}` exclude each other"))
    with open_workspace(quiet, offline=offline, outside=outside) as workspace, workspace.sources() as sources:
        read = workspace.recipe(recipe, lock_place(lock, no_lock))
        plan = workspace.plan(read, sources, find_lock(read))
    if form is None:
        said.result(explain.to_json(plan), explain.to_text(plan))
    else:
        said.raw({}, explain.to_dot(plan) if form == "dot" else explain.to_mermaid(plan))
    return ExitCode.DONE
