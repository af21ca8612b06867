"""`ckpt verify`: an existing file against what its recipe's lock and expectations say."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.errors import ExitCode
from builder.build import verify
from builder.cli.session import open_session, quiet_option, recipe_argument
from builder.cli.terminal import make_reporter


@click.command("verify")
@recipe_argument
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[FILE]")
@quiet_option
def command(recipe: Path, file: Path | None, quiet: bool) -> int:
    """Compare FILE (or the files that RECIPE makes) with the lock and with what the recipe expects.

    Builds nothing. Exit code 7: a file is not what it should be, with the components that differ.
    """
    with make_reporter(quiet) as reporter, open_session(recipe, reporter) as session:
        verified = verify(
            session.recipe,
            session.lock,
            file,
            catalog=session.catalog,
            store=session.store,
            reporter=reporter,
        )
    for path, sha256 in verified.items():
        click.echo(f"verified  {path}\n          sha256 {sha256}")
    return ExitCode.DONE
