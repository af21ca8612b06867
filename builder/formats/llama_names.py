"""What llama.cpp calls the tensors of text encoders, and what Hugging Face calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_T5 = {
    r"token_embd": "shared",
    r"enc\.output_norm": "encoder.final_layer_norm",
    r"enc\.blk\.(\d+)\.attn_([qkvo])": r"encoder.block.\1.layer.0.SelfAttention.\2",
    r"enc\.blk\.(\d+)\.attn_rel_b": r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias",
    r"enc\.blk\.(\d+)\.attn_norm": r"encoder.block.\1.layer.0.layer_norm",
    r"enc\.blk\.(\d+)\.ffn_gate": r"encoder.block.\1.layer.1.DenseReluDense.wi_0",
    r"enc\.blk\.(\d+)\.ffn_up": r"encoder.block.\1.layer.1.DenseReluDense.wi_1",
    r"enc\.blk\.(\d+)\.ffn_down": r"encoder.block.\1.layer.1.DenseReluDense.wo",
    r"enc\.blk\.(\d+)\.ffn_norm": r"encoder.block.\1.layer.1.layer_norm",
}
_DECODER = {
    r"token_embd": "model.embed_tokens",
    r"output_norm": "model.norm",
    r"output": "lm_head",
    r"blk\.(\d+)\.attn_norm": r"model.layers.\1.input_layernorm",
    r"blk\.(\d+)\.attn_([qkv])": r"model.layers.\1.self_attn.\2_proj",
    r"blk\.(\d+)\.attn_([qk])_norm": r"model.layers.\1.self_attn.\2_norm",
    r"blk\.(\d+)\.attn_output": r"model.layers.\1.self_attn.o_proj",
    r"blk\.(\d+)\.ffn_(up|down|gate)": r"model.layers.\1.mlp.\2_proj",
    r"blk\.(\d+)\.ffn_norm": r"model.layers.\1.post_attention_layernorm",
}

# By `general.architecture`. Gemma is not among them: llama.cpp keeps its norms with 1 added.
_RULES: Mapping[str, Mapping[str, str]] = {
    "t5": _T5,
    "t5encoder": _T5,
    **dict.fromkeys(("llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl"), _DECODER),
}
INTERLEAVED = "llama"  # whose queries and keys have the two halves of each head row by row
QUERIES, KEYS = "self_attn.q_proj", "self_attn.k_proj"


def hugging_face_names(architecture: str, names: Iterable[str]) -> dict[str, str]:
    """The names that tensors have in Hugging Face's layout, by those that llama.cpp gives them.

    What has no other name keeps its own; so do all, where two would get one name.
    """
    names = list(names)
    rules = [(re.compile(p), to) for p, to in _RULES.get(architecture, {}).items()]

    def renamed(name: str) -> str:
        module, dot, part = name.rpartition(".")
        found = next(((m, to) for p, to in rules if (m := p.fullmatch(module))), None)
        return f"{found[0].expand(found[1])}{dot}{part}" if found else name

    made = {name: renamed(name) for name in names} if rules else {}
    return made if len(set(made.values())) == len(names) else {n: n for n in names}


def halves_apart(rows: int, heads: int) -> tuple[int, ...]:
    """Where each row of queries or keys lies in llama.cpp's order: pairs of each head's halves."""
    half = rows // heads // 2
    return tuple(
        head * 2 * half + 2 * row + side for head in range(heads) for side in (0, 1) for row in range(half)
    )
