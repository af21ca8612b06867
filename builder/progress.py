"""How work tells of itself: a reporter with empty defaults, which the command line fills in."""

from __future__ import annotations

from builder.errors import Problem


class Reporter:
    """Hears what happens. Methods may be called from any thread and must not raise."""

    def start(self, task: str, total: int) -> None:
        """Work on `task` begins; `total` is in bytes."""

    def advance(self, task: str, count: int) -> None:
        """`count` more bytes of `task` are done."""

    def finish(self, task: str) -> None:
        """`task` is done or given up."""

    def note(self, message: str) -> None:
        """A fact worth a line, such as a fix that applied by itself."""

    def warn(self, problem: Problem) -> None:
        """Something a person should know although the work goes on."""


SILENT = Reporter()
