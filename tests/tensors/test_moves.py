"""Tensors whose elements are others' in another order, of every size that files have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.moves import Columns, Joined, Reordered, Rows, SideBySide, Transposed, swapped


def held(array: np.ndarray[Any, np.dtype[np.float32]]) -> LazyTensor:
    return MemoryTensor(DType.F32, array.shape, array.tobytes())


@pytest.mark.parametrize("shape", [(6, 4), (2, 1), (0, 4), (4, 0), (0, 0)])
def test_moves_are_those_of_numpy(shape: tuple[int, int]) -> None:
    array = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    source, order = held(array), [*range(shape[0])][::-1]
    half = shape[0] // 2
    for made, expected in (
        (Reordered(source, order), array[::-1]),
        (Transposed(source), array.T),
        (Rows(source, half, shape[0] - half), array[half:]),
        (Columns(source, 0, shape[1] // 2), array[:, : shape[1] // 2]),
        (SideBySide([source, source]), np.concatenate([array, array], axis=1)),
        (Joined([source, source]), np.concatenate([array, array])),
        (swapped(source), np.concatenate([array[half:], array[:half]])),
    ):
        assert made.shape == expected.shape
        assert made.tobytes() == expected.tobytes(), type(made).__name__
        made.read_into(0, memoryview(bytearray(made.nbytes)))
        if made.nbytes > 4:  # from the middle of a row
            out = bytearray(made.nbytes - 4)
            made.read_into(4, memoryview(out))
            assert bytes(out) == expected.tobytes()[4:]
