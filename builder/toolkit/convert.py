"""Converting checkpoints: the same tensors in another container, precision or layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.base.errors import Problem, SourceError, UsageError
from builder.base.inside import is_inside
from builder.base.words import listed
from builder.build import Build
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import Architecture
from builder.models.cut import foreign
from builder.models.prediction import prediction as find_told
from builder.plan import Plan
from builder.plan.folders import find_layout, find_prediction, lacking, no_tokenizer, vocabulary_files
from builder.recipe.names import SINGLE, Form, form_of, recipe_name
from builder.recipe.values import PUBLISHED
from builder.sources.opened import OpenSource, Sources
from builder.toolkit.command_recipe import CommandRecipe, run
from builder.workspace import Workspace

if TYPE_CHECKING:
    from builder.formats.layouts import Layout


@dataclass(frozen=True)
class Converted:
    """What was written: a file, an index or a folder.

    `lost` says what the source has that the output cannot hold; `lacking`, which tokenizers a folder lacks.
    """

    path: Path
    form: Form
    build: Build
    tensors: int
    lost: tuple[str, ...]
    lacking: tuple[str, ...]
    tokenizer: bool

    @property
    def size(self) -> int:
        """Bytes of all of its files."""
        return self.build.outputs[0].size


def convert(
    source: Path,
    target: str,
    workspace: Workspace,
    sources: Sources,
    *,
    save: Path | None = None,
    repair: bool = False,
    threads: int = 2,
    **output: Any,
) -> Converted:
    """Write every tensor of a checkpoint to `target`, in the form that its name asks for (`form_of`).

    `output` is what a recipe says under [output]: the precision is `keep` where it says none; what is None
    is not said. `repair` is as for `open_checkpoint`, and what it mends is noted. Raises CkptError; then
    `target` is as it was.
    """
    form = form_of(target)
    absent: tuple[str, ...] = ()
    said = {
        "verbatim": form != "gguf",
        "precision": PUBLISHED if output.get("quantize") and form == "gguf" else "keep",
        **{k: v for k, v in output.items() if v not in (None, "error")},
    }
    if form in SINGLE and "shard_size" in said:
        hint = f"name the set's index, such as `{Path(target).stem}.safetensors.index.json`"
        raise UsageError(Problem(f"`{target}` is one file, and shards are several", hint=hint))
    for key in ("prediction", "tokenizer") if form != "diffusers" else ():
        if key in said:
            fact = f"`--{key}` is for a diffusers folder, and `{target}` is none"
            raise UsageError(Problem(fact, hint="name a folder, or leave the option out"))
    if form == "diffusers" and "quantize" in said:
        fact = f"diffusers' layout has no place for packed weights, and `{target}` is a folder"
        raise UsageError(Problem(fact, hint="name a file, or leave `--quantize` out"))
    opened = sources.open(sources.file(source), repair=repair)
    for mended in opened.checkpoint.mended or ("nothing was wrong with the file",) * repair:
        workspace.reporter.note(f"repair: {mended}")
    named = foreign(opened.identity, workspace.catalog)
    for match in (m for m in opened.identity.matches if m.component.cls in named):
        count = len(match.whole) + len(match.made)
        workspace.reporter.note(f"{match.component.name}: {count:,} tensors get their usual names")
    if form == "diffusers":
        layout = _check_model(opened, said.get("prediction"), workspace)
        given = said.pop("tokenizer", None)
        tokenizer, files = _tokenizer(given, source, layout)
        if given is None and (link := _leaves(tokenizer, files, source)) is not None:
            workspace.reporter.note(f"`{link}` is not copied: a link leads out of `{source}`")
            files = {}
        if files:
            said["tokenizer"] = str(tokenizer.absolute())
        absent = lacking(layout, files)

    def say(plan: Plan) -> None:
        for note in plan.notes:
            workspace.reporter.note(note)

    name = recipe_name(source)
    made = run(
        CommandRecipe(name, {name: source}, name, output=said),
        target,
        workspace,
        sources,
        save=save,
        hashing=False,
        threads=threads,
        before=say,
    )
    count = len(opened.checkpoint)
    if form != "diffusers":  # packing and decoding change how many there are
        with open_checkpoint(Path(target)) as written:
            count = len(written)
    lost = _lost(opened.checkpoint, form)
    return Converted(Path(target), form, made, count, lost, absent, "tokenizer" in said)


def _check_model(opened: OpenSource, prediction: str | None, workspace: Workspace) -> Layout:
    """A model's layout in diffusers' folders.

    Raises SourceError for what has none, UsageError where it has to be said what the model predicts.
    """
    held, identity, catalog = opened.checkpoint, opened.identity, workspace.catalog
    known = catalog.architectures.get(identity.architecture or "") if identity.intact else None
    architecture = known or Architecture(identity.architecture or "unknown", ())
    told = find_told(held, held.metadata, catalog)
    layout = find_layout(held.name, architecture, told, catalog)
    if isinstance(layout, Problem):
        raise SourceError(layout)
    found = prediction or find_prediction(held.name, told, layout)
    if isinstance(found, Problem):
        raise UsageError(replace(found, hint="say `--prediction epsilon` or `--prediction v`"))
    return layout


def _leaves(folder: Path, files: Mapping[str, str], source: Path) -> str | None:
    """The first file of a source's own vocabulary that a link has elsewhere; None where there is none."""
    return next((str(folder / f) for f in files.values() if not is_inside(folder / f, source)), None)


def _tokenizer(given: Path | None, source: Path, layout: Layout) -> tuple[Path, dict[str, str]]:
    """The folder with the files of tokenizers, the one given, else the source's own; and those files."""
    folder = given if given is not None else source
    files = vocabulary_files(folder, layout)
    if given is not None and not files:
        raise UsageError(replace(no_tokenizer(layout), hint="leave `--tokenizer` out"))
    absent = [n for n in files.values() if not os.path.isfile(folder / n)]  # noqa: PTH113 - which raises nothing
    if not absent or given is None:
        return folder, {} if absent else files
    hint = "give a model's folder in diffusers' layout, or its folder `tokenizer`"
    raise UsageError(Problem(f"`{folder}` holds no `{absent[0]}`", hint=hint))


def _lost(checkpoint: Checkpoint, form: Form) -> tuple[str, ...]:
    """What a checkpoint has that a form cannot hold, in words."""
    found = []
    # What a GGUF file says of itself under `general.` is of its form.
    if others := tuple(n for n in checkpoint.others if not n.startswith("general.")):
        found.append(f"entries that are no tensors of the model: {listed(others)}")
    if form == "torch" and checkpoint.metadata.keys() - {"format"}:
        found.append("metadata, which a dict of tensors cannot hold")
    return tuple(found)
