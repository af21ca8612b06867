"""Sharded sets: several safetensors files and an index that says which tensor lies in which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from builder.base.errors import Place, Problem, SourceError
from builder.base.files import parse_json
from builder.formats import safetensors
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint, with_descriptions
from builder.formats.sniff import is_safetensors
from builder.formats.torch.containers import HEAD, looks_like_torch
from builder.tensors.lazy import LazyTensor

MAX_INDEX = 32 << 20  # bytes; the index of a model of a million tensors is a third of that


def read_index(blob: FileBlob) -> dict[str, Any] | None:
    """The JSON object of a sharded set's index, or None when the file is no such thing."""
    if blob.size > MAX_INDEX:
        return None
    try:
        index = parse_json(blob.read(0, blob.size), object_pairs_hook=safetensors.unique)
    except ValueError:
        return None
    return index if isinstance(index, dict) and "weight_map" in index else None


def from_index(
    index: dict[str, Any], blob: FileBlob, path: Path, name: str, *, repair: bool = False
) -> Checkpoint:
    """The checkpoint of a sharded set, whose shards lie in the folder of its index `blob` at `path`.

    A shard's tensors that the index leaves out belong to it too, as they do for the libraries that load
    such sets. Metadata is the index's, then the shards'; values that are not strings are left out. `repair`
    is for the shards, as `read_header` of `safetensors` has it.
    Raises SourceError for a shard's name that leaves the folder, a missing or invalid shard, a tensor
    that is not where the index says, and one that two shards have.
    """
    weight_map = _weight_map(index, path)
    opened: list[Checkpoint] = []
    try:
        tensors: dict[str, LazyTensor] = {}
        found: dict[str, str] = {}
        for shard in sorted(set(weight_map.values())):
            checkpoint = _open_shard(path, shard, repair)
            opened.append(checkpoint)
            for tensor in checkpoint:
                if tensor in found:
                    raise _bad(path, f"two shards have tensor `{tensor}`", f"`{found[tensor]}` and `{shard}`")
                found[tensor] = shard
            tensors |= checkpoint.tensors
        for tensor, shard in weight_map.items():
            if found.get(tensor) != shard:
                where = f"it is in `{found[tensor]}`" if tensor in found else "no shard has it"
                raise _bad(path, f"tensor `{tensor}` is not in its shard `{shard}`", where)
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise
    metadata: dict[str, str] = {}
    for more in (*(c.metadata for c in reversed(opened)), index.get("metadata")):
        if isinstance(more, dict):
            metadata |= {k: v for k, v in more.items() if isinstance(v, str)}
    checkpoint = Checkpoint(
        name=name,
        container="safetensors-sharded",
        size=sum(c.size for c in opened),
        tensors=tensors,
        metadata=metadata,
        blobs=(blob, *(b for c in opened for b in c.blobs)),
        mended=tuple(f"{Path(c.name).name}: {m}" for c in opened for m in c.mended),
    )
    return with_descriptions(checkpoint)


def _weight_map(index: dict[str, Any], path: Path) -> dict[str, str]:
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "`weight_map` is not an object of tensor names", f"it is {str(weight_map)[:40]}")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _bad(path, f"the shard of tensor `{tensor}` is not a name", f"it is {str(shard)[:40]}")
        if shard in ("", ".", "..") or any(c in "/\\:" or not c.isprintable() for c in shard):
            raise _bad(
                path,
                f"the shard `{shard}` of tensor `{tensor}` is not a plain file name",
                hint="shards lie in the folder of their index; nothing outside it is read",
            )
    return weight_map


def _open_shard(index: Path, shard: str, repair: bool) -> Checkpoint:
    path = index.parent / shard
    if not os.path.exists(path):  # noqa: PTH110 - a name that no file can have is missing, too
        raise _bad(index, f"the shard `{shard}` is missing", hint="download it into the folder of the index")
    blob = FileBlob(path)
    try:
        head = blob.read(0, min(blob.size, HEAD))
        if looks_like_torch(head) and not is_safetensors(head):
            hint = "convert the set to safetensors with the program that made it"
            raise _bad(index, f"the shard `{shard}` is a PyTorch file, not safetensors", hint=hint)
        return safetensors.from_blob(blob, str(path), repair=repair)
    except BaseException:
        blob.close()
        raise


def _bad(path: Path, fact: str, *evidence: str, hint: str | None = None) -> SourceError:
    return SourceError(Problem(fact, Place(str(path)), evidence, hint))
