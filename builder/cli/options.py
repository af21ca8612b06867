"""What the commands of one line have in common: options that go into the recipe they make."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from builder.base.errors import Problem, UsageError, clipped
from builder.base.recipe_address import FORMS as ADDRESSES
from builder.base.recipe_address import is_address
from builder.cli.forms import FORMS
from builder.cli.terminal import make_reporter, out
from builder.operations.fixes import FIXES
from builder.recipe.language import QUANTIZE
from builder.recipe.lock import LOCK
from builder.recipe.names import Target
from builder.recipe.profiles import PROFILES
from builder.tensors.cast import PRECISIONS
from builder.workspace import Settings, Workspace

F = TypeVar("F", bound=Callable[..., Any])
_MEANT = re.compile(r"[\w+.-]{2,}:/")  # as an address begins, and no drive of Windows


class _Named(click.Path):
    """A path that is not empty, which would be the folder one is in, and no address, of which it would be a
    part of some folder's name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty name is that of no file: name one", param, ctx)
        if isinstance(value, str) and is_address(value):
            scheme = clipped(value.partition("://")[0], 40)
            fact = f"`{scheme}://…` is an address, where a file or a folder of this machine is to be named"
            raise UsageError(Problem(fact, hint="download it, and name the file"))
        return super().convert(value, param, ctx)


class _Place(_Named):
    """A file, or a folder: one that is there, or whose name ends in a slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Target.named(str(super().convert(value, param, ctx)))


class _Recipe(_Named):
    """A recipe's path, or the address of one as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_address(value):
            return value
        if isinstance(value, str) and _MEANT.match(value) and not os.path.lexists(value):
            fact = f"`{value}` is neither a file nor the address of a recipe"
            raise UsageError(Problem(fact, hint=f"a recipe's address is {ADDRESSES}"))
        return super().convert(value, param, ctx)


FILE = _Named(path_type=Path)
PLACE = _Place(path_type=str)
NAME = _Named(path_type=str)  # as it was given: the slash at its end counts
RECIPE = _Recipe(path_type=Path)


def _about(_: click.Context, __: click.Parameter, value: Any) -> Any:
    """What is wrong is with the one recipe that is named, where it has no other place."""
    named = value if isinstance(value, tuple) else (value,)
    if len(named) == 1 and isinstance(named[0], Path):
        out().about = str(named[0])
    return value


recipe_argument = click.argument("recipe", type=RECIPE, metavar="RECIPE", callback=_about)
recipes_argument = click.argument(
    "recipes", nargs=-1, required=True, type=RECIPE, metavar="RECIPE...", callback=_about
)
format_option = click.option(
    "--output-format",
    type=click.Choice(FORMS),
    expose_value=False,
    help="For people, for programs, or for CI: annotations, SARIF 2.1.0, JUnit XML.",
)
outside_option = click.option(
    "--allow-outside", "outside", is_flag=True, help="Let RECIPE name files outside its folder."
)
_LOCK_OPTIONS = (
    click.option("--lock", "lock", type=FILE, help="Where the lock lies; default: beside RECIPE."),
    click.option("--no-lock", is_flag=True, help="Neither read nor write a lock."),
)
_SHARING_OPTIONS = (
    click.option(
        "--store",
        "shared",
        metavar="URL",
        help="A store that machines share, asked for what is not here; else `CKPT_SHARED_STORE`.",
    ),
    click.option("--store-write", "share", is_flag=True, help="Put what is made there too."),
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes.")
json_option = click.option(
    "--json", is_flag=True, expose_value=False, help="One JSON object on stdout, errors and notes in it."
)

_REPAIRS = (
    click.option("--fix", "fixes", multiple=True, type=click.Choice(list(FIXES)), help="A repair to make."),
    click.option("--profile", type=click.Choice(list(PROFILES)), help="The program it is for."),
    click.option(
        "--overflow",
        type=click.Choice(["error", "clamp", "keep"]),
        default="error",
        help="What to do with values beyond the precision.",
    ),
    click.option(
        "--non-finite",
        type=click.Choice(["error", "keep"]),
        default="error",
        help="What to do with NaN and infinity.",
    ),
)
_OPTIONS = (
    click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="Of the weights. By default what is wider than the precision that such a component is "
        "published in is rounded to that, and all else stays as it is.",
    ),
    *_REPAIRS,
    click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same."),
    json_option,
    quiet_option,
)

quantize_option = click.option(
    "--quantize",
    type=click.Choice(list(QUANTIZE)),
    help="Pack the weights of the denoiser's layers; q8_0 is for a GGUF file, all else for others.",
)

save_option = click.option(
    "--save-recipe", type=FILE, metavar="RECIPE", help="Write the recipe that was run, its sources pinned."
)


def making(command: F) -> F:
    """Add the options about what is made."""
    return _with(_OPTIONS, command)


def locking(command: F) -> F:
    """Add the options about where the lock lies."""
    return _with(_LOCK_OPTIONS, command)


def sharing(command: F) -> F:
    """Add the options about a store that machines share."""
    return _with(_SHARING_OPTIONS, command)


def lock_place(lock: Path | None, no_lock: bool) -> Path | bool:
    """Where a lock lies, as `Workspace.recipe` takes it; raises UsageError for both options."""
    if lock is not None and no_lock:
        raise UsageError(Problem("`--lock` and `--no-lock` exclude each other"))
    return False if no_lock else lock or True


def repairing(command: F) -> F:
    """Add the options about repairs, the program it is for, and numbers that do not fit."""
    return _with(_REPAIRS, command)


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def open_workspace(
    quiet: bool = False,
    *,
    offline: bool = False,
    outside: bool = False,
    shared: str | None = None,
    share: bool = False,
) -> Iterator[Workspace]:
    """A workspace for the length of a command, with what it says on the terminal.

    `shared` and `share` are as `Settings` has them. Raises UsageError for sharing with none.
    """
    settings = Settings.from_environment()
    settings = replace(settings, shared=settings.shared if shared is None else shared, share=share)
    if share and not settings.shared:
        hint = "`--store URL` or `CKPT_SHARED_STORE` names one"
        raise UsageError(Problem("`--store-write` needs a shared store", hint=hint))
    with (
        make_reporter(quiet) as reporter,
        Workspace(settings, offline=offline, outside=outside, reporter=reporter) as workspace,
    ):
        yield workspace


def recipe_path(path: Path | None, option: str = "--save-recipe") -> Path | None:
    """Where a recipe is to be written, as `option` says; raises UsageError for what is no recipe's name."""
    if path is not None and path.name.endswith(LOCK):
        better = path.with_name(f"{path.name.removesuffix(LOCK) or 'recipe'}.toml")
        raise UsageError(Problem(f"`{path}` is the name of a recipe's lock", hint=f"`{option} {better}`"))
    if path is not None and path.suffix != ".toml":
        better = path / "recipe.toml" if path.is_dir() else path.with_suffix(".toml")
        fact = f"a recipe's name ends in `.toml`, not as `{path}` does"
        raise UsageError(Problem(fact, hint=f"`{option} {better}`"))
    return path
