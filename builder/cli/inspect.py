"""`ckpt inspect`: say what is in checkpoints, without running or loading them."""

from __future__ import annotations

import os
import re

import click

from builder.base.errors import ExitCode, FetchError, Problem, SourceError, UsageError
from builder.cli.command import Command
from builder.cli.options import json_option
from builder.cli.terminal import make_reporter, out
from builder.models.catalog import Catalog, load_catalog
from builder.reports.inspect import Refused, Report, build_report, examine, render, to_json

_ADDRESS = re.compile(r"(?:https?|hf|urn|air|civitai|sd1|sdxl):", re.IGNORECASE)


@click.command("inspect", cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option("--full", is_flag=True, help="Everything there is to say; reads all data.")
@click.option("--hashes", is_flag=True, help="The file's hashes of every kind in use; reads the whole file.")
@click.option("--metric/--no-metric", default=True, help="Read the weights, or tables of contents only.")
@json_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(files: tuple[str, ...], full: bool, hashes: bool, metric: bool, quiet: bool) -> int:
    """Say what is in checkpoints: architecture, components, metric, junk and faults.

    Reads safetensors (sharded too) and PyTorch files of every age; nothing in them is run. Of an address
    (https://…, hf://org/name/path, civitai:VERSION) the table of contents is read, where it lies.
    Exit code 1: a file is broken or unknown; 5: an address cannot be read; 6: a file is refused.
    """
    catalog = load_catalog()
    found: list[Report | Refused] = []
    codes = {ExitCode.DONE}
    with make_reporter(quiet) as reporter:
        for file in files:
            try:
                if _ADDRESS.match(file) and not os.path.exists(file):  # noqa: PTH110 - may be too long a name
                    report = _remote(file, catalog, hashes)
                else:
                    report = build_report(
                        file, catalog=catalog, full=full, metric=metric, hashes=hashes, reporter=reporter
                    )
            except (SourceError, FetchError) as error:
                found.append(Refused(file, error.problems))
                codes.add(error.exit_code)
            else:
                found.append(report)
                codes.add(ExitCode.DONE if report.sound else ExitCode.NO)
    _say(found, full)
    return max(codes)


def _remote(address: str, catalog: Catalog, hashes: bool) -> Report:
    from builder.sources.net.client import Session
    from builder.sources.net.remote import open_remote

    if hashes:
        raise UsageError(
            Problem(f"hashes of `{address}` take the whole file", hint="download it, and inspect the file")
        )
    with Session() as session, open_remote(address, session=session) as checkpoint:
        return examine(checkpoint, catalog, metric=False)


def _say(found: list[Report | Refused], full: bool) -> None:
    said = out()
    for refused in (f for f in found if isinstance(f, Refused)):
        said.fail(*refused.problems)
    texts = [
        render(f, full=full, width=said.width(), color=said.color()) for f in found if isinstance(f, Report)
    ]
    said.result(to_json(found), "\n\n".join(texts))
