"""Several recipes planned and built as one: what they share is read and made once, failures told together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

from builder.base.errors import CkptError, FetchError, Place, Problem, RecipeError, UsageError
from builder.base.files import read_bounded
from builder.base.words import command_line
from builder.build.carry_out import Build, Elsewhere, build_all
from builder.build.recipes import (
    Held,
    Placing,
    check_lock_place,
    check_places,
    finish,
    hold,
    plan_seen,
    with_folders,
)
from builder.build.statements import Statements
from builder.plan import OutputJob, Plan
from builder.recipe import Recipe
from builder.recipe.lock import LOCK
from builder.recipe.profiles import CONFIG
from builder.recipe.read import MAX_SIZE
from builder.sources.have import telling_all
from builder.sources.opened import NotPinned, Sources
from builder.workspace import Workspace, find_lock


@dataclass
class Outcome:
    """What became of one of several recipes: what was made, or why not; neither where it was not begun.

    `path` is an address where that is a string. `recipe` is None where it could not be read. `plan` is the
    one that it was built by, with the lock that is `held`.
    """

    path: Path | str
    recipe: Recipe | None = None
    plan: Plan | None = None
    held: Held | None = None
    made: Build | None = None
    error: CkptError | None = None
    is_skipped: bool = False

    @property
    def state(self) -> Literal["built", "failed", "not begun"]:
        """What became of it in a word or two."""
        if self.error is not None:
            return "failed"
        return "not begun" if self.made is None else "built"

    @contextmanager
    def failing(self, workspace: Workspace) -> Iterator[None]:
        """Take note of what fails; files that were fetched are named by their addresses."""
        try:
            yield
        except CkptError as error:
            self.error = workspace.by_address(error)

    def placed(self) -> None:
        """Have a failure that has no place say which recipe it is of."""
        if self.error is not None:
            at = Place(str(self.path))
            self.error.problems = tuple(replace(p, place=p.place or at) for p in self.error.problems)


class SeveralError(CkptError):
    """Failures of several recipes together; the exit code is that of the first."""

    def __init__(self, errors: Sequence[CkptError]) -> None:
        super().__init__(*dict.fromkeys(p for e in errors for p in e.problems))
        self.exit_code = errors[0].exit_code


def check_all(outcomes: Sequence[Outcome]) -> None:
    """Raise SeveralError where a recipe has failed; of several, each problem says which."""
    for outcome in outcomes if len(outcomes) > 1 else ():
        outcome.placed()
    if errors := [o.error for o in outcomes if o.error is not None]:
        raise SeveralError(errors)


def read_recipes(
    workspace: Workspace, named: Sequence[Path | str], lock: Path | bool = True
) -> list[Outcome]:
    """The recipes of files and addresses, each once, and of folders, all in and below them.

    What is wrong is a failure. Among several, locks are passed over: a pattern that names recipes names those
    beside them too.
    """
    paths = [each for path in named for each in _recipes_at(path)]
    if len(paths) > 1:
        paths = [path for path in paths if isinstance(path, str) or not path.name.endswith(LOCK)]
    if not paths:
        folder = ", ".join(f"`{path}`" for path in named)
        hint = "a recipe ends in `.toml`, and has a line `format = 1`"
        raise UsageError(Problem(f"there is no recipe in {folder}", hint=hint))
    once = {p if isinstance(p, str) else os.path.realpath(p): p for p in reversed(paths)}
    found = [Outcome(path) for path in once.values()][::-1]
    for outcome in found:
        with outcome.failing(workspace):
            outcome.recipe = workspace.recipe(outcome.path, lock)
    return found


def _recipes_at(path: Path | str) -> Sequence[Path | str]:
    return recipes_below(path) if isinstance(path, Path) and path.is_dir() else [path]


def recipes_below(folder: Path) -> list[Path]:
    """The recipes in a folder and below it: TOML that says `format`; hidden folders are passed over."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for path in (Path(root, f) for f in sorted(files) if f.endswith(".toml") and not f.endswith(LOCK)):
            with suppress(OSError):
                if _FORMAT.search(read_bounded(path, MAX_SIZE)):
                    found.append(path)
    return found


_FORMAT = re.compile(rb"^format[ \t]*=", re.MULTILINE)


def plan_recipes(workspace: Workspace, outcomes: Sequence[Outcome], sources: Sources) -> list[Plan]:
    """The plans of recipes that were read; what is wrong with one is its failure."""
    for outcome in outcomes:
        if outcome.recipe is not None and outcome.error is None:
            with outcome.failing(workspace):
                outcome.plan = workspace.plan(outcome.recipe, sources, find_lock(outcome.recipe))
    _name_makers(outcomes)
    _check_targets(outcomes)
    return [o.plan for o in outcomes if o.plan is not None and o.error is None]


@dataclass
class Several:
    """Recipes that were read, to be built as one: the lock of each is written unless `locked`.

    All are planned before anything is made, but those that read a file which another of them writes: they
    come after it. Failures are noted in them. Unless it is to `keep_going`, nothing is made where one has
    failed. `before` sees the plans of what is made together; all else is as for `build_recipe`.
    """

    workspace: Workspace
    outcomes: Sequence[Outcome]
    sources: Sources
    _: KW_ONLY
    place: Placing | None = None
    locked: bool = False
    keep_going: bool = False
    partial: bool = False
    check: bool = False
    explained: bool = False
    threads: int | None = None
    elsewhere: Elsewhere | None = None
    before: Callable[[Sequence[Plan]], object] = lambda plans: None
    statements: Statements | None = None

    def build(self) -> None:
        """Build them, wave after wave; what becomes of each is noted in it."""
        for outcome in self.outcomes:
            outcome.is_skipped = True
        for wave in _waves(self.outcomes, self.place):
            pending = wave
            while pending:
                pending = self._build(pending)
            if self._is_over:
                break
        if len(self.outcomes) > 1:
            for outcome in self.outcomes:
                outcome.placed()
        self.workspace.tidy()

    @property
    def _is_over(self) -> bool:
        """Whether nothing more is to be begun."""
        return not self.keep_going and any(o.error is not None for o in self.outcomes)

    def _build(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Build some of them; those that are to be built again, as another file was pinned."""
        for outcome in outcomes:
            self._plan(outcome)
        _check_targets(self.outcomes)
        ready = [o for o in outcomes if o.error is None]
        if not ready or self._is_over:
            return []
        self.before([o.plan for o in ready if o.plan is not None])
        self._make(ready)
        again = [o for o in ready if _again(o, self.sources)]
        for outcome in ready:
            outcome.is_skipped = outcome.made is None
            self._finish(outcome)
        return again

    def _plan(self, outcome: Outcome) -> None:
        """Plan a recipe with the tables of contents of all its sources."""
        recipe, outcome.plan = outcome.recipe, None
        assert recipe is not None
        with outcome.failing(self.workspace):
            outcome.held = hold(recipe, self.locked)
            check_lock_place(recipe, outcome.held)
            outcome.plan = plan_seen(self.workspace, recipe, self.sources, outcome.held.lock, self.place)
            check_places(outcome.plan, self.workspace, self.statements)

    def _make(self, outcomes: Sequence[Outcome]) -> None:
        """Carry out the plans of recipes."""
        with ExitStack() as folders:
            ready = []
            for outcome in outcomes:
                assert outcome.plan is not None and outcome.held is not None
                with outcome.failing(self.workspace):
                    folders.enter_context(with_folders(outcome.plan))
                    ready.append((outcome, outcome.plan, outcome.held.kept))
            if self._is_over:
                return
            made = build_all(
                [plan for _, plan, _ in ready],
                self.sources,
                locked=[kept for *_, kept in ready],
                keep_going=self.keep_going,
                partial=self.partial,
                threads=self.threads,
                elsewhere=self.elsewhere,
                reporter=self.workspace.reporter,
            )
            for (outcome, plan, _), found in zip(ready, made, strict=True):
                if isinstance(found, Build):
                    outcome.made = found
                elif found is not None:
                    told = telling_all(plan.recipe, self.sources, plan.lock)
                    with outcome.failing(self.workspace), told:
                        raise found

    def _finish(self, outcome: Outcome) -> None:
        """Compare what was made a second time, and write its lock and its statements."""
        if outcome.recipe is None or outcome.held is None or outcome.made is None:
            return
        with outcome.failing(self.workspace):
            finish(
                self.workspace,
                outcome.recipe,
                outcome.held,
                outcome.made,
                place=self.place,
                check=self.check,
                explained=self.explained,
                threads=self.threads,
                statements=self.statements,
            )


def _again(outcome: Outcome, sources: Sources) -> bool:
    """Whether a recipe is to be built again, another file having been taken for a pinned source."""
    error = outcome.error
    again = isinstance(error, NotPinned) and sources.another(error.job, error.path)
    if again:
        outcome.error = None
    return again


def _name_makers(outcomes: Sequence[Outcome]) -> None:
    """Have those recipes that lack a file say which of the others makes it."""
    writes = _writers(outcomes, None)
    for outcome in outcomes:
        if outcome.recipe is None or not isinstance(outcome.error, FetchError):
            continue
        lacking = [f for f in _files(outcome.recipe) if f in writes and not os.path.lexists(f)]
        if lacking:
            hint = f"`{command_line('build', outcomes[writes[lacking[0]]].path)}` makes it"
            outcome.error.problems = tuple(replace(p, hint=hint) for p in outcome.error.problems)


def _writers(outcomes: Sequence[Outcome], place: Placing | None) -> dict[str, int]:
    """Which recipe writes a file, by the file's real path."""
    return {
        os.path.realpath(place(out) if place is not None else o.recipe.target(out)): n
        for n, o in enumerate(outcomes)
        if o.recipe is not None
        for out in o.recipe.outputs
    }


def _waves(outcomes: Sequence[Outcome], place: Placing | None) -> Iterator[list[Outcome]]:
    """Recipes in an order in which none reads a file that one in the same or a later wave writes."""
    writes = _writers(outcomes, place)
    after = {
        n: {writes[f] for f in _files(o.recipe) if f in writes} - {n}
        for n, o in enumerate(outcomes)
        if o.recipe is not None
    }
    left = set(after)
    while left:
        wave = sorted(n for n in left if not after[n] & left)
        if not wave:
            names = tuple(str(outcomes[n].path) for n in sorted(left))
            fact = "these recipes read what one of the others writes, in a circle"
            for n in left:
                problem = Problem(fact, evidence=names, hint="give an output another name")
                outcomes[n].error = RecipeError(problem)
            return
        left -= set(wave)
        made = {n for n, o in enumerate(outcomes) if o.made is not None and o.error is None}
        yield [outcomes[n] for n in wave if outcomes[n].error is None and after[n] <= made]


def _files(recipe: Recipe) -> Iterator[str]:
    """The files that a recipe reads, and those that it includes."""
    for name, source in recipe.sources.items():
        if source.file is not None and recipe.path is not None:
            yield os.path.realpath(recipe.path.parent / source.file)
        elif name in recipe.included:
            yield from _files(recipe.included[name])


def _check_targets(outcomes: Sequence[Outcome]) -> None:
    """Have those recipes fail that write what another one does."""
    taken: dict[str, Outcome] = {}
    for outcome in outcomes:
        jobs = [n.job for n in outcome.plan.outputs()] if outcome.plan is not None else []
        for job in (j for j in jobs if isinstance(j, OutputJob)):
            beside = [job.target.with_suffix(CONFIG)] if job.sidecar is not None else []
            for path in map(os.path.realpath, [job.target, *beside]):
                other = taken.setdefault(path, outcome)
                if other is not outcome and outcome.error is None:
                    place = job.recipe.place(*job.output.at, "file", value=True)
                    evidence = (f"`{other.path}` writes it too: `{path}`",)
                    hint = "give one of them another name"
                    problem = Problem("two recipes write the same file", place, evidence, hint)
                    outcome.error = RecipeError(problem)
