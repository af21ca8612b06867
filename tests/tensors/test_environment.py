"""The numeric environment is the engine's own: what a process has set decides nothing, and stays."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.tensors.cast import Cast, Faults
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.torch_threads import lone_torch

TINY = np.concatenate(
    [np.array([5e-324, -5e-324, 1e-310, -1e-310, -0.0, 1e-40, -6e-8]), np.linspace(-1, 1, 57)]
)


def cast(source: LazyTensor, dtype: DType, path: Path, **options: object) -> bytes:
    """What a pass writes of a tensor in another type."""
    tensor = Cast(source, dtype, name="t", faults=Faults(), **options)  # type: ignore[arg-type]
    write(path, {"t": tensor}, threads=3)
    with open_checkpoint(path) as written:
        return bytes(written["t"].tobytes())


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_flush_to_zero_of_the_process_decides_nothing(dtype: DType, tmp_path: Path) -> None:
    source = MemoryTensor(DType.F64, TINY.shape, TINY.astype("<f8").tobytes())
    plain = cast(source, dtype, tmp_path / "a")
    assert torch.set_flush_denormal(True)
    try:
        assert cast(source, dtype, tmp_path / "b") == plain
        assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0.0, "and it stays as it was"
    finally:
        torch.set_flush_denormal(False)


QUIET = {
    DType.F16: struct.pack("<HH", 0x7E00, 0xFE00),
    DType.BF16: struct.pack("<HH", 0x7FC0, 0xFFC0),
    DType.F32: struct.pack("<II", 0x7FC00000, 0xFFC00000),
}


@pytest.mark.parametrize("dtype", QUIET)
@pytest.mark.parametrize(
    "source",
    [
        DType.F64,
        DType.F32,
        DType.F16,
        DType.BF16,
        *(d for d in DType if d.code.startswith(("F8_E4", "F8_E5"))),
    ],
)
def test_a_kept_nan_is_one_pattern(dtype: DType, source: DType, tmp_path: Path) -> None:
    """Whatever the NaN of the source, wherever it stands in the tensor."""
    if dtype is source:
        pytest.skip("what is not cast keeps every bit")
    bits = {
        DType.F64: ("<Q", [0x7FF8_0000_0000_0001, 0xFFF0_0000_DEAD_BEEF]),
        DType.F32: ("<I", [0x7F80_0001, 0xFFC0_1234]),
        DType.F16: ("<H", [0x7C01, 0xFE12]),
        DType.BF16: ("<H", [0x7F81, 0xFFC2]),
        DType.F8_E5M2: ("<B", [0x7D, 0xFF]),
        DType.F8_E4M3: ("<B", [0x7F, 0xFF]),
        DType.F8_E5M2FNUZ: ("<B", [0x80, 0x80]),  # the only NaN of these, which has no sign
        DType.F8_E4M3FNUZ: ("<B", [0x80, 0x80]),
    }
    form, patterns = bits[source]
    one = struct.pack(form, 0)
    for before in (0, 1, 7, 16, 33):
        data = one * before + b"".join(struct.pack(form, p) for p in patterns) + one * 21
        held = MemoryTensor(source, (before + 23,), data)
        made = cast(held, dtype, tmp_path / "x", non_finite="keep")
        size = dtype.itemsize
        quiet = QUIET[dtype][:size] * 2 if source.code.endswith("FNUZ") else QUIET[dtype]
        assert made[before * size : (before + 2) * size] == quiet


def test_torchs_threads_are_as_they_were(tmp_path: Path) -> None:
    """In the thread that called, and in those that are started afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        source = MemoryTensor(DType.F32, (1000,), bytes(4000))
        with lone_torch():
            cast(source, DType.F16, tmp_path / "x")
        assert torch.get_num_threads() == 3
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3]
        assert not [t for t in threading.enumerate() if t.name.startswith(("window", "in-order"))]
    finally:
        torch.set_num_threads(before)


def test_a_cast_of_a_cast() -> None:
    """Each has a buffer of its own."""
    values = np.linspace(-3, 3, 1000).astype("<f2")
    source = MemoryTensor(DType.F16, values.shape, values.tobytes())
    wide = Cast(source, DType.F32, name="t", faults=Faults())
    back = Cast(wide, DType.F16, name="t", faults=Faults())
    assert bytes(back.tobytes()) == values.tobytes()
