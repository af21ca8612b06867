"""What kind of file a file is, by what it says of itself: components, names, shapes, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builder.models.identify import identify
from builder.models.kinds_of_file import kind_of_file
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import UNET, Folder, catalog, model, save

Shapes = Mapping[str, tuple[int, ...]]


class Named(NamedTuple):
    shape: tuple[int, ...]


def told(shapes: Shapes, **metadata: str) -> tuple[str | None, str | None]:
    """The kind, and the words for it."""
    specs = {name: Named(shape) for name, shape in shapes.items()}
    said = {key.replace("__", "."): value for key, value in metadata.items()}
    kind = kind_of_file(specs, said, identify(specs, catalog()), catalog())
    return (kind.kind, kind.text) if kind else (None, None)


def lora(module: str, width: int, up: str = "lora_up.weight", down: str = "lora_down.weight") -> Shapes:
    return {f"{module}.{up}": (320, 32), f"{module}.{down}": (32, width), f"{module}.alpha": ()}


ATTENTION = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048),
         "a LoRA of SD XL, rank 32"),
        (lora("lora_unet_input_blocks_4_1_proj_in", 640), "a LoRA of SD XL, rank 32"),
        (lora(f"lora_unet_{ATTENTION}", 2048), "a LoRA of SD XL, rank 32"),
        (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280), "a LoRA of SD XL, rank 32"),
        (lora(f"lora_unet_{ATTENTION}", 768), "a LoRA of SD v1, rank 32"),
        (lora("lora_te_text_model_encoder_layers_3_self_attn_q_proj", 1024), "a LoRA of SD v2, rank 32"),
        (lora(f"unet.{DOTTED}", 768, "lora_B.weight", "lora_A.weight"), "a LoRA of SD v1, rank 32"),
        (lora(f"base_model.model.{DOTTED}", 2048, "lora_B.default.weight", "lora_A.default.weight"),
         "a LoRA of SD XL, rank 32"),
        (lora("transformer.single_transformer_blocks.0.attn.to_q", 3072, "lora_B.weight", "lora_A.weight"),
         "a LoRA of FLUX, rank 32"),
        (lora("lora_unet_double_blocks_0_img_attn_qkv", 3072), "a LoRA of FLUX, rank 32"),
        (lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536), "a LoRA of SD v3, rank 32"),
        (lora("lora_unet_transformer_blocks_0_img_mlp_net_2", 12288), "a LoRA of Qwen-Image, rank 32"),
        (lora("diffusion_model.blocks.0.cross_attn.k", 5120, "lora_B.weight", "lora_A.weight"),
         "a LoRA of Wan, rank 32"),
        (lora("lora_unet_blocks_0_cross_attn_output_proj", 2048),
         "a LoRA of Anima or Cosmos-Predict2, rank 32"),
        ({**lora("diffusion_model.blocks.0.cross_attn.k_proj", 1024), **lora("llm_adapter.out_proj", 1024)},
         "a LoRA of Anima, rank 32"),
        (lora("lora_unet_blocks_0_attn_wq", 6144), "a LoRA of Krea 2, rank 32"),
        (lora("diffusion_model.layers.0.attention.to_q", 3840, "lora_B.weight", "lora_A.weight"),
         "a LoRA of Z-Image, rank 32"),
        (lora("lora_unet_layers_0_attention_qkv", 3840), "a LoRA of Z-Image, rank 32"),
        (lora("lora_unet_layers_0_attention_qkv", 2304), "a LoRA of Lumina 2 or Z-Image, rank 32"),
        (lora("something_of_its_own", 7), "a LoRA, rank 32"),
        ({**lora("a", 7), "b.lora_down.weight": (4, 7), "b.lora_up.weight": (7, 4)}, "a LoRA, ranks 4 to 32"),
        ({f"lora_unet_{ATTENTION}.hada_w1_a": (320, 8), f"lora_unet_{ATTENTION}.hada_w1_b": (8, 768)},
         "a LoHa of SD v1, rank 8"),
        ({"lora_unet_input_blocks_1_1_proj_in.lokr_w1": (8, 8), "lora_unet_input_blocks_1_1.alpha": ()},
         "a LoKr of SD XL"),
        ({"lora_unet_mid.oft_blocks": (4, 8, 8)}, "an OFT"),
        ({"lora_unet_mid.weight": (4,), "lora_unet_mid.on_input": ()}, "an IA3"),
    ],
)  # fmt: skip
def test_networks(shapes: Shapes, text: str) -> None:
    assert told(shapes) == ("LoRA", text)


def test_metadata_say_what_names_do_not() -> None:
    shapes = lora("lycoris_blocks_0_attn", 1536)
    assert told(shapes) == ("LoRA", "a LoRA, rank 32")
    assert told(shapes, ss_base_model_version="sdxl_base_v1-0") == ("LoRA", "a LoRA of SD XL, rank 32")
    said = {"modelspec__architecture": "stable-diffusion-v1/lora"}
    assert told(shapes, **said) == ("LoRA", "a LoRA of SD v1, rank 32")
    strange = {"x.y": (3, 3)}
    assert told(strange) == (None, None)
    assert told(strange, ss_network_module="lycoris.kohya") == ("LoRA", "a LoRA")
    assert told(strange, modelspec__architecture="flux-1-dev/lora") == ("LoRA", "a LoRA of FLUX")
    assert told(strange, modelspec__architecture="stable-diffusion-v1/vae")[0] == "VAE"
    assert told(strange, modelspec__architecture="stable-diffusion-v1") == (None, None)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"string_to_param.*": (2, 768)}, "an embedding of SD v1"),
        ({"string_to_param.*": (2, 768), "string_to_token.*": ()}, "an embedding of SD v1"),
        ({"string_to_param.*": (2, 1024)}, "an embedding of SD v2"),
        ({"emb_params": (8, 768)}, "an embedding of SD v1"),
        ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "an embedding of SD XL"),
        ({"<cat-toy>": (768,)}, "an embedding of SD v1"),
        ({"<cat-toy>": (4, 1024)}, "an embedding of SD v2"),
    ],
)
def test_embeddings(shapes: Shapes, text: str) -> None:
    assert told(shapes) == ("embedding", text)


@pytest.mark.parametrize(
    "shapes", [{"x": (3,)}, {"weight": (768, 768)}, {"a": (768,), "b": (768,)}, {"x": ()}, {}]
)
def test_what_is_no_embedding(shapes: Shapes) -> None:
    assert told(shapes) == (None, None)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("768.0.linear.0.weight", "768.1.linear.0.bias", "320.0.linear.0.weight"), "hypernetwork"),
        (("768.0.linear1.weight", "768.0.linear2.weight"), "hypernetwork"),
        (("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.norm1.weight",
          "decoder.conv_out.weight"), "VAE"),
        (("vae.decoder.conv_in.weight", "vae.decoder.conv_out.weight"), "VAE"),
        (("decoder.middle.0.residual.0.gamma", "conv1.weight"), "VAE"),
        (("text_model.encoder.layers.0.self_attn.q_proj.weight", "logit_scale"), "CLIP"),
        (("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"), "CLIP"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "T5"),
        (("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"), "LLM"),
        (("vision_model.encoder.layers.0.self_attn.q_proj.weight",), "CLIP-vision"),
        (("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_out.weight"),
         "UNET"),
        (("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"), "DIT"),
        (("model.diffusion_model.x.weight", "vae.decoder.conv_in.weight"), "checkpoint"),
        (("controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight",
          "down_blocks.0.resnets.0.conv1.weight"), "ControlNet"),
        (("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",), "AnimateDiff"),
        (("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"), "IP-Adapter"),
        (("RRDB_trunk.0.RDB1.conv1.weight", "conv_first.weight"), "upscaler"),
        (("encoder.weight", "decoder.weight"), None),
    ],
)  # fmt: skip
def test_other_kinds(names: tuple[str, ...], kind: str | None) -> None:
    assert told(dict.fromkeys(names, (16, 16, 3, 3)))[0] == kind


def test_each_program_has_a_folder_for_each_kind() -> None:
    kinds = {rule.kind for rule in catalog().kinds}
    assert kinds <= catalog().programs["comfyui"].keys()
    assert {of for m in catalog().models for of in m.of} <= kinds


def test_components_say_it_first() -> None:
    assert told({n: t.shape for n, t in model("SD-mini").items()}) == ("checkpoint", "")
    assert told({n: t.shape for n, t in model("VAE-mini").items()}) == ("VAE", "")
    assert told({n: t.shape for n, t in model("LoRA-v1-CLIP").items()}) == ("LoRA", "")


def test_what_is_nearly_known_may_be_damaged(folder: Folder) -> None:
    """It is not taken for something else by its names, and the report says what is missing."""
    vae = dict(model("VAE-mini", DType.F16))
    del vae["quant_conv.weight"]
    assert told({n: t.shape for n, t in vae.items()}) == (None, None)
    save(folder / "a.safetensors", vae)
    said = folder("inspect", "a.safetensors")
    assert said.code == 1 and "nearest: `VAE-mini-SD`" in said.out
    rest = {n: t for n, t in model("SD-mini").items() if n.startswith(UNET)}
    assert told({n: t.shape for n, t in rest.items()}) == (None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def zeros(*shape: int) -> LazyTensor:
    return MemoryTensor(DType.F16, shape, bytes(2 * prod(shape)))


def test_inspect_says_it(folder: Folder) -> None:
    shapes = lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64)
    save(folder / "a.safetensors", {n: zeros(*s) for n, s in shapes.items()})
    said = folder("inspect", "a.safetensors")
    assert said.code == 0 and "a LoRA of SD XL, rank 32 · safetensors" in said.out
    assert "nothing in the catalog" not in said.out and "unknown" not in said.out
    (one,) = folder("inspect", "a.safetensors", "--json").json["files"]
    assert (one["architecture"], one["intact"]) == (None, False)
    assert (one["kind"], one["described"]) == ("LoRA", "a LoRA of SD XL, rank 32")


# What names there are, and the last dimension of the first.
FAMILIES = (
    (
        "SD v3",
        4,
        "joint_blocks.0.context_block.attn.qkv.weight",
    ),
    (
        "Stable Cascade",
        4,
        "clf.1.weight",
    ),
    (
        "HunyuanVideo",
        4,
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "img_in.proj.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ),
    (
        "Chroma",
        4,
        "distilled_guidance_layer.norms.0.scale",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ),
    (
        "FLUX.2",
        4,
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
    ),
    (
        "FLUX.3",
        4,
        "early_stream_modulations.image.lin.weight",
        "single_blocks.0.q_proj.weight",
    ),
    (
        "FLUX",
        4,
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "img_in.weight",
    ),
    (
        "Ovis-Image",
        4,
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "txt_norm.weight",
        "double_blocks.0.img_mlp.gate_proj.weight",
    ),
    (
        "PixArt",
        4,
        "adaln_single.emb.timestep_embedder.linear_1.bias",
        "pos_embed.proj.bias",
    ),
    (
        "LTX",
        4,
        "adaln_single.emb.timestep_embedder.linear_1.bias",
        "scale_shift_table",
    ),
    (
        "AuraFlow",
        4,
        "model.double_layers.0.attn.w1q.weight",
    ),
    (
        "Mochi",
        4,
        "t5_yproj.weight",
    ),
    (
        "NewBie",
        2304,
        "cap_embedder.1.weight",
        "clip_text_pooled_proj.0.weight",
    ),
    (
        "Z-Image",
        2560,
        "cap_embedder.1.weight",
        "noise_refiner.0.attention.k_norm.weight",
    ),
    (
        "Lumina 2",
        2304,
        "cap_embedder.1.weight",
        "noise_refiner.0.attention.k_norm.weight",
    ),
    (
        "Lens",
        4,
        "txt_norm.weight",
        "transformer_blocks.0.attn.norm_added_q.weight",
        "transformer_blocks.0.img_mlp.w1.weight",
    ),
    (
        "Mage-Flow",
        2560,
        "txt_norm.weight",
        "proj_out.weight",
    ),
    (
        "Qwen-Image",
        3584,
        "txt_norm.weight",
        "proj_out.weight",
    ),
    (
        "HiDream",
        4,
        "caption_projection.0.linear.weight",
    ),
    (
        "Boogu",
        4,
        "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",
        "time_caption_embed.timestep_embedder.linear_1.bias",
    ),
    (
        "OmniGen2",
        4,
        "time_caption_embed.timestep_embedder.linear_1.bias",
    ),
    (
        "Anima",
        4,
        "net.blocks.0.mlp.layer1.weight",
        "net.llm_adapter.blocks.0.cross_attn.q_proj.weight",
    ),
    (
        "Cosmos-Predict2",
        4,
        "net.blocks.0.mlp.layer1.weight",
        "net.blocks.0.cross_attn.k_proj.weight",
    ),
    (
        "Sana",
        4,
        "blocks.0.cross_attn.q_linear.weight",
        "blocks.0.cross_attn.kv_linear.weight",
    ),
    (
        "Wan",
        4,
        "head.modulation",
        "blocks.0.cross_attn.k.weight",
    ),
    (
        "SeedVR2",
        4,
        "blocks.31.mlp.all.proj_in_gate.weight",
    ),
    (
        "ERNIE-Image",
        4,
        "layers.0.mlp.linear_fc2.weight",
    ),
    (
        "Ideogram 4",
        4,
        "embed_image_indicator.weight",
    ),
    (
        "Kandinsky 5",
        4,
        "visual_transformer_blocks.0.cross_attention.key_norm.weight",
    ),
    (
        "ACE-Step",
        4,
        "genre_embedder.weight",
    ),
    (
        "CogVideoX",
        4,
        "blocks.0.norm1.linear.weight",
        "patch_embed.proj.weight",
    ),
)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_families_that_look_alike(case: tuple[Any, ...]) -> None:
    """The order is that in which programs look: what tells one family is in another too."""
    family, width, *names = case
    shapes = dict.fromkeys(names, (4, 4)) | {names[0]: (4, width)}
    assert told(shapes) == ("DIT", f"a diffusion transformer of {family}")
    under = {f"model.diffusion_model.{n.removeprefix('net.')}": s for n, s in shapes.items()}
    whole = {**under, "vae.decoder.conv_in.weight": (4, 4, 3, 3)}
    assert told(whole) == ("checkpoint", f"a whole model of {family}")


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("decoder.conv_in.weight", "bn.running_mean"), "a VAE of FLUX.2"),
        (("decoder.conv_in.weight", "decoder.conv_out.weight"), "a VAE"),
        (("decoder.middle.0.residual.0.gamma",), "a VAE of Wan 2.1 or Qwen-Image"),
        (
            ("decoder.upsamples.0.upsamples.0.residual.2.weight", "decoder.middle.0.residual.0.gamma"),
            "a video VAE of Wan 2.2",
        ),
        (("decoder.conv_in.conv.weight",), "a video VAE of HunyuanVideo"),
        (
            ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "decoder.conv_in.conv.weight"),
            "a video VAE of LTX",
        ),
        (("text_model.encoder.layers.30.mlp.fc1.weight",), "a text encoder (CLIP-G)"),
        (("text_model.encoder.layers.22.mlp.fc1.weight",), "a text encoder (CLIP-H)"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a text encoder (T5)"),
        (("model.layers.0.post_feedforward_layernorm.weight",), "a text encoder (Gemma 2)"),
        (
            ("model.layers.0.self_attn.sinks", "model.layers.0.self_attn.k_proj.bias"),
            "a text encoder (GPT-OSS)",
        ),
        (
            ("model.layers.0.self_attn.k_proj.bias", "visual.blocks.0.attn.qkv.weight"),
            "a text encoder (Qwen2.5-VL)",
        ),
        (("model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"), "a text encoder (Qwen3)"),
    ],
)
def test_parts_that_look_alike(names: tuple[str, ...], called: str) -> None:
    assert told(dict.fromkeys(names, (16, 16, 3, 3)))[1] == called
