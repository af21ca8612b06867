"""`ckpt plan`: what a build would do, and why."""

from __future__ import annotations

import json
from pathlib import Path

import click

from builder.base.errors import ExitCode
from builder.cli.options import (
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipe_argument,
)
from builder.plan import explain
from builder.workspace import find_lock


@click.command("plan")
@recipe_argument
@click.option("--json", "form", flag_value="json", help="One JSON object on stdout.")
@click.option("--dot", "form", flag_value="dot", help="A drawing for Graphviz.")
@click.option("--mermaid", "form", flag_value="mermaid", help="A drawing for Markdown.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--store", "shared", metavar="URL", help="A store that machines share.")
@locking
@outside_option
@quiet_option
def command(
    recipe: Path,
    form: str | None,
    offline: bool,
    shared: str | None,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Say what building RECIPE would do: each step, its inputs, and why it is made or not.

    Reads tables of contents only, never tensor data; downloads nothing.
    """
    with (
        open_workspace(quiet, offline=offline, outside=outside, shared=shared) as workspace,
        workspace.sources() as sources,
    ):
        read = workspace.recipe(recipe, lock_place(lock, no_lock))
        plan = workspace.plan(read, sources, find_lock(read))
    if form == "json":
        click.echo(json.dumps(explain.to_json(plan), indent=2))
    elif form == "dot":
        click.echo(explain.to_dot(plan))
    elif form == "mermaid":
        click.echo(explain.to_mermaid(plan))
    else:
        click.echo(explain.to_text(plan))
    return ExitCode.DONE
