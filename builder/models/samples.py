"""Models made up from the catalog: tidy, or as dirty as real ones, for the demo, tests and benchmarks."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np

from builder.base.errors import Problem, UsageError, did_you_mean
from builder.models.catalog import RANK, Catalog, Component, TensorRule, load_catalog
from builder.tensors.lazy import BY_CODE, DType, LazyTensor, MemoryTensor

Content = Literal["random", "sparse"]

BLOCK = 1 << 20  # elements of random numbers that all tensors are cut from
SPREADS = (0.015, 0.03, 0.045, 0.06)  # standard deviations of the weights
LORA_RANK = 8

# What training leaves behind: no component has these.
JUNK = {
    "loss.logvar": (),
    "loss.discriminator.main.0.weight": (64, 3, 4, 4),
    "loss.discriminator.main.2.weight": (128, 64, 4, 4),
    "optimizer_states.0.exp_avg": (256, 256),
}


class Repeated(LazyTensor):
    """A tensor cut from an endless repetition of `block`, from byte `shift` of it on."""

    __slots__ = ("block", "shift")

    def __init__(self, dtype: DType, shape: tuple[int, ...], block: memoryview, shift: int = 0) -> None:
        super().__init__(dtype, shape)
        self.block = block
        self.shift = shift

    def read_into(self, start: int, out: memoryview) -> None:
        """Copy from the block."""
        done = 0
        while done < len(out):
            at = (self.shift + start + done) % len(self.block)
            piece = self.block[at : at + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)


@dataclass(frozen=True)
class Dirt:
    """What a file holds beside its architecture's tensors, and what is wrong with those."""

    ema: bool = False
    junk: bool = False
    nai_names: bool = False
    position_ids: bool = False  # float, and one of them damaged
    lightning: bool = False  # entries of a training run, one of them a class of PyTorch Lightning


CLEAN = Dirt()
DIRTY = Dirt(ema=True, junk=True, position_ids=True, lightning=True)


@dataclass(frozen=True)
class Model:
    """What to write: tensors, and a PyTorch file's further entries."""

    tensors: dict[str, LazyTensor]
    nesting: str = ""
    extras: dict[str, bytes] = field(default_factory=dict)


def make(
    name: str,
    *,
    precision: DType = DType.F16,
    content: Content = "random",
    seed: int = 0,
    dirt: Dirt = CLEAN,
    catalog: Catalog | None = None,
) -> Model:
    """A model of an architecture, or of one class or component alone and then without prefix.

    The same arguments give the same values. Raises UsageError for a name that the catalog does not know.
    """
    catalog = catalog or load_catalog()
    parts = list(_parts(name, catalog, dirt))
    tensors = {
        prefix + bare: _tensor(prefix + bare, rule, precision, content, seed, dirt)
        for component, prefix in parts
        for bare, rule in component.tensors.items()
    }
    if dirt.junk:
        rules = {
            n: TensorRule(s or (), "F32") for n, s in catalog.optional.items() if parts[0][1] and _kept(n, s)
        }
        rules |= {n: TensorRule(s) for n, s in JUNK.items()}
        tensors |= {n: _tensor(n, r, precision, content, seed, dirt) for n, r in rules.items()}
    if dirt.lightning:
        return Model(tensors, "state_dict", _lightning())
    return Model(tensors)


def _kept(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a run keeps an optional key, as it does its noise schedule; markers for loaders it does not."""
    return name.startswith("model_ema.") or bool(shape and shape[0])


def _parts(name: str, catalog: Catalog, dirt: Dirt) -> Iterator[tuple[Component, str]]:
    alone = catalog.components.get(name) or next(iter(catalog.classes.get(name, ())), None)
    if alone is not None:
        yield alone, ""
        return
    known = {*catalog.components, *catalog.classes, *catalog.architectures}
    if name not in catalog.architectures:
        raise UsageError(Problem(f"the catalog has no `{name}`", hint=did_you_mean(name, known)))
    for cls in catalog.architectures[name].slots:
        component = catalog.component_for(cls, name)
        if dirt.nai_names:
            component = next((c for c in catalog.classes[cls] if c.mislabelled), component)
        yield component, component.prefix
        ema = catalog.averages.get(cls)
        if dirt.ema and ema is not None:
            yield ema, ema.prefix


def _tensor(
    name: str, rule: TensorRule, precision: DType, content: Content, seed: int, dirt: Dirt
) -> LazyTensor:
    shape = tuple(LORA_RANK if extent == RANK else extent for extent in rule.shape)
    dtype = BY_CODE[rule.dtype] if rule.dtype else precision
    if name.endswith("position_ids"):
        ids = np.arange(shape[-1])
        if not dirt.position_ids:
            return MemoryTensor(DType.I64, shape, ids.astype("<i8").tobytes())
        damaged = np.where(ids == ids[-1], ids - 0.0025, ids)
        return MemoryTensor(DType.F32, shape, damaged.astype("<f4").tobytes())
    if content == "sparse":
        return Repeated(dtype, shape, memoryview(bytes(BLOCK)))
    draw = zlib.crc32(name.encode(), seed)
    block = _block(dtype, seed, SPREADS[draw % len(SPREADS)])
    return Repeated(dtype, shape, block, draw // len(SPREADS) % BLOCK * dtype.itemsize)


@cache
def _block(dtype: DType, seed: int, spread: float) -> memoryview:
    random = np.random.RandomState(seed)  # its numbers are the same in every version of numpy
    values = (random.standard_normal(BLOCK) * spread).astype("<f4")
    if dtype is DType.BF16:
        bits = values.view("<u4")
        made = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    elif dtype in (DType.F16, DType.F32, DType.F64):
        made = values.astype(f"<f{dtype.itemsize}")
    elif dtype.floating:
        made = random.randint(0, 256, BLOCK, "u1") & 0xBF  # without the top exponent bit: small, no NaN
    else:
        made = random.randint(0, 2, BLOCK).astype(f"<i{dtype.itemsize}")
    return memoryview(made.tobytes())


def _lightning() -> dict[str, bytes]:
    """The entries of a training run, as opcodes; none of what they name needs to be installed here."""
    score = _opcodes(np.float64(0.0421)).replace(b"numpy._core.", b"numpy.core.")
    checkpoint = b"}X\x0a\x00\x00\x00best_score" + score + b"s"
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    return {
        "epoch": _opcodes(12),
        "global_step": _opcodes(840_000),
        "pytorch-lightning_version": _opcodes("1.4.2"),
        "callbacks": b"}" + callback + checkpoint + b"s",
        "optimizer_states": _opcodes([]),
        "lr_schedulers": _opcodes([]),
    }


def _opcodes(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # between the protocol and STOP
