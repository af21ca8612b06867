"""Stretches of zeros are found where they lie, in whatever windows data comes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.tensors.lazy import DType, MemoryTensor
from builder.tensors.scan import Span, run_pass, scan
from builder.tensors.zeros import BLOCK, joined, stretches


def data_with(size: int, *zeros: tuple[int, int]) -> bytes:
    """Bytes of which none is zero, but for these ranges."""
    data = bytearray(b"\x01" * size)
    for start, stop in zeros:
        data[start:stop] = bytes(stop - start)
    return bytes(data)


def tensor(data: bytes) -> MemoryTensor:
    return MemoryTensor(DType.U8, (len(data),), data)


@given(
    data=st.lists(st.tuples(st.integers(1, 3 * BLOCK), st.integers(1, 3 * BLOCK)), max_size=4),
    first=st.integers(0, 2),
    last=st.integers(0, 2),
)
def test_the_longest_is_found_and_all_that_is_told_is_zero(
    data: list[tuple[int, int]], first: int, last: int
) -> None:
    parts, zeros, at = [bytes(first)], [(0, first)], first
    for filled, empty in data:
        parts += [b"\x01" * filled, bytes(empty)]
        zeros.append((at + filled, at + filled + empty))
        at += filled + empty
    parts.append(b"\x01" * last)
    whole = b"".join(parts)
    found = stretches(memoryview(whole)) if whole else []
    long = [z for z in zeros if z[1] - z[0] >= 2 * BLOCK]
    if long:
        assert max(found, key=lambda z: z[1] - z[0]) == max(zeros, key=lambda z: z[1] - z[0])
    for stretch in found:
        assert stretch in zeros or (stretch[1] == len(whole) and not any(whole[slice(*stretch)]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [1 << 14, 1 << 16, 1 << 20])
@pytest.mark.parametrize(
    "zeros",
    [
        (),
        ((0, 100_000),),
        ((50_001, 50_001 + 2 * BLOCK),),
        ((40_000, 300_000),),
        ((0, 1000), (100_000, 150_000), (299_000, 300_000)),
    ],
)
def test_windows_and_threads_do_not_show(
    zeros: tuple[tuple[int, int], ...], window: int, threads: int
) -> None:
    """Only of many long ones in one window some are passed over."""
    spans = [Span("a", tensor(data_with(5, (0, 5))), 0, 5)]
    spans.append(Span("t", tensor(data_with(300_000, *zeros)), 5, 300_000))
    spans.append(Span("b", tensor(b"\x01\0\x01"), 300_005, 3))
    found = run_pass(spans, threads=threads, window=window).tensors
    assert (found["a"].zeros, found["t"].zeros, found["b"].zeros) == (((0, 5),), zeros, ())


def test_short_ends_that_random_data_has_are_not_told() -> None:
    assert joined([(0, 15), (100, 104), (185, 200)], 200) == ()
    assert joined([(0, 16), (184, 200)], 200) == ((0, 16), (184, 200))
    assert joined([(0, 1), (1, 2)], 2) == ((0, 2),)
    assert joined([], 0) == ()


def test_noise_has_none() -> None:
    found = scan({"t": tensor(os.urandom(3 << 20))}, numbers=False)
    assert found.tensors["t"].zeros == ()
