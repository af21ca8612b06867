"""`ckpt verify`: an existing file against what its recipe's lock and expectations say."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode, printable
from builder.build import verify
from builder.cli.options import (
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipe_argument,
)
from builder.cli.terminal import out
from builder.workspace import find_lock


@click.command("verify")
@recipe_argument
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[FILE]")
@locking
@outside_option
@json_option
@quiet_option
def command(
    recipe: Path, file: Path | None, lock: Path | None, no_lock: bool, outside: bool, quiet: bool
) -> int:
    """Compare FILE (or the files that RECIPE makes) with the lock and with what the recipe expects.

    Builds nothing. Exit code 7: a file is not what it should be, with the components that differ.
    """
    with open_workspace(quiet, outside=outside) as workspace:
        read = workspace.recipe(recipe, lock_place(lock, no_lock))
        verified = verify(read, find_lock(read), file, workspace)
    files = [{"path": str(path), "sha256": sha256} for path, sha256 in verified.items()]
    lines = [f"verified  {printable(str(path))}\n  sha256 {sha256}" for path, sha256 in verified.items()]
    out().result({"files": files}, "\n".join(lines))
    return ExitCode.DONE
