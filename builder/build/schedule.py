"""Tasks that wait for one another, on any `concurrent.futures` executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

from builder.base.errors import CkptError


class Cancelled(CkptError):
    """Another task has failed, or the user has stopped the work."""


@dataclass(frozen=True)
class Task:
    """Work with a name; `after` names the tasks that must be done before it starts."""

    name: str
    work: Callable[[], Any]
    after: frozenset[str] = field(default_factory=frozenset)


def run_all(tasks: Iterable[Task], executor: Executor, cancel: Callable[[], None]) -> None:
    """Run every task, as many at once as the executor takes.

    At the first failure `cancel` is called, no further task starts, and when those that run have ended
    the failure of the earliest task in the given order is raised, unless it was only cancelled.
    """
    waiting = list(tasks)
    order = {t.name: i for i, t in enumerate(waiting)}
    running: dict[Future[Any], Task] = {}
    done: set[str] = set()
    failed: dict[str, BaseException] = {}
    try:
        while waiting or running:
            for task in [t for t in waiting if t.after <= done and not failed]:
                waiting.remove(task)
                running[executor.submit(task.work)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                if (error := future.exception()) is not None:
                    failed[task.name] = error
                    cancel()
                done.add(task.name)
    except BaseException:
        cancel()
        raise
    if failed:
        raise failed[min(failed, key=lambda n: (isinstance(failed[n], Cancelled), order[n]))]
    assert not waiting, f"tasks wait for each other: {[t.name for t in waiting]}"
