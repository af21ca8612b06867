"""Folders in diffusers' layout, written from a checkpoint under the original names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.base.disk import write_bytes, write_text
from builder.base.progress import SILENT, Reporter
from builder.formats.diffusers import REMAINDER
from builder.formats.layouts import Layout
from builder.formats.layouts.configs import Prediction, configs
from builder.formats.write_safetensors import write
from builder.formats.write_sharded import plan_shards, write_shards
from builder.tensors.lazy import LazyTensor

STEM = "diffusion_pytorch_model"  # of weights that diffusers itself loads


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
    threads: int = 2,
    durable: bool = True,
    inputs: Iterable[Path | str] = (),
    reporter: Reporter = SILENT,
) -> dict[str, LazyTensor]:
    """Write a full checkpoint's tensors, under their original names, into a folder in diffusers' layout.

    What the layout has no place for goes to `REMAINDER`, so that nothing is lost: tensors of the model,
    `others`, which are none of its, and metadata. Those tensors are returned. `vocabulary` are the files of
    CLIP's tokenizer by name; without it, loaders have to be given a tokenizer, or they would make up an
    empty one. Parts of more than `shard_size` bytes become sharded sets. Make the folder with
    `builder.base.folders`.
    Raises OutputError, and what the tensors' `read_into` raises.
    """
    parts, rest = layout.to_diffusers(tensors)
    rest |= others or {}
    options: dict[str, Any] = {
        "threads": threads,
        "durable": durable,
        "inputs": tuple(inputs),
        "reporter": reporter,
    }
    said = configs(layout, parts, prediction=prediction, zero_snr=zero_snr, tokenizers=bool(vocabulary))
    for path, config in said.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_text(folder / path, json.dumps(config, indent=2, sort_keys=True) + "\n", durable=durable)
    for tokenizer in (p.tokenizer for p in layout.parts if p.tokenizer is not None):
        for file, data in (vocabulary or {}).items():
            write_bytes(folder / tokenizer / file, data, durable=durable)
    stems = {p.folder: "model" if p.library == "transformers" else STEM for p in layout.parts}
    for part, found in parts.items():
        stem = stems[part]
        if shard_size is not None and len(plan_shards(found, stem, shard_size)) > 1:
            write_shards(folder / part, stem, found, {"format": "pt"}, shard_size=shard_size, **options)
        else:
            path = f"{part}/{stem}.safetensors"
            _write(folder, path, found, {"format": "pt"}, options)
    if rest or metadata.keys() - {"format"}:
        _write(folder, REMAINDER, rest, metadata, options)
    return rest


def _write(
    folder: Path,
    path: str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    options: Mapping[str, Any],
) -> None:
    write(folder / path, tensors, metadata, sha256=False, task=f"writing {path}", **options)
