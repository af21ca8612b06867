"""Checkpoints of any architecture of the catalog, tidy or as dirty as real ones, streamed to a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from builder.formats import open_checkpoint
from builder.formats.write_torch import writing_torch
from builder.models.samples import CLEAN, DIRTY, Content, Dirt, Model, Repeated, make
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.scan import carry_out

__all__ = ["CLEAN", "DIRTY", "Content", "Dirt", "Model", "main", "make", "write", "write_lora"]

Format = Literal["ckpt", "safetensors"]
ORDER = {dtype: index for index, dtype in enumerate(DType)}


def write(model: Model, path: Path | str, form: Format) -> None:
    """Write a model; what only a PyTorch file can hold is left out of a safetensors file."""
    if form == "ckpt":
        carry_out(
            writing_torch(path, model.tensors, nesting=model.nesting, extras=model.extras, durable=False)
        )
    else:
        _write_safetensors(Path(path), model.tensors)


def write_lora(model: Path, path: Path, *, seed: int, rank: int = 32) -> None:
    """Write a LoRA in kohya's names, FP16, for all matrices of the transformer blocks of a model's UNET."""
    prefix, end = "model.diffusion_model.", ".weight"
    with open_checkpoint(model) as checkpoint:
        matrices = {
            n.removeprefix(prefix).removesuffix(end).replace(".", "_"): t.shape
            for n, t in checkpoint.items()
            if n.startswith(prefix) and ".transformer_blocks." in n and n.endswith(end) and len(t.shape) == 2
        }
    values = np.random.default_rng(seed).standard_normal(1 << 20, np.float32) * 0.01
    block = memoryview(values.astype(np.float16).tobytes())
    tensors: dict[str, LazyTensor] = {}
    for number, (name, (rows, columns)) in enumerate(matrices.items()):
        tensors[f"lora_unet_{name}.lora_up.weight"] = Repeated(DType.F16, (rows, rank), block, 14 * number)
        tensors[f"lora_unet_{name}.lora_down.weight"] = Repeated(
            DType.F16, (rank, columns), block, 22 * number
        )
    _write_safetensors(path, tensors)


def _write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    names = sorted(tensors, key=lambda n: (-ORDER[tensors[n].dtype], n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts = {}
    for name in names:
        tensor = tensors[name]
        starts[name], end = end, end + tensor.nbytes
        shape, span = list(tensor.shape), [starts[name], end]
        header[name] = {"dtype": tensor.dtype.code, "shape": shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(base + end)
        file.flush()

        def copy(name: str) -> None:
            offset = base + starts[name]
            for data in tensors[name].windows():
                if any(data[:64]) or data.tobytes().count(0) < len(data):  # zeros stay a hole
                    os.pwrite(file.fileno(), data, offset)
                offset += len(data)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(copy, names))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    add = parser.add_argument
    add("--arch", default="SD-v1", help="architecture, class or component of the catalog")
    add("--format", choices=["ckpt", "safetensors"], default="ckpt")
    add("--precision", choices=["fp16", "bf16", "fp32"], help="default: fp16, dirty fp32")
    add("--dirty", action="store_true", help="with EMA, junk, broken position_ids, Lightning entries")
    add("--nai-names", action="store_true", help="CLIP under the names that NAI has")
    add("--random", action="store_const", dest="content", const="random", default="random")
    add("--sparse", action="store_const", dest="content", const="sparse", help="zeros that take no space")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    dtypes = {"fp16": DType.F16, "bf16": DType.BF16, "fp32": DType.F32}
    precision = dtypes[args.precision or ("fp32" if args.dirty else "fp16")]
    dirt = DIRTY if args.dirty else CLEAN
    dirt = Dirt(**{**vars(dirt), "nai_names": args.nai_names})
    model = make(args.arch, precision=precision, content=args.content, seed=args.seed, dirt=dirt)
    write(model, args.output, args.format)


if __name__ == "__main__":
    main()
