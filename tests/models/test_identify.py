"""Identification: by exact names and shapes, with written rules and nothing guessed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.models.catalog import RANK, _load, load_catalog
from builder.models.identify import Identity, Misshapen, identify
from builder.tensors.lazy import DType, LazyTensor

CATALOG = load_catalog([])
SD_V1 = ("UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD")
SD_XL = ("UNET-XL-SD", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD")
IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


class Unread(LazyTensor):
    """A tensor of any size that may not be read."""

    def read_into(self, start: int, out: memoryview) -> None:
        raise AssertionError("identification read tensor data")


def tensors(
    *components: str, bare: bool = False, rank: int = 8, without: Iterable[str] = ()
) -> dict[str, LazyTensor]:
    """What a file of these components holds."""
    found: dict[str, LazyTensor] = {}
    for name in components:
        component = CATALOG.components[name]
        for inner, rule in component.tensors.items():
            full = inner if bare else component.prefix + inner
            found[full] = Unread(DType.F16, tuple(rank if n == RANK else n for n in rule.shape))
    return {name: tensor for name, tensor in found.items() if name not in set(without)}


def named(identity: Identity) -> list[str]:
    return [m.component.name for m in identity.matches]


WHOLE = [
    pytest.param(architecture.name, parts, id=f"{architecture.name}-{index}")
    for architecture in CATALOG.architectures.values()
    for index, parts in enumerate(
        product(*([c.name for c in CATALOG.candidates(slot, architecture)] for slot in architecture.slots))
    )
]


@pytest.mark.parametrize(("architecture", "parts"), WHOLE)
def test_every_architecture_of_any_of_its_components(architecture: str, parts: tuple[str, ...]) -> None:
    found = identify(tensors(*parts), CATALOG)
    assert (found.architecture, found.intact, named(found)) == (architecture, True, list(parts))
    assert not (found.unknown or found.junk or found.ema or found.optional or found.absent)


@pytest.mark.parametrize("name", CATALOG.components)
def test_a_bare_component_is_an_architecture_of_its_class(name: str) -> None:
    found = identify(tensors(name, bare=True), CATALOG)
    (match,) = found.matches
    assert found.intact and not match.broken
    assert found.architecture == match.component.cls
    assert match.names.keys() == CATALOG.components[name].tensors.keys()
    if match.component.name != name:  # the same tensors belong to more than one
        assert match.component.name in {r.outdone_by for r in found.rejected if r.component.name == name}


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("VAE-v1-SD", "VAE-v1"),
        ("CLIP-v1-NAI", "CLIP-v1"),
        ("CLIP-XL-AUX-SD", "CLIP-v1"),
        ("CLIP-L-FLUX", "CLIP-v1"),
        ("CLIP-v2-WD", "CLIP-v2"),
        ("UNET-v1-EMA", "EMA-UNET-v1"),
        ("LoRA-v1A-CLIP", "LoRA-v1-CLIP"),
    ],
)
def test_the_class_of_bare_components_is_the_most_common_one(name: str, cls: str) -> None:
    assert identify(tensors(name, bare=True), CATALOG).architecture == cls


@pytest.mark.parametrize(
    ("parts", "architecture"),
    [
        ((*SD_V1, "UNET-v1-EMA"), "SD-v1"),
        (("UNET-v1-Inpainting", "VAE-v1-SD", "CLIP-v1-SD"), "SD-v1"),
        (("UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-NAI"), "SD-v1"),
        (("UNET-v1-Pix2Pix", "VAE-v1-SD", "CLIP-v1-SD", "UNET-v1-Pix2Pix-EMA"), "SD-v1-Pix2Pix"),
        ((*SD_V1, "ControlNet-v1-SD"), "SD-v1-ControlNet"),
        (("UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-WD"), "SD-v2"),
        (("UNET-v2-Depth", "VAE-v1-SD", "CLIP-v2-SD", "Depth-v2-SD"), "SD-v2-Depth"),
        (SD_XL, "SD-XL"),
        (("UNET-XL-Refiner", "VAE-v1-SD", "CLIP-XL-Refiner"), "SD-XL-Refiner"),
        (("LoRA-v1A-UNET", "LoRA-v1A-CLIP"), "LoRA-v1"),
        (("UNET-v1-EMA",), "EMA-v1"),
    ],
)
def test_what_the_field_knows(parts: tuple[str, ...], architecture: str) -> None:
    found = identify(tensors(*parts), CATALOG)
    assert (found.architecture, found.intact, set(named(found))) == (architecture, True, set(parts))


def test_an_average_beside_the_model_is_told_apart_whether_it_is_known_or_not() -> None:
    beside = identify(tensors(*SD_V1, "UNET-v1-EMA"), CATALOG)
    assert len(beside.ema) == 686
    stranger = {"model_ema.diffusion_modelout2bias": Unread(DType.F32, (4,))}
    assert identify({**tensors(*SD_V1), **stranger}, CATALOG).ema == tuple(stranger)
    assert not identify(tensors("UNET-v1-EMA"), CATALOG).ema  # alone, it is the model


@pytest.mark.parametrize(
    ("parts", "architecture", "incomplete", "absent"),
    [
        (("UNET-v1-SD",), "UNET-v1-BROKEN", "SD-v1", ("VAE-v1", "CLIP-v1")),
        (("UNET-v1-SD", "UNET-v1-EMA"), "UNET-v1-BROKEN", "SD-v1", ("VAE-v1", "CLIP-v1")),
        (("UNET-v1-SD", "CLIP-v1-SD"), "UNET-v1-BROKEN", "SD-v1", ("VAE-v1",)),
        (("UNET-XL-SD", "VAE-v1-SD"), "UNET-XL-BROKEN", "SD-XL", ("CLIP-XL", "CLIP-XL-AUX")),
    ],
)
def test_parts_of_a_checkpoint_without_the_others_are_broken(
    parts: tuple[str, ...], architecture: str, incomplete: str, absent: tuple[str, ...]
) -> None:
    found = identify(tensors(*parts), CATALOG)
    assert (found.architecture, found.intact) == (architecture, False)
    assert (found.incomplete, found.absent) == (incomplete, absent)
    assert {m.component.name for m in found.matches if m.broken} == set(parts) - {"UNET-v1-EMA"}


def test_one_missing_tensor_is_named() -> None:
    found = identify(tensors(*SD_V1, without=["model.diffusion_model.out.2.bias"]), CATALOG)
    assert (found.architecture, found.absent) == ("VAE-v1-BROKEN", ("UNET-v1",))
    assert found.runner_up is not None
    near = found.runner_up
    assert (near.component.name, near.present, near.total) == ("UNET-v1-SD", 685, 686)
    assert (near.missing, near.misshapen, near.outdone_by) == (("out.2.bias",), (), None)
    assert len(found.unknown) == 685


def test_one_misshapen_tensor_is_named_and_tells_variants_apart() -> None:
    found = identify(tensors(*SD_V1), CATALOG)
    assert found.runner_up is not None
    assert found.runner_up.component.name in {"UNET-v1-Inpainting", "UNET-v1-Pix2Pix"}
    (odd,) = found.runner_up.misshapen
    assert odd.name == "input_blocks.0.0.weight"
    assert (odd.expected[1], odd.found) in {(9, (320, 4, 3, 3)), (8, (320, 4, 3, 3))}


@pytest.mark.parametrize("parts", [SD_V1, SD_XL])
def test_position_ids_are_optional(parts: tuple[str, ...]) -> None:
    ids = [n for n in tensors(*parts) if n.endswith("position_ids")]
    assert len(ids) == 1
    found = identify(tensors(*parts, without=ids), CATALOG)
    assert found.intact and named(found) == list(parts)
    assert [m.missing_optional for m in found.matches if m.missing_optional] == [("embeddings.position_ids",)]


def test_misshapen_position_ids_do_not_break_the_text_encoder() -> None:
    found = identify({**tensors(*SD_XL), IDS: Unread(DType.F32, (77,))}, CATALOG)
    assert found.intact and not found.unknown
    assert found.companions == (IDS,)


def test_the_larger_of_two_that_fit_is_chosen_and_the_other_is_told_of() -> None:
    found = identify(tensors("UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-SD"), CATALOG)
    assert named(found) == ["UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-SD"]
    assert (
        "`CLIP-v2-WD` fits the tensors of `CLIP-v2-SD` too, which explains 294 tensors, not 280"
        in found.notes
    )
    (outdone,) = (r for r in found.rejected if r.component.name == "CLIP-v2-WD")
    assert outdone.outdone_by == "CLIP-v2-SD"


def test_a_second_text_encoder_is_junk() -> None:
    found = identify(tensors(*SD_V1, "CLIP-v1-NAI"), CATALOG)
    assert (found.architecture, named(found)) == ("SD-v1", list(SD_V1))
    assert len(found.junk) == 197
    assert all(n.startswith("cond_stage_model.transformer.e") or "final_layer" in n for n in found.junk)


@pytest.mark.parametrize("second", [("CLIP-v1-SD", True), ("CLIP-v1-NAI", False)])
def test_the_text_encoder_that_loaders_read_is_taken_before_a_wholer_copy(second: tuple[str, bool]) -> None:
    held = tensors(*SD_V1)
    del held["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    found = identify(held | tensors(second[0], bare=second[1]), CATALOG)
    assert (found.architecture, named(found)) == ("SD-v1", list(SD_V1))
    assert not held.keys() & set(found.junk) and len(found.junk) == 197


def test_the_rest_is_sorted_by_what_it_is() -> None:
    rest = {
        "betas": Unread(DType.F32, (1000,)),
        "v_pred": Unread(DType.F32, (0,)),
        "edm_mean": Unread(DType.F32, (1, 4, 1, 1)),
        "model_ema.decay": Unread(DType.F32, ()),
        "model.diffusion_model.out.2.scale_weight": Unread(DType.F32, ()),
        "scaled_fp8": Unread(DType.F8_E4M3, (2,)),
        "first_stage_model.loss.discriminator.main.0.weight": Unread(DType.F32, (64, 3, 4, 4)),
        "loss.logvar": Unread(DType.F32, ()),
        "alphas_cumprod": Unread(DType.F32, (7,)),  # not the shape it has
        "embedding_manager.token": Unread(DType.F32, (3,)),
    }
    found = identify({**tensors(*SD_V1), **rest}, CATALOG)
    assert found.intact
    assert found.optional == ("betas", "v_pred", "edm_mean", "model_ema.decay")
    assert found.scales == ("model.diffusion_model.out.2.scale_weight", "scaled_fp8")
    assert found.junk == ("first_stage_model.loss.discriminator.main.0.weight", "loss.logvar")
    assert found.unknown == ("alphas_cumprod", "embedding_manager.token")


def test_unknown_is_an_answer() -> None:
    for names in ([], ["a.weight", "b.weight"]):
        found = identify({n: Unread(DType.F32, (3,)) for n in names}, CATALOG)
        assert (found.architecture, found.intact, found.matches) == (None, False, ())
        assert found.unknown == tuple(names)


def test_bare_components_side_by_side_are_no_architecture() -> None:
    found = identify(tensors("UNET-v1-SD", "VAE-v1-SD", bare=True), CATALOG)
    assert (found.architecture, found.intact, len(found.matches)) == (None, False, 2)


def test_ranks_of_a_lora() -> None:
    plain = tensors("LoRA-v1-UNET", rank=32)
    assert identify(plain, CATALOG).matches[0].rank == (32, 32)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = f"{module}.lora_down.weight", f"{module}.lora_up.weight"
    mixed = {**plain, down: Unread(DType.F16, (4, 1280, 1, 1)), up: Unread(DType.F16, (1280, 4, 1, 1))}
    assert identify(mixed, CATALOG).matches[0].rank == (4, 32)
    torn = {**plain, down: mixed[down]}
    found = identify(torn, CATALOG)
    assert not found.matches and found.runner_up is not None
    assert found.runner_up.misshapen == (Misshapen(up, (1280, RANK, 1, 1), (1280, 32, 1, 1)),)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("spelled", [True, False])
def test_an_autoencoder_laid_out_as_diffusers_does_it(bare: bool, spelled: bool) -> None:
    held: dict[str, LazyTensor] = {}
    spelling = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
    for name, tensor in tensors("VAE-v1-SD", bare=bare).items():
        if ".attn_1." in name and ".norm." not in name:
            for old, new in spelling.items():
                name = name.replace(old, new) if spelled else name
            tensor = Unread(tensor.dtype, tensor.shape[:2])
        held[name] = tensor
    found = identify({**({} if bare else tensors("UNET-v1-SD", "CLIP-v1-SD")), **held}, CATALOG)
    assert (found.architecture, found.intact) == ("VAE-v1" if bare else "SD-v1", True)
    assert not found.unknown
    match = found.find("VAE-v1")
    assert match is not None
    assert len(match.reshaped) == 8 and len(match.renamed) == (16 if spelled else 0)
    assert match.names.keys() == CATALOG.components["VAE-v1-SD"].tensors.keys()
    assert set(match.names.values()) == held.keys()
    assert match.diffusers_attention
    assert not any(m.diffusers_attention for m in identify(tensors(*SD_V1), CATALOG).matches)


PARTS = ["VAE-v1-SD", "CLIP-v1-SD", "CLIP-v2-SD", "LoRA-v1A-CLIP", "UNET-v1-EMA"]


@settings(max_examples=60)
@given(st.data())
def test_any_tensor_lost_or_bent_unmakes_a_component(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(PARTS))
    component = CATALOG.components[name]
    required = [n for n, rule in component.tensors.items() if not rule.optional]
    victim = data.draw(st.sampled_from(required))
    held = tensors(name)
    if data.draw(st.booleans()):
        del held[component.prefix + victim]
    else:
        held[component.prefix + victim] = Unread(DType.F16, (*held[component.prefix + victim].shape, 2))
    found = identify(held, CATALOG)
    assert name not in named(found)
    (why,) = (r for r in found.rejected if r.component.name == name)
    assert {*why.missing, *(m.name for m in why.misshapen)} == {victim}
    assert (why.present, why.total) == (len(required) - 1, len(required))


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=30), st.tuples(st.integers(0, 9)), max_size=20), st.randoms())
def test_strangers_and_order_change_nothing(extra: dict[str, tuple[int]], random: object) -> None:
    plain = tensors("VAE-v1-SD", "CLIP-v1-SD")
    mixed = [*plain.items(), *((n, Unread(DType.F32, s)) for n, s in extra.items() if n not in plain)]
    random.shuffle(mixed)  # type: ignore[attr-defined]
    before, after = identify(plain, CATALOG), identify(dict(mixed), CATALOG)
    assert named(before) == named(after) and before.architecture == after.architecture
    told = {*after.unknown, *after.junk, *after.optional, *after.ema, *after.scales, *after.companions}
    assert told == extra.keys() - plain.keys()


@pytest.mark.parametrize("other", ["CLIP-v2-SD", "ControlNet-v1-SD", "UNET-v1-EMA"])
def test_a_component_of_no_slot_is_astray(other: str) -> None:
    """Not where an architecture has a slot for it, and not an average."""
    found = identify(tensors("UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD", other), CATALOG)
    assert [m.component.name for m in found.astray] == [other] * (other == "CLIP-v2-SD")
    assert not (found.unknown or found.junk)
    broken = identify(tensors("UNET-v1-SD", "CLIP-v2-SD"), CATALOG)
    assert not broken.intact and broken.astray == ()


@pytest.mark.parametrize(
    ("parts", "architecture", "absent"),
    [
        (("MMDIT-v3-SD", "VAE-v3-SD"), "SD-v3", ("CLIP-L-v3", "CLIP-G-v3", "T5-XXL")),
        (("MMDIT-v3-SD", "VAE-v3-SD", "CLIP-L-v3", "CLIP-G-v3"), "SD-v3", ("T5-XXL",)),
        (("DIT-FLUX-dev", "VAE-FLUX"), "FLUX", ("CLIP-L-FLUX", "T5-XXL-FLUX")),
        (("DIT-FLUX-dev", "T5-XXL-FLUX"), "FLUX", ("VAE-v3", "CLIP-L-FLUX")),
    ],
)
def test_what_models_often_come_without_does_not_break_them(
    parts: tuple[str, ...], architecture: str, absent: tuple[str, ...]
) -> None:
    found = identify(tensors(*parts), CATALOG)
    assert (found.architecture, found.intact, found.absent) == (architecture, True, absent)
    denoiser = identify(tensors(parts[0]), CATALOG)  # prefixed, with nothing beside it, it is none
    assert denoiser.architecture is not None and denoiser.architecture.endswith("-BROKEN")
    rest = identify(tensors(*parts[1:]), CATALOG)
    assert not rest.intact or rest.architecture != architecture


def test_names_as_newer_libraries_begin_them() -> None:
    held = {n: r for n, r in CATALOG.components["LLM-Qwen25VL-7B"].tensors.items() if not r.optional}
    bare = {n.removeprefix("transformer."): Unread(DType.BF16, r.shape) for n, r in held.items()}
    new = {
        ("model.language_model." + n.removeprefix("model.") if n.startswith("model.") else f"model.{n}"): t
        for n, t in bare.items()
    }
    assert new.keys() != bare.keys()
    for names in (bare, new):
        found = identify(names, CATALOG)
        assert (found.architecture, found.intact, found.unknown) == ("LLM-Qwen25VL-7B", True, ())


def test_few_tables_are_expanded_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What most names begin with tells most tables apart."""
    specs = {n: Unread(DType.BF16, r.shape) for n, r in CATALOG.components["DIT-FLUX-dev"].tensors.items()}
    monkeypatch.setattr("builder.models.catalog._load", _load.__wrapped__)  # not what other tests expanded
    catalog = load_catalog([])
    assert identify(specs, catalog).architecture == "DIT-FLUX"
    expanded = [c.name for c in catalog.components.values() if "whole" in vars(c.tensors)]
    assert len(expanded) * 3 < len(catalog.components), expanded
