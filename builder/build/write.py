"""Writing an output in the container that its name asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.formats.write_safetensors import Written, write
from builder.formats.write_torch import write_torch
from builder.tensors.lazy import LazyTensor


def write_output(
    container: str, path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], **options: Any
) -> Written:
    """Write tensors to `path`, as `safetensors` or `torch`; options are those of `write`.

    Raises what reading, writing or `accept` raises; then `path` is as it was.
    """
    if container == "safetensors":
        return write(path, tensors, metadata, digests=True, **options)
    held = dict(sorted(tensors.items()))
    return write_torch(path, held, nesting="state_dict", sha256=True, digests=True, **options)
