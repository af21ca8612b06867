"""Weights packed anew, as ComfyUI reads them: scaled FP8, or integers of 8 bits with a scale for each row."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from builder.base.errors import Problem
from builder.tensors.cast import UnfitError
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.merged import Computed, Values, windows
from builder.tensors.packed.schemes import DESCRIPTION, OPAQUE

if TYPE_CHECKING:
    import torch

LEAST = 1 << 10  # numbers of a weight: what has no more is not packed, nor
STEP = 16  # what kernels cannot multiply: sides that are no multiples of this
_PLAIN = re.compile(r"norm|embed")  # in the name of a layer: none that multiplies activations
_SMALLEST = 1e-30  # scale: FP32 can divide by it


class Quantize(NamedTuple):
    """How weights are packed, as plain data: of which classes, but there not the layers of which patterns."""

    scheme: str
    unquantized: Mapping[str, tuple[str, ...]]
    version: int = 1


class _Form(NamedTuple):
    """A scheme: its type and its name in descriptions, the greatest number, whether each row has a scale."""

    dtype: DType
    called: str
    most: float
    by_row: bool


FORMS = {
    "fp8": _Form(DType.F8_E4M3, "float8_e4m3fn", 448.0, False),
    "int8": _Form(DType.I8, "int8_tensorwise", 127.0, True),
}


def encoded(
    tensors: Mapping[str, LazyTensor], scheme: str, stays: Callable[[str], bool]
) -> dict[str, LazyTensor]:
    """What becomes of the weights that are packed: each with its scale and its description beside it.

    Those are the matrices of linear layers, but small ones, norms, embeddings and layers that `stays` speaks
    of. Scales are found in a pass of their own over each weight. What is no number raises UnfitError when it
    is read: no scheme has it.
    """
    form = FORMS[scheme]
    text = json.dumps({"format": form.called}).encode()
    made: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        layer, _, own = name.rpartition(".")
        if own == "weight" and _is_linear(layer, tensor) and not stays(layer):
            scales = _Scales(name, tensor, form)
            made[name] = _Packed(scales)
            made[f"{layer}.weight_scale"] = _Scale(scales)
            made[f"{layer}.{DESCRIPTION}"] = MemoryTensor(DType.U8, (len(text),), text)
    return made


def _is_linear(layer: str, tensor: LazyTensor) -> bool:
    plain = tensor.dtype.floating and tensor.dtype not in OPAQUE and len(tensor.shape) == 2
    sides = all(n % STEP == 0 for n in tensor.shape)
    return plain and sides and tensor.numel > LEAST and not _PLAIN.search(layer)


class _Scales:
    """The scales of a weight, found once, in a first pass over all of it: one, or one a row."""

    def __init__(self, name: str, source: LazyTensor, form: _Form) -> None:
        self.name, self.source, self.form = name, source, form
        self._lock = threading.Lock()
        self._found: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """FP32 `[rows]` or `[1]`, no matter which thread asks first."""
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> torch.Tensor:
        import torch

        rows, columns = self.source.shape
        most = torch.zeros(rows if self.form.by_row else 1)
        for values in windows([self.source]):
            sizes = values[0].abs_()
            if not bool(sizes.isfinite().all()):
                fact = f"tensor `{self.name}` has values that are no numbers, which cannot be quantized"
                hint = "take a source that is sound, or leave `quantize` out"
                raise UnfitError(Problem(fact, hint=hint))
            if self.form.by_row:
                of = torch.arange(values.first, values.first + values.count) // columns
                most.scatter_reduce_(0, of, sizes, "amax")
            else:
                most = torch.maximum(most, sizes.amax())
        return (most / self.form.most).clamp_(min=_SMALLEST)


class _Packed(Computed):
    """A weight divided by its scales and rounded to nearest even."""

    __slots__ = ("scales",)

    def __init__(self, scales: _Scales) -> None:
        super().__init__([scales.source], scales.form.dtype, scales.source.shape)
        self.scales = scales

    def window(self, values: Values) -> torch.Tensor:
        """Some of it, as FP32 that need be rounded no more, or as FP8."""
        import torch

        found, form, numbers = self.scales.get(), self.scales.form, values[0]
        if form.by_row:
            of = torch.arange(values.first, values.first + values.count) // self.shape[1]
            return numbers.div_(found[of]).round_().clamp_(-form.most, form.most)
        return numbers.mul_(1.0 / found).clamp_(-form.most, form.most)


class _Scale(Computed):
    """The scales of a weight as a tensor: one number, or a column."""

    __slots__ = ("scales",)

    def __init__(self, scales: _Scales) -> None:
        super().__init__([], DType.F32, (scales.source.shape[0], 1) if scales.form.by_row else ())
        self.scales = scales

    def window(self, values: Values) -> torch.Tensor:
        """Some of them."""
        return self.scales.get()[values.first : values.first + values.count]
