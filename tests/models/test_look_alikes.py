"""Families whose tables are much alike are told apart, alone, under a prefix and in whole models."""

from __future__ import annotations

import pytest

from builder.models.catalog import load_catalog
from builder.models.identify import identify
from builder.tensors.lazy import DType
from tests.models.test_identify import Unread, named, tensors

CATALOG = load_catalog(())

# Sets of tables that share names or shapes, or are part of each other.
ALIKE = [
    (
        "DIT-FLUX-dev",
        "DIT-FLUX-schnell",
        "DIT-FLUX-Fill",
        "DIT-FLUX-Control",
        "DIT-Chroma",
        "DIT-FLUX2-dev",
        "DIT-FLUX2-Klein-9B",
        "DIT-FLUX2-Klein-4B",
        "DIT-FLUX3-Klein",
        "DIT-FLUX3-Klein-base",
    ),
    ("MMDIT-v3-SD", "MMDIT-v35-Large", "MMDIT-v35-Medium"),
    (
        "UNET-XL-SD",
        "UNET-XL-Inpainting",
        "UNET-XL-Pix2Pix",
        "UNET-XL-SSD1B",
        "UNET-XL-Vega",
        "UNET-XL-KOALA-1B",
        "UNET-XL-KOALA-700M",
        "UNET-XL-Refiner",
    ),
    ("UNET-v1-SD", "UNET-v2-SD", "UNET-SVD"),
    ("VAE-v1-SD", "VAE-v3-SD", "VAE-SVD", "VAE-FLUX2", "VAE-FLUX2-Comfy"),
    ("AnimateDiff-v1", "AnimateDiff-v2", "AnimateDiff-v3", "AnimateDiff-XL-beta"),
    ("ControlNet-XL-diffusers", "ControlNet-XL-Union-diffusers", "ControlNet-XL-UnionPromax-diffusers"),
    (
        "T2IAdapter-v1-64",
        "T2IAdapter-v1-192",
        "T2IAdapter-XL-256",
        "T2IAdapter-XL-768",
        "T2IAdapter-v1-color-light",
    ),
    (
        "LoRA-v1-UNET",
        "LoRA-v1A-UNET",
        "LoRA-XL-UNET",
        "LoRA-XLA-UNET",
        "LoRA-XL-UNET-conv",
        "LoRA-XLA-UNET-conv",
    ),
    ("LoRA-v1-CLIP", "LoRA-v1A-CLIP", "LoRA-XL-CLIP", "LoRA-XLA-CLIP"),
]
ONE_BY_ONE = [name for alike in ALIKE for name in alike]


def test_no_two_of_them_have_the_same_required_tensors_but_for_the_positions() -> None:
    """Two versions of AnimateDiff differ in tensors that a file may lack."""
    required = {
        name: frozenset((n, rule.shape) for n, rule in table.tensors.items() if not rule.optional)
        for name, table in CATALOG.components.items()
        if name in ONE_BY_ONE
    }
    same = {(a, b) for a in required for b in required if a < b and required[a] == required[b]}
    assert same == {("AnimateDiff-v1", "AnimateDiff-v3")}


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        *(("", name) for name in ONE_BY_ONE),
        *((c.prefix, c.name) for c in map(CATALOG.component, ONE_BY_ONE) if c.prefix),
        *(("net.", c.name) for c in map(CATALOG.component, ONE_BY_ONE) if c.prefix),
    ],
)
def test_each_is_itself_and_nothing_besides(prefix: str, name: str) -> None:
    table = CATALOG.components[name]
    held = {prefix + n: tensor for n, tensor in tensors(name, bare=True).items()}
    found = identify(held, CATALOG)
    assert named(found) == [name]
    assert not (found.unknown or found.junk or found.duplicates)
    whole = found.find(table.cls)
    assert whole is not None and whole.names.keys() == table.tensors.keys()


def test_a_motion_module_without_its_positions_is_whole() -> None:
    held = {n: t for n, t in tensors("AnimateDiff-v3").items() if not n.endswith(".pe")}
    found = identify(held, CATALOG)
    assert found.intact and named(found) == ["AnimateDiff-v1"]  # which has the same tensors


@pytest.mark.parametrize(
    ("architecture", "denoiser"),
    [
        ("FLUX", "DIT-FLUX-dev"),
        ("FLUX", "DIT-FLUX-schnell"),
        ("FLUX", "DIT-FLUX-Fill"),
        ("FLUX", "DIT-FLUX-Control"),
        ("Chroma", "DIT-Chroma"),
        ("FLUX2", "DIT-FLUX2-dev"),
        ("FLUX2-Klein-9B", "DIT-FLUX2-Klein-9B"),
        ("FLUX2-Klein-4B", "DIT-FLUX2-Klein-4B"),
        ("FLUX3-Klein", "DIT-FLUX3-Klein"),
        ("FLUX3-Klein", "DIT-FLUX3-Klein-base"),
        ("SD-v3", "MMDIT-v3-SD"),
        ("SD-v35-Large", "MMDIT-v35-Large"),
        ("SD-v35-Medium", "MMDIT-v35-Medium"),
        ("SD-XL", "UNET-XL-Inpainting"),
        ("SD-XL-Pix2Pix", "UNET-XL-Pix2Pix"),
        ("SD-XL-SSD1B", "UNET-XL-SSD1B"),
        ("SD-XL-Vega", "UNET-XL-Vega"),
        ("SD-XL-KOALA-1B", "UNET-XL-KOALA-1B"),
        ("SD-XL-KOALA-700M", "UNET-XL-KOALA-700M"),
        ("SVD", "UNET-SVD"),
    ],
)
def test_whole_models_by_their_denoiser(architecture: str, denoiser: str) -> None:
    slots = CATALOG.architecture(architecture).slots
    rest = [CATALOG.component_for(slot, architecture).name for slot in slots[1:]]
    found = identify(tensors(denoiser, *rest), CATALOG)
    assert (found.architecture, found.intact) == (architecture, True)
    assert named(found) == [denoiser, *rest] and not (found.unknown or found.astray)


def test_a_model_with_one_wrong_tensor_is_nearest_to_its_own_architecture() -> None:
    """Its parts that are whole are those of several, of which others lack less."""
    held = tensors("DIT-FLUX-dev", "VAE-FLUX")
    held["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"] = Unread(DType.F16, (9216, 3071))
    found = identify(held, CATALOG)
    assert (found.intact, found.incomplete) == (False, "FLUX")
    assert found.absent == ("DIT-FLUX", "CLIP-L-FLUX", "T5-XXL-FLUX")


# Where programs expect what: the beginning of some tensor of each part.
PLACES = {
    "FLUX": (
        "vae.decoder.",
        "text_encoders.clip_l.transformer.text_model.",
        "text_encoders.t5xxl.transformer.",
    ),
    "Chroma": ("vae.decoder.", "text_encoders.t5xxl.transformer."),
    "FLUX2": ("vae.bn.",),
    "FLUX2-Klein-9B": ("vae.encoder.quant_conv.", "text_encoders.qwen3_8b.transformer.model."),
    "FLUX2-Klein-4B": ("vae.decoder.post_quant_conv.", "text_encoders.qwen3_4b.transformer.model."),
    "FLUX3-Klein": ("vae.bn.",),
    "SD-v3": (
        "first_stage_model.decoder.",
        "text_encoders.clip_l.transformer.text_model.",
        "text_encoders.clip_g.transformer.text_model.",
        "text_encoders.t5xxl.transformer.encoder.",
    ),
    "SD-XL-SSD1B": ("first_stage_model.quant_conv.", "conditioner.embedders.1.model."),
    "SVD": ("first_stage_model.decoder.mid.block_1.time_stack.",),
}


@pytest.mark.parametrize("architecture", PLACES)
def test_parts_lie_where_programs_look_for_them(architecture: str) -> None:
    slots = CATALOG.architecture(architecture).slots
    whole = tensors(*(CATALOG.component_for(slot, architecture).name for slot in slots))
    for start in ("model.diffusion_model.", *PLACES[architecture]):
        assert any(name.startswith(start) for name in whole), start


@pytest.mark.parametrize(
    "architecture", ["SD-v3", "SD-v35-Large", "SD-v35-Medium", "FLUX2-Klein-9B", "Chroma"]
)
def test_text_encoders_may_be_in_files_of_their_own(architecture: str) -> None:
    slots = CATALOG.architecture(architecture).slots
    parts = [CATALOG.component_for(slot, architecture).name for slot in slots]
    for count in range(2, len(parts) + 1):
        found = identify(tensors(*parts[:count]), CATALOG)
        assert (found.architecture, found.intact) == (architecture, True)
        assert named(found) == parts[:count] and found.absent == slots[count:]


def test_what_training_leaves_in_flux_3_is_junk() -> None:
    left = "model.diffusion_model.repa_projectors.0.0.weight"
    held = tensors("DIT-FLUX3-Klein", "VAE-FLUX2") | {left: Unread(DType.BF16, (8, 8))}
    found = identify(held, CATALOG)
    assert found.intact and found.junk == (left,) and not found.companions
    alone = tensors("DIT-FLUX3-Klein", bare=True) | {"repa_projectors.0.0.weight": Unread(DType.BF16, (8, 8))}
    assert identify(alone, CATALOG).junk == ("repa_projectors.0.0.weight",)
