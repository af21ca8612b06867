"""`ckpt hook`: what a commit is checked for, as pre-commit runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import tomli

from builder.base.errors import CkptError, ExitCode, Problem, UsageError
from builder.base.files import open_regular, read_bounded
from builder.base.words import command_line
from builder.cli.command import Command
from builder.cli.options import FILE, json_option, open_workspace
from builder.cli.terminal import out
from builder.formats.sniff import HEAD, is_safetensors
from builder.formats.torch.containers import looks_like_torch
from builder.recipe.lock import LOCK
from builder.recipe.read import MAX_SIZE
from builder.sources.have import check_lock
from builder.workspace import Workspace, need_lock

PICKLES = {".pkl", ".pickle"}
MODELS = {".ckpt", ".pt", ".pth", ".bin"}
_TAIL = 4 << 20  # bytes that hold the directory of an archive


@click.command("hook", cls=Command)
@click.argument("name", type=click.Choice(["lock-check", "schema", "no-new-pickles"]), metavar="HOOK")
@click.argument("files", nargs=-1, type=FILE, metavar="FILE…")
@json_option
def command(name: str, files: tuple[Path, ...]) -> int:
    """Check FILE… before they are committed, as pre-commit does with the hooks of .pre-commit-hooks.yaml.

    HOOK is `lock-check` (each recipe has a lock, which is its own), `schema` (each recipe is valid) or
    `no-new-pickles` (no file that is added holds a pickle). Of TOML files, those that are no recipes are
    passed over. Uses no network, and reads no weights.
    """
    for path in files:
        _check_file(path)
    code = ExitCode.DONE
    with open_workspace(quiet=True, offline=True) as workspace:
        for error in _HOOKS[name](files, workspace):
            out().fail(*error.problems)
            code = code or error.exit_code
    out().result({"hook": name, "files": [str(path) for path in files]}, "")
    return code


def _check_file(path: Path) -> None:
    """Raise UsageError for what would pass as a file without mistakes: a name of nothing, a folder."""
    if not (os.path.lexists(path) or os.path.lexists(_recipe_of(path))):
        raise UsageError(Problem(f"there is no `{path}`", hint="a hook checks files that are there"))
    if path.is_dir():
        hint = f"`ckpt lock --check {path}` checks all recipes in it"
        raise UsageError(Problem(f"`{path}` is a folder, and a hook checks files", hint=hint))


def _schema(files: tuple[Path, ...], workspace: Workspace) -> Iterator[CkptError]:
    """What is wrong with each recipe."""
    for path in files:
        if not path.name.endswith(LOCK) and _may_be_recipe(path):
            try:
                workspace.recipe(path)
            except CkptError as error:
                yield error


def _locks(files: tuple[Path, ...], workspace: Workspace) -> Iterator[CkptError]:
    """What is wrong with the lock of each recipe; of a lock, that it is its recipe's."""
    for path in dict.fromkeys(map(_recipe_of, files)):
        if _may_be_recipe(path):
            try:
                recipe = workspace.recipe(path)
                check_lock(recipe, need_lock(recipe))
            except CkptError as error:
                yield error


def _recipe_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(LOCK) + ".toml") if path.name.endswith(LOCK) else path


def _may_be_recipe(path: Path) -> bool:
    """Whether a file that is there is a recipe, or no TOML: then nobody knows what it was to be."""
    try:
        return "format" in tomli.loads(read_bounded(path, MAX_SIZE).decode())
    except OSError:
        return False
    except ValueError:
        return True


def _pickles(files: tuple[Path, ...], workspace: Workspace) -> Iterator[CkptError]:
    """Each file that is new to the repository and holds a pickle."""
    added = _added()
    for path in files:
        if path.absolute() in added and _holds_pickle(path):
            evidence = ("loading a pickle can run any code",)
            command = command_line("convert", path, "-o", path.with_suffix(".safetensors"))
            hint = f"`{command}` keeps its tensors and no code"
            yield UsageError(Problem(f"`{path}` is a new pickle", evidence=evidence, hint=hint))


def _added() -> set[Path]:
    """What is added: by the commit in the making, or between the two that pre-commit names."""
    ends = [os.environ.get(f"PRE_COMMIT_{n}_REF") for n in ("FROM", "TO")]
    what = [f"{ends[0]}...{ends[1]}"] if all(ends) else ["--staged"]
    git = ["git", "-c", "core.quotePath=off"]
    try:
        root = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, check=True).stdout
        command = [*git, "diff", "--name-only", "--no-renames", "--diff-filter=A", "-z", *what, "--"]
        names = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise UsageError(
            Problem("git does not say what is added", evidence=(os.fsdecode(said).strip(),))
        ) from None
    top = Path(os.fsdecode(root).rstrip("\n"))
    return {top / os.fsdecode(name) for name in names.split(b"\0") if name}


def _holds_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or an archive that holds one; nothing of it is loaded."""
    try:
        descriptor, status = open_regular(path)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, status.st_size - _TAIL))
        tail = file.read(_TAIL)
    kind = looks_like_torch(head)
    if path.suffix in PICKLES:
        return True
    if kind is None or is_safetensors(head):
        return False
    return kind == "torch-legacy" or path.suffix in MODELS or b".pkl" in head or b".pkl" in tail


_HOOKS: dict[str, Callable[[tuple[Path, ...], Workspace], Iterator[CkptError]]] = {
    "lock-check": _locks,
    "schema": _schema,
    "no-new-pickles": _pickles,
}
