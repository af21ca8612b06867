"""Diffusers' names for a family's modules, as adapters have them, are those that its own converters give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from builder.models.catalog import load_catalog
from builder.operations.lora.names import Shaped, targets

torch = pytest.importorskip("torch")
files = pytest.importorskip("diffusers.loaders.single_file_utils")

CATALOG = load_catalog(())
CONVERTERS = {
    "MMDIT-v3-SD": "convert_sd3_transformer_checkpoint_to_diffusers",
    "MMDIT-v35-Large": "convert_sd3_transformer_checkpoint_to_diffusers",
    "MMDIT-v35-Medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "DIT-FLUX-dev": "convert_flux_transformer_checkpoint_to_diffusers",
    "DIT-FLUX-schnell": "convert_flux_transformer_checkpoint_to_diffusers",
    "DIT-Chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "DIT-FLUX2-dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "DIT-FLUX2-Klein-9B": "convert_flux2_transformer_checkpoint_to_diffusers",
    "DIT-FLUX2-Klein-4B": "convert_flux2_transformer_checkpoint_to_diffusers",
    "DIT-FLUX3-Klein": "convert_flux3_transformer_checkpoint_to_diffusers",
    "DIT-FLUX3-Klein-base": "convert_flux3_transformer_checkpoint_to_diffusers",
}


def rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of one column with as many rows as they have, each with a value of its own."""
    first = 0
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.arange(first, first + shape[0], dtype=torch.float64)[:, None]
        first += shape[0]
    return found


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_module_of_diffusers_is_these_rows_of_ours(name: str) -> None:
    component = CATALOG.components[name]
    shapes = {n: rule.shape for n, rule in component.tensors.items() if n != "pos_embed"}
    held = rows(shapes)
    kept = {"pos_embed": torch.zeros(1, 1, 1)} if "pos_embed" in component.tensors else {}
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = getattr(files, CONVERTERS[name])
    converted = convert({**held, **kept})
    adapters = CATALOG.traits[component.cls].adapters
    assert adapters is not None
    rules = CATALOG.rules[adapters.rules] if adapters.rules else None
    known = targets({n: Shaped(shape) for n, shape in shapes.items()}, adapters, rules)
    for theirs, values in converted.items():
        if theirs == "pos_embed.pos_embed":
            continue
        module, _, kind = theirs.rpartition(".")
        target = known[f"transformer.{module}"][kind]
        mine = held[target.tensor][target.first :]
        mine = mine if target.rows is None else mine[: target.rows]
        mine = torch.cat(mine.chunk(2)[::-1]) if target.swapped else mine
        assert torch.equal(mine, values), theirs
        assert known["lora_transformer_" + module.replace(".", "_")][kind] == target


UNETS = {  # how many residual blocks a resolution has
    "UNET-XL-SD": 2,
    "UNET-XL-SSD1B": 2,
    "UNET-XL-Vega": 2,
    "UNET-XL-KOALA-1B": 1,
    "UNET-XL-KOALA-700M": 1,
}


@pytest.mark.parametrize("name", UNETS)
def test_every_module_of_a_unet_in_diffusers_is_one_of_ours(name: str) -> None:
    component = CATALOG.components[name]
    shapes = {n: rule.shape for n, rule in component.tensors.items()}
    held = rows(shapes)
    config = {"layers_per_block": UNETS[name], "class_embed_type": None, "addition_embed_type": "text_time"}
    converted = files.convert_ldm_unet_checkpoint({component.prefix + n: t for n, t in held.items()}, config)
    adapters = CATALOG.traits[component.cls].adapters
    assert adapters is not None and adapters.rules is not None
    known = targets({n: Shaped(s) for n, s in shapes.items()}, adapters, CATALOG.rules[adapters.rules])
    for theirs, values in converted.items():
        module, _, kind = theirs.rpartition(".")
        assert torch.equal(held[known[f"unet.{module}"][kind].tensor], values), theirs
    assert len(converted) == len(held)
