"""What each kind of adapter does to a weight, in FP64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


class Adapter(NamedTuple):
    """One module of an adapter: its tensors by what follows the module's name, as FP64.

    `alpha` is its scale's numerator as the file has it; without one the scale is 1. `by_root`: the scale is
    over the root of the rank, as PEFT says of a rank-stabilised LoRA.
    """

    tensors: Tensors
    alpha: float | None = None
    by_root: bool = False

    def scale(self, rank: int) -> float:
        """alpha over the rank; `scale`, where there is one, is taken for it."""
        if "scale" in self.tensors:
            return float(self.tensors["scale"])
        if self.alpha is None:
            return 1.0
        return self.alpha / (sqrt(rank) if self.by_root else rank)


Change = Callable[["torch.Tensor", Adapter, float], "torch.Tensor"]


def change(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    """What an adapter adds to a weight, at a strength; both FP64, of one shape.

    Raises ValueError, with the reason, where its tensors do not fit the weight.
    """
    try:
        kind = next(made for names, made in _KINDS if names <= adapter.tensors.keys())
    except StopIteration:
        raise ValueError(f"of no known kind: {', '.join(sorted(adapter.tensors))}") from None
    try:
        if any(name in adapter.tensors for name in MAGNITUDES):
            return _dora(weight, adapter, strength, kind)
        return kind(weight, adapter, strength)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in sorted(adapter.tensors.items()))
        raise ValueError(f"{shapes} do not fit {list(weight.shape)}") from error


# ── products of factors ──


def _product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.flatten(1) @ down.flatten(1)


def _tucker(core: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Σᵢⱼ core[i,j,…]·first[p,i]·second[j,q] as `[p, q, …]`."""
    import torch

    return torch.einsum("ij...,pi,jq->pq...", core, first.flatten(1), second.flatten(1))


def _lora(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    t = adapter.tensors
    up, down = t["up"], t["down"]
    made = _tucker(t["mid"], up, down) if "mid" in t else _product(up, down)
    return made.reshape(weight.shape) * (strength * adapter.scale(down.shape[0]))


def _loha(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    t = adapter.tensors
    halves = [
        _tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"].T, t[f"hada_w{n}_b"])
        if f"hada_t{n}" in t
        else _product(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
    made = (halves[0] * halves[1]).reshape(weight.shape)
    return made * (strength * adapter.scale(t["hada_w1_b"].shape[0]))


def _lokr(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    import torch

    t = adapter.tensors
    rank = None  # of the half that is factored, of two that of the second; whole ones have none
    if "lokr_w1" in t:
        w1 = t["lokr_w1"]
    else:
        w1, rank = _product(t["lokr_w1_a"], t["lokr_w1_b"]), t["lokr_w1_b"].shape[0]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        a, b, rank = t["lokr_w2_a"], t["lokr_w2_b"], t["lokr_w2_b"].shape[0]
        if "lokr_t2" in t:
            w2 = _tucker(t["lokr_t2"], a.T, b)
        elif b.dim() == 4:  # the convolution's window beside the inputs
            w2 = (a @ b.flatten(1)).view(a.shape[0], *b.shape[1:])
        else:
            w2 = a @ b
    if weight.dim() == 4 and w2.dim() == 2:
        w2 = w2.reshape(w2.shape[0], -1, *weight.shape[2:])
    if w2.dim() == 4:
        w1 = w1.reshape(*w1.shape, 1, 1)
    made = torch.kron(w1.contiguous(), w2.contiguous()).reshape(weight.shape)
    return made * (strength * (1.0 if rank is None else adapter.scale(rank)))


def _glora(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    t = adapter.tensors
    a1, a2, b1, b2 = (t[n] for n in ("a1", "a2", "b1", "b2"))
    flat = weight.flatten(1)
    if a1.shape[0] == flat.shape[1] and b1.shape[0] == flat.shape[0]:
        made, rank = flat @ a1.flatten(1) @ a2.flatten(1) + _product(b1, b2), a1.shape[1]
    else:  # as its first version had them
        made, rank = flat @ a2.flatten(1) @ a1.flatten(1) + _product(b2, b1), a1.shape[0]
    return made.reshape(weight.shape) * (strength * adapter.scale(rank))


# ── what is added as it is, or multiplied ──


def _added(name: str) -> Change:
    return lambda weight, adapter, strength: adapter.tensors[name].reshape(weight.shape) * strength


def _replaced(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    return (adapter.tensors["set_weight"].reshape(weight.shape) - weight) * strength


def _ia3(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    factor = adapter.tensors["weight"].flatten()
    on_input = bool(adapter.tensors["on_input"].flatten()[0])
    shape = [1] * weight.dim()
    shape[1 if on_input else 0] = -1
    return weight * (factor * strength).view(shape)


# ── rotations ──


def _rotations(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """The orthogonal matrices of Cayley's transform, `[…, b, b]`, of what `blocks` have above the diagonal.

    With a limit, no more than that of rotation in all.
    """
    import torch

    skew = blocks - blocks.mT
    if limit > 0:
        size = float(skew.norm())
        if size > limit:
            skew = skew * (limit / (size + 1e-8))
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    made: torch.Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return made


def _oft(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    import torch

    t = adapter.tensors
    blocks, rows = t["oft_blocks"], weight.shape[0]
    turned = _rotations(blocks, (adapter.alpha or 0.0) * rows)
    size = blocks.shape[-1]
    if blocks.dim() == 3:
        parts = weight.reshape(-1, size, prod(weight.shape[1:]))
        made = torch.einsum("knm,knq->kmq", turned, parts).reshape(weight.shape)
        made = weight + strength * (made - weight)
    else:
        made = weight.flatten(1)
        one = torch.eye(size, dtype=weight.dtype)
        for stage, rotation in enumerate(turned):
            stride = 2**stage * size // 2
            order = torch.arange(rows).view(-1, 2, stride).mT.flatten()
            parts = made[order].view(-1, size, made.shape[1])
            parts = (rotation * strength + (1.0 - strength) * one) @ parts
            made = made.clone()
            made[order] = parts.reshape(made.shape)
        made = made.reshape(weight.shape)
    if "rescale" in t:
        made = made * t["rescale"].view(-1, *[1] * (weight.dim() - 1))
    return made - weight


# ── magnitudes ──

# Those of the first are always by output row; that of the last by the dimension along which it lies.
MAGNITUDES = ("lora_magnitude_vector", "magnitude", "dora_scale")


def _dora(weight: torch.Tensor, adapter: Adapter, strength: float, kind: Change) -> torch.Tensor:
    """strength·(m·V/‖V‖ − W), V being the weight with all of the change (Liu and others 2024)."""
    name = next(n for n in MAGNITUDES if n in adapter.tensors)
    size = adapter.tensors[name]
    others = {n: t for n, t in adapter.tensors.items() if n != name}
    turned = weight + kind(weight, adapter._replace(tensors=others), 1.0)
    by_input = name == "dora_scale" and size.dim() > 1 and size.shape[0] == 1 and size.shape[1] != 1
    dim = 1 if by_input else 0
    shape = [1] * weight.dim()
    shape[dim] = -1
    length = turned.transpose(0, dim).flatten(1).norm(dim=1)
    length = length.clamp_(min=1e-300)
    made: torch.Tensor = (turned * (size.flatten() / length).view(shape) - weight) * strength
    return made


# The first whose tensors are all there. A module has what one of these names, and may have more of its kind.
_KINDS: tuple[tuple[frozenset[str], Change], ...] = (
    (frozenset({"up", "down"}), _lora),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), _loha),
    (frozenset({"lokr_w1", "lokr_w2"}), _lokr),
    (frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}), _lokr),
    (frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}), _lokr),
    (frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}), _lokr),
    (frozenset({"a1", "a2", "b1", "b2"}), _glora),
    (frozenset({"oft_blocks"}), _oft),
    (frozenset({"weight", "on_input"}), _ia3),
    (frozenset({"diff"}), _added("diff")),
    (frozenset({"set_weight"}), _replaced),
)
