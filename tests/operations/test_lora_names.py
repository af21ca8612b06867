"""What diffusers and trainers call the modules of newer families, against diffusers' own converters."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import pytest

from builder.models.catalog import load_catalog
from builder.operations.lora.names import Shaped, Target, targets

torch = pytest.importorskip("torch")
convert = pytest.importorskip("diffusers.loaders.single_file_utils")

CATALOG = load_catalog([])
KINDS = ("weight", "bias")
# tables of parameters that are no module's, and the model of its own that one family's text goes through
APART = ("scale_shift_table", "llm_adapter.")


def spelt(name: str, cls: str) -> Mapping[str, Target]:
    adapters = CATALOG.traits[cls].adapters
    assert adapters is not None
    shapes = {n: Shaped(rule.shape) for n, rule in CATALOG.components[name].tensors.items()}
    rules = CATALOG.rules[adapters.rules] if adapters.rules else None
    return {
        f"{module}.{kind}": target
        for module, kinds in targets(shapes, adapters, rules).items()
        for kind, target in kinds.items()
    }


@pytest.mark.parametrize(
    ("name", "converter"),
    [
        ("DIT-Wan21-I2V-14B", "convert_wan_transformer_to_diffusers"),
        ("DIT-Wan21-T2V-1.3B", "convert_wan_transformer_to_diffusers"),
        ("DIT-Wan22-TI2V-5B", "convert_wan_transformer_to_diffusers"),
        ("DIT-ZImage", "convert_z_image_transformer_checkpoint_to_diffusers"),
        ("DIT-Lumina2", "convert_lumina2_to_diffusers"),
        ("DIT-QwenImage21", "convert_qwen_image21_transformer_checkpoint_to_diffusers"),
        ("DIT-Krea2", "convert_krea2_transformer_checkpoint_to_diffusers"),
        ("DIT-Anima", "convert_cosmos_transformer_checkpoint_to_diffusers"),
    ],
)
def test_every_name_of_diffusers_leads_to_its_rows(name: str, converter: str) -> None:
    component = CATALOG.components[name]
    # Every row is a number of its own, in one column.
    rows, first = {}, 0
    for bare, rule in component.tensors.items():
        if not rule.optional:
            shape = (rule.shape[0], 1) if len(rule.shape) > 1 and rule.shape[0] > 6 else rule.shape
            rows[bare] = torch.arange(first, first + prod(shape), dtype=torch.int64).reshape(shape)
            first += prod(shape)
    found = spelt(name, component.cls)
    seen = 0
    for other, tensor in getattr(convert, converter)(dict(rows)).items():
        if any(part in other for part in APART):
            continue
        kind = other.rpartition(".")[2]
        target = found[f"transformer.{other}" if kind in KINDS else f"transformer.{other}.weight"]
        whole = rows[target.tensor]
        count = whole.shape[0] if target.rows is None else target.rows
        assert not (target.swapped or target.transposed)
        assert torch.equal(tensor, whole[target.first : target.first + count]), other
        seen += 1
    assert seen > 200


def test_trainers_names_with_underscores() -> None:
    zimage, lumina = spelt("DIT-ZImage", "DIT-ZImage"), spelt("DIT-Lumina2", "DIT-Lumina2")
    qkv = "layers.3.attention.qkv.weight"
    assert zimage["lora_unet_layers_3_attention_qkv.weight"] == Target(qkv)
    assert zimage["lora_unet_layers_3_attention_to_v.weight"] == Target(qkv, 7680, 3840)
    assert (
        zimage["diffusion_model.layers.3.attention.to_out.0.weight"].tensor == "layers.3.attention.out.weight"
    )
    assert lumina["transformer.layers.3.attn.to_k.weight"] == Target(qkv, 2304, 768)
    wan = spelt("DIT-Wan21-I2V-14B", "DIT-Wan-14B")
    assert wan["lora_unet_blocks_39_cross_attn_k_img.weight"].tensor == "blocks.39.cross_attn.k_img.weight"
    anima = spelt("DIT-Anima", "DIT-Anima")
    adapter = "llm_adapter.blocks.5.cross_attn.o_proj.weight"
    assert anima["lora_unet_llm_adapter_blocks_5_cross_attn_o_proj.weight"].tensor == adapter
    assert anima["text_conditioner.blocks.5.cross_attn.o_proj.weight"].tensor == adapter
    text = spelt("LLM-Qwen3-06B", "LLM-Qwen3-06B")
    layer = "transformer.model.layers.0.self_attn.q_proj.weight"
    for word in ("lora_te_layers_0", "lora_te_model_layers_0"):
        assert text[f"{word}_self_attn_q_proj.weight"].tensor == layer
    assert text[f"text_encoders.qwen3_06b.{layer}"].tensor == layer
