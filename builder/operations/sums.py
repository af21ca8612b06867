"""Sums, order statistics and random draws that are the same on every processor and for any threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from builder.tensors.lazy import LazyTensor
from builder.tensors.merged import Values, windows

if TYPE_CHECKING:
    import torch


def fold(values: torch.Tensor) -> torch.Tensor:
    """The sums of FP64 values along the last dimension, `[…, n]` to `[…]`; the memory is used up.

    Halves are added to each other until one is left: additions of elements, which round alike everywhere,
    where a library's sum hangs on the width of the processor's registers.
    """
    count = values.shape[-1]
    if not count:
        return values.sum(-1)
    while count > 1:
        half = (count + 1) // 2
        values[..., : count - half] += values[..., half:count]
        count = half
    return values[..., 0]


def totals(sources: Sequence[LazyTensor], terms: Callable[[Values], Iterable[torch.Tensor]]) -> list[float]:
    """Sums over whole tensors, in FP64: each window's, added from the first window to the last."""
    found: list[float] = []
    for values in windows(sources):
        sums = [float(fold(term.double())) for term in terms(values)]
        found = [a + b for a, b in zip(found, sums, strict=True)] if found else sums
    return found


def kth_largest(sources: Sequence[LazyTensor], values_of: Callable[[Values], torch.Tensor], k: int) -> float:
    """The k-th largest magnitude, from 1 on, of FP32 values that windows give; exact, in two passes."""
    import torch

    def bits(values: Values) -> torch.Tensor:
        return values_of(values).contiguous().view(torch.int32).bitwise_and_(0x7FFFFFFF)

    def bucket(counts: torch.Tensor, left: int) -> tuple[int, int]:
        above = counts.flip(0).cumsum(0)
        at = int(torch.searchsorted(above, left))
        return len(counts) - 1 - at, left - (int(above[at - 1]) if at else 0)

    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for values in windows(sources):
        counts += torch.bincount(bits(values) >> 16, minlength=len(counts))
    high, left = bucket(counts, k)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for values in windows(sources):
        found = bits(values)
        counts += torch.bincount(found[found >> 16 == high] & 0xFFFF, minlength=len(counts))
    low, _ = bucket(counts, left)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def kept(seed: int, name: str, first: int, count: int, density: float) -> torch.Tensor:
    """Which of a tensor's elements a random draw keeps: bool `[count]`, each true with `density`.

    A draw is a function of the seed, the tensor's name and the element's place alone: the finaliser of
    SplitMix64 (Steele, Lea and Flood 2014) over the place, keyed by the BLAKE3 of seed and name.
    """
    import numpy as np
    import torch

    key = int.from_bytes(blake3(f"{seed}\\0{name}".encode()).digest(8), "little")
    golden = 0x9E3779B97F4A7C15
    start = np.uint64((key + first * golden) % (1 << 64))
    state = np.arange(count, dtype=np.uint64)
    state *= np.uint64(golden)
    state += start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(11)) < np.uint64(round(density * (1 << 53))))
