"""`ckpt store`: look into the store of made components, make room in it, check it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from builder.base.errors import ExitCode, Problem, printable, problem_data
from builder.base.page import columns
from builder.base.progress import human_bytes
from builder.base.words import counted
from builder.cli.command import Group
from builder.cli.options import json_option
from builder.cli.sizes import parse_size
from builder.cli.terminal import make_reporter, out
from builder.store import Store
from builder.workspace import Settings

if TYPE_CHECKING:
    from builder.store.upkeep import Item


@click.group("store", cls=Group)
def command() -> None:
    """Look into the store of made components, make room in it, check it."""


@command.command()
@json_option
def path() -> None:
    """Print the folder of the store."""
    root = str(Settings.from_environment().store)
    out().raw({"root": root}, root)


@command.command("list")
@json_option
def list_() -> None:
    """List what is stored, the most recently used first."""
    from builder.store.upkeep import items, to_json

    store = Store(Settings.from_environment().store)
    found = [i for i in reversed(items(store)) if i.kind != "fact"]
    total = sum(i.size for i in found)
    head = ["COMPONENT", "SIZE", "DIGEST", "LAST USED", "MADE OF", "LIES IN"]
    lines = columns([head, *map(_row, found)], {1}) if found else []
    lines.append(f"{len(found)} stored, {human_bytes(total)}, in {printable(str(store.root))}")
    out().result(to_json(store, found), "\n".join(lines))


@command.command()
@click.option(
    "--max-size",
    metavar="SIZE",
    callback=parse_size,
    help="Remove the least recently used until no more than this is kept.",
)
@json_option
def gc(max_size: int | None) -> None:
    """Remove litter and, with --max-size, what was not used for longest.

    A running build goes on: what it has open stays readable to it, and what is gone it makes again.
    """
    from builder.store.upkeep import collect, item_json

    store = Store(Settings.from_environment().store)
    done = collect(store, max_size)
    freed = sum(i.size for i in done.removed) + done.litter
    kept = sum(i.size for i in done.kept)
    said = [
        f"removed {_name(item)} {printable(item.digest[:12])}, {human_bytes(item.size)}"
        for item in done.removed
        if item.kind != "fact"
    ]
    if done.litter:
        said.append(f"removed litter, {human_bytes(done.litter)}")
    if done.strays:
        said.append(f"removed {counted(done.strays, 'thing')} that no store puts where it stood")
    said.append(f"freed {human_bytes(freed)}, kept {human_bytes(kept)}")
    data = {
        "root": str(store.root),
        "removed": [item_json(i) for i in done.removed],
        "freed": freed,
        "kept": kept,
    }
    out().result(data, "\n".join(said))
    if max_size is None and kept and not out().as_json:
        out().message("hint: `--max-size SIZE` removes what was not used for longest")


@command.command()
@json_option
def check() -> int:
    """Verify everything that is stored, and set aside what is damaged.

    Exit code 1 if anything was.
    """
    from builder.store.upkeep import check as run
    from builder.store.upkeep import items

    store = Store(Settings.from_environment().store)
    found = [i for i in items(store) if i.kind in {"component", "download"}]
    with make_reporter() as reporter:
        problems = run(store, threads=min(4, os.cpu_count() or 1), reporter=reporter)
    out().fail(*problems)
    data = {
        "root": str(store.root),
        "checked": len(found),
        "damaged": [problem_data(p) for p in problems],
    }
    size = human_bytes(sum(i.size for i in found))
    out().result(data, f"checked {counted(len(found), 'item')}, {size}: {_verdict(problems)}")
    return ExitCode.NO if problems else ExitCode.DONE


def _verdict(problems: list[Problem]) -> str:
    return f"{len(problems)} damaged, set aside" if problems else "all sound"


def _name(item: Item) -> str:
    if item.kind == "component":
        return printable(item.component) or "?"
    return {"download": "(download)", "partial": "(unfinished download)"}.get(item.kind, item.kind)


def _row(item: Item) -> list[str]:
    size = human_bytes(item.size) if item.size else "-"
    places = [Path(p).name for p in item.places]
    where = ", ".join([*(["the store"] * bool(item.size)), *places]) or "nowhere"
    made_of = printable(item.source) or "-"
    return [_name(item), size, printable(item.digest[:12]), _ago(item.used), made_of, printable(where)]


def _ago(used: int) -> str:
    seconds = max(0, time.time_ns() - used) // 10**9
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
