"""Merges element by element: each formula once, in FP32 with explicit products and sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from builder.operations.merging import Make, Merge, Site
from builder.operations.registry import Param
from builder.tensors.lazy import LazyTensor
from builder.tensors.merged import Elementwise, Values
from builder.tensors.moves import Joined, Rows

if TYPE_CHECKING:
    import torch


def elementwise(formula: Callable[[Values, Site], torch.Tensor]) -> Make:
    """What makes a tensor by a formula over elements."""
    return lambda sources, site: Elementwise(sources, lambda values: formula(values, site), site.dtype)


def unless(param: str, make: Make) -> Make:
    """The same, but with a weight of 0 the first input as it is, bit for bit."""
    return lambda sources, site: sources[0] if site[param] == 0.0 else make(sources, site)


def _between(
    a: torch.Tensor, b: torch.Tensor, alpha: float, site: Site, of: tuple[int, ...] = (0,)
) -> torch.Tensor:
    """a·(1 − alpha) + b·alpha, each product and the sum rounded; in the memory of both.

    `of` are the inputs that `a` is made of; `b` is the next.
    """
    shares = site.round(a.mul_(1.0 - alpha), *of), site.round(b.mul_(alpha), len(of))
    return site.round(shares[0].add_(shares[1]), *of, len(of))


def _weighted_sum(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    alpha = site["alpha"]
    if alpha in (0.0, 1.0):
        return sources[int(alpha)]
    return Elementwise(sources, lambda v: _between(v[0], v[1], alpha, site), site.dtype)


@elementwise
def _add_difference(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    return site.round(a.add_(site.round(site.round(b.sub_(c), 1, 2).mul_(site["alpha"]), 1, 2)))


@elementwise
def _train_difference(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    near, far = (b - c).abs_(), (b - a).abs_()
    share = (far / (near + far)).nan_to_num_(0.0)
    return a.add_(b.sub_(c).mul_(share).mul_(1.8 * site["alpha"]))


@elementwise
def _sum_twice(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    return _between(_between(a, b, site["alpha"], site), c, site["beta"], site, (0, 1))


@elementwise
def _triple_sum(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    alpha, beta = site["alpha"], site["beta"]
    weights = (1.0 - alpha - beta, alpha, beta)
    a, b, c = (site.round(v.mul_(w), i) for i, (v, w) in enumerate(zip((a, b, c), weights, strict=True)))
    return site.round(site.round(a.add_(b), 0, 1).add_(c))


def _linear(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    weights = site["of"]
    total = sum(weights) if site["normalize"] else 1.0
    used = {i: w / total for i, w in enumerate(weights) if w and total}
    if [*used.values()] in ([], [1.0]):
        return sources[next(iter(used), 0)]

    def formula(values: Values) -> torch.Tensor:
        shares = (site.round(v.mul_(w), i) for v, (i, w) in zip(values.each(), used.items(), strict=True))
        made = next(shares).clone()
        for number, share in enumerate(shares, 2):
            made = site.round(made.add_(share), *[*used][:number])
        return made

    return Elementwise([sources[i] for i in used], formula, site.dtype)


def _tensor_sum(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    a, b = (site.as_made(s) for s in sources)
    if not a.shape:
        return a
    rows, alpha, beta = a.shape[0], site["alpha"], site["beta"]
    outer, inner, first, last = a, b, int(rows * beta), int(rows * (alpha + beta))
    if alpha + beta > 1.0:
        outer, inner, first, last = b, a, int(rows * (alpha + beta - 1.0)), int(rows * beta)
    parts = ((outer, 0, first), (inner, first, last), (outer, last, rows))
    return Joined([Rows(t, start, end - start) for t, start, end in parts if end > start])


@elementwise
def _clamp(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    low, high = b.minimum(c), b.maximum(c)
    return a.clamp_(low, high)


@elementwise
def _multiply_difference(values: Values, site: Site) -> torch.Tensor:
    a, b, c = (v.double() for v in values)  # powers in FP64: FP32 ones hang on the processor
    alpha, beta = site["alpha"], site["beta"]
    size = (a - c).abs_().pow_(1.0 - alpha).mul_((b - c).abs_().pow_(alpha))
    sign = (a * (1.0 - beta)).add_(b * beta).sub_(c)
    return size.copysign_(sign).add_(c)


@elementwise
def _similarity_add_difference(values: Values, site: Site) -> torch.Tensor:
    a, b, c = values
    alpha, beta = site["alpha"], site["beta"]
    largest = a.abs().maximum(b.abs())
    alike = ((a * b).div_(largest.square_()).nan_to_num_(0.0).add_(1.0)).mul_(beta / 2)
    added = (b - c).mul_(alpha).add_(a)
    mean = a.mul_(1.0 - alpha / 2).add_(b.mul_(alpha / 2))
    return added.mul_(1.0 - alike).add_(mean.mul_(alike))


def weights(doc: str, default: float | None = None) -> Param:
    """A parameter that may weigh classes, blocks and tensors."""
    return Param("weights", doc, default)


AB, ABC = ("a", "b"), ("a", "b", "c")

MERGES = (
    Merge(
        "weighted-sum",
        "a·(1 − alpha) + b·alpha. With an alpha of 0 it is `a`, with 1 it is `b`, bit for bit.",
        AB,
        _weighted_sum,
        {"alpha": weights("The share of `b`.", 0.5)},
        rounds=True,
    ),
    Merge(
        "add-difference",
        "a + alpha·(b − c).",
        ABC,
        unless("alpha", _add_difference),
        {"alpha": weights("How much of the difference is added.", 1.0)},
        rounds=True,
    ),
    Merge(
        "train-difference",
        "a + 1.8·alpha·(b − c)·|b − a| / (|b − a| + |b − c|), where that is defined: what `b` learnt, as far "
        "as `a` has not. As supermerger.",
        ABC,
        unless("alpha", _train_difference),
        {"alpha": weights("How much of the difference is added.", 1.0)},
    ),
    Merge(
        "sum-twice",
        "(a·(1 − alpha) + b·alpha)·(1 − beta) + c·beta.",
        ABC,
        _sum_twice,
        {"alpha": weights("The share of `b`.", 0.5), "beta": weights("The share of `c`.", 0.5)},
        rounds=True,
    ),
    Merge(
        "triple-sum",
        "a·(1 − alpha − beta) + b·alpha + c·beta.",
        ABC,
        _triple_sum,
        {"alpha": weights("The share of `b`.", 1 / 3), "beta": weights("The share of `c`.", 1 / 3)},
        rounds=True,
    ),
    Merge(
        "linear",
        "The sum of all inputs, each times its weight, over the sum of the weights; in the order of names.",
        (),
        _linear,
        {"normalize": Param("boolean", "Whether the sum of the weights divides.", True)},
        many="of",
        rounds=True,
    ),
    Merge(
        "tensor-sum",
        "`a`, but of each tensor the rows from beta to beta + alpha, as shares of all, are those of `b`; "
        "beyond the last it goes on with the first. As supermerger's `tensor`.",
        AB,
        _tensor_sum,
        {"alpha": weights("The share of rows.", 0.5), "beta": weights("Where they begin.", 0.0)},
    ),
    Merge("clamp", "`a`, no value of which lies outside of those of `b` and `c`.", ABC, _clamp),
    Merge(
        "multiply-difference",
        "c + |a − c|^(1 − alpha)·|b − c|^alpha with the sign of a·(1 − beta) + b·beta − c.",
        ABC,
        _multiply_difference,
        {"alpha": weights("The share of `b` in size.", 0.5), "beta": weights("Its share in sign.", 0.5)},
    ),
    Merge(
        "similarity-add-difference",
        "Between a + alpha·(b − c) and a·(1 − alpha/2) + b·alpha/2, by how alike `a` and `b` are: the share "
        "of the latter is beta/2·(1 + a·b / max(|a|, |b|)²).",
        ABC,
        unless("alpha", _similarity_add_difference),
        {"alpha": weights("The share of `b`.", 0.5), "beta": weights("How much likeness counts.", 0.5)},
    ),
)
