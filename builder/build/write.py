"""Writing an output in the container that its name asks for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from builder.base.progress import Reporter
from builder.formats.write_safetensors import Written, write
from builder.formats.write_torch import write_torch
from builder.tensors.lazy import WINDOW, LazyTensor


def write_output(
    container: str,
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    threads: int,
    inputs: Sequence[Path],
    reporter: Reporter,
    task: str,
    accept: Callable[[Written], object],
) -> Written:
    """Write tensors to `path`, as `safetensors` or `torch`; `accept` sees what will be put in place.

    Raises what reading, writing or `accept` raises; then `path` is as it was.
    """
    if container == "safetensors":
        return write(
            path,
            tensors,
            metadata,
            threads=threads,
            inputs=inputs,
            reporter=reporter,
            task=task,
            tensor_digests=True,
            sha256=False,
            accept=accept,
        )
    made: list[Written] = []

    def seen(fd: int) -> None:
        stat = os.fstat(fd)
        made.append(Written(path, stat.st_size, _sha256(fd), {}, 0, stat))
        accept(made[0])

    write_torch(
        path,
        dict(sorted(tensors.items())),
        nesting="state_dict",
        threads=threads,
        inputs=inputs,
        reporter=reporter,
        task=task,
        accept=seen,
    )
    return made[0]


def _sha256(fd: int) -> str:
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(WINDOW)), 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()
