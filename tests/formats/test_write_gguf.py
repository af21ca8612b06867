"""GGUF files that are written: to the byte what the reference's writer makes of the same tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from blake3 import blake3

from builder.base.errors import CkptError, OutputError
from builder.formats import open_checkpoint
from builder.formats.write_gguf import Encoding, writing_gguf
from builder.tensors.cast import BeyondError, UnfitError
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import carry_out
from tests.help.gguf_files import Types

Arrays = dict[str, np.ndarray[Any, Any]]


def lazy(array: np.ndarray[Any, Any]) -> LazyTensor:
    kinds = {"float32": DType.F32, "float16": DType.F16, "int64": DType.I64, "uint8": DType.U8}
    return MemoryTensor(kinds[array.dtype.name], array.shape, array.tobytes())


def some() -> Arrays:
    chance = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "wide": (40, 512),
        "narrow": (96, 32),
        "conv": (16, 16, 3, 3),  # 2,304 numbers: rows of 3, or nine of 256
        "odd": (33, 33),
        "few": (8, 128),
        "video": (2, 4, 4, 8, 8),
        "bias": (4096,),
        "one": (),
        "large": (700, 1024),  # of several windows
        "modulation": (64, 64),
        "in.weight": (64, 64),
    }
    return {n: chance.standard_normal(s).astype("f4") for n, s in shapes.items()}


def reference(path: Path, arrays: Arrays, types: dict[str, str], reshaped: bool, file_type: int) -> bytes:
    """The file of the reference's writer, filled as ComfyUI's converter does it."""
    writer = gguf.GGUFWriter(path, "sd1" if reshaped else "flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    held = {}
    for name, values in sorted(arrays.items()):
        shape, count = values.shape, values.size
        if reshaped and len(shape) > 1 and count >= 512 and count % 256 == 0 and shape[-1] % 256:
            values = values.reshape(count // 256, 256)
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
        held[name] = values
    writer.add_string("author", "né")
    for name, values in held.items():
        kind = Types[types[name]]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


FULL = ("few", "video", "bias", "one", "modulation")
KINDS = {
    "fp16": (Encoding("flux", "fp16", full=("modul*",)), "F16", (), 1),
    "bf16": (Encoding("flux", "bf16", full=("modul*",)), "BF16", (), 32),
    "fp32": (Encoding("flux", "fp32"), "F32", (), 0),
    "q8_0": (
        Encoding("flux", "fp16", quantize="q8_0", full=("modul*",), whole=("in.*",)),
        "Q8_0",
        ("odd",),
        7,
    ),
    "sd": (
        Encoding("sd1", "bf16", quantize="q8_0", reshaped=True, full=("modulation",), whole=("in.weight",)),
        "Q8_0",
        ("odd",),
        7,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_are_the_references(tmp_path: Path, kind: str, threads: int) -> None:
    encoding, usual, odd, file_type = KINDS[kind]
    arrays = some()
    other = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[encoding.precision]
    types = {n: "F32" if n in FULL else usual for n in arrays}
    if encoding.quantize:
        types |= dict.fromkeys((*odd, "in.weight"), other)
        if not encoding.reshaped:
            types["conv"] = other  # its rows are no whole blocks
    wanted = reference(tmp_path / "reference.gguf", arrays, types, encoding.reshaped, file_type)
    path = tmp_path / "ours.gguf"
    tensors = {n: lazy(a) for n, a in arrays.items()}
    said = {"author": "né", "format": "pt", "general.architecture": "another"}
    written = carry_out(writing_gguf(path, tensors, encoding, said, digests=True), threads=threads)
    assert path.read_bytes() == wanted
    assert written.sha256 == hashlib.sha256(wanted).hexdigest()
    assert written.size == len(wanted)
    assert written.digests == {n: blake3(a.tobytes()).hexdigest() for n, a in arrays.items()}
    with open_checkpoint(path) as held:
        assert {n: t.stored[0] for n, t in held.items()} == types
        assert {n: t.shape for n, t in held.items()} == {n: a.shape for n, a in arrays.items()}
    if kind != "fp32":
        assert len(gguf.GGUFReader(path).tensors) == len(arrays)


def test_every_tensor_may_keep_its_type(tmp_path: Path) -> None:
    arrays: Arrays = {
        "a": np.arange(6, dtype="f4").reshape(2, 3),
        "b": np.arange(6, dtype="f2"),
        "c": np.arange(3, dtype="i8"),
        "none": np.zeros((0, 4), dtype="f4"),
    }
    path = tmp_path / "a.gguf"
    carry_out(writing_gguf(path, {n: lazy(a) for n, a in arrays.items()}, Encoding("flux", "keep")))
    with open_checkpoint(path) as held:
        assert {n: bytes(t.tobytes()) for n, t in held.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_what_is_narrow_may_stay_so(tmp_path: Path) -> None:
    half = np.ones((64, 64), dtype="f2")
    wide = np.ones((64, 64), dtype="f4")
    encoding = Encoding("flux", "bf16", narrow=True)
    carry_out(writing_gguf(tmp_path / "a.gguf", {"half": lazy(half), "wide": lazy(wide)}, encoding))
    with open_checkpoint(tmp_path / "a.gguf") as held:
        assert {n: t.stored[0] for n, t in held.items()} == {"half": "F16", "wide": "BF16"}


def test_halves_become_blocks(tmp_path: Path) -> None:
    half = np.random.default_rng(0).standard_normal((64, 64)).astype("f2")
    carry_out(writing_gguf(tmp_path / "a.gguf", {"a": lazy(half)}, Encoding("flux", quantize="q8_0")))
    wanted = gguf.quants.quantize(half.astype("f4"), Types.Q8_0)
    assert gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("tensors", "fact"),
    [
        ({"x" * 128: lazy(np.ones(1, "f4"))}, "cannot be named"),
        ({"a": lazy(np.ones(1, "u1"))}, "no type for U8"),
        ({"a\ud800": lazy(np.ones(1, "f4"))}, "not valid Unicode"),
        ({"a": MemoryTensor(DType.F8_E4M3, (1,), b"0")}, "no type for F8_E4M3"),
    ],
)
def test_what_the_form_cannot_hold(tmp_path: Path, tensors: dict[str, LazyTensor], fact: str) -> None:
    with pytest.raises(OutputError) as caught:
        carry_out(writing_gguf(tmp_path / "a.gguf", tensors, Encoding("flux", "keep")))
    assert fact in str(caught.value)
    assert not list(tmp_path.iterdir())


BAD = {
    "beyond FP16": ({}, 7e4, BeyondError, "70000"),
    "no number in FP16": ({}, np.nan, UnfitError, "NaN"),
    "beyond a block": ({"quantize": "q8_0"}, 9e6, OutputError, "9e+06"),
    "no number in a block": ({"quantize": "q8_0"}, np.nan, OutputError, "NaN"),
    "infinite in a block": ({"quantize": "q8_0", "non_finite": "keep"}, np.inf, OutputError, "infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_would_not_survive(tmp_path: Path, name: str) -> None:
    how, value, error, word = BAD[name]
    array = np.ones((64, 64), dtype="f4")
    array[5, 6] = value
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(CkptError) as caught:
        carry_out(writing_gguf(tmp_path / "a.gguf", {"layer": lazy(array)}, Encoding("flux", **how)))
    assert type(caught.value) is error
    (problem,) = caught.value.problems
    assert "tensor `layer`" in problem.fact and word in problem.evidence[0]
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_values_that_are_clamped(tmp_path: Path) -> None:
    array = np.ones((64, 64), dtype="f4")
    array[5, 6], array[7, 0] = 9e6, -7e4
    for kind, least in (("q8_0", -7e4), (None, -65504.0)):
        encoding = Encoding("flux", quantize=kind, overflow="clamp")  # type: ignore[arg-type]
        carry_out(writing_gguf(tmp_path / "a.gguf", {"layer": lazy(array)}, encoding))
        with open_checkpoint(tmp_path / "a.gguf") as held:
            values = np.frombuffer(held["layer"].tobytes(), "f4" if kind else "f2")
        assert values.max() == (65504 * 127 if kind else 65504)
        assert values.min() == pytest.approx(least, rel=0.01)
