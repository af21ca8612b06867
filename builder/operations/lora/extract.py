"""The operations that make LoRAs: of the difference of two models, and of a LoRA of another rank."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

from builder.base.errors import OutputError, Problem, SourceError
from builder.base.words import counted
from builder.operations.lora.apply import PEFT, peft
from builder.operations.lora.names import Module, Target, flat, modules
from builder.operations.registry import Applied, Operation, Param, Setting, Tensors
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.merged import Computed, Elementwise, Values, whole, windows
from builder.tensors.moves import Rows
from builder.tensors.torch_threads import exact_torch, lone_torch

if TYPE_CHECKING:
    import torch

TEXT_ENCODERS = ("CLIP", "T5")  # first words of their classes
LEAST = 1e-6  # a greatest singular value that is no more than this is none, as kohya's script has it
# Of the greatest singular value: what is no more is zero. It is less than programs that compute in FP32 can
# tell from zero, and than FP16 keeps of the product; there, vectors are those of what rounding left, which
# no two libraries agree on.
NOTHING = 1e-5
LARGE = 0.9  # of the largest value of a vector
WORKERS = 4  # each holds one matrix

# ── factors ──


class Kept:
    """The factors that were made last: a pass asks for one window of them after the other."""

    most = 16

    def __init__(self) -> None:
        self.held: OrderedDict[object, Sequence[torch.Tensor]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: object) -> Sequence[torch.Tensor] | None:
        with self.lock:
            return self.held.get(key)

    def put(self, key: object, made: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with self.lock:
            self.held[key] = made
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        return made


@dataclass(eq=False)
class Factors:
    """A matrix as the product of two, `[rows, rank]` and `[rank, columns]`, of the greatest singular values.

    Where it has fewer that are something, columns of the first and rows of the second are zero. `read` gives
    the matrix in FP64, or two of which it is the product. `clamp` is the quantile of the values of both
    factors, but for those zeros, at which their sizes end.
    """

    module: str
    read: Callable[[], Sequence[torch.Tensor]]
    shape: tuple[int, int]
    rank: int = 0
    clamp: float = 1.0
    kept: Kept = field(default_factory=Kept)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def values(self) -> torch.Tensor:
        """The singular values in FP64, the greatest first; those that are nothing are 0."""
        import torch

        with exact_torch():
            parts = self._finite()
            if len(parts) == 2:
                upper, lower = (torch.linalg.qr(p, "r")[1] for p in (parts[0], parts[1].T))
                parts = [upper @ lower.T]
            found: torch.Tensor = torch.linalg.svdvals(_tall(parts[0]))
            return torch.where(found > NOTHING * found[:1], found, 0.0)

    def get(self) -> Sequence[torch.Tensor]:
        """Both factors, flat and in FP32; those of the last few are kept."""
        with self._lock:
            return self.kept.get(self) or self.kept.put(self, self._made())

    def _made(self) -> tuple[torch.Tensor, ...]:
        import numpy as np
        import torch

        left, sizes, right = self._decomposed(self.rank)
        up, down = left * sizes, right
        if self.clamp < 1.0 and len(sizes):
            most = max(0.0, float(np.quantile(np.concatenate((up.flatten(), down.flatten())), self.clamp)))
            up, down = up.clamp(-most, most), down.clamp(-most, most)
        rest = self.rank - len(sizes)
        up, down = torch.nn.functional.pad(up, (0, rest)), torch.nn.functional.pad(down, (0, 0, 0, rest))
        return up.float().flatten(), down.float().flatten()

    def _finite(self) -> Sequence[torch.Tensor]:
        """What is read; raises OutputError where that is no matrix of numbers."""
        parts = self.read()
        if not all(bool(p.isfinite().all()) for p in parts):
            raise OutputError(Problem(f"what is extracted for `{self.module}` is not finite"))
        return parts

    def _decomposed(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first singular vectors and values that are something: U `[rows, n]`, S, V `[n, columns]`."""
        import torch

        parts = self._finite()
        if len(parts) == 2:  # orthogonal factors of each leave a matrix of their rank
            (left, upper), (right, lower) = (torch.linalg.qr(p) for p in (parts[0], parts[1].T))
            u, sizes, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
            u, v = left @ u, v @ right.T
        else:
            tall = _tall(parts[0])
            u, sizes, v = torch.linalg.svd(tall, full_matrices=False)
            if tall is not parts[0]:
                u, v = v.T, u.T
        count = min(most, int((sizes > NOTHING * sizes[:1]).sum()))
        u, sizes, v = u[:, :count], sizes[:count], v[:count]
        # Either sign of a pair of vectors is as good: the first large value on the left is positive. That is
        # not always the largest, which another may equal but for rounding.
        size = u.abs()
        first = (size > LARGE * size.amax(0)).byte().argmax(0, keepdim=True)
        signs = u.gather(0, first).sign()
        return u * signs, sizes, v * signs.T


def _tall(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix, or its transpose where that has more rows: it is decomposed in half of the time."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


class _Factor(Computed):
    """One of both factors, as a tensor."""

    __slots__ = ("factors", "index")

    def __init__(self, factors: Factors, index: int, shape: tuple[int, ...]) -> None:
        super().__init__((), DType.F32, shape)
        self.factors, self.index = factors, index

    def window(self, values: Values) -> torch.Tensor:
        """A window of it."""
        return self.factors.get()[self.index][values.first : values.first + values.count]


def _each(function: Callable[[Factors], int], factors: Iterable[Factors]) -> list[int]:
    """What a function finds of each, by a few threads that compute alone."""
    with lone_torch(), ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), "factors") as pool:
        return list(pool.map(function, factors))


# ── how many singular values ──


def extracted_rank(values: torch.Tensor, params: Mapping[str, Any], most: int) -> int:
    """How many singular values an extraction keeps, of at most so many; as LyCORIS counts them."""
    found = most
    if (least := params.get("threshold")) is not None:
        found = int((values > least).sum())
    elif (share := params.get("ratio")) is not None:
        found = int((values > share * values[0]).sum())
    elif (share := params.get("quantile")) is not None:
        found = _until(values, share) - 1
    return max(1, min(found, most))


def resized_rank(values: torch.Tensor, params: Mapping[str, Any], most: int, full: int) -> int:
    """How many a resized LoRA keeps, as kohya's script counts them: one more than are asked for.

    `full` is how many a whole matrix has, those that are 0 among them.
    """
    if float(values[0]) <= LEAST:
        return 1
    if (share := params.get("sv_ratio")) is not None:
        found = int((values > values[0] / share).sum())
    elif (share := params.get("sv_cumulative")) is not None:
        found = _until(values, share)
    elif (share := params.get("sv_fro")) is not None:
        found = _until(values.square(), share**2)
    else:
        return min(most, len(values))
    return min(max(1, min(found, full - 1)) + 1, most, len(values))


def _until(values: torch.Tensor, share: float) -> int:
    """How many of the first have a sum that is at least this share of the sum of all."""
    sums = values.cumsum(0)  # whose last is the sum of all to the bit
    return int((sums < share * sums[-1]).sum()) + 1


# ── of two models ──


def _extract(inputs: Mapping[str, Tensors], params: Mapping[str, Any], setting: Setting) -> Applied:
    made: dict[str, LazyTensor] = {}
    words: list[str] = []
    for cls in dict.fromkeys(key.partition("@")[2] for key in inputs):
        tuned, base = (inputs[f"{key}@{cls}"] for key in ("a", "base"))
        targets = setting.extracted(cls, base, params.get("conv_rank") is not None)
        pairs = {module: _pair(tuned, base, target, cls) for module, target in targets.items()}
        least = params["min_difference"]
        if cls.partition("-")[0] in TEXT_ENCODERS and not _differ(pairs.values(), least):
            words.append(f"extract-lora: {cls} is left out: no weight differs by more than {least}")
            continue
        found = _of_pairs(pairs, params)
        ranks = [f.rank for f in found.values() if isinstance(f, Factors)]
        left = len(found) - len(ranks)
        said = [f"{len(ranks):,} of {_ranks(ranks)}"] * bool(ranks) + [f"{left:,} as they are"] * bool(left)
        words.append(f"extract-lora: {counted(len(found), 'module')} of {cls}: {', '.join(said)}")
        for module, what in found.items():
            made |= _tensors(module, what, pairs[module][1].shape)
    if not made:
        raise OutputError(Problem("extract-lora finds no difference to extract"))
    return Applied(made, tuple(words))


def _ranks(ranks: Sequence[int]) -> str:
    least, most = min(ranks), max(ranks)
    return f"rank {least}" if least == most else f"ranks {least} to {most}"


Pair = tuple[LazyTensor, LazyTensor]


def _pair(tuned: Tensors, base: Tensors, target: Target, cls: str) -> Pair:
    """What a module is in both models; raises OutputError where that is not alike."""
    name = target.tensor
    if name not in tuned or tuned[name].shape != base[name].shape:
        theirs = f"{list(tuned[name].shape)} in `a`" if name in tuned else "not there in `a`"
        fact = f"extract-lora needs models of one kind, and `a` has another {cls} than `base`"
        raise OutputError(Problem(fact, evidence=(f"`{name}` is {list(base[name].shape)}, {theirs}",)))
    if target.rows is None:
        return tuned[name], base[name]
    return Rows(tuned[name], target.first, target.rows), Rows(base[name], target.first, target.rows)


def _differ(pairs: Iterable[Pair], least: float) -> bool:
    """Whether some values of the two differ by more."""
    return any(
        not float((values[0] - values[1]).abs().max()) <= least for pair in pairs for values in windows(pair)
    )


def _difference(pair: Pair) -> Callable[[], Sequence[torch.Tensor]]:
    return lambda: [whole(flat(pair[0])).double().sub_(whole(flat(pair[1])))]


def _of_pairs(pairs: Mapping[str, Pair], params: Mapping[str, Any]) -> dict[str, Factors | LazyTensor]:
    """The factors of each difference, or all of it where a rank that is found would be half of the rows."""
    found: dict[str, Factors] = {}
    kept = Kept()
    for module, pair in pairs.items():
        shape = flat(pair[0]).shape
        convolution = pair[0].shape[2:] not in ((), (1, 1))
        most = params.get("conv_rank") if convolution else params.get("rank")
        rank = min(most or shape[0], pair[0].shape[1], *shape)
        found[module] = Factors(module, _difference(pair), (shape[0], shape[1]), rank, params["clamp"], kept)
    if all(params.get(key) is None for key in DATA):
        return dict(found)
    ranks = _each(lambda f: extracted_rank(f.values(), params, f.rank), found.values())
    made: dict[str, Factors | LazyTensor] = {}
    for (module, factors), rank in zip(found.items(), ranks, strict=True):
        if 2 * rank >= factors.shape[0]:
            made[module] = Elementwise(pairs[module], lambda values: values[0].sub_(values[1]))
        else:
            factors.rank = rank
            made[module] = factors
    return made


DATA = ("threshold", "ratio", "quantile")  # with which the ranks hang on the weights


def _tensors(module: str, what: Factors | LazyTensor, shape: Sequence[int]) -> dict[str, LazyTensor]:
    """The tensors of a file for a module: both factors and an alpha that is the rank, or the difference."""
    if not isinstance(what, Factors):
        return {f"{module}.diff": what}
    ends, rank = (1,) * (len(shape) - 2), what.rank
    return {
        f"{module}.lora_up.weight": _Factor(what, 0, (shape[0], rank, *ends)),
        f"{module}.lora_down.weight": _Factor(what, 1, (rank, *shape[1:])),
        f"{module}.alpha": _number(float(rank)),
    }


def _number(value: float) -> LazyTensor:
    import struct

    return MemoryTensor(DType.F32, (), struct.pack("<f", value))


def _extracted_metadata(params: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, str]:
    """What kohya's scripts say of a LoRA that they extract; `said` is of its family."""
    rank, convolutions = params.get("rank", 0), params.get("conv_rank")
    more = (
        {}
        if convolutions is None
        else {"conv_dim": str(convolutions), "conv_alpha": str(float(convolutions))}
    )
    fixed = all(params.get(key) is None for key in DATA)
    return {
        **said,
        # Its ranks and whole differences are read by LyCORIS, and not by kohya's own network.
        "ss_network_module": "networks.lora" if fixed else "lycoris.kohya",
        "ss_network_dim": str(rank) if fixed else "Dynamic",
        "ss_network_alpha": str(float(rank)) if fixed else "Dynamic",
        "ss_network_args": json.dumps(more),
    }


# ── of a LoRA ──


def _resize(inputs: Mapping[str, Tensors], params: Mapping[str, Any], setting: Setting) -> Applied:
    file = inputs["lora"]
    found = {m.name: m for m in modules(file)[0].values() if {"up", "down"} <= m.tensors.keys()}
    kept = Kept()
    factors = {n: _old(m, params, kept) for n, m in found.items() if "mid" not in m.tensors}
    said_of = peft(setting.metadata.get("lora", {}))
    if not factors:
        raise SourceError(Problem("resize-lora finds no LoRA in its file", hint="it resizes no other kinds"))
    if any(params.get(key) is not None for key in DYNAMIC):
        every = list(factors.values())
        ranks = _each(lambda f: resized_rank(f.values(), params, f.rank, min(f.shape)), every)
        for each, rank in zip(every, ranks, strict=True):
            each.rank = rank
    made = dict(file)
    for name, what in factors.items():
        module = found[name]
        up, down = module.tensors["up"], module.tensors["down"]
        made[module.spelt["up"]] = _Factor(what, 0, (up.shape[0], what.rank, *up.shape[2:]))
        made[module.spelt["down"]] = _Factor(what, 1, (what.rank, *down.shape[1:]))
        made |= _alpha(module, what.rank, down.shape[0], said_of)
    said = _ranks([f.rank for f in factors.values()])
    left = len(file) - sum(len(found[n].names) for n in factors)
    words = [f"resize-lora: {counted(len(factors), 'module')} of {said}"]
    words += [f"resize-lora: {counted(left, 'tensor')} of other kinds as they were"] * bool(left)
    return Applied(made, tuple(words))


DYNAMIC = ("sv_ratio", "sv_cumulative", "sv_fro")


def _old(module: Module, params: Mapping[str, Any], kept: Kept) -> Factors:
    """The factors of a module, of the rank that is asked for, or of its own where that is less."""
    held = [module.tensors[part] for part in ("up", "down")]
    up, down = map(flat, held)
    if any(len(t.shape) < 2 or not t.numel for t in held) or up.shape[1] != down.shape[0]:
        shapes = f"{list(held[0].shape)} times {list(held[1].shape)}"
        raise SourceError(
            Problem(f"the factors of `{module.name}` do not fit each other", evidence=(shapes,))
        )
    convolution = len(module.tensors["down"].shape) == 4
    most: int = (params.get("conv_rank") if convolution else None) or params["rank"]
    shape = (up.shape[0], down.shape[1])
    rank = min(most, down.shape[0], *shape)
    return Factors(module.name, lambda: [whole(up).double(), whole(down).double()], shape, rank, kept=kept)


def _alpha(
    module: Module, rank: int, old: int, peft_says: Mapping[str, Mapping[str, Any]]
) -> dict[str, LazyTensor]:
    """The alpha that keeps the scale of a module, which is that over the rank."""
    said = next((v for k, v in peft_says.items() if module.name.startswith(k)), {})
    ratio = rank / (sqrt(old) if said.get("use_rslora") else old)
    if "alpha" in module.tensors:
        return {module.spelt["alpha"]: Elementwise([module.tensors["alpha"]], lambda v: v[0].mul_(ratio))}
    alpha = float(said["lora_alpha"]) * ratio if "lora_alpha" in said else float(rank)
    return {f"{module.name}.alpha": _number(alpha)}


def _resized_metadata(params: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, str]:
    """What the LoRA said of itself, with its new rank, as kohya's script has it."""
    method = next((key for key in DYNAMIC if params.get(key) is not None), None)
    said = {k: v for k, v in said.items() if k != PEFT}  # each module has an alpha now
    rank, comment = params["rank"], said.get("ss_training_comment", "")
    old, alpha = said.get("ss_network_dim", "?"), said.get("ss_network_alpha", "")
    if method is not None:
        how = f"Dynamic resize with {method}: {params[method]} from {old}"
        return {
            **said,
            "ss_training_comment": f"{how}; {comment}",
            "ss_network_dim": "Dynamic",
            "ss_network_alpha": "Dynamic",
        }
    apart = f" (conv: {params['conv_rank']})" if params.get("conv_rank") not in (None, rank) else ""
    made = {
        **said,
        "ss_training_comment": f"dimension is resized from {old} to {rank}{apart}; {comment}",
        "ss_network_dim": str(rank),
    }
    made.pop("ss_network_alpha", None)
    with suppress(ValueError, ZeroDivisionError):  # where they are no numbers, nothing is known of it
        made["ss_network_alpha"] = str(float(alpha) / float(old) * rank)
    return made


# ── the operations ──


def _rank(doc: str, **more: Any) -> Param:
    return Param("integer", doc, minimum=1, maximum=65536, **more)


def _share(doc: str, minimum: float = 0.0, maximum: float | None = 1.0) -> Param:
    return Param("number", doc, minimum=minimum, maximum=maximum, optional=True)


EXTRACT_LORA = Operation(
    "extract-lora",
    1,
    "The difference of `a`, a tuned model, from `base` as a LoRA in kohya's names, with an alpha that is the "
    "rank: the products of its greatest singular values, computed in FP64. An output's `base`, or one of the "
    "`loras` of another step. As kohya's script; the ranks that it finds are LyCORIS's.",
    ("a", "base"),
    _extract,
    params={
        "rank": _rank("The rank; with one of those that follow, the greatest.", optional=True),
        "threshold": _share("Keep the singular values that are greater.", maximum=None),
        "ratio": _share("Keep those greater than this share of the greatest."),
        "quantile": _share("Keep the greatest while their sum is less than this share of the sum of all."),
        "conv_rank": _rank("Of convolutions larger than 1×1, which are left out without it.", optional=True),
        "min_difference": Param(
            "number",
            "Leave out a text encoder no weight of which differs by more.",
            0.01,
            minimum=0.0,
        ),
        "clamp": Param(
            "number",
            "The quantile of both factors' values at which their sizes end; 1: nowhere.",
            0.99,
            minimum=0.5,
            maximum=1.0,
        ),
    },
    whole_models=True,
    makes_file=True,
    metadata=_extracted_metadata,
    any_of=("rank", *DATA),
    excludes={"threshold": ("ratio", "quantile"), "ratio": ("quantile",)},
)

RESIZE_LORA = Operation(
    "resize-lora",
    1,
    "A LoRA with another rank, at most the one that it has; what is of another kind stays as it is. Used as "
    "one that is extracted. As kohya's script, whose dynamic ranks are one more than what they ask for.",
    ("lora",),
    _resize,
    params={
        "rank": _rank("The rank; with one of those that follow, the greatest."),
        "conv_rank": _rank("Of convolutions; without it the same.", optional=True),
        "sv_ratio": _share(
            "Keep singular values that are less than so many times smaller than the greatest.", 1.0, None
        ),
        "sv_cumulative": _share("Keep the greatest until their sum is this share of the sum of all."),
        "sv_fro": _share("The same of their squares, and of the square of this."),
    },
    files=("lora",),
    makes_file=True,
    metadata=_resized_metadata,
    excludes={"sv_ratio": ("sv_cumulative", "sv_fro"), "sv_cumulative": ("sv_fro",)},
)
