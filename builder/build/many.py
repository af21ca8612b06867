"""Several recipes planned and built as one: what they share is read and made once, failures told together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from builder.base.disk import check_place
from builder.base.errors import CkptError, Place, Problem, RecipeError, UsageError
from builder.base.files import read_bounded
from builder.build.carry_out import Build, Elsewhere, build_all
from builder.build.recipes import (
    check_again,
    placing_elsewhere,
    see_sources,
    with_folders,
    write_the_lock,
)
from builder.plan import OutputJob, Plan
from builder.recipe import Recipe
from builder.recipe.lock import LOCK, Lock
from builder.recipe.read import MAX_SIZE
from builder.sources.have import telling_all
from builder.sources.opened import NotPinned, Sources
from builder.workspace import Workspace, find_lock, need_lock


@dataclass
class Outcome:
    """What became of one of several recipes: what was made, or why not; neither where it was not begun.

    `recipe` is None where it could not be read. `plan` is the one that it was built by.
    """

    path: Path
    recipe: Recipe | None = None
    plan: Plan | None = None
    made: Build | None = None
    error: CkptError | None = None
    is_skipped: bool = False

    @property
    def state(self) -> str:
        """What became of it in a word or two."""
        if self.error is not None:
            return "failed"
        return "not begun" if self.made is None else "built"

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


def read_recipes(workspace: Workspace, paths: Sequence[Path], lock: Path | bool = True) -> list[Outcome]:
    """The recipes of files, each once, and of folders, all in and below them; what is wrong is a failure.

    Among several, locks are passed over: a pattern that names recipes names those beside them too.
    """
    named = [each for path in paths for each in (recipes_below(path) if path.is_dir() else [path])]
    if len(named) > 1:
        named = [path for path in named if not path.name.endswith(LOCK)]
    if not named:
        folder = ", ".join(f"`{path}`" for path in paths)
        raise UsageError(Problem(f"there is no recipe in {folder}"))
    found = [Outcome(path) for path in {os.path.realpath(p): p for p in reversed(named)}.values()][::-1]
    for outcome in found:
        try:
            outcome.recipe = workspace.recipe(outcome.path, lock)
        except CkptError as error:
            outcome.error = error
    return found


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
            _plan(workspace, outcome, sources, find_lock)
    _check_targets(outcomes)
    return [o.plan for o in outcomes if o.plan is not None and o.error is None]


def build_recipes(
    workspace: Workspace,
    outcomes: Sequence[Outcome],
    sources: Sources,
    *,
    locked: bool = False,
    keep_going: bool = False,
    partial: bool = False,
    check: bool = False,
    explained: bool = False,
    threads: int | None = None,
    elsewhere: Elsewhere | None = None,
    before: Callable[[Sequence[Plan]], object] = lambda plans: None,
) -> None:
    """Build recipes that were read, and write the lock of each unless `locked`; failures are noted in them.

    All are planned before anything is made, but those that read a file which another of them writes: they
    come after it. Unless it is to `keep_going`, nothing is made where one has failed. `before` sees the plans
    of what is made together; all else is as for `build_recipe`.
    """
    for outcome in outcomes:
        outcome.is_skipped = True
    for wave in _waves(outcomes):
        pending = wave
        while pending:
            _plan_seen(workspace, pending, sources, locked)
            _check_targets(pending)
            ready = [o for o in pending if o.error is None]
            if not ready or (not keep_going and any(o.error for o in outcomes)):
                break
            before([o.plan for o in ready if o.plan is not None])
            _make(workspace, ready, sources, locked, keep_going, partial, threads, elsewhere)
            pending = [o for o in ready if _again(o, sources)]
            for outcome in ready:
                outcome.is_skipped = outcome.made is None
            for outcome in ready:
                _finish(workspace, outcome, locked, check, explained, threads)
        if not keep_going and any(o.error for o in outcomes):
            break
    if len(outcomes) > 1:
        for outcome in outcomes:
            outcome.placed()
    workspace.tidy()


def _again(outcome: Outcome, sources: Sources) -> bool:
    """Whether a recipe is to be built again, another file having been taken for a pinned source."""
    again = isinstance(outcome.error, NotPinned) and sources.another(outcome.error.job)
    if again:
        outcome.error = None
    return again


def _waves(outcomes: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    """Recipes in an order in which none reads a file that one in the same or a later wave writes."""
    writes = {_real(o.path, out.file): o for o in outcomes if o.recipe for out in o.recipe.outputs}
    after = {
        o.path: {q.path for f in _files(o.recipe) if (q := writes.get(f, o)) is not o}
        for o in outcomes
        if o.recipe is not None
    }
    left = [o for o in outcomes if o.recipe is not None]
    while left:
        wave = [o for o in left if not after[o.path] & {q.path for q in left}]
        if not wave:
            names = tuple(str(o.path) for o in left)
            fact = "these recipes read what one of the others writes, in a circle"
            for outcome in left:
                outcome.error = RecipeError(Problem(fact, evidence=names, hint="give an output another name"))
            return
        left = [o for o in left if o not in wave]
        failed = {o.path for o in outcomes if o.error is not None}
        yield [o for o in wave if o.error is None and not after[o.path] & failed]


def _files(recipe: Recipe) -> Iterator[str]:
    """The files that a recipe reads, and those that it includes."""
    for name, source in recipe.sources.items():
        if source.file is not None and recipe.path is not None:
            yield _real(recipe.path, source.file)
        elif name in recipe.included:
            yield from _files(recipe.included[name])


def _real(recipe: Path, file: str) -> str:
    return os.path.realpath(recipe.parent / file)


def _check_targets(outcomes: Sequence[Outcome]) -> None:
    """Have those recipes fail that write what another one does."""
    taken: dict[str, Outcome] = {}
    for outcome in outcomes:
        jobs = [n.job for n in outcome.plan.outputs()] if outcome.plan is not None else []
        for job in (j for j in jobs if isinstance(j, OutputJob)):
            beside = [job.target.with_suffix(".yaml")] if job.sidecar is not None else []
            for path in map(os.path.realpath, [job.target, *beside]):
                other = taken.setdefault(path, outcome)
                if other is not outcome and outcome.error is None:
                    place = job.recipe.place(*job.output.at, "file", value=True)
                    evidence = (f"`{other.path}` writes it too: `{path}`",)
                    hint = "give one of them another name"
                    problem = Problem("two recipes write the same file", place, evidence, hint)
                    outcome.error = RecipeError(problem)


def _plan(
    workspace: Workspace, outcome: Outcome, sources: Sources, lock_of: Callable[[Recipe], Lock | None]
) -> None:
    outcome.plan = None
    try:
        if outcome.recipe is not None:
            outcome.plan = workspace.plan(outcome.recipe, sources, lock_of(outcome.recipe))
    except CkptError as error:
        outcome.error = error


def _plan_seen(workspace: Workspace, outcomes: Sequence[Outcome], sources: Sources, locked: bool) -> None:
    """Plan recipes with the tables of contents of all their sources."""
    for outcome in outcomes:
        lock_of = need_lock if locked else find_lock
        _plan(workspace, outcome, sources, lock_of)
        recipe, plan = outcome.recipe, outcome.plan
        if recipe is None or plan is None:
            continue
        try:
            if plan.unseen:
                with telling_all(recipe, sources, plan.lock):
                    see_sources(sources, [plan.nodes[k].job for k in plan.unseen])
                _plan(workspace, outcome, sources, lock_of)
            if not locked and recipe.lock is not None and plan.lock is None:
                with placing_elsewhere():
                    check_place(recipe.lock)
        except CkptError as error:
            outcome.error = error


def _make(
    workspace: Workspace,
    outcomes: Sequence[Outcome],
    sources: Sources,
    locked: bool,
    keep_going: bool,
    partial: bool,
    threads: int | None,
    elsewhere: Elsewhere | None,
) -> None:
    """Carry out the plans of recipes."""
    folders: Mapping[int, ExitStack] = {n: ExitStack() for n in range(len(outcomes))}
    with ExitStack() as stack:
        for each in folders.values():
            stack.push(each)
        ready = []
        for n, outcome in enumerate(outcomes):
            assert outcome.plan is not None
            try:
                folders[n].enter_context(with_folders(outcome.plan))
                ready.append((n, outcome, outcome.plan))
            except CkptError as error:
                outcome.error = error
        if len(ready) < len(outcomes) and not keep_going:
            return
        made = build_all(
            [plan for _, _, plan in ready],
            sources,
            locked=locked,
            keep_going=keep_going,
            partial=partial,
            threads=threads,
            elsewhere=elsewhere,
            reporter=workspace.reporter,
        )
        for (n, outcome, plan), found in zip(ready, made, strict=True):
            if isinstance(found, Build):
                outcome.made = found
            elif found is not None:
                try:
                    assert outcome.recipe is not None
                    with folders[n].pop_all(), telling_all(outcome.recipe, sources, plan.lock):
                        raise found
                except CkptError as error:
                    outcome.error = error


def _finish(
    workspace: Workspace, outcome: Outcome, locked: bool, check: bool, explained: bool, threads: int | None
) -> None:
    """Compare what a recipe makes a second time, and write its lock."""
    recipe, plan, made = outcome.recipe, outcome.plan, outcome.made
    if recipe is None or plan is None or made is None:
        return
    try:
        if check:
            check_again(workspace, recipe, made, None, threads)
        if not locked:
            write_the_lock(workspace, recipe, plan.lock, made, None, explained)
    except CkptError as error:
        outcome.error = error
