"""Converting checkpoints: the same tensors in another container, precision or layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from builder.catalog import Catalog
from builder.errors import CkptError, OutputError, Place, Problem, SourceError, UsageError
from builder.formats import open_checkpoint
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.formats.folders import making_set
from builder.formats.sharded_write import SHARD_SIZE, SUFFIX, write_shards
from builder.formats.torch_write import write_torch
from builder.formats.writer import write
from builder.numeric import PRECISIONS, Faults, NonFinite, Overflow, Precision, cast_all
from builder.progress import SILENT, Reporter
from builder.tensors import LazyTensor

Form = Literal["safetensors", "torch", "sharded", "diffusers"]

FORMS: dict[str, Form] = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    SUFFIX: "sharded",
}


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
    if strange and not name.endswith("/") and not Path(name).is_dir():
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
    threads: int = 2,
    durable: bool = True,
    reporter: Reporter = SILENT,
) -> Converted:
    """Write every tensor of a checkpoint to `target`, in the form that its name asks for (`form_of`).

    With the precision `keep` no value changes, nor is any looked at. Any other is for weights: integers
    and the noise schedule stay as they are, and values that it cannot hold are handled as `overflow` and
    `non_finite` say (`builder.numeric.Cast`). `shard_size` is in bytes of tensors, for a sharded set.
    Raises CkptError; then `target` is as it was.
    """
    form, target = form_of(str(target)), Path(target)
    if shard_size is not None and form in ("safetensors", "torch"):
        raise UsageError(
            Problem(
                f"`{target}` is one file, and shards are several",
                hint=f"name the set's index, such as `{target.stem}{SUFFIX}`",
            )
        )
    with open_checkpoint(source) as checkpoint:
        faults = Faults()
        tensors = _cast(checkpoint, precision, overflow, non_finite, faults, catalog)
        blobs = [b for b in checkpoint.blobs if isinstance(b, FileBlob)]
        options: dict[str, Any] = {
            "threads": threads,
            "durable": durable,
            "inputs": [b.name for b in blobs],
            "reporter": reporter,
        }

        def accept(_: object = None) -> None:
            if faults.by_name:
                raise _with_options(faults, checkpoint.name, precision)
            for blob in blobs:
                if not blob.unchanged():
                    raise SourceError(Problem("the file changed while it was read", Place(blob.name)))

        task = f"writing {target.name}"
        if form == "safetensors":
            write(
                target, tensors, _metadata(checkpoint), file_digest=False, accept=accept, task=task, **options
            )
            size = target.stat().st_size
        elif form == "torch":
            write_torch(target, tensors, accept=accept, task=task, **options)
            size = target.stat().st_size
        else:
            with making_set(target, durable=durable) as folder:
                stem = target.name.removesuffix(SUFFIX)
                shards = shard_size or SHARD_SIZE
                write_shards(folder, stem, tensors, _metadata(checkpoint), shard_size=shards, **options)
                accept()
                size = _size(folder)
        return Converted(target, form, size, len(tensors), _lost(checkpoint, form))


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


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.container.startswith("torch"):
        return {"format": "pt"}  # what transformers insists on, and every tool for PyTorch writes
    return checkpoint.metadata


def _lost(checkpoint: Checkpoint, form: Form) -> tuple[str, ...]:
    """What a checkpoint has that a form cannot hold, in words."""
    found = []
    if checkpoint.others:
        names = [f"`{name}`" for name in checkpoint.others]
        some = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
        found.append(f"what is no tensor: {some}")
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


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
