"""What the programs that load a checkpoint need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.base.errors import Place, Problem
from builder.operations.fixes import FIXES


@dataclass(frozen=True)
class Profile:
    """A program: fixes that its loader needs, and what else it makes of the files around a checkpoint.

    `sidecar_for_v`: architectures of which it takes a v-predicting checkpoint for an ordinary one, unless
    a `.yaml` beside it says otherwise. `loads_vae_beside`: it takes `NAME.vae.pt` in place of the VAE
    inside. `reads_markers`: empty tensors such as `v_pred` tell it the kind of model.
    """

    doc: str
    fixes: tuple[str, ...] = ("vae-attention-shape",)
    sidecar_for_v: tuple[str, ...] = ()
    loads_vae_beside: bool = False
    reads_markers: bool = False


PROFILES: dict[str, Profile] = {
    "a1111": Profile(
        "AUTOMATIC1111's webui and Forge",
        sidecar_for_v=("SD-v1",),
        loads_vae_beside=True,
        reads_markers=True,
    ),
    "comfyui": Profile("ComfyUI", reads_markers=True),
    "kohya": Profile("kohya's sd-scripts", fixes=("vae-attention-shape", "position-ids-present")),
    "diffusers": Profile(
        "the single-file loader of diffusers", fixes=("vae-attention-shape", "position-ids-absent")
    ),
}


def with_profile(fixes: Sequence[str], profile: str | None) -> tuple[str, ...]:
    """The fixes of an output and of its profile, in the registry's order; the output's own win."""
    if profile is None:
        return tuple(fixes)
    refused = {other for name in fixes for other in FIXES[name].excludes}
    added = {name for name in PROFILES[profile].fixes if name not in refused}
    return tuple(name for name in FIXES if name in added or name in fixes)


def sidecar(profile: str | None, architecture: str, markers: Sequence[str]) -> str | None:
    """The `.yaml` that must lie beside a checkpoint for the program to load it right, or None."""
    if profile is None or "v_pred" not in markers:
        return None
    return SD_V1_V if architecture in PROFILES[profile].sidecar_for_v else None


def warnings(profile: str | None, markers: Sequence[str], target: Path) -> list[Problem]:
    """What a person should know of a checkpoint at `target` before the program loads it."""
    if profile is None:
        return []
    program = PROFILES[profile]
    found = []
    beside = target.with_name(f"{target.stem}.vae.pt")
    if program.loads_vae_beside and beside.exists():
        found.append(
            Problem(
                f"`{beside.name}` overrides the VAE inside `{target.name}`",
                Place(str(beside)),
                (f"{program.doc} loads it by its name",),
                "move it away, or give the output another name",
            )
        )
    if markers and not program.reads_markers:
        found.append(
            Problem(
                f"{program.doc} does not look for {', '.join(f'`{m}`' for m in markers)}",
                Place(str(target)),
                hint="tell it by its own settings what kind of model this is",
            )
        )
    return found


# The configuration of SD v1 in the form that its first loader reads, with v-prediction.
SD_V1_V = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: v
    linear_start: 0.00085
    linear_end: 0.012
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: true
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""
