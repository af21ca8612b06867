"""Merges: equal to what other programs make, in any arithmetic, in any windows, for any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.operations import OPERATIONS
from builder.operations.registry import Setting
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor

VECTORS = json.loads(Path(__file__).with_name("merges.json").read_text(encoding="utf-8"))
TYPES = {"float16": DType.F16, "float32": DType.F32}

# How far from others a result may be, in units of the last place of the largest number that went into it:
# where their own arithmetic is another (fused products, other orders, FP32 where ours is FP64).
ULPS = {
    "slerp": 4,
    "linear": 2,
    "multiply-difference": 8,
    "extract-features": 4,
    "cosine-a": 8,
    "cosine-b": 8,
}


def stored(values: torch.Tensor) -> MemoryTensor:
    dtype = next(d for d in DType if d.torch_name and d.torch is values.dtype)
    data = bytes(values.contiguous().view(torch.uint8).numpy().tobytes()) if values.dim() else None
    if data is None:
        data = bytes(values.reshape(1).view(torch.uint8).numpy().tobytes())
    return MemoryTensor(dtype, tuple(values.shape), data)


def read(tensor: LazyTensor) -> torch.Tensor:
    return torch.frombuffer(tensor.tobytes(), dtype=tensor.dtype.torch).view(tensor.shape)


def vector(name: str, letter: str, dtype: str) -> torch.Tensor:
    held = VECTORS["sets"][name]
    return (torch.tensor(held[letter]) / 256).to(TYPES[dtype].torch).view(held["shape"])


def apply(
    op: str,
    inputs: Mapping[str, Mapping[str, torch.Tensor]],
    params: Mapping[str, Any],
    setting: Setting = Setting("UNET-v1"),  # noqa: B008
) -> dict[str, torch.Tensor]:
    operation = OPERATIONS[op]
    said = {k: p.default for k, p in operation.params.items()} | dict(params)
    held = {k: {n: stored(t) for n, t in tensors.items()} for k, tensors in inputs.items()}
    return {n: read(t) for n, t in operation.apply(held, said, setting).tensors.items()}


def keys(op: str, letters: str) -> list[str]:
    first = OPERATIONS[op].inputs
    return [*first, *(f"of.{letter}" for letter in letters[len(first) :])]


def case_inputs(case: Mapping[str, Any], *sets: str) -> dict[str, dict[str, torch.Tensor]]:
    dtype = case["type"].partition(">")[0]
    named = zip(keys(case["op"], case["inputs"]), case["inputs"], strict=True)
    return {key: {name: vector(name, letter, dtype) for name in sets} for key, letter in named}


def case_params(case: Mapping[str, Any]) -> dict[str, Any]:
    params = dict(case["params"])
    if case["of"] is not None:
        letters = case["inputs"][len(OPERATIONS[case["op"]].inputs) :]
        params["of"] = dict(zip(letters, case["of"], strict=True))
    return params


def check(case: Mapping[str, Any], found: torch.Tensor, largest: float) -> None:
    wanted = torch.tensor(case["out"], dtype=torch.float32)
    by = case["by"]
    ulps = ULPS.get(case["op"], 0)
    if by.startswith(("sd-mecha", "Chattiori 5fc7fc2 sum_twice", "mergekit 0.1.5 model_stock")):
        ulps = max(ulps, 4)  # torch.lerp, which fuses; sums in another order
    assert (found.float().flatten() - wanted).abs().max() <= ulps * 2.0**-23 * largest, by


def name_of(case: Mapping[str, Any]) -> str:
    return f"{case['op']}-{case['by'].split()[0]}-{case['set']}-{case['type']}"


CASES = [c for c in VECTORS["cases"] if not c["op"].startswith("cosine")]


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_as_other_programs(case: Mapping[str, Any]) -> None:
    """Exactly, where the formula leaves no choice, else within the units of `ULPS`."""
    inputs = case_inputs(case, case["set"])
    a1111 = case["type"] == "float16>float16" and case["by"].startswith("A1111")
    setting = Setting("UNET-v1", arithmetic="file" if a1111 else "exact")
    found = apply(case["op"], inputs, case_params(case), setting)[case["set"]]
    if case["type"].endswith(">float16"):
        found = found.half()
    largest = max(float(t.float().abs().max()) for i in inputs.values() for t in i.values())
    check(case, found, largest)


@pytest.mark.parametrize("op", ["cosine-a", "cosine-b"])
def test_cosine_looks_at_the_whole_model(op: str) -> None:
    cases = {c["set"]: c for c in VECTORS["cases"] if c["op"] == op}
    one = next(iter(cases.values()))
    found = apply(op, case_inputs(one, *cases), case_params(one))
    for name, case in cases.items():
        check(case, found[name], 3.0)


def test_a_chain_in_the_files_arithmetic_is_that_of_saved_files() -> None:
    """berrymix: a weighted sum, an added difference, a weighted sum; each was a saved FP16 file."""
    setting = Setting("UNET-v1", arithmetic="file")
    a, b, c, d = ({"x": vector("lin", letter, "float16")} for letter in "ABCD")
    one = apply("weighted-sum", {"a": a, "b": b}, {"alpha": 0.05}, setting)
    two = apply("add-difference", {"a": one, "b": c, "c": b}, {"alpha": 1.0}, setting)
    three = apply("weighted-sum", {"a": two, "b": d}, {"alpha": 0.25}, setting)
    assert three["x"].dtype == torch.float16

    def saved(x: torch.Tensor) -> torch.Tensor:
        return x.half().float()

    x = saved(saved(a["x"].float() * 0.95) + saved(b["x"].float() * 0.05))
    x = saved(x + saved(saved(c["x"].float() - b["x"].float()) * 1.0))
    x = saved(saved(x * 0.75) + saved(d["x"].float() * 0.25))
    assert torch.equal(three["x"].float(), x)
