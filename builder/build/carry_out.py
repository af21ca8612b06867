"""Building: what the plan leaves to be made is made in parallel, and put in place when it is right."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.build import outputs
from builder.build.context import Context
from builder.build.evaluate import finish
from builder.build.expect import Built
from builder.build.in_parts import bring, hold_to_lock, in_parts
from builder.build.measure import Metrics
from builder.build.schedule import Task, run_all
from builder.plan import Plan
from builder.plan.graph import ComponentJob, Node, OutputJob, SourceJob
from builder.plan.keys import component_key
from builder.recipe.lock import Lock
from builder.store import DamagedEntry, Store
from builder.tensors.cast import PRECISIONS
from builder.tensors.lazy import WINDOW

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

MEMORY = 256 << 20  # bytes of windows in flight, over all steps


@dataclass
class Build:
    """What a build did: its outputs, the ids of the components it made, what fixes changed, the new lock."""

    outputs: list[Built] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lock: Lock | None = None


def build(
    plan: Plan,
    *,
    catalog: Catalog,
    store: Store,
    threads: int | None = None,
    locked: Lock | None = None,
    hashing: bool = True,
    naming: Callable[[str], Path] | None = None,
    assemble: bool = True,
    reporter: Reporter = SILENT,
) -> Build:
    """Carry out a plan; its nodes then say what was made.

    With `locked`, what is made must agree with that lock. Without `hashing`, unpinned sources are not
    hashed, and what is made of them is not remembered. `naming` says where an output goes once its metric
    (empty: none) is known, in the place that the plan has for it. Without `assemble`, sources are hashed and
    components made, and that is all. Raises CkptError; then every output is as it was, but those that were
    finished before the failure.
    """
    context = Context(plan, catalog, store, threads or os.cpu_count() or 1, reporter)
    return _Builder(context, locked, hashing, naming, assemble).run()


class _Builder:
    def __init__(
        self,
        context: Context,
        locked: Lock | None,
        hashing: bool,
        naming: Callable[[str], Path] | None,
        assemble: bool,
    ) -> None:
        self.context, self.plan, self.store = context, context.plan, context.store
        self.hashing = hashing
        self.assemble = assemble
        self.metrics = Metrics(context)
        self.put = partial(outputs.put, context, metrics=self.metrics, locked=locked, naming=naming)
        self.result = Build()
        self.built: dict[str, Built] = {}
        self._notes = threading.Lock()

    def run(self) -> Build:
        """Make everything that is to be made."""
        for source in map(self.plan.node, self.plan.unseen):
            assert isinstance(source.job, SourceJob)
            raise source.job.sources.missing(source.job.source)
        tasks, threads = list(self._tasks()), self.context.threads
        workers = max(2, min(threads, MEMORY // (6 * WINDOW * threads)))
        with ThreadPoolExecutor(workers, thread_name_prefix="build") as executor:
            run_all(tasks, executor, self.context.cancel)
        if self.assemble:
            built = {n.id: self.built[n.id] for n in self.plan.outputs()}
            self.result.outputs = list(built.values())
            self.result.lock = outputs.lock_of(self.context, built)
        return self.result

    # -- what is to be done, and after what

    def _tasks(self) -> Iterator[Task]:
        missing = {n.id: n for n in self.plan if isinstance(n.job, ComponentJob) and n.made is None}
        sources = {i: self.context.sources(i) for i in missing}
        bases = {
            n.id: self.context.base(n.job)
            for n in self.plan.outputs()
            if isinstance(n.job, OutputJob) and n.state != "unchanged"
        }
        needed = [s for found in (*sources.values(), *bases.values()) for s in found]
        unseen = {s.id: s for s in needed if s.state in ("hash", "fetch")}
        whole = [s for found in bases.values() for s in found]
        unseen = {i: s for i, s in unseen.items() if not self._unhashed(s)}
        for source in [s for s in unseen.values() if s not in whole]:
            wanted = [node for i, node in missing.items() if any(s is source for s in sources[i])]
            if in_parts(self.plan, source, wanted):
                del unseen[source.id]
        for source in unseen.values():
            yield Task(source.id, partial(self._see, source))
        for id_, node in missing.items():
            after = {n for n in self.plan.ancestors(id_) if n in missing}
            # A file that a lock knows is most likely the same one, touched: its digest may save the work.
            after |= {s.id for s in sources[id_] if s.id in unseen and self._wait_for(s)}
            yield Task(id_, partial(self._make, node), frozenset(after))
            seen = {s.id for s in sources[id_] if s.id in unseen}
            yield Task(f"record {id_}", partial(self._record, node), frozenset({id_, *seen}))
        slots = [n.job.slots for n in self.plan.outputs() if isinstance(n.job, OutputJob)]
        scales = self.context.catalog.scales
        for id_, cls in {id_: cls for of in slots for cls, (_, id_) in of.items() if cls in scales}.items():
            yield Task(f"metric {id_}", partial(self._measure, cls, id_), frozenset({id_} & missing.keys()))
        for node in self.plan.outputs() if self.assemble else ():
            parts = self.plan.ancestors(node.id)
            after = {f"record {p}" for p in parts if p in missing}
            after |= {s.id for s in bases.get(node.id, ()) if s.id in unseen}
            yield Task(node.id, partial(self._assemble, node), frozenset(after))

    def _wait_for(self, source: Node) -> bool:
        assert isinstance(source.job, SourceJob)
        return source.state == "fetch" or source.job.sources.pinned_by_lock(source.job.source)

    def _unhashed(self, source: Node) -> bool:
        """Whether a source is taken for what it is, and what is made of it not remembered."""
        return source.state == "hash" and source.key is None and not self.hashing

    # -- the tasks

    def _see(self, source: Node) -> None:
        source.key = self.context.digest(source)

    def _make(self, node: Node) -> None:
        parts = [n for n in map(self.plan.node, self.plan.ancestors(node.id)) if n.kind == "component"]
        self._with_parts(parts, f"`{node.id}`", partial(self._make_once, node))

    def _make_once(self, node: Node) -> None:
        job = node.job
        assert isinstance(job, ComponentJob)
        key = component_key(self.plan, job)
        if key is not None and (made := self.store.lookup(key)) is not None:
            node.made = made
            return
        import torch

        torch.set_num_threads(1)  # the threads are ours; torch's own would be one team for each
        context = self.context
        with context.stoppable():
            bring(self.plan, node, self.store, context.reporter)
        with ExitStack() as opened:
            done = finish(self.plan, job, context.catalog, self.store, context.stop, opened)

            def sound() -> None:
                if (error := done.faults.error(f"`{node.id}`", PRECISIONS[job.precision])) is not None:
                    raise error

            node.made = self.store.put(
                None,
                done.component,
                job.cls,
                done.tensors,
                threads=context.threads,
                reporter=context.reporter,
                task=node.id,
                check=sound,
            )
        with self._notes:
            self.result.made.append(node.id)
            self.result.changes[node.id] = done.changes

    def _record(self, node: Node) -> None:
        """Say what made a component, now that its sources are known to be what they should be."""
        assert isinstance(node.job, ComponentJob) and node.made is not None
        node.key = component_key(self.plan, node.job)
        if node.key is None:
            return  # of sources that were not to be hashed
        for source in self.context.sources(node.id):
            self.context.settled(source)
        hold_to_lock(self.plan, node)
        self.store.record(node.key, node.made)

    def _measure(self, cls: str, id_: str) -> None:
        """Measure a component beside other work, for those who will ask."""
        with suppress(DamagedEntry):  # which the output meets too, and has it made again
            self.metrics.digits(cls, self.context.part(id_))

    def _assemble(self, node: Node) -> None:
        job = node.job
        assert isinstance(job, OutputJob)
        parts = [self.plan.node(name) for _, name in job.slots.values()]

        def put() -> None:
            self.built[node.id] = self.put(node)

        self._with_parts(parts, f"`{job.output.file}`", put)

    # -- damage

    def _with_parts(self, parts: list[Node], what: str, work: Callable[[], object]) -> None:
        """Do work that reads stored components, which are made again when they turn out to be damaged."""
        for _ in range(len(parts) + 1):
            try:
                work()
                return
            except DamagedEntry as damage:
                self.store.set_aside(damage)
                self._remake(parts, damage.digest)
        raise OutputError(Problem(f"the store loses what is put into it, {what} cannot be made"))

    def _remake(self, parts: list[Node], digest: str) -> None:
        """Make a component again whose stored copy is damaged."""
        for node in parts:
            if node.made is None or node.made.digest.xxh3 != digest:
                continue
            for source in self.context.sources(node.id):
                self._see(source)
            self._make(node)
            self._record(node)
