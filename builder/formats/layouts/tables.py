"""What is called how: the parts of Stable Diffusion in the original files and in diffusers' folders."""

from __future__ import annotations

from builder.formats.layouts.rules import Part, Rule, Rules

# Two patterns of a rule stand for equally many modules (or tensors), paired in order; what follows in a
# name is the same in both layouts.

_RESNET = (
    "{in_layers.0,in_layers.2,out_layers.0,out_layers.3,emb_layers.1,skip_connection}",
    "{norm1,conv1,norm2,conv2,time_emb_proj,conv_shortcut}",
)


def _unet(levels: int, upsamplers: Rule) -> Rules:
    """A denoiser of 3 or 4 levels; two resnets a level on the way down, three on the way up."""
    top = levels - 1
    down = "{" + ",".join(str(3 * level + n) for level in range(levels) for n in (1, 2)) + "}"
    middle = "{" + ",".join(str(3 * level) for level in range(1, levels)) + "}"
    return Rules(
        Rule("time_embed.{0,2}", "time_embedding.linear_{1,2}"),
        Rule("label_emb.0.{0,2}", "add_embedding.linear_{1,2}"),
        Rule("input_blocks.0.0", "conv_in"),
        Rule("out.{0,2}", "conv_{norm_,}out"),
        Rule(
            f"input_blocks.{down}.0.{_RESNET[0]}",
            f"down_blocks.{{0..{top}}}.resnets.{{0,1}}.{_RESNET[1]}",
        ),
        Rule(f"input_blocks.{down}.1", f"down_blocks.{{0..{top}}}.attentions.{{0,1}}"),
        Rule(f"input_blocks.{middle}.0.op", f"down_blocks.{{0..{top - 1}}}.downsamplers.0.conv"),
        Rule(f"middle_block.{{0,2}}.{_RESNET[0]}", f"mid_block.resnets.{{0,1}}.{_RESNET[1]}"),
        Rule("middle_block.1", "mid_block.attentions.0"),
        Rule(
            f"output_blocks.{{0..{3 * top + 2}}}.0.{_RESNET[0]}",
            f"up_blocks.{{0..{top}}}.resnets.{{0..2}}.{_RESNET[1]}",
        ),
        Rule(f"output_blocks.{{0..{3 * top + 2}}}.1", f"up_blocks.{{0..{top}}}.attentions.{{0..2}}"),
        upsamplers,
    )


# The way up begins without attention where there are four levels, so its upsampler comes second there.
UNET = _unet(4, Rule("output_blocks.{2.1,5.2,8.2}.conv", "up_blocks.{0..2}.upsamplers.0.conv"))
UNET_XL = _unet(3, Rule("output_blocks.{2,5}.2.conv", "up_blocks.{0,1}.upsamplers.0.conv"))

_MID = "{encoder,decoder}.mid.attn_1", "{encoder,decoder}.mid_block.attentions.0"

VAE = Rules(
    Rule(
        "{encoder,decoder}.{conv_in,conv_out,norm_out}", "{encoder,decoder}.{conv_in,conv_out,conv_norm_out}"
    ),
    Rule("{,post_}quant_conv", "{,post_}quant_conv"),
    Rule(
        "encoder.down.{0..3}.block.{0,1}.{norm1,conv1,norm2,conv2,nin_shortcut}",
        "encoder.down_blocks.{0..3}.resnets.{0,1}.{norm1,conv1,norm2,conv2,conv_shortcut}",
    ),
    Rule("encoder.down.{0..2}.downsample.conv", "encoder.down_blocks.{0..2}.downsamplers.0.conv"),
    Rule("{encoder,decoder}.mid.block_{1,2}", "{encoder,decoder}.mid_block.resnets.{0,1}"),
    Rule(f"{_MID[0]}.norm", f"{_MID[1]}.group_norm"),
    Rule(f"{_MID[0]}.{{q,k,v,proj_out}}", f"{_MID[1]}.{{to_q,to_k,to_v,to_out.0}}", "linear"),
    # The original counts its levels from the full size on both ways, diffusers in the order of use.
    Rule(
        "decoder.up.{3,2,1,0}.block.{0..2}.{norm1,conv1,norm2,conv2,nin_shortcut}",
        "decoder.up_blocks.{0..3}.resnets.{0..2}.{norm1,conv1,norm2,conv2,conv_shortcut}",
    ),
    Rule("decoder.up.{3,2,1}.upsample.conv", "decoder.up_blocks.{0..2}.upsamplers.0.conv"),
    # As diffusers before 0.15 calls them.
    read_also=(Rule(f"{_MID[0]}.{{q,k,v,proj_out}}", f"{_MID[1]}.{{query,key,value,proj_attn}}", "linear"),),
)

CLIP = Rules(Rule("text_model", "text_model"), without=("text_model.embeddings.position_ids",))


def _open_clip(layers: int, *more: Rule) -> Rules:
    """OpenCLIP's text encoder, whose attention has one matrix for queries, keys and values."""
    block, layer = (
        f"transformer.resblocks.{{0..{layers - 1}}}",
        f"text_model.encoder.layers.{{0..{layers - 1}}}",
    )
    return Rules(
        Rule("token_embedding", "text_model.embeddings.token_embedding"),
        Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule(f"{block}.ln_{{1,2}}", f"{layer}.layer_norm{{1,2}}"),
        Rule(f"{block}.attn.in_proj_{{weight,bias}}", f"{layer}.self_attn.*_proj.{{weight,bias}}", "qkv"),
        Rule(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj"),
        Rule(f"{block}.mlp.{{c_fc,c_proj}}", f"{layer}.mlp.{{fc1,fc2}}"),
        Rule("ln_final", "text_model.final_layer_norm"),
        *more,
    )


# SD v2 takes the text from the last layer but one; diffusers leaves the last away.
OPEN_CLIP_H = _open_clip(23)
OPEN_CLIP_G = _open_clip(32, Rule("text_projection", "text_projection.weight", "transpose"))

_UNET = Part("unet", "model.diffusion_model.", UNET)
_VAE = Part("vae", "first_stage_model.", VAE)

# The parts of a model: diffusers' folder, the prefix in a full checkpoint, and the names within.
PARTS: dict[str, tuple[Part, ...]] = {
    "SD-v1": (_UNET, _VAE, Part("text_encoder", "cond_stage_model.transformer.", CLIP)),
    "SD-v2": (_UNET, _VAE, Part("text_encoder", "cond_stage_model.model.", OPEN_CLIP_H)),
    "SD-XL": (
        Part("unet", "model.diffusion_model.", UNET_XL),
        _VAE,
        Part("text_encoder", "conditioner.embedders.0.transformer.", CLIP),
        Part("text_encoder_2", "conditioner.embedders.1.model.", OPEN_CLIP_G),
    ),
    "SD-XL-Refiner": (_UNET, _VAE, Part("text_encoder_2", "conditioner.embedders.0.model.", OPEN_CLIP_G)),
}
