"""Weights by block as supermerger and its kin write them, in the words of recipes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.recipe.weights import MAX_PATTERNS
from builder.reports.imports.sketch import Sketch, joined, number

BASE = "BASE"
_FLUX = ("CLIP", "T5", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
# What is in no block, by the beginnings of its names in text encoders and VAEs.
_NO_BLOCK = (
    *("embeddings.", "encoder.", "final_layer_norm.", "transformer.", "token_embedding.", "ln_final."),
    *(
        "decoder.",
        "quant_conv.",
        "post_quant_conv.",
        "text_projection",
        "positional_embedding",
        "logit_scale",
    ),
)


def _unet(blocks: int) -> tuple[str, ...]:
    return (BASE, *(f"IN{n:02}" for n in range(blocks)), "M00", *(f"OUT{n:02}" for n in range(blocks)))


LISTS: dict[int, tuple[str, ...]] = {len(names): names for names in (_unet(12), _unet(9), _FLUX)}


@dataclass
class Weights:
    """Weights of one parameter: a number for all, or one for each block, and for patterns over names."""

    base: float
    blocks: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, listed: Sequence[float] | None, base: float) -> Weights | None:
        """Of a list with the base first; None where it is none of a known length."""
        if listed is None:
            return cls(base)
        names = LISTS.get(len(listed))
        return None if names is None else cls(listed[0], dict(zip(names, listed, strict=True)))

    @property
    def names(self) -> tuple[str, ...]:
        """All blocks, the base among them: where none are said, those of SD v1."""
        return tuple(self.blocks) or LISTS[26]

    def at(self, block: str) -> float:
        """The weight of a block."""
        return self.blocks.get(block, self.base)

    def value(self, vae: bool = False) -> Any:
        """As a recipe has it; `vae`: the VAE is merged, with the weight of the base."""
        if not self.tensors:
            return joined(list(self.blocks.values())) if self.blocks else self.base
        if not self.blocks:
            return {"base": self.base, "tensors": self.tensors}
        if "T5" in self.blocks:
            clip, t5, *rest = self.blocks.values()
            return {"CLIP": clip, "T5": t5, "DIT": joined(rest), "tensors": self.tensors}
        parts = {"UNET": joined(list(self.blocks.values())[1:]), "CLIP": self.base}
        return {**parts, **({"VAE": self.base} if vae else {}), "tensors": self.tensors}

    def patterns(self, block: str, word: str) -> list[str]:
        """The tensors of a block whose names hold a word (empty: all of them), as patterns."""
        end = f"*{word}*" if word else "*"
        return [f"{first}{end}" for first in self._beginnings(block)]

    def _beginnings(self, block: str) -> tuple[str, ...]:
        kind, index = block.rstrip("0123456789"), int(re.sub(r"\D", "", block) or 0)
        last = "OUT08" if len(self.blocks) == 20 else "OUT11"
        return {
            BASE: _NO_BLOCK,
            "IN": (f"input_blocks.{index}.", *(("time_embed.", "label_emb.") if index == 0 else ())),
            "M": ("middle_block.",),
            "OUT": (f"output_blocks.{index}.", *(("out.",) if block == last else ())),
            "D": (f"double_blocks.{index}.",),
            "S": (f"single_blocks.{index}.",),
        }.get(kind, ())


def with_elements(weights: Weights, said: object, sketch: Sketch) -> None:
    """Have the lines `BLOCKS:ELEMENTS:RATIO` among the weights, the last of which holds.

    They are a list, or a text with commas or newlines between them.
    """
    lines = said.replace("\n", ",").split(",") if isinstance(said, str) else said
    for line in lines[:MAX_PATTERNS] if isinstance(lines, list) else ():
        if not isinstance(line, str) or line.count(":") != 2:
            continue
        blocks, elements, said = line[:1000].split(":")
        ratio = number(said.strip())
        chosen = list(_chosen(blocks, weights.names))
        no, words = _negated(elements)
        if ratio is None or not chosen or len(words) > 50 or not all(map(_WORD.fullmatch, words)):
            sketch.miss(f"the weights of elements `{line}`")
            continue
        found: dict[str, float] = {}
        for block in chosen:
            for word in [""] if no or not words else words:
                found |= dict.fromkeys(_of(weights, block, word), ratio)
            for word in words if no else []:  # what is said of all but these is not said of these
                found |= dict.fromkeys(_of(weights, block, word), weights.at(block or BASE))
        _add(weights, found, line, sketch)


def without(weights: Weights, words: Iterable[object], include: bool, sketch: Sketch) -> bool:
    """Leave what words name as it is in the first model, or all else where they `include`.

    They are blocks, or are found in tensors' names. Gives whether the VAE is left out.
    """
    said = [w for w in words if isinstance(w, str) and w and w != "print"]
    if not said:
        return False
    if "Adjust" in said:
        sketch.miss("`Adjust` among what was included or excluded")
    named = {w for w in said if w in weights.names}
    found = [w for w in said if w not in named and w not in ("Adjust", "VAE")]
    if odd := [w for w in found if not _WORD.fullmatch(w)]:
        sketch.miss(f"what was included or excluded by `{', '.join(odd)}`")
    found = [w for w in found if w not in odd]
    if include:
        kept = {
            p: weights.at(b)
            for b in weights.names
            if b not in named
            for w in found
            for p in _of(weights, b, w)
        }
    else:
        kept = {f"*{w}*": 0.0 for w in found}
    zero = set(weights.names) - named if include else named
    if zero:
        weights.blocks = {b: 0.0 if b in zero else weights.at(b) for b in weights.names}
        weights.base = weights.at(BASE)
    _add(weights, kept, ", ".join(found), sketch)
    return ("VAE" in said) != include


def _of(weights: Weights, block: str, word: str) -> list[str]:
    return weights.patterns(block, word) if block else [f"*{word}*" if word else "*"]


def _add(weights: Weights, found: dict[str, float], line: str, sketch: Sketch) -> None:
    for pattern in found:
        weights.tensors.pop(pattern, None)  # so that it comes last
    if len(weights.tensors) + len(found) > MAX_PATTERNS:
        sketch.miss(f"the weights of elements `{line}`: they are too many")
        return
    weights.tensors |= found


def _negated(said: str) -> tuple[bool, list[str]]:
    words = said.split()
    return (True, words[1:]) if words[:1] == ["NOT"] else (False, words)


def _chosen(said: str, names: Sequence[str]) -> Iterator[str]:
    """The blocks that are meant; an empty name for all of them at once."""
    no, words = _negated(said)
    meant: set[str] = set()
    for word in words:
        first, _, last = word.partition("-")
        ends = [names.index(w) for w in (first, last or first) if w in names]
        if len(ends) == 2:
            meant |= set(names[min(ends) : max(ends) + 1])
    if not words:
        yield ""
    else:
        yield from (n for n in names if (n in meant) != no)
