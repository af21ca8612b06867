"""Recipes made on the spot: what a one-line command does is written as a recipe, and built as one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from builder.catalog import Catalog
from builder.plan import make_plan
from builder.progress import SILENT, Reporter
from builder.recipe import Recipe, parse_recipe
from builder.run import Build, build
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
        file = path if folder is None else Path(os.path.relpath(path, folder.absolute()))
        pin = {"sha256": self.sha256[name]} if name in self.sha256 else {}
        return {"file": file.as_posix(), **pin}

    def recipe(self, catalog: Catalog) -> Recipe:
        """The recipe, read; raises RecipeError as for any other."""
        return parse_recipe(self.text(), ORIGIN, catalog)


def recipe_name(path: Path) -> str:
    """A name for a recipe or a source after a file's: its stem, less what names may not hold."""
    stem = path.name.lstrip(".").split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "model"


def run(
    quick: Quick,
    target: Path,
    *,
    catalog: Catalog,
    store: Store,
    hashing: bool = True,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> Build:
    """Build a recipe made on the spot into `target`.

    Without `hashing` sources that nobody has hashed yet stay so, and what is made of them is not
    remembered. Raises CkptError; then `target` is as it was.
    """
    recipe = quick.recipe(catalog)
    with make_plan(recipe, catalog=catalog, store=store, place=lambda _: target, reporter=reporter) as plan:
        return build(plan, catalog=catalog, store=store, threads=threads, hashing=hashing, reporter=reporter)


def free_name(path: Path) -> Path:
    """`path`, or the first of `NAME(1).EXT`, `NAME(2).EXT`, … that is not taken."""
    if not os.path.lexists(path):
        return path
    stem, dot, suffixes = path.name.partition(".")
    number = 1
    while os.path.lexists(found := path.with_name(f"{stem}({number}){dot}{suffixes}")):
        number += 1
    return found
