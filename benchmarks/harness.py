"""Contenders run as whole processes, in turn, and compared by ratios of the same round."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

# Linux counts the parent's memory to a child until it executes something, so a small process stands between.
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
wall = time.perf_counter() - start
counts = {}
if os.path.exists(f"/proc/{child.pid}/io"):  # of the ended process, which nobody has waited for yet
    counts = dict(line.split(": ") for line in open(f"/proc/{child.pid}/io").read().splitlines())
_, status, usage = os.wait4(child.pid, 0)
scale = 1 if sys.platform == "darwin" else 1024
moved = [int(counts.get(k, 0)) for k in ("rchar", "wchar")]
sys.stdout.write(json.dumps([wall, usage.ru_maxrss * scale, *moved, os.waitstatus_to_exitcode(status)]))
"""


def _nothing() -> None: ...


@dataclass(frozen=True)
class Contender:
    """A command; `prepare` runs before each of its runs and is not timed, `code` is how it ends."""

    argv: Sequence[str]
    prepare: Callable[[], object] = _nothing
    env: Mapping[str, str] = field(default_factory=dict)
    code: int = 0

    def environment(self) -> dict[str, str]:
        """Ours, with the command's own variables."""
        return {**os.environ, **self.env}


@dataclass(frozen=True)
class Target:
    """What a benchmark is to reach.

    Without `over`, seconds or bytes of the contender `of`; with it, how many times those of `over` they are.
    `bytes` are of memory, `read` and `written` are bytes that the process moved, by the kernel's count: which
    has no noise. With `per`, the value is in these units, called `called`.
    """

    of: str
    over: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    unit: Literal["seconds", "bytes", "read", "written"] = "seconds"
    per: float = 1.0
    called: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Contenders over the files `reads`, which each run finds in the same state of the page cache."""

    title: str
    contenders: Mapping[str, Contender]
    targets: Sequence[Target]
    reads: Sequence[Path] = ()


@dataclass(frozen=True)
class Sample:
    """One run of one contender."""

    seconds: float
    bytes: float
    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Least, median and greatest of a target's values, one a round."""

    target: Target
    low: float
    median: float
    high: float

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        most, least = self.target.at_most, self.target.at_least
        return (most is None or self.median <= most) and (least is None or self.median >= least)


@dataclass(frozen=True)
class Result:
    """A benchmark's samples by contender, one a round, and what became of its targets."""

    name: str
    title: str
    samples: Mapping[str, Sequence[Sample]]
    outcomes: Sequence[Outcome]


def run(name: str, benchmark: Benchmark, rounds: int, warm: bool) -> Result:
    """Every contender once a round, in turn from first to last and from last to first.

    Raises RuntimeError, with what it said, when one fails.
    """
    samples: dict[str, list[Sample]] = {c: [] for c in benchmark.contenders}
    for number in range(rounds):
        for title, contender in list(benchmark.contenders.items())[:: -1 if number % 2 else 1]:
            contender.prepare()
            for path in benchmark.reads:
                _set_cache(path, warm)
            sample = measure(contender)
            samples[title].append(sample)
            print(
                f"{name} {title} {number + 1}/{rounds}: {sample.seconds:.2f} s, {sample.bytes / 1e6:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    outcomes = [outcome(target, samples) for target in benchmark.targets]
    return Result(name, benchmark.title, samples, outcomes)


def measure(contender: Contender) -> Sample:
    """Wall time and peak memory of a whole process. Raises RuntimeError when it fails."""
    argv = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *contender.argv]
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=said, env=contender.environment(), check=True
        )
        seconds, peak, read, written, code = json.loads(done.stdout)
        if code != contender.code:
            said.seek(0)
            raise RuntimeError(f"{' '.join(contender.argv)} ended with {code}:\n{said.read()}")
    return Sample(seconds, peak, read, written)


def _set_cache(path: Path, warm: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if warm:
            buffer, offset = memoryview(bytearray(4 << 20)), 0
            while count := os.preadv(fd, [buffer], offset):
                offset += count
        else:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def outcome(target: Target, samples: Mapping[str, Sequence[Sample]]) -> Outcome:
    """What a target's values are; ratios are between runs of the same round."""
    values = [getattr(s, target.unit) for s in samples[target.of]]
    if target.over is not None:
        bases = [getattr(s, target.unit) for s in samples[target.over]]
        values = [value / base for value, base in zip(values, bases, strict=True)]
    values = [value / target.per for value in values]
    return Outcome(target, min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Report:
    """Results, and how they came about."""

    results: Sequence[Result]
    rounds: int
    size: str
    warm: bool


def to_markdown(report: Report) -> str:
    """Two tables: what each contender took, and what that means for the targets."""
    cache = "warm" if report.warm else "cold"
    how = f"Size {report.size}, page cache {cache}, {report.rounds} rounds; median (least to greatest)."
    lines = [
        f"{machine()}. {how}",
        "",
        "| benchmark | contender | seconds | peak memory | read | written |",
        "|---|---|---|---|---|---|",
    ]
    for result in report.results:
        for title, samples in result.samples.items():
            seconds = sorted(s.seconds for s in samples)
            peak = max(s.bytes for s in samples)
            spread = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
            moved = (max(s.read for s in samples), max(s.written for s in samples))
            cells = [result.title, title, spread, *(f"{n / 1e6:,.0f} MB" for n in (peak, *moved))]
            lines.append(f"| {' | '.join(cells)} |")
    outcomes = [(r, o) for r in report.results for o in r.outcomes]
    if outcomes:
        lines += ["", "| benchmark | measured | wanted | found | |", "|---|---|---|---|---|"]
    for result, outcome in outcomes:
        cells = [result.title, *_words(outcome), "met" if outcome.met else "**missed**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(outcome: Outcome) -> tuple[str, str, str]:
    target = outcome.target
    scale, unit = (1.0, " s") if target.unit == "seconds" else (1e6, " MB")
    words = {"seconds": "time", "bytes": "memory", "read": "bytes read", "written": "bytes written"}
    what = f"{words[target.unit]} of {target.of}"
    if target.called:
        scale, unit, what = 1.0, "", f"{what} / {target.called}"
    if target.over is not None:
        scale, unit, what = 1.0, "", f"{what} / {target.over}"
    wanted = f"≤ {target.at_most / scale:g}{unit}" if target.at_most is not None else ""
    if target.at_least is not None:
        wanted = f"≥ {target.at_least / scale:g}{unit}"
    low, median, high = (f"{v / scale:.3g}" for v in (outcome.low, outcome.median, outcome.high))
    return what, wanted, f"{median}{unit} ({low} to {high})"


def to_json(report: Report) -> dict[str, object]:
    """The same as data."""
    return {
        "schema": 1,
        "machine": machine(),
        "cache": "warm" if report.warm else "cold",
        "size": report.size,
        "benchmarks": [
            {
                "name": r.name,
                "title": r.title,
                "samples": {c: [asdict(s) for s in samples] for c, samples in r.samples.items()},
                "targets": [
                    {**asdict(o.target), "low": o.low, "median": o.median, "high": o.high, "met": o.met}
                    for o in r.outcomes
                ],
            }
            for r in report.results
        ],
    }


def machine() -> str:
    """The processor, its cores and the versions that matter."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{os.cpu_count()} cores of {model}; Python {platform.python_version()}, torch {version('torch')}"
