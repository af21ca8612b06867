"""The published label of a checkpoint's weights, as in `2020/2982/0130` for UNET, VAE and CLIP."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from builder.base.progress import SILENT, Reporter
from builder.models.catalog import Catalog, Scale
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed.schemes import OF_INPUT, companions, split
from builder.tensors.scan import BINS, scan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ABSENT = "----"
NOT_A_NUMBER = "NaN!"
_DIGITS = re.compile(rf"\d{{4}}|{ABSENT}|{NOT_A_NUMBER}", re.ASCII)
PERIOD = 5000  # from 10000 on, every further step of this size repeats the four digits


@dataclass(frozen=True, slots=True)
class Metric:
    """Four digits a part; `----` where the part is absent or has no base to compare with.

    The digits wrap: they label weights and do not identify them. A part that holds NaN is `NaN!`.
    """

    unet: str = ABSENT
    vae: str = ABSENT
    clip: str = ABSENT

    @property
    def text(self) -> str:
        """The form in which it is published, `UNET/VAE/CLIP`."""
        return f"{self.unet}/{self.vae}/{self.clip}"


def counted(components: Mapping[str, Mapping[str, str]], catalog: Catalog) -> dict[str, str]:
    """The tensors that the metric counts, each with its class: what `scan` takes as `groups`.

    `components` is, by class, unprefixed name to full name. Names of the class's tables count, companions
    do not: what is no weight says nothing of the weights. Nothing of a class counts where weights that would
    are packed: what is stored of them are not the numbers that the metric is of.
    """
    found: dict[str, str] = {}
    for cls, names in components.items():
        if (scale := catalog.scales.get(cls)) is not None:
            tables = [c.tensors for c in catalog.classes[cls]]
            held = [b for b in names if scale.counts(b) and any(b in table for table in tables)]
            packed = {layer for layer, side in map(split, companions(names)) if side not in OF_INPUT}
            if packed.isdisjoint(bare.rpartition(".")[0] for bare in held):
                found |= {names[bare]: cls for bare in held}
    return found


def labels(histograms: Mapping[str, NDArray[np.int64]], scales: Mapping[str, Scale]) -> dict[str, str]:
    """The four digits of each class, of histograms as `scan` makes them."""
    return {cls: digits(weigh(counts), scales[cls]) for cls, counts in histograms.items()}


def label(histograms: Mapping[str, NDArray[np.int64]], scales: Mapping[str, Scale]) -> Metric:
    """The metric of histograms by class, as `scan` makes them.

    Of two classes that are the same part, such as the text encoders of two families, the first counts.
    """
    parts: dict[str, str] = {}
    for cls, said in labels(histograms, scales).items():
        parts.setdefault(scales[cls].part, said)
    return Metric(**parts)


def measure(
    components: Mapping[str, Mapping[str, LazyTensor]],
    catalog: Catalog,
    *,
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "metric",
) -> Metric:
    """The metric of components by class, each a mapping of unprefixed names; reads what it counts."""
    flat = {f"{cls}/{name}": t for cls, tensors in components.items() for name, t in tensors.items()}
    groups = counted({cls: {n: f"{cls}/{n}" for n in names} for cls, names in components.items()}, catalog)
    found = scan(
        {name: flat[name] for name in groups},
        groups=groups,
        threads=threads,
        reporter=reporter,
        task=task,
    )
    return label(found.histograms, catalog.scales)


def is_digits(text: str) -> bool:
    """Whether `digits` may have given this."""
    return _DIGITS.fullmatch(text) is not None


def digits(total: float, scale: Scale) -> str:
    """A part's sum as four digits."""
    if math.isnan(total):
        return NOT_A_NUMBER
    if total == 0.0:
        return ABSENT
    n = int(abs(total / scale.base - 1) * scale.k)
    if n >= 2 * PERIOD:
        n = PERIOD + n % PERIOD
    return f"{n:04d}"


def weigh(histogram: NDArray[np.int64]) -> float:
    """The sum of `sigmoid(x) - 0.5` over all elements counted in `histogram` (int64 `[65536]`).

    Correctly rounded, so it depends neither on order nor on threads; NaN if a NaN is counted.
    """
    return math.fsum((histogram * _table())[histogram > 0].tolist())


@lru_cache(maxsize=1)
def _table() -> NDArray[np.float64]:
    """`sigmoid(x) - 0.5` of each float16 by its bit pattern, as float32 arithmetic gives it.

    CLIP is scaled by a million: there the bias of float32's rounding, summed over 57 million weights,
    moves the last two digits. So the table is what the definition's own arithmetic gives, step by step
    in operations that every machine rounds alike.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):
        x = np.arange(BINS, dtype=np.uint16).view(np.float16).astype(np.float32)
    one = np.float32(1)
    clipped = np.nan_to_num(x, posinf=80, neginf=-80).clip(-80, 80)  # beyond 80 float32 says 0 or 1
    table = (one / (one + _exp(-clipped)) - np.float32(0.5)).astype(np.float64)
    table[np.isnan(x)] = np.nan
    table.setflags(write=False)
    return table


def _exp(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The exponential of float32, |x| <= 80, as PyTorch's vector code computes it.

    That is `expf` of the SLEEF library, 1.0 ulp: reduction by ln 2 in two steps, then a polynomial.
    """
    import numpy as np

    f = np.float32

    def fma(a: Any, b: Any, c: Any) -> Any:
        return (np.multiply(a, b, dtype=np.float64) + c).astype(f)  # float64 holds the product exactly

    power = np.rint(x * f(1.442695040888963))
    s = fma(power, f(-1.428606765330187e-06), fma(power, f(-0.693145751953125), x))
    u: Any = f(0.00019852761)
    for coefficient in (0.0013930436, 0.008333361, 0.041666485, 0.16666667, 0.5):
        u = fma(u, s, f(coefficient))
    u = f(1) + fma(s * s, u, s)
    result: NDArray[np.float32] = np.ldexp(u, power.astype(np.int32))
    return result
