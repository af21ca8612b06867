"""What the commands that take a recipe have in common: opening it, its lock, the store and the plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.base.errors import LockError, Problem
from builder.base.progress import Reporter
from builder.models.catalog import Catalog, load_catalog
from builder.plan import Plan, make_plan
from builder.recipe import Recipe, load_recipe
from builder.recipe.lock import Lock, lock_path, read_lock
from builder.sources.find import model_folders
from builder.sources.opened import Sources
from builder.store import Store

if TYPE_CHECKING:
    from builder.sources.net.client import Session

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@dataclass
class Work:
    """A recipe with all that it takes to plan and build it."""

    recipe: Recipe
    catalog: Catalog
    store: Store
    lock: Lock | None
    lock_path: Path
    reporter: Reporter
    network: Callable[[], Session]

    def plan(self, **options: Any) -> Plan:
        """The plan of the recipe; `options` go to `make_plan`."""
        plan = make_plan(
            self.recipe,
            catalog=self.catalog,
            store=self.store,
            lock=self.lock,
            network=self.network,
            reporter=self.reporter,
            **options,
        )
        for problem in plan.warnings:
            self.reporter.warn(problem)
        return plan

    def sources(self) -> Sources:
        """The recipe's sources without a plan; they may be downloaded."""
        return Sources(
            self.recipe,
            self.catalog,
            self.store,
            model_folders(),
            self.reporter,
            self.lock,
            self.network,
            download=True,
        )


@contextmanager
def open_session(
    path: Path, reporter: Reporter, *, offline: bool = False, anew: bool = False
) -> Iterator[Work]:
    """Read a recipe and its lock, and open the store; the network is not used before it is needed.

    With `anew` a lock that cannot be read is none.
    """
    catalog = load_catalog()
    recipe = load_recipe(path, catalog)
    for note in recipe.notes:
        reporter.note(note.fact)
    where = lock_path(path)
    try:
        lock = read_lock(where)
    except LockError:
        if not anew:
            raise
        lock = None
    with Store(reporter=reporter) as store:
        network = _Network(offline, reporter)
        try:
            yield Work(recipe, catalog, store, lock, where, reporter, network)
        finally:
            network.close()


class _Network:
    """The network, opened when it is first used: most commands need not even load what speaks to it."""

    def __init__(self, offline: bool, reporter: Reporter) -> None:
        self._offline = offline
        self._reporter = reporter
        self._session: Session | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Session:
        with self._lock:
            if self._session is None:
                from builder.sources.net.client import Session

                self._session = Session(offline=self._offline, reporter=self._reporter)
            return self._session

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def need_lock(work: Work) -> Lock:
    """The recipe's lock; raises LockError when there is none."""
    if work.lock is None:
        raise LockError(
            Problem(f"there is no lock `{work.lock_path}`", hint="`ckpt build` or `ckpt lock` makes it")
        )
    return work.lock
