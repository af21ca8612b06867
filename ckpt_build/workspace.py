"""All that can be done, with settings in one place: files looked into, recipes planned and built."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.base.dsse import PrivateKey, PublicKey
from builder.base.errors import FetchError, Problem, UsageError
from builder.base.recipe_address import is_address
from builder.base.toml import escaped
from builder.build import build_recipe, verify
from builder.build.many import Outcome, Several, check_all, plan_recipes
from builder.build.spread import Farm, means_of
from builder.build.statements import Statements, verify_statement
from builder.formats import open_checkpoint
from builder.models.catalog import Catalog, load_catalog
from builder.models.parts import find_part, slot_of
from builder.plan import joined
from builder.recipe import load_recipe
from builder.recipe import recipe as model
from builder.recipe.names import Target, whole_name
from builder.reports.diff import causes as diff_causes
from builder.reports.diff import compare
from builder.reports.diff import render as diff_to_text
from builder.reports.diff import to_json as diff_to_json
from builder.reports.inspect import build_report
from builder.reports.new import describe, write
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import output_path, place_in, place_of, run
from builder.toolkit.convert import convert
from builder.toolkit.extract import extraction, target_of
from builder.toolkit.prune import Options as PruneOptions
from builder.toolkit.prune import plan_pruning, prune, unmatched
from builder.toolkit.replace import replacement
from builder.toolkit.sweep import axis_of, variants
from builder.workspace import Settings, find_lock
from builder.workspace import Workspace as Inner
from ckpt_build.checkpoint import Checkpoint
from ckpt_build.given import inspection_of, plan_of, result_of, results_of
from ckpt_build.listening import Listener, OnProgress
from ckpt_build.recipe import Recipe, composed, made_of
from ckpt_build.results import Difference, Inspection, Plan, Result, Results
from ckpt_build.store import Store

UNNAMED = "<recipe>"  # what messages call a recipe that is no file


class Workspace:
    """Settings, and what can be done with them; holds nothing open, and may be used by several threads.

    `store` is the folder of what was made before, `models` are folders that are searched for sources, and
    `components` folders of catalogs beside the shipped one. What is None is as `environment` says
    (`CKPT_STORE`, `CKPT_MODELS`, `CKPT_COMPONENTS`, `CKPT_SHARED_STORE`; by default that of the process, as
    it is now). `shared` is the address of a store that machines share; with `share`, what is made is put
    there too. `offline`: no network. `outside`: recipes may name files outside their own folder and those of
    models, as a stranger's must not.

    `progress` is called with a `Progress` while data is read or fetched: from threads of the work, one call
    at a time. What it raises ends the work, and is raised. Once `cancel` is set, from any thread, work ends
    soon and raises `Cancelled`. Whatever ends it, as also Ctrl-C does, leaves every file as it was.
    """

    def __init__(
        self,
        *,
        store: str | Path | None = None,
        models: Sequence[str | Path] | None = None,
        components: Sequence[str | Path] | None = None,
        shared: str | None = None,
        share: bool = False,
        offline: bool = False,
        outside: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        said = Settings.from_environment(environment)
        self._settings = replace(
            said,
            store=said.store if store is None else Path(store),
            models=said.models if models is None else tuple(map(Path, models)),
            components=said.components if components is None else tuple(map(Path, components)),
            shared=said.shared if shared is None else shared,
            share=share,
        )
        self._offline, self._outside = offline, outside

    @property
    def store(self) -> Store:
        """What was made before, and where it lies."""
        return Store(self._settings.store)

    # -- files

    def open(self, file: str | Path) -> Checkpoint:
        """A checkpoint: its table of contents is read, its tensors are not; nothing in it is run.

        `file` is a safetensors or PyTorch file of any age, the index of a sharded set, or a model's folder in
        diffusers' layout. Raises SourceError for anything else.
        """
        return Checkpoint(open_checkpoint(Path(file), self._catalog.layouts))

    def inspect(
        self,
        file: str | Path,
        *,
        metric: bool = True,
        full: bool = False,
        hashes: bool = False,
        threads: int | None = None,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> Inspection:
        """What is in a checkpoint.

        With `metric`, the data of its components is read once, for their digests, the metric and numbers
        that are none; `full` reads every tensor; `hashes` reads the file once more. Without any, only its
        table of contents is read. Raises SourceError when the file is refused, Cancelled.
        """
        listener = Listener(progress, cancel)
        with listener.during():
            report = build_report(
                Path(file),
                catalog=self._catalog,
                full=full,
                metric=metric,
                hashes=hashes,
                threads=threads,
                reporter=listener,
            )
            return inspection_of(report, full)

    def diff(
        self,
        a: str | Path,
        b: str | Path,
        *,
        full: bool = False,
        threads: int = 2,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> Difference:
        """What tells two checkpoints apart, and why; every tensor that both have is read once.

        With `full`, `json` and `text` name every tensor. Raises SourceError, Cancelled.
        """
        listener = Listener(progress, cancel)
        with listener.during():
            found = compare(Path(a), Path(b), catalog=self._catalog, threads=threads, reporter=listener)
        return Difference(
            found.same,
            diff_causes(found),
            found.only_a,
            found.only_b,
            tuple(t.pair.a for t in found.tensors if not t.alike),
            diff_to_json(found, full),
            diff_to_text(found, full=full),
        )

    # -- recipes

    def load(self, file: str | Path) -> Recipe:
        """The recipe in a file, with those that it includes; raises RecipeError with all that is wrong.

        A string may be its address, as `https://…`, `hf://…` or `git+https://…`. Such a recipe is a
        stranger's: its outputs go into the current folder, and it is held to the lock beside it. Nothing of
        it is kept here: whatever is done with it fetches it again, and raises FetchError if it is another
        one. Raises FetchError, UsageError.
        """
        if isinstance(file, str) and is_address(file):
            with self._work(None, None) as (inner, *_):
                return made_of(inner.recipe(file), None)
        return made_of(load_recipe(Path(file), self._catalog, outside=self._outside), Path(file))

    def parse(self, text: str, folder: str | Path = ".") -> Recipe:
        """The recipe that a text says, as one that lies in `folder`, which only that names files of.

        It has no lock. Raises RecipeError with all that is wrong.
        """
        return made_of(self._read(text, Path(folder)), None)

    def compose(self, folder: str | Path = ".", **keys: Any) -> Recipe:
        """The recipe of these keys and values, as docs/recipes.md has them, and as one that lies in `folder`.

        A source of which no more than its file is said may be just that; a `Path` is a string, and what is
        None is not said. As it is the caller's own, the files that it names may lie anywhere. It has no
        lock. Raises RecipeError with all that is wrong, TypeError for a value that no recipe can have.
        """
        return made_of(replace(self._read(composed(keys), Path(folder)), own=True), None)

    def new(
        self,
        file: str | Path,
        *others: str | Path,
        library: Sequence[str | Path] = (),
        name: str | None = None,
        folder: str | Path = ".",
        threads: int = 2,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> Recipe:
        """A recipe for the model that a file is, with all its sources pinned, as one that lies in `folder`.

        A component among `others` takes the place of the model's own; whole models among them and below the
        folders of `library` are what its components are compared with. Raises SourceError, UsageError,
        Cancelled.
        """
        with self._work(progress, cancel) as (inner, sources, listener):
            files, folders = [Path(file), *map(Path, others)], [*map(Path, library)]
            draft = describe(files, folders, sources, threads=threads, reporter=listener)
            text = escaped(write(draft, folder=Path(folder), catalog=inner.catalog, name=name))
        return made_of(replace(self._read(text, Path(folder)), own=True), None)

    def variants(self, recipe: Recipe, axes: Mapping[str, Iterable[Any]]) -> tuple[Recipe, ...]:
        """A recipe for each combination of values of some keys, as `ckpt sweep` makes them.

        A key is spelled as in TOML: `steps.half.alpha`. They lie in the recipe's folder, and have no lock:
        `save` makes one a file. Raises UsageError for a key that the recipe has no place for, or where there
        are more than 1,000, RecipeError for a value that it cannot have.
        """
        if recipe.address is not None:
            hint = "download it, with what lies beside it, and load the file"
            raise UsageError(Problem("there are no variants of a recipe's address", hint=hint))
        asked = [axis_of(key, values) for key, values in axes.items()]
        path = recipe.file or recipe.folder / f"{recipe.name}.toml"
        lock = find_lock(recipe.inner)
        return tuple(
            made_of(replace(self._read(v.text, recipe.folder), own=recipe.inner.own), None)
            for v in variants(path, recipe.inner, asked, self._catalog, lock)
        )

    def plan(self, recipe: Recipe, output: str | Path | None = None) -> Plan:
        """What building a recipe would do, and why. Reads tables of contents, and fetches nothing else.

        `output` is as for `build`. Raises RecipeError for what does not fit what the sources hold,
        SourceError for those that are refused, FetchError for those that are nowhere to be found, LockError.
        """
        with self._work(None, None) as (inner, sources, listener):
            read = _again(inner, recipe)
            place = place_of(read, _name(output))
            return plan_of(inner.plan(read, sources, find_lock(read), place=place), sources, listener)

    def plan_all(self, recipes: Iterable[Recipe]) -> Plan:
        """What building several recipes as one would do: a step that they share is one.

        All that `plan` raises of each comes together, in a CkptError.
        """
        with self._work(None, None) as (inner, sources, listener):
            found = _begun(inner, recipes)
            plans = plan_recipes(inner, found, sources)
            check_all(found)
            return plan_of(joined(plans), sources, listener, [p.recipe for p in plans])

    def build(
        self,
        recipe: Recipe,
        output: str | Path | None = None,
        *,
        lock: bool = True,
        locked: bool = False,
        partial: bool = False,
        check: bool = False,
        statement: bool = False,
        sign: str | Path | None = None,
        threads: int | None = None,
        executor: Executor | None = None,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Make the files of a recipe; what is made already is reused, what is unchanged is left alone.

        `output` says where its only output goes, and by its name in which form: a name without suffix is a
        folder in diffusers' layout, a string that ends in `/` one to have the file in. Of a recipe that is a
        file the lock beside it is read and written, but for `lock=False`; `locked` fails rather than change
        it. With `partial`, parts of files that are elsewhere are fetched on the lock's word; with `check`,
        everything is made a second time without the store, and compared. With `statement` a statement of
        provenance is written beside each output, signed where `sign` names the file of an Ed25519 key. The
        bytes are the same with any number of `threads`. An `executor`'s workers, who see the same files under
        the same paths, make components and outputs, and hand them to each other through the store that
        machines share.

        Raises UsageError for a key that is none, and where there is no such store, RecipeError, LockError,
        FetchError, SourceError, OutputError (also for an expectation that is missed), UnreproducibleError,
        Cancelled; then every output is as it was, but those that were finished before.
        """
        key = PrivateKey.read(Path(sign), "sign") if sign is not None else None
        elsewhere = self._elsewhere(executor, threads, [recipe])
        with self._work(progress, cancel) as (inner, sources, listener):
            read = _again(inner, recipe, lock)
            read = read.absolute() if elsewhere is not None else read
            made = build_recipe(
                inner,
                read,
                sources,
                place=place_of(read, _name(output, whole=elsewhere is not None)),
                locked=locked,
                partial=partial,
                check=check,
                threads=threads,
                statements=Statements.of(inner, key) if statement or key is not None else None,
                elsewhere=elsewhere,
            )
            return result_of(made, listener)

    def build_all(
        self,
        recipes: Iterable[Recipe],
        folder: str | Path | None = None,
        *,
        keep_going: bool = False,
        lock: bool = True,
        locked: bool = False,
        partial: bool = False,
        check: bool = False,
        statement: bool = False,
        sign: str | Path | None = None,
        threads: int | None = None,
        executor: Executor | None = None,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> Results:
        """Build several recipes as one: what they share is read once and made once.

        All outputs go into `folder`, if one is given. What one recipe reads and another writes is made first.
        Unless it is to `keep_going`, nothing more is begun once one has failed, and the problems of all are
        raised together, in a CkptError whose exit code is that of the first; else what became of each is in
        the results. All other arguments are as for `build`. Raises UsageError, Cancelled.
        """
        key = PrivateKey.read(Path(sign), "sign") if sign is not None else None
        recipes = list(recipes)
        elsewhere = self._elsewhere(executor, threads, recipes)
        with self._work(progress, cancel) as (inner, sources, listener):
            into = _name(folder, whole=elsewhere is not None)
            found = _begun(inner, recipes, lock, whole=elsewhere is not None)
            Several(
                inner,
                found,
                sources,
                place=place_in(f"{into}/") if into is not None else None,
                locked=locked,
                keep_going=keep_going,
                partial=partial,
                check=check,
                threads=threads,
                statements=Statements.of(inner, key) if statement or key is not None else None,
                elsewhere=elsewhere,
            ).build()
            if not keep_going:
                check_all(found)
            return results_of(found, listener)

    def _elsewhere(
        self, executor: Executor | None, threads: int | None, recipes: Sequence[Recipe]
    ) -> Farm | None:
        if executor is None:
            return None
        if (address := next((r.address for r in recipes if r.address is not None), None)) is not None:
            hint = "download it, with what lies beside it, and load the file"
            evidence = (f"`{address}`",)
            raise UsageError(Problem("an executor does not take a recipe's address", None, evidence, hint))
        if not self._settings.shared:
            hint = "`Workspace(shared=…)` names one"
            raise UsageError(Problem("an executor needs a store that its workers share", hint=hint))
        how = {"offline": self._offline, "outside": self._outside}
        return Farm(executor, means_of(self._settings, **how, threads=threads))

    def verify(self, recipe: Recipe, file: str | Path | None = None) -> Mapping[Path, str]:
        """Compare a file, or those that a recipe makes, with its lock and expectations; reads all of them.

        Gives the SHA-256 of each. Raises OutputError where one is another, LockError where nothing is said.
        """
        with self._work(None, None) as (inner, *_):
            there = Path(file) if file is not None else None
            read = _again(inner, recipe)
            return verify(read, find_lock(read), there, inner)

    def verify_statement(
        self,
        statement: str | Path,
        file: str | Path | None = None,
        *,
        recipe: Recipe | None = None,
        key: str | Path | None = None,
    ) -> Mapping[Path, str]:
        """Hold the files beside a statement of provenance, or `file`, to it, and it to a recipe and its lock.

        `key` is the file of the public key that it must be signed with. Gives the SHA-256 of each file.
        Raises SourceError where it is no statement, or not signed so, OutputError where something is not as
        it says, UsageError for a key that is none.
        """
        public = PublicKey.read(Path(key), "key") if key is not None else None
        there = Path(file) if file is not None else None
        with self._work(None, None) as (inner, *_):
            read = _again(inner, recipe) if recipe is not None else None
            return verify_statement(Path(statement), inner, key=public, recipe=read, file=there).files

    # -- the model toolkit, each a recipe that is made on the spot

    def extract(
        self,
        file: str | Path,
        component: str,
        output: str | Path | None = None,
        *,
        precision: str | None = None,
        fixes: Sequence[str] = (),
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **options: str | None,
    ) -> Result:
        """Write a component of a file as a file of its own, under the names that programs load.

        `component` is its name (`VAE-v1-SD`), its class (`VAE-v1`) or its kind (`VAE`). Without `output`, or
        with a folder there, the file is named after the original, the metric and the kind. `precision`,
        `fixes` and the `options` `profile`, `overflow` and `non_finite` are those of a recipe's [output]; by
        default what is wider than 16 bits is rounded. Raises UsageError for what the file does not have,
        SourceError, OutputError, Cancelled.
        """
        file, options = Path(file), {"precision": precision, **options}
        with self._work(progress, cancel) as (inner, sources, listener):
            match = find_part(component, sources.open(sources.file(file)).identity, file, inner.catalog)
            cls = slot_of(match, inner.catalog)
            place = Target.named(str(output)) if output is not None else None
            target, naming = target_of(file, match, cls, place, None, inner)
            recipe = extraction(file, match, cls, fixes, **options)
            return result_of(run(recipe, target, inner, sources, naming=naming, hashing=False), listener)

    def replace(
        self,
        file: str | Path,
        components: Mapping[str, str | Path | tuple[str | Path, str]],
        output: str | Path,
        *,
        precision: str | None = None,
        fixes: Sequence[str] = (),
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **options: str | None,
    ) -> Result:
        """Write a file with components of others: by class (or kind), the file that has it.

        `file` may also be `NEW` and an architecture, all of whose slots are then filled. `(file, component)`
        says which one, where that file has several; in a folder, `output` is named after `file`. All else
        as for `extract`.
        """
        parts = []
        for word, said in components.items():
            source, component = said if isinstance(said, tuple) else (said, None)
            parts.append((word, Path(source), component))
        with self._work(progress, cancel) as (inner, sources, listener):
            recipe = replacement(file, parts, sources, fixes, precision=precision, **options)
            place = Target.named(str(output)).file(f"{recipe.name}.safetensors")
            target = output_path(place, recipe.sources.values())
            return result_of(run(recipe, target, inner, sources), listener)

    def prune(
        self,
        file: str | Path,
        output: str | Path,
        *,
        precision: str | None = None,
        keep: Sequence[str] = (),
        keep_ema: bool = False,
        force: bool = False,
        fixes: Sequence[str] = (),
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Result:
        """Write a file without averages, junk and wasted precision.

        `keep` are names of tensors, patterns of them, or classes, that stay; `force` prunes also what is
        broken or unknown, or would mostly go. All else as for `extract`.
        """
        file = Path(file)
        how = PruneOptions(precision, keep_ema, tuple(keep), force, tuple(fixes), **options)
        with self._work(progress, cancel) as (inner, sources, listener):
            planned = plan_pruning(file, sources, how)
            if planned.unmatched:
                raise unmatched(planned)
            return result_of(prune(planned, output_path(Path(output), [file]), inner, sources), listener)

    def convert(
        self,
        file: str | Path,
        output: str | Path,
        *,
        progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Result:
        """Write every tensor of a checkpoint in another container, precision or layout.

        The name says what is made: a file, a sharded set's index, or a folder in diffusers' layout (a string
        that ends in `/`, or a name without suffix). `options` are those of a recipe's [output], by default
        `precision="keep"`, and `repair=True` to read a safetensors file with faults from which no tensor
        suffers. What cannot be carried over is among the notes. Raises SourceError, UsageError, OutputError,
        Cancelled.
        """
        with self._work(progress, cancel) as (inner, sources, listener):
            made = convert(Path(file), str(output), inner, sources, **options)
            for lost in made.lost:
                listener.note(f"not carried over: {lost}")
            return result_of(made.build, listener)

    # -- what all of it needs

    @property
    def _catalog(self) -> Catalog:
        return load_catalog(self._settings.components)

    def _read(self, text: str, folder: Path) -> model.Recipe:
        return load_recipe(folder / UNNAMED, self._catalog, outside=self._outside, text=text)

    @contextmanager
    def _work(
        self, progress: OnProgress | None, cancel: threading.Event | None
    ) -> Iterator[tuple[Inner, Sources, Listener]]:
        """What one piece of work has for itself, and closes: so that no other one is in its way."""
        listener = Listener(progress, cancel)
        with (
            Inner(
                self._settings, offline=self._offline, outside=self._outside, reporter=listener
            ) as workspace,
            workspace.sources() as sources,
            listener.during(sources.stop),
        ):
            yield workspace, sources, listener


def _again(inner: Inner, recipe: Recipe, lock: bool = True) -> model.Recipe:
    """A recipe as it is worked with; one of an address is fetched, as nothing of it was kept."""
    if recipe.address is None:
        return recipe.inner if lock else replace(recipe.inner, lock=None)
    found = inner.recipe(recipe.address, lock)
    if found.document.text != recipe.text:
        hint = "load it again to have it as it is now"
        raise FetchError(Problem(f"`{recipe.address}` is another recipe than it was", hint=hint))
    return found


def _begun(inner: Inner, recipes: Iterable[Recipe], lock: bool = True, whole: bool = False) -> list[Outcome]:
    """Several recipes that something is to become of, with `whole` paths for work in other folders."""
    found = []
    for recipe in recipes:
        found.append(outcome := Outcome(recipe.where))
        with outcome.failing(inner):
            read = _again(inner, recipe, lock)
            outcome.recipe = read.absolute() if whole else read
    return found


def _name(output: str | Path | None, whole: bool = False) -> str | None:
    """Where an output goes, as it is given or as a `whole` path."""
    if output is None:
        return None
    return whole_name(str(output)) if whole else str(output)
