"""What the programs that load a checkpoint need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.base.errors import CatalogError, Place, Problem
from builder.base.files import read_bounded
from builder.models.catalog import Architecture
from builder.operations.fixes import FIXES

MAX_SIDECAR = 1 << 20  # bytes; a configuration has some thousands


@dataclass(frozen=True)
class Profile:
    """A program: fixes that its loader needs, and what else it makes of the files around a checkpoint.

    `loads_vae_beside`: it takes `NAME.vae.pt` in place of the VAE
    inside. `reads_markers`: empty tensors such as `v_pred` tell it the kind of model.
    """

    doc: str
    fixes: tuple[str, ...] = ("vae-attention-shape",)
    loads_vae_beside: bool = False
    reads_markers: bool = False


PROFILES: dict[str, Profile] = {
    "a1111": Profile(
        "AUTOMATIC1111's webui and Forge",
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


def sidecar(profile: str | None, architecture: Architecture, markers: Sequence[str]) -> bytes | None:
    """The `.yaml` that must lie beside a checkpoint for the program to load it right, or None.

    Raises CatalogError when the catalog's file cannot be read.
    """
    file = architecture.sidecars_v.get(profile or "") if "v_pred" in markers else None
    try:
        return read_bounded(file, MAX_SIDECAR) if file is not None else None
    except OSError as error:
        fact = f"cannot read `{file}`, which goes beside a model"
        raise CatalogError(Problem(fact, evidence=(str(error.strerror),))) from None


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
