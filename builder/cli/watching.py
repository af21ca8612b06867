"""`ckpt prune --watch`: what is said while a folder is watched."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.base.errors import ExitCode, OutputError, Problem, UsageError, printable, problem_data
from builder.base.progress import human_bytes
from builder.cli.options import open_workspace
from builder.cli.terminal import out
from builder.toolkit.prune import Options
from builder.toolkit.watch import Event, Watch, layout_of

EVERY = 1.0  # seconds between looks

_CODES = {"failed": ExitCode.SOURCE, "kept": ExitCode.MISMATCH}


@dataclass(frozen=True)
class Where:
    """What is watched, where files go, and for how long."""

    folder: Path
    into: Path | None
    layout: str | None
    once: bool
    recursive: bool
    settle: float


def watch(where: Where, options: Options, threads: int | None, quiet: bool) -> int:
    """Watch a folder until it is interrupted; or once, and then the worst that happened is the exit code."""
    into = where.into if where.into is not None else where.folder
    if out().as_json and not where.once:
        raise UsageError(Problem("one object says what became of files at the end", hint="add `--once`"))
    if not into.is_dir():
        fact = f"`{into}` is no folder of models" if where.into else f"`{into}` is no folder"
        raise UsageError(Problem(fact, hint="make it first"))
    with open_workspace(quiet) as workspace:
        watched = Watch(
            where.folder,
            into,
            where.layout or layout_of(into, workspace.catalog),
            options,
            workspace,
            recursive=where.recursive,
            settle=where.settle,
            threads=threads,
        )
        with watched.alone():
            if where.once:
                out().data["files"] = []
                return _once(watched)
            workspace.reporter.note(f"watching `{where.folder}`, until it is interrupted")
            try:
                _forever(watched)
            except KeyboardInterrupt:
                workspace.reporter.note("stopped: what was not done stays where it is")
    return ExitCode.DONE


def _data(event: Event) -> dict[str, Any]:
    return {
        "path": str(event.path),
        "state": event.state,
        "target": str(event.target) if event.target is not None else None,
        "what": event.what or None,
        "problems": [problem_data(p) for p in event.problems],
    }


def _once(watched: Watch) -> int:
    codes = [_say(event, watched.folder) for event in watched.poll()]
    if watched.waiting:
        time.sleep(watched.settle)
        codes += [_say(event, watched.folder) for event in watched.poll()]
    for path in watched.waiting:
        out().say(f"waiting  {printable(str(path))}  it is not at rest, or not whole yet")
    out().data["waiting"] = [str(path) for path in watched.waiting]
    return max(codes, default=ExitCode.DONE)


def _forever(watched: Watch) -> None:
    broken = False
    while True:
        try:
            for event in watched.poll():
                _say(event, watched.folder)
            broken = False
        except OutputError as error:  # the folder is away, as that of a network is at times
            if not broken:
                out().fail(*error.problems)
            broken = True
        time.sleep(EVERY)


def _say(event: Event, folder: Path) -> ExitCode:
    """A line for what became of a file, and the problems; gives the exit code it stands for."""
    to = f" → {event.target}" if event.target is not None else ""
    size = ""
    if event.state in ("pruned", "moved") and event.target:
        with suppress(OSError):  # somebody may have taken it away already
            size = f"  {human_bytes(event.target.stat().st_size)}"
    name = event.path.relative_to(folder)
    what = f"  {event.what}" if event.what else ""
    if event.state == "stays":
        what = f"  {event.problems[0].fact}"
    out().say(printable(f"{event.state:<7}  {name}{to}{size}{what}"))
    out().data.setdefault("files", []).append(_data(event))
    if event.state == "stays":
        return ExitCode.DONE
    out().fail(*event.problems)
    return _CODES.get(event.state, ExitCode.DONE)
