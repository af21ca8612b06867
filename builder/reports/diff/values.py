"""How two tensors differ, value by value: how many, by how much, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.tensors.lazy import WINDOW, DType, LazyTensor
from builder.tensors.packed import OPAQUE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BLOCK = 1 << 17  # elements compared at once: what that takes stays in the processor's cache
GLANCE = 1 << 10  # elements that nearly always show that a tensor was not rounded as supposed

_NO_NUMBERS = {*OPAQUE, DType.C64}  # none that torch can tell
_HALVES = (DType.F16, DType.BF16)


class Spot(NamedTuple):
    """An element and what either tensor holds there; `at` counts in C order."""

    at: int
    a: float
    b: float

    @property
    def difference(self) -> float:
        """How far apart the two are."""
        return abs(self.a - self.b)


class Rounding(NamedTuple):
    """That one tensor is the other in another type, to the last bit: `of` is the other, `a` or `b`.

    Its values were rounded to `via` on the way, where that is not simply the type that they now have.
    """

    of: str
    via: DType | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """What comparing two tensors of the same shape has shown.

    Values are compared in `unit`, the narrower of two floating types, to which the other is rounded; it
    is None for all that has no unit in the last place. Equal is what has the same bits, so a NaN equals
    the same NaN, and the two zeros differ. `distances[k]` counts the differing values whose distance in
    units in the last place takes k bits: 1, 2 to 3, 4 to 7, …; the distance is how many numbers of the
    type lie between the two, plus one. `not_numbers` are those differing where a NaN is part of it: they
    have no distance. `farthest` is the place of the greatest distance, `steps` that distance; `largest`
    is the place of the largest finite difference. `comparable` is False where nothing can be said of two
    types but that they differ. `rounding` is how the one came from the other, if so: then nothing is
    lost or changed beyond that.
    """

    elements: int
    differing: int = 0
    not_numbers: int = 0
    unit: DType | None = None
    distances: tuple[int, ...] = ()
    steps: int = 0
    first: Spot | None = None
    farthest: Spot | None = None
    largest: Spot | None = None
    rounding: tuple[Rounding, ...] = ()
    comparable: bool = True

    @property
    def alike(self) -> bool:
        """Whether nothing but the type of the numbers tells them apart."""
        return self.comparable and (not self.differing or bool(self.rounding))


class Comparer:
    """Compares tensors one after the other, in buffers of its own; `advance` hears of bytes read."""

    def __init__(self, advance: Callable[[int], None] = lambda _: None) -> None:
        self.advance = advance
        self._buffers = memoryview(bytearray(WINDOW)), memoryview(bytearray(WINDOW))

    def compare(self, a: LazyTensor, b: LazyTensor) -> Values:
        """How two tensors of as many elements differ. Raises SourceError when bytes cannot be had."""
        assert a.numel == b.numel
        if a.dtype is not b.dtype and not {a.dtype, b.dtype}.isdisjoint(_NO_NUMBERS):
            return Values(a.numel, a.numel, comparable=a.numel == 0)
        numbers = a.dtype.floating and b.dtype.floating and a.dtype not in _NO_NUMBERS
        tally = _Tally(_narrower(a.dtype, b.dtype) if numbers else None)
        candidates = _candidates(a.dtype, b.dtype) if numbers else []
        skipped = False
        for start, raw_a, raw_b in self._windows(a, b):
            if a.dtype is b.dtype and _same_bytes(raw_a, raw_b):
                skipped = True
                continue
            tally.window(raw_a, a.dtype, raw_b, b.dtype, start)
            for count in (GLANCE, _step(a, b)):
                near = raw_a[: count * a.dtype.itemsize], raw_b[: count * b.dtype.itemsize]
                candidates = [c for c in candidates if _holds(c, near[0], a.dtype, near[1], b.dtype)]
        if skipped and tally.differing and candidates:  # it has to hold of what is equal as well
            for _, raw_a, raw_b in self._windows(a, b, again=True):
                candidates = [c for c in candidates if _holds(c, raw_a, a.dtype, raw_b, b.dtype)]
        if not numbers and a.dtype is not b.dtype and not tally.differing:
            candidates = [Rounding("a"), Rounding("b")]
        changed = a.dtype is not b.dtype or tally.differing
        return tally.values(a.numel, tuple(candidates) if changed else ())

    def _windows(
        self, a: LazyTensor, b: LazyTensor, again: bool = False
    ) -> Iterator[tuple[int, memoryview, memoryview]]:
        """The same elements of both, window by window, with the number of the first."""
        sizes = [t.dtype.itemsize for t in (a, b)]
        total = a.numel if a.dtype.bits >= 8 else a.nbytes  # of packed ones, bytes
        for start in range(0, total, _step(a, b)):
            count = min(_step(a, b), total - start)
            pieces = []
            for tensor, size, buffer in zip((a, b), sizes, self._buffers, strict=True):
                piece = buffer[: count * size]
                tensor.read_into(start * size, piece)
                pieces.append(piece)
            yield start, pieces[0], pieces[1]
            if not again:
                self.advance(sum(map(len, pieces)))


def _step(a: LazyTensor, b: LazyTensor) -> int:
    """Elements of a window of both."""
    return WINDOW // max(a.dtype.itemsize, b.dtype.itemsize)


class _Tally:
    """What is counted of one pair while its windows pass; compares in `unit`, or else what bits say."""

    def __init__(self, unit: DType | None) -> None:
        self.unit = unit
        self.differing = self.not_numbers = self.steps = 0
        self.first: Spot | None = None
        self.farthest: Spot | None = None
        self.largest: Spot | None = None
        self.distances = [0] * 65

    def values(self, elements: int, rounding: tuple[Rounding, ...]) -> Values:
        """All that was counted."""
        top = max((k for k, n in enumerate(self.distances) if n), default=-1)
        return Values(
            elements,
            self.differing,
            self.not_numbers,
            self.unit,
            tuple(self.distances[: top + 1]),
            self.steps,
            self.first,
            self.farthest,
            self.largest,
            rounding,
        )

    def window(self, raw_a: memoryview, a: DType, raw_b: memoryview, b: DType, start: int) -> None:
        """Count the differences of one window, whose first element is number `start`."""
        if self.unit is not None:
            x, y = (_cast(_torch(raw, d), self.unit) for raw, d in ((raw_a, a), (raw_b, b)))
            for at in range(0, len(x), BLOCK):
                self.floats(x[at : at + BLOCK], y[at : at + BLOCK], start + at)
        elif a in _NO_NUMBERS:
            self.opaque(_bits(raw_a, a), _bits(raw_b, b), start)
        else:
            self.others(_numbers(raw_a, a), _numbers(raw_b, b), start)

    def floats(self, x: torch.Tensor, y: torch.Tensor, start: int) -> None:
        """Count the differences of a block of numbers of one floating type."""
        import numpy as np

        distance = _distance(x, y)
        # NaN and infinity show in the extreme, so that only a block that has some is looked at closely.
        double = x.element_size() == 8
        apart = (x.double() - y.double() if double else x.float() - y.float()).abs_()
        top = float(apart.max())
        odd = 0
        if not math.isfinite(top):
            strange = ((x != x) | (y != y)).numpy() & (distance != 0)
            odd = int(np.count_nonzero(strange))
            apart = (x.double() - y.double()).abs_()
            apart[~apart.isfinite()] = 0
            top = float(apart.max())
        differing = int(np.count_nonzero(distance))
        if not differing:
            return
        self._count(distance, differing, start, lambda i: (float(x[i]), float(y[i])))
        if odd:
            self.not_numbers += odd
            distance[strange] = 0
        steps = int(distance.max())
        if steps > self.steps:
            self.steps, at = steps, int(distance.argmax())
            self.farthest = Spot(start + at, float(x[at]), float(y[at]))
        for bits, count in enumerate(_bit_lengths(distance)):
            self.distances[bits] += count
        self._extreme(top, apart.argmax, start, lambda i: (float(x[i]), float(y[i])))

    def others(self, x: NDArray[np.generic], y: NDArray[np.generic], start: int) -> None:
        """Count the differences of integers, or of integers and floating numbers."""
        import numpy as np

        differing = x != y
        count = int(np.count_nonzero(differing))
        if not count:
            return
        self._count(differing, count, start, lambda i: (float(x[i]), float(y[i])))
        with np.errstate(invalid="ignore"):
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
        self.not_numbers += int(np.count_nonzero(np.isnan(apart)))
        apart[~np.isfinite(apart)] = 0
        self._extreme(float(apart.max()), apart.argmax, start, lambda i: (float(x[i]), float(y[i])))

    def opaque(self, x: NDArray[np.generic], y: NDArray[np.generic], start: int) -> None:
        """Count what differs of packed numbers, or of complex ones."""
        import numpy as np

        differing = x != y
        self._count(differing, int(np.count_nonzero(differing)), start, lambda _: (math.nan, math.nan))

    def _count(
        self,
        differing: NDArray[np.generic],
        count: int,
        start: int,
        held: Callable[[int], tuple[float, float]],
    ) -> None:
        if count and self.first is None:
            at = int((differing != 0).argmax())
            self.first = Spot(start + at, *held(at))
        self.differing += count

    def _extreme(
        self, top: float, find: Callable[[], Any], start: int, held: Callable[[int], tuple[float, float]]
    ) -> None:
        if top > 0 and (self.largest is None or top > self.largest.difference):
            at = int(find())
            self.largest = Spot(start + at, *held(at))


def _narrower(a: DType, b: DType) -> DType:
    return a if a.bits < b.bits else b


def _candidates(a: DType, b: DType) -> list[Rounding]:
    """The ways in which one of two types may have come from the other."""
    found = [Rounding("a"), Rounding("b")] if a is not b else []
    for of, source, made in (("a", a, b), ("b", b, a)):
        found += [Rounding(of, via) for via in _HALVES if via not in (source, made) and made.bits > 8]
    return found


def _holds(rounding: Rounding, raw_a: memoryview, a: DType, raw_b: memoryview, b: DType) -> bool:
    """Whether in this window one tensor is the other, rounded."""
    import torch

    source, made = (_torch(raw, d) for raw, d in ((raw_a, a), (raw_b, b)))
    if rounding.of == "b":
        source, made = made, source
    dtype = b if rounding.of == "a" else a
    rounded = _cast(_cast(source, rounding.via) if rounding.via else source, dtype)
    bits = _INTEGERS[dtype.itemsize]
    if torch.equal(rounded.view(getattr(torch, bits)), made.view(getattr(torch, bits))):
        return True
    nan = made != made
    return (
        bool(nan.any())
        and bool(((rounded != rounded) == nan).all())
        and torch.equal(rounded[~nan].view(getattr(torch, bits)), made[~nan].view(getattr(torch, bits)))
    )


_INTEGERS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def _torch(raw: memoryview, dtype: DType) -> torch.Tensor:
    import torch

    return torch.frombuffer(raw, dtype=dtype.torch)


def _cast(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Rounded as numeric profile 1 does: to nearest even, FP64 by way of FP32."""
    import torch

    if values.dtype == torch.float64 and dtype is not DType.F64:
        values = values.float()
    return values.to(dtype.torch)


def _same_bytes(a: memoryview, b: memoryview) -> bool:
    import numpy as np

    kind = "<u8" if len(a) % 8 == 0 else "u1"
    return bool((np.frombuffer(a, kind) == np.frombuffer(b, kind)).all())


def _bits(raw: memoryview, dtype: DType) -> NDArray[np.generic]:
    import numpy as np

    return np.frombuffer(raw, f"<u{dtype.itemsize}")


def _numbers(raw: memoryview, dtype: DType) -> NDArray[np.generic]:
    import numpy as np

    if dtype.floating:
        found: NDArray[np.generic] = _torch(raw, dtype).double().numpy()
        return found
    kind = "u1" if dtype is DType.BOOL else dtype.code.lower()[0] + str(dtype.itemsize)
    return np.frombuffer(raw, f"<{kind}")


def _distance(x: torch.Tensor, y: torch.Tensor) -> NDArray[np.unsignedinteger[Any]]:
    """How many steps from number to number apart, in unsigned integers of the numbers' own size.

    The bits of a floating number, read as sign and magnitude, count the numbers of its type.
    """
    import numpy as np
    import torch

    size = x.element_size()
    ordered = []
    for values in (x, y):
        bits = values.view(getattr(torch, _INTEGERS[size])).numpy()
        flip = bits >> (8 * size - 1)  # all ones for a negative number
        flip &= np.iinfo(bits.dtype).max
        flip ^= bits
        ordered.append(flip)
    high = np.maximum(*ordered)
    high -= np.minimum(*ordered)  # wraps, and is right as an unsigned number
    distance: NDArray[np.unsignedinteger[Any]] = high.view(f"u{size}")
    return distance


def _bit_lengths(distance: NDArray[np.unsignedinteger[Any]]) -> list[int]:
    """How many distances there are of each bit length, from 0 bits (which is left at 0) on."""
    import numpy as np

    size = distance.itemsize
    if size <= 2:
        counts = np.bincount(distance, minlength=1)
        counts[0] = 0
        edges = [0, *(1 << k for k in range(8 * size))]
        edges = [e for e in edges if e < len(counts)]
        return [int(n) for n in np.add.reduceat(counts, edges)]
    # Without the bit below the highest, no number is rounded up into the next power of two.
    lone = (distance & ~(distance >> 1)).astype(f"f{size}")
    exponents = lone.view(f"i{size}") >> {4: 23, 8: 52}[size]
    bias = {4: 126, 8: 1022}[size]
    return [0] + [int(n) for n in np.bincount(exponents)[bias + 1 :]]
