"""The configuration files of a folder in diffusers' layout, from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from math import gcd, isqrt
from typing import Any, Literal

from builder.base.errors import CatalogError, Problem
from builder.formats.layouts import Layout, Part, Tensors

Prediction = Literal["epsilon", "v"]
Config = dict[str, Any]

MODEL_INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VERSION = "0.30.0"  # of diffusers, whose conventions these files follow

# What PyTorch's group norms are divided into, wherever the channels allow it.
_GROUPS = 32


def configs(
    layout: Layout,
    parts: Mapping[str, Tensors],
    *,
    prediction: Prediction,
    zero_snr: bool = False,
    tokenizers: Collection[str] = (),
) -> dict[str, Config]:
    """Every configuration file of a model, by its path in the folder.

    `parts` are the tensors by diffusers' folder and name; `zero_snr`: the noise schedule ends in nothing
    but noise. Of other tokenizers than `tokenizers` the folder says that it has none: a loader asks for them.
    """
    pixels = (layout.pixels_v if prediction == "v" else None) or layout.pixels
    said = {**layout.scheduler, **(layout.zero_snr if zero_snr else layout.plain)}
    held = [f"{folder}/{name}" for folder, tensors in parts.items() for name in tensors]
    for start, more in layout.unless.items():
        said |= {} if any(name.startswith(start) for name in held) else more
    scheduler: Config = {"_diffusers_version": VERSION, **said}
    if "beta_schedule" in said:  # of flow matching there is no other kind
        kind = "v_prediction" if prediction == "v" else "epsilon"
        scheduler = {"prediction_type": kind, "trained_betas": None, **scheduler}
    index: Config = {
        "_diffusers_version": VERSION,
        **layout.index,
        **{name: [None, None] for name in layout.absent},
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    made: dict[str, Config] = {MODEL_INDEX: index, SCHEDULER: scheduler}
    for part in layout.parts:
        here = bool(parts[part.folder])
        index[part.folder] = [part.library, part.model] if here else [None, None]
        if here:
            made[f"{part.folder}/config.json"] = _part(part, parts[part.folder])
        if part.tokenizer is not None:
            words = part.tokenizer in tokenizers
            index[part.tokenizer] = ["transformers", part.tokenizer_model] if words else [None, None]
            for name, config in _tokenizer(part.padding).items() if words and part.padding else ():
                made[f"{part.tokenizer}/{name}"] = config
    first = made.get(f"{layout.parts[0].folder}/config.json", {})
    index["_class_name"] = layout.pipelines.get(str(first.get("in_channels")), layout.pipeline)
    if pixels is not None:
        latents = pixels
        if (vae := made.get("vae/config.json")) is not None:
            vae["sample_size"] = pixels
            latents = pixels >> (len(vae.get("block_out_channels", [0])) - 1)
        if (unet := made.get("unet/config.json")) is not None:
            unet["sample_size"] = latents
    return made


def _part(part: Part, tensors: Tensors) -> Config:
    try:
        derived = SHAPES[part.model][1](tensors) if part.model in SHAPES else {}
        for key, said in part.sizes.items():
            if (size := _size(tensors, said)) is not None:
                _put(derived, key, size)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        fact = f"what the layout puts into `{part.folder}` is no `{part.model}`"
        raise CatalogError(Problem(fact, evidence=(f"it lacks {error}",))) from None
    for key, value in part.config.items():
        _put(derived, key, value)
    if part.library == "transformers":
        return {"architectures": [part.model], **derived}
    return {"_class_name": part.model, "_diffusers_version": VERSION, **derived}


def _put(config: Config, key: str, value: Any) -> None:
    """Set an entry, which may be inside of others."""
    *outer, last = key.split(".")
    for word in outer:
        config = config.setdefault(word, {})
    config[last] = value


# What shapes tell: an extent, over another or a number; how many modules are numbered; and so on.
_EXTENT = r"(\S+)\[(\d)\]"
_SIZE = re.compile(rf"(if )?{_EXTENT}(?: / (?:{_EXTENT}|([1-9]\d{{0,5}})))?|(count|has|numbers|root) (\S+)")


def is_size(said: str) -> bool:
    """Whether words tell a size by the shapes of tensors."""
    return _SIZE.fullmatch(said) is not None


def _size(tensors: Tensors, said: str) -> int | bool | list[int] | None:
    """What words tell: `NAME[DIM]`, an extent, also `/` another or a number; the same with `if`, None where
    there is no such tensor; `root NAME`, that of the places which a table along its second dimension has;
    `count MODULE`, how many there are; `numbers MODULE.*.INNER`, which of them have something inside;
    `has MODULE`.
    """
    match = _SIZE.fullmatch(said)
    assert match is not None
    maybe, name, dim, over, its_dim, number, word, module = match.groups()
    if maybe is not None and name not in tensors:
        return None
    if name is not None:
        below = tensors[over].shape[int(its_dim)] if over is not None else int(number or 1)
        return tensors[name].shape[int(dim)] // below
    if word == "root":
        return isqrt(tensors[module].shape[1])
    if word == "has":
        return any(name.startswith(f"{module}.") for name in tensors)
    head, _, inner = module.partition(".*.")
    inside = (n.removeprefix(f"{head}.").split(".", 1) for n in tensors if n.startswith(f"{head}."))
    found = {int(number) for number, rest in inside if number.isdecimal() and rest.startswith(inner)}
    return sorted(found) if word == "numbers" else len(found)


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


def _vae(tensors: Tensors) -> Config:
    levels = list(_counted(tensors, "encoder.down_blocks.{}.resnets.1.conv2.weight"))
    channels = [tensors[name].shape[0] for name in levels]
    return {
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "layers_per_block": 2,
        "norm_num_groups": gcd(_GROUPS, *channels),
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        **{f"use_{n}": False for n in ("quant_conv", "post_quant_conv") if f"{n}.weight" not in tensors},
    }


def _text_encoder(tensors: Tensors) -> Config:
    words, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # not the real one: says that the last of a prompt's tokens is the highest
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


# Classes by name: their library, and what of their configuration shapes tell.
SHAPES: dict[str, tuple[str, Callable[[Tensors], Config]]] = {
    "UNet2DConditionModel": ("diffusers", _unet),
    "AutoencoderKL": ("diffusers", _vae),
    "AutoencoderKLFlux2": ("diffusers", _vae),
    "CLIPTextModel": ("transformers", _text_encoder),
    "CLIPTextModelWithProjection": ("transformers", _text_encoder),
}
