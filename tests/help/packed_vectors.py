"""Packed weights and what the programs that pack them unpack, for the tests of our own decoding.

`python -m tests.help.packed_vectors` writes `tests/tensors/packed.safetensors` anew, where comfy-kitchen,
bitsandbytes, torchao and torch are installed: weights drawn from a seed, packed by these programs, and what
these say that they are worth. The file holds numbers alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "tensors" / "packed.safetensors"
SHAPE = (19, 45)  # no multiple of anything


def _weight(rows: int, columns: int, seed: int) -> Any:
    """Numbers of several sizes, some rows of which are nought."""
    import torch

    torch.manual_seed(seed)
    made = torch.randn(rows, columns) * torch.logspace(-4, 1, rows)[:, None]
    made[rows // 2] = 0
    return made


def _text(said: object) -> Any:
    import torch

    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def comfy_kitchen() -> dict[str, dict[str, Any]]:
    """By case, the tensors beside and of `weight`, and what it is `worth`, by comfy-kitchen.

    In FP64, where its arithmetic is exact, then rounded to FP32 once. Its E8M0 of 0 is no power of two, and
    only blocks of zeros have it.
    """
    import torch
    from comfy_kitchen.backends.eager import convrot_w4a4, quantization
    from comfy_kitchen.tensor import int8_utils

    made: dict[str, dict[str, Any]] = {}
    weight = _weight(*SHAPE, seed=1)
    for name, dtype in (("float8_e4m3fn", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)):
        scale = weight.abs().amax() / torch.finfo(dtype).max
        held = quantization.quantize_per_tensor_fp8(weight, scale, dtype)
        worth = quantization.dequantize_per_tensor_fp8(held, scale, torch.float64)
        made[name] = {"weight": held, "weight_scale": scale, "worth": worth}

    tall = _weight(135, 75, seed=7)
    scale = tall.abs().amax() / (448 * 6)
    held, blocks = quantization.quantize_nvfp4(tall, scale, pad_16x=True)
    worth = quantization.dequantize_nvfp4(held, scale, blocks, torch.float64)[:135, :75]
    made["nvfp4"] = {"weight": held, "weight_scale": blocks, "weight_scale_2": scale, "worth": worth}

    wide = _weight(140, 160, seed=2)
    held, blocks = quantization.quantize_mxfp8(wide[:139, :150], pad_32x=True)
    worth = quantization.dequantize_mxfp8(held, blocks, torch.float64)[:139, :150]
    made["mxfp8"] = {"weight": held, "weight_scale": blocks.view(torch.uint8), "worth": worth}

    held, scale = quantization.quantize_int8_tensorwise(weight)
    worth = quantization.dequantize_int8_simple(held.double(), scale.double())
    made["int8_tensorwise"] = {"weight": held, "weight_scale": scale, "worth": worth}
    held, scale = quantization.quantize_int8_rowwise(weight)
    worth = held.double() * scale.double()
    made["int8_tensorwise rows"] = {"weight": held, "weight_scale": scale, "worth": worth}

    wide = _weight(5, 512, seed=3)
    for size in (256, 16):
        held, scale = quantization.quantize_int8_convrot_weight(wide, size)
        turn = int8_utils._build_hadamard(size, dtype=torch.float64)
        worth = int8_utils._rotate_weight(held.double() * scale.double(), turn, size)
        said = {"convrot": True, "convrot_groupsize": size}
        tensors = {"weight": held, "weight_scale": scale, "worth": worth}
        made[f"int8_tensorwise rotated by {size}"] = {**tensors, "said": said}
        held, scale = convrot_w4a4.quantize_convrot_w4a4_weight(wide, size)
        plain = convrot_w4a4._unpack_int4_row_major(held).double() * scale.double()[:, None]
        worth = int8_utils._rotate_weight(plain, turn, size)
        tensors = {"weight": held, "weight_scale": scale, "worth": worth}
        made[f"convrot_w4a4 rotated by {size}"] = {**tensors, "said": {"convrot_groupsize": size}}
    for name, tensors in made.items():
        said = {"format": name.partition(" ")[0], **tensors.pop("said", {})}
        tensors["comfy_quant"] = _text(said)
    new = made["float8_e4m3fn"]  # the same under the names that it had before
    old = {"weight": new["weight"].clone(), "scale_weight": new["weight_scale"].clone().view(1)}
    return made | {"scaled FP8": {**old, "worth": new["worth"]}}


def bitsandbytes() -> dict[str, dict[str, Any]]:
    """The same by bitsandbytes, whose arithmetic is FP32.

    By its plain implementation, which reads the file's table: its kernel for FP4 has one of its own, which
    differs in the sign of a zero.
    """
    import torch
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    made: dict[str, dict[str, Any]] = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            # With nested ones, more than 256 blocks of 64; the last one is not whole.
            weight = _weight(56 if nested else 7, 300, seed=4)
            held, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            most = state.absmax
            if nested:
                most = dequantize_blockwise(state.absmax, state.state2) + state.offset
            worth = _dequantize_4bit_compute(held.flatten(), most, state.code, 64, state.shape, weight.dtype)
            assert torch.equal(worth, dequantize_4bit(held, state))
            beside = {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}
            made[f"bitsandbytes {kind}" + " nested" * nested] = {"weight": held, **beside, "worth": worth}
    return made


def torchao() -> dict[str, dict[str, Any]]:
    """The same by torchao, in FP32: FP8 with a scale for each block of 128 by 128, as DeepSeek has it, or for
    each row, and MXFP8."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.quant_primitives import _dequantize_affine_float8, _quantize_affine_float8

    made: dict[str, dict[str, Any]] = {}
    weight = _weight(130, 70, seed=5)
    scale = torch.rand(2, 1) / 100
    of_each = scale.repeat_interleave(128, 0)[:130].expand(130, 70)
    held = _quantize_affine_float8(weight, of_each)
    worth = _dequantize_affine_float8(held, of_each)
    made["block FP8"] = {"weight": held, "weight_scale_inv": scale, "worth": worth}

    scale = weight.abs().amax(1, keepdim=True).clamp(1e-12) / 448
    held = _quantize_affine_float8(weight, scale)
    worth = _dequantize_affine_float8(held, scale)
    said = _text({"format": "float8_e4m3fn"})
    made["float8_e4m3fn rows"] = {"weight": held, "weight_scale": scale, "worth": worth, "comfy_quant": said}

    mx = MXTensor.to_mx(_weight(160, 160, seed=6), torch.float8_e4m3fn, is_swizzled_scales=True)
    worth, scale = mx.dequantize(torch.float32), mx.scale.view(torch.uint8)
    said = _text({"format": "mxfp8"})
    made["mxfp8 of torchao"] = {
        "weight": mx.qdata,
        "weight_scale": scale,
        "worth": worth,
        "comfy_quant": said,
    }
    return made


def encoded() -> dict[str, dict[str, Any]]:
    """What comfy-kitchen makes of a weight, its `source`, where ours is to be the same."""
    import torch
    from comfy_kitchen.backends.eager import quantization

    weight = _weight(64, 48, seed=8)
    scale = weight.abs().amax() / 448
    held = quantization.quantize_per_tensor_fp8(weight, scale, torch.float8_e4m3fn)
    made = {"fp8": {"source": weight, "weight": held, "weight_scale": scale}}
    held, scale = quantization.quantize_int8_rowwise(weight)
    return made | {"int8": {"source": weight.clone(), "weight": held, "weight_scale": scale}}


REFERENCES = {"comfy_kitchen": comfy_kitchen, "bitsandbytes": bitsandbytes, "torchao": torchao}


def digest(worth: Any) -> bytes:
    """The SHA-256 of numbers, as FP32."""
    import hashlib

    return hashlib.sha256(worth.float().contiguous().numpy().tobytes()).digest()


def write() -> None:
    """Write the golden file: of what a weight is worth, the shape and the SHA-256."""
    import torch
    from safetensors.torch import save_file

    flat: dict[str, Any] = {}
    for case, held in ((c, h) for reference in REFERENCES.values() for c, h in reference().items()):
        worth = held.pop("worth")
        flat |= {f"{case}/{n}": t.contiguous() for n, t in held.items()}
        flat[f"{case}/shape"] = torch.tensor(worth.shape)
        flat[f"{case}/sha256"] = torch.tensor(list(digest(worth)), dtype=torch.uint8)
    flat |= {f"{case}/{n}": t.contiguous() for case, held in encoded().items() for n, t in held.items()}
    save_file(flat, PATH)


if __name__ == "__main__":
    write()
