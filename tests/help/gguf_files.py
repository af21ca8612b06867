"""GGUF files: by the reference's writer, and byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from builder.tensors.lazy import LazyTensor

Types = gguf.GGMLQuantizationType
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Blocks `[count, bytes]` of any bits, whose scales are finite."""
    _, size = gguf.GGML_QUANT_SIZES[Types[name]]
    data = np.random.default_rng(seed).integers(0, 256, (count, size), dtype="u1")
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2))
    for at in scales:
        if at + 2 <= size:
            data[:, at + 1] &= 0xBB  # not all bits of the exponent
    return data


def write(
    path: Path,
    tensors: Mapping[str, Any],
    architecture: str = "flux",
    values: Mapping[str, Any] | None = None,
) -> Path:
    """A file of arrays, or of blocks: `(type's name, shape, bytes)`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (values or {}).items():
        kind = {str: "string", int: "uint32", float: "float32", list: "array", bool: "bool"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            kind, shape, data = tensor
            rows = np.frombuffer(data, "u1").reshape(*shape[:-1], -1)
            writer.add_tensor(name, rows, raw_dtype=Types[kind])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(tensors: Mapping[str, LazyTensor], kind: str = "Q8_0") -> dict[str, Any]:
    """Tensors for `write`: matrices in blocks, as far as their rows are whole blocks."""
    made: dict[str, Any] = {}
    block, _ = gguf.GGML_QUANT_SIZES[Types[kind]]
    for name, tensor in tensors.items():
        values = np.frombuffer(tensor.tobytes(), tensor.dtype.torch_name).reshape(tensor.shape)
        if len(tensor.shape) > 1 and not tensor.shape[-1] % block:
            data = gguf.quants.quantize(values.astype("f4"), Types[kind])
            made[name] = (kind, tensor.shape, data.tobytes())
        else:
            made[name] = values
    return made


def text(value: str | bytes) -> bytes:
    """A string as it lies in a header."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return text(name) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: Sequence[int] = (4,), kind: int = 0, start: int = 0) -> bytes:
    """A tensor's line; its shape is in the file's order."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def raw(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of keys, tensors and data, which begin at a multiple of 32."""
    tensors, pairs = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data
