"""The recipes that one-line commands stand for: built as any other, and written where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli
import tomli_w

from builder.base import toml
from builder.base.disk import check_place, may_replace, write_bytes
from builder.base.errors import CkptError, OutputError, Place, Problem, RecipeError, UsageError
from builder.base.files import read_bounded
from builder.base.toml import Document, escaped
from builder.build import Build, Built, build_recipe
from builder.build.recipes import standing
from builder.formats.layouts.configs import MODEL_INDEX
from builder.models.catalog import Catalog
from builder.operations.fixes import FIXES
from builder.plan import Plan
from builder.recipe import FromBase, NewBase, Output, Pick, Recipe, Source, Step, parse_recipe
from builder.recipe.names import SINGLE, SUFFIXES, Target, form_of, numbered, portable
from builder.recipe.read import MAX_SIZE
from builder.recipe.values import OUTPUT_FILE, PATH, PUBLISHED
from builder.sources.opened import Sources
from builder.store import Store
from builder.tensors.cast import UnfitError
from builder.workspace import Workspace

ORIGIN = "<command line>"
_BELOW_OUTPUT = " under [output]"


@dataclass(frozen=True)
class CommandRecipe:
    """What a one-line command makes. `sources` are files by name; `sha256` pins those that it holds.

    `base` is a source or a step, or `new` an architecture or a class. `components` are by class. `steps` and
    `output` hold what a recipe says under [steps] and [output].
    """

    name: str
    sources: Mapping[str, Path]
    base: str = ""
    new: str = ""
    components: Mapping[str, Pick] = field(default_factory=dict)
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixes: Sequence[str] = ()
    output: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, catalog: Catalog) -> Recipe:
        """The recipe; raises UsageError for an unknown architecture or a wrong step."""
        base = FromBase(self.base) if self.base else NewBase(catalog.architecture(self.new).name)
        fixes = tuple(n for n in FIXES if n in self.fixes)
        said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.output.items()}
        file = said.pop("file", f"{self.name}.safetensors")
        return Recipe(
            name=self.name,
            description="",
            base=base,
            fixes=fixes,
            sources={n: Source(n, str(p.absolute()), self.sha256.get(n)) for n, p in self.sources.items()},
            components=self.components,
            steps=self._parsed_steps(catalog),
            outputs=(Output(self.name, file, base, self.components, fixes, **said),),
            document=Document(ORIGIN, "", {}),
        )

    def _parsed_steps(self, catalog: Catalog) -> Mapping[str, Step]:
        """The steps as the language has them: of files whose names a recipe can hold."""
        if not self.steps:
            return {}
        plain = {name: Path(f"sources/{name}.safetensors") for name in self.sources}
        text = replace(self, sources=plain, output={}).text(Path())
        try:
            return parse_recipe(text, ORIGIN, catalog).steps
        except RecipeError as error:  # in lines that nobody has written or seen
            raise UsageError(*(replace(p, place=None) for p in error.problems)) from None

    def text(self, folder: Path | None = None) -> str:
        """The recipe as TOML; files are named relative to `folder`, else by their whole path."""
        base = self.base or f"NEW {self.new}"
        said: dict[str, Any] = {"format": 1, "name": self.name, "base": base}
        if self.fixes:
            said["fixes"] = list(self.fixes)
        said["sources"] = {n: self._source(n, folder) for n in self.sources}
        if self.components:
            picks = self.components.values()
            said["components"] = {p.cls: p.meaning() if p.component else p.source for p in picks}
        if self.steps:
            said["steps"] = {name: dict(step) for name, step in self.steps.items()}
        if self.output:
            said["output"] = dict(self.output)
        return escaped(tomli_w.dumps(said))

    def _source(self, name: str, folder: Path | None) -> dict[str, str]:
        path = self.sources[name].absolute()
        if folder is not None:  # links are followed: `..` leads out of what a link leads to
            path = Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve()))
        pin = {"sha256": self.sha256[name]} if name in self.sha256 else {}
        return {"file": path.as_posix(), **pin}

    def pinned(self, sources: Sources) -> CommandRecipe:
        """The same with the digest of every source, hashed where it is not remembered; raises SourceError."""
        found = {name: str(sources.hash(sources.file(path)).sha256) for name, path in self.sources.items()}
        return replace(self, sha256=found)

    def save(self, path: Path, target: str | Path, catalog: Catalog) -> None:
        """Write the recipe to `path`, as one that makes `target` where that is below it, else a namesake.

        A namesake is one that every file system can have, and no source's. A recipe that says the same
        stays. Raises OutputError when it cannot be written, or would take the place of anything else.
        """
        data = self.saved(path, target, catalog)
        if not check_vacant(path, data):
            write_bytes(path, data, inputs=[*self.sources.values(), Path(target)])

    def saved(self, path: Path, target: str | Path, catalog: Catalog) -> bytes:
        """What `save` writes; raises OutputError for a source or a tokenizer that no recipe can name."""
        folder, said = path.absolute().parent.resolve(), dict(self.output)
        if (tokenizer := said.get("tokenizer")) is not None:
            if (below := _below(folder, Path(tokenizer))) is None:
                fact = f"a recipe in `{path}` cannot name the tokenizer `{tokenizer}`"
                raise OutputError(Problem(fact, hint="put the recipe into a folder above it"))
            said["tokenizer"] = below
        for name in self.sources:
            if not PATH.holds(file := self._source(name, folder)["file"]):
                evidence = "its name has a control character, or what is not valid Unicode"
                hint = "rename it, or leave `--save-recipe` out"
                raise OutputError(Problem("no recipe can name this file", Place(file), (evidence,), hint))
        text = replace(self, output={"file": self.written(path, target), **said}).text(folder)
        parse_recipe(text, ORIGIN, catalog)
        return text.encode()

    def written(self, path: Path, target: str | Path) -> str:
        """What the recipe saved to `path` calls what it makes; see `save`."""
        folder, name = path.absolute().parent.resolve(), Path(target).name
        end = "/" * (form_of(str(target)) == "diffusers")
        taken = {self._source(name, folder)["file"].casefold() for name in self.sources}
        below = Path(_below(folder, Path(target)) or name)
        file = below if OUTPUT_FILE.holds(below.as_posix() + end) else Path(portable(name))
        return next(f for p in numbered(file) if (f := p.as_posix()).casefold() not in taken) + end


def _below(folder: Path, path: Path) -> str | None:
    """A path from a folder that it lies in, after all links but its own; None where it lies elsewhere."""
    real = path.absolute().parent.resolve() / path.name
    return real.relative_to(folder).as_posix() if real.is_relative_to(folder) else None


def output_keys(precision: str | None = None, **said: str | None) -> dict[str, Any]:
    """What a recipe says under [output] of these options; None, and `error`, is what it need not say.

    Only what was asked for is made wider or changed within 16 bits.
    """
    keys: dict[str, Any] = {"precision": precision or PUBLISHED}
    if precision is None:
        keys["narrow"] = True
    return keys | {name: value for name, value in said.items() if value not in (None, "error")}


def run(
    command: CommandRecipe,
    target: str | Path,
    workspace: Workspace,
    sources: Sources,
    *,
    naming: Callable[[Built], Path] | None = None,
    save: Path | None = None,
    hashing: bool = True,
    threads: int | None = None,
    before: Callable[[Plan], object] = lambda plan: None,
    options: Mapping[str, str] = MappingProxyType({}),
) -> Build:
    """Build a command's recipe into `target`, or where in its folder `naming` says once all is known.

    Where the recipe is to be saved, its sources are pinned first, so that what is saved makes the same file.
    Without `hashing` sources that nobody has hashed yet stay so, and what is made of them is not
    remembered. `before` sees the plan before anything is made; `options` are the words of the command line
    for those of a recipe in hints. Raises CkptError; then `target` is as it was.
    """
    if save is not None:
        command.saved(save, target, workspace.catalog)
        check_place(save)
        command = command.pinned(sources)
        check_vacant(save, command.saved(save, target, workspace.catalog), named=naming is None)
    try:
        made = build_recipe(
            workspace,
            command.recipe(workspace.catalog),
            sources,
            place=lambda _: target,
            naming=naming,
            hashing=hashing or save is not None,
            threads=threads,
            before=before,
        )
    except UnfitError as error:
        raise error.with_options() from None
    except CkptError as error:
        error.problems = tuple(_in_options(p, options) for p in error.problems)
        raise
    if save is not None:
        goal = target if naming is None else made.outputs[0].path
        with standing(Path(goal)):
            command.save(save, goal, workspace.catalog)
        if Path(named := command.written(save, goal)).name != (name := Path(goal).name):
            workspace.reporter.note(f"the recipe makes `{named}`: no recipe can call it `{name}`")
    return made


def _in_options(problem: Problem, options: Mapping[str, str]) -> Problem:
    """A problem whose hint can be followed on the command line."""
    hint = problem.hint or ""
    for key, option in options.items():
        hint = hint.replace(f"`{key}`", f"`{option}`")
    if hint.endswith(_BELOW_OUTPUT):
        hint = f"{hint.removesuffix(_BELOW_OUTPUT)} in a recipe, which `--save-recipe` writes"
    return replace(problem, hint=hint or None)


def check_is_recipe(path: Path) -> dict[str, Any]:
    """What a recipe says, read as TOML alone; raises OutputError for what is none, and is not overwritten."""
    try:
        said = toml.parse(read_bounded(path, MAX_SIZE).decode(), str(path), OutputError).data
        if "format" in said:
            return said
        evidence = "it has no `format`"
    except OSError as error:
        evidence = f"it cannot be read: {(error.strerror or str(error)).lower()}"
    except (ValueError, OutputError):
        evidence = "it is not valid TOML"
    fact = f"`{path}` is there already, and is no recipe"
    raise OutputError(Problem(fact, evidence=(evidence,), hint="give the recipe another name, or remove it"))


def check_vacant(path: Path, data: bytes, *, named: bool = True) -> bool:
    """Whether the recipe `data` has its name already; raises OutputError where anything else has it.

    Unless it is `named`, what that recipe calls its output is not known yet, and not compared.
    """
    if not os.path.lexists(path):
        return False
    there, new = check_is_recipe(path), tomli.loads(data.decode())
    if not named and isinstance(there.get("output"), dict):
        there["output"]["file"] = new["output"]["file"]
    if there != new:
        fact = f"another recipe `{path}` is there already"
        raise OutputError(Problem(fact, hint="give the recipe another name, or remove that one"))
    return True


def vacant(path: Path, built: Built, store: Store, suffix: str | None = None) -> Path:
    """The first of the `numbered` paths that is free, or that holds just what was built."""

    def same(there: Path) -> bool:
        if there.is_symlink() or not there.is_file() or there.stat().st_size != built.size:
            return False
        return store.sha256(there) == built.sha256

    return next(p for p in numbered(path, suffix) if not os.path.lexists(p) or same(p))


def place_of(recipe: Recipe, output: str | None) -> Callable[[Output], str] | None:
    """Where a recipe's output goes by a name that is given; several go into a folder of that name.

    Raises UsageError where several are given the name of a file.
    """
    if output is None:
        return None
    if len(recipe.outputs) > 1:
        return place_in(output, tuple(o.file for o in recipe.outputs))
    path, (only,) = Path(output), recipe.outputs
    if only.form in SINGLE and Target.named(output).folder and not (path / MODEL_INDEX).exists():
        return place_in(output)  # no model's folder, but one to have the file in
    if form_of(output) in SINGLE:
        output_path(path)
    return lambda _: output


def place_in(folder: str, files: tuple[str, ...] = ()) -> Callable[[Output], str]:
    """Where outputs go that are put into a folder, each under its own name.

    Raises UsageError for the name of a file, which the outputs `files` cannot all have.
    """
    if not Target.named(folder).folder:
        fact, hint = f"`{folder}` is no folder, and there are several outputs", f"`-o {folder}/` is one"
        raise UsageError(Problem(fact, evidence=files, hint=hint))

    def place(output: Output) -> str:
        path = Path(folder) / Path(output.file).name
        if output.form in SINGLE:
            output_path(path)
        return f"{path}{'/' * (output.form == 'diffusers')}"

    return place


def output_path(path: Path, inputs: Iterable[Path] = (), *, folders: bool = False) -> Path:
    """`path`, if a checkpoint can be written under such a name, and not over `inputs`; raises OutputError.

    Where the command also takes `folders`, the hint says what to do for one.
    """
    may_replace(path, inputs)
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(
            Problem(
                f"cannot write `{path}`",
                evidence=(f"its name ends in {f'`{path.suffix}`' if path.suffix else 'nothing known'}",),
                hint=f"the name says the format: {', '.join(f'`{s}`' for s in SUFFIXES)}"
                + "; make a folder first to have the file in it" * (folders and not path.suffix),
            )
        )
    return path
