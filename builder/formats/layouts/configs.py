"""The configuration files of a folder in diffusers' layout, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

from builder.formats.layouts.tables import CLIP, PARTS
from builder.tensors.lazy import LazyTensor

Tensors = Mapping[str, LazyTensor]
Prediction = Literal["epsilon", "v"]
Config = dict[str, Any]

MODEL_INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VERSION = "0.30.0"  # of diffusers, whose conventions these files follow

# What PyTorch's group norms are divided into, wherever the channels allow it.
_GROUPS = 32


@dataclass(frozen=True)
class Facts:
    """What shapes do not say: the pipeline's name, the pixels it was trained on, the scale of its latents."""

    pipeline: str
    pixels: int
    scaling: float
    index: Mapping[str, Any]


_PLAIN = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}

FACTS: dict[str, Facts] = {
    "SD-v1": Facts("StableDiffusion", 512, 0.18215, _PLAIN),
    "SD-v2": Facts("StableDiffusion", 512, 0.18215, _PLAIN),
    "SD-XL": Facts("StableDiffusionXL", 1024, 0.13025, {"force_zeros_for_empty_prompt": True}),
    "SD-XL-Refiner": Facts(
        "StableDiffusionXL",
        1024,
        0.13025,
        {
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        },
    ),
}

# The kind of pipeline, by the channels that the UNET takes: latents alone, with a picture, with a mask too.
_KINDS = {4: "", 8: "InstructPix2Pix", 9: "Inpaint"}


def configs(
    family: str,
    parts: Mapping[str, Tensors],
    *,
    prediction: Prediction,
    zero_snr: bool = False,
    tokenizers: bool = False,
) -> dict[str, Config]:
    """Every configuration file of a model, by its path in the folder.

    `parts` are the tensors by diffusers' folder and name; `zero_snr`: the noise schedule ends in nothing
    but noise. Without `tokenizers` the folder says that it has none, and a loader asks for them.
    """
    facts = FACTS[family]
    unet = _unet(parts["unet"])
    kind = "Img2Img" if family == "SD-XL-Refiner" else _KINDS.get(unet["in_channels"], "")
    scheduler = _scheduler(facts.pipeline, prediction, zero_snr)
    pixels = 768 if family == "SD-v2" and prediction == "v" else facts.pixels
    vae = _vae(parts["vae"], facts.scaling)
    unet["sample_size"] = pixels >> (len(vae["block_out_channels"]) - 1)
    # SD 2.1 overflows in FP16 without it, and what is no SD 2.1 looks just the same.
    unet["upcast_attention"] = family == "SD-v2"
    made: dict[str, Config] = {
        MODEL_INDEX: {
            "_class_name": f"{facts.pipeline}{kind}Pipeline",
            "_diffusers_version": VERSION,
            **facts.index,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", unet["_class_name"]],
            "vae": ["diffusers", vae["_class_name"]],
        },
        SCHEDULER: scheduler,
        "unet/config.json": unet,
        "vae/config.json": vae | {"sample_size": pixels},
    }
    for part in (p for p in PARTS[family] if p.folder.startswith("text_encoder")):
        folder, tokenizer = part.folder, part.folder.replace("text_encoder", "tokenizer")
        text = _text_encoder(parts[folder], "quick_gelu" if part.rules is CLIP else "gelu")
        made[f"{folder}/config.json"] = text
        made[MODEL_INDEX] |= {
            folder: ["transformers", text["architectures"][0]],
            tokenizer: ["transformers", "CLIPTokenizer"] if tokenizers else [None, None],
        }
        padding = "<|endoftext|>" if part.rules is CLIP else "!"
        for name, config in _tokenizer(padding).items() if tokenizers else ():
            made[f"{tokenizer}/{name}"] = config
    return made


def _unet(tensors: Tensors) -> Config:
    levels = list(_counted(tensors, "down_blocks.{}.resnets.1.conv2.weight"))
    channels = [tensors[name].shape[0] for name in levels]
    attention = [f"down_blocks.{n}.attentions.0" for n in range(len(levels))]
    crossed = [f"{module}.proj_in.weight" in tensors for module in attention]
    depths = [_depth(tensors, module) for module in (*attention, "mid_block.attentions.0")]
    middle = "mid_block.attentions.0"
    linear = len(tensors[f"{middle}.proj_in.weight"].shape) == 2
    added = tensors.get("add_embedding.linear_1.weight")
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        # The number of heads, whatever it is called; where it grows with the channels, a head is 64 wide.
        "attention_head_dim": [max(1, c // 64) for c in channels] if linear else 8,
        "block_out_channels": channels,
        "cross_attention_dim": tensors[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": gcd(_GROUPS, *channels),
        "out_channels": tensors["conv_out.weight"].shape[0],
        # The middle is as deep as the last level is said to be.
        "transformer_layers_per_block": [*(max(1, d) for d in depths[:-2]), depths[-1]],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)],
        "use_linear_projection": linear,
    }
    if added is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added.shape[1],
        }
    return config


def _vae(tensors: Tensors, scaling: float) -> Config:
    levels = list(_counted(tensors, "encoder.down_blocks.{}.resnets.1.conv2.weight"))
    channels = [tensors[name].shape[0] for name in levels]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "layers_per_block": 2,
        "norm_num_groups": gcd(_GROUPS, *channels),
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "scaling_factor": scaling,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _text_encoder(tensors: Tensors, activation: str) -> Config:
    words, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # not the real one: says that the last of a prompt's tokens is the highest
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": len(list(_counted(tensors, "text_model.encoder.layers.{}.layer_norm1.weight"))),
        "pad_token_id": 1,
        "projection_dim": width if projection is None else projection.shape[0],
        "vocab_size": words,
    }


def _scheduler(pipeline: str, prediction: Prediction, zero_snr: bool) -> Config:
    # PNDM is what SD v1 and v2 are published with, but it knows nothing of a schedule rescaled to zero SNR.
    large = pipeline == "StableDiffusionXL"
    name = "EulerDiscreteScheduler" if large else "DDIMScheduler" if zero_snr else "PNDMScheduler"
    config: Config = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if prediction == "v" else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "trained_betas": None,
    }
    if zero_snr:
        config["rescale_betas_zero_snr"] = True
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    if large:
        config |= {"interpolation_type": "linear", "use_karras_sigmas": False}
    return config


def _tokenizer(padding: str) -> dict[str, Config]:
    tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": padding,
        "unk_token": "<|endoftext|>",
    }
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {"tokenizer_config.json": config | tokens, "special_tokens_map.json": dict(tokens)}


def _counted(tensors: Tensors, pattern: str) -> Iterator[str]:
    """The names that a pattern stands for with 0, 1, 2, …, up to the first that is not there."""
    number = 0
    while (name := pattern.format(number)) in tensors:
        yield name
        number += 1


def _depth(tensors: Tensors, module: str) -> int:
    return len(list(_counted(tensors, f"{module}.transformer_blocks.{{}}.norm1.weight")))
