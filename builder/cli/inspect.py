"""`ckpt inspect`: say what is in checkpoints, without running or loading them."""

from __future__ import annotations

import json
import os
import shutil
import sys

import click

from builder.catalog import load_catalog
from builder.cli.terminal import is_terminal, make_reporter
from builder.errors import ExitCode, SourceError
from builder.errors import render as render_problem
from builder.report import Refused, Report, build_report, render, to_json


@click.command("inspect")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option("--full", is_flag=True, help="Everything there is to say; reads all data.")
@click.option("--hashes", is_flag=True, help="The file's hashes of every kind in use; reads the whole file.")
@click.option("--metric/--no-metric", default=True, help="Read the weights, or tables of contents only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout (docs/inspect.md).")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(
    files: tuple[str, ...], full: bool, hashes: bool, metric: bool, as_json: bool, quiet: bool
) -> int:
    """Say what is in checkpoints: architecture, components, metric, junk and faults.

    Reads safetensors (sharded too) and PyTorch files of every age; nothing in them is run.
    Exit code 1: a file is broken or unknown; 6: one is refused.
    """
    catalog = load_catalog()
    found: list[Report | Refused] = []
    with make_reporter(quiet) as reporter:
        for path in files:
            try:
                report = build_report(
                    path, catalog=catalog, full=full, metric=metric, hashes=hashes, reporter=reporter
                )
            except SourceError as error:
                found.append(Refused(path, error.problems))
            else:
                found.append(report)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    else:
        _say(found, full)
    if any(isinstance(f, Refused) for f in found):
        return ExitCode.SOURCE
    return ExitCode.DONE if all(f.sound for f in found if isinstance(f, Report)) else ExitCode.NO


def _say(found: list[Report | Refused], full: bool) -> None:
    terminal = is_terminal(sys.stdout)
    width = shutil.get_terminal_size().columns if terminal else None
    color = terminal and not os.environ.get("NO_COLOR")
    for refused in (f for f in found if isinstance(f, Refused)):
        click.echo("\n\n".join(render_problem(p) for p in refused.problems), err=True)
    texts = [render(f, full=full, width=width, color=color) for f in found if isinstance(f, Report)]
    if texts:
        click.echo("\n\n".join(texts))
