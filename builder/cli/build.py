"""`ckpt build`: from a recipe to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UnreproducibleError, UsageError
from builder.base.progress import Reporter
from builder.build import Build, build
from builder.cli.made import note_changes, note_left_out, to_json, to_text
from builder.cli.session import Work, json_option, need_lock, open_session, quiet_option, recipe_argument
from builder.cli.terminal import make_reporter
from builder.plan import explain
from builder.plan.keys import output_format
from builder.recipe import Output, Recipe
from builder.recipe.lock import differences, write_lock
from builder.store import Store
from builder.toolkit.quick import output_path


@click.command("build")
@recipe_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the file goes.")
@click.option("--locked", is_flag=True, help="Fail if the lock would change, and show how.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--frozen", is_flag=True, help="Both --locked and --offline.")
@click.option("--check", is_flag=True, help="Build everything a second time without the store, and compare.")
@click.option("--explain", "explained", is_flag=True, help="Say why each step is done or not.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@json_option
@quiet_option
def command(
    recipe: Path,
    output: Path | None,
    locked: bool,
    offline: bool,
    frozen: bool,
    check: bool,
    explained: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Build the files of RECIPE; what is made already is reused, what is unchanged is left alone."""
    locked, offline = locked or frozen, offline or frozen
    with make_reporter(quiet) as reporter, open_session(recipe, reporter, offline=offline) as session:
        lock = need_lock(session) if locked else None
        with session.plan(place=_place(session, output), download=True) as plan:
            if explained:
                click.echo(explain.to_text(plan), err=True)
            if any(n.state != "unchanged" for n in plan.outputs()):
                note_left_out(plan, reporter)
            made = build(
                plan,
                catalog=session.catalog,
                store=session.store,
                threads=threads,
                locked=lock,
                reporter=reporter,
            )
        note_changes(made, reporter)
        if check:
            _check(session, made, threads, reporter)
        if not locked and made.lock is not None and _is_the_recipes_own(made, session.recipe):
            for change in differences(session.lock, made.lock, partial=True) if session.lock else ():
                if "became" in change:
                    reporter.note(f"the lock changes: {change}")
            write_lock(session.lock_path, made.lock)
    click.echo(json.dumps(to_json(made), indent=2) if as_json else to_text(made))
    return ExitCode.DONE


def _place(session: Work, output: Path | None) -> Callable[[Output], Path] | None:
    if output is None:
        return None
    if len(session.recipe.outputs) > 1:
        raise UsageError(
            Problem(
                "`-o` names one file, the recipe has several outputs",
                evidence=tuple(o.file for o in session.recipe.outputs),
                hint="name the files in the recipe",
            )
        )
    path = output_path(output)
    return lambda _: path


def _is_the_recipes_own(made: Build, recipe: Recipe) -> bool:
    """Whether what was made is what the recipe says, not its contents in another container."""
    files = {o.name: Path(o.file) for o in recipe.outputs}
    return all(output_format(b.path) == output_format(files[b.name]) for b in made.outputs)


def _check(session: Work, made: Build, threads: int | None, reporter: Reporter) -> None:
    """Build again from nothing, in a folder of its own, and compare; raises UnreproducibleError."""
    first = {b.name: b for b in made.outputs}
    downloads = session.store.downloads  # which are compared with their pins, and not to be had again
    with (
        session.store.scratch() as root,
        Store(root / "store", downloads=downloads, reporter=reporter) as store,
    ):
        again = replace(session, store=store, lock=made.lock)
        with again.plan(place=lambda o: root / f"{o.name}{first[o.name].path.suffix}") as plan:
            second = build(
                plan,
                catalog=session.catalog,
                store=store,
                threads=threads,
                reporter=reporter,
            )
    problems = [
        Problem(
            f"building `{b.path.name}` again gave another file",
            evidence=(
                f"first  {first[b.name].sha256}",
                f"second {b.sha256}",
                *(differences(made.lock, second.lock) if made.lock and second.lock else ()),
            ),
            hint="please report this with the recipe: it must not happen",
        )
        for b in second.outputs
        if b.sha256 != first[b.name].sha256
    ]
    if problems:
        raise UnreproducibleError(*problems)
    reporter.note("built a second time without the store: the same bytes")
