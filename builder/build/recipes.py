"""A recipe built from beginning to end: planned, its sources had, carried out, and its lock written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from builder.base.disk import check_place, making_folders
from builder.base.errors import (
    CkptError,
    OutputError,
    Problem,
    SourceError,
    UnreproducibleError,
    UsageError,
)
from builder.base.progress import SILENT
from builder.base.words import listed
from builder.build.carry_out import Build, Elsewhere, build
from builder.build.outputs import Naming
from builder.build.spread import Done, Means, Task, make_node
from builder.build.statements import Statements
from builder.plan import ComponentJob, Node, OutputJob, Plan
from builder.recipe import Output, Recipe
from builder.recipe.lock import Lock, differences, lock_path, write_lock
from builder.recipe.names import form_of
from builder.recipe.provenance import statement_path
from builder.sources.find import hash_files
from builder.sources.have import telling_all
from builder.sources.job import SourceJob
from builder.sources.opened import NotPinned, Sources, UnseenError
from builder.store import Store
from builder.workspace import Workspace, find_lock, need_lock

T = TypeVar("T")

Placing = Callable[[Output], str | Path]


def build_recipe(
    workspace: Workspace,
    recipe: Recipe,
    sources: Sources,
    *,
    place: Placing | None = None,
    naming: Naming | None = None,
    locked: bool = False,
    partial: bool = False,
    hashing: bool = True,
    check: bool = False,
    explained: bool = False,
    threads: int | None = None,
    elsewhere: Elsewhere | None = None,
    before: Callable[[Plan], object] = lambda plan: None,
    statements: Statements | None = None,
) -> Build:
    """Build a recipe, and write its lock unless `locked`, and `statements` of its outputs beside them.

    What changes in the lock is said, all of it if `explained`. `place` says where outputs go, and in which
    form, if not as the recipe says; `before` sees the plan before anything is made; with `check` everything
    is built a second time without the store, and compared. All else is as for `build`. Raises CkptError.

    A recipe that was fetched is held to its lock, if that says what comes out; no lock is written for it, and
    nothing that is there is replaced.
    """
    held = hold(recipe, locked)
    check_lock_place(recipe, held)

    def planned(plan: Plan) -> None:
        before(plan)
        check_places(plan, workspace, statements)

    made = _built(
        workspace,
        recipe,
        sources,
        held.lock,
        place,
        planned,
        lambda plan: build(
            plan,
            sources,
            threads=threads,
            locked=held.kept,
            hashing=hashing,
            partial=partial,
            naming=naming,
            elsewhere=elsewhere,
            reporter=workspace.reporter,
        ),
    )
    finish(
        workspace,
        recipe,
        held,
        made,
        place=place,
        check=check,
        explained=explained,
        threads=threads,
        statements=statements,
    )
    workspace.tidy()
    return made


class Held(NamedTuple):
    """The lock that a recipe is built by: `kept` is what must agree with it, `written` whether it is anew."""

    lock: Lock | None
    kept: Lock | None
    written: bool


def hold(recipe: Recipe, locked: bool) -> Held:
    """The lock of a recipe, which is kept if `locked`; raises LockError where there is none then.

    That of a recipe that was fetched is kept where it says what comes out, and never written.
    """
    lock = need_lock(recipe) if locked else find_lock(recipe)
    fetched = recipe.address is not None and recipe.path is not None and recipe.lock == lock_path(recipe.path)
    locked = locked or (fetched and lock is not None and bool(lock.outputs))
    return Held(lock, lock if locked else None, not locked and not fetched)


def check_lock_place(recipe: Recipe, held: Held) -> None:
    """Raise OutputError where the lock of a recipe is to be written, and cannot be."""
    new = held.lock is None or held.lock.recipe != recipe.digest
    if held.written and recipe.lock is not None and new:
        with _placing_elsewhere():
            check_place(recipe.lock)


def check_places(plan: Plan, workspace: Workspace, statements: Statements | None) -> None:
    """Raise OutputError where something else would be replaced by a statement, or by a stranger's recipe."""
    if statements is not None:
        jobs = [node.job for node in plan.outputs()]
        statements.check(job.target for job in jobs if isinstance(job, OutputJob))
    if plan.recipe.address is not None:
        _check_free(plan, workspace)


def finish(
    workspace: Workspace,
    recipe: Recipe,
    held: Held,
    made: Build,
    *,
    place: Placing | None = None,
    check: bool = False,
    explained: bool = False,
    threads: int | None = None,
    statements: Statements | None = None,
) -> None:
    """Compare what was made a second time, and write its lock and its statements, as for `build_recipe`."""
    if check:
        _check_again(workspace, recipe, made, place, threads)
    elif made.claimed:
        said = Problem(
            f"on the word of the shared store: {listed(tuple(made.claimed))}",
            hint="`--check` makes it here too, and compares",
        )
        if statements is not None:
            workspace.reporter.warn(said)
        else:
            workspace.reporter.note(said.fact)
    if held.written:
        _write_lock(workspace, recipe, held.lock, made, place, explained)
    if statements is not None:
        with standing(*(b.path for b in made.outputs)):
            assert made.lock is not None
            made.outputs = statements.write(recipe, made.lock, made.outputs, workspace)
        return
    for path in (statement_path(b.path) for b in made.outputs if b.state == "written"):
        if os.path.lexists(path):
            workspace.reporter.note(f"`{path}` is of what was there before: `--statement` writes it anew")


def build_node(
    workspace: Workspace, recipe: Recipe, sources: Sources, key: str, *, threads: int | None = None
) -> tuple[Node, Done]:
    """Make one node of a recipe's plan, of which `key` begins the key; its lock is read and not written.

    A component goes into the store, and the shared one where that is asked for; an output into its place.
    Raises UsageError where no such node is, or several are, and CkptError.
    """

    def only(plan: Plan) -> tuple[Node, Done]:
        made = (ComponentJob, OutputJob)
        found = [n for n in plan if n.key.startswith(key) and isinstance(n.job, made)]
        if len(found) != 1:
            keys = f"{len(found)} components and outputs have keys that begin" if found else "no key begins"
            fact = f"{keys} with `{key}`"
            raise UsageError(Problem(fact, hint="`ckpt plan --json` has the keys"))
        (node,) = found
        task = Task(plan.part(node.key), node.key, Means("", threads=threads), {})
        return node, make_node(task, sources, workspace.reporter)

    def planned(plan: Plan) -> None:
        check_places(plan, workspace, None)

    found = _built(workspace, recipe, sources, find_lock(recipe), None, planned, only)
    workspace.tidy()
    return found


def _built(
    workspace: Workspace,
    recipe: Recipe,
    sources: Sources,
    lock: Lock | None,
    place: Placing | None,
    before: Callable[[Plan], object],
    carry_out: Callable[[Plan], T],
) -> T:
    """Plan and build; again, where another file was pinned."""
    while True:
        plan = plan_seen(workspace, recipe, sources, lock, place)
        before(plan)
        try:
            with telling_all(recipe, sources, lock), with_folders(plan):
                return carry_out(plan)
        except NotPinned as error:
            if not sources.another(error.job, error.path):
                raise


def plan_seen(
    workspace: Workspace, recipe: Recipe, sources: Sources, lock: Lock | None, place: Placing | None = None
) -> Plan:
    """The plan of a recipe with the tables of contents of all its sources."""
    while True:
        try:
            plan = workspace.plan(recipe, sources, lock, place=place)
        except UnseenError as error:
            with telling_all(recipe, sources, lock):
                sources.fetch(error.job)
            continue
        if not plan.unseen:
            return plan
        with telling_all(recipe, sources, lock):
            _see(sources, [plan.nodes[k].job for k in plan.unseen])


def _check_free(plan: Plan, workspace: Workspace) -> None:
    """Raise OutputError where a stranger's recipe would replace a file that is another one."""
    for node in plan.outputs():
        job = node.job
        assert isinstance(job, OutputJob)
        if node.state == "unchanged" or not os.path.lexists(job.target):
            continue
        locked = plan.lock.outputs.get(job.output.name) if plan.lock is not None else None
        with suppress(SourceError):
            if locked is not None and hash_files(job.target, workspace.store, SILENT) == locked.sha256:
                continue
        fact = f"`{job.target}` is there already"
        several = len(plan.recipe.outputs) > 1
        hint = "build it in another folder" if several else "`-o FILE` gives the output another name"
        raise OutputError(Problem(fact, hint=hint))


@contextmanager
def with_folders(plan: Plan) -> Iterator[None]:
    """With the folders of what is to be written; those that were missing are gone if nothing is in them.

    Raises OutputError where nothing could be written.
    """
    pending = [n.job for n in plan.outputs() if n.state != "unchanged"]
    with making_folders(job.target.parent for job in pending if isinstance(job, OutputJob)):
        yield


def _see(sources: Sources, jobs: list[object]) -> None:
    """Have the tables of contents of sources: as hosts show them, else all at once with the whole files.

    The failure of the first is raised.
    """
    wanted = [j for j in jobs if isinstance(j, SourceJob) and not _is_shown(sources, j)]
    if not wanted:
        return
    with ThreadPoolExecutor(len(wanted), thread_name_prefix="fetch") as pool:
        futures = [pool.submit(sources.fetch, job) for job in wanted]
        try:
            for future in futures:
                future.result()
        except BaseException:
            sources.stop()
            raise


def _is_shown(sources: Sources, job: SourceJob) -> bool:
    """Whether what a source holds can be seen on its host."""
    try:
        return sources.seen(job) and sources.is_open(job)
    except CkptError:
        return False  # why not is said when it is fetched


@contextmanager
def _placing_elsewhere() -> Iterator[None]:
    """Say of an OutputError that the lock may lie elsewhere."""
    try:
        yield
    except OutputError as error:
        hint = "`--lock FILE` writes the lock of one recipe elsewhere, `--no-lock` does without"
        error.problems = tuple(replace(p, hint=hint) for p in error.problems)
        raise


def _write_lock(
    workspace: Workspace,
    recipe: Recipe,
    lock: Lock | None,
    made: Build,
    place: Placing | None,
    explained: bool,
) -> None:
    """Write the lock of a recipe, if what was made is the recipe's own; what changes is said."""
    if made.lock is None or recipe.lock is None or not _is_the_recipes_own(recipe, place):
        return
    changes = differences(lock, made.lock, partial=True) if lock is not None else ()
    if moved := [change for change in changes if "became" in change]:
        more = f", and {len(moved) - 1} more; `--explain` lists them" if len(moved) > 1 else ""
        for change in moved if explained else [f"{moved[0]}{more}"]:
            workspace.reporter.note(f"the lock changes: {change}")
    with standing(*(b.path for b in made.outputs)), _placing_elsewhere():
        write_lock(recipe.lock, made.lock)


@contextmanager
def standing(*made: Path) -> Iterator[None]:
    """Say of an OutputError that what was made before stands."""
    try:
        yield
    except OutputError as error:
        stands = tuple(f"`{path}` is written, and stands" for path in made)
        error.problems = tuple(replace(p, evidence=(*p.evidence, *stands)) for p in error.problems)
        raise


def _is_the_recipes_own(recipe: Recipe, place: Placing | None) -> bool:
    """Whether what was made is what the recipe says, not its contents in another container.

    The files of a set are named after it, and so part of what it is.
    """
    if place is None:
        return True
    named = [(output, str(place(output))) for output in recipe.outputs]
    return all(
        form_of(name) == o.form and (o.form != "sharded" or Path(name).name == Path(o.file).name)
        for o, name in named
    )


def _check_again(
    workspace: Workspace, recipe: Recipe, made: Build, place: Placing | None, threads: int | None
) -> None:
    """Build again from nothing, in a folder of its own, and compare; raises UnreproducibleError."""

    def again(output: Output) -> str:
        folder, name = root / output.name, str(place(output)) if place is not None else output.file
        folder.mkdir(exist_ok=True)
        return f"{folder / Path(name).name}{'/' * (form_of(name) == 'diffusers')}"

    first = {b.name: b for b in made.outputs}
    downloads = workspace.store.downloads  # which are compared with their pins, and not to be had again
    reporter = workspace.reporter
    with (
        workspace.store.scratch() as root,
        Store(root / "store", downloads=downloads, reporter=reporter) as store,
        workspace.sources(store) as sources,
    ):
        second = _built(
            workspace,
            recipe,
            sources,
            made.lock,
            again,
            lambda plan: None,
            lambda plan: build(plan, sources, threads=threads, reporter=reporter),
        )
    problems = [
        Problem(
            f"building `{b.path.name}` again gave another file",
            evidence=(
                f"first  {first[b.name].sha256}",
                f"second {b.sha256}",
                *(differences(made.lock, second.lock) if made.lock and second.lock else ()),
            ),
            hint="please report this with the recipe: it must not happen",
        )
        for b in second.outputs
        if b.sha256 != first[b.name].sha256
    ]
    if problems:
        raise UnreproducibleError(*problems)
    reporter.note("built a second time without the store: the same bytes")
