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
from builder.tensors.packed.encode import FORMS, encoded
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
        (
            {"comfy_quant": text({"format": "float8_e4m3fn", "convrot": True})},
            "its description says `convrot`",
        ),
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


@pytest.mark.parametrize("told", [{}, {"comfy_quant": text({"format": "float8_e4m3fn"})}])
def test_of_two_scales_neither_is_taken(folder: Folder, told: Tensors) -> None:
    held = {**old_fp8(16, 24), "weight_scale": number(0.5), **told}
    save(folder / "p.safetensors", {**model(FAMILY), **{f"{UNET}{CONTEXT}.{n}": t for n, t in held.items()}})
    said = folder("convert", "p.safetensors", "-o", "c.safetensors", "--precision", "fp16")
    assert said.code == 6 and "it has both a `weight_scale` and a `scale_weight`" in said.err, said.err


def test_nothing_says_of_a_decoded_model_that_it_is_packed(folder: Folder) -> None:
    """Programs take a plain weight for packed where a description or a marker says so."""
    plain_, old = model(FAMILY)[f"{UNET}{WIDE}.weight"], old_fp8(16, 24)
    said = {
        f"{WIDE}.comfy_quant": text({"format": "float8_e4m3fn"}),
        f"{WIDE}.input_scale": number(2.0),
        f"{ATTENTION}.scale_weight": number(1.0),
        f"{CONTEXT}.comfy_quant": text({"format": "float8_e4m3fn"}),
        "scaled_fp8": MemoryTensor(DType.F8_E4M3, (0,), b""),
    }
    for packed_ in (old, {}):
        held = {**model(FAMILY), **{UNET + n: t for n, t in said.items()}}
        held |= {f"{UNET}{CONTEXT}.{n}": t for n, t in packed_.items()}
        save(folder / "p.safetensors", held)
        args = ("extract", "p.safetensors", "unet", "-o", "c.safetensors", "--precision", "fp32")
        made = folder(*args)
        assert made.code == 0, made.err
        found = content(folder / "c.safetensors")
        assert found[f"{WIDE}.weight"] == ("F32", plain_.shape, bytes(plain_.tobytes()))
        assert not [n for n in found if "scale" in n or "quant" in n or found[n][0] != "F32"]
        assert "that would have plain weights taken for packed ones" in made.err


# -- what nothing here decodes


def undecoded(scheme: str, rows: int, columns: int) -> Tensors:
    """A layer as other programs pack it, in a layout that its file does not say."""
    return {
        "SVDQuant": {
            "qweight": drawn(DType.I8, rows, columns // 2),
            "wscales": number(1.0, columns // 8, rows),
            "smooth_factor": number(1.0, columns),
            "proj_down": number(1.0, columns, 4),
            "proj_up": number(1.0, rows, 4),
        },
        "compressed-tensors": {
            "weight_packed": drawn(DType.I32, rows, columns // 8),
            "weight_scale": number(1.0, rows, 1),
            "weight_shape": drawn(DType.I64, 2),
        },
        "MLX": {
            "weight": drawn(DType.U32, rows, columns // 8),
            "scales": number(1.0, rows, 1),
            "biases": number(0.0, rows, 1),
        },
        "GPTQ or AWQ": {
            "qweight": drawn(DType.I32, columns // 8, rows),
            "qzeros": drawn(DType.I32, 1, rows // 8),
            "scales": number(1.0, 1, rows),
        },
    }[scheme]


@pytest.mark.parametrize("scheme", ["SVDQuant", "compressed-tensors", "MLX", "GPTQ or AWQ"])
def test_what_nothing_decodes_is_refused_by_name(folder: Folder, scheme: str) -> None:
    tensors = dict(model(FAMILY))
    for layer, shape in SHAPES.items():
        del tensors[f"{UNET}{layer}.weight"]
        tensors |= {f"{UNET}{layer}.{n}": t for n, t in undecoded(scheme, *shape).items()}
    save(folder / "a.safetensors", tensors)
    save(folder / "b.safetensors", model(FAMILY, seed=3))
    sources = 'sources.a.file = "a.safetensors"\nsources.b.file = "b.safetensors"\n'
    folder.write(
        "m.toml",
        f'format = 1\nname = "m"\nbase = "s"\n{sources}'
        'steps.s = { op = "weighted-sum", a = "b", b = "a", alpha = 0.3 }\n',
    )
    folder.write("n.toml", f'format = 1\nname = "n"\nbase = "b"\n{sources}components.UNET-mini = "a"\n')
    before = {p.name for p in folder.path.iterdir()}
    wider, keep = "hint: take a model with weights of 16 bits", "hint: the precision `keep` leaves them"
    for args, code, hint in (
        (("build", "m.toml"), 3, wider),
        (("build", "n.toml"), 3, wider),
        (("extract", "a.safetensors", "unet", "-o", "x.safetensors"), 2, wider),
        (("replace", "b.safetensors", "UNET=a.safetensors", "-o", "x.safetensors"), 2, wider),
        (("convert", "a.safetensors", "-o", "x.safetensors", "--precision", "fp16"), 6, keep),
        (("convert", "a.safetensors", "-o", "x.safetensors", "--quantize", "fp8"), 6, "leave `quantize` out"),
    ):
        said = folder(*args)
        assert said.code == code and scheme in said.err and hint in said.err, said.err
        assert {p.name for p in folder.path.iterdir()} - {"m.lock.toml"} == before
    (fault,) = (line for line in folder("inspect", "a.safetensors").out.splitlines() if "! " in line)
    assert f"{scheme} weights: 3 tensors that nothing here decodes" in fault
    (found,) = json.loads(folder("inspect", "a.safetensors", "--json").out)["files"][0]["packed"]
    assert (found["schemes"], found["bits_per_weight"]) == ({scheme: 3}, None)
    assert folder("convert", "a.safetensors", "-o", "x.safetensors").code == 0  # the hint can be followed
    assert content(folder / "x.safetensors") == content(folder / "a.safetensors")


# -- packing


@pytest.mark.parametrize("quantize", FORMS)
def test_a_denoiser_is_packed(folder: Folder, quantize: str) -> None:
    """The rest has its precision, and what is packed is what its exact weights are."""
    save(folder / "p.safetensors", held := model(FAMILY))
    said = f'\n[output]\nprecision = "fp16"\nquantize = "{quantize}"\n'
    made = built(folder, "m", 'base = "p"' + said)
    plain_ = built(folder, "n", 'base = "p"')
    weights = {n for n in plain_ if made[n] != plain_[n]}
    layers = {n.removesuffix(".weight") for n in weights}
    assert f"{UNET}{WIDE}" in layers and all(n.startswith(UNET) and ".ff.net." in n for n in layers)
    assert made.keys() == plain_.keys() | {
        f"{n}.{s}" for n in layers for s in ("weight_scale", "comfy_quant")
    }
    exact = encoded({n: held[n] for n in weights}, quantize, lambda layer: False)
    assert {n: made[n] for n in exact} == {
        n: (t.dtype.code, t.shape, bytes(t.tobytes())) for n, t in exact.items()
    }
    assert folder("verify", "m.toml").code == 0
    again = folder.build("m.toml", "--threads", "1")["outputs"][0]
    assert again["state"] == "unchanged"
    (part,) = folder("inspect", "m.safetensors", "--json").json["files"][0]["packed"]
    assert part["component"] == "UNET-mini-SD" and sum(part["schemes"].values()) == len(layers)
    with open_checkpoint(folder / "m.safetensors") as checkpoint:
        assert identify(checkpoint, catalog()).architecture == FAMILY
    (unet_,) = (n for n in folder.plan("m.toml")["steps"] if n["label"].startswith("UNET"))
    assert unet_["writes"] == sum(len(t[2]) for n, t in made.items() if n.startswith(UNET))


@pytest.mark.parametrize("quantize", FORMS)
def test_a_file_is_packed_as_it_is(folder: Folder, quantize: str) -> None:
    """By `convert`, whose recipe does the same; what is packed is packed anew once it is decoded."""
    save(folder / "p.safetensors", model(FAMILY))
    args = ("convert", "p.safetensors", "--quantize", quantize, "-o")
    said = folder(*args, "c.safetensors", "--save-recipe", "c.toml", "--json")
    made = content(folder / "c.safetensors")
    assert said.code == 0 and said.json["tensors"] == len(made) > len(model(FAMILY))
    (folder / "c.safetensors").unlink()
    folder.build("c.toml")
    assert content(folder / "c.safetensors") == made
    assert made == built(folder, "k", f'base = "p"\n[output]\nprecision = "keep"\nquantize = "{quantize}"\n')
    other = next(q for q in FORMS if q != quantize)
    assert folder("convert", "c.safetensors", "--quantize", other, "-o", "o.safetensors").code == 0
    anew = content(folder / "o.safetensors")
    assert anew.keys() == made.keys()
    assert {t[0] for n, t in anew.items() if made[n] != t} >= {{"fp8": "F8_E4M3", "int8": "I8"}[other]}


def test_a_merge_is_packed(folder: Folder) -> None:
    """Of what it is before any rounding."""
    save(folder / "p.safetensors", packed("nvfp4"))
    save(folder / "b.safetensors", model(FAMILY, seed=3))
    step = '\nsteps.s = { op = "weighted-sum", a = "p", b = "b", alpha = 0.3 }\n'
    merged = built(folder, "f", f'base = "s"{step}\n[output]\nprecision = "fp32"\n')
    made = built(folder, "q", f'base = "s"{step}\n[output]\nprecision = "fp16"\nquantize = "int8"\n')
    name = f"{UNET}{WIDE}.weight"
    exact = MemoryTensor(DType.F32, merged[name][1], merged[name][2])
    tensors = encoded({name: exact}, "int8", lambda layer: False)
    assert {n: made[n] for n in tensors} == {
        n: (t.dtype.code, t.shape, bytes(t.tobytes())) for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ('base = "p"\noutput.quantize = "fp4"\n', "`fp4`"),
        ('base = "p"\noutput = { quantize = "fp8", file = "folder/" }\n', "`quantize = "),
        (
            'base = "NEW VAE-mini"\ncomponents.VAE-mini = "p"\noutput.quantize = "fp8"\n',
            "there is nothing to quantize",
        ),
    ],
)
def test_where_nothing_is_packed_it_is_refused(folder: Folder, recipe: str, said: str) -> None:
    save(folder / "p.safetensors", model(FAMILY))
    folder.write("m.toml", f'format = 1\nname = "m"\nsources.p.file = "p.safetensors"\n{recipe}')
    found = folder("build", "m.toml")
    assert found.code == 3 and said in found.err and "hint: " in found.err
    assert folder("extract", "p.safetensors", "vae", "-o", "v.safetensors").code == 0
    for target, code in (("x.safetensors", 7), ("folder/", 2)):
        found = folder("convert", "v.safetensors", "-o", target, "--quantize", "fp8")
        assert found.code == code and "leave `" in found.err
    assert not {"x.safetensors", "folder", "m.safetensors"} & {p.name for p in folder.path.iterdir()}
