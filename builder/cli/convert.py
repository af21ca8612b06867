"""`ckpt convert`: the same tensors in another container, precision or layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.base.errors import ExitCode, Problem, UsageError, printable
from builder.base.progress import human_bytes
from builder.base.words import counted
from builder.cli.command import Command
from builder.cli.options import (
    FILE,
    NAME,
    json_option,
    open_workspace,
    quantize_option,
    quiet_option,
    recipe_path,
    save_option,
)
from builder.cli.sizes import parse_size
from builder.cli.terminal import out
from builder.tensors.cast import PRECISIONS
from builder.toolkit.convert import convert
from builder.toolkit.made import without_tokenizer


@click.command("convert", cls=Command)
@click.argument("source", metavar="FILE", type=FILE)
@click.option(
    "-o",
    "--output",
    type=NAME,
    required=True,
    metavar="FILE",
    help="What to write; its name says in which form.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Of the weights; kept by default, but beside blocks of GGUF as such models are published.",
)
@quantize_option
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
    type=FILE,
    metavar="FOLDER",
    help="With CLIP's vocab.json and merges.txt, or a model's tokenizers; for a diffusers folder.",
)
@click.option(
    "--repair", is_flag=True, help="Of a broken safetensors file, take what no tensor suffers from as it is."
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=2, help="Threads to use; the bytes are the same."
)
@save_option
@json_option
@quiet_option
def command(source: Path, output: str, save_recipe: Path | None, quiet: bool, **options: Any) -> int:
    """Write every tensor of FILE in another container, precision or layout.

    FILE is a safetensors, PyTorch or GGUF file, a sharded set's index, or a model's folder in the diffusers
    layout. The output's name says what is made: NAME.safetensors; NAME.ckpt, .pt, .pth or .bin, a plain
    dict of tensors; NAME.gguf, of a diffusion model alone; NAME.safetensors.index.json, a sharded set; a name
    without suffix, a diffusers folder.
    """
    save = recipe_path(save_recipe)
    if save is not None and options["repair"]:
        raise UsageError(Problem("no recipe reads a broken file", hint="repair it first, under another name"))
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        made = convert(source, output, workspace, sources, save=save, **options)
        for lost in made.lost:
            workspace.reporter.note(f"not carried over: {lost}")
        if made.lacking:
            way = "`--tokenizer FOLDER` adds it"
            workspace.reporter.note(without_tokenizer(made.lacking if made.tokenizer else (), way))
    data = {
        "path": str(made.path),
        "form": made.form,
        "size": made.size,
        "tensors": made.tensors,
        "lost": list(made.lost),
    }
    said = f"made  {made.path}  {human_bytes(made.size)}, {counted(made.tensors, 'tensor')}"
    out().result(data, printable(said))
    return ExitCode.DONE
