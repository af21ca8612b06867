"""`ckpt convert`: the same tensors in another container, precision or layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from builder.catalog import load_catalog
from builder.cli.session import json_option, quiet_option
from builder.cli.sizes import parse_size
from builder.cli.terminal import make_reporter
from builder.convert import convert
from builder.errors import ExitCode
from builder.numeric import PRECISIONS
from builder.progress import human_bytes


@click.command("convert")
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="What to write; its name says in which form."
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="keep",
    help="Of the weights; kept by default.",
)
@click.option(
    "--shard-size", metavar="SIZE", callback=parse_size, help="Most bytes of tensors a file, such as 2GB."
)
@click.option(
    "--overflow",
    type=click.Choice(["error", "clamp", "keep"]),
    default="error",
    help="What to do with values beyond the new precision.",
)
@click.option(
    "--non-finite",
    type=click.Choice(["error", "keep"]),
    default="error",
    help="What to do with NaN and infinity, when the precision changes.",
)
@click.option(
    "--prediction",
    type=click.Choice(["epsilon", "v"]),
    help="What the model predicts, where it does not say; for a diffusers folder.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Holds CLIP's vocab.json and merges.txt; for a diffusers folder.",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=2, help="Threads to use; the bytes are the same."
)
@json_option
@quiet_option
def command(source: Path, output: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Write every tensor of FILE in another container, precision or layout.

    FILE is a safetensors or PyTorch file, a sharded set's index, or a model's folder in the diffusers
    layout. The output's name says what is made: NAME.safetensors; NAME.ckpt, .pt, .pth or .bin, a plain
    dict of tensors; NAME.safetensors.index.json, a sharded set; a name without suffix, a diffusers folder.
    """
    with make_reporter(quiet) as reporter:
        made = convert(source, output, catalog=load_catalog(), reporter=reporter, **options)
        for lost in made.lost:
            reporter.note(f"not carried over: {lost}")
    if as_json:
        said = {
            "schema": 1,
            "path": str(made.path),
            "form": made.form,
            "size": made.size,
            "tensors": made.tensors,
            "lost": list(made.lost),
        }
        click.echo(json.dumps(said, indent=2))
    else:
        click.echo(f"made  {made.path}  {human_bytes(made.size)}, {made.tensors:,} tensors")
    return ExitCode.DONE
