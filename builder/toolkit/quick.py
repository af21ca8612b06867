"""Recipes made on the spot: what a one-line command does is written as a recipe, and built as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from builder.base.disk import may_replace, replacing, write_all
from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.build import Build, build
from builder.models.catalog import Catalog
from builder.plan import Plan, SourceJob, make_plan
from builder.recipe import Recipe, parse_recipe
from builder.recipe.names import WRITTEN
from builder.sources.find import Found, verify_source
from builder.store import Store

ORIGIN = "<command line>"


@dataclass(frozen=True)
class Quick:
    """A recipe about to be written. `sources` are files by name; `sha256` pins those that it holds.

    `components` and `output` are the recipe's tables as TOML has them.
    """

    name: str
    base: str
    sources: Mapping[str, Path]
    components: Mapping[str, Any] = field(default_factory=dict)
    fixes: Sequence[str] = ()
    output: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def text(self, folder: Path | None = None) -> str:
        """The recipe as TOML; files are named relative to `folder`, else by their whole path."""
        said: dict[str, Any] = {"format": 1, "name": self.name, "base": self.base}
        if self.fixes:
            said["fixes"] = list(self.fixes)
        said["sources"] = {n: self._source(n, folder) for n in self.sources}
        if self.components:
            said["components"] = dict(self.components)
        if self.output:
            said["output"] = dict(self.output)
        return tomli_w.dumps(said)

    def _source(self, name: str, folder: Path | None) -> dict[str, str]:
        path = self.sources[name].absolute()
        if folder is not None:  # links are followed: `..` leads out of what a link leads to
            path = Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve()))
        pin = {"sha256": self.sha256[name]} if name in self.sha256 else {}
        return {"file": path.as_posix(), **pin}

    def recipe(self, catalog: Catalog) -> Recipe:
        """The recipe, read; raises RecipeError as for any other."""
        return parse_recipe(self.text(), ORIGIN, catalog)

    def pinned(self, store: Store, reporter: Reporter = SILENT) -> Quick:
        """The same with the digest of every source, hashed where it is not remembered; raises SourceError."""
        found = {}
        for name, path in self.sources.items():
            seen = verify_source(Found(path, None, 0, ""), None, store=store, reporter=reporter)
            found[name] = str(seen.sha256)
        return replace(self, sha256=found)

    def save(self, path: Path, target: Path) -> None:
        """Write the recipe to `path`, as one that makes `target` where that is below it, else a namesake.

        Raises OutputError when it cannot be written, or would take the place of a source or of `target`.
        """
        with replacing(path, inputs=[*self.sources.values(), target]) as fd:
            write_all(fd, memoryview(self.saved(path, target)), 0)

    def saved(self, path: Path, target: Path) -> bytes:
        """What `save` writes; raises OutputError for names that no recipe can hold."""
        folder, goal = path.absolute().parent.resolve(), target.absolute().parent.resolve() / target.name
        file = goal.relative_to(folder) if goal.is_relative_to(folder) else Path(target.name)
        text = replace(self, output={"file": file.as_posix(), **self.output}).text(folder)
        try:
            return text.encode()
        except UnicodeEncodeError:
            fact = f"a recipe in `{path}` cannot name these files"
            raise OutputError(Problem(fact, hint="rename them: their names are not valid Unicode")) from None


def run(
    quick: Quick,
    target: Path | Callable[[str], Path],
    *,
    catalog: Catalog,
    store: Store,
    hashing: bool = True,
    threads: int | None = None,
    before: Callable[[Plan], object] = lambda plan: None,
    reporter: Reporter = SILENT,
) -> Build:
    """Build a recipe made on the spot into `target`, or where that says once the metric is known.

    Without `hashing` sources that nobody has hashed yet stay so, and what is made of them is not
    remembered. `before` sees the plan before anything is made. Raises CkptError; then `target` is as it was.
    """
    recipe = quick.recipe(catalog)
    path, naming = (target, None) if isinstance(target, Path) else (target(""), target)
    with make_plan(recipe, catalog=catalog, store=store, place=lambda _: path, reporter=reporter) as plan:
        for problem in plan.warnings:
            reporter.warn(problem)
        before(plan)
        return build(
            plan,
            catalog=catalog,
            store=store,
            threads=threads,
            hashing=hashing,
            naming=naming,
            reporter=reporter,
        )


def make_parts(
    quick: Quick,
    *,
    catalog: Catalog,
    store: Store,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> tuple[Quick, Build]:
    """Make a recipe's components while its sources are hashed, so that these are read once.

    Gives the recipe with its sources pinned, and what was made. Raises CkptError.
    """
    anywhere = Path(quick.output.get("file", "model.safetensors"))
    with make_plan(quick.recipe(catalog), catalog=catalog, store=store, place=lambda _: anywhere) as plan:
        made = build(plan, catalog=catalog, store=store, threads=threads, assemble=False, reporter=reporter)
        jobs = {n.job.source: n.key for n in plan if isinstance(n.job, SourceJob)}
    return replace(quick, sha256={name: str(jobs[name]) for name in quick.sources}), made


def output_path(path: Path, inputs: Iterable[Path] = ()) -> Path:
    """`path`, if a checkpoint can be written under such a name, and not over `inputs`; raises OutputError."""
    may_replace(path, inputs)
    if path.suffix not in WRITTEN:
        raise OutputError(
            Problem(
                f"cannot write `{path}`",
                evidence=(f"its name ends in {f'`{path.suffix}`' if path.suffix else 'nothing known'}",),
                hint="the name says the format: `.safetensors`, `.ckpt` or `.pt`",
            )
        )
    return path
