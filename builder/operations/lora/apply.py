"""The operation that bakes adapters into a model."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.base.errors import Problem, SourceError, did_you_mean
from builder.base.words import counted, listed
from builder.operations.lora.kinds import Adapter, change
from builder.operations.lora.names import Module, Target, flat, modules
from builder.operations.registry import Applied, Operation, Param, Setting, Tensors
from builder.operations.weights import by_tensor
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.merged import Computed, Values, Whole, part, whole

if TYPE_CHECKING:
    import torch

EXAMPLES = 3
PEFT = "lora_adapter_metadata"  # JSON of what a file's tensors do not say
_OF_BIAS = {"bias-diff", "bias-up"}
_OF_ALL = {"alpha", "scale"}  # which change nothing by themselves
_PLAIN = {"up", "down", *_OF_ALL}  # a LoRA, any rows of which can be computed by themselves


class Use(NamedTuple):
    """A module of a file at work on a tensor, or on a part of it, at a strength.

    `said` is what PEFT says of it.
    """

    file: str
    module: Module
    target: Target
    strength: float
    said: Mapping[str, Any]

    @property
    def plain(self) -> bool:
        """Whether any rows of what it adds can be computed by themselves."""
        whole_rows = not (self.target.transposed or self.target.swapped)
        return whole_rows and {"up", "down"} <= self.module.tensors.keys() <= _PLAIN

    def adapter(self) -> Adapter:
        """The module with its tensors read, as FP64."""
        held = self.module.tensors
        alpha = float(whole(held["alpha"])) if "alpha" in held else self.said.get("lora_alpha")
        parts = {n: whole(t).double() for n, t in held.items() if n not in {"alpha", *_OF_BIAS}}
        return Adapter(parts, alpha, bool(self.said.get("use_rslora")))


def _apply(inputs: Mapping[str, Tensors], params: Mapping[str, Any], setting: Setting) -> Applied:
    base = inputs["a"]
    own = setting.modules(setting.cls, base)
    weights: dict[str, list[Use]] = defaultdict(list)
    biases: dict[str, list[Use]] = defaultdict(list)
    words = []
    for name, strengths in params["loras"].items():
        file = inputs[f"loras.{name}"]
        found, strange = modules(file)
        _check_used(name, found, strange, own, params, setting)
        by_name = by_tensor(strengths, base, setting.block)
        said = peft(setting.metadata.get(f"loras.{name}", {}))
        mine = [m for m in found.values() if m.name in own]
        for module in mine:
            for kind, uses in (("weight", weights), ("bias", biases)):
                if (target := own[module.name].get(kind)) is not None and _speaks(module, kind):
                    of = next((v for k, v in said.items() if module.name.startswith(k)), {})
                    uses[target.tensor].append(Use(name, module, target, by_name[target.tensor], of))
        if mine:
            words.append(f"apply-lora: {len(mine):,} of {len(found):,} modules of `{name}` are its")
    made: dict[str, LazyTensor] = {}
    for name, tensor in base.items():
        on_weight = [u for u in weights[name] if u.strength]
        on_bias = [u for u in biases[name] if u.strength]
        if on_weight and all(u.plain for u in on_weight):
            made[name] = _Plain(tensor, [_checked(u, tensor) for u in on_weight])
        elif on_weight or on_bias:
            made[name] = Whole([tensor], _baking(on_weight, on_bias))
        else:
            made[name] = tensor
    return Applied(made, tuple(words))


def _speaks(module: Module, kind: str) -> bool:
    """Whether a module changes the weight, or the bias, of what it is of."""
    of_bias = module.tensors.keys() & _OF_BIAS
    return bool(of_bias if kind == "bias" else module.tensors.keys() - _OF_BIAS - _OF_ALL)


def peft(metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """What PEFT's metadata say of modules, by the beginning of their names, the longest first."""
    try:
        said = json.loads(metadata.get(PEFT, "{}"))
    except (ValueError, RecursionError):
        return {}
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in said.items() if isinstance(said, dict) else ():
        head, _, word = key.rpartition(".")
        if word in ("lora_alpha", "use_rslora") and isinstance(value, int | float):
            found[f"{head}." if head else ""][word] = value
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


# ── the whole of a file is used ──


def _check_used(
    name: str,
    found: Mapping[str, Module],
    strange: Sequence[str],
    own: Mapping[str, Mapping[str, Target]],
    params: Mapping[str, Any],
    setting: Setting,
) -> None:
    """Raise SourceError when tensors of a file are for nothing that the model has, unless that is allowed."""
    tables = {c: own if c == setting.cls else setting.modules(c, None) for c in params["classes"]}

    def used(module: Module) -> bool:
        kinds = [kind for kind in ("weight", "bias") if _speaks(module, kind)]
        return any(all(kind in table.get(module.name, {}) for kind in kinds) for table in tables.values())

    left = [m for m in found.values() if not used(m)]
    if not (left or strange) or params["unmatched"] == "ignore":
        return
    counts = Counter(cls for cls, table in tables.items() for m in found.values() if m.name in table)
    at_work = [f"{counted(number, 'module')} of {cls}" for cls, number in counts.items()]
    names = [*(n for m in left for n in m.names), *strange]
    likely = [n for table in tables.values() for n in table] if counts else []
    near = did_you_mean(left[0].name, likely) if left else None
    raise SourceError(
        Problem(
            f"the LoRA `{name}` has {counted(len(names), 'tensor')} for nothing in the model",
            evidence=(
                f"such as {listed(tuple(names), EXAMPLES)}",
                f"used are {', '.join(at_work) or 'none'}",
            ),
            hint=near or 'it may be for another kind of model; `unmatched = "ignore"` leaves them out',
        )
    )


# ── computing ──


def _checked(use: Use, tensor: LazyTensor) -> Use:
    """A plain use, if its factors fit the tensor; raises SourceError."""
    up, down = flat(use.module.tensors["up"]), flat(use.module.tensors["down"])
    rows = use.target.rows if use.target.rows is not None else tensor.shape[0]
    if (up.shape[0], up.shape[1], down.shape[1]) != (rows, down.shape[0], tensor.numel // tensor.shape[0]):
        raise _unfit(use, tensor, f"{list(up.shape)} times {list(down.shape)}")
    return use


def _unfit(use: Use, tensor: LazyTensor, what: str) -> SourceError:
    fact = f"module `{use.module.name}` of the LoRA `{use.file}` does not fit `{use.target.tensor}`"
    return SourceError(Problem(fact, evidence=(f"{what} for {list(tensor.shape)}",)))


class _Plain(Computed):
    """A weight with LoRAs added: W + Σ strength · scale · up·down, in FP64, by whole rows."""

    __slots__ = ("uses",)

    def __init__(self, source: LazyTensor, uses: Sequence[Use]) -> None:
        super().__init__([source], DType.F32, source.shape)
        self.uses = tuple(uses)

    def window(self, values: Values) -> torch.Tensor:
        """Rows of the weight, and the same rows of each product."""
        source, width = self.sources[0], self.numel // self.shape[0]
        first, last = values.first // width, -(-(values.first + values.count) // width)
        made = part(source, first * width, (last - first) * width).double().view(-1, width)
        for use in self.uses:
            begin, end = use.target.first, use.target.first + (use.target.rows or self.shape[0])
            low, high = max(first, begin), min(last, end)
            if low < high:
                made[low - first : high - first] += _rows(use, low - begin, high - begin)
        at = values.first - first * width
        return made.flatten()[at : at + values.count]


def _rows(use: Use, first: int, last: int) -> torch.Tensor:
    """Some rows of what a plain use adds, FP64."""
    up, down = flat(use.module.tensors["up"]), flat(use.module.tensors["down"])
    rank = down.shape[0]
    left = part(up, first * rank, (last - first) * rank).double().view(-1, rank)
    held = {n: t for n, t in use.module.tensors.items() if n in _OF_ALL}
    scale = use._replace(module=Module(use.module.name, held)).adapter().scale(rank)
    made: torch.Tensor = left @ whole(down).double() * (use.strength * scale)
    return made


def _baking(on_weight: Iterable[Use], on_bias: Iterable[Use]) -> Any:
    """What makes a whole tensor of itself: all that is added is of the tensor as it was."""

    def function(weight: torch.Tensor) -> torch.Tensor:
        held = weight.double()
        made = held.clone()
        for use in on_weight:
            for mine, new in _views(use.target, held, made):
                try:
                    new += change(mine, use.adapter(), use.strength)
                except ValueError as error:
                    raise SourceError(
                        Problem(
                            f"module `{use.module.name}` of the LoRA `{use.file}` does not fit "
                            f"`{use.target.tensor}`",
                            evidence=(str(error),),
                        )
                    ) from None
        for use in on_bias:
            for _, new in _views(use.target, held, made):
                new += _on_bias(use).view(new.shape) * use.strength
        return made.float()

    return function


def _on_bias(use: Use) -> torch.Tensor:
    """What a module adds to a bias at strength 1."""
    held = use.module.tensors
    if "bias-diff" in held:
        return whole(held["bias-diff"]).double()
    scale = use.adapter().scale(flat(held["down"]).shape[0])
    return whole(held["bias-up"]).double() * scale


def _views(
    target: Target, held: torch.Tensor, made: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a target is of a tensor as it was, and of the one that is made, as an adapter sees both."""
    import torch

    if target.swapped:
        half = held.shape[0] // 2
        seen = torch.cat((held[half:], held[:half]))
        added = torch.zeros_like(seen)
        yield seen, added
        made += torch.cat((added[half:], added[:half]))
    elif target.transposed:
        yield held.T, made.T
    else:
        end = None if target.rows is None else target.first + target.rows
        yield held[target.first : end], made[target.first : end]


APPLY_LORA = Operation(
    "apply-lora",
    1,
    "`a` with LoRAs, or any of their kin, added at their strengths: LoRA, LoCon, LoHa, LoKr, GLoRA, IA3, "
    "OFT, BOFT, DoRA, differences and norms, in the names of any trainer. Computed in FP64 and rounded once.",
    ("a",),
    _apply,
    many="loras",
    files=("loras",),
    params={
        "unmatched": Param(
            "choice",
            "What becomes of tensors that are for nothing in the model.",
            "error",
            ("error", "ignore"),
        )
    },
)
