"""LoRAs and their kin: every kind as those who train them compute it, every name found, nothing unused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.models.catalog import load_catalog
from builder.operations.lora.kinds import Adapter, change
from builder.operations.lora.names import Shaped, Target, modules, targets
from tests.help.building import CLIP, UNET, Folder, content, model, save, values

CASES = json.loads(Path(__file__).with_name("lora.json").read_text(encoding="utf-8"))
PARTS = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"}


def tensor(shape: list[int], numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("case", CASES, ids=[c["kind"] for c in CASES])
def test_as_those_who_train_them(case: Mapping[str, Any]) -> None:
    """Ours is FP64, theirs FP32: within its precision. Where others are wrong, their numbers are left out."""
    weight = tensor(case["shape"], case["weight"])
    held = {PARTS.get(n, n.removesuffix(".weight")): tensor(*t) for n, t in case["tensors"].items()}
    made = weight + change(weight, Adapter(held, case["alpha"], case["by_root"]), case["strength"])
    for by, numbers in case["made"].items():
        assert (made - tensor(case["shape"], numbers)).abs().max() < 1e-6, by


def test_a_magnitude_without_a_change_scales_to_itself() -> None:
    """DoRA at strength 0 means nothing, and 1 gives rows of the lengths that it says."""
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    held = {"up": torch.ones(6, 2).double(), "down": torch.ones(2, 8).double()}
    held["lora_magnitude_vector"] = torch.arange(1.0, 7.0).double()
    assert not change(weight, Adapter(held), 0.0).any()
    made = weight + change(weight, Adapter(held), 1.0)
    assert torch.allclose(made.norm(dim=1), held["lora_magnitude_vector"])


# ── names ──


def table(cls: str) -> Mapping[str, Mapping[str, Target]]:
    catalog = load_catalog(())
    adapters = catalog.traits[cls].adapters
    assert adapters is not None
    rules = catalog.rules[adapters.rules] if adapters.rules else None
    return targets({n: Shaped(r.shape) for n, r in catalog.classes[cls][0].tensors.items()}, adapters, rules)


@pytest.mark.parametrize(
    ("cls", "module", "expected"),
    [
        # kohya, by diffusers' names and by the original's
        (
            "UNET-v1",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            Target("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"),
        ),
        ("UNET-v1", "lora_unet_mid_block_resnets_1_conv1", Target("middle_block.2.in_layers.2.weight")),
        ("UNET-v1", "lora_unet_up_blocks_0_upsamplers_0_conv", Target("output_blocks.2.1.conv.weight")),
        ("UNET-XL", "lora_unet_input_blocks_4_1_proj_in", Target("input_blocks.4.1.proj_in.weight")),
        ("UNET-XL", "lora_unet_add_embedding_linear_2", Target("label_emb.0.2.weight")),
        # diffusers and PEFT, ComfyUI, LyCORIS
        ("UNET-XL", "unet.up_blocks.1.upsamplers.0.conv", Target("output_blocks.5.2.conv.weight")),
        ("UNET-XL", "base_model.model.conv_in", Target("input_blocks.0.0.weight")),
        ("UNET-XL", "diffusion_model.out.2", Target("out.2.weight")),
        ("UNET-v1", "lycoris_conv_out", Target("out.2.weight")),
        # text encoders: as they are, and where three matrices are one
        (
            "CLIP-v1",
            "lora_te_text_model_encoder_layers_3_mlp_fc1",
            Target("encoder.layers.3.mlp.fc1.weight"),
        ),
        (
            "CLIP-XL",
            "lora_te2_text_model_encoder_layers_0_self_attn_k_proj",
            Target("transformer.resblocks.0.attn.in_proj_weight", 1280, 1280),
        ),
        (
            "CLIP-v2",
            "text_encoder.text_model.encoder.layers.22.self_attn.v_proj",
            Target("transformer.resblocks.22.attn.in_proj_weight", 2048, 1024),
        ),
        ("CLIP-XL", "lora_te2_text_projection", Target("text_projection", transposed=True)),
        # FLUX: rows of fused matrices, swapped halves, XLabs
        (
            "DIT-FLUX",
            "transformer.transformer_blocks.7.attn.add_k_proj",
            Target("double_blocks.7.txt_attn.qkv.weight", 3072, 3072),
        ),
        (
            "DIT-FLUX",
            "lora_transformer_single_transformer_blocks_37_proj_mlp",
            Target("single_blocks.37.linear1.weight", 9216, 12288),
        ),
        (
            "DIT-FLUX",
            "transformer.norm_out.linear",
            Target("final_layer.adaLN_modulation.1.weight", swapped=True),
        ),
        (
            "DIT-FLUX",
            "double_blocks.0.processor.qkv_lora2",
            Target("double_blocks.0.txt_attn.qkv.weight"),
        ),
        (
            "DIT-FLUX",
            "lora_unet_double_blocks_3_img_attn_proj",
            Target("double_blocks.3.img_attn.proj.weight"),
        ),
        # SD v3
        (
            "MMDIT-v3",
            "transformer.transformer_blocks.23.norm1_context.linear",
            Target("joint_blocks.23.context_block.adaLN_modulation.1.weight", swapped=True),
        ),
        (
            "MMDIT-v3",
            "lora_unet_joint_blocks_0_x_block_attn_qkv",
            Target("joint_blocks.0.x_block.attn.qkv.weight"),
        ),
    ],
)
def test_every_dialect(cls: str, module: str, expected: Target) -> None:
    assert table(cls)[module]["weight"] == expected


def test_modules_of_a_file() -> None:
    names = {
        "unet.x.lora_A.weight": ("unet.x", "down"),
        "unet.x.lora_B.default.weight": ("unet.x", "up"),
        "lora_unet_y.lora_up.weight": ("lora_unet_y", "up"),
        "lora_unet_y.alpha": ("lora_unet_y", "alpha"),
        "unet.mid.attn1.processor.to_out_lora.up.weight": ("unet.mid.attn1.to_out.0", "up"),
        "double_blocks.0.processor.qkv_lora1.down.weight": ("double_blocks.0.processor.qkv_lora1", "down"),
        "z.hada_w1_a": ("z", "hada_w1_a"),
        "z.lokr_w2_b": ("z", "lokr_w2_b"),
        "n.w_norm": ("n", "diff"),
        "n.b_norm": ("n", "bias-diff"),
    }
    found, strange = modules({name: values([1.0]) for name in [*names, "what.is.this"]})
    assert strange == ["what.is.this"]
    for name, (module, part) in names.items():
        assert name in found[module].names and part in found[module].tensors


# ── recipes ──

LORA = """\
format = 1
name = "baked"
base = "lo"
sources.m.file = "m.safetensors"
sources.l.file = "l.safetensors"
[steps.lo]
op = "apply-lora"
a = "m"
"""
FC1 = "encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save(made / "m.safetensors", model("SD-mini", seed=1))
    return made


def weight(name: str) -> torch.Tensor:
    held = model("SD-mini", seed=1)[name]
    return torch.frombuffer(held.tobytes(), dtype=held.dtype.torch).view(held.shape)


def lora(folder: Folder, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A LoRA of rank 2, alpha 1, on one module of the UNET and one of the text encoder; what it adds."""
    generator = torch.Generator().manual_seed(5)
    tensors, added = {}, []
    for module, name in (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", UNET + QUERY),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", CLIP + FC1),
    ):
        rows, columns = weight(name).shape
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        tensors |= {f"{module}.lora_up.weight": values(up.numpy()), f"{module}.alpha": values(1.0)}
        tensors[f"{module}.lora_down.weight"] = values(down.numpy())
        added.append((up.double() @ down.double()) * 0.5)
    save(folder / "l.safetensors", tensors | more)
    return added[0], added[1]


QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def made(folder: Folder, name: str) -> torch.Tensor:
    held = content(folder / "baked.safetensors")[name]
    return torch.frombuffer(bytearray(held[2]), dtype=torch.float16).view(held[1])


@pytest.mark.parametrize(
    ("strength", "unet", "clip"),
    [
        ("0.6", 0.6, 0.6),
        ("{ UNET = 0.5, CLIP = 0 }", 0.5, 0.0),
        ('{ strength = 0.5, blocks = "INS" }', 0.5, 0.5),
        ('{ strength = 0.5, blocks = "OUTD" }', 0.0, 0.5),
        ('{ base = 0.25, "IN*" = 1 }', 1.0, 0.25),
    ],
)
def test_baked_into_a_model(folder: Folder, strength: str, unet: float, clip: float) -> None:
    on_unet, on_clip = lora(folder)
    folder.write("baked.toml", LORA + f"loras = {{ l = {strength} }}\n")
    folder.build("baked.toml")
    for name, added, factor in ((UNET + QUERY, on_unet, unet), (CLIP + FC1, on_clip, clip)):
        expected = (weight(name).double() + factor * added).float().half() if factor else weight(name).half()
        assert torch.equal(made(folder, name), expected)
    other = UNET + "out.2.weight"
    assert torch.equal(made(folder, other), weight(other).half())


def test_in_one_line(folder: Folder) -> None:
    lora(folder)
    folder.write("baked.toml", LORA + "loras = { l = { UNET = 0.5, CLIP = 0 } }\n")
    folder.build("baked.toml")
    line = (
        "lora",
        "m.safetensors",
        "l.safetensors=UNET=0.5,CLIP=0",
        "-o",
        "o.safetensors",
        "--save-recipe",
        "o.toml",
    )
    assert folder(*line).code == 0
    assert content(folder / "o.safetensors") == content(folder / "baked.safetensors")
    assert folder("build", "o.toml", "--check").code == 0
    assert folder("lora", "m.safetensors", "l.safetensors", "-o", "one.safetensors").code == 0
    assert content(folder / "one.safetensors") != content(folder / "o.safetensors")
    said = folder("lora", "m.safetensors", "m.safetensors=0.5", "-o", "p.safetensors")
    assert said.code == 6 and not (folder / "p.safetensors").exists()


def test_two_at_once_are_added_before_they_are_rounded(folder: Folder) -> None:
    added, _ = lora(folder)
    (folder / "k.safetensors").write_bytes((folder / "l.safetensors").read_bytes())
    text = LORA.replace("[steps", 'sources.k.file = "k.safetensors"\n[steps', 1)
    folder.write("baked.toml", text + "loras = { l = 0.3, k = 0.5 }\n")
    folder.build("baked.toml", "--threads", 1)
    one = (folder / "baked.safetensors").read_bytes()
    expected = (weight(UNET + QUERY).double() + 0.8 * added).float().half()
    assert (made(folder, UNET + QUERY).float() - expected.float()).abs().max() <= 2**-10
    (folder / "baked.safetensors").unlink()
    folder.write("baked.toml", text + "loras = { k = 0.5, l = 0.3 }\n")
    folder.build("baked.toml", "--threads", 8)
    assert (folder / "baked.safetensors").read_bytes() == one


def test_what_is_for_nothing_is_an_error(folder: Folder) -> None:
    """The most reported fault of the field: a LoRA that silently does nothing."""
    strange = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_x.lora_up.weight": values([[1.0]])
    }
    lora(folder, **strange)
    folder.write("baked.toml", LORA + "loras = { l = 1 }\n")
    said = folder("build", "baked.toml")
    assert said.code == 6
    assert "the LoRA `l` has 1 tensor for nothing in the model" in said.err
    assert "used are 1 module of UNET-mini, 1 module of CLIP-mini" in said.err
    assert "did you mean `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_" in said.err
    folder.write("baked.toml", LORA + 'loras = { l = 1 }\nunmatched = "ignore"\n')
    assert folder("build", "baked.toml").code == 0


def test_factors_that_do_not_fit_name_the_module(folder: Folder) -> None:
    module = "lora_unet_conv_out"
    lora(
        folder,
        **{
            f"{module}.lora_up.weight": values([[1.0]] * 3),
            f"{module}.lora_down.weight": values([[1.0] * 4]),
        },
    )
    folder.write("baked.toml", LORA + "loras = { l = 1 }\n")
    said = folder("build", "baked.toml")
    assert said.code == 6 and f"module `{module}` of the LoRA `l` does not fit `out.2.weight`" in said.err


def test_factors_of_a_convolution(folder: Folder) -> None:
    """As trainers write them, in four dimensions."""
    name, module = UNET + "input_blocks.1.0.in_layers.2.weight", "lora_unet_down_blocks_0_resnets_0_conv1"
    rows, columns, *window = weight(name).shape
    generator = torch.Generator().manual_seed(5)
    up = torch.randn(rows, 2, 1, 1, generator=generator)
    down = torch.randn(2, columns, *window, generator=generator)
    factors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    save(folder / "l.safetensors", {n: values(t.numpy()) for n, t in factors.items()})
    folder.write("baked.toml", LORA + "loras = { l = 0.5 }\n")
    folder.build("baked.toml")
    added = torch.einsum("or,rikl->oikl", up.flatten(1).double(), down.double()) * 0.5
    assert torch.equal(made(folder, name), (weight(name).double() + added).float().half())


def test_other_kinds_biases_and_norms(folder: Folder) -> None:
    name, bias, norm = UNET + "out.2.weight", UNET + "out.2.bias", UNET + "out.0.weight"
    extra = {
        "lora_unet_conv_out.diff": values(torch.ones(weight(name).shape).numpy()),
        "lora_unet_conv_out.diff_b": values(torch.ones(weight(bias).shape).numpy()),
        "lora_unet_conv_norm_out.w_norm": values(torch.ones(weight(norm).shape).numpy()),
    }
    save(folder / "l.safetensors", extra)
    folder.write("baked.toml", LORA + "loras = { l = 0.5 }\n")
    folder.build("baked.toml")
    for each in (name, bias, norm):
        assert torch.equal(made(folder, each), (weight(each).double() + 0.5).float().half())
