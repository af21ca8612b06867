"""Named repairs of components, each a mapping → mapping."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from builder.base.errors import Problem
from builder.models.identity import Match
from builder.models.matching import DIFFUSERS_ATTENTION, attention_changes
from builder.tensors.cast import Narrow, Precision, UnfitError, cast_types
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.moves import Reshaped
from builder.tensors.packed import OPAQUE

Tensors = Mapping[str, LazyTensor]


class Fixed(NamedTuple):
    """A component after a fix, and what the fix did in words; no words: it changed nothing."""

    tensors: Tensors
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Fix:
    """A repair that a recipe names.

    `apply` takes a component's tensors under their unprefixed names and gives them repaired. It reads no
    more than a few hundred bytes. Of which classes it speaks, the catalog says; others pass untouched.
    """

    name: str
    version: int
    doc: str
    apply: Callable[[Tensors], Fixed]
    excludes: tuple[str, ...] = ()


POSITION_IDS = "embeddings.position_ids"
POSITIONS = 77
# A linear layer's weights do for a 1x1 convolution what the convolution's own do, less two dimensions.
VAE_ATTENTION_NAMES = {theirs: ours for ours, theirs in DIFFUSERS_ATTENTION.items()}


def exact_position_ids() -> MemoryTensor:
    """The position ids every text encoder was trained with: int64 0..76, shape [1, 77]."""
    return MemoryTensor(DType.I64, (1, POSITIONS), array("q", range(POSITIONS)).tobytes())


def _clip_position_ids(tensors: Tensors) -> Fixed:
    held = tensors.get(POSITION_IDS)
    if held is None:
        return Fixed(tensors, ())
    exact = exact_position_ids()
    if (held.dtype, held.shape) == (exact.dtype, exact.shape) and held.tobytes() == exact.tobytes():
        return Fixed(tensors, ())
    return Fixed({**tensors, POSITION_IDS: exact}, (f"made exact: int64 0..{POSITIONS - 1}",))


def _position_ids_present(tensors: Tensors) -> Fixed:
    if POSITION_IDS in tensors:
        return Fixed(tensors, ())
    return Fixed({**tensors, POSITION_IDS: exact_position_ids()}, ("position_ids added",))


def _position_ids_absent(tensors: Tensors) -> Fixed:
    if POSITION_IDS not in tensors:
        return Fixed(tensors, ())
    return Fixed({n: t for n, t in tensors.items() if n != POSITION_IDS}, ("position_ids removed",))


def _vae_attention_shape(tensors: Tensors) -> Fixed:
    made: dict[str, LazyTensor] = {}
    renamed, shapes = 0, []
    for name, tensor in tensors.items():
        head, attention, tail = name.partition(".attn_1.")
        stem, dot, kind = tail.rpartition(".")
        layer = VAE_ATTENTION_NAMES.get(stem, stem)
        new = f"{head}{attention}{layer}{dot}{kind}" if attention else name
        renamed += new != name
        if attention and layer in DIFFUSERS_ATTENTION:
            extents = [n for n in tensor.shape if n != 1]
            shape = (*extents, 1, 1) if kind == "weight" and len(extents) == 2 else tuple(extents)
            if shape != tensor.shape and len(extents) == {"weight": 2, "bias": 1}.get(kind):
                tensor = Reshaped(tensor, shape)
                shapes.append(shape)
        made[new] = tensor
    words = attention_changes(renamed, shapes)
    return Fixed(made, (words,)) if words else Fixed(tensors, ())


def _nothing(tensors: Tensors) -> Fixed:
    return Fixed(tensors, ())


FIXES: dict[str, Fix] = {
    fix.name: fix
    for fix in (
        Fix(
            "clip-position-ids",
            1,
            "Makes a text encoder's `position_ids` exact: int64 0..76. Merges turn them into floats and "
            "damage them, and a loader that truncates 75.9975 reads the prompt's tokens in the wrong places.",
            _clip_position_ids,
        ),
        Fix(
            "clip-names",
            1,
            "Gives NAI-style text encoders (`cond_stage_model.transformer.encoder…`) the names that loaders "
            "expect (`…transformer.text_model.encoder…`). Done by itself wherever such names are found.",
            # Components are unprefixed, and the two spellings differ in nothing but the prefix.
            _nothing,
        ),
        Fix(
            "vae-attention-shape",
            1,
            "Gives a VAE's attention the names and the [512, 512, 1, 1] shapes of the original layout, where "
            "it has diffusers' `to_q`, `to_k`, `to_v`, `to_out.0`, [512, 512] linear weights or [512, 1, 1] "
            "biases. Done by itself wherever such names and shapes are found.",
            _vae_attention_shape,
        ),
        Fix(
            "position-ids-present",
            1,
            "Adds exact `position_ids` where a text encoder lacks them, for loaders that insist on the key.",
            _position_ids_present,
            ("position-ids-absent",),
        ),
        Fix(
            "position-ids-absent",
            1,
            "Removes `position_ids`, for loaders that call the key unexpected; they make their own.",
            _position_ids_absent,
            ("position-ids-present",),
        ),
    )
}


def truncated_position_ids(tensors: Tensors, label: str) -> Fixed:
    """`position_ids` of a floating type as int64, truncated towards zero as loaders do.

    Raises UnfitError for more than there are positions, which are not read, and for what is no number of
    int64: what a loader makes of that hangs on the processor.
    """
    held = tensors.get(POSITION_IDS)
    if held is None or not held.dtype.floating:
        return Fixed(tensors, ())
    if held.numel > POSITIONS:
        raise _unfit(label, f"have the shape {list(held.shape)}; there are {POSITIONS} positions")
    numbers = _numbers(held)
    if numbers is None or not all(abs(v) < 1 << 63 for v in numbers):
        odd = next((f"{v:g}" for v in numbers or () if not abs(v) < 1 << 63), held.dtype.code)
        raise _unfit(
            label, f"hold {odd}, which is no position", "what a loader makes of it hangs on the processor"
        )
    values = [int(v) for v in numbers]
    whole = MemoryTensor(DType.I64, held.shape, array("q", values).tobytes())
    wrong = [p for p, v in enumerate(values) if p != v]
    words = f"float position_ids truncated to int64{f', {len(wrong)} of them wrong' if wrong else ''}"
    return Fixed({**tensors, POSITION_IDS: whole}, (words,))


def _unfit(label: str, what: str, *evidence: str) -> UnfitError:
    hint = f"the fix `clip-position-ids` makes them exact: int64 0..{POSITIONS - 1}"
    return UnfitError(Problem(f"the position_ids of `{label}` {what}", evidence=evidence, hint=hint))


def _numbers(held: LazyTensor) -> list[float] | None:
    """The numbers of a tensor of a floating type; None of one that is packed."""
    import torch

    if held.dtype in OPAQUE:
        return None
    found = torch.frombuffer(held.tobytes(), dtype=held.dtype.torch) if held.numel else torch.empty(0)
    return [float(v) for v in found.double().tolist()]


def finished_types(
    tensors: Tensors, precision: Precision, narrow: Narrow = False, kept: Container[str] = ()
) -> dict[str, DType]:
    """The type that each tensor of a component has once it is finished: rounded, and positions whole."""
    types = cast_types(tensors, precision, narrow, kept)
    if POSITION_IDS in types and types[POSITION_IDS].floating:
        types[POSITION_IDS] = DType.I64
    return types


def match_types(
    match: Match, tensors: Tensors, precision: Precision | None, narrow: Narrow = False
) -> dict[str, DType]:
    """The type that each tensor of a match gets, by its full name in the file; None: as it is published."""
    said: Precision = precision or match.component.precision  # type: ignore[assignment]
    kept = match.component.traits.kept
    called = {full: bare for bare, full in match.whole.items()}
    types = finished_types({called.get(n, n): tensors[n] for n in match.full}, said, narrow, kept)
    return {n: types[called.get(n, n)] for n in match.full}
