"""Building: sources are had and hashed beside the work, and each output is one pass and one write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.build.context import Context
from builder.build.evaluate import Composer
from builder.build.expect import Built
from builder.build.in_parts import Parts
from builder.build.outputs import Assembly, Naming, Product, lock_of
from builder.operations import OPERATIONS
from builder.operations.registry import Operation
from builder.plan.graph import ComponentJob, Key, OutputJob, Plan, total
from builder.recipe.lock import Lock
from builder.sources.job import SourceJob
from builder.sources.opened import Sources
from builder.store import DamagedEntry


@dataclass
class Build:
    """What a build did: its outputs, the labels of the components it made, what fixes changed, the new lock.

    `changes` are those of all components, whether made now or before.
    """

    outputs: list[Built] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    lock: Lock | None = None


def build(
    plan: Plan,
    sources: Sources,
    *,
    operations: Mapping[str, Operation] = OPERATIONS,
    threads: int | None = None,
    locked: Lock | None = None,
    hashing: bool = True,
    partial: bool = False,
    naming: Naming | None = None,
    reporter: Reporter = SILENT,
) -> Build:
    """Carry out a plan.

    With `locked`, what is made must agree with that lock. Without `hashing`, unpinned sources are not
    hashed, and what is made of them is not remembered. With `partial`, parts of files that are elsewhere are
    taken on the lock's word. `naming` says where an output goes once all of it is known, in the folder that
    the plan has for it. Raises CkptError; then every output is as it was, but those that were finished
    before the failure.
    """
    context = Context(plan, sources, operations, threads or os.cpu_count() or 1, hashing, reporter)
    with closing(context):
        return _Builder(context, Parts(context, partial), locked, naming).run()


class _Builder:
    def __init__(self, context: Context, parts: Parts, locked: Lock | None, naming: Naming | None) -> None:
        self.context, self.plan, self.parts = context, context.plan, parts
        self.locked, self.naming = locked, naming
        self.products: dict[Key, Product] = {}
        self.made: set[Key] = set()

    def run(self) -> Build:
        """Make everything that is to be made."""
        context, plan = self.context, self.plan
        for key in plan.unseen:
            job = context.node(key).job
            assert isinstance(job, SourceJob)
            raise context.sources.missing(job)
        self._announce()
        self._have_sources()
        for node in plan.outputs():
            assert isinstance(node.job, OutputJob)
            product = Assembly(context, node, self.parts, self._keep_all, self.locked, self.naming).make()
            self.products[node.key] = product
            self.made |= set(product.fresh)
        return self._result()

    def _result(self) -> Build:
        context, plan = self.context, self.plan
        changes = {}
        for node in plan.outputs():
            assert isinstance(node.job, OutputJob)
            for cls, (_, key) in node.job.slots.items():
                changes[context.node(key).label] = self.products[node.key].parts[cls].changes
        return Build(
            [self.products[n.key].built for n in plan.outputs()],
            [n.label for n in plan if n.key in self.made],
            changes,
            {
                n.job.name: sha256
                for n in plan
                if isinstance(n.job, SourceJob) and (sha256 := context.sources.sha256(n.job)) is not None
            },
            lock_of(context, self.products),
        )

    def _announce(self) -> None:
        """Say how much there is to do: the sources to be hashed or fetched, and the outputs to be written."""
        hashed = [n.reads for n in self.plan if isinstance(n.job, SourceJob) and n.state in ("hash", "fetch")]
        written = [n.writes for n in self.plan.outputs() if n.state != "unchanged"]
        if (count := total([*hashed, *written])) is not None:
            self.context.reporter.expect(count)

    # -- sources

    def _have_sources(self) -> None:
        """Fetch what is not here, and wait for the digests that may save all work."""
        context = self.context
        pending = [n for n in self.plan.outputs() if n.state != "unchanged"]
        missing = [k for n in pending for k in self._missing(n.job)]
        needed = context.source_nodes(missing)
        for node in pending:
            if isinstance(node.job, OutputJob) and node.job.base is not None:
                needed += [s for s in context.source_nodes([node.job.base]) if s not in needed]
        away = [(k, j) for k, j in needed if context.sources.find(j) is None]
        whole = [
            (k, j)
            for k, j in away
            if not self.parts.decide(k, j, [c for c in missing if k in self.plan.ancestors(c)])
        ]
        if whole:
            with ThreadPoolExecutor(len(whole), thread_name_prefix="fetch") as pool:
                futures = [pool.submit(context.fetch, job) for _, job in whole]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    context.cancel()
                    raise
        # A file that a lock knows is most likely the same one, touched: its digest may save the work.
        for key, job in needed:
            if job.locked is not None:
                context.begin_hashing(key, job)
        for key, job in needed:
            if job.locked is not None and context.sources.find(job) is not None:
                context.settle(key, job)

    def _missing(self, job: object) -> list[Key]:
        """The components of an output whose bytes are nowhere."""
        assert isinstance(job, OutputJob)
        store = self.context.store
        made = {key: self.context.made(key) for _, key in job.slots.values()}
        return [k for k, m in made.items() if m is None or not store.holds(m.digest)]

    # -- what is kept on the way

    def _keep_all(self, job: OutputJob) -> None:
        """Have in the store the components that an output hangs on and whose bytes are to be kept."""
        near = self.plan.ancestors(*self._missing(job))
        for node in self.plan:
            if node.key in near and isinstance(node.job, ComponentJob) and node.job.store:
                self._keep(node.key)

    def _keep(self, key: Key) -> None:
        """Have a step's component in the store."""
        context, store = self.context, self.context.store
        job, label = context.component(key), context.node(key).label
        for _ in range(3):
            made = context.made(key)
            if made is not None and (stored := store.open(made.digest)) is not None:
                stored.close()
                return
            try:
                with ExitStack() as opened:
                    composer = Composer(context, opened)
                    self.parts.bring(key)
                    done = composer.finish(key)
                    read = context.source_nodes([key])
                    for source, source_job in read:
                        context.begin_hashing(source, source_job)

                    def sound(composer: Composer = composer) -> None:
                        if (error := composer.error()) is not None:
                            raise error

                    made = store.save(
                        done.component,
                        job.cls,
                        done.tensors,
                        source=label,
                        threads=context.threads,
                        reporter=context.reporter,
                        task=label,
                        stop=context.stop,
                        check=sound,
                    )
                    for source, source_job in read:
                        context.settle(source, source_job)
            except DamagedEntry as damage:
                store.set_aside(damage)
                continue
            if (action := context.action(key)) is not None and self.parts.trusted(key):
                store.record(action, made)
            self.made.add(key)
            return
        raise OutputError(Problem(f"`{label}` cannot be made: what it is made of keeps changing"))
