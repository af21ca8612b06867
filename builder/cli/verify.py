"""`ckpt verify`: an existing file against what its recipe's lock and expectations say."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import CkptError, ExitCode, printable
from builder.build import verify
from builder.build.many import read_recipes
from builder.cli.options import (
    FILE,
    format_option,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
)
from builder.cli.several import one_only, told
from builder.cli.terminal import out
from builder.workspace import find_lock


@click.command("verify")
@click.argument("recipes", nargs=-1, required=True, type=FILE, metavar="RECIPE... [FILE]")
@locking
@outside_option
@format_option
@json_option
@quiet_option
def command(recipes: tuple[Path, ...], lock: Path | None, no_lock: bool, outside: bool, quiet: bool) -> int:
    """Compare FILE (or the files that RECIPE makes) with the lock and with what the recipe expects.

    What does not end in `.toml` is FILE, of the one RECIPE; several are verified each for itself.
    Builds nothing. Exit code 7: a file is not what it should be, with the components that differ.
    """
    with open_workspace(quiet, outside=outside) as workspace:
        named = recipes[:-1] if len(recipes) == 2 and not _is_recipe(recipes[1]) else recipes
        file = recipes[1] if len(named) < len(recipes) else None
        one_only(named, lock=lock)
        outcomes = read_recipes(workspace, named, lock_place(lock, no_lock))
        verified: dict[Path, str] = {}
        for outcome in outcomes:
            try:
                if outcome.recipe is not None:
                    verified |= verify(outcome.recipe, find_lock(outcome.recipe), file, workspace)
            except CkptError as error:
                outcome.error = error
    files = [{"path": str(path), "sha256": sha256} for path, sha256 in verified.items()]
    lines = [f"verified  {printable(str(path))}\n  sha256 {sha256}" for path, sha256 in verified.items()]
    out().result({"files": files}, "\n".join(lines))
    told(outcomes)
    return ExitCode.DONE


def _is_recipe(path: Path) -> bool:
    return path.suffix == ".toml" or path.is_dir()
