"""What every step of a build works with, and what it asks of the sources."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from builder.base.errors import FetchError, Place, Problem, SourceError
from builder.base.progress import Reporter
from builder.build.schedule import Cancelled
from builder.plan import Plan
from builder.plan.graph import ComponentJob, Node, OutputJob, SourceJob
from builder.sources.have import see
from builder.store import Made, Store

if TYPE_CHECKING:
    from builder.models.catalog import Catalog


@dataclass(frozen=True)
class Context:
    """A plan and the means to carry it out; once `stop` is set, nothing more is read."""

    plan: Plan
    catalog: Catalog
    store: Store
    threads: int
    reporter: Reporter
    stop: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def stopping(self) -> Reporter:
        """The reporter, for work that is to be given up once the build has stopped."""
        return _Stopping(self.reporter, self.stop)

    def cancel(self) -> None:
        """Have all work end soon."""
        self.stop.set()
        for sources in self.plan.sources:
            sources.stop()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Tell a download that was broken off from one that failed."""
        try:
            yield
        except FetchError:
            if self.stop.is_set():
                raise Cancelled(Problem("the build was stopped")) from None
            raise

    def sources(self, id_: str) -> list[Node]:
        """The sources that a node hangs on."""
        found = (self.plan.node(n) for n in sorted(self.plan.ancestors(id_)))
        return [n for n in found if isinstance(n.job, SourceJob)]

    def base(self, job: OutputJob) -> list[Node]:
        """The source that gives an output what lies beside its components: tensors, metadata."""
        if job.base is None:
            return []
        base = self.plan.node(job.base)
        assert isinstance(base.job, SourceJob)
        # What a host shows of a file's metadata is not believed: no digest in a lock speaks of it alone.
        carried = base.state == "fetch" and set(base.job.sources.metadata(base.job.source)) - {"format"}
        return [base] if job.extras or carried else []

    def digest(self, node: Node) -> str:
        """Have the source of a node, and its SHA-256; raises as `see`."""
        job = node.job
        assert isinstance(job, SourceJob)
        with self.stoppable():
            return str(see(job.sources, job.source, self.catalog, self.store, self.stopping).sha256)

    def settled(self, node: Node) -> None:
        """Raise SourceError unless what was read of a source is of the file that its digest is of."""
        job = node.job
        assert isinstance(job, SourceJob)
        same = job.sources.unchanged(job.source)
        if same and node.state == "known":  # it was told by its times, before it was opened
            same = self.digest(node) == node.key
        if not same:
            found = job.sources.find(job.source)
            raise SourceError(
                Problem(
                    f"the source `{job.source}` changed while it was read",
                    Place(str(found.path)) if found is not None else None,
                    hint="wait until it is whole, and build again",
                )
            )

    def part(self, name: str) -> Made:
        """What a component's node has made."""
        made = self.plan.node(name).made
        assert made is not None
        return made

    def taken_from(self, name: str) -> str:
        """What the recipe calls the source or step of a component's node."""
        job = self.plan.node(name).job
        assert isinstance(job, ComponentJob)
        return job.source


class _Stopping(Reporter):
    """Passes on what it hears, until the work that it hears of is to be given up."""

    def __init__(self, reporter: Reporter, stop: threading.Event) -> None:
        self._reporter, self._stop = reporter, stop

    def start(self, task: str, total: int) -> None:
        self._reporter.start(task, total)

    def advance(self, task: str, count: int) -> None:
        if self._stop.is_set():
            raise Cancelled(Problem("the build was stopped"))
        self._reporter.advance(task, count)

    def finish(self, task: str) -> None:
        self._reporter.finish(task)

    def note(self, message: str) -> None:
        self._reporter.note(message)

    def warn(self, problem: Problem) -> None:
        self._reporter.warn(problem)
