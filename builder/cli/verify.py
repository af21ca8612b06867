"""`ckpt verify`: an existing file against what its recipe's lock, its expectations or a statement say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from builder.base.dsse import PublicKey
from builder.base.errors import ExitCode, Problem, UsageError, printable
from builder.build import verify
from builder.build.many import read_recipes, recipes_below
from builder.build.statements import verify_statement
from builder.cli.command import Command
from builder.cli.forms import Case
from builder.cli.options import (
    FILE,
    RECIPE,
    format_option,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
)
from builder.cli.several import local, one_only, told
from builder.cli.terminal import out
from builder.recipe.names import SUFFIXES
from builder.recipe.provenance import ENDING
from builder.workspace import Workspace, find_lock


@click.command("verify", cls=Command)
@click.argument("recipes", nargs=-1, type=RECIPE, metavar="[RECIPE]... [FILE]")
@click.option("--statement", type=FILE, metavar="FILE", help="Hold it to this statement of provenance.")
@click.option(
    "--key", type=FILE, metavar="PUB", help="The Ed25519 key that the statement must be signed with."
)
@locking
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipes: tuple[Path | str, ...],
    statement: Path | None,
    key: Path | None,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Compare FILE (or the files that RECIPE makes) with the lock and with what the recipe expects.

    What does not end in `.toml` is FILE, of the one RECIPE; several are verified each for itself.
    With --statement, with what that says of it; then there need be no RECIPE, and no FILE where that lies
    beside the statement. Builds nothing. Exit code 7: a file is not what it should be, with the components
    that differ.
    """
    where = lock_place(lock, no_lock)
    named, file = _split(recipes, stated=statement is not None)
    one_only(named, lock=lock, statement=statement)
    if statement is None and not named:
        raise UsageError(Problem("name a RECIPE, or with `--statement FILE` a statement"))
    if statement is None and key is not None:
        raise UsageError(Problem("`--key` is of a statement", hint="`--statement FILE` names it"))
    if statement is None:
        _check_recipes(named)
    files: dict[Path, str] = {}
    about = None
    lines = []
    with open_workspace(quiet, offline=statement is not None, outside=outside) as workspace:
        if statement is not None:
            for path in named:
                local(path, "`--statement`")
            read = workspace.recipe(named[0], where) if named else None
            public = PublicKey.read(key, "--key") if key is not None else None
            done = verify_statement(statement, workspace, key=public, recipe=read, file=file)
            files = done.files
            lines = [f"statement  {statement}, {_signed(done.signed, public, workspace)}"]
            about = {
                "path": str(statement),
                "signed": done.signed,
                "key": public.id if public is not None else None,
            }
        outcomes = read_recipes(workspace, named, where) if statement is None else []
        for outcome in outcomes:
            with outcome.failing(workspace):
                if outcome.recipe is not None:
                    files |= verify(outcome.recipe, find_lock(outcome.recipe), file, workspace)
    text = [f"verified  {printable(str(path))}\n  sha256 {sha256}" for path, sha256 in files.items()]
    data = [{"path": str(path), "sha256": sha256} for path, sha256 in files.items()]
    if statement is not None:
        out().cases.append(Case(str(statement)))
    out().result({"files": data, "statement": about}, "\n".join([*text, *map(printable, lines)]))
    told(outcomes)
    return ExitCode.DONE


def _split(named: Sequence[Path | str], *, stated: bool) -> tuple[Sequence[Path | str], Path | None]:
    """The recipes, and the FILE that is the one's, or that a statement is of: it may be a folder."""
    *before, last = named or ("",)
    if isinstance(last, str) or last.suffix == ".toml" or len(before) > 1:
        return named, None
    if stated or (before and not (last.is_dir() and recipes_below(last))):
        return before, last
    return named, None


def _check_recipes(named: Sequence[Path | str]) -> None:
    """Raise UsageError for a model or a statement among recipes: what it is held to is not said then."""
    for path in (p for p in named if isinstance(p, Path) and p.is_file()):
        if path.name.endswith(ENDING):
            hint = f"`ckpt verify --statement {path}` holds its files to it"
            raise UsageError(Problem(f"`{path}` is a statement, not a recipe", hint=hint))
        if path.suffix in SUFFIXES:
            hint = f"`ckpt verify RECIPE {path}` holds it to one recipe"
            raise UsageError(Problem(f"`{path}` is a model, not a recipe", hint=hint))


def _signed(signed: bool, key: PublicKey | None, workspace: Workspace) -> str:
    """Who a statement is of, in words."""
    if key is not None:
        return f"signed with the key {key.id[:16]}…"
    if signed:
        fact = "nobody looked at the statement's signature"
        workspace.reporter.warn(Problem(fact, hint="`--key PUB` names the key that it must be of"))
    return "its signature not looked at" if signed else "unsigned"
