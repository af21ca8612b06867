"""`ckpt new`: write a recipe for files that exist."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from builder.base.disk import check_place, write_bytes
from builder.base.errors import ExitCode, Problem, UsageError
from builder.base.progress import SILENT, Reporter
from builder.base.toml import escaped
from builder.cli.command import Command
from builder.cli.options import FILE, json_option, open_workspace, quiet_option, recipe_path
from builder.cli.terminal import out
from builder.models.catalog import Architecture
from builder.recipe import parse_recipe
from builder.recipe.names import SUFFIXES, recipe_name
from builder.reports import imports
from builder.reports.new import Draft, describe, left_over, summed, to_json, write
from builder.sources.find import files_below
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import CommandRecipe, check_is_recipe
from builder.toolkit.replace import check_filled, find_parts, new_architecture, parse_part

MOST_NOTES = 20  # of what an imported recipe lacks


@click.command("new", cls=Command)
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE…")
@click.option(
    "--library",
    "-l",
    multiple=True,
    type=FILE,
    metavar="FOLDER",
    help="Find files below FOLDER that its components are, or are merges of; may be given several times.",
)
@click.option("-o", "--output", type=FILE, metavar="RECIPE", help="Default: stdout.")
@click.option(
    "--from-metadata",
    is_flag=True,
    help="How FILE was merged, from its metadata; or FILE is a .mecha, a .yaml of mergekit, a graph's .json.",
)
@click.option("--name", help="The model's name; default: the first file's.")
@click.option("--force", is_flag=True, help="Overwrite RECIPE, if it is one.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, help="Threads to use.")
@json_option
@quiet_option
def command(
    files: tuple[Path, ...],
    library: tuple[Path, ...],
    output: Path | None,
    from_metadata: bool,
    name: str | None,
    force: bool,
    threads: int,
    quiet: bool,
) -> int:
    """Write a recipe for the model that the first FILE is, with all its sources pinned.

    A further FILE that is a component alone takes the place of the model's own; one that is a whole model
    is looked through like a library. What is equal to nothing known is taken from the file itself.
    With --from-metadata, the recipe is what the program that merged FILE wrote into it. With NEW and an
    architecture first, as in `ckpt new "NEW SDv1" UNET=a.ckpt clip.safetensors VAE=b.ckpt`, it is that of a
    new model whose slots these files fill.
    """
    output = recipe_path(output, "-o")
    if output is not None and os.path.lexists(output):
        if not force:
            raise UsageError(Problem(f"there is a file `{output}` already", hint="`--force` overwrites it"))
        check_is_recipe(output)
    elif output is not None:
        check_place(output)
    folder = output.parent if output is not None else Path()
    found: dict[str, Any] = {}
    with open_workspace(quiet) as workspace, workspace.sources() as sources:
        catalog = workspace.catalog
        if (new := new_architecture(str(files[0]), catalog)) is not None and not library:
            text = _composed(new, files[1:], output, name, sources)
        elif from_metadata:
            text = _imported(files, library, folder, name, sources, workspace.reporter)
        else:
            draft = describe(files, library, sources, threads=threads, reporter=workspace.reporter)
            text = escaped(write(draft, folder=folder, catalog=catalog, name=name))
            found = to_json(draft)
            _tell(draft, bool(library), workspace.reporter)
    parse_recipe(text, str(output or "<recipe>"), catalog)
    if output is not None:
        models = [stat for path, stat in files_below(library, SILENT) if path.suffix.lower() in SUFFIXES]
        write_bytes(output, text.encode(), durable=False, inputs=[*files, *models])
    where = str(output) if output is not None else None
    out().raw({"path": where, "recipe": text, **found}, "" if where else text)
    return ExitCode.DONE


def _composed(
    new: Architecture, parts: Sequence[Path], output: Path | None, name: str | None, sources: Sources
) -> str:
    """The recipe of a new model of these parts, as text."""
    files: dict[str, Path] = {}
    given = [parse_part(str(part)) for part in parts]
    sources.check_there(path for _, path, _ in given)
    picks = find_parts(given, new, files, sources, sources.catalog)
    check_filled(new, picks)
    name = name or recipe_name(Path(output.stem if output is not None else new.name.lower()))
    recipe = CommandRecipe(name, files, new=new.name, components=picks).pinned(sources)
    return recipe.text(output.parent if output is not None else Path())


def _imported(
    files: tuple[Path, ...],
    library: tuple[Path, ...],
    folder: Path,
    name: str | None,
    sources: Sources,
    reporter: Reporter,
) -> str:
    """The recipe that a file tells of, as text; what is missing in it is noted."""
    if len(files) > 1 or library:
        raise UsageError(Problem("`--from-metadata` is of one FILE, and without `--library`"))
    sketch = imports.read_recipe(files[0], sources, reporter)
    lacking = sketch.lacking()
    for missing in lacking[:MOST_NOTES]:
        reporter.note(f"not in the recipe: {missing}")
    if len(lacking) > MOST_NOTES:
        reporter.note(f"and {len(lacking) - MOST_NOTES:,} more, which the recipe lists")
    path = files[0].with_suffix("") if imports.is_text(files[0]) else files[0]
    name = name or recipe_name(path).lower()
    return escaped(imports.write(sketch, name, files[0].name, folder))


def _tell(draft: Draft, library: bool, reporter: Reporter) -> None:
    """What a person should know beside the recipe."""
    for cls, taken in draft.taken.items():
        if cls in draft.merges:
            reporter.note(_merged(draft, cls))
        elif taken.how:
            how = "exactly" if taken.how == "exact" else "after rounding"
            reporter.note(f"{cls} is that of `{taken.file.path}`, {how}")
        elif library:
            reporter.note(f"{cls} is equal to nothing in the library" + _unsought(draft, cls))
    for file in draft.unused:
        reporter.note(f"`{file.path}` has no component in common with the model: it is left out")


def _unsought(draft: Draft, cls: str) -> str:
    why = draft.unsought.get(cls)
    return f", and {why}: no merge is looked for" if why else ", nor near to a merge of what is there"


def _merged(draft: Draft, cls: str) -> str:
    """What is known of how a class was merged, in a line."""
    merge = draft.merges[cls]
    if merge.origin.found == "part":
        return f"{cls} is taken from the file: the nearest sum, {summed(merge)}, {left_over(merge)}"
    same = "to the last bit" if merge.origin.found == "exact" else "but for rounding"
    return f"{cls} is {summed(merge)}, made by {merge.origin.op}, the same {same}"
