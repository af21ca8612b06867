"""Families of diffusion transformers with language models: their tables, and how each is told from others."""

from __future__ import annotations

import hashlib

import pytest

from builder.models.catalog import Architecture, Component, load_catalog
from builder.models.catalog.tables import Patterns, elements
from builder.models.identify import identify
from builder.tensors.lazy import DType, LazyTensor
from tests.models.test_identify import Unread, named, tensors

CATALOG = load_catalog([])

# component, tensors, SHA-256 over its sorted lines `name [shape]`: as the model's own class has them
PUBLISHED = {
    name: (int(keys), digest)
    for name, keys, digest in map(
        str.split,
        """
DIT-Anima                   685 33f59df9e689d24181a2349e1678d964e7466abb9196eee5d4153fabdfdd1f9b
DIT-Krea2                   430 492cb2f1f18dada216704f62d429c1c1eb0a70b9232ef972d06dca02cebc99f4
DIT-Lumina2                 399 e751955b661b992844a658291e76130f67b0f28134dea6c80228b930eda9abc2
DIT-QwenImage              1933 7410d505ce4566e9e9001fb74a0a386a5393b72ae5af79b7590fed5b9a0e6441
DIT-QwenImage-Layered      1934 6e733ecc1cd5a774a0e85363deb247e0d37b08f87d8c7d5211264155e28a9308
DIT-QwenImage21             265 5fc63f877afbbd804c80c338b362092002749ee57276e04ab4ed2e49bd53ed58
DIT-QwenImage21-diffusers   297 3e1bf106c875f879fdb7eb5eb2f8e68d71a01dd8a7bba7ed128570549752c44f
DIT-Wan21-I2V-14B          1303 958f8b01f2df36b6b22ebe6b692ba4c4d3d35de8a5105a12a452a52660077c00
DIT-Wan21-T2V-1.3B          825 eaca7ae0d955087d9745ad840d77d6ae74c4c6f8b2377ae9c9fd2fa3265fca5d
DIT-Wan21-T2V-14B          1095 5e2f8e1819effd90b145bf8025a296e00c95b220f8f36b84bb2619d4337290a1
DIT-Wan22-I2V-A14B         1095 2dd88d06573808f6df4e93587bf80f44b074168a553e697060ac9028bb27a428
DIT-Wan22-TI2V-5B           825 62c0ab1b9bab0d1368db30300bbf711dab483b805aeb8d2ef3d4cebdadd46149
DIT-ZImage                  453 d216188ece553a4cfaa403cf5c576d1c03635779a6048a5b9b26e2e715122e7d
LLM-Gemma2-2B               288 d3b54c9d6c7bf80406a90cee019388704920d54bb4abd2ae2441bf668641feb0
LLM-Gemma3-4B               444 204f1194efd9a2f75ca4b43b50ac82025d72fd18093b05bb01a571e8fdda3cd7
LLM-Qwen25VL-7B             728 10275b2e9b90df511b6599e38bbb98bd6b0eabb0537c486a5d37302ca8afa087
LLM-Qwen3-06B               310 e8d37f90d1ed1bfc236ca4009b9da00cb8bad96463592b768b17aa3ea0f43df9
LLM-Qwen3-4B                398 d7575135982e5d7af1ca55740a58dd06054da797a16d73564a4b2e30da4e77ed
LLM-Qwen3-8B                399 a86a425f4d7929b4155b8389df8435afbdfc7bd1c92ea58d8b616ef0e06e1ed1
T5-UMT5-XXL                 242 091e07ce79600825b505386f5c73efe7cee21cf87174f9df2ef12af04c0d605c
VAE-Wan21                   194 47c6f3b75e24ffd2fe3619f97d525790e850449178c64981fa4a12d5da4ba316
VAE-Wan22                   196 7f0a33aa2bd549ebc4c92900a81a7ec9d651d9f8c106b71686ed6a0906d17554
""".strip().splitlines(),
    )
}

# what files may hold besides the tensors of the class
BESIDES = {
    "DIT-Anima": ["pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range"],
    "DIT-Lumina2": ["norm_final.weight"],
    "DIT-Wan21-I2V-14B": ["img_emb.emb_pos"],
    "LLM-Gemma2-2B": ["lm_head.weight", "spiece_model", "gemma2_2b.logit_scale"],
    "LLM-Gemma3-4B": ["lm_head.weight", "spiece_model", "logit_scale"],
    "LLM-Qwen25VL-7B": ["lm_head.weight", "logit_scale"],
    "LLM-Qwen3-06B": ["lm_head.weight", "logit_scale"],
    "LLM-Qwen3-4B": ["lm_head.weight", "logit_scale"],
    "LLM-Qwen3-8B": ["logit_scale"],
    "T5-UMT5-XXL": ["encoder.embed_tokens.weight", "spiece_model", "umt5xxl.logit_scale"],
}

# where programs put text encoders
TEXT_ENCODERS = {
    "LLM-Gemma2-2B": "gemma2_2b",
    "LLM-Gemma3-4B": "gemma3_4b",
    "LLM-Qwen25VL-7B": "qwen25_7b",
    "LLM-Qwen3-06B": "qwen3_06b",
    "LLM-Qwen3-4B": "qwen3_4b",
    "LLM-Qwen3-8B": "qwen3_8b",
    "T5-UMT5-XXL": "umt5xxl",
}
PREFIXES = {
    "DIT": [
        "",
        "model.diffusion_model.",
        "model.model.",
        "model.",
        "net.",
        "diffusion_model.",
        "transformer.",
    ],
    "VAE": ["", "vae.", "first_stage_model."],
}


def published(component: Component, optional: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of a component's tensors by their names in a file of its own, programs' additions aside."""
    without = component.alone.without
    return {
        bare: rule.shape
        for name, rule in component.tensors.items()
        if (bare := name.removeprefix(without)) not in BESIDES.get(component.name, ())
        and (optional or not rule.optional)
    }


def unread(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, LazyTensor]:
    return {prefix + name: Unread(DType.BF16, shape) for name, shape in shapes.items()}


def prefixes(name: str) -> list[str]:
    if name in TEXT_ENCODERS:
        return ["", f"text_encoders.{TEXT_ENCODERS[name]}.transformer."]
    return PREFIXES[name[:3]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_table_is_what_the_models_class_has_and_what_files_may_hold_besides(name: str) -> None:
    component = CATALOG.components[name]
    shapes = published(component)
    lines = sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items())
    assert (len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()) == PUBLISHED[name]
    rest = {n.removeprefix(component.alone.without): rule for n, rule in component.tensors.items()}
    assert {n for n in rest if n not in shapes} == set(BESIDES.get(name, ()))
    assert all(rest[n].optional for n in BESIDES.get(name, ()))
    assert component.keys == len(rest) and component.parameters == elements(rest.values())


@pytest.mark.parametrize(("name", "prefix"), [(n, p) for n in PUBLISHED for p in prefixes(n)])
@pytest.mark.parametrize("optional", [True, False])
def test_each_is_known_as_itself_alone(name: str, prefix: str, optional: bool) -> None:
    component = CATALOG.components[name]
    found = identify(unread(published(component, optional), prefix), CATALOG)
    (match,) = found.matches
    assert match.component is component and match.prefix in (prefix, component.prefix)
    assert not (found.unknown or found.junk or found.optional or found.duplicates)
    # only what it is a variant of may be there, too
    assert {r.component.name for r in found.rejected if r.outdone_by is not None} <= {component.extends}


MINE = [a for a in CATALOG.architectures.values() if CATALOG.component_for(a.slots[0], a).name in PUBLISHED]


@pytest.mark.parametrize("architecture", MINE, ids=lambda a: a.name)
def test_a_whole_checkpoint_as_programs_save_it(architecture: Architecture) -> None:
    for first in CATALOG.candidates(architecture.slots[0], architecture):
        parts = [first, *(CATALOG.component_for(slot, architecture) for slot in architecture.slots[1:])]
        held = tensors(first.name, *(c.name for c in parts[1:]))
        for word in (TEXT_ENCODERS[c.name] for c in parts if c.name in TEXT_ENCODERS):
            held[f"text_encoders.{word}.logit_scale"] = Unread(DType.F32, ())
        found = identify(held, CATALOG)
        assert (found.architecture, found.intact, found.unknown) == (architecture.name, True, ())
        assert named(found) == [c.name for c in parts]
        assert {n for m in found.matches for n in m.full} == set(held)


def test_what_is_told_by_shapes_alone_is_never_the_neighbour() -> None:
    """The nearest other table lacks tensors or has them in other shapes."""
    for name, near in {
        "DIT-ZImage": "DIT-Lumina2",
        "DIT-QwenImage-Layered": "DIT-QwenImage",
        "DIT-Wan22-I2V-A14B": "DIT-Wan21-T2V-14B",
        "DIT-Wan21-I2V-14B": "DIT-Wan22-I2V-A14B",
        "LLM-Qwen3-4B": "LLM-Qwen3-8B",
        "T5-UMT5-XXL": "T5-XXL-FLUX",
        "VAE-Wan22": "VAE-Wan21",
    }.items():
        found = identify(unread(published(CATALOG.components[name])), CATALOG)
        assert named(found) == [name]
        one, other = published(CATALOG.components[name]), published(CATALOG.components[near])
        assert any(one.get(n) != shape for n, shape in other.items()) or len(one) > len(other)


def test_tokenizers_and_positions_are_of_any_size() -> None:
    for size in (1, 4_688_074):
        shapes = {**published(CATALOG.components["T5-UMT5-XXL"]), "spiece_model": (size,)}
        found = identify(unread(shapes), CATALOG)
        (match,) = found.matches
        assert match.names["spiece_model"] == "spiece_model" and match.rank is None
        shapes = {**published(CATALOG.components["DIT-Anima"]), "pos_embedder.seq": (size,)}
        (match,) = identify(unread(shapes, "net."), CATALOG).matches
        assert match.names["pos_embedder.seq"] == "net.pos_embedder.seq" and match.rank is None
    flat = {**published(CATALOG.components["T5-UMT5-XXL"]), "spiece_model": (2, 3)}
    assert "spiece_model" in identify(unread(flat), CATALOG).companions


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_markers_belong_to_what_they_are_of(prefix: str) -> None:
    for name, marker in (("DIT-QwenImage", "__index_timestep_zero__"), ("DIT-ZImage", "scaled_fp8")):
        held = unread({**published(CATALOG.components[name]), marker: (0,)}, prefix)
        (match,) = identify(held, CATALOG).matches
        assert match.component.name == name and match.companions == {marker: prefix + marker}


CLASSES = sorted({CATALOG.components[name].cls for name in PUBLISHED})


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.startswith("DIT-")])
def test_every_weight_is_of_a_block(cls: str) -> None:
    traits = CATALOG.traits[cls]
    for component in CATALOG.classes[cls]:
        learnt = [n for n in component.tensors if n not in traits.constants]
        assert {traits.block(n) for n in learnt} <= set(traits.blocks)
    standard = CATALOG.classes[cls][0]
    assert {traits.block(n) for n in standard.tensors if n not in traits.constants} == set(traits.blocks)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_said_of_a_class_is_of_its_tensors(cls: str) -> None:
    traits = CATALOG.traits[cls]
    names = {n for c in CATALOG.classes[cls] for n in c.tensors}
    layers = {n.rpartition(".")[0] for n in names}
    for pattern in (*traits.kept.all, *traits.overflows.all, *traits.unquantized.all, *traits.constants):
        assert Patterns([pattern]).any(names | layers) or pattern == "__index_timestep_zero__"
    if traits.adapters is not None:
        assert set(traits.adapters.names) <= layers


def test_precisions() -> None:
    said = {name: CATALOG.components[name].precision for name in PUBLISHED}
    assert {n for n, p in said.items() if p == "keep"} == {n for n in said if "Wan" in n}
    assert {p for n, p in said.items() if "Wan" not in n} == {"bf16"}
    overflowing = {cls for cls in CLASSES if CATALOG.traits[cls].overflows.fit("x_embedder.weight")}
    assert overflowing == {"DIT-QwenImage", "DIT-ZImage", "DIT-Lumina2"}
    t5 = CATALOG.traits["T5-UMT5-XXL"].overflows
    wo = [n for n in CATALOG.components["T5-UMT5-XXL"].tensors if t5.fit(n)]
    assert len(wo) == 24 and all(n.endswith(".wo.weight") for n in wo)
    wan = CATALOG.traits["DIT-Wan-14B"].kept
    assert sum(wan.fit(n) for n in CATALOG.components["DIT-Wan21-I2V-14B"].tensors) == 41


def test_what_must_stay_precise_is_kept_in_every_family() -> None:
    small = Patterns(["*logit_scale", "bn.*", "*scale_shift_table", "*.modulation"])
    found = [(c, n) for c in CATALOG.components.values() for n in c.tensors if small.fit(n)]
    assert {"CLIP-XL", "T5-XXL", "VAE-FLUX2", "DIT-Wan-14B"} <= {c.cls for c, _ in found}
    assert not [(c.name, n) for c, n in found if not CATALOG.traits[c.cls].kept.fit(n)]


def test_one_table_may_be_of_several_models() -> None:
    models = {name: CATALOG.components[name].models for name in PUBLISHED}
    assert all(models.values())
    assert len(models["DIT-Wan21-T2V-14B"]) == 3 and len(models["DIT-Wan22-I2V-A14B"]) == 2
    assert "Qwen-Image-Edit-2509" in models["DIT-QwenImage"]
