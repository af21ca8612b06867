"""What all work shares: the catalog, the store, the network, settings, and one who hears of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.base.errors import CkptError, LockError, OutputError, Place, Problem, UsageError
from builder.base.progress import SILENT, Reporter
from builder.base.recipe_address import parse_recipe_address
from builder.models.catalog import Catalog, load_catalog
from builder.plan import Plan, make_plan
from builder.plan.folders import vocabulary_names
from builder.plan.graph import CHECKPOINT
from builder.recipe import Recipe, load_recipe
from builder.recipe.lock import Lock, read_lock
from builder.sources.have import telling_all
from builder.sources.opened import Sources
from builder.store import Made, Store, default_root
from builder.store.shared import Shared
from builder.tensors.digests import Row

if TYPE_CHECKING:
    from builder.sources.net.client import Session
    from builder.sources.net.recipes import FetchedRecipe

WIDEST = 8  # bytes of a number
MOST_BESIDE = 64 << 20  # bytes of what is of a component beyond its table
STORE_SIZE = 20_000_000_000  # bytes of blobs and downloads that a store keeps, if nothing else is said


@dataclass(frozen=True)
class Settings:
    """What a user has set for all work.

    `models` are folders that are searched for sources, `components` folders of catalogs beside the shipped
    one. `keep_all` has the store keep the bytes of every component. `shared` is the address of a store that
    machines share, empty for none; only with `share` is anything put there. Without `trust_times`, no
    digest of a file is believed that was only remembered by its times. `environment` holds what the network
    reads (tokens, caches, endpoints) and `SOURCE_DATE_EPOCH`.
    """

    store: Path
    models: tuple[Path, ...] = ()
    components: tuple[Path, ...] = ()
    keep_all: bool = False
    trust_times: bool = True
    shared: str = ""
    share: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """What the environment says, as it is now."""
        said = dict(os.environ if environment is None else environment)
        return cls(
            default_root(said),
            _folders(said.get("CKPT_MODELS", "")),
            _folders(said.get("CKPT_COMPONENTS", "")),
            said.get("CKPT_STORE_KEEP") == "all",
            said.get("CKPT_TRUST_STAT") != "0",
            said.get("CKPT_SHARED_STORE", ""),
            environment=said,
        )


def _folders(listed: str) -> tuple[Path, ...]:
    """Folders that a variable lists, separated as in PATH."""
    return tuple(Path(os.path.expanduser(f)) for f in listed.split(os.pathsep) if f)  # noqa: PTH111


class Workspace:
    """The catalog, the store, the network and settings; use it in `with`. Serves several threads.

    Nothing is opened before it is needed. `offline`: no network. `outside`: recipes may name files outside
    their own folder and those of models, as a stranger's must not.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        offline: bool = False,
        outside: bool = False,
        reporter: Reporter = SILENT,
    ) -> None:
        self.settings = settings or Settings.from_environment()
        self.offline = offline
        self.outside = outside
        self.reporter = reporter
        self._session: Session | None = None
        self._fetched: list[FetchedRecipe] = []
        self._folders = ExitStack()  # of those
        self._guard = threading.Lock()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if isinstance(error, CkptError):
            self.by_address(error)
        self.close()

    def by_address(self, error: CkptError) -> CkptError:
        """An error, which from now on names the files of recipes that were fetched by their addresses."""
        locks = isinstance(error, LockError)
        error.problems = tuple(self._by_address(p, of_lock=locks) for p in error.problems)
        return error

    def _by_address(self, problem: Problem, *, of_lock: bool = False) -> Problem:
        """A problem that names the files of recipes that were fetched by their addresses."""
        for fetched in self._fetched:
            problem = fetched.problem(problem, of_lock=of_lock)
        return problem

    def close(self) -> None:
        """Close what was opened."""
        with self._guard:
            if self._session is not None:
                self._session.close()
                self._session = None
        self._folders.close()
        if "store" in self.__dict__:
            self.store.close()

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, with the user's own folders."""
        return load_catalog(self.settings.components)

    @cached_property
    def store(self) -> Store:
        """The store."""
        settings = self.settings
        return Store(
            settings.store,
            keep_all=settings.keep_all,
            trust_times=settings.trust_times,
            shared=self._shared(),
            reporter=self.reporter,
        )

    def _shared(self) -> Shared | None:
        """The store that machines share, where one is set; raises UsageError for no address of one."""
        settings = self.settings
        if not settings.shared:
            return None
        from builder.sources.net.buckets import bucket_of

        far, connect = bucket_of(settings.shared, settings.environment)
        if far and self.offline:
            return None
        return Shared(
            connect,
            settings.shared,
            writing=settings.share,
            known=self._knows,
            fits=self._fits,
            reporter=self.reporter,
        )

    def _knows(self, made: Made) -> bool:
        """Whether the catalog has the component that something is said to be, of such a size."""
        if CHECKPOINT in (made.cls, made.component):
            return made.cls == made.component
        component = self.catalog.components.get(made.component)
        if component is None or component.parameters is None:
            return component is not None
        return made.bytes <= WIDEST * component.parameters + MOST_BESIDE

    def _fits(self, made: Made, rows: Mapping[str, Row]) -> bool:
        """Whether tensors of these names have all that the component has that they are said to be."""
        component = self.catalog.components.get(made.component)
        if component is None or component.parameters is None:
            return True  # a whole file, or an adapter, which is of the layers that it changes
        needed = {name for name, rule in component.tensors.items() if not rule.optional}
        promoted = {component.promote.get(name, name) for name in needed}
        return needed <= rows.keys() or promoted <= rows.keys()

    def network(self) -> Session:
        """The network, opened when it is first used: most work need not even load what speaks to it."""
        with self._guard:
            if self._session is None:
                from builder.sources.net.client import Session

                self._session = Session(
                    offline=self.offline, reporter=self.reporter, environ=self.settings.environment
                )
            return self._session

    def sources(self, store: Store | None = None, network: Callable[[], Session] | None = None) -> Sources:
        """What finds, opens and fetches sources; close it after use."""
        return Sources(
            self.catalog,
            store or self.store,
            self.settings.models,
            network or self.network,
            self.reporter,
            self.settings.environment,
            self.outside,
        )

    def tidy(self) -> None:
        """Keep the store within its bounds, if it has grown: what was not used for longest goes."""
        if self.store.grown:
            from builder.store.upkeep import collect

            with suppress(OutputError):  # what was built is built
                collect(self.store, STORE_SIZE)
            self.store.grown = 0

    def recipe(self, path: Path | str, lock: Path | bool = True, *, text: str | None = None) -> Recipe:
        """The recipe of a file, or of `text` in its place; remarks on it are reported. Raises RecipeError.

        `lock` is where its lock lies, True for beside it, False for none. A string is an address: the recipe
        is fetched, with the lock beside it. Raises FetchError, UsageError.
        """
        if isinstance(path, str):
            recipe = self._recipe_at(path, lock is True)
        else:
            recipe = load_recipe(path, self.catalog, outside=self.outside, text=text)
        if lock is not True:
            recipe = replace(recipe, lock=lock or None)
        for note in recipe.notes:
            self.reporter.note(note.fact)
        return recipe

    def _recipe_at(self, named: str, lock: bool) -> Recipe:
        """A recipe from its address, which lies in a folder of its own in the store until all is done."""
        from builder.sources.net.recipes import fetch_recipe

        if self.outside:
            hint = "leave it out; `CKPT_MODELS` names the folders that its sources may lie in"
            raise UsageError(Problem("`--allow-outside` is for recipes that lie here", hint=hint))
        address = parse_recipe_address(named)
        root = self._folders.enter_context(self.store.scratch())
        vocabulary = vocabulary_names(self.catalog.layouts.values())
        fetched = fetch_recipe(address, root, self.network(), self.store, lock=lock, vocabulary=vocabulary)
        self._fetched.append(fetched)
        if str(fetched.address) != str(address):
            self.reporter.note(f"`{address}` is now `{fetched.address}`, which names it for ever")
        recipe = fetched.addressed(load_recipe(fetched.path, self.catalog))
        if recipe.lock is not None and not recipe.lock.exists():
            if lock:
                self.reporter.note(f"there is no lock beside `{fetched.address}`")
            return replace(recipe, lock=None)
        return recipe

    def plan(self, recipe: Recipe, sources: Sources, lock: Lock | None = None, **options: Any) -> Plan:
        """The plan of a recipe; `options` go to `make_plan`, and warnings are reported."""
        while True:
            try:
                with telling_all(recipe, sources, lock):
                    plan = make_plan(
                        recipe, sources, lock=lock, environment=self.settings.environment, **options
                    )
                break
            except CkptError:
                # It may be planned with another file, which only has the name of the one that is pinned.
                if not sources.refuse_others():
                    raise
        for problem in plan.warnings:
            self.reporter.warn(self._by_address(problem))
        return plan


def find_lock(recipe: Recipe, *, anew: bool = False) -> Lock | None:
    """The lock beside a recipe, None where there is none; with `anew`, one that cannot be read is none."""
    if recipe.lock is None:
        return None
    try:
        return read_lock(recipe.lock)
    except LockError:
        if not anew:
            raise
        return None


def need_lock(recipe: Recipe) -> Lock:
    """The lock beside a recipe; raises LockError when there is none."""
    lock = find_lock(recipe)
    if lock is None:
        where, hint = recipe.lock or recipe.name, "`ckpt build` or `ckpt lock` makes it"
        place = Place(str(recipe.path)) if recipe.path is not None else None
        if recipe.address is not None:
            where, place, hint = f"beside {recipe.address}", None, "build it without `--locked`"
        raise LockError(Problem(f"there is no lock `{where}`", place, hint=hint))
    return lock
