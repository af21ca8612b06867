"""Conversions and magnitudes, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.tensors import conversions
from builder.tensors.conversions import bits, copy_into, floats, greatest

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
HALVES = (torch.float16, torch.bfloat16)
ALL = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_pattern_is_what_torch_makes_of_it(dtype: torch.dtype, target: torch.dtype) -> None:
    values = ALL.repeat(conversions._AT_ONCE // 256 + 1).view(dtype)  # more than are looked up at once
    made = torch.empty(len(values), dtype=target)
    copy_into(made, values)
    expected = values.to(target)
    numbers = ~expected.isnan()
    assert torch.equal(made.isnan(), ~numbers)
    assert torch.equal(bits(made)[numbers], bits(expected)[numbers])
    assert torch.equal(bits(floats(values))[numbers], bits(values.float())[numbers])


@pytest.mark.parametrize("dtype, target", [HALVES, HALVES[::-1]])
def test_every_half_is_what_torch_makes_of_it(dtype: torch.dtype, target: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).repeat(3)
    made, expected = torch.empty(len(values), dtype=target), values.to(target)
    copy_into(made, values)
    numbers = ~expected.isnan()
    assert torch.equal(made.isnan(), ~numbers)
    assert torch.equal(bits(made)[numbers], bits(expected)[numbers])


@given(st.sampled_from([*EIGHT, torch.float16, torch.bfloat16, torch.float32]), st.data())
def test_the_greatest_magnitude(dtype: torch.dtype, data: st.DataObject) -> None:
    held = data.draw(st.binary(min_size=4, max_size=64).filter(lambda b: len(b) % 4 == 0))
    values = torch.frombuffer(bytearray(held), dtype=torch.uint8).view(dtype)
    expected = max((abs(v) if v == v else math.inf for v in values.double().tolist()), default=0.0)
    found = greatest(values)
    assert found == expected or (math.isinf(expected) and not math.isfinite(found))


@pytest.mark.parametrize("dtype", EIGHT)
def test_one_odd_pattern_among_many_is_seen(dtype: torch.dtype) -> None:
    for pattern in range(256):
        values = torch.zeros(100, dtype=torch.uint8)
        values[57] = pattern
        number = float(values.view(dtype)[57].float())
        found = greatest(values.view(dtype))
        assert found == abs(number) or not (math.isfinite(number) or math.isfinite(found))
