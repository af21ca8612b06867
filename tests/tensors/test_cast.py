"""Casts against plain torch, and the numbers that would not survive them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import OutputError, SourceError, render
from builder.formats.write_safetensors import write
from builder.tensors.cast import Cast, Fault, Faults, cast_all
from builder.tensors.lazy import WINDOW, DType, LazyTensor, MemoryTensor
from builder.tensors.packed import OPAQUE
from tests.help.building import UNET, VAE, Folder, content, like, model, save, values

KINDS = {"fp16": DType.F16, "bf16": DType.BF16, "fp32": DType.F32}
WEIGHT = UNET + "out.2.weight"
BIAS = VAE + "decoder.conv_out.bias"
RECIPE = 'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\n'


def tensor(dtype: DType, data: bytes) -> LazyTensor:
    return MemoryTensor(dtype, (len(data) // dtype.itemsize,), data)


def plain(source: LazyTensor, dtype: DType) -> torch.Tensor:
    """What torch makes of it, FP64 through FP32."""
    if not source.numel:
        return torch.empty(source.shape, dtype=dtype.torch)
    read = torch.frombuffer(bytearray(source.tobytes()), dtype=source.dtype.torch).reshape(source.shape)
    return (read.float() if source.dtype is DType.F64 else read).to(dtype.torch)


def raw(made: torch.Tensor) -> bytes:
    return bytes(made.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if made.numel() else b""


@st.composite
def sources(draw: st.DrawFn) -> LazyTensor:
    dtype = draw(st.sampled_from([DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8_E4M3, DType.F8_E5M2]))
    whole = st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    edges = [0.0, -0.0, 65504.0, 65519.99, 65520.0, -65520.0, 2**-24, 2**-25, 1e-40, 3.4e38, 1 + 2**-11]
    some = st.sampled_from(edges).map(lambda v: _of(dtype, v))
    return tensor(dtype, b"".join(draw(st.lists(whole | some, max_size=40))))


def _of(dtype: DType, value: float) -> bytes:
    return raw(torch.tensor([value], dtype=torch.float64).to(dtype.torch))


@settings(max_examples=300)
@given(source=sources(), precision=st.sampled_from(sorted(KINDS)))
def test_casts_are_those_of_torch(source: LazyTensor, precision: str) -> None:
    """With `keep`, every value; and what `error` and `clamp` do is told by the same values."""
    dtype = KINDS[precision]
    expected = plain(source, dtype)
    cast = Cast(source, dtype, name="t", faults=Faults(), overflow="keep", non_finite="keep")
    made = torch.frombuffer(bytearray(cast.tobytes()), dtype=dtype.torch) if source.numel else expected
    nan = expected.isnan()
    assert torch.equal(made.isnan(), nan)
    assert raw(made[~nan]) == raw(expected[~nan])
    read = torch.frombuffer(source.tobytes() or bytearray(8), dtype=source.dtype.torch)[: source.numel]
    finite = read.double()
    bad = ~finite.isfinite()
    over = ~expected.isfinite() & ~bad

    faults = Faults()
    bytes(Cast(source, dtype, name="t", faults=faults).tobytes())
    fault = faults.by_name.get("t", Fault())
    assert (fault.overflow, fault.nan + fault.infinite) == (int(over.sum()), int(bad.sum()))
    assert (faults.error("it", dtype) is None) == (not over.any() and not bad.any())
    if over.any():
        assert fault.largest == float(finite[over].abs().max())

    clamped = Cast(source, dtype, name="t", faults=Faults(), overflow="clamp", non_finite="keep").tobytes()
    if source.numel:
        limit = torch.finfo(dtype.torch).max
        wanted = torch.where(over, finite.sign() * limit, expected.double()).to(dtype.torch)
        assert raw(torch.frombuffer(clamped, dtype=dtype.torch)[~nan]) == raw(wanted[~nan])


@settings(max_examples=60)
@given(count=st.integers(1, 3000), start=st.integers(0, 3000), length=st.integers(1, 3000))
def test_any_part_may_be_read(count: int, start: int, length: int) -> None:
    generator = torch.Generator().manual_seed(count)
    read = torch.randn(count, generator=generator)
    cast = Cast(tensor(DType.F32, raw(read)), DType.F16, name="t", faults=Faults())
    start = min(start, count - 1)
    length = min(length, count - start)
    part = bytearray(2 * length)
    cast.read_into(2 * start, memoryview(part))
    assert bytes(part) == raw(read[start : start + length].half())


def test_more_than_one_window() -> None:
    read = torch.randn(WINDOW // 4 * 2 + 1001, generator=torch.Generator().manual_seed(0))
    read[-1] = 1e6
    faults = Faults()
    cast = Cast(tensor(DType.F32, raw(read)), DType.F16, name="t", faults=faults)
    assert bytes(cast.tobytes()) == raw(read.half())
    assert faults.by_name == {"t": Fault(overflow=1, largest=1e6)}


@pytest.mark.parametrize(
    ("value", "made"),
    [(65504.0, 0x7BFF), (65519.99, 0x7BFF), (65520.0, 0x7C00), (-65519.99, 0xFBFF), (-65520.0, 0xFC00)],
)
def test_the_edge_of_half_precision(value: float, made: int) -> None:
    faults = Faults()
    cast = Cast(values([value]), DType.F16, name="t", faults=faults)
    assert struct.unpack("<H", cast.tobytes()) == (made,)
    assert bool(faults.by_name) == (abs(value) == 65520)


def test_double_precision_is_rounded_twice() -> None:
    """Numeric profile 1: through FP32, as every tool does; straight to FP16 gives another value."""
    value = 1 + 2**-11 + 2**-40  # just above the middle of two halves; in FP32 it is that middle
    cast = Cast(values([value], "<f8"), DType.F16, name="t", faults=Faults())
    assert struct.unpack("<e", cast.tobytes()) == (1.0,)
    assert struct.unpack("<e", struct.pack("<e", value)) == (1 + 2**-10,)


def test_a_double_beyond_single_precision_overflows() -> None:
    for dtype in (DType.F16, DType.BF16, DType.F32):
        faults = Faults()
        Cast(values([1e300, -1.0], "<f8"), dtype, name="t", faults=faults).tobytes()
        assert faults.by_name == {"t": Fault(overflow=1, largest=1e300)}
        clamped = Cast(values([-1e300], "<f8"), dtype, name="t", faults=Faults(), overflow="clamp").tobytes()
        limit = torch.finfo(dtype.torch).max
        assert raw(torch.tensor([-limit], dtype=torch.float64).to(dtype.torch)) == bytes(clamped)


def test_integers_and_empty_tensors_are_never_cast() -> None:
    given: dict[str, LazyTensor] = {
        "ids": values(range(77), "<i8"),
        "flags": MemoryTensor(DType.BOOL, (2,), b"\1\0"),
        "bytes": MemoryTensor(DType.U8, (2,), b"\xff\0"),
        "empty": MemoryTensor(DType.F32, (0, 4), b""),
        "weight": values([1.5]),
    }
    made = cast_all(given, "fp16", faults=Faults())
    assert {n for n in given if made[n] is given[n]} >= {"ids", "flags", "bytes"}
    assert {n: t.dtype for n, t in made.items()} == {
        "ids": DType.I64,
        "flags": DType.BOOL,
        "bytes": DType.U8,
        "empty": DType.F32,
        "weight": DType.F16,
    }


def test_keep_checks_but_does_not_cast() -> None:
    nan = struct.pack("<HH", 0x7E00, 0x3C00)
    source = tensor(DType.F16, nan)
    faults = Faults()
    made = cast_all({"t": source}, "keep", faults=faults)
    assert bytes(made["t"].tobytes()) == nan
    assert faults.by_name == {"t": Fault(nan=1)}


@pytest.mark.parametrize("value", [0.1, 1e-50, 1e300, -5e-324, float(1 << 53)])
def test_keep_keeps_every_bit_of_double_precision(value: float) -> None:
    source = values([value, -value], "<f8")
    faults = Faults()
    for overflow in ("error", "clamp", "keep"):
        made = cast_all({"t": source}, "keep", faults=faults, overflow=overflow)["t"]  # type: ignore[arg-type]
        assert (made.dtype, made.tobytes()) == (DType.F64, source.tobytes())
    assert not faults.by_name


@pytest.mark.parametrize("dtype", [d for d in DType if d.floating and d not in OPAQUE])
def test_keep_keeps_every_bit_pattern(dtype: DType) -> None:
    """NaN of every kind too, where those are allowed."""
    size = dtype.itemsize
    some = (
        range(256) if size == 1 else [*range(0, 1 << 16, 7), *range(0x7C00, 0x7E01), *range(0xFFF0, 1 << 16)]
    )
    data = b"".join(p.to_bytes(min(size, 2), "little").rjust(size, bytes([p & 255])) for p in some)
    made = cast_all({"t": tensor(dtype, data)}, "keep", faults=Faults(), non_finite="keep")["t"]
    assert bytes(made.tobytes()) == data


@pytest.mark.parametrize("scale", ["a.scale_weight", "a.weight_scale", "scaled_fp8", "a.weight_scale_2"])
def test_scaled_fp8_is_refused(scale: str) -> None:
    packed: dict[str, LazyTensor] = {
        "a.weight": MemoryTensor(DType.F8_E4M3, (2,), b"\x38\x39"),
        scale: values([0.5]),
    }
    with pytest.raises(SourceError) as caught:
        cast_all(packed, "fp16", faults=Faults())
    assert caught.value.exit_code == 6
    said = render(caught.value.problems[0])
    assert scale in said and "the precision `keep`" in said
    kept = cast_all(packed, "keep", faults=Faults())
    assert bytes(kept["a.weight"].tobytes()) == b"\x38\x39"


def test_plain_fp8_is_cast() -> None:
    made = cast_all({"a": MemoryTensor(DType.F8_E4M3, (2,), b"\x38\xb8")}, "fp16", faults=Faults())
    assert struct.unpack("<2e", made["a"].tobytes()) == (1.0, -1.0)


def test_types_that_are_packed_are_refused() -> None:
    with pytest.raises(SourceError, match="F8_E8M0 weights cannot be cast"):
        cast_all({"a": MemoryTensor(DType.F8_E8M0, (2,), b"\x38\xb8")}, "bf16", faults=Faults())


# -- in a build


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def prepare(folder: Folder, text: str = "", **replaced: LazyTensor) -> Mapping[str, Any]:
    by_name = {"weight": WEIGHT, "bias": BIAS}
    tensors = {**model(), **{by_name[k]: t for k, t in replaced.items()}}
    save(folder / "a.safetensors", tensors)
    folder.write("m.toml", RECIPE + text)
    return tensors


OVER = like(model()[WEIGHT], 70000.0, 1e5, -1e6, 65519.99)
BROKEN = like(model()[BIAS], float("nan"), float("inf"), float("-inf"))


def test_overflow_is_an_error_that_tells_all(folder: Folder) -> None:
    other = UNET + "out.2.bias"
    save(folder / "a.safetensors", {**model(), WEIGHT: OVER, other: like(model()[other], 65520.0)})
    folder.write("m.toml", RECIPE)
    (folder / "m.safetensors").write_bytes(b"old")
    said = folder("build", "m.toml")
    assert said.code == 7
    assert "out.2.weight" in said.err
    assert "3 finite values are beyond F16, the largest is 1e+06" in said.err
    assert "1 finite values are beyond F16, the largest is 65520" in said.err
    assert 'overflow = "clamp"' in said.err
    assert (folder / "m.safetensors").read_bytes() == b"old"
    assert not (folder / "m.lock.toml").exists()
    keys = [p.read_text() for p in folder.store.glob("actions/*/*.json")]
    assert not any('"class":"UNET-tiny"' in k for k in keys), "nothing is kept of what failed"
    assert folder("build", "m.toml").code == 7, "nor the second time"


def test_clamped(folder: Folder) -> None:
    prepare(folder, '[output]\noverflow = "clamp"\n', weight=OVER)
    folder.build("m.toml")
    made = struct.unpack("<4e", content(folder / "m.safetensors")[WEIGHT][2][:8])
    assert made == (65504.0, 65504.0, -65504.0, 65504.0)


def test_kept_overflow(folder: Folder) -> None:
    prepare(folder, '[output]\noverflow = "keep"\n', weight=OVER)
    folder.build("m.toml")
    made = struct.unpack("<4e", content(folder / "m.safetensors")[WEIGHT][2][:8])
    assert made == (float("inf"), float("inf"), float("-inf"), 65504.0)


def test_not_finite_is_an_error_that_tells_all(folder: Folder) -> None:
    prepare(folder, '[output]\noverflow = "clamp"\n', bias=BROKEN)
    said = folder("build", "m.toml")
    assert said.code == 7
    assert "decoder.conv_out.bias" in said.err
    assert "1 are NaN, 2 are infinite" in said.err
    assert 'non_finite = "keep"' in said.err and "overflow" not in said.err
    assert not (folder / "m.safetensors").exists()


def test_kept_not_finite(folder: Folder) -> None:
    prepare(folder, '[output]\nnon_finite = "keep"\n', bias=BROKEN)
    folder.build("m.toml")
    first, second, third = struct.unpack("<3e", content(folder / "m.safetensors")[BIAS][2][:6])
    assert first != first and (second, third) == (float("inf"), float("-inf"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "keep"])
@pytest.mark.parametrize("source", [DType.F32, DType.F16, DType.BF16, DType.F64])
def test_precisions(folder: Folder, precision: str, source: DType) -> None:
    tensors = model(precision=source)
    write(folder / "a.safetensors", tensors)
    folder.write("m.toml", RECIPE + f'output.precision = "{precision}"\n')
    folder.build("m.toml")
    made = content(folder / "m.safetensors")
    assert made.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype = KINDS.get(precision, tensor.dtype) if tensor.dtype.floating else tensor.dtype
        assert made[name] == (dtype.code, tensor.shape, raw(plain(tensor, dtype)))


def test_scaled_weights_keep_their_scales_or_are_decoded(folder: Folder) -> None:
    """No component's table has scales, and without them the weights would mean something else."""
    scaled = {n: _to_fp8(t) if n == WEIGHT else t for n, t in model().items()}
    scale = WEIGHT.replace(".weight", ".scale_weight")
    write(folder / "a.safetensors", {**scaled, scale: values([0.5])})
    folder.write("m.toml", RECIPE + 'output.precision = "fp16"\n')
    said = folder("build", "m.toml")
    assert said.code == 0 and "UNET-tiny of a: decoded: 1 weight of scaled FP8" in said.err
    made = content(folder / "m.safetensors")
    assert scale not in made and made[WEIGHT] == (
        "F16",
        scaled[WEIGHT].shape,
        bytes(2 * scaled[WEIGHT].numel),
    )
    for kept in ("", 'output.precision = "keep"\n'):
        folder.write("m.toml", RECIPE + kept)
        folder.build("m.toml")
        made = content(folder / "m.safetensors")
        assert made[WEIGHT][0] == "F8_E4M3" and made[scale][2] == struct.pack("<f", 0.5)
    # Other components of the same file are as good as any.
    folder.write("v.toml", RECIPE.replace('base = "a"', 'base = "NEW VAE-tiny"\ncomponents.VAE-tiny = "a"'))
    assert folder("build", "v.toml").code == 0


def _to_fp8(tensor: LazyTensor) -> LazyTensor:
    return MemoryTensor(DType.F8_E4M3, tensor.shape, bytes(tensor.numel))


def test_outputs_decide_each_for_itself(folder: Folder) -> None:
    prepare(
        folder,
        '[[output]]\nname = "half"\noverflow = "clamp"\n[[output]]\nname = "whole"\nprecision = "fp32"\n',
        weight=OVER,
    )
    folder.build("m.toml")
    assert content(folder / "m-half.safetensors")[WEIGHT][2][:2] == struct.pack("<e", 65504)
    assert content(folder / "m-whole.safetensors")[WEIGHT][2][:4] == struct.pack("<f", 70000)


def test_an_error_holds_one_problem_a_tensor() -> None:
    faults = Faults()
    for name in ("b", "a"):
        faults.add(name, Fault(overflow=1, largest=7e4))
    faults.add("a", Fault(nan=2))
    error = faults.error("`it`", DType.F16)
    assert isinstance(error, OutputError)
    assert [p.fact for p in error.problems] == [
        "tensor `a` of `it` has values that would not survive",
        "tensor `b` of `it` has values that would not survive",
    ]
    assert error.problems[0].evidence == (
        "1 finite values are beyond F16, the largest is 70000",
        "2 are NaN, 0 are infinite",
    )
