"""`ckpt prune`: checkpoints without what training left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from builder.base.errors import (
    CkptError,
    ExitCode,
    Place,
    Problem,
    SourceError,
    UsageError,
    did_you_mean,
    render,
)
from builder.cli.made import note_changes
from builder.cli.oneline import FILE, Bench, open_bench, recipe_path, save_option
from builder.cli.session import json_option, quiet_option
from builder.cli.watching import Where, watch
from builder.recipe.names import stem
from builder.tensors.cast import PRECISIONS
from builder.toolkit import prune_text
from builder.toolkit.prune import Options, Pruning, Result, checkpoints, plan_pruning, prune, vacant
from builder.toolkit.quick import output_path
from builder.toolkit.watch import SETTLE


@dataclass(frozen=True)
class Wish:
    """How to prune, where to, and what to say of it."""

    options: Options
    output: Path | None
    save: Path | None
    dry_run: bool
    names: bool
    threads: int | None
    single: bool


@click.command("prune")
@click.argument("files", nargs=-1, type=FILE, metavar="FILE|FOLDER…")
@click.option("-o", "--output", type=FILE, help="The file to write, or the folder to write in.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--keep-ema", is_flag=True, help="Keep averaged weights.")
@click.option(
    "--keep", multiple=True, metavar="KEY", help="Keep this tensor, or those of a pattern as `loss.*`."
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Round what is wider to this; by default to FP16, or BF16 where models are published so.",
)
@click.option("--force", is_flag=True, help="Also what is broken or unknown, or mostly junk.")
@click.option("-r", "--recursive", is_flag=True, help="Also in folders of FOLDER.")
@click.option("--names", is_flag=True, help="Name every tensor that goes.")
@click.option(
    "--watch", "watched", type=FILE, metavar="FOLDER", help="Prune what is in FOLDER, and what comes."
)
@click.option("--into", type=FILE, metavar="MODELS", help="Where --watch sorts it into folders; else FOLDER.")
@click.option(
    "--layout",
    metavar="PROGRAM",
    help="Whose folders MODELS has: a1111, comfyui; else told by them.",
)
@click.option("--once", is_flag=True, help="Stop when all that --watch finds is done.")
@click.option(
    "--settle", type=click.FloatRange(0), metavar="SECONDS", help="How long a file must be at rest."
)
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@save_option
@json_option
@quiet_option
def command(
    files: tuple[Path, ...],
    output: Path | None,
    dry_run: bool,
    recursive: bool,
    names: bool,
    threads: int | None,
    watched: Path | None,
    into: Path | None,
    layout: str | None,
    once: bool,
    settle: float | None,
    save_recipe: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Write FILE without EMA, junk and wasted precision, as NAME-pruned.safetensors beside it.

    Says what goes and what stays first. What nothing explains stays, and nothing is made wider. The
    metadata stay, with the name and the hashes of the original. Of a FOLDER, each checkpoint is pruned.

    With --watch, checkpoints, VAEs, LoRAs and components move on from FOLDER to the folders that programs
    look for them in, pruned; what is broken or unknown moves to FOLDER/Failed, with the reason beside it.
    """
    if watched is not None:
        if files or output or dry_run or recursive or names or save_recipe or as_json:
            raise click.UsageError("--watch goes with --into, --layout, --once and how to prune, no more")
        where = Where(watched, into, layout, once, SETTLE if settle is None else settle)
        return watch(where, Options(**options), threads, quiet)
    if into or layout or once or settle is not None:
        raise click.UsageError("--into, --layout, --once and --settle go with --watch")
    if not files:
        raise click.UsageError("name a file or a folder")
    found = list(checkpoints(files, recursive))
    single = found == list(files) and len(found) == 1
    wish = Wish(Options(**options), output, recipe_path(save_recipe), dry_run, names, threads, single)
    _check(wish, found)
    with open_bench(quiet) as bench:
        results = []
        for path in found:
            results.append(_prune(path, wish, bench, _silent if as_json or quiet else click.echo))
            for problem in results[-1].problems:
                click.echo(render(problem), err=True)
    if as_json:
        click.echo(json.dumps({"schema": 1, "files": [prune_text.to_json(r) for r in results]}, indent=2))
    else:
        said = prune_text.line(results[0]) if single else prune_text.table(results)
        if said:
            click.echo(said)
    return max((r.code for r in results), default=ExitCode.DONE)


def _check(wish: Wish, found: list[Path]) -> None:
    """Raise UsageError or OutputError for what cannot be done with these files."""
    folder = wish.output is not None and wish.output.is_dir()
    if wish.single:
        if wish.output is not None and not folder:
            output_path(wish.output, found)
        return
    if wish.save is not None:
        raise UsageError(Problem("`--save-recipe` goes with one file", hint="prune them one by one"))
    if wish.output is not None and not folder:
        fact = f"`{wish.output}` is no folder, and there may be several files to write"
        raise UsageError(Problem(fact, hint="make the folder first"))


def _silent(text: str) -> None:
    """Say nothing."""


def _prune(path: Path, wish: Wish, bench: Bench, say: Callable[[str], object]) -> Result:
    """Say what goes and what stays of a file, and do it; errors become its result."""
    pruning = None
    try:
        pruning = plan_pruning(path, bench.catalog, wish.options)
        if wish.single and pruning.unmatched:
            raise _unmatched(pruning)
        say("\n".join(prune_text.describe(pruning, wish.names)))
        named = wish.output is not None and not wish.output.is_dir()
        if pruning.checked.tidy and not named:
            return Result(path, "tidy", pruning)
        if wish.dry_run:
            return Result(path, "to do", pruning)
        made, quick = prune(
            pruning,
            wish.output if named and wish.output else _target(path, wish),
            catalog=bench.catalog,
            store=bench.store,
            threads=wish.threads,
            reporter=bench.reporter,
        )
        note_changes(made, bench.reporter)
        built = made.outputs[0]
        if wish.save is not None:
            quick.save(wish.save, built.path)
        return Result(path, built.state, pruning, built)
    except CkptError as error:
        state = "refused" if isinstance(error, SourceError) else "failed"
        return Result(path, state, pruning, problems=error.problems, code=error.exit_code)


def _target(path: Path, wish: Wish) -> Callable[[str], Path]:
    folder = wish.output if wish.output is not None else path.parent
    return lambda sha256: vacant(folder / f"{stem(path)}-pruned.safetensors", sha256)


def _unmatched(pruning: Pruning) -> UsageError:
    word = pruning.unmatched[0]
    fact = f"there is no tensor `{word}` to keep"
    return UsageError(
        Problem(fact, Place(str(pruning.path)), hint=did_you_mean(word, pruning.report.tensors))
    )
