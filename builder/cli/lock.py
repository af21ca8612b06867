"""`ckpt lock`: pin what a recipe resolves to, without building it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from builder.cli.session import open_session, quiet_option, recipe_argument
from builder.cli.terminal import make_reporter
from builder.errors import ExitCode
from builder.lock import differences, write_lock
from builder.run import resolve_sources


@click.command("lock")
@recipe_argument
@quiet_option
def command(recipe: Path, quiet: bool) -> int:
    """Pin every source of RECIPE by digest in its lock.

    Components and outputs are pinned by the first build; they stay as they are while no source changes.
    """
    with make_reporter(quiet) as reporter, open_session(recipe, reporter) as session:
        with session.plan() as plan:
            lock = resolve_sources(plan, catalog=session.catalog, store=session.store, reporter=reporter)
        old = session.lock
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
