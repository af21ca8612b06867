"""Packed weights are decoded bit for bit as the programs that pack them do; damaged ones are refused.

What is expected was computed by comfy-kitchen, bitsandbytes and torchao, and lies in `packed.safetensors`,
which `tests/help/packed_vectors.py` makes; where they are installed, they are asked again.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.models.samples import Repeated
from builder.tensors.cast import UnfitError
from builder.tensors.lazy import BY_TORCH_NAME, DType, LazyTensor, MemoryTensor
from builder.tensors.merged import ELEMENTS
from builder.tensors.packed.decode import decoded
from builder.tensors.packed.encode import FORMS, encoded
from tests.help.packed_vectors import PATH, REFERENCES
from tests.help.packed_vectors import encoded as by_others

Case = Mapping[str, LazyTensor]


def _cases() -> dict[str, dict[str, LazyTensor]]:
    found: dict[str, dict[str, LazyTensor]] = {}
    with open_checkpoint(PATH) as held:
        for name, tensor in held.items():
            case, _, rest = name.partition("/")
            copy = MemoryTensor(tensor.dtype, tensor.shape, bytes(tensor.tobytes()))
            found.setdefault(case, {})[rest] = copy
    return found


CASES = _cases()
ENCODED = {name: CASES.pop(name) for name in ("fp8", "int8")}


def _decoded(case: Case, shape: tuple[int, ...]) -> LazyTensor:
    """The weight of a case as numbers, beside which nothing is left."""
    tensors = {f"x.{n}": t for n, t in case.items() if n not in ("shape", "sha256")}
    made, words = decoded(tensors, {"x.weight": shape}, "")
    assert made.keys() == {"x.weight"} and len(words) == 1
    return made["x.weight"]


def _shape(case: Case) -> tuple[int, ...]:
    return tuple(np.frombuffer(case["shape"].tobytes(), "<i8").tolist())


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_other_programs_make_of_it(name: str) -> None:
    case = CASES[name]
    made = _decoded(case, _shape(case))
    assert (made.dtype, made.shape) == (DType.F32, _shape(case)) and made.computed
    assert hashlib.sha256(made.tobytes()).digest() == case["sha256"].tobytes()


@pytest.mark.parametrize("package", REFERENCES)
@pytest.mark.filterwarnings("ignore")
def test_the_programs_still_say_so(package: str) -> None:
    pytest.importorskip(package)
    for name, tensors in REFERENCES[package]().items():
        worth = tensors.pop("worth").float()
        made = _decoded({n: _lazy(t) for n, t in tensors.items()}, tuple(worth.shape))
        found = torch.frombuffer(made.tobytes(), dtype=torch.float32).view(worth.shape)
        assert torch.equal(found.view(torch.int32), worth.contiguous().view(torch.int32)), name


def _lazy(tensor: torch.Tensor) -> LazyTensor:
    dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return MemoryTensor(dtype, tuple(tensor.shape), data)


def _eight_bits(byte: int, fraction: int, bias: int, *, finite: bool) -> float:
    """What a byte of FP8 is worth: with `finite`, without infinities and a negative zero, that being NaN."""
    size, low = byte & 127, byte & ((1 << fraction) - 1)
    high = size >> fraction
    if (finite and byte == 128) or (not finite and fraction == 3 and size == 127):
        return math.nan
    if not finite and fraction == 2 and high == 31:
        return math.nan if low else math.copysign(math.inf, 128 - byte - 0.5)
    worth = (
        low * 2.0 ** (1 - bias - fraction) if high == 0 else (low / 2**fraction + 1) * 2.0 ** (high - bias)
    )
    return math.copysign(worth, 128 - byte - 0.5)


@pytest.mark.parametrize(
    ("dtype", "fraction", "bias", "finite"),
    [
        (DType.F8_E4M3, 3, 7, False),
        (DType.F8_E5M2, 2, 15, False),
        (DType.F8_E4M3FNUZ, 3, 8, True),
        (DType.F8_E5M2FNUZ, 2, 16, True),
    ],
)
def test_eight_bits_are_worth_what_their_definition_says(
    dtype: DType, fraction: int, bias: int, finite: bool
) -> None:
    weight = MemoryTensor(dtype, (16, 16), bytes(range(256)))
    scale = MemoryTensor(DType.F32, (), np.float32(0.75).tobytes())
    made = _decoded({"weight": weight, "scale_weight": scale}, (16, 16))
    found = np.frombuffer(made.tobytes(), "<f4")
    with np.errstate(invalid="ignore"):
        worth = [0.75 * _eight_bits(b, fraction, bias, finite=finite) for b in range(256)]
        expected = np.array(worth).astype("f4")
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    rest = ~np.isnan(found)
    assert found[rest].tobytes() == expected[rest].tobytes()


# -- windows


@pytest.mark.parametrize("name", CASES)
def test_any_range_may_be_read_from_any_thread(name: str) -> None:
    made = _decoded(CASES[name], _shape(CASES[name]))
    whole = made.tobytes()
    draw = random.Random(name)

    def read(_: int) -> bool:
        first = draw.randrange(made.numel)
        count = draw.randrange(1, min(1000, made.numel - first) + 1)
        out = bytearray(4 * count)
        made.read_into(4 * first, memoryview(out))
        return out == whole[4 * first : 4 * (first + count)]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(100)))


def _long(kind: str, rows: int, columns: int) -> dict[str, LazyTensor]:
    """A weight whose every row is longer than a window, of bytes that repeat."""
    block = memoryview(bytes(random.Random(kind).randrange(100) for _ in range(4096)))
    ones = MemoryTensor(DType.F32, (), np.float32(0.5).tobytes())
    tiles = (-(-rows // 128) * 128, columns // (16 if kind == "nvfp4" else 32))
    said = {"format": kind, "convrot": True} if kind == "int8_tensorwise" else {"format": kind}
    return {
        "weight": Repeated(
            {"nvfp4": DType.U8, "int8_tensorwise": DType.I8}.get(kind, DType.F8_E4M3),
            (rows, columns // 2 if kind == "nvfp4" else columns),
            block,
        ),
        "weight_scale": Repeated(DType.U8, tiles, block) if kind in ("nvfp4", "mxfp8") else ones,
        "comfy_quant": _text(said),
        **({"weight_scale_2": ones} if kind == "nvfp4" else {}),
    }


def _text(said: object) -> LazyTensor:
    data = json.dumps(said).encode()
    return MemoryTensor(DType.U8, (len(data),), data)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
def test_a_row_may_be_longer_than_a_window(kind: str) -> None:
    columns = 2 * ELEMENTS + 1024
    made = _decoded(_long(kind, 2, columns), (2, columns))
    parts = [bytes(w) for w in made.windows(1 << 12)]
    assert b"".join(parts) == made.tobytes()


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
def test_memory_is_that_of_a_few_windows(kind: str) -> None:
    made = _decoded(_long(kind, 3, 1 << 28), (3, 1 << 28))  # 3 GB as FP32
    out = bytearray(1 << 20)
    made.read_into(4 << 28, memoryview(out))
    tracemalloc.start()
    made.read_into(8 << 28, memoryview(out))
    made.read_into((4 << 28) + 4096, memoryview(out))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # torch's own are not counted: each is one window's


# -- damage


def test_every_damage_is_a_message() -> None:
    draw = random.Random(0)
    for name, case in CASES.items():
        shape = _shape(case)
        held = {n: t for n, t in case.items() if n not in ("shape", "sha256")}
        for part in held:
            for _ in range(12):
                tensors = dict(held)
                if (other := _damaged(held[part], draw)) is None:
                    del tensors[part]
                else:
                    tensors[part] = other
                try:
                    made, _words = decoded({f"x.{n}": t for n, t in tensors.items()}, {"x.weight": shape}, "")
                except SourceError as error:
                    (problem,) = error.problems
                    assert "weights cannot be decoded" in problem.fact and problem.evidence, (name, part)
                else:
                    for tensor in made.values():
                        assert len(tensor.tobytes()) == tensor.nbytes


def _damaged(tensor: LazyTensor, draw: random.Random) -> LazyTensor | None:
    """The same with another type, shape or content, or none."""
    data = bytes(tensor.tobytes())
    way = draw.randrange(6)
    if way == 0:
        return None
    if way == 1:
        return MemoryTensor(DType.U8, (len(data),), data)
    if way == 2:
        return MemoryTensor(DType.F32, (len(data),), 4 * data)
    if way == 3:
        return MemoryTensor(tensor.dtype, (2, *tensor.shape), 2 * data)
    if way == 4:
        return MemoryTensor(tensor.dtype, tensor.shape, draw.randbytes(len(data)))
    return MemoryTensor(tensor.dtype, (0, *tensor.shape), b"")


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "[" * 4000,
        '{"shape": [7, 300]}',
        '{"shape": [7, 300], "blocksize": 0}',
        '{"shape": [7, 300], "blocksize": -64}',
        '{"shape": [7, 300], "blocksize": true}',
        '{"shape": [7, 300], "blocksize": 1e300}',
        '{"shape": [7, 301], "blocksize": 64}',
        '{"shape": [true, 2100], "blocksize": 64}',
        '{"shape": [-7, -300], "blocksize": 64}',
        '{"shape": [99999999999999999999999, 0], "blocksize": 64}',
        '{"shape": {"0": 7}, "blocksize": 64}',
        '{"shape": [], "blocksize": 64}',
        '{"shape": null, "blocksize": 64}',
        '{"shape": [7, 300], "blocksize": NaN}',
    ],
)
def test_a_quant_state_is_a_strangers(said: str) -> None:
    case = dict(CASES["bitsandbytes nf4"])
    case["weight.quant_state.bitsandbytes__nf4"] = MemoryTensor(DType.U8, (len(said),), said.encode())
    with pytest.raises(SourceError, match="bitsandbytes NF4 weights cannot be decoded"):
        _decoded(case, (7, 300))


@pytest.mark.parametrize(
    "said",
    [
        {"format": "float8_of_tomorrow"},
        {"format": "asym_w4a8_int8"},
        {"format": 7},
        {"convrot": True, "per_row": True},  # what came before formats had names
        {"format": "int8_tensorwise", "convrot": 1},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 3},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**30},
        {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": "256"}},
        {"format": "convrot_w4a4"},  # twice as many columns as the model has
        {"format": "nvfp4"},
    ],
)
def test_a_description_that_is_not_understood_is_refused(said: object) -> None:
    case = {**CASES["int8_tensorwise rotated by 256"], "comfy_quant": _text(said)}
    with pytest.raises(SourceError, match="weights cannot be decoded"):
        _decoded(case, (5, 512))


def test_what_is_nested_in_a_description_counts() -> None:
    case = CASES["int8_tensorwise rotated by 16"]
    said = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}
    made = _decoded({**case, "comfy_quant": _text(said)}, (5, 512))
    assert hashlib.sha256(made.tobytes()).digest() == case["sha256"].tobytes()


def _empty(dtype: DType, *shape: int) -> LazyTensor:
    return MemoryTensor(dtype, shape, bytes(prod(shape) * dtype.bits // 8))


@pytest.mark.parametrize(
    ("scheme", "tensors"),
    [
        ("NVFP4", {"weight": _empty(DType.U8, 16, 8), "weight_scale_2": _empty(DType.F32)}),
        ("scaled I8", {"weight": _empty(DType.I8, 4, 4), "weight_scale": _empty(DType.F32)}),
        ("SVDQuant", {"qweight": _empty(DType.I8, 4, 4), "wscales": _empty(DType.F16, 4)}),
        ("GPTQ or AWQ", {"qweight": _empty(DType.I32, 4, 4), "qzeros": _empty(DType.I32, 4)}),
        (
            "MLX",
            {
                "weight": _empty(DType.U32, 4, 4),
                "scales": _empty(DType.F16, 4),
                "biases": _empty(DType.F16, 4),
            },
        ),
        ("compressed-tensors", {"weight_packed": _empty(DType.U8, 4, 4), "weight_scale": _empty(DType.F32)}),
        ("W4A8", {"weight": _empty(DType.I8, 4, 4), "weight_s_rel": _empty(DType.F32)}),
        ("bitsandbytes", {"weight": _empty(DType.I8, 4, 4), "SCB": _empty(DType.F32, 4)}),
        ("F8_E8M0", {"weight": _empty(DType.F8_E8M0, 4, 4)}),
        ("scaled", {"weight": _empty(DType.F16, 4, 4), "weight_scale": _empty(DType.F32)}),
        (
            "scaled F8",  # a scale of the input's channels, before it is multiplied
            {
                "weight": _empty(DType.F8_E4M3, 4, 4),
                "weight_scale": _empty(DType.F32),
                "pre_quant_scale": _empty(DType.F32, 4),
            },
        ),
    ],
)
def test_what_nothing_is_known_of_is_refused_by_name(scheme: str, tensors: Case) -> None:
    with pytest.raises(SourceError, match=f"^{scheme} weights cannot be decoded"):
        decoded({f"x.{n}": t for n, t in tensors.items()}, {}, "")


def test_a_scale_of_one_beside_a_plain_weight_says_nothing() -> None:
    plain = {"x.weight": _empty(DType.BF16, 4, 4), "y.weight": _empty(DType.F8_E4M3, 4, 4)}
    idle = {"x.scale_weight": MemoryTensor(DType.F32, (1,), np.float32(1).tobytes())}
    marker = {"scaled_fp8": _empty(DType.F8_E4M3, 0)}
    made, words = decoded({**plain, **idle, **marker}, {}, "")
    left = "left out: 1 tensor that would have plain weights taken for packed ones"
    assert made == plain and words == ("decoded: 1 weight of scaled FP8", left)


def test_what_is_not_packed_is_what_it_was() -> None:
    plain = {"x.weight": _empty(DType.BF16, 4, 4), "x.input_scale": _empty(DType.F32)}
    assert decoded(plain, {}, "") == (plain, ())


# -- packing


def _encoded(tensor: LazyTensor, scheme: str) -> dict[str, LazyTensor]:
    return encoded({"x.weight": tensor}, scheme, lambda layer: False)


@pytest.mark.parametrize("scheme", ENCODED)
def test_it_is_packed_as_other_programs_do(scheme: str) -> None:
    case = ENCODED[scheme]
    made = _encoded(case["source"], scheme)
    assert made.keys() == {"x.weight", "x.weight_scale", "x.comfy_quant"}
    for name in ("weight", "weight_scale"):
        ours, theirs = made[f"x.{name}"], case[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_they_still_do_so() -> None:
    pytest.importorskip("comfy_kitchen")
    for scheme, case in by_others().items():
        made = _encoded(_lazy(case["source"]), scheme)
        assert made["x.weight"].tobytes() == _lazy(case["weight"]).tobytes()
        assert made["x.weight_scale"].tobytes() == _lazy(case["weight_scale"]).tobytes()


_NUMBERS = st.floats(-60000, 60000, width=32) | st.floats(-(2**-10), 2**-10, width=32) | st.just(0.0)


@given(arrays(np.float32, (48, 32), elements=_NUMBERS))
@settings(max_examples=60)
def test_what_is_packed_is_near_what_it_was(weight: np.ndarray) -> None:
    tensor = MemoryTensor(DType.F32, weight.shape, weight.tobytes())
    for scheme in FORMS:
        made = _encoded(tensor, scheme)
        scale = np.frombuffer(made["x.weight_scale"].tobytes(), "<f4").astype(float)
        again = decoded(made, {}, "").tensors["x.weight"]
        found = np.frombuffer(again.tobytes(), "<f4").reshape(weight.shape).astype(float)
        if scheme == "int8":
            bound = 0.5001 * scale[:, None] + np.zeros_like(found)
        else:  # three bits of fraction, and below 2^-6 steps of 2^-9
            bound = np.maximum(np.abs(weight.astype(float)) * 2**-4, scale * 2**-10) * 1.001
        assert (np.abs(found - weight) <= bound).all()
        assert (np.sign(found) * np.sign(weight) >= 0).all()


def test_threads_do_not_matter_to_what_is_packed() -> None:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((1040, 528), "f4")  # several windows, whose ends lie within rows
    tensor = MemoryTensor(DType.F32, weight.shape, weight.tobytes())
    for scheme in FORMS:
        made = _encoded(tensor, scheme)["x.weight"]
        whole = _encoded(tensor, scheme)["x.weight"].tobytes()

        def read(first: int, made: LazyTensor = made) -> bytes:
            out = bytearray(min(5000, made.nbytes - first))
            made.read_into(first, memoryview(out))
            return bytes(out)

        with ThreadPoolExecutor(4) as pool:
            assert b"".join(pool.map(read, range(0, made.nbytes, 5000))) == whole


def test_what_is_packed_and_what_is_not() -> None:
    large = _empty(DType.F16, 64, 32)
    tensors = {
        **dict.fromkeys(
            ("a.weight", "b.c.weight", "stays.weight", "x_embedder.weight", "norm1.linear.weight"), large
        ),
        "a.bias": _empty(DType.F16, 64),
        "small.weight": _empty(DType.F16, 32, 32),
        "odd.weight": _empty(DType.F16, 64, 40),
        "conv.weight": _empty(DType.F16, 64, 32, 1, 1),
        "ids.weight": _empty(DType.I64, 64, 32),
        "table": large,
    }
    made = encoded(tensors, "fp8", lambda layer: layer == "stays")
    assert made.keys() == {
        f"{n}.{s}" for n in ("a", "b.c") for s in ("weight", "weight_scale", "comfy_quant")
    }


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", FORMS)
def test_what_is_no_number_is_not_packed(scheme: str, odd: float) -> None:
    weight = np.ones((64, 32), "f4")
    weight[3, 4] = odd
    made = _encoded(MemoryTensor(DType.F32, weight.shape, weight.tobytes()), scheme)
    for tensor in (made["x.weight"], made["x.weight_scale"]):
        with pytest.raises(UnfitError, match="has values that are no numbers"):
            tensor.tobytes()
