"""What work says of itself while it lasts, and how it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from builder.base.errors import CkptError, Problem
from builder.base.parallel import Cancelled
from builder.base.progress import Reporter
from ckpt_build.results import Progress

OnProgress = Callable[[Progress], object]

_LOOK = 0.05  # seconds between looks at whether to stop, where work waits for others


class Listener(Reporter):
    """Gathers notes and warnings of one piece of work, and passes its progress on.

    Once `cancel` is set, or `progress` has raised anything, the work is given up.
    """

    def __init__(self, progress: OnProgress | None = None, cancel: threading.Event | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[Problem] = []
        self._progress, self._cancel = progress, cancel
        self._raised: BaseException | None = None
        self._tasks: dict[str, Progress] = {}
        self._lock = threading.Lock()

    @contextmanager
    def during(self, stop: Callable[[], object] | None = None) -> Iterator[None]:
        """For the length of the work; `stop` breaks off what waits, as for a host.

        What `progress` raised is raised here, and Cancelled for whatever a cancelled work ended with.
        """
        self._go_on()
        over = threading.Event()
        watcher = None
        if self._cancel is not None and stop is not None:
            watcher = threading.Thread(target=self._watch, args=(stop, over), name="ckpt-cancel")
            watcher.start()
        try:
            yield
        except CkptError as error:
            if self._raised is not None:
                raise self._raised from None
            if isinstance(error, Cancelled) or not self._cancelled:
                raise
            raise Cancelled from error
        finally:
            over.set()
            if watcher is not None:
                watcher.join()

    @property
    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()

    def _watch(self, stop: Callable[[], object], over: threading.Event) -> None:
        while not over.wait(_LOOK):
            if self._cancelled:
                stop()

    def _go_on(self) -> None:
        if self._raised is not None or self._cancelled:
            raise Cancelled

    def start(self, task: str, total: int) -> None:
        """Remember the size of a task."""
        with self._lock:
            self._tasks[task] = Progress(task, 0, total)

    def advance(self, task: str, count: int) -> None:
        """Tell of progress; raises Cancelled where the work is to be given up."""
        with self._lock:
            before = self._tasks.get(task, Progress(task, 0, 0))
            now = self._tasks[task] = before._replace(done=before.done + count)
            if self._progress is not None and self._raised is None:
                try:
                    self._progress(now)
                except BaseException as error:
                    self._raised = error
            self._go_on()

    def finish(self, task: str) -> None:
        """Forget a task."""
        with self._lock:
            self._tasks.pop(task, None)

    def note(self, message: str) -> None:
        """Keep a note."""
        self.notes.append(message)

    def warn(self, problem: Problem) -> None:
        """Keep a warning."""
        self.warnings.append(problem)
