"""What the programs that load a checkpoint need of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.base.errors import CatalogError, Place, Problem
from builder.base.files import read_bounded
from builder.models.catalog import Architecture
from builder.models.prediction import Prediction
from builder.operations.fixes import FIXES

CONFIG = ".yaml"  # ends the name of a configuration, which is else that of the file beside it
MAX_SIDECAR = 1 << 20  # bytes; a configuration has some thousands
MAX_VOCABULARY = 64 << 20  # bytes; that of CLIP is 1.4 MB, that of Gemma 34 MB


@dataclass(frozen=True)
class Profile:
    """A program: fixes that its loader needs, and what else it makes of the files around a checkpoint.

    `loads_vae_beside`: it takes `NAME.vae.pt` in place of the VAE inside. `told` is how it is told what a
    model predicts, where nothing in the file does.
    """

    doc: str
    told: str
    fixes: tuple[str, ...] = ("vae-attention-shape",)
    loads_vae_beside: bool = False


PROFILES: dict[str, Profile] = {
    "a1111": Profile(
        "AUTOMATIC1111's webui and Forge",
        "a `.yaml` beside the model says it, as `config` puts one there; zero terminal SNR is a setting, the "
        "noise schedule for sampling",
        loads_vae_beside=True,
    ),
    "comfyui": Profile("ComfyUI", "the node ModelSamplingDiscrete says it"),
    "kohya": Profile(
        "kohya's sd-scripts",
        "`--v_parameterization` and `--zero_terminal_snr` say it",
        fixes=("vae-attention-shape", "position-ids-present"),
    ),
    "diffusers": Profile(
        "the single-file loader of diffusers",
        "the scheduler's `prediction_type` and `rescale_betas_zero_snr` say it",
        fixes=("vae-attention-shape", "position-ids-absent"),
    ),
}


def with_profile(fixes: Sequence[str], profile: str | None) -> tuple[str, ...]:
    """The fixes of an output and of its profile, in the registry's order; the output's own win."""
    if profile is None:
        return tuple(fixes)
    refused = {other for name in fixes for other in FIXES[name].excludes}
    added = {name for name in PROFILES[profile].fixes if name not in refused}
    return tuple(name for name in FIXES if name in added or name in fixes)


def sidecar(profile: str | None, architecture: Architecture, told: Prediction) -> bytes | None:
    """The `.yaml` that must lie beside a checkpoint for the program to load it right, or None.

    Raises CatalogError when the catalog's file cannot be read.
    """
    file = architecture.sidecars_v.get(profile or "") if told.kind == "v" else None
    try:
        return read_bounded(file, MAX_SIDECAR) if file is not None else None
    except OSError as error:
        fact = f"cannot read `{file}`, which goes beside a model"
        raise CatalogError(Problem(fact, evidence=(str(error.strerror),))) from None


def warnings(
    profile: str | None, architecture: Architecture, told: Prediction, beside: bytes | None, target: Path
) -> Iterator[Problem]:
    """What a person should know of a checkpoint at `target` before the program loads it.

    `told` is what it predicts, `beside` the configuration that lies beside it.
    """
    if profile is None:
        return
    program, place = PROFILES[profile], Place(str(target))
    other = target.with_name(f"{target.stem}.vae.pt")
    if program.loads_vae_beside and other.exists():
        yield Problem(
            f"`{other.name}` overrides the VAE inside `{target.name}`",
            Place(str(other)),
            (f"{program.doc} loads it by its name",),
            "move it away, or give the output another name",
        )
    if profile in architecture.reads_markers:
        if told.kind == "v" and not told.markers:
            fact = f"nothing in `{target.name}` tells {program.doc} that it predicts v"
            yield Problem(fact, place, hint='`markers = ["v_pred"]` under [output] does')
        return
    known = "v_pred" if profile in architecture.tells_v or beside is not None else None
    if unread := [f"`{name}`" for name in told.names if name != known]:
        fact = f"{program.doc} does not look for {', '.join(unread)} in `{architecture.name}`"
        yield Problem(fact, place, hint=program.told)
