"""Converting checkpoints: the same tensors in another container, precision or layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.base.errors import Problem, SourceError, UsageError
from builder.base.inside import is_inside
from builder.base.words import listed
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import Architecture
from builder.models.cut import foreign
from builder.models.prediction import prediction as find_told
from builder.plan import Plan
from builder.plan.folders import VOCABULARY, find_layout, find_prediction
from builder.recipe.language import PUBLISHED
from builder.recipe.names import SINGLE, Form, form_of, recipe_name
from builder.sources.opened import OpenSource, Sources
from builder.toolkit.command_recipe import CommandRecipe, run
from builder.workspace import Workspace


@dataclass(frozen=True)
class Converted:
    """What was written: a file, an index or a folder; `size` is in bytes, of all of its files.

    `lost` says what the source has that the output cannot hold; `tokenizer`, whether a folder has one.
    """

    path: Path
    form: Form
    size: int
    tensors: int
    lost: tuple[str, ...]
    tokenizer: bool


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
        _check_model(opened, said.get("prediction"), workspace)
        given = said.pop("tokenizer", None)
        tokenizer = _tokenizer(given, source)
        if given is None and tokenizer is not None and (link := _leaves(tokenizer, source)) is not None:
            workspace.reporter.note(f"`{link}` is not copied: a link leads out of `{source}`")
            tokenizer = None
        if tokenizer is not None:
            said["tokenizer"] = str(tokenizer.absolute())

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
    return Converted(Path(target), form, made.outputs[0].size, count, lost, "tokenizer" in said)


def _check_model(opened: OpenSource, prediction: str | None, workspace: Workspace) -> None:
    """Raise SourceError for what is no model in diffusers' layout, UsageError where it must be said what."""
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


def _leaves(tokenizer: Path, source: Path) -> str | None:
    """The first file of a source's own vocabulary that a link has elsewhere; None where there is none."""
    files = (tokenizer / name for name in VOCABULARY)
    return next((str(f) for f in files if not is_inside(f, source)), None)


def _tokenizer(given: Path | None, source: Path) -> Path | None:
    """The folder with a tokenizer's vocabulary: the one given, else the source's own."""
    folder = given if given is not None else source / "tokenizer"
    absent = [n for n in VOCABULARY if not os.path.isfile(folder / n)]  # noqa: PTH113 - which raises nothing
    if not absent:
        return folder
    if given is None:
        return None
    hint = "give the folder `tokenizer` of a model in diffusers' layout"
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
