"""Conversions between types of numbers, with the bits that torch gives and in less time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 17  # elements which as FP32, or as places in a table, stay in the processor's cache


def copy_into(out: torch.Tensor, values: torch.Tensor) -> None:
    """Copy the elements of a flat tensor into another of as many, rounded to its type as by `copy_`."""
    if out.dtype != values.dtype and _is_eight(values):
        _look_up(out, values)
    elif {out.dtype, values.dtype} == _halves():
        for to, of in zip(_parts(out), _parts(values), strict=True):
            to.copy_(of.float())  # FP32 has every number of both, so that it is rounded once
    else:
        out.copy_(values)


def _look_up(out: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    table, target, places = _table(values.dtype, out.dtype), bits(out), values.view(torch.uint8)
    index = torch.empty(min(_AT_ONCE, len(values)), dtype=torch.int32)
    for to, of in zip(_parts(target), _parts(places), strict=True):
        torch.index_select(table, 0, index[: len(of)].copy_(of), out=to)


def floats(values: torch.Tensor) -> torch.Tensor:
    """The elements of a flat tensor as FP32, rounded once; those that are FP32 are the tensor itself."""
    import torch

    if not _is_eight(values):
        return values.float()
    made = torch.empty(len(values), dtype=torch.float32)
    copy_into(made, values)
    return made


def greatest(values: torch.Tensor) -> float:
    """The greatest magnitude among the elements; infinite or NaN where any element is one of these."""
    import torch

    if not _is_eight(values):
        low, high = (float(v) for v in values.aminmax())
        return max(-low, high) if low == low else low
    held = bits(values)
    one_nan = values.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # in the place of minus zero
    if one_nan and int(held.min()) == -0x80:
        return float("nan")
    top = (held & 0x7F).max()  # without signs, patterns are in the order of their numbers, and then NaN
    return float(top.view(values.dtype).float())


def bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the elements' size."""
    import torch

    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _is_eight(values: torch.Tensor) -> bool:
    return values.element_size() == 1 and values.is_floating_point()


def _parts(values: torch.Tensor) -> Iterator[torch.Tensor]:
    return (values[at : at + _AT_ONCE] for at in range(0, len(values), _AT_ONCE))


@cache
def _halves() -> set[torch.dtype]:
    import torch

    return {torch.float16, torch.bfloat16}


@cache
def _table(of: torch.dtype, to: torch.dtype) -> torch.Tensor:
    """What each of the 256 patterns of a type is in another, as bits."""
    import torch

    return bits(torch.arange(256, dtype=torch.uint8).view(of).to(to))
