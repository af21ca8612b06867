"""`ckpt lock`: pin what a recipe resolves to, without building it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError, did_you_mean, printable
from builder.cli.options import (
    FILE,
    json_option,
    open_workspace,
    outside_option,
    quiet_option,
    recipe_argument,
)
from builder.cli.terminal import out
from builder.recipe import Recipe
from builder.recipe.lock import Lock, differences, lock_path, write_lock
from builder.sources.have import resolve_sources, telling_all
from builder.workspace import find_lock


@click.command("lock")
@recipe_argument
@click.option(
    "--upgrade", is_flag=False, flag_value="*", metavar="[SOURCE]", help="Let the pins move: all, or one's."
)
@click.option("--lock", "lock", type=FILE, help="Where the lock lies; default: beside RECIPE.")
@outside_option
@json_option
@quiet_option
def command(recipe: Path, upgrade: str | None, lock: Path | None, outside: bool, quiet: bool) -> int:
    """Pin every source of RECIPE by digest in its lock.

    A source that is elsewhere is not downloaded where its host states the digest. Components and outputs
    are pinned by the first build; they stay as they are while no source changes.
    """
    with open_workspace(quiet, outside=outside) as workspace, workspace.sources() as sources:
        read = workspace.recipe(recipe, lock or True)
        old = find_lock(read, anew=True)
        pins = _unpinned(old, upgrade, read)
        with telling_all(read, sources, pins):
            new = Lock(read.digest, resolve_sources(read, sources, pins))
        if old is not None and (old.recipe, old.profile, old.pins()) == (new.recipe, new.profile, new.pins()):
            new = replace(new, components=old.components, outputs=old.outputs)
        changes = differences(old, new) if old is not None else []
        where = lock or lock_path(recipe)
        written = write_lock(where, new)
    state = "written" if written else "unchanged"
    pinned = {name: {"sha256": s.sha256, "size": s.size} for name, s in new.sources.items()}
    data = {"path": str(where), "state": state, "sources": pinned, "changes": list(changes)}
    out().result(data, "\n".join(map(printable, [f"{state}  {where}", *(f"  {c}" for c in changes)])))
    return ExitCode.DONE


def _unpinned(lock: Lock | None, upgrade: str | None, recipe: Recipe) -> Lock | None:
    """The lock without the pins that may move."""
    if upgrade is not None and upgrade not in {"*", *recipe.sources}:
        hint = did_you_mean(upgrade, recipe.sources)
        raise UsageError(Problem(f"the recipe has no source `{upgrade}`", hint=hint))
    if lock is None or upgrade is None:
        return lock
    # Of a source that is a recipe, those that it takes from move with it.
    kept = {n: s for n, s in lock.sources.items() if upgrade not in {"*", n, n.partition("/")[0]}}
    return replace(lock, sources=kept)
