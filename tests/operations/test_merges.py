"""Merges: equal to what other programs make, in any arithmetic, in any windows, for any weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.base.errors import OutputError
from builder.models.catalog import load_catalog
from builder.operations import OPERATIONS
from builder.operations.merges import MERGES
from builder.operations.reductions import REDUCTIONS
from builder.operations.registry import Setting
from builder.operations.sums import fold, kth_largest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.merged import ELEMENTS, Shared

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


# ── what takes part, and in what pieces ──


def test_a_weight_of_nothing_or_all_copies_bytes() -> None:
    odd = torch.tensor([float("nan"), -0.0, 6e-8, float("inf")]).half()
    other = torch.tensor([1.0, 2.0, 3.0, 4.0]).half()
    inputs = {"a": {"x": odd}, "b": {"x": other}}
    for alpha, wanted in ((0.0, odd), (1.0, other)):
        found = apply("weighted-sum", inputs, {"alpha": alpha})["x"]
        assert found.dtype == torch.float16
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_integers_positions_and_constants_are_the_first_inputs() -> None:
    a = {"embeddings.position_ids": torch.arange(3.0), "steps": torch.arange(3), "pos_embed": torch.ones(2)}
    b = {name: tensor * 2 for name, tensor in a.items()}
    setting = Setting("MMDIT-v3", constants=("pos_embed",))
    found = apply("weighted-sum", {"a": a, "b": b}, {"alpha": 0.5}, setting)
    assert all(torch.equal(found[name], a[name]) for name in a)


def test_of_an_inpainting_model_the_common_channels_are_merged() -> None:
    """The difference goes to the first four input channels; the other five are those of `a`."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(6, 9, 3, 3, generator=generator)
    b, c = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
    found = apply("add-difference", {"a": {"x": wide}, "b": {"x": b}, "c": {"x": c}}, {"alpha": 1.0})["x"]
    assert torch.equal(found[:, :4], wide[:, :4] + (b - c))
    assert torch.equal(found[:, 4:], wide[:, 4:])


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 4)])
def test_other_shapes_are_an_error_that_names_them(shape: tuple[int, ...]) -> None:
    inputs = {"a": {"x": torch.zeros(6, 4, 3, 3)}, "b": {"x": torch.zeros(shape)}}
    with pytest.raises(OutputError) as error:
        apply("weighted-sum", inputs, {"alpha": 0.5})
    assert f"`x` is [6, 4, 3, 3] in `a`, {list(shape)} in `b`" in error.value.problems[0].evidence


def test_weights_by_block_class_and_pattern() -> None:
    names = ("input_blocks.1.1.attn2.x", "input_blocks.1.1.attn1.x", "middle_block.x", "time_embed.x")
    traits = load_catalog(()).traits["UNET-v1"]
    setting = Setting("UNET-v1", block=traits.block)
    weights = {"base": 0.5, "blocks": {"IN01": 0.25, "IN00": 1.0}, "tensors": [["*.attn2.*", 0.75]]}
    inputs = {k: {n: torch.full((1,), v) for n in names} for k, v in (("a", 0.0), ("b", 1.0))}
    found = apply("weighted-sum", inputs, {"alpha": weights}, setting)
    assert [float(found[n]) for n in names] == [0.75, 0.25, 0.5, 1.0]


LONG = 3 * ELEMENTS // 2 + 5  # of more than one window


@pytest.mark.parametrize("op", sorted(m.name for m in (*MERGES, *REDUCTIONS)))
def test_windows_make_no_difference(op: str) -> None:
    """Read in any pieces, an operation's result is the same, bit for bit."""
    operation = OPERATIONS[op]
    generator = torch.Generator().manual_seed(7)
    letters = [*operation.inputs, *([] if operation.many is None else ["of.x", "of.y"])]
    shape = (LONG // 7, 7) if op != "smooth-add" else (199, 7)
    values = {k: stored(torch.randn(shape, generator=generator).half()) for k in letters}
    params: dict[str, Any] = {k: p.default for k, p in operation.params.items()}
    params |= {"of": {"x": 0.7, "y": 0.4}} if operation.many else {}
    params |= {"density": 0.5} if "density" in params else {}
    params |= {"vote": True} if "vote" in params else {}
    for key in ("alpha", "beta"):
        params |= {key: 0.3} if key in params else {}

    def make() -> LazyTensor:
        held = {k: {"x": t} for k, t in values.items()}
        return operation.apply(held, params, Setting("UNET-v1")).tensors["x"]

    at_once, tensor = read(make()).flatten(), make()
    size = tensor.dtype.itemsize
    assert not torch.equal(at_once.half(), read(values[letters[0]]).flatten())
    for start, count in ((0, 1), (5, 900), (tensor.numel - 333, 333), (tensor.numel // 2, 600)):
        out = bytearray(count * size)
        tensor.read_into(start * size, memoryview(out))
        assert torch.equal(torch.frombuffer(out, dtype=tensor.dtype.torch), at_once[start : start + count])


def test_draws_depend_on_seed_input_and_place_alone() -> None:
    base, x, y = torch.zeros(100_000), torch.ones(100_000), torch.full((100_000,), 2.0)
    inputs = {"base": {"t": base}, "of.x": {"t": x}, "of.y": {"t": y}}
    params = {"density": 0.25, "of": {"x": 1.0, "y": 1.0}, "seed": 7}
    found = apply("dare", inputs, params)["t"]
    # 1/0.25 of x, of y, of both, of none: as often as independent draws make it.
    counts = {float(v): int((found == v).sum()) for v in (0.0, 4.0, 8.0, 12.0)}
    assert sum(counts.values()) == 100_000
    for value, share in ((0.0, 9 / 16), (4.0, 3 / 16), (8.0, 3 / 16), (12.0, 1 / 16)):
        assert abs(counts[value] / 100_000 - share) < 0.01
    assert not torch.equal(found, apply("dare", inputs, params | {"seed": 8})["t"])
    other = {k: {"u": t["t"]} for k, t in inputs.items()}
    assert not torch.equal(found, apply("dare", other, params)["u"])
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == DRAWN


DRAWN = "2345b85d01f1f73f"


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_the_kth_largest(numbers: list[float], k: int) -> None:
    k = min(k, len(numbers))
    held = stored(torch.tensor(numbers, dtype=torch.float32))
    assert kth_largest([held], lambda v: v[0], k) == sorted(map(abs, numbers), reverse=True)[k - 1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=70))
def test_sums_by_halves(numbers: list[float]) -> None:
    found = float(fold(torch.tensor(numbers, dtype=torch.float64)))
    assert abs(found - math.fsum(numbers)) <= 1e-9 * max(1.0, sum(map(abs, numbers)))


def test_a_tensor_used_twice_is_read_once() -> None:
    reads = []

    class Counting(MemoryTensor):
        def read_into(self, start: int, out: memoryview) -> None:
            reads.append((start, len(out)))
            super().read_into(start, out)

    source = Counting(DType.F16, (1000,), bytes(2000))
    shared = Shared(source)
    made = OPERATIONS["weighted-sum"].apply(
        {"a": {"x": shared}, "b": {"x": shared}}, {"alpha": 0.5}, Setting("UNET-v1")
    )
    made.tensors["x"].tobytes()
    assert reads == [(0, 2000)]
