"""Blocks of ggml: decoded and encoded bit for bit as the reference does."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from builder.tensors.ggml_blocks import BLOCKS, BlockTensor, encode_q8_0
from tests.help.gguf_files import PACKED, Types, random_blocks


class Bytes:
    """Bytes at positions."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset: int, out: memoryview) -> None:
        assert 0 <= offset <= offset + len(out) <= len(self.data)
        out[:] = self.data[offset : offset + len(out)]


def reference(data: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, Types[name]).reshape(-1)


def decoded(data: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    blocks = BLOCKS[name]
    out = bytearray(len(data) * blocks.elements * 4)
    blocks.decode(memoryview(data.tobytes()), memoryview(out))
    return np.frombuffer(out, "f4")


def test_every_type_is_there() -> None:
    assert sorted(BLOCKS) == sorted(PACKED)
    for name, blocks in BLOCKS.items():
        assert (blocks.elements, blocks.itemsize) == gguf.GGML_QUANT_SIZES[Types[name]]
        assert blocks.fields.itemsize == blocks.itemsize


@pytest.mark.parametrize("name", PACKED)
def test_blocks_are_what_the_reference_makes_of_them(name: str) -> None:
    data = random_blocks(name, 2000)
    found, wanted = decoded(data, name), reference(data, name)
    assert np.isfinite(wanted).all()
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", PACKED)
@given(data=st.data())
def test_any_bits_at_all(name: str, data: st.DataObject) -> None:
    size = BLOCKS[name].itemsize
    raw = data.draw(arrays.arrays("u1", (2, size)))
    found, wanted = decoded(raw, name), reference(raw, name)
    numbers = ~np.isnan(wanted)
    assert (np.isnan(found) == ~numbers).all()
    assert found[numbers].tobytes() == wanted[numbers].tobytes()


@pytest.mark.parametrize("name", PACKED)
def test_any_window_of_a_tensor(name: str) -> None:
    data = random_blocks(name, 64)
    whole = decoded(data, name).tobytes()
    tensor = BlockTensor(BLOCKS[name], (4, 16 * BLOCKS[name].elements), Bytes(b"xyz" + data.tobytes()), 3)
    assert tensor.stored == (name, data.size)
    assert bytes(tensor.tobytes()) == whole
    width = 4 * BLOCKS[name].elements
    for start, end in [(4, 8), (0, width), (width - 4, width + 4), (4, len(whole) - 4), (8, 8)]:
        out = bytearray(end - start)
        tensor.read_into(start, memoryview(out))
        assert bytes(out) == whole[start:end]


def test_a_tensor_of_many_windows() -> None:
    data = random_blocks("Q6_K", 5000)
    tensor = BlockTensor(BLOCKS["Q6_K"], (5000, 256), Bytes(data.tobytes()), 0)
    assert b"".join(map(bytes, tensor.windows(1 << 20))) == decoded(data, "Q6_K").tobytes()
    assert bytes(tensor.tobytes()) == decoded(data, "Q6_K").tobytes()


# Of smaller ones, a scale has no inverse, and what the reference makes of them hangs on the processor.
LEAST = 2.0**-100
FLOATS = st.one_of(st.just(0.0), st.floats(LEAST, 8e6, width=32), st.floats(-8e6, -LEAST, width=32))


@given(arrays.arrays("f4", (3, 32), elements=FLOATS))
def test_what_is_encoded_is_what_the_reference_encodes(values: np.ndarray[Any, Any]) -> None:
    assert encode_q8_0(values).tobytes() == gguf.quants.quantize(values, Types.Q8_0).tobytes()


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 3e4])
def test_encoding_of_numbers_of_any_size(scale: float) -> None:
    values = (np.random.default_rng(1).standard_normal((500, 32)) * scale).astype("f4")
    values[0] = 0
    values[1] = np.arange(32) * np.float32(scale) / 2  # halves, which are rounded away from zero
    assert encode_q8_0(values).tobytes() == gguf.quants.quantize(values, Types.Q8_0).tobytes()


def test_numbers_too_small_for_a_scale_are_zeros() -> None:
    values = np.full((1, 32), np.float32(1e-40))
    assert encode_q8_0(values).tobytes() == bytes(34)
