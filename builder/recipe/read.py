"""Reading recipes: text to `Recipe`, with every problem in one error."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from builder.base import toml
from builder.base.errors import Place, Problem, RecipeError, UsageError, did_you_mean, nearest
from builder.base.inside import leads_out
from builder.base.kinds import WRONG, At, Item, listed, note
from builder.base.toml import Document, Keys
from builder.base.words import command_line
from builder.operations import OPERATIONS
from builder.operations.fixes import FIXES, Fix
from builder.operations.registry import Operation
from builder.recipe.check import problems_of, with_classes
from builder.recipe.language import NEW, Format, Vocabulary
from builder.recipe.lock import LOCK, lock_path
from builder.recipe.recipe import SETTINGS, Expect, FromBase, NewBase, Output, Pick, Recipe, Source, Step

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

MAX_SIZE = 1 << 20  # bytes; a recipe is a page, and what is larger is some other file
MAX_DEPTH = 32  # recipes in recipes


def load_recipe(
    path: Path,
    catalog: Catalog,
    *,
    operations: Mapping[str, Operation] = OPERATIONS,
    fixes: Mapping[str, Fix] = FIXES,
    outside: bool = False,
    text: str | None = None,
) -> Recipe:
    """Read a recipe and the recipes that it includes: those in its folder, unless `outside` allows others.

    With `text`, that is the recipe, `path` where it would lie, and it has no lock. Raises RecipeError with
    every problem of all of them.
    """
    return _Loader(Vocabulary(catalog, operations, fixes), outside, text).load(path)


def parse_recipe(
    text: str,
    path: str | Path,
    catalog: Catalog,
    *,
    operations: Mapping[str, Operation] = OPERATIONS,
    fixes: Mapping[str, Fix] = FIXES,
) -> Recipe:
    """Read a recipe's text; `path` is its name in messages. Recipes that it includes are not opened.

    Raises RecipeError with every problem.
    """
    return _read(toml.parse(text, str(path), RecipeError), Vocabulary(catalog, operations, fixes))


class _Loader:
    """Recipes and those they include, each read once."""

    def __init__(self, words: Vocabulary, outside: bool, text: str | None = None) -> None:
        self.words = words
        self.outside = outside
        self.text = text  # of the outermost recipe, where that is no file
        self.problems: list[Problem] = []
        self.done: dict[Path, Recipe | None] = {}
        self.open: list[Path] = []  # from the outermost recipe to the one being read

    def load(self, path: Path) -> Recipe:
        recipe = self._load(path, None)
        if recipe is None or self.problems:
            raise RecipeError(*self.problems)
        return recipe

    def _load(self, path: Path, named: Place | None) -> Recipe | None:
        real = Path(os.path.realpath(path))  # which takes a link to itself as it is
        if real in self.open:
            inner = [p.name for p in self.open[self.open.index(real) :]]
            chain = " → ".join([*inner, real.name])
            self.problems.append(Problem("recipes include each other", named, (chain,), "remove one of them"))
            return None
        if len(self.open) == MAX_DEPTH:
            self.problems.append(Problem("recipes are nested too deeply", named, (f"{MAX_DEPTH} of them",)))
            return None
        if real not in self.done:
            self.open.append(real)
            self.done[real] = self._read(path, named)
            self.open.pop()
        return self.done[real]

    def _read(self, path: Path, named: Place | None) -> Recipe | None:
        given = self.text if named is None else None
        try:
            document = _document(path, named) if given is None else toml.parse(given, str(path), RecipeError)
            recipe = _read(document, self.words)
        except RecipeError as error:
            self.problems += error.problems
            return None
        lock = lock_path(path) if given is None else None
        return replace(recipe, path=path, lock=lock, included=dict(self._included(recipe, path)))

    def _included(self, recipe: Recipe, path: Path) -> Iterator[tuple[str, Recipe]]:
        for name, source in recipe.sources.items():
            if source.recipe is None:
                continue
            place = recipe.place("sources", name, "recipe", value=True)
            if (problem := self._refused(source.recipe, path.parent, place)) is not None:
                self.problems.append(problem)
                continue
            inner = self._load(path.parent / source.recipe, place)
            if inner is not None:
                self._one_output(recipe, source, inner)
                yield name, inner

    def _refused(self, named: str, folder: Path, place: Place) -> Problem | None:
        """Why a recipe that another names is not read: it could be any file of the user's."""
        if not named.endswith(".toml"):
            return Problem(f"`{named}` is no recipe", place, hint="a recipe's name ends in `.toml`")
        why = None if self.outside else leads_out(folder, named, [self.open[0].parent])
        problem = outside(named, why or "", place)
        return replace(problem, hint=f"{problem.hint}, or say `--allow-outside`") if why is not None else None

    def _one_output(self, recipe: Recipe, source: Source, inner: Recipe) -> None:
        if inner.output(source.output) is not None:
            return
        names = [o.name for o in inner.outputs]
        if source.output is None:
            fact, key = f"`{source.recipe}` has several outputs", "recipe"
            hint: str | None = f'add `output = "{names[0]}"`, or another of {listed(names)}'
        else:
            fact, key = f"`{source.recipe}` has no output `{source.output}`", "output"
            hint = did_you_mean(source.output, names) or f"known: {listed(names)}"
        place = recipe.place("sources", source.name, key, value=True)
        self.problems.append(Problem(fact, place, hint=hint))


def outside(named: str, why: str, place: Place | None, *, source: bool = False) -> Problem:
    """That a recipe names something outside its folder; of a `source`, with all ways to allow it."""
    hint = "put it there"
    if source:
        hint = f"{hint}, name it alone and its folder in `CKPT_MODELS`, or say `--allow-outside`"
    return Problem(f"`{named}` is outside the recipe's folder", place, (why,), hint)


def _beside(path: Path) -> str | None:
    """The hint that names the recipe beside a path whose name is most like it."""
    with suppress(OSError, ValueError):
        names = [p.name for p in path.parent.glob("*.toml") if not p.name.endswith(LOCK)]
        if (near := nearest(path.name, names)) is not None and near != path.name:
            return f"did you mean `{path.with_name(near)}`?"
    return None


def _document(path: Path, named: Place | None) -> Document:
    """The document in a file; `named` is the place that names it, if a recipe does.

    What a recipe or a link merely leads to may be any file of the user's: before a message quotes it, it
    has to be a recipe.
    """
    fact, hint = None, None
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fact = f"cannot read `{path}`: {reason[:1].lower()}{reason[1:]}"
        hint = _beside(path) if named is None else None
    else:
        if stat.S_ISDIR(status.st_mode):
            fact, hint = f"`{path}` is a folder, not a recipe", "name the recipe in it"
        elif not stat.S_ISREG(status.st_mode):
            fact = f"`{path}` is no regular file"
        elif status.st_size > MAX_SIZE:
            fact = f"`{path}` is too large for a recipe"
            hint = "a recipe is a small TOML file that names models; this may be a model itself"
            raise RecipeError(Problem(fact, named, (f"{status.st_size:,} bytes",), hint))
    if fact is not None:
        raise RecipeError(Problem(fact, named, hint=hint))
    if named is None and not path.is_symlink():
        return toml.load(path, RecipeError)
    with suppress(RecipeError):
        document = toml.load(path, RecipeError)
        if type(document.data.get("format")) is int:
            return document
    evidence = (f"{status.st_size:,} bytes, which are no TOML with `format = 1`",)
    own = f"`{command_line('plan', path)}` says what is wrong with it" if named else "name the file itself"
    raise RecipeError(Problem(f"`{path}` is no recipe", named, evidence, f"if it is yours, {own}"))


def _read(document: Document, words: Vocabulary) -> Recipe:
    """The recipe in a document; raises RecipeError with every problem, in the order of the text."""
    problems: list[Problem] = []
    root = At(document, problems)
    if "format" not in document.data and {"version", "recipe", "tool"} <= document.data.keys():
        name = Path(document.path).name
        of = f"`{name.removesuffix(LOCK)}.toml`" if name.endswith(LOCK) else "a recipe"
        hint = f"name the recipe: it is the lock of {of}"
        raise RecipeError(Problem("this is a lock, not a recipe", Place(document.path), hint=hint))
    if not document.data:
        hint = "`ckpt new FILE… -o RECIPE` writes one to begin with"
        raise RecipeError(Problem("the recipe is empty", Place(document.path), hint=hint))
    version = document.data.get("format")
    if type(version) is int and Format().read(version, root.down("format")) is WRONG:
        raise RecipeError(*problems)  # what else a foreign format means is not known
    recipe = _recipe(words.language.read(document.data, root), document, words)
    for problem in problems_of(recipe, words):
        note(problems, problem)
    if problems:
        raise RecipeError(*sorted(problems, key=_position))
    return replace(recipe, notes=tuple(_notes(recipe)))


def _notes(recipe: Recipe) -> Iterator[Problem]:
    for name, source in recipe.sources.items():
        for key, path in (("file", source.file), ("recipe", source.recipe)):
            if path is not None and (PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive):
                place = recipe.place("sources", name, key, value=True)
                fact = f"`{key}` is a path of one machine: others will not find it there"
                yield Problem(fact, place, hint="name the file alone, and its folder in `CKPT_MODELS`")


def _position(problem: Problem) -> tuple[int, int]:
    place = problem.place
    return (place.line or 0, place.column or 0) if place else (0, 0)


def _recipe(said: dict[str, Any], document: Document, words: Vocabulary) -> Recipe:
    """The model of what could be read; what could not has the value of what is not there."""
    name = said.get("name", "")
    base = _base(said.get("base", ""), ("base",), words)
    fixes = _fixes(said.get("fixes", ()), words)
    components = _picks(said.get("components", {}))
    arithmetic = said.get("arithmetic") or "exact"
    written = said.get("output") or {}
    table = isinstance(written, dict)
    several = not table and len(written) > 1
    outputs = []
    for index, one in enumerate([written] if table else written):
        at: Keys = ("output",) if table else ("output", index)
        own_name = one.get("name") or ("" if several else name)
        own_base, own_fixes, own_expect = one.get("base"), one.get("fixes"), one.get("expect")
        expect = own_expect or (None if several else said.get("expect")) or {}
        stem = f"{name}-{own_name}" if several or (one.get("name") and not table) else name
        outputs.append(
            Output(
                name=own_name,
                file=one.get("file") or f"{stem}.safetensors",
                base=base if own_base is None else _base(own_base, (*at, "base"), words),
                components={**components, **_picks(one.get("components", {}))},
                fixes=fixes if own_fixes is None else _fixes(own_fixes, words),
                metadata={**said.get("metadata", {}), **one.get("metadata", {})},
                expect=Expect(**expect),
                at=at,
                **{k: one[k] for k in SETTINGS if one.get(k) is not None},
            )
        )
    outputs = [_with_classes(output, words.catalog) for output in outputs]
    return Recipe(
        name=name,
        description=said.get("description", ""),
        base=base,
        fixes=fixes,
        sources={n: Source(n, **i.value) for n, i in said.get("sources", {}).items()},
        components=components,
        steps={n: _step(n, i.value, arithmetic, words) for n, i in said.get("steps", {}).items()},
        outputs=tuple(outputs),
        document=document,
    )


def _with_classes(output: Output, catalog: Catalog) -> Output:
    """An output with the classes that its words mean, where it says its architecture itself."""
    if isinstance(output.base, FromBase):
        return output
    try:
        return with_classes(output, catalog.architecture(output.base.architecture), catalog)
    except UsageError:
        return output  # which is reported with all other names


def _base(said: str, at: Keys, words: Vocabulary) -> NewBase | FromBase:
    first, _, name = said.partition(" ")
    if first != NEW:
        return FromBase(said, at)
    try:
        return NewBase(words.catalog.architecture(name.strip()).name, at)
    except UsageError:
        return NewBase(name.strip(), at)  # to be reported with all the other names


def _fixes(said: tuple[str, ...], words: Vocabulary) -> tuple[str, ...]:
    return tuple(n for n in words.fixes if n in said)


def _picks(said: Mapping[str, Item]) -> dict[str, Pick]:
    return {cls: _pick(cls, item) for cls, item in said.items()}


def _pick(cls: str, item: Item) -> Pick:
    if isinstance(item.value, str):
        return Pick(cls, item.value, at=item.keys)
    return Pick(cls, item.value.get("from", ""), item.value.get("component"), item.keys)


def _step(name: str, said: dict[str, Any], arithmetic: str, words: Vocabulary) -> Step:
    op, _, method = said["op"].partition(":")
    operation = words.operations[op]
    inputs = {n: said[n] for n in (*operation.inputs, *operation.optional_inputs) if said.get(n) is not None}
    params = {n: said[n] for n in operation.params if said.get(n) is not None}
    if operation.of_methods:
        params["method"] = method
    if operation.many is not None and said.get(operation.many) is not None:
        many = said[operation.many]
        weights = (
            {n: i.value for n, i in many.items()} if isinstance(many, dict) else dict.fromkeys(many, 1.0)
        )
        # The order in which a table is written is none.
        params[operation.many] = dict(sorted(weights.items()))
        inputs |= {f"{operation.many}.{n}": n for n in params[operation.many]}
    return Step(
        name,
        operation.name,
        inputs,
        params,
        said.get("components", ()),
        said.get("store", False),
        said.get("VAE", False),
        said.get("arithmetic") or arithmetic,
        said.get("precision"),
    )
