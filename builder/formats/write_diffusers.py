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
from builder.formats.write_safetensors import Written, writing, writing_files
from builder.formats.write_sharded import plan_shards, writing_shards
from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Reshaped
from builder.tensors.scan import Pass, Passing, alone, side_by_side, spans_of

STEM = "diffusion_pytorch_model"  # of weights that diffusers itself loads
PLAIN = {"format": "pt"}  # metadata that loaders ask for


class WrittenFolder(NamedTuple):
    """What was written: by file, and of what the layout has no place for, the tensors.

    `digests` are the BLAKE3-256 of the checkpoint's tensors, where asked for.
    """

    files: list[Written]
    rest: dict[str, LazyTensor]
    digests: dict[str, str]


def writing_folder(
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
) -> Passing[WrittenFolder]:
    """The work of writing a full checkpoint, under its original names, into a folder in diffusers' layout.

    What the layout has no place for goes to `REMAINDER`, so that nothing is lost: tensors of the model,
    `others`, which are none of its, and metadata. `vocabulary` are the files of tokenizers by their path;
    without them, loaders have to be given a tokenizer, or they would make up an empty one. Parts of more than
    `shard_size` bytes become sharded sets. All else is as for `writing` of `write_safetensors`. Make the
    folder with `builder.base.disk`.
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
    works: list[tuple[Mapping[str, str], Passing[list[Written]]]] = []  # each with the names of its tensors
    for library, part in ((p.library, p.folder) for p in layout.parts if parts[p.folder]):
        stem, home, found = "model" if library == "transformers" else STEM, homes[part], parts[part]
        counted = {n: groups[home[n]] for n in found if home[n] in groups} if groups else None
        how = {"groups": counted, **options}
        if shard_size is not None and len(plan_shards(found, stem, shard_size)) > 1:
            work = writing_shards(folder / part, stem, found, PLAIN, shard_size=shard_size, **how)
        else:
            work = _writing(folder, f"{part}/{stem}.safetensors", found, PLAIN, **how)
        works.append((home, work))
    if rest or metadata.keys() - {"format"}:
        work = _writing(folder, REMAINDER, rest, metadata, groups=groups, **options)
        works.append(({name: name for name in rest}, work))
    written = yield from side_by_side([work for _, work in works])
    named = zip((home for home, _ in works), written, strict=True)
    known = {home[n]: digest for home, new in named for w in new for n, digest in w.digests.items()}
    if digests and moved:  # whose bytes lie in another order: they are read as they will be
        with open_checkpoint(folder, {layout.name: layout}) as held:
            pieces = {name: held[name] for name in sorted(moved)}
            found_ = yield from alone(Pass(spans_of(pieces), digests=True))
        known |= {name: str(t.digest) for name, t in found_.tensors.items()}
    return WrittenFolder([w for new in written for w in new], rest, known)


def _writing(
    folder: Path, path: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], **how: Any
) -> Passing[list[Written]]:
    return writing_files([writing(folder / path, tensors, metadata, task=f"writing {path}", **how)])
