"""Threads of ours that torch computes in: each alone, and with denormal numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_torch_users = 0
_torch_threads = 0
_torch_lock = threading.Lock()


@contextmanager
def lone_torch() -> Iterator[None]:
    """Keep torch's threads out of the block: ours each compute alone, and the process's setting comes back.

    What a thread sets, torch takes for every thread that is started later; so the last pass that ends puts
    back what was found by the first.
    """
    import torch

    global _torch_users, _torch_threads
    with _torch_lock:
        if not _torch_users:
            _torch_threads = torch.get_num_threads()
        _torch_users += 1
    try:
        yield
    finally:
        with _torch_lock:
            _torch_users -= 1
            if not _torch_users:
                torch.set_num_threads(_torch_threads)


@contextmanager
def single_torch() -> Iterator[None]:
    """Have torch compute alone in a thread that goes on afterwards, and gets its own setting back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_torch() -> Iterator[None]:
    """For a thread of a pass: torch computes in it alone, and with denormal numbers.

    A process may have flush-to-zero set, by a library that it loaded, and every thread inherits that: FP64
    denormals and minus zero would then be cast to other bytes. The thread ends with the pass, and so does
    what is set here.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    yield
