"""What a run of the command says: results, messages and progress, on a terminal, in a log, or as data."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO

import click

from builder.base.errors import Place, Problem, printable, problem_data, render
from builder.base.page import Style, cells, clip, fold
from builder.base.progress import Reporter, human_bytes
from builder.cli.forms import COLLECTING, Case, cases_of, github, junit, sarif

SHOW_AFTER = 0.5  # seconds; work that is done by then needs no progress
DRAW_EVERY = 0.1  # seconds between pictures of it on a terminal
LINE_EVERY = 10.0  # seconds between lines of it in a log
RECENT = 5.0  # seconds that the rate is of
BAR = 20  # cells


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal that understands more than plain lines."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"


def has_color(stream: object) -> bool:
    """Whether a stream gets colours: never with NO_COLOR, always with FORCE_COLOR, else a terminal does."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(stream)


def columns_of(stream: object) -> int | None:
    """The width of a terminal; None for what is none."""
    isatty = getattr(stream, "isatty", None)
    return shutil.get_terminal_size().columns if isatty and isatty() else None


class Output:
    """Results on stdout and the rest on stderr; or, `as_json`, all of it in one object on stdout.

    `marked`, each problem is an annotation of GitHub too; where there is an object on stdout, people are then
    told on stderr all the same. `about` is the file of problems that have no place.
    """

    def __init__(self, form: str = "text", command: str = "ckpt", marked: bool = False) -> None:
        self.form, self.command, self.marked = form, command, marked
        self.as_json = form in COLLECTING
        self.about: str | None = None
        self.cases: list[Case] = []
        self.data: dict[str, Any] = {"schema": 1}
        self.notes: list[str] = []
        self.warnings: list[Problem] = []
        self.errors: list[Problem] = []
        self._progress: _Progress | None = None
        self._lock = threading.RLock()

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """The answer of a command: `data` for programs, `text` for people."""
        if self.as_json:
            self.data |= data
        self.say(text)

    def say(self, text: str) -> None:
        """A line for people on stdout; nothing where the answer is data."""
        if text and self._speaks:
            self._write(text, sys.stderr if self.as_json else sys.stdout)

    def raw(self, data: Mapping[str, Any], text: str) -> None:
        """The same as `result` for a text that is a file's: no line of it is broken."""
        if self.as_json:
            self.data |= data
        elif text:
            with self._alone():
                click.echo(text, nl=not text.endswith("\n"))

    def message(self, text: str) -> None:
        """A line for people on stderr."""
        self._write(text, sys.stderr)

    def note(self, message: str) -> None:
        """A fact worth a line."""
        if self.as_json:
            self.notes.append(message)
        if self._speaks:
            self.message(render(Problem(message), "note"))

    def warn(self, problem: Problem) -> None:
        """Something a person should know although the work goes on."""
        if self.as_json:
            self.warnings.append(problem)
        if self._speaks:
            self.message(render(problem, "warning", columns_of(sys.stderr)))
            self._annotate(problem, severity="warning")

    def fail(self, *problems: Problem) -> None:
        """What went wrong."""
        if self.as_json:
            self.errors += problems
        if problems and self._speaks:
            width = columns_of(sys.stderr)
            self.message("\n\n".join(render(p, width=width) for p in problems))
            self._annotate(*problems)

    @property
    def _speaks(self) -> bool:
        """Whether people are told."""
        return self.marked or not self.as_json

    def _annotate(self, *problems: Problem, severity: str = "error") -> None:
        at = Place(self.about) if self.about is not None else None
        if self.marked:
            with self._alone():
                lines = (github(replace(p, place=p.place or at), severity) for p in problems)
                click.echo("\n".join(lines), err=self.as_json)

    def object(self, code: int) -> dict[str, Any]:
        """All that was said, as data; `code` is the exit code."""
        notes = [*self.data.get("notes", ()), *self.notes]
        return {
            **self.data,
            "notes": list(dict.fromkeys(notes)),
            "warnings": [problem_data(p) for p in self.warnings],
            "errors": [problem_data(p) for p in self.errors],
            "code": code,
        }

    def close(self, code: int) -> None:
        """Print the document, if all is to be one and it is not printed yet."""
        if not self.as_json:
            return
        self.as_json = False  # first: Ctrl-C may come while it is printed
        cases = cases_of(self.command, self.cases, self.errors, code)
        if self.form == "sarif":
            click.echo(sarif(cases, self.warnings, code))
        elif self.form == "junit":
            click.echo(junit(self.command, cases))
        else:
            click.echo(json.dumps(self.object(code), indent=2))

    def now(self) -> None:
        """Print the object at once, for a command that goes on; what comes is for people."""
        self.close(0)
        sys.stdout.flush()

    def width(self) -> int | None:
        """The columns of a page on stdout, None for as many as it takes."""
        return columns_of(sys.stdout)

    def color(self) -> bool:
        """Whether a page on stdout has colours."""
        return has_color(sys.stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        color = has_color(stream)
        page = Style(color).words(fold(text, columns_of(stream)))
        with self._alone():
            click.echo(page, err=stream is sys.stderr, color=color)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With the progress out of the way."""
        with self._lock:
            if self._progress is not None:
                self._progress.clear()
            yield

    @contextmanager
    def reporter(self, quiet: bool) -> Iterator[Reporter]:
        """One who hears of the work; `quiet`: of whom only warnings are heard, as far as people are told."""
        if quiet or self._progress is not None:
            yield _Messages(self, quiet)
            return
        self._progress = progress = _Progress(self, self._lock)
        try:
            yield progress
        finally:
            progress.close()
            self._progress = None


def out() -> Output:
    """That of the command which runs."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context is not None else None
    return found if isinstance(found, Output) else Output()


@contextmanager
def make_reporter(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter for the length of a command; `quiet` leaves only warnings."""
    with out().reporter(quiet) as reporter:
        yield reporter


class _Messages(Reporter):
    """Notes and warnings."""

    def __init__(self, output: Output, quiet: bool = False) -> None:
        self._output, self._quiet = output, quiet

    def note(self, message: str) -> None:
        if self._output.as_json or not self._quiet:
            self._output.note(message)

    def warn(self, problem: Problem) -> None:
        self._output.warn(problem)


class _Task:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0


class _Progress(_Messages):
    """One line for all the work of a command: redrawn on a terminal, now and then a new one in a log.

    Work reports from many threads, and a thread of its own draws, so that there is one before anything is
    reported. `lock` is held by whoever writes.
    """

    def __init__(self, output: Output, lock: threading.RLock) -> None:
        super().__init__(output)
        self._lock = lock
        self._tasks: dict[str, _Task] = {}
        self._done = self._started = self._expected = 0  # bytes of all tasks, those that are over too
        self._began = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._drawn = False
        self._live = is_terminal(sys.stderr)
        self._stream = sys.stderr
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-progress", daemon=True)
        self._thread.start()

    def expect(self, total: int) -> None:
        with self._lock:
            self._expected = self._done + total

    def start(self, task: str, total: int) -> None:
        with self._lock:
            self._tasks[task] = _Task(total)
            self._started += total

    def advance(self, task: str, count: int) -> None:
        with self._lock:
            if (state := self._tasks.get(task)) is not None:
                state.done += count
                self._done += count

    def finish(self, task: str) -> None:
        with self._lock:
            if (state := self._tasks.pop(task, None)) is not None:
                self._started += state.done - state.total  # of what was given up there will be no more

    def close(self) -> None:
        """Take down what is on display."""
        self._over.set()
        self._thread.join()
        with self._lock:
            self.clear()

    def clear(self) -> None:
        """Have the line empty, for something else to be written."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    def _run(self) -> None:
        wait = SHOW_AFTER if self._live else LINE_EVERY
        while not self._over.wait(wait):
            with self._lock:
                if self._over.is_set():
                    return
                self._draw(time.monotonic())
            wait = DRAW_EVERY if self._live else LINE_EVERY

    def _draw(self, now: float) -> None:
        while len(self._seen) > 1 and self._seen[0][0] < now - RECENT:
            self._seen.popleft()
        since, before = self._seen[0]
        self._seen.append((now, self._done))
        rate = (self._done - before) / (now - since) if now > since else 0.0
        what = printable(next(reversed(self._tasks), "")) or "working"
        if not self._live:
            self._output.message(", ".join([f"{what}: {self._far()}", *self._pace(rate, now)]))
            return
        width = shutil.get_terminal_size().columns - 1
        numbers = "  ".join([self._bar(), self._far(), *self._pace(rate, now)])
        name = clip(what, max(0, width - cells(numbers) - 2))
        self._stream.write(f"\r\x1b[K{clip(f'{numbers}  {name}', width)}")
        self._stream.flush()
        self._drawn = True

    @property
    def _total(self) -> int:
        return max(self._started, self._expected)

    def _bar(self) -> str:
        full = BAR * self._done // self._total if self._total else 0
        return f"[{'=' * min(full, BAR - 1)}>{' ' * (BAR - 1 - full)}]" if full < BAR else f"[{'=' * BAR}]"

    def _far(self) -> str:
        """How much is done, and of how much as far as that is known."""
        if not self._total:
            return human_bytes(self._done)
        share = f" ({min(1.0, self._done / self._total):.0%})" if not self._live else ""
        return f"{human_bytes(self._done)} of {human_bytes(self._total)}{share}"

    def _pace(self, rate: float, now: float) -> Sequence[str]:
        """How fast it goes, and how long it will take; before there is any, how long it has taken."""
        if rate <= 0:
            return [_duration(now - self._began)]
        left = max(0, self._total - self._done) / rate
        return [f"{human_bytes(rate)}/s", f"{_duration(left)} left"]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
