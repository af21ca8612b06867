"""Merges that look at whole tensors before they change an element: in a first pass, or all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from math import acos, isfinite, sin, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.operations.merges import AB, ABC, unless, weights
from builder.operations.merging import Make, Merge, Site, once, takes_part
from builder.operations.registry import Param, Setting, Tensors
from builder.operations.sums import fold, kept, kth_largest, totals
from builder.tensors.lazy import LazyTensor
from builder.tensors.merged import ELEMENTS, Elementwise, Reducing, Values, Whole, part

if TYPE_CHECKING:
    import torch


def reducing(
    reduce: Callable[[Sequence[LazyTensor], Site], Any], formula: Callable[[Values, Any, Site], torch.Tensor]
) -> Make:
    """What makes a tensor of what is found in whole tensors, and of elements."""

    def make(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
        return Reducing(
            sources,
            lambda whole: reduce(whole, site),
            lambda values, found: formula(values, found, site),
            site.dtype,
        )

    return make


# ── between directions ──


def _slerp_shares(sources: Sequence[LazyTensor], site: Site) -> tuple[float, float]:
    """What `a` and `b` are multiplied by."""
    alpha = site["alpha"]

    def terms(values: Values) -> list[torch.Tensor]:
        a, b = (v.double() for v in values)
        return [a * a, b * b, a * b]

    aa, bb, ab = totals(sources, terms)
    size_a, size_b = sqrt(aa), sqrt(bb)
    cosine = ab / (size_a * size_b) if size_a and size_b else 1.0
    angle = acos(max(-1.0, min(1.0, cosine)))
    if not isfinite(angle) or sin(angle) < 1e-6:
        return 1.0 - alpha, alpha  # on one line there is no way around
    size = size_a * (1.0 - alpha) + size_b * alpha
    shares = (sin((1.0 - alpha) * angle) / sin(angle), sin(alpha * angle) / sin(angle))
    return shares[0] * size / size_a, shares[1] * size / size_b


def _shares(values: Values, found: tuple[float, float], site: Site) -> torch.Tensor:
    a, b = values
    return a.mul_(found[0]).add_(b.mul_(found[1]))


def _slerp(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    alpha = site["alpha"]
    return sources[int(alpha)] if alpha in (0.0, 1.0) else reducing(_slerp_shares, _shares)(sources, site)


def _along(sources: Sequence[LazyTensor], site: Site) -> float:
    """How much of b − c lies along a − c."""

    def terms(values: Values) -> list[torch.Tensor]:
        a, b, c = (v.double() for v in values)
        a.sub_(c)
        return [a * b.sub_(c), a.square_()]

    product, square = totals(sources, terms)
    return product / square if square else 0.0


def _perpendicular(values: Values, found: float, site: Site) -> torch.Tensor:
    a, b, c = values
    along = (a - c).mul_(found)
    return a.add_(b.sub_(c).sub_(along).mul_(site["alpha"]))


# ── several models on one base ──


def _stock(sources: Sequence[LazyTensor], site: Site) -> float:
    """The factor of the mean difference."""
    count = len(sources) - 1
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]

    def terms(values: Values) -> list[torch.Tensor]:
        base, *models = (v.double() for v in values)
        deltas = [m.sub_(base) for m in models]
        return [deltas[i] * deltas[j] for i, j in pairs]

    found = dict(zip(pairs, totals(sources, terms), strict=True))
    sizes = [sqrt(found[i, i]) for i in range(count)]
    cosines = [
        max(-1.0, min(1.0, dot / max(sizes[i] * sizes[j], 1e-6))) for (i, j), dot in found.items() if i != j
    ]
    mean = sum(cosines) / len(cosines) if cosines else 1.0
    below = 1.0 + (count - 1) * mean
    return count * mean / below if below else 0.0


def _add_mean(values: Values, found: float, site: Site) -> torch.Tensor:
    base, *models = values
    total = models[0].sub_(base)
    for model in models[1:]:
        total.add_(model.sub_(base))
    return base.add_(total.mul_(found / len(models)))


def _trims(sources: Sequence[LazyTensor], site: Site) -> list[float]:
    """Of each model, the least magnitude of a difference that counts."""
    density, base = site["density"], sources[0]
    if density >= 1.0:
        return [0.0] * (len(sources) - 1)
    most = max(1, int(density * base.numel))
    return [kth_largest([base, model], lambda v: v[1].sub_(v[0]), most) for model in sources[1:]]


def _vote(base: torch.Tensor, deltas: list[torch.Tensor], site: Site) -> torch.Tensor:
    """base + scale · the mean of the differences that have the sign of their sum, each times its weight."""
    weighted = [d.mul_(w) for d, w in zip(deltas, site["of"], strict=True)]
    total = weighted[0].clone()
    for delta in weighted[1:]:
        total.add_(delta)
    positive = total >= 0
    made, divisor = total.zero_(), base.new_zeros(base.shape)
    for delta, weight in zip(weighted, site["of"], strict=True):
        agrees = (delta > 0) & positive | (delta < 0) & ~positive
        made.add_(delta.mul_(agrees))
        divisor.add_(agrees, alpha=1.0 * weight)
    if site["normalize"]:
        made.div_(divisor.masked_fill_(divisor.abs() < 1e-8, 1.0))
    return base.add_(made.mul_(site["scale"]))


def _ties(values: Values, found: list[float], site: Site) -> torch.Tensor:
    base, *models = values
    deltas = [m.sub_(base) for m in models]
    return _vote(base, [d.mul_(d.abs() >= least) for d, least in zip(deltas, found, strict=True)], site)


def _dare(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    density, names = site["density"], site["names"]

    def formula(values: Values) -> torch.Tensor:
        base, *models = values
        deltas = []
        for name, model in zip(names, models, strict=True):
            chosen = kept(site["seed"], f"{name}\0{site.name}", values.first, values.count, density)
            deltas.append(model.sub_(base).mul_(chosen).div_(density))
        if site["vote"]:
            return _vote(base, deltas, site)
        total = deltas[0].mul_(site["of"][0])
        for delta, weight in zip(deltas[1:], site["of"][1:], strict=True):
            total.add_(delta.mul_(weight))
        return base.add_(total.mul_(site["scale"]))

    return Elementwise(sources, formula, site.dtype)


# ── by likeness along a dimension ──


class _ByRow(Elementwise):
    """Computed by rows of the last dimension, whole ones."""

    def window(self, values: Values) -> torch.Tensor:
        width = self.shape[-1] if self.shape else 1
        first, last = values.first // width, -(-(values.first + values.count) // width)
        rows = [part(s, first * width, (last - first) * width).view(-1, width) for s in self.sources]
        made: torch.Tensor = self.formula(rows)  # type: ignore[arg-type]
        at = values.first - first * width
        return made.flatten()[at : at + values.count]


def _extract_features(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    alpha, beta, gamma = site["alpha"], site["beta"], site["gamma"]

    def formula(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        base, b, c = (r.double() for r in rows)
        b, c = b.sub_(base), c.sub_(base)
        dot, bb, cc = fold(b * c), fold(b * b), fold(c * c)
        cosine = dot / (bb.sqrt_().clamp_(min=1e-8) * cc.sqrt_().clamp_(min=1e-8))
        alike = ((cosine + 1.0) / 2.0).clamp_(0.0, 1.0).pow_(gamma).unsqueeze(-1)
        feature = b.mul_(1.0 - alpha).add_(c.mul_(alpha))
        return base.add_(feature.mul_(alike * (1.0 - beta) + (1.0 - alike) * beta))

    return _ByRow(sources, formula, site.dtype)  # type: ignore[arg-type]


class _Columns(NamedTuple):
    """Of two tensors, sums over the first dimension, FP64 `[columns]`: of squares of each, of products."""

    aa: torch.Tensor
    bb: torch.Tensor
    ab: torch.Tensor


def _columns(a: LazyTensor, b: LazyTensor) -> _Columns:
    import torch

    width = a.numel // a.shape[0]
    found = [torch.zeros(width, dtype=torch.float64) for _ in range(3)]
    step = max(1, ELEMENTS // width)
    for row in range(0, a.shape[0], step):
        count = min(step, a.shape[0] - row)
        x, y = (part(t, row * width, count * width).double().view(count, width) for t in (a, b))
        for total, term in zip(found, (x * x, y * y, x * y), strict=True):
            total += fold(term.T.contiguous())
    return _Columns(*found)


def _cosines(found: _Columns, normalized: bool) -> tuple[torch.Tensor, float]:
    """The cosine of each pair of columns, and that of the whole; with columns of length 1 if `normalized`."""
    a, b = found.aa.sqrt().clamp_(min=1e-8), found.bb.sqrt().clamp_(min=1e-8)
    cosines = found.ab / (a * b)
    if normalized:
        dot, aa, bb = cosines, found.aa / (a * a), found.bb / (b * b)
    else:
        dot, aa, bb = found.ab, found.aa, found.bb
    sizes = sqrt(float(fold(aa.clone()))) * sqrt(float(fold(bb.clone())))
    return cosines, float(fold(dot.clone())) / sizes if sizes else 0.0


def _cosine(structure: bool) -> Merge:
    """supermerger's cosineA, which favours the structure of `a`, or cosineB, which favours its details."""

    def limits(inputs: Mapping[str, Tensors], setting: Setting) -> Callable[[], tuple[float, float]]:
        """The least and the greatest likeness in the whole model, found when they are first asked for."""
        import numpy as np

        @once
        def find() -> tuple[float, float]:
            alike = []
            for key in (k for k in inputs if k.partition("@")[0] == "a"):
                others = inputs["b" + key[1:]]
                for name, tensor in inputs[key].items():
                    other = others.get(name)
                    same = other is not None and other.shape == tensor.shape and tensor.shape
                    if not same or not takes_part(name, tensor, setting):
                        continue
                    assert other is not None
                    cosines, whole = _cosines(_columns(tensor, other), structure)
                    alike.append((cosines if structure else (cosines + whole) / 2).numpy())
            found = np.sort(np.concatenate(alike))
            found = found[found >= np.percentile(found, 1, method="midpoint")]
            found = found[found <= np.percentile(found, 99, method="midpoint")]
            return float(found[0]), float(found[-1])

        return find

    def reduce(sources: Sequence[LazyTensor], site: Site) -> torch.Tensor:
        """The share of `b` in each column, FP64 `[columns]`."""
        low, high = site["model"]()
        cosines, whole = _cosines(_columns(*sources), structure)
        alike: torch.Tensor = ((cosines + whole) / 2 - low) / ((high - low) or 1.0)
        alpha = abs(site["alpha"]) if structure else site["alpha"]
        return alike.sub_(alpha).clamp_(0.0, 1.0).neg_().add_(1.0)

    def formula(values: Values, found: torch.Tensor, site: Site) -> torch.Tensor:
        import torch

        a, b = values
        share = found[torch.arange(values.first, values.first + values.count) % len(found)]
        return a.mul_((1.0 - share).float()).add_(b.mul_(share.float()))

    make = reducing(reduce, formula)
    return Merge(
        "cosine-a" if structure else "cosine-b",
        f"From `a` towards `b`, the more the less alike they are, column by column; alpha takes more of `b`. "
        f"Likeness is measured against all of UNET and text encoders. As supermerger's "
        f"`cosine{'A' if structure else 'B'}`.",
        AB,
        lambda sources, site: make(sources, site) if sources[0].shape else sources[0],
        {"alpha": weights("How much more of `b`.", 0.0)},
        across=limits,
    )


# ── smoothed ──

_RADIUS = 4  # of the Gaussian, whose width is 1
_BELL = [Decimal(-x * x / 2).exp() for x in range(-_RADIUS, _RADIUS + 1)]
BELL = [float(weight / sum(_BELL)) for weight in _BELL]
_BAND = 1 << 22  # elements whose neighbours are looked at together


def _smooth_add(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    alpha = site["alpha"]

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return a.add_(_smoothed(b.sub_(c)).mul_(alpha))

    return Whole(sources, function, site.dtype)


def _smoothed(values: torch.Tensor) -> torch.Tensor:
    """The median of each element's nearest neighbours, then a Gaussian of width 1, over all dimensions.

    Beyond an end, elements are mirrored. As scipy's `median_filter(size=3)` and `gaussian_filter(sigma=1)`.
    """
    import numpy as np
    import torch

    if not values.shape:
        return values
    padded = torch.from_numpy(np.pad(values.numpy(), 1, mode="symmetric"))
    step = max(1, _BAND // (3 ** values.dim() * max(1, values[0].numel())))
    made = torch.empty_like(values)
    for row in range(0, values.shape[0], step):
        band = padded[row : row + step + 2]
        for dim in range(values.dim()):
            band = band.unfold(dim, 3, 1)
        made[row : row + step] = band.flatten(values.dim()).median(-1).values
    for dim in range(values.dim()):
        size = [(_RADIUS, _RADIUS) if d == dim else (0, 0) for d in range(values.dim())]
        padded = torch.from_numpy(np.pad(made.numpy(), size, mode="symmetric"))
        for row in range(0, values.shape[dim], max(1, _BAND * values.shape[dim] // values.numel())):
            count = min(max(1, _BAND * values.shape[dim] // values.numel()), values.shape[dim] - row)
            total = padded.narrow(dim, row, count).double() * BELL[0]
            for at, weight in enumerate(BELL[1:], 1):
                total.add_(padded.narrow(dim, row + at, count).double().mul_(weight))
            made.narrow(dim, row, count).copy_(total)
    return made


MANY = {
    "scale": Param("number", "What the sum of the differences is multiplied by.", 1.0),
    "normalize": Param("boolean", "Whether the weights of what agrees divide.", True),
    "density": Param("number", "The share of each difference that counts.", 1.0, minimum=0.0, maximum=1.0),
}

REDUCTIONS = (
    Merge(
        "slerp",
        "From `a` to `b` along the arc between their directions, with a length between theirs; of whole "
        "tensors. As sd-mecha; mergekit's keeps no length. On one line: weighted-sum.",
        AB,
        _slerp,
        {"alpha": weights("How far to go.", 0.5)},
    ),
    Merge(
        "add-perpendicular",
        "a + alpha·(what of b − c is perpendicular to a − c); whole tensors. As sd-mecha.",
        ABC,
        unless("alpha", reducing(_along, _perpendicular)),
        {"alpha": weights("How much of it is added.", 1.0)},
    ),
    Merge(
        "model-stock",
        "base + t·(mean of the differences) with t = n·c / (1 + (n − 1)·c), c being the mean cosine of all "
        "pairs of differences; whole tensors. As mergekit.",
        ("base",),
        reducing(_stock, _add_mean),
        many="of",
        weighted=False,
    ),
    Merge(
        "ties",
        "base + the mean of the differences whose sign is that of their weighted sum, after each is trimmed "
        "to the `density` of greatest magnitude. As mergekit, but what is as large as the least that counts "
        "counts too.",
        ("base",),
        reducing(_trims, _ties),
        MANY,
        many="of",
    ),
    Merge(
        "dare",
        "base + the sum of the differences, of each of which a random `density` of the elements is kept and "
        "divided by it; with `vote`, summed as ties does. A draw hangs on seed, input, tensor and place.",
        ("base",),
        _dare,
        {
            **MANY,
            "density": Param("number", "The share of elements that is kept.", 0.5, minimum=0.01, maximum=1.0),
            "vote": Param("boolean", "Whether what disagrees with the sum's sign is left out.", False),
            "seed": Param("integer", "Of the draw.", 0, minimum=0),
        },
        many="of",
    ),
    _cosine(structure=True),
    _cosine(structure=False),
    Merge(
        "smooth-add",
        "a + alpha·(b − c smoothed by a median of the nearest and a Gaussian of width 1, in all dimensions). "
        "As supermerger; minutes for a model.",
        ABC,
        unless("alpha", _smooth_add),
        {"alpha": weights("How much of it is added.", 1.0)},
    ),
    Merge(
        "extract-features",
        "a + (between b − a and c − a, by alpha)·(between d and 1 − d, by beta) with "
        "d = ((1 + cosine of both along the last dimension) / 2)^gamma. As supermerger's `extract`.",
        ABC,
        _extract_features,
        {
            "alpha": weights("The share of `c`.", 0.5),
            "beta": weights("0: what they have in common, 1: what they have not.", 0.0),
            "gamma": Param("number", "How sharply likeness counts.", 1.0, minimum=0.0),
        },
    ),
)
