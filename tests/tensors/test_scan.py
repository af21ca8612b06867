"""One pass over tensor data sees what a look at each value would see."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import OutputError, Problem, SourceError
from builder.base.progress import Reporter
from builder.formats.blob import BlobTensor, FileBlob
from builder.tensors.digests import tensor_digest
from builder.tensors.lazy import WINDOW, DType, LazyTensor, MemoryTensor
from builder.tensors.merged import Common, Recent
from builder.tensors.moves import Reshaped
from builder.tensors.scan import (
    BINS,
    Pass,
    Passing,
    Scan,
    TensorScan,
    alone,
    carry_out,
    run_passes,
    scan,
    side_by_side,
    spans_of,
    together,
)

FLOATING = [d for d in DType if d.floating and d.torch_name and d not in (DType.F4, DType.F8_E8M0)]


def held(values: torch.Tensor) -> MemoryTensor:
    """A torch tensor as one of ours."""
    dtype = next(d for d in DType if d.torch_name == str(values.dtype).removeprefix("torch."))
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return MemoryTensor(dtype, tuple(values.shape), data)


def histogram(values: torch.Tensor) -> np.ndarray:
    """The definition: how often each float16 pattern occurs."""
    bits = values.to(torch.float16).reshape(-1).view(torch.int16).numpy().view(np.uint16)
    return np.bincount(bits, minlength=BINS)


@settings(max_examples=60)
@given(dtype=st.sampled_from(FLOATING), data=st.binary(max_size=400), threads=st.integers(1, 3))
def test_any_bits_of_any_floating_type(dtype: DType, data: bytes, threads: int) -> None:
    count = len(data) // dtype.itemsize
    tensor = MemoryTensor(dtype, (count,), data[: count * dtype.itemsize])
    values = torch.frombuffer(bytearray(data), dtype=dtype.torch, count=count) if count else torch.empty(0)
    found = scan({"t": tensor}, groups={"t": "g"}, threads=threads)

    wide = values.double()
    finite = wide[wide.isfinite()]
    row = found.tensors["t"]
    assert (row.nan, row.infinite) == (int(wide.isnan().sum()), int(wide.isinf().sum()))
    assert row.overflow == int(finite.float().half().isinf().sum())
    assert row.largest == (float(finite.abs().max()) if len(finite) else 0.0)
    assert row.digest is None
    if count:
        np.testing.assert_array_equal(found.histograms["g"], histogram(values))
    else:
        assert not found.histograms


def test_where_fp16_ends() -> None:
    values = torch.tensor([65519.99, 65520.0, -65520.0, -1e38, float("nan"), float("inf"), 1.0])
    row = scan({"t": held(values)}).tensors["t"]
    assert row == TensorScan(nan=1, infinite=1, overflow=3, largest=float(np.float32(1e38)))


def test_a_fault_in_any_window_is_seen() -> None:
    for place in (0, WINDOW // 4 - 1, WINDOW // 4, WINDOW // 2 + 5):
        values = torch.zeros(WINDOW // 2 + 6)
        values[place] = float("nan")
        assert scan({"t": held(values)}).tensors["t"].nan == 1


@pytest.mark.parametrize("digests", [False, True])
def test_threads_change_nothing(digests: bool) -> None:
    random = torch.Generator().manual_seed(1)
    tensors: dict[str, LazyTensor] = {
        f"t{n}": held(torch.randn(n * 40_000, generator=random)) for n in range(1, 40, 3)
    }
    groups = {name: "even" if len(name) % 2 else "odd" for name in tensors}

    def run(threads: int) -> Scan:
        return scan(tensors, groups=groups, digests=digests, threads=threads)

    one, three = run(1), run(3)
    assert one.tensors == three.tensors
    assert list(three.tensors) == list(tensors)
    assert list(one.histograms) == list(three.histograms) == list(dict.fromkeys(groups.values()))
    for group, counts in one.histograms.items():
        np.testing.assert_array_equal(counts, three.histograms[group])
        assert counts.sum() == sum(t.numel for n, t in tensors.items() if groups[n] == group)
    if digests:
        assert {n: r.digest for n, r in one.tensors.items()} == {
            n: tensor_digest(t) for n, t in tensors.items()
        }


def test_what_holds_no_numbers_has_a_digest_only() -> None:
    tensors: dict[str, LazyTensor] = {
        "ids": held(torch.arange(77)),
        "mask": held(torch.tensor([True, False])),
        "packed": MemoryTensor(DType.F4, (8,), b"\xff" * 4),
        "scale": MemoryTensor(DType.F8_E8M0, (2,), b"\xff\xff"),
        "empty": held(torch.empty(0)),
    }
    found = scan(tensors, groups=dict.fromkeys(tensors, "g"), digests=True)
    assert not found.histograms
    for name, row in found.tensors.items():
        assert row == TensorScan(tensor_digest(tensors[name]))


def test_nothing_to_do() -> None:
    assert scan({}) == Scan({}, {})


def test_a_file_that_ends_early_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(1000))
    blob = FileBlob(path)
    tensors = {str(n): BlobTensor(DType.F32, (200,), blob, 8 * n) for n in range(40)}
    with pytest.raises(SourceError, match="the file ends before its contents do"):
        scan(tensors, threads=3)
    blob.close()


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scan({"t": held(torch.zeros(10))})
        assert torch.get_num_threads() == 2
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_progress_adds_up() -> None:
    class Ear(Reporter):
        def __init__(self) -> None:
            self.heard: list[tuple[str, int]] = []
            self.ended: list[str] = []

        def start(self, task: str, total: int) -> None:
            self.heard.append((task, -total))

        def advance(self, task: str, count: int) -> None:
            self.heard.append((task, count))

        def finish(self, task: str) -> None:
            self.ended.append(task)

        def warn(self, problem: Problem) -> None:
            raise AssertionError(problem)

    ear = Ear()
    scan({str(n): held(torch.zeros(n)) for n in range(20)}, reporter=ear, task="look")
    assert sum(count for _, count in ear.heard) == 0
    assert {task for task, _ in ear.heard} == {"look"}
    assert ear.ended == ["look"]


class Counting(MemoryTensor):
    """Counts how often it is read."""

    __slots__ = ("reads",)

    def __init__(self, values: bytes) -> None:
        super().__init__(DType.U8, (len(values),), values)
        self.reads = 0

    def read_into(self, start: int, out: memoryview) -> None:
        self.reads += 1
        super().read_into(start, out)


def test_what_passes_have_in_common_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a pass has only some of it, or calls it by other names."""
    monkeypatch.setattr("builder.tensors.merged._RECENT", 3000)
    recent = Recent()
    sources = {f"n{i}": Counting(bytes([i]) * 1000) for i in range(40)}
    common = {name: Common(tensor, recent) for name, tensor in sources.items()}
    some = {f"x{n}": Reshaped(t, (10, 100)) for n, t in list(common.items())[20:]}
    passes = [Pass(spans_of(tensors), digests=True) for tensors in (some, common, some)]
    few, whole, again = run_passes(passes, threads=1, window=1000)
    assert isinstance(few, Scan) and isinstance(whole, Scan) and few == again
    assert [few.tensors[f"x{n}"].digest for n in list(sources)[20:]] == [
        whole.tensors[n].digest for n in list(sources)[20:]
    ]
    assert {t.reads for t in sources.values()} == {1}


def kilobytes(what: str) -> int:
    """What the kernel says of this process's memory."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account")
def test_memory_hardly_grows_with_passes() -> None:
    """Buffers are the threads', and a histogram is the pass's, not one of each thread."""
    spans = spans_of({"t": held(torch.ones(8 * WINDOW // 2, dtype=torch.float16))})
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted anew
    run_passes([Pass(spans, groups={"t": "g"}) for _ in range(32)], threads=4)
    histograms, windows = 32 * BINS * 8, 4 * 8 * WINDOW
    assert (kilobytes("VmHWM") - before) * 1024 < 2 * (histograms + windows)


def test_a_failure_gives_up_what_has_not_begun() -> None:
    begun = []

    def work(error: bool) -> Passing[str]:
        if error:
            raise OutputError(Problem("no"))
        found = yield from alone(Pass(spans_of({"t": held(torch.ones(3))})))
        begun.append(found)
        return "made"

    made, failed, left = carry_out(together([work(False), work(True), work(False)]))
    assert (made, left, begun) == (None, None, []) and isinstance(failed, OutputError)
    made, failed, left = carry_out(together([work(False), work(True), work(False)], keep_going=True))
    assert (made, left) == ("made", "made") and isinstance(failed, OutputError)
    with pytest.raises(OutputError):
        carry_out(side_by_side([work(False), work(True)]))
