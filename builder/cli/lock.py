"""`ckpt lock`: pin what a recipe resolves to, without building it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from builder.base.errors import CkptError, ExitCode, Problem, UsageError, did_you_mean, printable
from builder.build.many import read_recipes
from builder.cli.command import Command
from builder.cli.options import (
    FILE,
    format_option,
    json_option,
    open_workspace,
    outside_option,
    quiet_option,
    recipes_argument,
)
from builder.cli.several import are_several, local, one_only, told
from builder.cli.terminal import out
from builder.recipe import Recipe
from builder.recipe.lock import Lock, differences, write_lock
from builder.sources.have import check_lock, resolve_sources, telling_all
from builder.sources.opened import Sources
from builder.workspace import find_lock, need_lock


@click.command("lock", cls=Command)
@recipes_argument
@click.option(
    "--upgrade", is_flag=False, flag_value="*", metavar="[SOURCE]", help="Let the pins move: all, or one's."
)
@click.option("--check", is_flag=True, help="Write nothing, and fail where a lock is missing or stale.")
@click.option("--lock", "lock", type=FILE, help="Where the lock lies; default: beside RECIPE.")
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipes: tuple[Path | str, ...],
    upgrade: str | None,
    check: bool,
    lock: Path | None,
    outside: bool,
    quiet: bool,
) -> int:
    """Pin every source of RECIPE by digest in its lock.

    A source that is elsewhere is not downloaded where its host states the digest. Components and outputs
    are pinned by the first build; they stay as they are while no source changes.

    With --check, each lock is compared with what its recipe says: no source is looked at, no network used.
    """
    if check and upgrade is not None:
        raise UsageError(Problem("`--check` and `--upgrade` exclude each other"))
    for recipe in recipes if check else ():
        local(recipe, "`--check`")  # which uses no network
    if lock is None and any(isinstance(recipe, str) for recipe in recipes):
        hint = "`--lock FILE` says where it goes, and `ckpt build --lock FILE` holds the recipe to it"
        raise UsageError(Problem("a lock cannot be written beside an address", hint=hint))
    one_only(recipes, lock=lock)
    with open_workspace(quiet, offline=check, outside=outside) as workspace, workspace.sources() as sources:
        outcomes = read_recipes(workspace, recipes, lock or True)
        done = []
        for outcome in outcomes:
            try:
                if outcome.recipe is not None and check:
                    done.append(_checked(outcome.recipe))
                elif outcome.recipe is not None:
                    done.append(_locked(outcome.recipe, sources, upgrade))
            except UsageError:
                raise
            except CkptError as error:
                outcome.error = workspace.by_address(error)
    if done:
        one = not are_several(recipes)
        lines = [[f"{d['state']}  {d['path']}", *(f"  {c}" for c in d.get("changes", ()))] for d in done]
        text = "\n".join(printable(line) for each in lines for line in each)
        out().result(done[0] if one else {"locks": done}, text)
    told(outcomes)
    return ExitCode.DONE


def _checked(recipe: Recipe) -> dict[str, Any]:
    """That a lock is there and says what its recipe does; raises LockError."""
    check_lock(recipe, need_lock(recipe))
    return {"path": str(recipe.lock), "state": "fresh"}


def _locked(recipe: Recipe, sources: Sources, upgrade: str | None) -> dict[str, Any]:
    """Pin the sources of a recipe."""
    old = find_lock(recipe, anew=True)
    pins = _unpinned(old, upgrade, recipe)
    with telling_all(recipe, sources, pins):
        new = Lock(recipe.digest, resolve_sources(recipe, sources, pins))
    if old is not None and (old.recipe, old.profile, old.pins()) == (new.recipe, new.profile, new.pins()):
        new = replace(new, components=old.components, outputs=old.outputs)
    changes = differences(old, new) if old is not None else []
    assert recipe.lock is not None
    state = "written" if write_lock(recipe.lock, new) else "unchanged"
    pinned = {name: {"sha256": s.sha256, "size": s.size} for name, s in new.sources.items()}
    return {"path": str(recipe.lock), "state": state, "sources": pinned, "changes": list(changes)}


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
