"""What commands that take several recipes have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from builder.base.errors import CkptError, Problem, UsageError
from builder.build.many import Outcome, check_all
from builder.cli.forms import Case
from builder.cli.terminal import out


def are_several(recipes: Sequence[Path | str]) -> bool:
    """Whether several recipes are meant, as a folder means those in it."""
    return len(recipes) > 1 or any(isinstance(recipe, Path) and recipe.is_dir() for recipe in recipes)


def told(outcomes: Sequence[Outcome]) -> None:
    """Have a report name each of several recipes, and raise SeveralError where one has failed."""
    for o in outcomes:
        code, problems = (o.error.exit_code, o.error.problems) if o.error is not None else (0, ())
        out().cases.append(Case(str(o.path), int(code), problems, o.is_skipped and not problems))
    check_all(outcomes)


def one_only(recipes: Sequence[Path | str], **options: object) -> None:
    """Raise UsageError where an option is for one recipe, and there are several."""
    for name, value in options.items():
        if value and are_several(recipes):
            there = f"there are {len(recipes)}" if len(recipes) > 1 else f"`{recipes[0]}` is a folder of them"
            fact = f"`--{name.replace('_', '-')}` is for one recipe, and {there}"
            raise UsageError(Problem(fact, hint="name one recipe, or leave it out"))


def local(recipe: Path | str, what: str) -> Path:
    """The path of a recipe; raises UsageError for an address, which `what` does not take."""
    if isinstance(recipe, str):
        hint = "download it, with what lies beside it, and name the file"
        raise UsageError(Problem(f"{what} does not take a recipe's address", hint=hint))
    return recipe


@contextmanager
def as_given(recipes: Sequence[Path | str]) -> Iterator[None]:
    """Have errors about whole paths name files from the current folder, where all recipes are given so."""
    try:
        yield
    except CkptError as error:
        if not any(Path(recipe).is_absolute() for recipe in recipes):
            here = f"{Path.cwd()}/"
            error.problems = tuple(p.renamed(lambda said: said.replace(here, "")) for p in error.problems)
        raise
