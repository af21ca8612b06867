"""`ckpt prune`: checkpoints without what training left behind."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Iterator
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
    printable,
    render,
)
from builder.base.progress import human_bytes
from builder.build.expect import Built
from builder.cli.made import note_changes
from builder.cli.oneline import FILE, Bench, open_bench, recipe_path, save_option
from builder.cli.session import json_option, quiet_option
from builder.cli.watching import Where, watch
from builder.prune import Options, Pruning, Share, plan_pruning, prune, vacant
from builder.quick import output_path
from builder.recipe.names import SHARD, SUFFIXES, stem
from builder.tensors.cast import PRECISIONS
from builder.watch import LAYOUTS, SETTLE

EXAMPLES = 3


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


@dataclass(frozen=True)
class Result:
    """What became of a file: `written`, `unchanged`, `tidy`, `to do`, `refused` or `failed`."""

    path: Path
    state: str
    pruning: Pruning | None = None
    built: Built | None = None
    problems: tuple[Problem, ...] = ()
    code: ExitCode = ExitCode.DONE


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
@click.option("--layout", type=click.Choice(list(LAYOUTS)), help="Of MODELS; else told by what is there.")
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
    found = list(_checkpoints(files, recursive))
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
        click.echo(json.dumps({"schema": 1, "files": [_to_json(r) for r in results]}, indent=2))
    else:
        said = _line(results[0]) if single else _table(results)
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
        say("\n".join(describe(pruning, wish.names)))
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


def _checkpoints(files: Iterable[Path], recursive: bool) -> Iterator[Path]:
    """The files named, and the checkpoints in the folders named that are none themselves."""
    for file in files:
        whole = (file / "model_index.json").exists() or any(file.glob("*.index.json"))
        if whole or not file.is_dir():
            yield file
            continue
        below = sorted(file.rglob("*") if recursive else file.iterdir())
        for path in below:
            hidden = any(p.startswith(".") for p in path.relative_to(file).parts)
            model = path.suffix.lower() in SUFFIXES and not SHARD.fullmatch(path.name)
            if model and not hidden and _regular(path):
                yield path


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def describe(pruning: Pruning, names: bool = False) -> Iterator[str]:
    """What goes and what stays of a file, the largest first."""
    report = pruning.report
    what = report.identity.architecture or "unknown"
    sizes = f"{human_bytes(report.size)}, {human_bytes(pruning.left)} of tensors stay"
    yield printable(f"{report.path}: {what}, {sizes}")
    goes = [(s.reason, s.bytes, _gone(s, pruning)) for s in pruning.goes] or [("nothing", 0, "")]
    stays = [(s.reason, s.bytes, _counted(s)) for s in pruning.parts]
    stays += [(s.reason, s.bytes, f"{_counted(s)}: {_grouped(s, pruning)}") for s in pruning.rest]
    wide = max(len(reason) for reason, *_ in (*goes, *stays))
    for label, rows in (("goes", goes), ("stays", stays)):
        for index, (reason, size, text) in enumerate(rows):
            share = f"{human_bytes(size):>7}" if text else ""
            head = label if index == 0 else ""
            yield f"  {head:<6} {reason:<{wide}}  {share}  {printable(text)}".rstrip()
    for gone in pruning.goes if names else ():
        yield from (printable(f"  {gone.reason}: {n}") for n in gone.names)


def _gone(share: Share, pruning: Pruning) -> str:
    if share.reason != "precision":
        return f"{_counted(share)}: {_grouped(share, pruning)}"
    types = {pruning.report.tensors[n].dtype.code for n in share.names}
    return (
        f"{_counted(share)} of {' and '.join(sorted(types))} rounded to {pruning.output['precision'].upper()}"
    )


def _counted(share: Share) -> str:
    return f"{len(share.names):,} tensor" + "s" * (len(share.names) != 1)


def _grouped(share: Share, pruning: Pruning) -> str:
    """The names of a share by their first part, the largest first."""
    groups: dict[str, list[str]] = {}
    for name in share.names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    size = {head: sum(pruning.report.tensors[n].nbytes for n in held) for head, held in groups.items()}
    told = [
        _clipped(held[0]) if len(held) == 1 else f"{_clipped(head)}.… ({len(held):,})"
        for head, held in sorted(groups.items(), key=lambda g: -size[g[0]])[:EXAMPLES]
    ]
    more = len(groups) - len(told)
    return ", ".join(told) + (f" and {more:,} more" if more else "")


def _clipped(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _line(result: Result) -> str:
    """What became of one file, where there is more to say than what goes and what stays."""
    built = result.built
    if built is None:
        return f"tidy       {printable(str(result.path))}" if result.state == "tidy" else ""
    metric = f"  ({built.metric})" if built.metric else ""
    where = printable(str(built.path))
    return f"{built.state:<9}  {where}  {human_bytes(built.size)}{metric}\n{'':<9}  sha256 {built.sha256}"


def _table(results: list[Result]) -> str:
    """What became of several files, a line each, and the sum."""
    rows = [("FILE", "STATE", "BEFORE", "AFTER"), *map(_row, results)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{wide[0]}}  {state:<{wide[1]}}  {before:>{wide[2]}}  {after:>{wide[3]}}".rstrip()
        for name, state, before, after in rows
    ]
    done = [r for r in results if r.pruning is not None and r.code == ExitCode.DONE]
    before = sum(r.pruning.report.size for r in done if r.pruning is not None)
    after = sum(map(_after, done))
    failed = len(results) - len(done)
    total = f"{len(done):,} of {len(results):,} files, {human_bytes(before)} → {human_bytes(after)}"
    return "\n".join([*lines, total + (f", {failed:,} not pruned" if failed else "")])


def _row(result: Result) -> tuple[str, str, str, str]:
    before = human_bytes(result.pruning.report.size) if result.pruning is not None else ""
    after = human_bytes(_after(result)) if result.code == ExitCode.DONE else ""
    return printable(str(result.path)), result.state, before, after


def _after(result: Result) -> int:
    assert result.pruning is not None
    if result.built is not None:
        return result.built.size
    return result.pruning.report.size if result.state == "tidy" else result.pruning.left


def _to_json(result: Result) -> dict[str, Any]:
    pruning, built = result.pruning, result.built
    said: dict[str, Any] = {"path": str(result.path), "state": result.state}
    if pruning is not None:
        said |= {
            "architecture": pruning.identity.architecture,
            "size": pruning.report.size,
            "left": pruning.left,
            "precision": pruning.output["precision"],
            "goes": [_share_json(s) for s in pruning.goes],
            "stays": [_share_json(s) for s in (*pruning.parts, *pruning.rest)],
        }
    if built is not None:
        said["output"] = {
            "path": str(built.path),
            "size": built.size,
            "sha256": built.sha256,
            "metric": built.metric or None,
        }
    if result.problems:
        said["error"] = [
            {"fact": p.fact, "evidence": list(p.evidence), "hint": p.hint} for p in result.problems
        ]
    return said


def _share_json(share: Share) -> dict[str, Any]:
    return {"what": share.reason, "bytes": share.bytes, "tensors": list(share.names)}
