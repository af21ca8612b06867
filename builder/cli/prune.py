"""`ckpt prune`: checkpoints without what training left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from builder.base.disk import making_folders
from builder.base.errors import CkptError, ExitCode, Problem, SourceError, UsageError
from builder.cli.command import Command
from builder.cli.options import (
    FILE,
    PLACE,
    json_option,
    open_workspace,
    quiet_option,
    recipe_path,
    repairing,
    save_option,
)
from builder.cli.terminal import out
from builder.cli.watching import Where, watch
from builder.operations.fixes import FIXES
from builder.recipe.names import Target, free_name, named, stem
from builder.tensors.cast import PRECISIONS
from builder.toolkit import prune_text
from builder.toolkit.command_recipe import output_path, vacant
from builder.toolkit.made import note_changes
from builder.toolkit.prune import Options, Result, checkpoints, copy, plan_pruning, prune, unmatched
from builder.toolkit.watch import SETTLE
from builder.workspace import Workspace


@dataclass(frozen=True)
class Request:
    """How to prune, where to, and what to say of it."""

    options: Options
    output: Target | None
    save: Path | None
    dry_run: bool
    names: bool
    threads: int | None
    single: bool


@click.command("prune", cls=Command)
@click.argument("files", nargs=-1, type=FILE, metavar="FILE|FOLDER…")
@click.option("-o", "--output", type=PLACE, help="The file to write, or the folder to write in.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--keep-ema", is_flag=True, help="Keep averaged weights.")
@click.option(
    "--keep",
    multiple=True,
    metavar="KEY",
    help="Keep this tensor, those of a pattern as `loss.*`, or the component of a class.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Round what has no fewer bits to this; by default what is wider than 16 bits.",
)
@repairing
@click.option("--force", is_flag=True, help="Also what is broken or unknown, or mostly junk.")
@click.option("-r", "--recursive", is_flag=True, help="Also in folders of FOLDER, watched or not.")
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
    output: Target | None,
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
    quiet: bool,
    **options: Any,
) -> int:
    """Write FILE without EMA, junk and wasted precision, as NAME-pruned.safetensors beside it.

    Says what goes and what stays first. What nothing explains stays, and nothing is made wider. The
    metadata stay, with the name and the size of the original. Of a FOLDER, each checkpoint is pruned; with
    -o, what needs no pruning is copied there.

    With --watch, models, parts of models, LoRAs, embeddings and the like move on from FOLDER to the folders
    that programs look for them in, pruned; what is unknown stays, and what is broken moves to
    FOLDER/Failed, with the reason beside it.
    """
    options["fixes"] = tuple(n for n in FIXES if n in options["fixes"])
    if watched is not None:
        if files or output or dry_run or names or save_recipe:
            fact = "--watch goes with --into, --layout, --once, --recursive and how to prune, no more"
            raise click.UsageError(fact)
        where = Where(watched, into, layout, once, recursive, SETTLE if settle is None else settle)
        return watch(where, Options(**options), threads, quiet)
    if into or layout or once or settle is not None:
        raise click.UsageError("--into, --layout, --once and --settle go with --watch")
    if not files:
        raise click.UsageError("name a file or a folder")
    found = list(checkpoints(files, recursive))
    single = found == list(files) and len(found) == 1
    request = Request(Options(**options), output, recipe_path(save_recipe), dry_run, names, threads, single)
    _check(request, found)
    with open_workspace(quiet) as workspace:
        results = []
        if not found:
            below = "" if recursive else "; `--recursive` looks in the folders below, too"
            workspace.reporter.note(f"no checkpoint is there to prune{below}")
        for path in found:
            results.append(_prune(path, request, workspace, _silent if quiet else out().say))
            out().fail(*results[-1].problems)
    said = prune_text.line(results[0]) if single else prune_text.table(results) if results else ""
    out().result({"files": [prune_text.to_json(r) for r in results]}, said)
    return max((r.code for r in results), default=ExitCode.DONE)


def _check(request: Request, found: list[Path]) -> None:
    """Raise UsageError or OutputError for what cannot be done with these files."""
    output = request.output
    if request.single:
        if output is not None and not output.folder:
            output_path(output.path, found, folders=True)
        return
    if request.save is not None:
        raise UsageError(Problem("`--save-recipe` goes with one file", hint="prune them one by one"))
    if output is not None and not output.folder:
        fact = f"`{output.path}` is no folder, and there may be several files to write"
        raise UsageError(Problem(fact, hint=f"`-o {output.path}/` makes one"))


def _silent(text: str) -> None:
    """Say nothing."""


def _prune(path: Path, request: Request, workspace: Workspace, say: Callable[[str], object]) -> Result:
    """Say what goes and what stays of a file, and do it; errors become its result."""
    pruning = None
    try:
        with workspace.sources() as sources:
            pruning = plan_pruning(path, sources, request.options)
            if request.single and pruning.unmatched:
                raise unmatched(pruning)
            say("\n".join(prune_text.describe(pruning, request.names)))
            output = request.output
            folder = output.path if output is not None and output.folder else None
            target = output.path if output is not None and not output.folder else None
            if pruning.checked.tidy and target is None and (folder is None or path.is_file()):
                if folder is None or request.dry_run:
                    return Result(path, "tidy" if folder is None else "to do", pruning)
                with making_folders([folder]):
                    copied = copy(path, folder, workspace.reporter)
                return Result(path, "copied" if copied else "tidy", pruning, copy=copied)
            if request.dry_run:
                return Result(path, "to do", pruning)
            usual = (folder or named(path).parent) / f"{stem(path)}-pruned.safetensors"
            made = prune(
                pruning,
                target or free_name(usual),
                workspace,
                sources,
                naming=None if target else lambda built: vacant(usual, built, workspace.store),
                save=request.save,
                threads=request.threads,
            )
        note_changes(made, workspace.reporter)
        built = made.outputs[0]
        return Result(path, built.state, pruning, built)
    except CkptError as error:
        state = "refused" if isinstance(error, SourceError) else "failed"
        return Result(path, state, pruning, problems=error.problems, code=error.exit_code)
