"""Progress, notes and warnings on stderr: a live bar on a terminal, plain lines in a log, or quiet."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from builder.base.errors import Problem, printable, render
from builder.base.progress import Reporter, human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOW_AFTER = 0.3  # seconds; work that is done by then needs no bar, nor the library that draws it
LINE_EVERY = 10.0  # seconds between lines of one task in a log


@contextmanager
def make_reporter(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter for the length of a command; `quiet` leaves only warnings.

    Everything goes to stderr: a result on stdout can be piped on while progress is watched.
    """
    if quiet:
        yield _Messages()
        return
    reporter = _Bars() if is_terminal(sys.stderr) else _Lines()
    try:
        yield reporter
    finally:
        reporter.close()


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal that understands more than plain lines."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"


class _Messages(Reporter):
    """Warnings only."""

    def warn(self, problem: Problem) -> None:
        self.say(render(problem, "warning"))

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    def close(self) -> None:
        """Take down what is on display."""


@dataclass
class _Task:
    total: int
    began: float
    said: float
    done: int = 0
    bar: TaskID | None = None


class _Talking(_Messages):
    """Keeps count of the tasks under way; one lock guards them, as work reports from many threads."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()

    def note(self, message: str) -> None:
        self.say(render(Problem(message), "note"))

    def start(self, task: str, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._tasks[task] = _Task(total, now, now)

    def advance(self, task: str, count: int) -> None:
        with self._lock:
            state = self._tasks.get(task)
            if state is not None:
                state.done += count
                self.show(task, state, time.monotonic())

    def finish(self, task: str) -> None:
        with self._lock:
            state = self._tasks.pop(task, None)
            if state is not None:
                self.end(task, state, time.monotonic())

    def show(self, task: str, state: _Task, now: float) -> None:
        """Show how far a task is."""

    def end(self, task: str, state: _Task, now: float) -> None:
        """A task is over."""


class _Lines(_Talking):
    """One line a task now and then, for logs: tasks of less than `LINE_EVERY` seconds say nothing."""

    def show(self, task: str, state: _Task, now: float) -> None:
        if now - state.said < LINE_EVERY:
            return
        state.said = now
        part = f" of {human_bytes(state.total)} ({state.done / state.total:.0%})" if state.total else ""
        self.say(f"{printable(task)}: {human_bytes(state.done)}{part}{_rate(state, now)}")

    def end(self, task: str, state: _Task, now: float) -> None:
        if state.said != state.began:
            self.say(f"{printable(task)}: {human_bytes(state.done)} in {now - state.began:.0f} s")


class _Bars(_Talking):
    """A live bar a task, below whatever is said; gone when the work is done."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            super().say(text)

    def show(self, task: str, state: _Task, now: float) -> None:
        if state.bar is None:
            if now - state.began < SHOW_AFTER:
                return
            if self._progress is None:
                self._progress = _progress()
                self._progress.start()
            state.bar = self._progress.add_task(
                printable(task), total=state.total or None, completed=state.done
            )
        assert self._progress is not None
        self._progress.update(state.bar, completed=state.done)

    def end(self, task: str, state: _Task, now: float) -> None:
        if state.bar is not None and self._progress is not None:
            self._progress.remove_task(state.bar)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _rate(state: _Task, now: float) -> str:
    seconds = now - state.began
    return f", {human_bytes(state.done / seconds)}/s" if seconds > 0 else ""


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )
