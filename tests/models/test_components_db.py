"""What the built-in catalog declares is exactly what is in the world's checkpoints."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import pytest

from builder.base.errors import UsageError
from builder.models.catalog import Catalog, Component, load_catalog
from builder.models.catalog.tables import NAMINGS
from builder.models.prediction import MARKERS

GOLDEN = Path(__file__).parent / "golden"
TABLES = {
    name: (int(keys), digest)
    for name, keys, digest in (
        line.split() for line in (GOLDEN / "tables.txt").read_text().splitlines() if line[0] != "#"
    )
}
# What files hold of a table that is computed, not learnt, and so is not pinned.
BUFFERS = ".pos_encoder.pe"
CATALOG = load_catalog(())


def test_every_component_is_pinned() -> None:
    assert sorted(CATALOG.components) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_expansion_is_exactly_the_table(name: str) -> None:
    component = CATALOG.components[name]
    assert component.keys == len(component.tensors)
    rules = {n: rule for n, rule in component.tensors.items() if not n.endswith(BUFFERS)}
    lines = sorted(f"{n} {list(rule.shape)}\n" for n, rule in rules.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == TABLES[name]


# class and prefix, as full checkpoints have them
PLACES = {
    "UNET-v1-SD": ("UNET-v1", "model.diffusion_model."),
    "UNET-v1-Inpainting": ("UNET-v1", "model.diffusion_model."),
    "UNET-v1-EMA": ("EMA-UNET-v1", "model_ema.diffusion_model"),
    "UNET-v1-Pix2Pix": ("UNET-v1-Pix2Pix", "model.diffusion_model."),
    "UNET-v1-Pix2Pix-EMA": ("EMA-UNET-v1-Pix2Pix", "model_ema.diffusion_model"),
    "UNET-v2-SD": ("UNET-v2", "model.diffusion_model."),
    "UNET-v2-Inpainting": ("UNET-v2", "model.diffusion_model."),
    "UNET-v2-Depth": ("UNET-v2-Depth", "model.diffusion_model."),
    "UNET-XL-SD": ("UNET-XL", "model.diffusion_model."),
    "UNET-XL-Inpainting": ("UNET-XL", "model.diffusion_model."),
    "UNET-XL-Pix2Pix": ("UNET-XL-Pix2Pix", "model.diffusion_model."),
    "UNET-XL-Refiner": ("UNET-XL-Refiner", "model.diffusion_model."),
    "VAE-v1-SD": ("VAE-v1", "first_stage_model."),
    "CLIP-v1-SD": ("CLIP-v1", "cond_stage_model.transformer.text_model."),
    "CLIP-v1-NAI": ("CLIP-v1", "cond_stage_model.transformer."),
    "CLIP-v2-SD": ("CLIP-v2", "cond_stage_model.model."),
    "CLIP-v2-WD": ("CLIP-v2", "cond_stage_model.model."),
    "CLIP-XL-SD": ("CLIP-XL", "conditioner.embedders.1.model."),
    "CLIP-XL-Refiner": ("CLIP-XL", "conditioner.embedders.0.model."),
    "CLIP-XL-AUX-SD": ("CLIP-XL-AUX", "conditioner.embedders.0.transformer.text_model."),
    "Depth-v2-SD": ("Depth-v2", "depth_model.model."),
    "ControlNet-v1-SD": ("ControlNet-v1", "control_model."),
    "LoRA-v1-UNET": ("LoRA-v1-UNET", ""),
    "LoRA-v1A-UNET": ("LoRA-v1-UNET", ""),
    "LoRA-v1-CLIP": ("LoRA-v1-CLIP", ""),
    "LoRA-v1A-CLIP": ("LoRA-v1-CLIP", ""),
    "MMDIT-v3-SD": ("MMDIT-v3", "model.diffusion_model."),
    "VAE-v3-SD": ("VAE-v3", "first_stage_model."),
    "CLIP-L-v3": ("CLIP-L-v3", "text_encoders.clip_l."),
    "CLIP-G-v3": ("CLIP-G-v3", "text_encoders.clip_g."),
    "T5-XXL-v3": ("T5-XXL", "text_encoders.t5xxl."),
    "DIT-FLUX-dev": ("DIT-FLUX", "model.diffusion_model."),
    "VAE-FLUX": ("VAE-v3", "vae."),
    "CLIP-L-FLUX": ("CLIP-L-FLUX", "text_encoders.clip_l.transformer.text_model."),
    "T5-XXL-FLUX": ("T5-XXL-FLUX", "text_encoders.t5xxl.transformer."),
    "UNET-XL-SSD1B": ("UNET-XL-SSD1B", "model.diffusion_model."),
    "UNET-XL-Vega": ("UNET-XL-Vega", "model.diffusion_model."),
    "UNET-XL-KOALA-1B": ("UNET-XL-KOALA-1B", "model.diffusion_model."),
    "UNET-XL-KOALA-700M": ("UNET-XL-KOALA-700M", "model.diffusion_model."),
    "ControlNet-XL-diffusers": ("ControlNet-XL", ""),
    "ControlNet-XL-Union-diffusers": ("ControlNet-XL-Union", ""),
    "ControlNet-XL-UnionPromax-diffusers": ("ControlNet-XL-Union", ""),
    "T2IAdapter-v1-64": ("T2IAdapter-v1", ""),
    "T2IAdapter-v1-192": ("T2IAdapter-v1", ""),
    "T2IAdapter-v1-color-light": ("T2IAdapter-v1-light", ""),
    "T2IAdapter-XL-256": ("T2IAdapter-XL", ""),
    "T2IAdapter-XL-768": ("T2IAdapter-XL", ""),
    "AnimateDiff-v1": ("AnimateDiff", ""),
    "AnimateDiff-v2": ("AnimateDiff", ""),
    "AnimateDiff-v3": ("AnimateDiff", ""),
    "AnimateDiff-XL-beta": ("AnimateDiff-XL", ""),
    "LoRA-XL-UNET": ("LoRA-XL-UNET", ""),
    "LoRA-XLA-UNET": ("LoRA-XL-UNET", ""),
    "LoRA-XL-UNET-conv": ("LoRA-XL-UNET", ""),
    "LoRA-XLA-UNET-conv": ("LoRA-XL-UNET", ""),
    "LoRA-XL-CLIP": ("LoRA-XL-CLIP", ""),
    "LoRA-XLA-CLIP": ("LoRA-XL-CLIP", ""),
    "UNET-SVD": ("UNET-SVD", "model.diffusion_model."),
    "VAE-SVD": ("VAE-SVD", "first_stage_model."),
    "MMDIT-v35-Large": ("MMDIT-v35-Large", "model.diffusion_model."),
    "MMDIT-v35-Medium": ("MMDIT-v35-Medium", "model.diffusion_model."),
    "DIT-FLUX-schnell": ("DIT-FLUX", "model.diffusion_model."),
    "DIT-FLUX-Fill": ("DIT-FLUX", "model.diffusion_model."),
    "DIT-FLUX-Control": ("DIT-FLUX", "model.diffusion_model."),
    "DIT-Chroma": ("DIT-Chroma", "model.diffusion_model."),
    "DIT-FLUX2-dev": ("DIT-FLUX2", "model.diffusion_model."),
    "DIT-FLUX2-Klein-9B": ("DIT-FLUX2-Klein-9B", "model.diffusion_model."),
    "DIT-FLUX2-Klein-4B": ("DIT-FLUX2-Klein-4B", "model.diffusion_model."),
    "VAE-FLUX2": ("VAE-FLUX2", "vae."),
    "VAE-FLUX2-Comfy": ("VAE-FLUX2", "vae."),
    "DIT-FLUX3-Klein": ("DIT-FLUX3-Klein", "model.diffusion_model."),
    "DIT-FLUX3-Klein-base": ("DIT-FLUX3-Klein", "model.diffusion_model."),
    "DIT-QwenImage": ("DIT-QwenImage", "model.diffusion_model."),
    "DIT-QwenImage-Layered": ("DIT-QwenImage", "model.diffusion_model."),
    "DIT-QwenImage21": ("DIT-QwenImage21", "model.diffusion_model."),
    "DIT-QwenImage21-diffusers": ("DIT-QwenImage21-diffusers", "model.diffusion_model."),
    "DIT-ZImage": ("DIT-ZImage", "model.diffusion_model."),
    "DIT-Lumina2": ("DIT-Lumina2", "model.diffusion_model."),
    "DIT-Anima": ("DIT-Anima", "model.diffusion_model."),
    "DIT-Krea2": ("DIT-Krea2", "model.diffusion_model."),
    "DIT-Wan21-T2V-14B": ("DIT-Wan-14B", "model.diffusion_model."),
    "DIT-Wan22-I2V-A14B": ("DIT-Wan-14B", "model.diffusion_model."),
    "DIT-Wan21-I2V-14B": ("DIT-Wan-14B", "model.diffusion_model."),
    "DIT-Wan21-T2V-1.3B": ("DIT-Wan-1B", "model.diffusion_model."),
    "DIT-Wan22-TI2V-5B": ("DIT-Wan-5B", "model.diffusion_model."),
    "VAE-Wan21": ("VAE-Wan21", "vae."),
    "VAE-Wan22": ("VAE-Wan22", "vae."),
    "T5-UMT5-XXL": ("T5-UMT5-XXL", "text_encoders."),
    "LLM-Gemma2-2B": ("LLM-Gemma2-2B", "text_encoders."),
    "LLM-Gemma3-4B": ("LLM-Gemma3-4B", "text_encoders.gemma3_4b."),
    "LLM-Qwen25VL-7B": ("LLM-Qwen25VL-7B", "text_encoders.qwen25_7b."),
    "LLM-Qwen3-06B": ("LLM-Qwen3-06B", "text_encoders.qwen3_06b."),
    "LLM-Qwen3-4B": ("LLM-Qwen3-4B", "text_encoders.qwen3_4b."),
    "LLM-Qwen3-8B": ("LLM-Qwen3-8B", "text_encoders.qwen3_8b."),
    "UNET-mini-SD": ("UNET-mini", "model.diffusion_model."),
    "UNET-mini-EMA": ("EMA-UNET-mini", "model_ema.diffusion_model"),
    "VAE-mini-SD": ("VAE-mini", "first_stage_model."),
    "CLIP-mini-SD": ("CLIP-mini", "cond_stage_model.transformer.text_model."),
    "CLIP-mini-NAI": ("CLIP-mini", "cond_stage_model.transformer."),
}

# what each slot is written with
ARCHITECTURES = {
    "SD-v1": ["UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD"],
    "SD-v1-Pix2Pix": ["UNET-v1-Pix2Pix", "VAE-v1-SD", "CLIP-v1-SD"],
    "SD-v1-ControlNet": ["UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD", "ControlNet-v1-SD"],
    "SD-v2": ["UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-SD"],
    "SD-v2-Depth": ["UNET-v2-Depth", "VAE-v1-SD", "CLIP-v2-SD", "Depth-v2-SD"],
    "SD-XL": ["UNET-XL-SD", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SD-XL-Pix2Pix": ["UNET-XL-Pix2Pix", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SD-XL-Refiner": ["UNET-XL-Refiner", "VAE-v1-SD", "CLIP-XL-Refiner"],
    "SD-v3": ["MMDIT-v3-SD", "VAE-v3-SD", "CLIP-L-v3", "CLIP-G-v3", "T5-XXL-v3"],
    "FLUX": ["DIT-FLUX-dev", "VAE-FLUX", "CLIP-L-FLUX", "T5-XXL-FLUX"],
    "Qwen-Image": ["DIT-QwenImage", "VAE-Wan21", "LLM-Qwen25VL-7B"],
    "Qwen-Image-2.1": ["DIT-QwenImage21"],
    "Z-Image": ["DIT-ZImage", "VAE-FLUX", "LLM-Qwen3-4B"],
    "Lumina-2": ["DIT-Lumina2", "VAE-FLUX", "LLM-Gemma2-2B"],
    "Anima": ["DIT-Anima", "VAE-Wan21", "LLM-Qwen3-06B"],
    "Krea-2": ["DIT-Krea2", "VAE-Wan21"],
    "Wan-14B": ["DIT-Wan21-T2V-14B", "VAE-Wan21", "T5-UMT5-XXL"],
    "Wan-1.3B": ["DIT-Wan21-T2V-1.3B", "VAE-Wan21", "T5-UMT5-XXL"],
    "Wan-5B": ["DIT-Wan22-TI2V-5B", "VAE-Wan22", "T5-UMT5-XXL"],
    "EMA-v1": ["UNET-v1-EMA"],
    "EMA-v1-Pix2Pix": ["UNET-v1-Pix2Pix-EMA"],
    "LoRA-v1": ["LoRA-v1-UNET", "LoRA-v1-CLIP"],
    "SD-v35-Large": ["MMDIT-v35-Large", "VAE-v3-SD", "CLIP-L-v3", "CLIP-G-v3", "T5-XXL-v3"],
    "SD-v35-Medium": ["MMDIT-v35-Medium", "VAE-v3-SD", "CLIP-L-v3", "CLIP-G-v3", "T5-XXL-v3"],
    "SD-XL-SSD1B": ["UNET-XL-SSD1B", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SD-XL-Vega": ["UNET-XL-Vega", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SD-XL-KOALA-1B": ["UNET-XL-KOALA-1B", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SD-XL-KOALA-700M": ["UNET-XL-KOALA-700M", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"],
    "SVD": ["UNET-SVD", "VAE-SVD"],
    "Chroma": ["DIT-Chroma", "VAE-FLUX", "T5-XXL-FLUX"],
    "FLUX2": ["DIT-FLUX2-dev", "VAE-FLUX2"],
    "FLUX2-Klein-9B": ["DIT-FLUX2-Klein-9B", "VAE-FLUX2", "LLM-Qwen3-8B"],
    "FLUX2-Klein-4B": ["DIT-FLUX2-Klein-4B", "VAE-FLUX2", "LLM-Qwen3-4B"],
    "FLUX3-Klein": ["DIT-FLUX3-Klein-base", "VAE-FLUX2"],
    "LoRA-XL": ["LoRA-XL-UNET", "LoRA-XL-CLIP"],
    "SD-mini": ["UNET-mini-SD", "VAE-mini-SD", "CLIP-mini-SD"],
    "EMA-mini": ["UNET-mini-EMA"],
}


def test_classes_and_prefixes() -> None:
    assert {c.name: (c.cls, c.prefix) for c in CATALOG.components.values()} == PLACES


def test_architectures_and_what_fills_their_slots() -> None:
    found = {
        name: [CATALOG.component_for(cls, name).name for cls in architecture.slots]
        for name, architecture in CATALOG.architectures.items()
    }
    assert found == ARCHITECTURES


def test_one_class_may_have_other_prefixes_elsewhere() -> None:
    assert [c.name for c in CATALOG.candidates("CLIP-v1", "SD-v1")] == ["CLIP-v1-SD", "CLIP-v1-NAI"]
    assert [c.name for c in CATALOG.candidates("CLIP-XL", "SD-XL")] == ["CLIP-XL-SD"]
    assert [c.name for c in CATALOG.candidates("VAE-v3", "FLUX")] == ["VAE-FLUX"]
    with pytest.raises(UsageError, match="SD-v1 has no slot `UNET-XL`"):
        CATALOG.candidates("UNET-XL", "SD-v1")


@pytest.mark.parametrize("name", ["SD-v1", "SDv1", "sdv1", "sd_v1", "SD v1", "SD1.5"])
def test_spellings_of_an_architecture(name: str) -> None:
    assert CATALOG.architecture(name).name == "SD-v1"


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        CATALOG.architecture("SDXLL")
    assert caught.value.problems[0].hint == "did you mean `SD-XL`?"


def test_no_two_architectures_share_a_spelling() -> None:
    names = [n for a in CATALOG.architectures.values() for n in (a.name, *a.aliases)]
    folded = {n.casefold().replace("-", "") for n in names}
    assert len(folded) == len(names)


@pytest.mark.parametrize("name", [n for n, c in CATALOG.components.items() if c.naming])
def test_a_naming_is_reversible(name: str) -> None:
    component = CATALOG.components[name]
    assert component.base is not None and component.naming is not None
    base = CATALOG.components[component.base]
    assert set(component.promote) == set(component.tensors)
    assert set(component.promote.values()) == set(base.tensors)
    for own, plain in component.promote.items():
        assert own == NAMINGS[component.naming](plain)
        assert component.tensors[own] == base.tensors[plain]


@pytest.mark.parametrize("name", ["CLIP-v1-SD", "CLIP-v1-NAI", "CLIP-XL-AUX-SD", "CLIP-mini-SD"])
def test_position_ids_are_optional_integers(name: str) -> None:
    rules = CATALOG.components[name].tensors
    assert [n for n, rule in rules.items() if rule.optional] == ["embeddings.position_ids"]
    assert rules["embeddings.position_ids"] == ((1, 77), "I64", True)


def _shapes(component: Component) -> dict[str, tuple[int, ...]]:
    return {n: rule.shape for n, rule in component.tensors.items()}


@pytest.mark.parametrize("part", ["UNET", "VAE", "CLIP"])
def test_the_miniature_has_the_structure_of_the_original(part: str) -> None:
    small, large = (
        _shapes(CATALOG.components[f"{part}-mini-SD"]),
        _shapes(CATALOG.components[f"{part}-v1-SD"]),
    )
    assert small.keys() == large.keys()
    assert {n: len(s) for n, s in small.items()} == {n: len(s) for n, s in large.items()}
    assert sum(small[n] != large[n] for n in small) > 0.97 * len(small)


def test_the_miniature_is_a_few_megabytes() -> None:
    parts = ["UNET-mini-SD", "UNET-mini-EMA", "VAE-mini-SD", "CLIP-mini-SD"]
    elements = sum(prod(shape) for part in parts for shape in _shapes(CATALOG.components[part]).values())
    assert 4 * elements < 6e6


def test_optional_keys() -> None:
    assert len(CATALOG.optional) == 21
    assert CATALOG.optional["betas"] == (1000,)
    assert CATALOG.optional["model_ema.decay"] == ()
    assert all(CATALOG.optional[name] is None for name in MARKERS)


def test_what_predicts_is_the_first_slot() -> None:
    assert {"UNET-v1", "UNET-v2", "UNET-XL", "MMDIT-v3", "DIT-FLUX"} < CATALOG.denoisers
    assert not any(cls.startswith(("VAE", "CLIP", "T5", "EMA")) for cls in CATALOG.denoisers)


def test_known_metrics_match_within_one() -> None:
    known = CATALOG.known
    assert [known.label("VAE-v1", n) for n in (0, 1, 2, 869, 2981, 2983, 2984)] == [
        "SD-v1",
        "SD-v1",
        None,
        "SD-v2",
        "NAI",
        "NAI",
        None,
    ]
    assert known.label("VAE-v1", 155) == "WD-VAE-v1" and known.label("VAE-v1", 41) == "WD-VAE-v2"
    assert known.label("CLIP-v1", 0) == "SD-v1" and known.label("CLIP-v1", 869) is None
    assert known.label("CLIP-v2", 1141) == "SD-v2" and known.label("CLIP-v2", 2543) == "WD-v1-4"
    assert known.model("2020/2982/0130") == known.model("2021/2981/0131") == "AnythingV3"
    assert known.model("2020/2982/0132") is None and known.model("2020/2982/----") is None


def test_known_files() -> None:
    anything = CATALOG.known.file("8712E20A5D65B6ACAA743E8A74961EADFDF846A2C9A32160D80A80CBA13AD475")
    assert anything is not None and anything.hf == "ckpt/anything-v3.0/Anything-V3.0.ckpt"
    assert CATALOG.known.file("0" * 64) is None
    files = {f.name: f for f in CATALOG.known.files}
    assert len(files) == len({f.sha256 for f in files.values()}) == 13
    overflowing = files["sdxl_vae.safetensors"]
    assert overflowing.note == "overflows in FP16 inference" and overflowing.fix in files


def test_what_components_are_published_in() -> None:
    said = {c.name: c.precision for c in CATALOG.components.values()}
    assert {said[n] for n in said if "-v1-" in n or "-v2-" in n or "-XL-" in n} == {"fp16"}
    assert said["DIT-FLUX-dev"] == said["MMDIT-v3-SD"] == "bf16"
    assert said["VAE-FLUX"] == said["VAE-v3-SD"] == "keep"  # cast to FP16 it overflows


def test_the_output_layers_of_t5_overflow_in_fp16() -> None:
    for component in CATALOG.components.values():
        if component.cls.startswith("T5"):
            found = [n for n in component.tensors if n in component.traits.overflows]
            assert len(found) == 24 and component.precision != "fp16", component.name


def test_modelspec_names() -> None:
    names = {a.name: a.modelspec.architecture for a in CATALOG.architectures.values() if a.modelspec}
    assert names["SD-v1"] == "stable-diffusion-v1"
    assert names["SD-XL"] == "stable-diffusion-xl-v1-base"
    assert names["SD-XL-Refiner"] == "stable-diffusion-xl-v1-refiner"
    inpainting = CATALOG.components["UNET-v1-Inpainting"].modelspec
    assert inpainting is not None and inpainting.name(v=False) == "stable-diffusion-v1-inpainting"


def test_tables_are_as_short_as_a_person_would_write_them() -> None:
    def length(catalog: Catalog, name: str) -> int:
        file = Path(__file__).parents[2] / catalog.components[name].path
        lines = file.read_text(encoding="utf-8").splitlines()
        return sum(bool(line) and not line.startswith("#") for line in lines)

    assert length(CATALOG, "UNET-v1-SD") < 120
    new = {"ControlNet-v1-SD", "ControlNet-XL-Union-diffusers", "UNET-SVD", "VAE-SVD", "LoRA-XL-UNET-conv"}
    for component in CATALOG.components.values():
        if component.extends is not None and component.name not in new:  # which have layers of their own
            assert length(CATALOG, component.name) <= 16, component.name
        if component.naming is not None:
            assert length(CATALOG, component.name) <= 9
