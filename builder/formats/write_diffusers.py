"""Folders in diffusers' layout, written from a checkpoint under the original names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from builder.base.disk import write_bytes, write_text
from builder.formats.diffusers import REMAINDER
from builder.formats.layouts import Layout
from builder.formats.layouts.configs import Prediction, configs
from builder.formats.open import open_checkpoint
from builder.formats.write_safetensors import Written, write
from builder.formats.write_sharded import plan_shards, write_shards
from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Reshaped
from builder.tensors.scan import scan

STEM = "diffusion_pytorch_model"  # of weights that diffusers itself loads


class WrittenFolder(NamedTuple):
    """What was written: by file, and of what the layout has no place for, the tensors.

    `digests` are the BLAKE3-256 of the checkpoint's tensors, where asked for.
    """

    files: list[Written]
    rest: dict[str, LazyTensor]
    digests: dict[str, str]


def write_folder(
    folder: Path,
    layout: Layout,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    others: Mapping[str, LazyTensor] | None = None,
    prediction: Prediction,
    zero_snr: bool = False,
    vocabulary: Mapping[str, bytes] | None = None,
    shard_size: int | None = None,
    digests: bool = False,
    groups: Mapping[str, str] | None = None,
    **options: Any,
) -> WrittenFolder:
    """Write a full checkpoint's tensors, under their original names, into a folder in diffusers' layout.

    What the layout has no place for goes to `REMAINDER`, so that nothing is lost: tensors of the model,
    `others`, which are none of its, and metadata. `vocabulary` are the files of tokenizers by their path;
    without them, loaders have to be given a tokenizer, or they would make up an empty one. Parts of more than
    `shard_size` bytes become sharded sets. All else is as for `write` of `write_safetensors`. Make the folder
    with `builder.base.disk`.
    Raises OutputError, and what the tensors' `read_into` raises.
    """
    parts: dict[str, dict[str, LazyTensor]] = {part.folder: {} for part in layout.parts}
    rest = dict(others or {})
    homes: dict[str, dict[str, str]] = {part: {} for part in parts}  # the original's name of each tensor
    moved = set()
    for name, tensor in tensors.items():
        made, left = layout.to_diffusers({name: tensor})
        rest |= left
        for part, found in made.items():
            parts[part] |= found
            homes[part] |= dict.fromkeys(found, name)
            if not all(t is tensor or isinstance(t, Reshaped) for t in found.values()):
                moved.add(name)
    durable = options.get("durable", True)
    tokenizers = {path.partition("/")[0] for path in vocabulary or ()}
    said = configs(layout, parts, prediction=prediction, zero_snr=zero_snr, tokenizers=tokenizers)
    for path, config in said.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_text(folder / path, json.dumps(config, indent=2, sort_keys=True) + "\n", durable=durable)
    for path, data in (vocabulary or {}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_bytes(folder / path, data, durable=durable)
    options["digests"] = digests
    files: list[Written] = []
    known: dict[str, str] = {}
    for library, part in ((p.library, p.folder) for p in layout.parts if parts[p.folder]):
        stem, home, found = "model" if library == "transformers" else STEM, homes[part], parts[part]
        counted = {n: groups[home[n]] for n in found if home[n] in groups} if groups else None
        if shard_size is not None and len(plan_shards(found, stem, shard_size)) > 1:
            plain, size = {"format": "pt"}, shard_size
            new = write_shards(folder / part, stem, found, plain, shard_size=size, groups=counted, **options)
        else:
            new = [_write(folder, f"{part}/{stem}.safetensors", found, {"format": "pt"}, counted, options)]
        files += new
        known |= {home[n]: digest for w in new for n, digest in w.digests.items()}
    if rest or metadata.keys() - {"format"}:
        files.append(_write(folder, REMAINDER, rest, metadata, groups, options))
        known |= files[-1].digests
    if digests and moved:  # whose bytes lie in another order: they are read as they will be
        with open_checkpoint(folder, {layout.name: layout}) as held:
            pieces = {name: held[name] for name in sorted(moved)}
            stop, threads = options.get("stop"), options.get("threads", 2)
            found_ = scan(pieces, digests=True, numbers=False, threads=threads, stop=stop)
        known |= {name: str(t.digest) for name, t in found_.tensors.items()}
    return WrittenFolder(files, rest, known)


def _write(
    folder: Path,
    path: str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    groups: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> Written:
    return write(folder / path, tensors, metadata, groups=groups, task=f"writing {path}", **options)
