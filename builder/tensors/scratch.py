"""Buffers that a thread keeps for its next window: fresh memory costs more than most arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from builder.tensors.lazy import WINDOW


class _Scratch(threading.local):
    """The buffers of a thread that nothing uses now."""

    def __init__(self) -> None:
        self.free: list[bytearray] = []


_scratch = _Scratch()


@contextmanager
def scratch() -> Iterator[memoryview]:
    """A buffer of `WINDOW` bytes that is the block's alone, for as long as the block lasts."""
    held = _scratch.free.pop() if _scratch.free else bytearray(WINDOW)
    try:
        yield memoryview(held)
    finally:
        _scratch.free.append(held)
