"""One pass over tensor data, by a few threads: digests, faulty numbers, FP16 histograms."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builder.base.progress import SILENT, Reporter
from builder.tensors.digests import Digest, TensorHasher
from builder.tensors.lazy import WINDOW, DType, LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BINS = 1 << 16  # the bit patterns of a float16

# Several numbers in a byte, or scales: torch cannot say what their elements are worth.
_PACKED = {DType.F4, DType.F6_E2M3, DType.F6_E3M2, DType.F8_E8M0}


@dataclass(frozen=True, slots=True)
class TensorScan:
    """What one tensor holds.

    `digest` is None unless asked for. `nan` and `infinite` count elements; `overflow` counts the finite
    ones that FP16 rounds to infinity; `largest` is the greatest finite magnitude, 0.0 where there is none.
    Integers and packed types have zeros there.
    """

    digest: Digest | None = None
    nan: int = 0
    infinite: int = 0
    overflow: int = 0
    largest: float = 0.0


@dataclass(frozen=True, slots=True)
class Scan:
    """`tensors` by name; `histograms` by group: int64 `[65536]`, how often each float16 pattern occurs.

    Both are in the order of what was asked for.
    """

    tensors: dict[str, TensorScan] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def scan(
    tensors: Mapping[str, LazyTensor],
    *,
    groups: Mapping[str, str] | None = None,
    digests: bool = False,
    sha256: bool = False,
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "reading",
) -> Scan:
    """Read every tensor given, once.

    `groups` names the histogram that a tensor's elements, cast to float16, are counted in; integers and
    packed types are counted in none. `digests` asks for the XXH3-128 of each tensor, `sha256` for its
    SHA-256 too. The result does not depend on `threads`. Raises SourceError when bytes cannot be had.
    """
    import torch

    # Largest first: what is left for the end is small, so no thread waits long for another.
    queue = deque(sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])))
    stop = threading.Event()
    readers = [
        _Reader(queue, stop, groups or {}, digests or sha256, sha256, reporter, task)
        for _ in range(max(1, min(threads, len(queue))))
    ]
    before = torch.get_num_threads()
    reporter.start(task, sum(t.nbytes for t in tensors.values()))
    try:
        with ThreadPoolExecutor(len(readers), thread_name_prefix="scan") as pool:
            try:
                for future in [pool.submit(reader.run) for reader in readers]:
                    future.result()
            finally:
                stop.set()
    finally:
        torch.set_num_threads(before)
        reporter.finish(task)
    rows = {name: row for reader in readers for name, row in reader.rows.items()}
    histograms: dict[str, NDArray[np.int64]] = {}
    for group in dict.fromkeys((groups or {}).values()):
        counts = [r.histograms[group].numpy() for r in readers if group in r.histograms]
        if counts:
            histograms[group] = sum(counts[1:], counts[0])
    return Scan({name: rows[name] for name in tensors}, histograms)


class _Reader:
    """One thread's work, with buffers of its own: fresh memory costs more than what is done with it."""

    def __init__(
        self,
        queue: deque[tuple[str, LazyTensor]],
        stop: threading.Event,
        groups: Mapping[str, str],
        digests: bool,
        sha256: bool,
        reporter: Reporter,
        task: str,
    ) -> None:
        import torch

        self.queue, self.stop, self.groups = queue, stop, groups
        self.digests, self.sha256, self.reporter, self.task = digests, sha256, reporter, task
        self.rows: dict[str, TensorScan] = {}
        self.histograms: dict[str, torch.Tensor] = {}
        self.raw = memoryview(bytearray(WINDOW))
        self.half = torch.empty(WINDOW, dtype=torch.float16)
        self.index = torch.empty(WINDOW, dtype=torch.int32)

    def run(self) -> None:
        """Read tensors until none is left or another thread has failed."""
        import torch

        torch.set_num_threads(1)  # this thread's own; torch would start a team for each of ours
        try:
            while self.queue and not self.stop.is_set():
                try:
                    name, tensor = self.queue.popleft()
                except IndexError:
                    return
                self.rows[name] = self.read(name, tensor)
        except BaseException:
            self.stop.set()
            raise

    def read(self, name: str, tensor: LazyTensor) -> TensorScan:
        """One tensor, window by window."""
        hasher = TensorHasher(self.sha256) if self.digests else None
        numbers = tensor.dtype.floating and tensor.dtype not in _PACKED
        group = self.groups.get(name) if numbers else None
        total = _Numbers()
        for start in range(0, tensor.nbytes, WINDOW):
            if self.stop.is_set():
                break
            data = self.raw[: min(WINDOW, tensor.nbytes - start)]
            tensor.read_into(start, data)
            if hasher is not None:
                hasher.update(data)
            if numbers:
                self.look(data, tensor.dtype, group, total)
            self.reporter.advance(self.task, len(data))
        return TensorScan(
            hasher.digest() if hasher else None, total.nan, total.infinite, total.overflow, total.largest
        )

    def look(self, data: memoryview, dtype: DType, group: str | None, total: _Numbers) -> None:
        """Add a window's numbers to the tensor's, and to its group's histogram."""
        import torch

        values = torch.frombuffer(data, dtype=dtype.torch)
        half = self.half[: len(values)]
        if group is not None or values.element_size() == 1:
            half.copy_(values)
        total.add(half if values.element_size() == 1 else values)
        if group is not None:
            index = self.index[: len(values)]
            index.copy_(half.view(torch.int16)).bitwise_and_(BINS - 1)
            counts = torch.bincount(index, minlength=BINS)
            known = self.histograms.get(group)
            self.histograms[group] = counts if known is None else known.add_(counts)


@dataclass(slots=True)
class _Numbers:
    nan: int = 0
    infinite: int = 0
    overflow: int = 0
    largest: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        import torch

        # NaN and infinity show in the extremes; only a window that has some is looked at value by value.
        low, high = (float(v) for v in values.aminmax())
        if low - low != 0.0 or high - high != 0.0:
            self.nan += int(values.isnan().sum())
            self.infinite += int(values.isinf().sum())
            values = values[values.isfinite()]
            if not len(values):
                return
            low, high = (float(v) for v in values.aminmax())
        self.largest = max(self.largest, -low, high)
        if max(-low, high) > 65504.0:
            self.overflow += int(values.to(torch.float16).isinf().sum())
