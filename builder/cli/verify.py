"""`ckpt verify`: an existing file against what its recipe's lock, its expectations or a statement say."""

from __future__ import annotations

from pathlib import Path

import click

from builder.base.dsse import PublicKey
from builder.base.errors import ExitCode, Problem, UsageError, printable
from builder.build import verify
from builder.build.statements import verify_statement
from builder.cli.options import (
    FILE,
    RECIPE,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
)
from builder.cli.terminal import out
from builder.workspace import Workspace, find_lock


@click.command("verify")
@click.argument("recipe", required=False, type=RECIPE, metavar="[RECIPE]")
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[FILE]")
@click.option("--statement", type=FILE, metavar="FILE", help="Hold it to this statement of provenance.")
@click.option(
    "--key", type=FILE, metavar="PUB", help="The Ed25519 key that the statement must be signed with."
)
@locking
@outside_option
@json_option
@quiet_option
def command(
    recipe: Path | str | None,
    file: Path | None,
    statement: Path | None,
    key: Path | None,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Compare FILE (or the files that RECIPE makes) with the lock and with what the recipe expects.

    With --statement, with what that says of it; then there need be no RECIPE, and no FILE where that lies
    beside the statement. Builds nothing. Exit code 7: a file is not what it should be, with the components
    that differ.
    """
    where = lock_place(lock, no_lock)
    if statement is None:
        if recipe is None:
            raise UsageError(Problem("name a RECIPE, or with `--statement FILE` a statement"))
        if key is not None:
            raise UsageError(Problem("`--key` is of a statement", hint="`--statement FILE` names it"))
    elif isinstance(recipe, Path) and file is None and recipe.suffix != ".toml":
        recipe, file = None, recipe
    with open_workspace(quiet, offline=statement is not None, outside=outside) as workspace:
        read = workspace.recipe(recipe, where) if recipe is not None else None
        if statement is not None:
            public = PublicKey.read(key, "--key") if key is not None else None
            done = verify_statement(statement, workspace, key=public, recipe=read, file=file)
            files, said = done.files, f"statement  {statement}, {_signed(done.signed, public, workspace)}"
            told = {
                "path": str(statement),
                "signed": done.signed,
                "key": public.id if public is not None else None,
            }
        else:
            assert read is not None
            files, said, told = verify(read, find_lock(read), file, workspace), "", None
    lines = [f"verified  {printable(str(path))}\n  sha256 {sha256}" for path, sha256 in files.items()]
    lines += [printable(said)] * bool(said)
    data = [{"path": str(path), "sha256": sha256} for path, sha256 in files.items()]
    out().result({"files": data, "statement": told}, "\n".join(lines))
    return ExitCode.DONE


def _signed(signed: bool, key: PublicKey | None, workspace: Workspace) -> str:
    """Who a statement is of, in words."""
    if key is not None:
        return f"signed with the key {key.id[:16]}…"
    if signed:
        fact = "nobody looked at the statement's signature"
        workspace.reporter.warn(Problem(fact, hint="`--key PUB` names the key that it must be of"))
    return "its signature not looked at" if signed else "unsigned"
