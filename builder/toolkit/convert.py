"""Converting checkpoints: the same tensors in another container, precision or layout."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from builder.base.errors import CkptError, OutputError, Place, Problem, SourceError, UsageError
from builder.base.progress import SILENT, Reporter, human_bytes
from builder.formats import open_checkpoint
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import Catalog, Names
from builder.models.cut import cut
from builder.models.identify import identify
from builder.models.prediction import Prediction as Told
from builder.models.prediction import prediction as prediction_of
from builder.recipe.names import recipe_name
from builder.tensors.cast import PRECISIONS, Faults, NonFinite, Overflow, Precision, cast_all
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed import packing
from builder.toolkit.command_recipe import CommandRecipe

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
    from builder.formats.layouts.configs import Prediction
    from builder.formats.write_safetensors import Written

Form = Literal["safetensors", "torch", "sharded", "diffusers"]

FORMS: dict[str, Form] = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".safetensors.index.json": "sharded",
}

VOCABULARY = ("vocab.json", "merges.txt")
_MAX_VOCABULARY = 64 << 20  # bytes; that of CLIP is 1.4 MB


@dataclass(frozen=True)
class Converted:
    """What was written: a file, an index or a folder; `size` is in bytes, of all of its files.

    `lost` says what the source has that the output cannot hold.
    """

    path: Path
    form: Form
    size: int
    tensors: int
    lost: tuple[str, ...]


def form_of(name: str) -> Form:
    """The form that an output's name asks for: by its suffix; a name without one is a diffusers folder.

    Raises UsageError for the suffix of some other kind of file.
    """
    for suffix, form in FORMS.items():
        if name.lower().endswith(suffix):
            return form
    strange = re.fullmatch(r"\.[A-Za-z]\w*", Path(name).suffix)
    if strange and not name.endswith("/") and not os.path.isdir(name):  # noqa: PTH112
        raise UsageError(
            Problem(
                f"`{name}` has the suffix of no container that can be written",
                evidence=(f"there are {', '.join(f'`{s}`' for s in FORMS)}",),
                hint="end a folder's name with `/`",
            )
        )
    return "diffusers"


def convert(
    source: Path | str,
    target: Path | str,
    *,
    catalog: Catalog,
    precision: Precision = "keep",
    overflow: Overflow = "error",
    non_finite: NonFinite = "error",
    shard_size: int | None = None,
    prediction: Prediction | None = None,
    tokenizer: Path | None = None,
    repair: bool = False,
    threads: int = 2,
    durable: bool = True,
    reporter: Reporter = SILENT,
) -> Converted:
    """Write every tensor of a checkpoint to `target`, in the form that its name asks for (`form_of`).

    With the precision `keep` no value changes, nor is any looked at. Any other is for weights: integers
    and the noise schedule stay as they are, and values that it cannot hold are handled as `overflow` and
    `non_finite` say (`builder.tensors.cast.Cast`). `shard_size` is in bytes of tensors. For diffusers'
    layout, `prediction` overrides what the model says it predicts, and `tokenizer` is a folder with CLIP's
    vocabulary. `repair` is as for `open_checkpoint`, and what it mends is noted. Raises CkptError; then
    `target` is as it was.
    """
    form = form_of(str(target))
    target = Path(target)
    if shard_size is not None and form in ("safetensors", "torch"):
        raise UsageError(
            Problem(
                f"`{target}` is one file, and shards are several",
                hint=f"name the set's index, such as `{target.stem}.safetensors.index.json`",
            )
        )
    if form != "diffusers" and (prediction or tokenizer):
        option = "--prediction" if prediction else "--tokenizer"
        fact = f"`{option}` is for a diffusers folder, and `{target}` is none"
        raise UsageError(Problem(fact, hint="name a folder, or leave the option out"))
    with open_checkpoint(source, catalog.layouts, repair=repair) as checkpoint:
        for mended in checkpoint.mended or ("nothing was wrong with the file",) * repair:
            reporter.note(f"repair: {mended}")
        faults = Faults()
        tensors = _cast(checkpoint, precision, overflow, non_finite, faults, catalog)
        blobs = [b for b in checkpoint.blobs if isinstance(b, FileBlob)]

        def accept(_: object = None) -> None:
            if faults.by_name:
                raise _with_options(faults, checkpoint.name, precision)
            for blob in blobs:
                if not blob.unchanged():
                    raise SourceError(Problem("the file changed while it was read", Place(blob.name)))

        options: dict[str, Any] = {
            "threads": threads,
            "durable": durable,
            "inputs": [b.name for b in blobs],
            "reporter": reporter,
        }
        if form == "diffusers":
            model = _model(checkpoint, tensors, catalog, prediction)
            vocabulary = _vocabulary(tokenizer, Path(source))
            size = _write_folder(target, model, vocabulary, shard_size, accept, options)
            return Converted(target, form, size, len(tensors), _lost(checkpoint, form))
        tensors = _named(checkpoint, tensors, catalog, reporter)
        if form == "sharded":
            size = _write_set(target, tensors, _metadata(checkpoint), shard_size, accept, options)
        else:
            size = _write_file(target, form, tensors, _metadata(checkpoint), accept, options)
        return Converted(target, form, size, len(tensors), _lost(checkpoint, form))


def recipe_of(
    source: Path, target: str, *, catalog: Catalog, precision: str, overflow: str, non_finite: str
) -> CommandRecipe:
    """The recipe whose build has the same tensors as the conversion; raises UsageError where there is none.

    A recipe makes one file, and carries what the catalog knows under the names that it has there.
    """
    with open_checkpoint(source, catalog.layouts) as checkpoint:
        identity = identify(checkpoint, catalog)
    scales = [n for n in identity.scales if n not in identity.companions]
    left = [*identity.ema, *identity.junk, *identity.unknown, *scales]
    odd = [
        m.component.name for m in identity.matches if m.diffusers_attention or m.usual_prefix or not m.usual
    ]
    reasons = []
    if form_of(target) not in ("safetensors", "torch"):
        reasons.append(f"`{target}` is more than one file")
    if identity.architecture is None or not identity.intact:
        reasons.append("the catalog knows no such architecture")
    if left:
        reasons.append(f"it would leave out {len(left):,} tensors, such as `{left[0]}`")
    reasons += [f"it would give {name} its usual names and shapes" for name in odd]
    if reasons:
        raise UsageError(
            Problem(
                "no recipe makes just what this conversion makes",
                evidence=tuple(reasons),
                hint="leave `--save-recipe` out, or see `ckpt prune`",
            )
        )
    name = recipe_name(source)
    said = {"precision": precision, "overflow": overflow, "non_finite": non_finite}
    return CommandRecipe(name, {name: source}, name, output={k: v for k, v in said.items() if v != "error"})


def _cast(
    checkpoint: Checkpoint,
    precision: Precision,
    overflow: Overflow,
    non_finite: NonFinite,
    faults: Faults,
    catalog: Catalog,
) -> Mapping[str, LazyTensor]:
    if precision == "keep":
        return checkpoint
    weights = {n: t for n, t in checkpoint.items() if n not in catalog.optional}
    made = cast_all(weights, precision, faults=faults, overflow=overflow, non_finite=non_finite)
    return {n: made.get(n, t) for n, t in checkpoint.items()}


def _named(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], catalog: Catalog, reporter: Reporter
) -> Mapping[str, LazyTensor]:
    """The tensors with the usual names, where a component has those of another program."""
    identity = identify(checkpoint, catalog)
    at = catalog.architectures.get(identity.architecture or "") if identity.intact else None
    made: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for match in identity.matches:
        cls = match.component.cls
        home = at is not None and cls in at.slots
        if match.usual or match.component.mislabelled or not (identity.intact and (home or at is None)):
            continue
        names = Names(catalog.component_for(cls, at).prefix) if at and home else catalog.classes[cls][0].alone
        found = cut(tensors, identity, match, cls).tensors
        made |= {names.name(bare): tensor for bare, tensor in found.items()}
        taken.update(match.full)
        reporter.note(f"{match.component.name}: {len(found):,} tensors get their usual names")
    rest = {name: tensor for name, tensor in tensors.items() if name not in taken}
    if clash := next((name for name in made if name in rest), None):
        raise SourceError(Problem(f"two tensors would be `{clash}`", Place(checkpoint.name)))
    return {**rest, **made} if made else tensors


def _metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
    if checkpoint.container.startswith("torch"):
        return {"format": "pt"}  # what transformers insists on, and every tool for PyTorch writes
    return checkpoint.metadata


def _lost(checkpoint: Checkpoint, form: Form) -> tuple[str, ...]:
    """What a checkpoint has that a form cannot hold, in words."""
    found = []
    if checkpoint.others:
        names = [f"`{name}`" for name in checkpoint.others]
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        found.append(f"entries that are no tensors of the model: {', '.join(names[:5])}{more}")
    if form == "torch" and checkpoint.metadata.keys() - {"format"}:
        found.append("metadata, which a dict of tensors cannot hold")
    return tuple(found)


def _with_options(faults: Faults, name: str, precision: Precision) -> CkptError:
    """The error of values that would not survive, with the options that let them."""
    error = faults.error(f"`{name}`", PRECISIONS[precision])
    assert error is not None
    problems = []
    for problem, (_, fault) in zip(error.problems, sorted(faults.by_name.items()), strict=True):
        ways = ["`--overflow clamp` or `keep`"] * bool(fault.overflow)
        ways += ["`--non-finite keep`"] * bool(fault.nan or fault.infinite)
        problems.append(replace(problem, hint=f"to convert all the same, give {' and '.join(ways)}"))
    return OutputError(*problems)


# ── files and sets ──


def _write_file(
    target: Path,
    form: Form,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    accept: Callable[[object], None],
    options: Mapping[str, Any],
) -> int:
    task = f"writing {target.name}"

    def named(written: Written) -> Path | None:
        accept(written)
        return written.path

    if form == "safetensors":
        from builder.formats.write_safetensors import write

        write(target, tensors, metadata, sha256=False, accept=named, task=task, **options)
    else:
        from builder.formats.write_torch import write_torch

        write_torch(target, tensors, accept=named, task=task, **options)
    return target.stat().st_size


def _write_set(
    index: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    shard_size: int | None,
    accept: Callable[[], None],
    options: Mapping[str, Any],
) -> int:
    from builder.base.disk import new_set
    from builder.formats.write_sharded import SHARD_SIZE, SUFFIX, write_shards

    with new_set(index, durable=options["durable"]) as folder:
        size, stem = shard_size or SHARD_SIZE, index.name[: -len(SUFFIX)]
        write_shards(folder, stem, tensors, metadata, shard_size=size, **options)
        accept()
        return _size(folder)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# ── diffusers' layout ──


class _Model(NamedTuple):
    """A full checkpoint: its model's tensors under the names that the original layout has for them.

    `others` are those that are no part of the model, such as averaged weights.
    """

    layout: Layout
    tensors: Mapping[str, LazyTensor]
    others: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    prediction: Prediction
    zero_snr: bool


def _model(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    catalog: Catalog,
    prediction: Prediction | None,
) -> _Model:
    identity = identify(checkpoint, catalog)
    architecture = catalog.architectures.get(identity.architecture or "") if identity.intact else None
    if architecture is None or architecture.diffusers is None:
        known = ", ".join(a.name for a in catalog.architectures.values() if a.diffusers is not None)
        raise SourceError(
            Problem(
                f"`{checkpoint.name}` is no model that diffusers' layout is known for",
                evidence=(f"it is {identity.architecture or 'unknown'}", f"there are {known}"),
                hint="name a file to write it in another container",
            )
        )
    told = prediction_of(checkpoint, checkpoint.metadata, catalog)
    foreign = next((name for name in told.names if name.startswith("edm_")), None)
    if foreign is not None:
        raise SourceError(
            Problem(
                f"`{checkpoint.name}` is made for another kind of scheduler",
                evidence=(f"it has the marker `{foreign}`",),
                hint="name a file to write it in another container",
            )
        )
    if packed := packing({n: checkpoint[n] for m in identity.matches for n in m.full}):
        hint = "name a file to write them in another container"
        raise packed.refused("have no place in diffusers' layout", hint)
    layout = catalog.layouts[architecture.diffusers]
    usual: dict[str, LazyTensor] = {}
    others: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for match in (m for m in identity.matches if m.component.cls in architecture.slots):
        prefix = catalog.component_for(match.component.cls, architecture).prefix
        parts = cut(tensors, identity, match, match.component.cls).tensors
        for bare, tensor in parts.items():  # no loader of the layout knows what is beyond the table
            (others if bare in match.companions else usual)[prefix + bare] = tensor
        taken.update(match.full)
    return _Model(
        layout,
        usual,
        others | {name: tensor for name, tensor in tensors.items() if name not in taken},
        _metadata(checkpoint),
        prediction or _prediction(told, layout, checkpoint.name),
        told.zero_snr,
    )


def _prediction(told: Told, layout: Layout, name: str) -> Prediction:
    """What the scheduler's configuration is to say; raises UsageError where nothing says it."""
    if told.kind is None and layout.pixels_v is not None:
        both = f"of {layout.pixels} pixels epsilon, of {layout.pixels_v} pixels v"
        raise UsageError(
            Problem(
                f"nothing in `{name}` says what it predicts",
                evidence=(f"{layout.name} comes in both kinds: {both}",),
                hint="say `--prediction epsilon` or `--prediction v`",
            )
        )
    return "v" if told.v else "epsilon"


def _vocabulary(given: Path | None, source: Path) -> dict[str, bytes]:
    """The files of CLIP's tokenizer, which no checkpoint holds; none where none are given."""
    folder = given if given is not None else source / "tokenizer"
    found: dict[str, bytes] = {}
    for name in VOCABULARY:
        path = folder / name
        if os.path.isfile(path):  # noqa: PTH113 - which answers where pathlib raises
            with closing(FileBlob(path)) as blob:
                found[name] = blob.read(0, min(blob.size, _MAX_VOCABULARY))
        elif given is not None:
            raise UsageError(
                Problem(
                    f"`{folder}` holds no `{name}`",
                    hint="give the folder `tokenizer` of a model in diffusers' layout",
                )
            )
    return found


def _write_folder(
    target: Path,
    model: _Model,
    vocabulary: Mapping[str, bytes],
    shard_size: int | None,
    accept: Callable[[], None],
    options: Mapping[str, Any],
) -> int:
    from builder.base.disk import new_folder
    from builder.formats.diffusers import REMAINDER
    from builder.formats.write_diffusers import write_folder

    reporter: Reporter = options["reporter"]
    with new_folder(target, durable=options["durable"]) as folder:
        rest = write_folder(
            folder,
            model.layout,
            model.tensors,
            model.metadata,
            others=model.others,
            prediction=model.prediction,
            zero_snr=model.zero_snr,
            vocabulary=vocabulary,
            shard_size=shard_size,
            **options,
        )
        accept()
        size = _size(folder)
    if rest:
        count = f"{len(rest):,} tensor{'s' * (len(rest) > 1)}"
        total = human_bytes(sum(t.nbytes for t in rest.values()))
        reporter.note(f"what the layout has no place for is in `{REMAINDER}`: {count}, {total}")
    if not vocabulary:
        reporter.note(
            "without a tokenizer, whose vocabulary no checkpoint holds: `--tokenizer FOLDER` adds it"
        )
    return size
