"""What lies under a component's prefix beyond its table goes where the component goes, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest

from benchmarks.generate import DIRTY, make
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.models.identify import identify
from builder.tensors.digests import Row, component_digest, tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import CLIP, IDS, UNET, VAE, Folder, catalog, content, model, save, values

WEIGHT = "out.2.weight"
SMALL = 2e-8  # of a scale: FP16 has nothing between it and nought

Content = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def text(said: object) -> LazyTensor:
    data = said if isinstance(said, bytes) else json.dumps(said).encode()
    return MemoryTensor(DType.U8, (len(data),), data)


def packed(dtype: DType, shape: tuple[int, ...]) -> LazyTensor:
    return MemoryTensor(dtype, shape, bytes(i % 100 for i in range(prod(shape))))


def unets(family: str) -> dict[str, dict[str, LazyTensor]]:
    """Files as people have them, by what is in their UNET beside or instead of its table."""
    shape = model(f"SD-{family}")[UNET + WEIGHT].shape
    return {
        "a second time projection": {"time_embed.cond_proj.weight": values([[0.1, 1e-9], [3.0, 4.0]])},
        "scaled FP8": {
            WEIGHT: packed(DType.F8_E4M3, shape),
            "out.2.scale_weight": values([SMALL]),
            "out.2.scale_input": values([1.0]),
            "scaled_fp8": MemoryTensor(DType.F8_E4M3, (2,), b"\0\0"),
        },
        "int8_tensorwise": {
            WEIGHT: packed(DType.I8, shape),
            "out.2.weight_scale": values([SMALL]),
            "out.2.comfy_quant": text({"format": "int8_tensorwise"}),
        },
        "scaled I8": {WEIGHT: packed(DType.I8, shape), "out.2.weight_scale": values([SMALL])},
        "block FP8": {WEIGHT: packed(DType.F8_E4M3, shape), "out.2.weight_scale_inv": values([[SMALL]])},
    }


UNETS = unets("tiny")
PACKED = [name for name in UNETS if name != "a second time projection"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


@pytest.fixture(params=UNETS)
def unet(request: pytest.FixtureRequest, folder: Folder) -> dict[str, LazyTensor]:
    """What is beyond or other than the table; the model that has it is `a.safetensors`, another `b`."""
    found = UNETS[request.param]
    save(folder / "a.safetensors", {**model(), **{UNET + n: t for n, t in found.items()}})
    save(folder / "b.safetensors", model(seed=3))
    return found


def held(made: Content, tensors: Mapping[str, LazyTensor], prefix: str = "") -> None:
    """That all of these are there as they were."""
    for name, tensor in tensors.items():
        assert made[prefix + name] == (tensor.dtype.code, tensor.shape, bytes(tensor.tobytes())), name


def test_all_of_it_is_the_component(folder: Folder, unet: dict[str, LazyTensor]) -> None:
    with open_checkpoint(folder / "a.safetensors") as checkpoint:
        found = identify(checkpoint, catalog())
        match = found.find("UNET-tiny")
        assert match is not None and not found.unknown and not found.junk
        assert match.companions.keys() == unet.keys() - {WEIGHT}
        tensors = {b: checkpoint[f] for b, f in match.whole.items()}
        digest = component_digest({n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in tensors.items()})
    said = folder("inspect", "a.safetensors", "--json").json["files"][0]
    (part,) = (c for c in said["components"] if c["class"] == "UNET-tiny")
    assert (part["tensors"], part["digest"]) == (len(tensors), f"blake3:{digest}")
    assert part["companions"] == list(match.companions)


def test_every_command_carries_it(folder: Folder, unet: dict[str, LazyTensor]) -> None:
    keep = ("--precision", "keep")
    folder.write("m.toml", 'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\n')
    folder.write("m.toml", (folder / "m.toml").read_text() + 'output.precision = "keep"\n')
    made = folder.build("m.toml")
    held(content(folder / "m.safetensors"), unet, UNET)
    locked = (folder / "m.lock.toml").read_text()
    with open_checkpoint(folder / "a.safetensors") as checkpoint:
        match = identify(checkpoint, catalog()).find("UNET-tiny")
        assert match is not None and f"tensors = {len(match.whole)}" in locked
    folder.write(
        "n.toml",
        'format = 1\nname = "n"\nbase = "b"\nsources.a.file = "a.safetensors"\n'
        'sources.b.file = "b.safetensors"\ncomponents.UNET-tiny = "a"\noutput.precision = "keep"\n',
    )
    folder.build("n.toml")
    held(content(folder / "n.safetensors"), unet, UNET)

    run: list[tuple[tuple[str, ...], str, str]] = [
        (("extract", "a.safetensors", "unet", "-o", "x.safetensors", *keep), "x.safetensors", ""),
        (("extract", "a.safetensors", "unet", "-o", "h.safetensors"), "h.safetensors", ""),
        (("extract", "x.safetensors", "unet", "-o", "y.safetensors", *keep), "y.safetensors", ""),
        (
            ("replace", "b.safetensors", "UNET=x.safetensors", "-o", "r.safetensors", *keep),
            "r.safetensors",
            UNET,
        ),
        (("replace", "b.safetensors", "UNET=a.safetensors", "-o", "s.safetensors"), "s.safetensors", UNET),
        (("replace", "a.safetensors", "VAE=b.safetensors", "-o", "v.safetensors"), "v.safetensors", UNET),
        (("prune", "a.safetensors", "-o", "p.safetensors"), "p.safetensors", UNET),
        (("convert", "a.safetensors", "-o", "c.ckpt"), "c.ckpt", UNET),
        (("new", "a.safetensors", "-o", "again.toml"), "", ""),
        (("build", "again.toml", "-o", "w.safetensors"), "w.safetensors", UNET),
    ]
    for args, file, prefix in run:
        said = folder(*args)
        assert said.code == 0, (args, said.err)
        if file in ("h.safetensors", "s.safetensors", "v.safetensors", "p.safetensors"):  # to 16 bits
            kept = {n: t for n, t in unet.items() if not n.startswith("time_embed")}
            assert content(folder / file).keys() >= {prefix + n for n in unet}
            held(content(folder / file), kept, prefix)
        elif file:
            held(content(folder / file), unet, prefix)
    # Without it, it is another component; and a build knows what it made.
    assert folder.build("m.toml")["outputs"][0]["state"] == "unchanged"
    assert made["outputs"][0]["sha256"] == folder.build("m.toml")["outputs"][0]["sha256"]


def test_the_one_that_is_replaced_takes_its_own_along(folder: Folder, unet: dict[str, LazyTensor]) -> None:
    for args in (
        ("replace", "a.safetensors", "UNET=b.safetensors"),
        ("replace", "b.safetensors", "VAE=a.safetensors"),
    ):
        assert folder(*args, "-o", "r.safetensors").code == 0
        assert not content(folder / "r.safetensors").keys() & {UNET + n for n in unet.keys() - {WEIGHT}}


@pytest.mark.parametrize(
    ("command", "unet"),
    [
        *((("convert", "mini.safetensors", "-o", "folder/"), scheme) for scheme in PACKED),
        *(
            (command, scheme)
            for command in (
                ("build", "m.toml"),
                ("plan", "m.toml"),
                ("convert", "a.safetensors", "-o", "c.safetensors", "--precision", "fp16"),
                ("extract", "a.safetensors", "unet", "-o", "x.safetensors", "--precision", "bf16"),
            )
            for scheme in ("scaled I8", "block FP8")  # without a description, or of no matrix
        ),
    ],
    indirect=["unet"],
)
def test_what_would_lose_its_meaning_is_refused_by_name(
    folder: Folder, unet: dict[str, LazyTensor], command: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\noutput.precision = "fp16"\n',
    )
    scheme = request.node.callspec.params["unet"]
    if "mini.safetensors" in command:  # diffusers has a layout for it
        more = {UNET + n: t for n, t in unets("mini")[scheme].items()}
        save(folder / "mini.safetensors", {**model("SD-mini"), **more})
    said = folder(*command)
    assert said.code == 6 and f"{scheme} weights" in said.err and WEIGHT in said.err
    assert not {"c.safetensors", "folder", "x.safetensors", "m.safetensors"} & {
        p.name for p in folder.path.iterdir()
    }


# -- where names are not those of the table


def test_companions_of_a_misspelt_attention_are_spelt_as_it_is(folder: Folder) -> None:
    """As diffusers names an autoencoder's attention."""
    tensors = {n.replace("attn_1.q.", "attn_1.to_q."): t for n, t in model().items()}
    scale = next(n for n in tensors if "mid.attn_1.to_q.weight" in n).replace("weight", "weight_scale")
    save(folder / "a.safetensors", {**tensors, scale: values([SMALL])})
    assert folder("extract", "a.safetensors", "vae", "-o", "v.safetensors").code == 0
    made = content(folder / "v.safetensors")
    held(made, {scale.replace("to_q", "q").removeprefix(VAE): values([SMALL])})
    assert scale.replace("weight_scale", "weight").replace("to_q", "q").removeprefix(VAE) in made


def test_an_average_is_promoted_with_its_companions(folder: Folder) -> None:
    more = {UNET + "time_embed.cond_proj.weight": values([1.0])}
    average = {n: t for n, t in make("SD-tiny", dirt=DIRTY, catalog=catalog()).tensors.items() if "ema" in n}
    ema = "model_ema.diffusion_modeltime_embedcond_projweight"
    save(folder / "a.safetensors", {**model(), **more, **average, ema: values([0.5])})
    assert folder("extract", "a.safetensors", "UNET-tiny-EMA", "-o", "e.safetensors").code == 0
    assert content(folder / "e.safetensors")["time_embed.cond_proj.weight"][2] == b"\0\x38"
    assert folder("prune", "a.safetensors", "-o", "p.safetensors").code == 0
    assert content(folder / "p.safetensors").keys() == {*model(), *more}


def test_a_tokenizer_beside_a_bare_text_encoder(folder: Folder) -> None:
    bare = {n.removeprefix(CLIP): t for n, t in model().items() if n.startswith(CLIP)}
    save(folder / "c.safetensors", {**bare, "spiece_model": text(b"\0\xff a sentence piece")})
    save(folder / "b.safetensors", model(seed=3))
    assert folder("replace", "b.safetensors", "CLIP=c.safetensors", "-o", "r.safetensors").code == 0
    held(content(folder / "r.safetensors"), {CLIP + "spiece_model": text(b"\0\xff a sentence piece")})


def test_of_two_bare_components_each_has_what_lies_in_it(folder: Folder) -> None:
    bare = {
        n.removeprefix(CLIP).removeprefix(VAE): t for n, t in model().items() if n.startswith((CLIP, VAE))
    }
    mine = {"decoder.conv_out.weight_scale": values([SMALL]), "whose": values([1.0])}
    save(folder / "two.safetensors", {**bare, **mine})
    with open_checkpoint(folder / "two.safetensors") as checkpoint:
        found = identify(checkpoint, catalog())
    assert found.unknown == ("whose",)
    assert found.companions == ("decoder.conv_out.weight_scale",)
    vae = found.find("VAE-tiny")
    assert vae is not None and [*vae.companions] == ["decoder.conv_out.weight_scale"]


def test_position_ids_of_another_shape_are_mended(folder: Folder) -> None:
    flat = MemoryTensor(DType.I64, (77,), bytes(model()[IDS].tobytes()))
    save(folder / "a.safetensors", {**model(), IDS: flat})
    assert folder("extract", "a.safetensors", "clip", "-o", "c.safetensors").code == 0
    held(content(folder / "c.safetensors"), {IDS.removeprefix(CLIP): flat})
    args = ("extract", "a.safetensors", "clip", "-o", "d.safetensors", "--fix", "clip-position-ids")
    assert folder(*args).code == 0
    held(content(folder / "d.safetensors"), {IDS.removeprefix(CLIP): model()[IDS]})


# -- descriptions in the header


DESCRIPTION = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}


def described(path: Path, *layers: str, prefix: str = UNET, tensors: Mapping[str, LazyTensor]) -> None:
    said = {"format_version": "1.0", "layers": {prefix + n: DESCRIPTION for n in layers}}
    write(path, tensors, {"_quantization_metadata": json.dumps(said), "other": "stays"})


def test_what_the_header_says_of_layers_goes_with_them(folder: Folder) -> None:
    more = {UNET + n: t for n, t in UNETS["scaled I8"].items()}
    described(folder / "a.safetensors", "out.2", tensors={**model(), **more})
    keep = ("--precision", "keep")
    description = {"out.2.comfy_quant": text(DESCRIPTION)}
    for args, file, prefix in (
        (("extract", "a.safetensors", "unet", "-o", "u.safetensors", *keep), "u.safetensors", ""),
        (("prune", "a.safetensors", "-o", "p.safetensors"), "p.safetensors", UNET),
        (("convert", "a.safetensors", "-o", "c.ckpt"), "c.ckpt", UNET),
        (("convert", "a.safetensors", "-o", "c.safetensors"), "c.safetensors", UNET),
    ):
        assert folder(*args).code == 0
        held(content(folder / file), {**UNETS["scaled I8"], **description}, prefix)
    with open_checkpoint(folder / "c.safetensors") as made:
        assert made.metadata == {"other": "stays"}
    more = {UNET + n: t for n, t in unets("mini")["scaled I8"].items()}
    described(folder / "mini.safetensors", "out.2", tensors={**model("SD-mini"), **more})
    assert "int8_tensorwise weights" in folder("convert", "mini.safetensors", "-o", "folder/").err
    assert folder("diff", "a.safetensors", "c.safetensors").code == 0


def test_a_header_may_leave_the_prefix_out_and_speak_of_what_is_not_there(folder: Folder) -> None:
    """Programs take a denoiser's prefix away before they read it, and leave what they find no layer for."""
    held_ = {**model(), **{UNET + n: t for n, t in UNETS["scaled I8"].items()}}
    keep = ("--precision", "keep")
    for prefix, more in (("", ()), (UNET, ("gone",)), ("", ("gone", "out.2.gone"))):
        described(folder / "a.safetensors", *more, "out.2", prefix=prefix, tensors=held_)
        assert folder("extract", "a.safetensors", "unet", "-o", "u.safetensors", *keep).code == 0
        held(content(folder / "u.safetensors"), {"out.2.comfy_quant": text(DESCRIPTION)})
        assert folder("convert", "a.safetensors", "-o", "c.safetensors").code == 0
        with open_checkpoint(folder / "c.safetensors") as made:
            assert UNET + "out.2.comfy_quant" in made
            left = json.loads(made.metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
            assert left == {prefix + name: DESCRIPTION for name in more}
        # Of another model it would be untrue.
        folder.write("m.toml", 'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\n')
        folder.build("m.toml")
        with open_checkpoint(folder / "m.safetensors") as built:
            assert UNET + "out.2.comfy_quant" in built
            assert "_quantization_metadata" not in built.metadata


def test_of_two_that_a_header_may_mean_neither_is_taken(folder: Folder) -> None:
    two = {**model(), **{f"other.{n}": t for n, t in model().items() if n.startswith(UNET)}}
    described(folder / "a.safetensors", "out.2", prefix="", tensors=two)
    with open_checkpoint(folder / "a.safetensors") as checkpoint:
        assert checkpoint.keys() == two.keys() and "_quantization_metadata" in checkpoint.metadata


@pytest.mark.parametrize(
    "said",
    ["", "no JSON", "[]", '{"layers": 1}', '{"layers": {"no": {}}}', '{"layers": {"x": 1}}', "[" * 99999],
)
def test_a_header_that_says_something_else_stays_as_it_is(folder: Folder, said: str) -> None:
    write(folder / "a.safetensors", model(), {"_quantization_metadata": said})
    assert folder("convert", "a.safetensors", "-o", "c.safetensors").code == 0
    with open_checkpoint(folder / "c.safetensors") as made:
        assert made.metadata["_quantization_metadata"] == said
        assert made.keys() == model().keys()


# -- where the table does not fit


def test_tables_of_bitsandbytes_are_not_rounded(folder: Folder) -> None:
    """Packed weights have another shape than the table's, so nothing is known of them but that."""
    weight = UNET + WEIGHT
    nf4 = {
        weight: packed(DType.U8, (128, 1)),
        weight + ".absmax": values([SMALL]),
        weight + ".quant_map": values([0.1, -0.1]),
        weight + ".quant_state.bitsandbytes__nf4": text({"blocksize": 64}),
    }
    save(folder / "a.safetensors", {**model(), **nf4})
    said = folder("convert", "a.safetensors", "-o", "c.safetensors", "--precision", "fp16")
    assert said.code == 6 and "bitsandbytes NF4 weights cannot be decoded" in said.err
    assert folder("prune", "a.safetensors", "--force", "-o", "p.safetensors").code == 0
    held(content(folder / "p.safetensors"), nf4)


def test_a_folder_whose_scales_have_no_place_is_refused(folder: Folder) -> None:
    save(folder / "a.safetensors", model("SD-mini"))
    assert folder("convert", "a.safetensors", "-o", "f/").code == 0
    path = folder / "f" / "unet" / "diffusion_pytorch_model.safetensors"
    found = {n: MemoryTensor(DType[c], s, d) for n, (c, s, d) in content(path).items()}
    save(path, {**found, "conv_out.weight_scale": values([SMALL])})
    said = folder("convert", "f", "-o", "b.safetensors")
    assert said.code == 6 and "scaled weights are not read from a folder in diffusers' layout" in said.err


# -- one way to count


@pytest.mark.parametrize("unet", PACKED, indirect=True)
def test_the_metric_is_one_wherever_it_is_said(folder: Folder, unet: dict[str, LazyTensor]) -> None:
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\noutput.precision = "keep"\n',
    )
    metric = folder.build("m.toml")["outputs"][0]["metric"]
    for file in ("a.safetensors", "m.safetensors"):
        assert folder("inspect", file, "--json").json["files"][0]["metric"] == metric
    folder.write("m.toml", (folder / "m.toml").read_text() + f'expect.metric = "{metric}"\n')
    assert folder("verify", "m.toml").code == 0
    assert folder("new", "a.safetensors", "-o", "n.toml").code == 0
    assert f'metric = "{metric}"' in (folder / "n.toml").read_text()
    (folder / "m.safetensors").unlink()  # from what is remembered
    assert folder.build("m.toml")["outputs"][0]["metric"] == metric
