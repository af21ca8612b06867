"""`ckpt plan`: what a build would do, and why."""

from __future__ import annotations

import json
from pathlib import Path

import click

from builder.base.errors import ExitCode
from builder.cli.session import open_session, quiet_option, recipe_argument
from builder.cli.terminal import make_reporter
from builder.plan import explain


@click.command("plan")
@recipe_argument
@click.option("--json", "form", flag_value="json", help="One JSON object on stdout.")
@click.option("--dot", "form", flag_value="dot", help="A drawing for Graphviz.")
@click.option("--mermaid", "form", flag_value="mermaid", help="A drawing for Markdown.")
@click.option("--offline", is_flag=True, help="Use no network.")
@quiet_option
def command(recipe: Path, form: str | None, offline: bool, quiet: bool) -> int:
    """Say what building RECIPE would do: each step, its inputs, and why it is made or not.

    Reads tables of contents only, never tensor data; downloads nothing.
    """
    with (
        make_reporter(quiet) as reporter,
        open_session(recipe, reporter, offline=offline) as session,
        session.plan() as plan,
    ):
        if form == "json":
            click.echo(json.dumps(explain.to_json(plan), indent=2))
        elif form == "dot":
            click.echo(explain.to_dot(plan))
        elif form == "mermaid":
            click.echo(explain.to_mermaid(plan))
        else:
            click.echo(explain.to_text(plan))
    return ExitCode.DONE
