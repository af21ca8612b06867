"""Stretches of zero bytes: what is left of data that was lost on the way."""

from __future__ import annotations

from collections.abc import Iterable

BLOCK = 4096  # bytes; a stretch of twice as many is always found
_SHORT = 16  # bytes; as many at the edge of a tensor may be part of a stretch that goes beyond it
_ZEROS = bytes(BLOCK)

Stretch = tuple[int, int]  # of bytes, from the first one to the one behind the last


def stretches(data: memoryview) -> list[Stretch]:
    """The first, the last and the longest stretch of zeros in a window, as far as there are such.

    A few words of it are looked at, and all only where those are zero.
    """
    size, end = len(data), 0
    if size < BLOCK and data[0] and data[-1]:
        return []
    words = data[: size // BLOCK * BLOCK].cast("Q")[:: BLOCK // 8].tolist()
    found: list[Stretch] = []
    for start in (0, *(BLOCK * index for index, word in enumerate(words) if not word)):
        if start >= end and (stop := _until(data, start)) - start >= (BLOCK if start else 1):
            found.append((_since(data, start, end), stop))
            end = stop
    if end < size and (start := _since(data, size, end)) < size:
        found.append((start, size))
    return sorted({found[0], found[-1], max(found, key=_length)}) if found else []


def joined(found: Iterable[Stretch], size: int) -> tuple[Stretch, ...]:
    """The stretches of a tensor of `size` bytes: all of it, long ones, and those that may go on beyond it."""
    whole: list[Stretch] = []
    for start, stop in sorted(found):
        if whole and whole[-1][1] == start:
            start = whole.pop()[0]
        whole.append((start, stop))
    return tuple(
        (start, stop)
        for start, stop in whole
        if stop - start >= min(size, _SHORT if start == 0 or stop == size else BLOCK)
    )


def _length(stretch: Stretch) -> int:
    return stretch[1] - stretch[0]


def _until(data: memoryview, start: int) -> int:
    """Where the zeros from `start` on end."""
    while (block := bytes(data[start : start + BLOCK])) == _ZEROS:
        start += BLOCK
    return start + len(block) - len(block.lstrip(b"\0"))


def _since(data: memoryview, stop: int, least: int) -> int:
    """Where the zeros before `stop` begin, as far as a block goes, and not before `least`."""
    block = bytes(data[max(least, stop - BLOCK) : stop])
    return stop - (len(block) - len(block.rstrip(b"\0")))
