"""Sharded sets, written: safetensors files of a bounded size, and the index that loaders look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.base.disk import write_text
from builder.base.errors import OutputError, Problem
from builder.formats.write_safetensors import Written, writing, writing_files
from builder.tensors.lazy import LazyTensor
from builder.tensors.scan import Passing

SHARD_SIZE = 5_000_000_000  # bytes of tensors; what the Hugging Face libraries take by default
SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """A file of a set, and the names of its tensors."""

    file: str
    names: tuple[str, ...]


def plan_shards(
    tensors: Mapping[str, LazyTensor], stem: str, shard_size: int = SHARD_SIZE
) -> tuple[Shard, ...]:
    """Which tensors go together: in the order of their names, as many as `shard_size` bytes hold.

    A tensor larger than that has a shard of its own.
    """
    groups: list[list[str]] = [[]]
    room = shard_size
    for name in sorted(tensors):
        size = tensors[name].nbytes
        if size > room and groups[-1]:
            groups.append([])
            room = shard_size
        groups[-1].append(name)
        room -= size
    return tuple(
        Shard(f"{stem}-{number:05}-of-{len(groups):05}.safetensors", tuple(names))
        for number, names in enumerate(groups, 1)
    )


def writing_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    groups: Mapping[str, str] | None = None,
    **options: Any,
) -> Passing[list[Written]]:
    """The work of writing a sharded set into `folder`, its index last; what was written, by file.

    Every shard carries the metadata; all else is as for `writing` of `write_safetensors`. Make the folder
    with `builder.base.disk`, so that no part of a set is ever seen. Raises OutputError, and what the tensors'
    `read_into` raises.
    """
    if not tensors:
        raise OutputError(Problem("a sharded set of no tensors cannot be read"))
    weight_map: dict[str, str] = {}
    works = []
    for shard in plan_shards(tensors, stem, shard_size):
        held = {name: tensors[name] for name in shard.names}
        counted = {name: groups[name] for name in shard.names if name in groups} if groups else None
        task = f"writing {shard.file}"
        works.append(writing(folder / shard.file, held, metadata, groups=counted, task=task, **options))
        weight_map |= dict.fromkeys(shard.names, shard.file)
    made = yield from writing_files(works)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / f"{stem}{SUFFIX}", text, durable=options.get("durable", True))
    return made
