"""Casts of numeric profile 1: round to nearest even, nothing non-finite unless it is asked for."""

from __future__ import annotations

import math
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from builder.base.errors import CkptError, OutputError, Problem
from builder.tensors.conversions import bits, copy_into, greatest
from builder.tensors.lazy import WINDOW, DType, LazyTensor
from builder.tensors.packed import OPAQUE, packing
from builder.tensors.scratch import scratch

if TYPE_CHECKING:
    import torch

Precision = Literal["fp16", "bf16", "fp32", "keep"]
PRECISIONS: dict[str, DType | None] = {"fp16": DType.F16, "bf16": DType.BF16, "fp32": DType.F32, "keep": None}

Narrow = bool | Literal["fewer"]
Overflow = Literal["error", "clamp", "keep"]
NonFinite = Literal["error", "keep"]


_WAYS = {  # to let values pass: in a recipe, and on the command line
    '`overflow = "clamp"` or `"keep"`': "`--overflow clamp` or `keep`",
    '`non_finite = "keep"`': "`--non-finite keep`",
}


class UnfitError(OutputError):
    """A source has values that an output cannot hold, or that are none: no other attempt will help."""

    def with_options(self) -> UnfitError:
        """The same, its hints in the words of the command line."""
        made = []
        for problem in self.problems:
            ways = [option for key, option in _WAYS.items() if key in (problem.hint or "")]
            made.append(replace(problem, hint=f"to make it all the same, give {' and '.join(ways)}"))
        return type(self)(*made)


class BeyondError(UnfitError):
    """All values are numbers, but some are beyond the output's precision: another one would do."""


@dataclass
class Fault:
    """Values of one tensor that its new precision cannot hold, or that were never numbers."""

    overflow: int = 0
    nan: int = 0
    infinite: int = 0
    largest: float = 0.0


@dataclass
class Faults:
    """Collects faults by tensor name while tensors are read; one collector serves many threads."""

    by_name: dict[str, Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, fault: Fault) -> None:
        """Count a window's faults to its tensor's."""
        with self._lock:
            known = self.by_name.setdefault(name, Fault())
            known.overflow += fault.overflow
            known.nan += fault.nan
            known.infinite += fault.infinite
            known.largest = max(known.largest, fault.largest)

    def error(self, what: str, dtype: DType | None) -> CkptError | None:
        """The error that names every faulty tensor, or None; `what` was to be made of them."""
        if not self.by_name:
            return None
        problems = []
        for name, fault in sorted(self.by_name.items()):
            evidence, hints = [], []
            for_overflow, for_non_finite = _WAYS
            if fault.overflow:
                target = dtype.code if dtype is not None else "the output"
                evidence.append(
                    f"{fault.overflow:,} finite values are beyond {target}, the largest is {fault.largest:g}"
                )
                hints.append(for_overflow)
            if fault.nan or fault.infinite:
                evidence.append(f"{fault.nan:,} are NaN, {fault.infinite:,} are infinite")
                hints.append(for_non_finite)
            problems.append(
                Problem(
                    f"tensor `{name}` of {what} has values that would not survive",
                    evidence=tuple(evidence),
                    hint=f"to build all the same, put {' and '.join(hints)} under [output]",
                )
            )
        damaged = any(f.nan or f.infinite for f in self.by_name.values())
        return (UnfitError if damaged else BeyondError)(*problems)


class Cast(LazyTensor):
    """A tensor in another precision, or in its own but checked.

    FP64 goes through FP32; what keeps its type keeps every bit. `overflow` says what becomes of finite
    values beyond the new type's range: `error` records them in `faults` (and writes what the cast gives),
    `clamp` takes the nearest finite value, `keep` lets them be infinite. `non_finite` says the same of NaN
    and infinity in the source; a NaN that is kept becomes the quiet NaN of the new type, with its sign.
    """

    __slots__ = ("faults", "name", "non_finite", "overflow", "source")

    def __init__(
        self,
        source: LazyTensor,
        dtype: DType,
        *,
        name: str,
        faults: Faults,
        overflow: Overflow = "error",
        non_finite: NonFinite = "error",
    ) -> None:
        super().__init__(dtype, source.shape)
        self.source = source
        self.name = name
        self.faults = faults
        self.overflow = overflow
        self.non_finite = non_finite

    @property
    def computed(self) -> bool:
        """True: torch rounds."""
        return True

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The source."""
        return (self.source,)

    def read_into(self, start: int, out: memoryview) -> None:
        """Read the source's elements and round them, a scratch buffer at a time."""
        import torch

        if self.dtype is self.source.dtype:
            self.source.read_into(start, out)
            values = torch.frombuffer(out, dtype=self.dtype.torch)
            self._check(values, values)
            return
        size, source_size = self.dtype.itemsize, self.source.dtype.itemsize
        first, count = start // size, len(out) // size
        step = WINDOW // source_size
        with scratch() as buffer:
            for done in range(0, count, step):
                elements = min(step, count - done)
                data = buffer[: elements * source_size]
                self.source.read_into((first + done) * source_size, data)
                target = out[done * size : (done + elements) * size]
                values = torch.frombuffer(data, dtype=self.source.dtype.torch)
                result = torch.frombuffer(target, dtype=self.dtype.torch)
                copy_into(result, values.float() if values.dtype == torch.float64 else values)
                self._check(values, result)

    def _check(self, values: torch.Tensor, result: torch.Tensor) -> None:
        # NaN and infinity show in the greatest, and finding that costs a tenth of looking at each value.
        if math.isfinite(greatest(result)):
            return
        source = values.double()
        bad_source = ~source.isfinite()
        overflow = ~result.double().isfinite() & ~bad_source
        fault = Fault()
        if self.overflow == "clamp":
            limit = _largest(self.dtype)
            result[overflow] = (source[overflow].sign() * limit).to(result.dtype)
        elif self.overflow == "error" and overflow.any():
            fault.overflow = int(overflow.sum())
            fault.largest = float(source[overflow].abs().max())
        if self.non_finite == "error" and bad_source.any():
            fault.nan = int(source.isnan().sum())
            fault.infinite = int(source.isinf().sum())
        elif self.dtype is not self.source.dtype and (nan := source.isnan()).any():
            _canonical_nan(result, self.dtype, nan, _signs(values, self.source.dtype))
        if fault != Fault():
            self.faults.add(self.name, fault)


# The quiet NaN of a type, as its bits; those of the negative one have the first bit set too.
_QUIET_NAN = {DType.F16: 0x7E00, DType.BF16: 0x7FC0, DType.F32: 0x7FC00000}
_UNSIGNED_NAN = {DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ}  # they have one NaN, whose first bit is set


def _canonical_nan(result: torch.Tensor, dtype: DType, nan: torch.Tensor, negative: torch.Tensor) -> None:
    """One quiet NaN a type, with its sign: what a cast makes of the other bits hangs on the processor."""
    patterns = bits(result)
    quiet = _QUIET_NAN[dtype]
    patterns[nan & ~negative] = quiet
    patterns[nan & negative] = quiet - (1 << (dtype.bits - 1))


def _signs(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Which numbers have a minus, by their bits: a conversion may lose that of a NaN."""
    signs = bits(values) < 0
    return ~signs & signs if dtype in _UNSIGNED_NAN else signs


def _largest(dtype: DType) -> float:
    import torch

    return float(torch.finfo(dtype.torch).max)


def cast_all(
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    *,
    faults: Faults,
    overflow: Overflow = "error",
    non_finite: NonFinite = "error",
    narrow: Narrow = False,
    kept: Container[str] = (),
) -> dict[str, LazyTensor]:
    """Each floating tensor as a `Cast` to `precision`; integers, booleans and empty tensors as they are.

    With `narrow`, what takes no more bits than `precision` keeps its type (with `fewer`, what takes fewer),
    and so do packed weights. Their companions always do, and the tensors whose names are `kept`. Raises
    SourceError where a plain cast would misread packed weights.
    """
    if PRECISIONS[precision] is not None and not narrow and (packed := packing(tensors)).weights:
        raise packed.refused(
            "cannot be cast as if they were numbers", "the precision `keep` leaves them as they are"
        )
    made: dict[str, LazyTensor] = {}
    for name, dtype in cast_types(tensors, precision, narrow, kept).items():
        tensor = tensors[name]
        if not tensor.dtype.floating or tensor.numel == 0 or dtype is tensor.dtype in OPAQUE:
            made[name] = tensor
        else:
            made[name] = Cast(
                tensor, dtype, name=name, faults=faults, overflow=overflow, non_finite=non_finite
            )
    return made


def cast_types(
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    narrow: Narrow = False,
    kept: Container[str] = (),
) -> dict[str, DType]:
    """The type that each tensor has in a precision, as `cast_all` makes it."""
    wanted = PRECISIONS[precision]
    packed = packing(tensors).names if wanted is not None else set()

    def made(name: str, dtype: DType) -> DType:
        if wanted is None or not dtype.floating or name in packed or name in kept:
            return dtype
        stays = dtype.bits < wanted.bits if narrow == "fewer" else narrow and dtype.bits <= wanted.bits
        return dtype if stays else wanted

    return {name: made(name, tensor.dtype) for name, tensor in tensors.items()}
