"""What all merges share: which tensors take part, with which weights, and in which arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from builder.base.errors import OutputError, Problem
from builder.operations.registry import Applied, Operation, Param, Setting, Tensors
from builder.operations.weights import by_tensor
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.merged import Elementwise
from builder.tensors.moves import Columns, SideBySide
from builder.tensors.packed import OPAQUE

if TYPE_CHECKING:
    import torch

EXAMPLES = 3  # tensors that a message names
POSITION_IDS = "position_ids"


@dataclass(frozen=True)
class Site:
    """Where a merge is at: the tensor's name, the weights and other parameters that hold for it.

    `dtype` is that of what is made, and `round` what follows every product and sum: nothing in exact
    arithmetic, where it is FP32; else rounding to the files' own type. Where these have several, `types`, it
    is that which torch gives what is computed of some.
    """

    name: str
    params: Mapping[str, Any]
    dtype: DType = DType.F32
    types: tuple[DType, ...] = ()

    def __getitem__(self, param: str) -> Any:
        return self.params[param]

    def as_made(self, tensor: LazyTensor) -> LazyTensor:
        """A tensor in the type of what is made."""
        if tensor.dtype is self.dtype:
            return tensor
        return Elementwise([tensor], lambda values: values[0], self.dtype)

    def round(self, values: torch.Tensor, *of: int) -> torch.Tensor:
        """Values as they are after a step of the arithmetic; changes them in place.

        `of` are the inputs that they were computed of, where these are not all.
        """
        dtype = _common([self.types[i] for i in of]) if of and self.types else self.dtype
        return values if dtype is DType.F32 else values.copy_(values.to(dtype.torch))


Make = Callable[[Sequence[LazyTensor], Site], LazyTensor]


@dataclass(frozen=True)
class Merge:
    """A merge, tensor by tensor: `make` gets the inputs in the order of their keys, those of a table last.

    `make` may give one of the inputs itself, where the weights say so. The result has the FP32 of exact
    arithmetic, or the files' type: rounded after each product and sum where the merge `rounds`, else once.
    `across` finds something in whole models, when it is asked for: `make` has it as the site's `model`.
    """

    name: str
    doc: str
    inputs: tuple[str, ...]
    make: Make
    params: Mapping[str, Param] = field(default_factory=dict)
    many: str | None = None
    weighted: bool = True
    rounds: bool = False
    across: Callable[[Mapping[str, Tensors], Setting], Callable[[], Any]] | None = None
    version: int = 1

    @property
    def operation(self) -> Operation:
        """The merge as an operation over components."""
        return Operation(
            self.name,
            self.version,
            self.doc,
            self.inputs,
            self._apply,
            many=self.many,
            weighted=self.weighted,
            whole_models=self.across is not None,
            params=self.params,
        )

    def _apply(self, inputs: Mapping[str, Tensors], params: Mapping[str, Any], setting: Setting) -> Applied:
        order = [*self.inputs, *(k for k in inputs if k not in self.inputs and "@" not in k)]
        first = inputs[order[0]]
        names = [n for n, t in first.items() if takes_part(n, t, setting)]
        _check_alike(self.name, {k: inputs[k] for k in order}, names, setting.cls)
        weights = self._weights(params, names, setting)
        names_ = [k.partition(".")[2] for k in order if k not in self.inputs]
        common: dict[str, Any] = {"names": names_, "keys": order}
        if self.across is not None:
            common["model"] = self.across(inputs, setting)
        made = dict(first)
        words = []
        for name in names:
            sources = [inputs[key][name] for key in order]
            types = () if setting.arithmetic == "exact" else tuple(s.dtype for s in sources)
            site = Site(name, {**weights[name], **common}, _common(types), types)
            made[name] = _made(self.make, sources, site)
            if isinstance(made[name], SideBySide):
                few, all_ = min(s.shape[1] for s in sources), sources[0].shape[1]
                words.append(f"{self.name}: of `{name}` the first {few} of {all_} input channels are merged")
        return Applied(made, tuple(words))

    def _weights(
        self, params: Mapping[str, Any], names: Sequence[str], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """The parameters as they hold for each tensor."""
        found: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key, value in params.items():
            if key == self.many:
                each = [by_tensor(w, names, setting.block) for w in value.values()]
                for name in names:
                    found[name][key] = [numbers[name] for numbers in each]
            elif self.params[key].kind == "weights":
                numbers = by_tensor(value, names, setting.block)
                for name in names:
                    found[name][key] = numbers[name]
            else:
                for name in names:
                    found[name][key] = value
        return found


def once(find: Callable[[], Any]) -> Callable[[], Any]:
    """The same, found by whichever thread first asks."""
    found: list[Any] = []
    lock = threading.Lock()

    def get() -> Any:
        with lock:
            if not found:
                found.append(find())
        return found[0]

    return get


def takes_part(name: str, tensor: LazyTensor, setting: Setting) -> bool:
    """Whether a tensor is a weight that merges change: no integer, no positions, no constant, not empty."""
    plain = tensor.dtype.floating and tensor.dtype not in OPAQUE and tensor.numel > 0
    return plain and not name.endswith(POSITION_IDS) and name not in setting.constants


def _made(make: Make, sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    """A tensor merged; of the wider first layer of an inpainting model, the channels that all inputs have."""
    first = sources[0]
    if all(s.shape == first.shape for s in sources):
        return make(sources, site)
    common, width = min(s.shape[1] for s in sources), first.shape[1]
    merged = make([s if s.shape[1] == common else Columns(s, 0, common) for s in sources], site)
    own = Columns(first, common, width - common)
    return SideBySide([site.as_made(merged), site.as_made(own)])


def _common(types: Sequence[DType]) -> DType:
    """The type that torch gives what is computed of these; FP32 of none."""
    return types[0] if len(set(types)) == 1 else DType.F32


def _check_alike(op: str, inputs: Mapping[str, Tensors], names: Sequence[str], cls: str) -> None:
    """Raise OutputError when inputs do not hold the same tensors; a wider first layer is no other model."""
    (first, tensors), *others = inputs.items()
    for key, other in others:
        odd = [
            f"`{name}` is {list(tensors[name].shape)} in `{first}`, "
            + (f"{list(other[name].shape)} in `{key}`" if name in other else f"not there in `{key}`")
            for name in names
            if name not in other or not fits(tensors[name], other[name])
        ]
        if odd:
            more = [f"and {len(odd) - EXAMPLES:,} more"] * (len(odd) > EXAMPLES)
            fact = f"{op} needs models of one kind, and `{key}` has another {cls} than `{first}`"
            raise OutputError(Problem(fact, evidence=(*odd[:EXAMPLES], *more)))


def fits(first: LazyTensor, other: LazyTensor) -> bool:
    """Whether two are of one shape, or the first is the wider first layer of an inpainting model."""
    if first.shape == other.shape:
        return True
    a, b = first.shape, other.shape
    return len(a) == len(b) == 4 and a[0] == b[0] and a[2:] == b[2:] and (a[1], b[1]) in {(9, 4), (8, 4)}
