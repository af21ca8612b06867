"""Models with packed weights in every job: known, kept bit for bit, or as good as the same model decoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest

from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.models.identify import identify
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.packed.decode import decoded
from tests.help.building import UNET, Folder, catalog, content, model, save, values

FAMILY = "SD-mini"
BLOCK = "input_blocks.4.1.transformer_blocks.0."
WIDE, ATTENTION, CONTEXT = BLOCK + "ff.net.0.proj", BLOCK + "attn1.to_q", BLOCK + "attn2.to_k"
SHAPES = {WIDE: (128, 16), ATTENTION: (16, 16), CONTEXT: (16, 24)}
Tensors = dict[str, LazyTensor]


def text(said: object) -> LazyTensor:
    data = json.dumps(said).encode()
    return MemoryTensor(DType.U8, (len(data),), data)


def drawn(dtype: DType, *shape: int, most: int = 256) -> LazyTensor:
    """Bytes below `most`: by default any."""
    draw = Random(str(shape))
    size = int(np.prod(shape)) * dtype.bits // 8
    return MemoryTensor(dtype, shape, bytes(draw.randrange(most) for _ in range(size)))


def number(value: float, *shape: int) -> LazyTensor:
    return values(np.full(shape, value))


def fp8(rows: int, columns: int) -> Tensors:
    return {
        "weight": drawn(DType.F8_E4M3, rows, columns, most=100),
        "weight_scale": number(0.25),
        "input_scale": number(1.0),
        "comfy_quant": text({"format": "float8_e4m3fn"}),
    }


def old_fp8(rows: int, columns: int) -> Tensors:
    return {"weight": drawn(DType.F8_E4M3, rows, columns, most=100), "scale_weight": number(0.3, 1)}


def mxfp8(rows: int, columns: int) -> Tensors:
    high, wide = -(-rows // 32) * 32, -(-columns // 32) * 32
    scale = MemoryTensor(DType.F8_E8M0, (128, 4), bytes(120 + i % 8 for i in range(512)))
    said = text({"format": "mxfp8"})
    return {
        "weight": drawn(DType.F8_E4M3, high, wide, most=100),
        "weight_scale": scale,
        "comfy_quant": said,
    }


def nvfp4(rows: int, columns: int) -> Tensors:
    return {
        "weight": drawn(DType.U8, -(-rows // 16) * 16, -(-columns // 16) * 8),
        "weight_scale": drawn(DType.F8_E4M3, 128, 4, most=100),
        "weight_scale_2": number(0.01),
        "comfy_quant": text({"format": "nvfp4"}),
    }


def int8(rows: int, columns: int) -> Tensors:
    return {
        "weight": drawn(DType.I8, rows, columns),
        "weight_scale": values(np.linspace(0.001, 0.02, rows)[:, None]),
        "comfy_quant": text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}),
    }


def int4(rows: int, columns: int) -> Tensors:
    return {
        "weight": drawn(DType.I8, rows, columns // 2),
        "weight_scale": values(np.linspace(0.01, 0.2, rows)),
        "comfy_quant": text({"format": "convrot_w4a4", "convrot_groupsize": 4}),
    }


def nf4(rows: int, columns: int) -> Tensors:
    size = rows * columns
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    return {
        "weight": drawn(DType.U8, size // 2, 1),
        "weight.absmax": values(np.linspace(0.1, 2, size // 64)),
        "weight.quant_map": values(np.linspace(-1, 1, 16)),
        "weight.quant_state.bitsandbytes__nf4": text(state),
    }


SCHEMES = {
    "float8_e4m3fn": fp8,
    "scaled FP8": old_fp8,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
    "int8_tensorwise": int8,
    "convrot_w4a4": int4,
    "bitsandbytes NF4": nf4,
}


def unet(scheme: str) -> Tensors:
    """What is packed of a UNET, by unprefixed names."""
    made = {
        f"{layer}.{name}": tensor
        for layer, shape in SHAPES.items()
        for name, tensor in SCHEMES[scheme](*shape).items()
    }
    return made | ({"scaled_fp8": drawn(DType.F8_E4M3, 2)} if scheme == "scaled FP8" else {})


def packed(scheme: str, seed: int = 0) -> Mapping[str, LazyTensor]:
    """A model with some layers of its UNET packed."""
    return {**model(FAMILY, seed=seed), **{UNET + n: t for n, t in unet(scheme).items()}}


def plain(scheme: str, seed: int = 0) -> Mapping[str, LazyTensor]:
    """The same model with the same weights decoded."""
    shapes = {f"{UNET}{layer}.weight": shape for layer, shape in SHAPES.items()}
    return decoded(packed(scheme, seed), shapes, "").tensors


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest, folder: Folder) -> str:
    """A scheme; `p` is packed by it, `d` the same decoded, `b` another."""
    name: str = request.param
    save(folder / "p.safetensors", packed(name))
    save(folder / "d.safetensors", plain(name))
    save(folder / "b.safetensors", model(FAMILY, seed=3))
    return name


def built(folder: Folder, name: str, recipe: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a recipe makes, of the sources that it names."""
    head = f'format = 1\nname = "{name}"\n'
    files = [n for n in "pdbq" if f'"{n}"' in recipe]
    head += "".join(f'sources.{n}.file = "{n}.safetensors"\n' for n in files)
    lines = recipe.split("\n[", 1)
    folder.write(f"{name}.toml", "\n".join([lines[0], head]) + ("\n[" + lines[1] if len(lines) > 1 else ""))
    folder.build(f"{name}.toml")
    return content(folder / f"{name}.safetensors")


def test_it_is_known_by_the_shapes_of_its_numbers(folder: Folder, scheme: str) -> None:
    with open_checkpoint(folder / "p.safetensors") as checkpoint:
        found = identify(checkpoint, catalog())
        match = found.find("UNET-mini")
    assert found.architecture == FAMILY and found.intact and not found.unknown
    assert match is not None and not match.reshaped
    assert match.companions.keys() == unet(scheme).keys() - {f"{layer}.weight" for layer in SHAPES}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_precision_decodes(folder: Folder, scheme: str, precision: str) -> None:
    said = f'\n[output]\nprecision = "{precision}"\n'
    made = built(folder, "m", 'base = "p"' + said)
    assert made == built(folder, "n", 'base = "d"' + said)
    assert made.keys() == model(FAMILY).keys()
    assert folder("verify", "m.toml").code == 0
    args = ("convert", "p.safetensors", "-o", "c.safetensors", "--precision", precision)
    assert folder(*args).code == 0
    assert content(folder / "c.safetensors") == made
    assert (
        folder("extract", "p.safetensors", "unet", "--precision", precision, "-o", "u.safetensors").code == 0
    )
    assert content(folder / "u.safetensors") == {
        n.removeprefix(UNET): t for n, t in made.items() if n.startswith(UNET)
    }


def test_the_plan_knows_the_sizes(folder: Folder, scheme: str) -> None:
    """The header follows from it."""
    folder.write("m.toml", 'format = 1\nname = "m"\nbase = "p"\nsources.p.file = "p.safetensors"\n')
    (unit,) = (n for n in folder.plan("m.toml")["steps"] if n["label"].startswith("UNET"))
    made = folder.build("m.toml")
    parts = content(folder / "m.safetensors")
    assert unit["writes"] == sum(len(t[2]) for n, t in parts.items() if n.startswith(UNET)), made


def test_what_keeps_its_type_stays_packed(folder: Folder, scheme: str) -> None:
    held = content(folder / "p.safetensors")
    assert built(folder, "k", 'base = "p"\n[output]\nprecision = "keep"\n') == held
    of_unet = {n: t for n, t in held.items() if n.removeprefix(UNET) in unet(scheme)}
    for args in (
        ("prune", "p.safetensors", "-o", "made.safetensors"),
        ("prune", "p.safetensors", "--precision", "fp16", "-o", "made.safetensors"),
        ("replace", "b.safetensors", "UNET=p.safetensors", "-o", "made.safetensors"),
        ("convert", "p.safetensors", "-o", "made.safetensors"),
    ):
        assert folder(*args).code == 0
        made = content(folder / "made.safetensors")
        assert {n: made.get(n) for n in of_unet} == of_unet, args
        (folder / "made.safetensors").unlink()
    assert folder("extract", "p.safetensors", "unet", "-o", "u.safetensors").code == 0
    alone = content(folder / "u.safetensors")
    assert {UNET + n: alone.get(n) for n in unet(scheme)} == of_unet
    with open_checkpoint(folder / "u.safetensors") as checkpoint:
        assert identify(checkpoint, catalog()).architecture == "UNET-mini"


def test_it_takes_a_lora(folder: Folder, scheme: str) -> None:
    rng = np.random.default_rng(0)
    name = "lora_unet_" + WIDE.replace(".", "_")
    up, down = rng.standard_normal((128, 2)), rng.standard_normal((2, 16))
    save(
        folder / "q.safetensors",
        {f"{name}.lora_up.weight": values(up), f"{name}.lora_down.weight": values(down)},
    )
    made = {}
    for source in "pd":
        folder.write(
            f"{source}.toml",
            f'format = 1\nname = "l{source}"\nbase = "s"\nsources.q.file = "q.safetensors"\n'
            f'sources.{source}.file = "{source}.safetensors"\n'
            f'steps.s = {{ op = "apply-lora", a = "{source}", loras = {{ q = 0.7 }} }}\n',
        )
        folder.build(f"{source}.toml")
        made[source] = content(folder / f"l{source}.safetensors")
    assert made["p"] == made["d"]
    plain_ = built(folder, "n", 'base = "d"')
    assert {n for n in plain_ if plain_[n] != made["p"][n]} == {f"{UNET}{WIDE}.weight"}


def test_two_schemes_are_merged(folder: Folder, scheme: str) -> None:
    other = next(s for s in SCHEMES if s != scheme)
    save(folder / "q.safetensors", packed(other, seed=5))
    save(folder / "b.safetensors", plain(other, seed=5))
    made = {}
    for pair in ("pq", "db"):
        sources = "".join(f'sources.{n}.file = "{n}.safetensors"\n' for n in pair)
        step = f'steps.s = {{ op = "weighted-sum", a = "{pair[0]}", b = "{pair[1]}", alpha = 0.3 }}\n'
        folder.write(f"{pair}.toml", f'format = 1\nname = "{pair}"\nbase = "s"\n{sources}{step}')
        folder.build(f"{pair}.toml")
        made[pair] = content(folder / f"{pair}.safetensors")
    assert made["pq"] == made["db"] and made["pq"].keys() == model(FAMILY).keys()


def test_a_step_that_leaves_a_class_alone_leaves_it_packed(folder: Folder) -> None:
    save(folder / "p.safetensors", packed("nvfp4"))
    save(folder / "b.safetensors", model(FAMILY, seed=3))
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "s"\noutput.precision = "keep"\nsources.p.file = "p.safetensors"\n'
        'sources.b.file = "b.safetensors"\n'
        'steps.s = { op = "weighted-sum", a = "p", b = "b", alpha = 0.3, components = ["CLIP-mini"] }\n',
    )
    folder.build("m.toml")
    held, made = content(folder / "p.safetensors"), content(folder / "m.safetensors")
    assert {n: t for n, t in made.items() if n.startswith(UNET)} == {
        n: t for n, t in held.items() if n.startswith(UNET)
    }


def test_a_lora_is_extracted_of_it(folder: Folder) -> None:
    save(folder / "p.safetensors", packed("int8_tensorwise"))
    save(folder / "d.safetensors", plain("int8_tensorwise"))
    save(folder / "b.safetensors", model(FAMILY))
    for source in "pd":
        folder.write(
            f"{source}.toml",
            f'format = 1\nname = "x{source}"\nbase = "l"\nsources.{source}.file = "{source}.safetensors"\n'
            'sources.b.file = "b.safetensors"\n'
            f'steps.l = {{ op = "extract-lora", a = "{source}", base = "b", rank = 2 }}\n',
        )
        folder.build(f"{source}.toml")
    assert content(folder / "xp.safetensors") == content(folder / "xd.safetensors")


def test_what_the_header_says_goes_with_what_it_is_said_of(folder: Folder) -> None:
    """Descriptions in metadata follow their layers' names, and go when these are decoded."""
    tensors = {n: t for n, t in packed("nvfp4").items() if not n.endswith("comfy_quant")}
    said = {"format_version": "1.0", "layers": {UNET + n: {"format": "nvfp4"} for n in SHAPES}}
    write(folder / "h.safetensors", tensors, {"_quantization_metadata": json.dumps(said)})
    save(folder / "d.safetensors", plain("nvfp4"))
    assert folder("convert", "h.safetensors", "-o", "c.safetensors", "--precision", "fp16").code == 0
    assert folder("convert", "d.safetensors", "-o", "e.safetensors", "--precision", "fp16").code == 0
    assert content(folder / "c.safetensors") == content(folder / "e.safetensors")
    with open_checkpoint(folder / "c.safetensors") as made:
        assert not made.metadata.keys() & {"_quantization_metadata"}
    assert folder("extract", "h.safetensors", "unet", "-o", "u.safetensors").code == 0
    alone = content(folder / "u.safetensors")
    assert {n for n in alone if n.endswith("comfy_quant")} == {f"{n}.comfy_quant" for n in SHAPES}
    assert folder("replace", "d.safetensors", "UNET=u.safetensors", "-o", "r.safetensors").code == 0
    whole = content(folder / "r.safetensors")
    assert {n for n in whole if n.endswith("comfy_quant")} == {f"{UNET}{n}.comfy_quant" for n in SHAPES}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weight_scale": None}, "its `weight_scale` is missing"),
        (
            {"weight_scale": number(1.0, 3)},
            "its scale is [3], which is neither one number nor one a row of 16",
        ),
        ({"comfy_quant": text({"format": "float8_of_tomorrow"})}, "nothing is known of such"),
        ({"pre_quant_scale": number(1.0, 24)}, "it has a `pre_quant_scale`"),
    ],
)
def test_damage_is_a_message(folder: Folder, change: dict[str, LazyTensor | None], why: str) -> None:
    tensors = dict(packed("float8_e4m3fn"))
    for name, tensor in change.items():
        tensors.pop(f"{UNET}{CONTEXT}.{name}", None)
        tensors |= {f"{UNET}{CONTEXT}.{name}": tensor} if tensor is not None else {}
    save(folder / "p.safetensors", tensors)
    save(folder / "b.safetensors", model(FAMILY))
    step = 'steps.s = { op = "weighted-sum", a = "b", b = "p", alpha = 0.3 }\n'
    sources = 'sources.p.file = "p.safetensors"\nsources.b.file = "b.safetensors"\n'
    folder.write("m.toml", f'format = 1\nname = "m"\nbase = "s"\n{sources}{step}')
    for args, hint in (
        (("convert", "p.safetensors", "-o", "c.safetensors", "--precision", "fp16"), "the precision `keep`"),
        (("build", "m.toml"), "take a model with weights of 16 bits or more"),
    ):
        said = folder(*args)
        assert said.code == 6 and "weights cannot be decoded" in said.err and hint in said.err
        assert f"`{CONTEXT}.weight`: {why}" in said.err.replace(UNET, "")
    assert {p.name for p in folder.path.iterdir()} == {"p.safetensors", "b.safetensors", "m.toml"}
