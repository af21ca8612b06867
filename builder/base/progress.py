"""How work tells of itself: a reporter with empty defaults, which the command line fills in."""

from __future__ import annotations

from builder.base.errors import Problem


class Reporter:
    """Hears what happens. Methods may be called from any thread; none but `advance` may raise."""

    def expect(self, total: int) -> None:
        """All tasks of the work that begins are of `total` bytes together, as far as that is known."""

    def start(self, task: str, total: int) -> None:
        """Work on `task` begins; `total` is in bytes."""

    def advance(self, task: str, count: int) -> None:
        """`count` more bytes of `task` are done; raises CkptError to have it given up."""

    def finish(self, task: str) -> None:
        """`task` is done or given up."""

    def note(self, message: str) -> None:
        """A fact worth a line, such as a fix that applied by itself."""

    def warn(self, problem: Problem) -> None:
        """Something a person should know although the work goes on."""


SILENT = Reporter()


def human_bytes(count: float) -> str:
    """`count` bytes in decimal units, as file managers and model pages give them: `7.7 GB`, `512 B`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < (1000 if unit == "B" else 999.5):
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.1f} {unit}"
