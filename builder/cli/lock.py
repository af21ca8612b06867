"""`ckpt lock`: pin what a recipe resolves to, without building it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError, did_you_mean
from builder.cli.session import open_session, quiet_option, recipe_argument
from builder.cli.terminal import make_reporter
from builder.recipe import Recipe
from builder.recipe.lock import Lock, differences, write_lock
from builder.sources.have import resolve_sources


@click.command("lock")
@recipe_argument
@click.option(
    "--upgrade", is_flag=False, flag_value="*", metavar="[SOURCE]", help="Let the pins move: all, or one's."
)
@quiet_option
def command(recipe: Path, upgrade: str | None, quiet: bool) -> int:
    """Pin every source of RECIPE by digest in its lock.

    A source that is elsewhere is not downloaded where its host states the digest. Components and outputs
    are pinned by the first build; they stay as they are while no source changes.
    """
    with make_reporter(quiet) as reporter, open_session(recipe, reporter, anew=True) as session:
        old = session.lock
        session.lock = _unpinned(old, upgrade, session.recipe)
        sources = resolve_sources(
            session.sources(), catalog=session.catalog, store=session.store, reporter=reporter
        )
        lock = Lock(session.recipe.digest, sources)
        if old is not None and (old.recipe, old.profile, old.pins()) == (
            lock.recipe,
            lock.profile,
            lock.pins(),
        ):
            lock = replace(lock, components=old.components, outputs=old.outputs)
        changes = differences(old, lock) if old is not None else []
        written = write_lock(session.lock_path, lock)
    click.echo(f"{'written' if written else 'unchanged'}  {session.lock_path}")
    for change in changes:
        click.echo(f"  {change}")
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
