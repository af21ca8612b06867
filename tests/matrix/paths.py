"""The recipes of the matrix: every operation, cast, scheme of packed weights and kind of adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builder.operations import OPERATIONS
from builder.operations.registry import Operation
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help import gguf_files
from tests.help.building import model, save, save_dirty, values
from tests.whole.test_packed_models import SCHEMES, packed

HEAD = 'format = 1\nname = "{}"\n'
PRECISIONS = ("fp16", "bf16", "fp32")
TWO = ("exact", "file")  # the arithmetics

# What is said of an operation beside its inputs, where its defaults leave a path out.
SAID: Mapping[str, str] = {
    "ties": "density = 0.4",
    "dare": "density = 0.4\nvote = true\nseed = 3",
    "extract-features": "alpha = 0.3\nbeta = 0.2\ngamma = 1.7",
    "cosine-a": "alpha = 0.2",
    "cosine-b": "alpha = 0.2",
}
LORAS = ("apply-lora", "extract-lora", "resize-lora")
ELSEWHERE = {"mecha"}  # what others compute is theirs

# Factors by the ends of their names, for a matrix of 8×8.
ADAPTERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 8)},
    "dora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 8), "dora_scale": (8, 1)},
    "loha": {
        **{f"hada_w{n}_a": (8, 2) for n in (1, 2)},
        **{f"hada_w{n}_b": (2, 8) for n in (1, 2)},
    },
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "oft": {"oft_blocks": (4, 2, 2)},
    "boft": {"oft_blocks": (3, 4, 2, 2)},
    "glora": {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (8, 2), "b2.weight": (2, 8)},
    "full": {"diff": (8, 8)},
}
BEGINS = ("F64", "F32", "F16", "BF16", "F8_E4", "F8_E5")
FLOATS = [d for d in DType if d.code.startswith(BEGINS)]


def write_all(folder: Path) -> None:
    """Write the sources and the recipes; a recipe's outputs lie beside it."""
    _merges(folder)
    _casts(folder)
    _tidied(folder)
    _adapters(folder)
    _packed(folder)
    _ggml(folder)


def _recipe(
    folder: Path,
    name: str,
    sources: str,
    steps: str,
    outputs: Mapping[str, str],
    suffix: str = ".safetensors",
) -> None:
    files = "".join(f'sources.{n}.file = "{n}{suffix}"\n' for n in sources.split())
    written = "".join(f'\n[[output]]\nname = "{n}"\n{said}\n' for n, said in outputs.items())
    first = next(iter(outputs.values())).splitlines()[0]
    (folder / f"{name}.toml").write_text(HEAD.format(name) + first + "\n" + files + steps + written, "utf-8")


def _spread(tensors: Mapping[str, LazyTensor], dtype: DType) -> dict[str, LazyTensor]:
    """The same tensors with values of many magnitudes, subnormal ones too, in another type."""
    made: dict[str, LazyTensor] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.dtype is not DType.F32:
            made[name] = tensor
            continue
        draw = np.random.default_rng(number)
        array = np.frombuffer(tensor.tobytes(), "<f4") * np.exp2(draw.integers(-24, 5, tensor.numel))
        made[name] = _stored(array.astype("<f4"), tensor.shape, dtype)
    return made


def _stored(array: np.ndarray, shape: tuple[int, ...], dtype: DType) -> LazyTensor:
    import torch

    held = torch.from_numpy(array).to(dtype.torch).view(torch.uint8)
    return MemoryTensor(dtype, shape, bytes(held.numpy().tobytes()))


def _merges(folder: Path) -> None:
    """Every operation in both arithmetics, of files of three types and of one."""
    for name, dtype, seed in (("a", DType.F32, 1), ("b", DType.F16, 2), ("c", DType.BF16, 3)):
        save(folder / f"{name}.safetensors", _spread(model(seed=seed), dtype))
        save(folder / f"{name}16.safetensors", _spread(model(seed=seed), DType.F16))
    for arithmetic, end in zip(TWO, ("", "16"), strict=True):
        steps, outputs = "", dict[str, str]()
        for op in OPERATIONS.values():
            if op.name not in (*LORAS, *ELSEWHERE):
                steps += f'[steps.{op.name}]\nop = "{op.name}"\n{_inputs(op, end)}{SAID.get(op.name, "")}\n'
                outputs[op.name] = f'base = "{op.name}"'
        sources = " ".join(n + end for n in "abc")
        top = f'arithmetic = "{arithmetic}"\n'
        _recipe(folder, f"merge-{arithmetic}", sources, steps, outputs)
        path = folder / f"merge-{arithmetic}.toml"
        path.write_text(path.read_text("utf-8").replace("format = 1\n", "format = 1\n" + top), "utf-8")
    steps = '[steps.m]\nop = "sum-twice"\na = "a"\nb = "b"\nc = "c"\nVAE = true\n'
    steps += 'alpha = { UNET = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1,0,0,0.3,' + "0.7," * 11 + '0.9" }\n'
    steps += 'beta = { VAE = 0.3, tensors = { "*.bias" = 0.7 } }\n[steps.r]\nop = "slerp"\na = "m"\nb = "c"\n'
    steps += 'precision = "bf16"\n'
    _recipe(folder, "merge-chain", "a b c", steps, {p: f'base = "r"\nprecision = "{p}"' for p in PRECISIONS})


def _inputs(op: Operation, end: str) -> str:
    said = "".join(f'{key} = "{"a" if key == "base" else key}{end}"\n' for key in op.inputs)
    if op.many:
        many = f"{{ b{end} = 0.4, c{end} = 0.7 }}" if op.weighted else f'["b{end}", "c{end}"]'
        said += f"{op.many} = {many}\n"
    return said


def _casts(folder: Path) -> None:
    """From every floating-point type to every precision, with values that it cannot hold."""
    for dtype in FLOATS:
        name = f"from-{dtype.code.lower().replace('_', '-')}"
        tensors = _spread(model(seed=4), dtype)
        odd = values([np.nan, np.inf, -np.inf, 7e4, 3e-8, -0.0, 1.0, 2049.0])
        tensors["odd.weight"] = _stored(np.frombuffer(odd.tobytes(), "<f4"), (8,), dtype)
        save(folder / f"{name}.safetensors", tensors)
        said = 'base = "{}"\nprecision = "{}"\nnon_finite = "keep"\noverflow = "{}"\nunknown = "keep"'
        outputs = {f"{p}-{way}": said.format(name, p, way) for p in PRECISIONS for way in ("clamp", "keep")}
        _recipe(folder, f"cast-{dtype.code.lower().replace('_', '-')}", name, "", outputs)


def _tidied(folder: Path) -> None:
    """A training checkpoint cleaned: fixes, averages promoted, the metric."""
    for family in ("tiny", "mini"):
        save_dirty(folder / f"dirty-{family}.safetensors", family)
        fixes = '\nfixes = ["clip-position-ids"]'
        average = f'components.UNET-{family} = {{ from = "dirty-{family}", component = "UNET-{family}-EMA" }}'
        base = f'base = "dirty-{family}"'
        outputs = {
            "tidy": base + fixes,
            "average": f"{base}\n{average}",
            "pytorch": f'{base}\nfile = "tidied-{family}.ckpt"',
        }
        _recipe(folder, f"tidied-{family}", f"dirty-{family}", "", outputs)


def _adapters(folder: Path) -> None:
    """Every kind of adapter baked in, LoRAs extracted by every rule, and made smaller."""
    base = dict(model("SD-mini", seed=1))
    save(folder / "base.safetensors", base)
    draw = np.random.default_rng(11)
    tuned = dict(base)
    for name, tensor in base.items():
        if "attn1" in name or "in_layers.2.weight" in name or "mlp.fc1.weight" in name:
            shape = (tensor.shape[0], tensor.numel // tensor.shape[0])
            change = draw.standard_normal((shape[0], 2)) @ draw.standard_normal((2, shape[1])) * 0.05
            array = np.frombuffer(tensor.tobytes(), "<f4") + change.astype("<f4").ravel()
            tuned[name] = values(array.reshape(tensor.shape))
    save(folder / "tuned.safetensors", tuned)
    for kind, factors in ADAPTERS.items():
        module = "lora_unet_down_blocks_0_attentions_{}_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{module.format(n)}.{end}": values(draw.standard_normal(shape) * 0.3)
            for n in (0, 1)
            for end, shape in factors.items()
        }
        save(folder / f"{kind}.safetensors", tensors)
    kinds = " ".join(ADAPTERS)
    steps = "".join(f'[steps.with-{k}]\nop = "apply-lora"\na = "base"\nloras.{k} = 0.6\n' for k in ADAPTERS)
    outputs = {k: f'base = "with-{k}"' for k in ADAPTERS}
    _recipe(folder, "baked", f"base {kinds}", steps, outputs)

    rules = {"rank": "rank = 4\nconv_rank = 2", "ratio": "ratio = 0.2", "quantile": "quantile = 0.9"}
    steps = "".join(
        f'[steps.by-{n}]\nop = "extract-lora"\na = "tuned"\nbase = "base"\n{r}\n' for n, r in rules.items()
    )
    steps += '[steps.less]\nop = "resize-lora"\nlora = "by-rank"\nrank = 1\n'
    steps += '[steps.again]\nop = "apply-lora"\na = "base"\nloras = { less = 0.7 }\n'
    names = [*(f"by-{n}" for n in rules), "less", "again"]
    _recipe(folder, "extracted", "base tuned", steps, {n: f'base = "{n}"' for n in names})


def _packed(folder: Path) -> None:
    """Every scheme decoded and merged, and a denoiser packed in each way."""
    for number, scheme in enumerate(SCHEMES):
        save(folder / f"packed{number}.safetensors", packed(scheme))
        steps = f'[steps.m]\nop = "weighted-sum"\na = "packed{number}"\nb = "base"\nalpha = 0.3\n'
        outputs = {p: f'base = "packed{number}"\nprecision = "{p}"' for p in PRECISIONS}
        outputs["merged"] = 'base = "m"\nprecision = "fp32"'
        _recipe(folder, f"unpacked{number}", f"packed{number} base", steps, outputs)
    outputs = {q: f'base = "base"\nquantize = "{q}"' for q in ("fp8", "int8")}
    alone = 'base = "NEW UNET-mini"\ncomponents.UNET-mini = "base"\n'
    outputs["q8_0"] = alone + 'file = "packing.gguf"\nquantize = "q8_0"'
    _recipe(folder, "packing", "base", "", outputs)


def _ggml(folder: Path) -> None:
    """Every type of GGUF's blocks decoded."""
    import gguf

    tensors: dict[str, Any] = {}
    for kind in gguf_files.PACKED:
        width = gguf.GGML_QUANT_SIZES[gguf_files.Types[kind]][0]
        blocks = gguf_files.random_blocks(kind, 37 * 3, seed=1)
        tensors[kind] = (kind, (37, 3 * width), blocks.tobytes())
    gguf_files.write(folder / "blocks.gguf", tensors)
    said = 'base = "blocks"\nverbatim = true\noverflow = "clamp"\nprecision = "{}"'
    _recipe(folder, "ggml", "blocks", "", {p: said.format(p) for p in PRECISIONS}, ".gguf")
