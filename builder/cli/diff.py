"""`ckpt diff`: what tells two checkpoints apart, and why."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode
from builder.cli.command import Command
from builder.cli.options import FILE, json_option, open_workspace
from builder.cli.terminal import out
from builder.reports.diff import compare, render, to_json


@click.command("diff", cls=Command)
@click.argument("a", type=FILE, metavar="A")
@click.argument("b", type=FILE, metavar="B")
@click.option(
    "--full", is_flag=True, help="Every tensor that differs, and every one that one file has alone."
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=2, help="Threads to use; the answer is the same."
)
@json_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(a: Path, b: Path, full: bool, threads: int, quiet: bool) -> int:
    """Say what tells two checkpoints apart: header, components, names, types, shapes, values, and why.

    The files may be in any containers. Exit code 0: the tensors are the same, by name, type, shape and
    every bit, though headers may differ; 1: they differ; 6: a file is refused.
    """
    with open_workspace(quiet) as workspace:
        diff = compare(a, b, catalog=workspace.catalog, threads=threads, reporter=workspace.reporter)
    said = out()
    said.result(to_json(diff, full), render(diff, full=full, width=said.width(), color=said.color()))
    return ExitCode.DONE if diff.same else ExitCode.NO
