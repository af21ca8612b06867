"""What the programs that load a checkpoint need of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.operations.fixes import FIXES
from builder.recipe.profiles import PROFILES, sidecar, with_profile
from tests.help.building import IDS, RECIPE, Folder, catalog, content

CATALOG = catalog()
SD_V1 = CATALOG.architectures["SD-v1"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.mark.parametrize("name", PROFILES)
def test_fixes_of_a_profile_are_known_and_no_contradiction(name: str) -> None:
    fixes = with_profile((), name)
    assert set(fixes) == set(PROFILES[name].fixes)
    assert not any(other in fixes for fix in fixes for other in FIXES[fix].excludes)


def test_a_recipes_own_fix_wins_over_its_profile() -> None:
    assert "position-ids-present" not in with_profile(("position-ids-absent",), "kohya")
    assert with_profile(("clip-position-ids",), None) == ("clip-position-ids",)


def test_position_ids_are_there_for_programs_that_insist_and_not_for_those_that_mind(folder: Folder) -> None:
    held = {}
    for profile in PROFILES:
        folder.write(
            "tiny.toml", RECIPE + f'output.profile = "{profile}"\noutput.file = "{profile}.safetensors"\n'
        )
        assert folder("build", "tiny.toml").code == 0
        held[profile] = IDS in content(folder / f"{profile}.safetensors")
    assert held == {"a1111": True, "comfyui": True, "kohya": True, "diffusers": False}


def test_only_sd_v1_with_v_prediction_needs_a_sidecar() -> None:
    made = sidecar("a1111", SD_V1, ["v_pred"])
    assert made is not None and b"parameterization: v\n" in made
    assert sidecar("a1111", SD_V1, []) is None
    assert sidecar("a1111", CATALOG.architectures["SD-XL"], ["v_pred"]) is None
    assert sidecar("comfyui", SD_V1, ["v_pred"]) is None
    assert sidecar(None, SD_V1, ["v_pred"]) is None


def test_a_config_is_copied_beside_the_output(folder: Folder) -> None:
    folder.write("v.yaml", "model: {}\n")
    folder.write("tiny.toml", RECIPE + 'output.config = "v.yaml"\n')
    assert folder("build", "tiny.toml").code == 0
    assert (folder / "tiny.yaml").read_text() == "model: {}\n"


def test_a_config_that_is_not_there_is_an_error_of_the_recipe(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE + 'output.config = "v.yaml"\n')
    said = folder("build", "tiny.toml")
    assert said.code == 3
    assert "cannot read `v.yaml`" in said.err and "tiny.toml:8:" in said.err
    assert not (folder / "tiny.safetensors").exists()


def test_a_vae_beside_the_output_that_would_override_it_is_told(folder: Folder) -> None:
    (folder / "tiny.vae.pt").write_bytes(b"")
    folder.write("tiny.toml", RECIPE + 'output.profile = "a1111"\n')
    said = folder("build", "tiny.toml")
    assert said.code == 0 and "`tiny.vae.pt` overrides the VAE inside `tiny.safetensors`" in said.err
    folder.write("tiny.toml", RECIPE + 'output.profile = "comfyui"\n')
    assert "overrides" not in folder("build", "tiny.toml").err


def test_markers_that_a_program_does_not_read_are_told(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE + 'output.profile = "kohya"\noutput.markers = ["v_pred"]\n')
    said = folder("build", "tiny.toml")
    assert said.code == 0 and "does not look for `v_pred`" in said.err
