"""Work that was asked for on the page: one at a time, watched while it goes on, and stopped on request."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from builder.base.errors import CkptError, ExitCode, Problem
from builder.base.parallel import Cancelled
from builder.base.progress import Reporter, human_bytes
from builder.base.signals import INTERRUPTED
from builder.web.html import Markup

State = Literal["waiting", "running", "done", "failed", "cancelled"]
KEPT = 100  # jobs that are over, and still shown
MOST_SAID = 500  # notes and warnings of a job
FIRST_RATE = 1.0  # seconds after which a rate means something


@dataclass(frozen=True)
class Outcome:
    """What a job came to: for people, as the object that `--json` prints, and as an exit code."""

    shown: Markup
    data: dict[str, Any]
    code: int = 0


@dataclass
class Task:
    """A piece of work under way; bytes."""

    total: int
    began: float
    done: int = 0

    def told(self, now: float) -> str:
        """How much of it is done, how fast, and how long the rest takes at that rate."""
        seconds = now - self.began
        said = human_bytes(self.done) + (f" of {human_bytes(self.total)}" if self.total else "")
        if seconds < FIRST_RATE or not self.done:
            return said
        rate = self.done / seconds
        left = max(0, self.total - self.done) / rate
        minutes = f"{left / 60:.0f} min" if left > 100 else f"{left:.0f} s"
        return f"{said}, {human_bytes(rate)}/s" + (f", {minutes} left" if self.total else "")


@dataclass(eq=False)
class Job(Reporter):
    """Work on its way. `command` does the same in a terminal, `recipe` is what it stands for, if it is one.

    Everything that changes is guarded by `changed`, which tells of each change.
    """

    number: int
    title: str
    work: Callable[[Job], Outcome] = field(repr=False)
    command: str = ""
    recipe: str = ""
    state: State = "waiting"
    tasks: dict[str, Task] = field(default_factory=dict)
    said: list[tuple[str, Problem]] = field(default_factory=list)
    problems: tuple[Problem, ...] = ()
    outcome: Outcome | None = None
    code: int | None = None
    version: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more happens."""
        return self.state in ("done", "failed", "cancelled")

    # -- what work tells of itself

    def start(self, task: str, total: int) -> None:
        with self.changed:
            self.tasks[task] = Task(total, time.monotonic())
            self._tell()

    def advance(self, task: str, count: int) -> None:
        if self.stop.is_set():
            raise Cancelled
        with self.changed:
            if (found := self.tasks.get(task)) is not None:
                found.done += count
                self._tell()

    def finish(self, task: str) -> None:
        with self.changed:
            self.tasks.pop(task, None)
            self._tell()

    def note(self, message: str) -> None:
        self._say("note", Problem(message))

    def warn(self, problem: Problem) -> None:
        self._say("warning", problem)

    def _say(self, severity: str, problem: Problem) -> None:
        with self.changed:
            if len(self.said) < MOST_SAID:
                self.said.append((severity, problem))
            self._tell()

    def _tell(self) -> None:
        self.version += 1
        self.changed.notify_all()

    # -- what becomes of it

    def begin(self) -> bool:
        """Whether it is to be done: it was not taken back meanwhile."""
        with self.changed:
            if self.state == "waiting":
                self.state = "running"
                self._tell()
            return self.state == "running"

    def end(self, state: State, code: int, outcome: Outcome | None = None, *problems: Problem) -> None:
        """Nothing more happens."""
        with self.changed:
            self.state, self.code, self.outcome, self.problems = state, code, outcome, problems
            self.tasks.clear()
            self._tell()

    def cancel(self) -> None:
        """Stop it as Ctrl-C stops a command: what is half made vanishes."""
        self.stop.set()
        with self.changed:
            if self.state == "waiting":
                self.end("cancelled", INTERRUPTED)

    def to_json(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        now = time.monotonic()
        with self.changed:
            return {
                "schema": 1,
                "job": self.number,
                "title": self.title,
                "command": self.command,
                "state": self.state,
                "code": self.code,
                "tasks": [
                    {"task": n, "done": t.done, "total": t.total, "told": t.told(now)}
                    for n, t in self.tasks.items()
                ],
                "said": [{"severity": s, "fact": p.fact} for s, p in self.said],
                "error": [
                    {"fact": p.fact, "evidence": list(p.evidence), "hint": p.hint} for p in self.problems
                ],
                "result": self.outcome.data if self.outcome is not None else None,
            }


class Jobs:
    """The queue, and one thread that does what is in it: files are read and written one job after the other.

    `fault` hears of what no message was made of. Close it: what goes on is stopped.
    """

    def __init__(self, fault: Callable[[BaseException], object]) -> None:
        self._fault = fault
        self._all: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._guard = threading.Condition()
        self._closed = False
        self._count = 0
        self._worker = threading.Thread(target=self._run, name="jobs")
        self._worker.start()

    def add(self, title: str, work: Callable[[Job], Outcome], *, command: str = "", recipe: str = "") -> Job:
        """Put work into the queue."""
        with self._guard:
            self._count += 1
            job = self._all[self._count] = Job(self._count, title, work, command, recipe)
            over = [n for n, j in self._all.items() if j.over]
            for number in over[: max(0, len(over) - KEPT)]:
                del self._all[number]
            self._waiting.append(job)
            self._guard.notify_all()
        return job

    def get(self, number: int) -> Job | None:
        """The job of a number, while it is known."""
        with self._guard:
            return self._all.get(number)

    def all(self) -> Iterable[Job]:
        """Every job that is known, the latest first."""
        with self._guard:
            return list(reversed(self._all.values()))

    def close(self) -> None:
        """Stop everything, and wait for it."""
        with self._guard:
            self._closed = True
            jobs = list(self._all.values())
            self._guard.notify_all()
        for job in jobs:
            if not job.over:
                job.cancel()
        self._worker.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.begin():
                self._do(job)

    def _next(self) -> Job | None:
        with self._guard:
            self._guard.wait_for(lambda: self._closed or self._waiting)
            return None if self._closed else self._waiting.popleft()

    def _do(self, job: Job) -> None:
        try:
            outcome = job.work(job)
        except CkptError as error:
            if job.stop.is_set():
                job.end("cancelled", INTERRUPTED)
            else:
                job.end("failed", int(error.exit_code), None, *error.problems)
        except OSError as error:
            fact = (error.strerror or str(error)).lower()
            job.end("failed", int(ExitCode.MISMATCH), None, Problem(fact))
        except BaseException as error:
            self._fault(error)
            hint = "report it with the lines in the terminal"
            job.end("failed", 70, None, Problem("this is a mistake in ckpt itself", hint=hint))
        else:
            job.end("done", outcome.code, outcome)
