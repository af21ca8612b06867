"""The least that must be done: positioned reads of the bytes that are needed, a cast, writes, one fsync."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOW = 4 << 20


def read(path: str) -> None:
    """Read a file from first to last byte."""
    fd = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(WINDOW))
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        offset += count


def sha256(*paths: str) -> None:
    """The SHA-256 of each file, read and hashed in turn."""
    for path in paths:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        with Path(path).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])


def read_ranges(plan: str) -> None:
    """Read the ranges `[file, offset, length]` that a JSON file lists, with two threads."""
    ranges = json.loads(Path(plan).read_text())
    files = {path: os.open(path, os.O_RDONLY) for path in {r[0] for r in ranges}}

    def work(todo: deque[Any]) -> None:
        buffer = memoryview(bytearray(WINDOW))
        while True:
            try:
                path, offset, length = todo.popleft()
            except IndexError:
                return
            for done in range(0, length, WINDOW):
                os.preadv(files[path], [buffer[: min(WINDOW, length - done)]], offset + done)

    _both(work, deque(ranges))


def cast(plan: str, output: str) -> None:
    """Read the ranges `[file, offset, length]` of float32, write them as float16, fsync."""
    import torch

    torch.set_num_threads(1)
    ranges = json.loads(Path(plan).read_text())
    files = {path: os.open(path, os.O_RDONLY) for path in {r[0] for r in ranges}}
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    todo: deque[Any] = deque()
    at = 0
    for path, offset, length in ranges:
        todo.append((path, offset, length, at))
        at += length // 2

    def work(todo: deque[Any]) -> None:
        torch.set_num_threads(1)
        buffer = memoryview(bytearray(WINDOW))
        half = torch.empty(WINDOW // 4, dtype=torch.float16)
        data = half.numpy().data.cast("B")
        while True:
            try:
                path, offset, length, at = todo.popleft()
            except IndexError:
                return
            for done in range(0, length, WINDOW):
                piece = buffer[: min(WINDOW, length - done)]
                os.preadv(files[path], [piece], offset + done)
                half[: len(piece) // 4].copy_(torch.frombuffer(piece, dtype=torch.float32))
                os.pwrite(target, data[: len(piece) // 2], at + done // 2)

    _both(work, todo)
    os.fsync(target)


def merge(output: str, share: str, *sources: str) -> None:
    """The weighted sum of FP16 files of one layout, one after the other with `share`, in FP32; fsync."""
    import torch

    alpha, element = float(share), 1 << 18
    files = [os.open(path, os.O_RDONLY) for path in sources]
    size = os.fstat(files[0]).st_size // 2
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def work(todo: deque[Any]) -> None:
        torch.set_num_threads(1)
        buffer = memoryview(bytearray(2 * element))
        half = torch.empty(element, dtype=torch.float16)
        total, value = (torch.empty(element, dtype=torch.float32) for _ in range(2))
        while True:
            try:
                first = todo.popleft()
            except IndexError:
                return
            count = min(element, size - first)
            for number, file in enumerate(files):
                os.preadv(file, [buffer[: 2 * count]], 2 * first)
                read = torch.frombuffer(buffer[: 2 * count], dtype=torch.float16)
                if number == 0:
                    total[:count].copy_(read)
                else:
                    value[:count].copy_(read)
                    total[:count].mul_(1.0 - alpha).add_(value[:count].mul_(alpha))
            half[:count].copy_(total[:count])
            os.pwrite(target, half.numpy().data.cast("B")[: 2 * count], 2 * first)

    _both(work, deque(range(0, size, element)))
    os.fsync(target)


def copy(source: str, output: str) -> None:
    """Copy a file through memory, fsync."""
    join(output, source)


def join(output: str, *sources: str) -> None:
    """Copy files through memory, one behind the other into one, fsync."""
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    buffer = memoryview(bytearray(WINDOW))
    end = 0
    for source in sources:
        fd, start = os.open(source, os.O_RDONLY), end
        while count := os.preadv(fd, [buffer], end - start):
            os.pwrite(target, buffer[:count], end)
            end += count
    os.fsync(target)


def _both(work: Any, todo: deque[Any]) -> None:
    threads = [threading.Thread(target=work, args=(todo,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "read": read,
        "ranges": read_ranges,
        "cast": cast,
        "copy": copy,
        "join": join,
        "merge": merge,
        "sha256": sha256,
    }
    commands[sys.argv[1]](*sys.argv[2:])
