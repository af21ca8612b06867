"""What the programs that load a checkpoint need of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.models.prediction import Prediction, prediction
from builder.operations.fixes import FIXES
from builder.recipe.profiles import PROFILES, sidecar, warnings, with_profile
from tests.help.building import IDS, RECIPE, Folder, catalog, content

CATALOG = catalog()


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


V = prediction({}, {"modelspec.prediction_type": "v"}, CATALOG)


@pytest.mark.parametrize(("name", "says"), [("SD-v1", b"parameterization: v\n"), ("SD-XL", b".VScaling\n")])
def test_v_prediction_needs_a_sidecar_where_the_webui_does_not_see_it(name: str, says: bytes) -> None:
    architecture = CATALOG.architectures[name]
    made = sidecar("a1111", architecture, V)
    assert made is not None and says in made
    assert sidecar("a1111", architecture, Prediction()) is None
    assert sidecar("comfyui", architecture, V) is None
    assert sidecar(None, architecture, V) is None
    assert sidecar("a1111", CATALOG.architectures["SD-v2"], V) is None, "which it tells by the weights"


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


def told(name: str, profile: str, *markers: str, beside: bytes | None = None) -> list[str]:
    held = Prediction().with_own(markers, {}, CATALOG)
    found = warnings(profile, CATALOG.architectures[name], held, beside, Path("m.safetensors"))
    return [problem.fact for problem in found]


def test_markers_that_a_program_does_not_read_are_told() -> None:
    both = "v_pred", "ztsnr"
    assert told("SD-XL", "comfyui", *both) == []
    assert told("SD-v1", "comfyui", *both) == ["ComfyUI does not look for `v_pred`, `ztsnr` in `SD-v1`"]
    assert told("SD-v2", "comfyui", *both) == ["ComfyUI does not look for `ztsnr` in `SD-v2`"]
    webui = "AUTOMATIC1111's webui and Forge does not look for"
    assert told("SD-XL", "a1111", *both) == [f"{webui} `v_pred`, `ztsnr` in `SD-XL`"]
    assert told("SD-XL", "a1111", *both, beside=b"") == [f"{webui} `ztsnr` in `SD-XL`"]
    assert told("SD-XL", "a1111", "v_pred", beside=b"") == []
    assert len(told("SD-XL", "kohya", "v_pred")) == len(told("SD-XL", "diffusers", "v_pred")) == 1


def test_what_is_known_to_predict_v_and_has_no_marker_is_told() -> None:
    found = list(warnings("comfyui", CATALOG.architectures["SD-XL"], V, None, Path("m.safetensors")))
    assert [p.fact for p in found] == ["nothing in `m.safetensors` tells ComfyUI that it predicts v"]
    assert found[0].hint == '`markers = ["v_pred"]` under [output] does'


def test_a_build_warns_and_has_the_program_told(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE + 'output.profile = "kohya"\noutput.markers = ["v_pred"]\n')
    said = folder("build", "tiny.toml")
    assert said.code == 0 and "does not look for `v_pred` in `SD-tiny`" in said.err
    assert "`--v_parameterization`" in said.err
