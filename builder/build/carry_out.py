"""Building: sources are had and hashed beside the work, and each output is one pass and one write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

from builder.base.errors import CkptError, OutputError, Problem
from builder.base.parallel import Cancelled
from builder.base.progress import SILENT, Reporter
from builder.build.context import Context
from builder.build.evaluate import Composer
from builder.build.expect import Built
from builder.build.in_parts import Parts
from builder.build.outputs import Assembly, Naming, Product, lock_of
from builder.operations import OPERATIONS
from builder.operations.registry import Operation
from builder.plan.at_once import written_at_once
from builder.plan.graph import TO_DO, ComponentJob, Key, Node, OutputJob, Plan, joined, total
from builder.recipe.lock import Lock
from builder.sources.job import SourceJob
from builder.sources.opened import Sources
from builder.store import DamagedEntry
from builder.tensors.scan import carry_out, together

Elsewhere = Callable[["Sequence[tuple[Builder, Assembly]]", bool], None]


@dataclass
class Build:
    """What a build did: its outputs, the labels of the components it made, what fixes changed, the new lock.

    `changes` are those of all components, whether made now or before. `claimed` are the labels of those that
    the shared store alone vouches for, and no lock.
    """

    outputs: list[Built] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    lock: Lock | None = None
    claimed: list[str] = field(default_factory=list)


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
    elsewhere: Elsewhere | None = None,
    reporter: Reporter = SILENT,
) -> Build:
    """Carry out a plan.

    With `locked`, what is made must agree with that lock. Without `hashing`, unpinned sources are not
    hashed, and what is made of them is not remembered. With `partial`, parts of files that are elsewhere are
    taken on the lock's word. `naming` says where an output goes once all of it is known, in the folder that
    the plan has for it. With `elsewhere`, others make what is to be made. Raises CkptError; then every
    output is as it was, but those that were finished.
    """
    context = Context(plan, sources, operations, threads or os.cpu_count() or 1, hashing, reporter)
    with closing(context):
        builder = Builder(context, Parts(context, partial), locked, naming)
        _carry_out(context, [builder], False, elsewhere)
    if builder.error is not None:
        raise builder.error
    return builder.result()


def build_all(
    plans: Sequence[Plan],
    sources: Sources,
    *,
    locked: Sequence[Lock | None] = (),
    keep_going: bool = False,
    partial: bool = False,
    threads: int | None = None,
    elsewhere: Elsewhere | None = None,
    reporter: Reporter = SILENT,
) -> list[Build | CkptError | None]:
    """Carry out several plans as one, of which each gives what it made, or why it could not.

    Where one fails, no further output is begun, and what was not is None, unless it is to `keep_going`. All
    else is as for `build`; `locked` has for each plan the lock that it must agree with, or None.
    """
    context = Context(joined(plans), sources, OPERATIONS, threads or os.cpu_count() or 1, True, reporter)
    with closing(context):
        owns = [context.of(plan) for plan in plans]
        locks = locked or [None] * len(owns)
        builders = [Builder(c, Parts(c, partial), k, None) for c, k in zip(owns, locks, strict=True)]
        _carry_out(context, builders, keep_going, elsewhere)
        return [b.error or (b.result() if b.is_done else None) for b in builders]


def _carry_out(
    context: Context, builders: Sequence[Builder], keep_going: bool, elsewhere: Elsewhere | None
) -> None:
    """Have the sources of all, and make their outputs: those side by side that have sources in common."""
    _announce(context)
    for builder in builders:
        builder.begin(elsewhere is None)
    works = [(b, a) for b in builders if b.error is None for a in b.assemblies()]
    if elsewhere is not None:
        elsewhere(works, keep_going)
        return
    by_key = {a.node.key: (b, a) for b, a in works}
    for keys in written_at_once(context.plan, list(by_key)):
        if not keep_going and any(b.error is not None for b in builders):
            return
        group = [by_key[key] for key in keys]
        made = make_together(context, [a for _, a in group], keep_going=keep_going)
        for (builder, assembly), found in zip(group, made, strict=True):
            builder.finish(assembly, found)


def _announce(context: Context) -> None:
    """Say how much there is to do: the sources to be hashed or fetched, and the outputs to be written."""
    hashed = [n.reads for n in context.plan if isinstance(n.job, SourceJob) and n.state in TO_DO]
    written = [n.writes for n in context.plan.outputs() if n.state != "unchanged"]
    if (count := total([*hashed, *written])) is not None:
        context.reporter.expect(count)


def make_together(
    context: Context, assemblies: Sequence[Assembly], *, keep_going: bool = False
) -> list[Product | CkptError | None]:
    """Make outputs side by side, in passes that read what they have in common once.

    Of each the product, or why it could not be made; None where another one could not, and so it was given up
    before its pass, unless it is to `keep_going`.
    """
    with ExitStack() as opened:
        composer = Composer(context, opened, together=True) if len(assemblies) > 1 else None
        work = together([a.making(composer) for a in assemblies], keep_going=keep_going)
        return carry_out(work, threads=context.threads, stop=context.stop)


class Builder:
    """One plan that is carried out, alone or beside others."""

    def __init__(self, context: Context, parts: Parts, locked: Lock | None, naming: Naming | None) -> None:
        self.context, self.plan, self.parts = context, context.plan, parts
        self.locked, self.naming = locked, naming
        self.products: dict[Key, Product] = {}
        self.made: set[Key] = set()
        self.error: CkptError | None = None

    def begin(self, here: bool = True) -> None:
        """Have what is needed, if it is to be made `here`."""
        try:
            for key in self.plan.unseen:
                job = self.context.node(key).job
                assert isinstance(job, SourceJob)
                raise self.context.sources.missing(job)
            if here:
                self._have_inputs(self.plan.outputs())
        except Cancelled:
            raise
        except CkptError as error:
            self.error = error

    def assemblies(self) -> Iterator[Assembly]:
        """The outputs in the making."""
        for node in self.plan.outputs():
            yield Assembly(self.context, node, self.parts, self._prepare, self.locked, self.naming)

    def finish(self, assembly: Assembly, found: Product | CkptError | None) -> None:
        """Take note of what became of an output, if it was begun; of several failures the first stays."""
        if isinstance(found, CkptError):
            self.error = self.error or found
        elif found is not None:
            self.products[assembly.node.key] = found
            self.made |= set(found.fresh)

    @property
    def is_done(self) -> bool:
        """Whether all outputs are made."""
        return len(self.products) == len(self.plan.outputs())

    def result(self) -> Build:
        """What was made."""
        context, plan = self.context, self.plan
        changes, claimed = {}, []
        for node in plan.outputs():
            assert isinstance(node.job, OutputJob)
            for cls, (_, key) in node.job.slots.items():
                label = context.node(key).label
                changes[label] = self.products[node.key].parts[cls].changes
                if label not in claimed and context.locked(key) is None and context.claimed(key):
                    claimed.append(label)
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
            claimed,
        )

    # -- what is to be here first

    def _have_inputs(self, outputs: list[Node]) -> None:
        """Have what is not here, first what others made, and wait for digests that may save all work."""
        pending = [n for n in outputs if n.state != "unchanged"]
        self._bring(pending)
        missing = [k for n in pending for k in self._missing(n.job)]
        self.have_sources(missing, [n.job.base for n in pending if isinstance(n.job, OutputJob)])

    def have_sources(self, missing: Sequence[Key], bases: Sequence[Key | None] = ()) -> None:
        """Have the sources of components, and those that are bases of outputs."""
        context = self.context
        needed = context.source_nodes(missing)
        for base in bases:
            if base is not None:
                needed += [s for s in context.source_nodes([base]) if s not in needed]
        away = [(k, j) for k, j in needed if context.sources.find(j) is None]
        whole = [
            (k, j)
            for k, j in away
            if not self.parts.decide(k, j, [c for c in missing if k in self.plan.ancestors(c)])
        ]
        if whole:
            self._at_once(len(whole), "fetch", [partial(context.fetch, job) for _, job in whole])
        # A file that a lock knows is most likely the same one, touched: its digest may save the work.
        for key, job in needed:
            if job.locked is not None:
                context.begin_hashing(key, job)
        for key, job in needed:
            if job.locked is not None and context.sources.find(job) is not None:
                context.settle(key, job)

    def _bring(self, outputs: list[Node]) -> None:
        """Have from the shared store what it has of these outputs, some at a time."""
        context, store = self.context, self.context.store
        if store.shared is None:
            return
        slots = [k for n in outputs if isinstance(n.job, OutputJob) for _, k in n.job.slots.values()]
        wanted = dict.fromkeys(m.digest for k in slots if (m := context.made(k)) is not None)
        work = [partial(store.bring, digest, context.threads, context.stop) for digest in wanted]
        self._at_once(2, "bring", work)

    def _at_once(self, threads: int, name: str, work: Sequence[Callable[[], object]]) -> None:
        """Do all of it, so much at a time; where one fails, what is under way is cancelled."""
        with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.context.cancel()
                raise

    def _missing(self, job: object) -> list[Key]:
        """The components of an output whose bytes are nowhere."""
        assert isinstance(job, OutputJob)
        store = self.context.store
        made = {key: self.context.made(key) for _, key in job.slots.values()}
        return [k for k, m in made.items() if m is None or not store.holds(m.digest)]

    # -- what is kept on the way

    def _prepare(self, node: Node, again: bool) -> None:
        """Have what an output hangs on: in the store the components whose bytes are to be kept.

        Before it is made `again` also what is missing now, which was there at first.
        """
        if again:
            self._have_inputs([node])
        job = node.job
        assert isinstance(job, OutputJob)
        near = self.plan.ancestors(*self._missing(job))
        for node in self.plan:
            if node.key in near and isinstance(node.job, ComponentJob) and node.job.store:
                self.keep(node.key)

    def keep(self, key: Key) -> None:
        """Have a component in the store, and in the shared one where that is asked for."""
        context, store = self.context, self.context.store
        job, label = context.component(key), context.node(key).label
        for _ in range(3):
            made = context.made(key)
            if made is not None and (stored := store.open(made.digest)) is not None:
                stored.close()
                if (action := context.action(key)) is not None:
                    store.share(action, made, threads=context.threads, stop=context.stop)
                return
            try:
                with ExitStack() as opened:
                    composer = Composer(context, opened)
                    self.parts.bring(key)
                    done = composer.finish(key)
                    read = context.source_nodes([key])
                    for source, source_job in read:
                        context.begin_hashing(source, source_job)

                    def sound(composer: Composer = composer, key: Key = key) -> None:
                        if (error := composer.error(key)) is not None:
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
            if self.parts.trusted(key):
                context.remember(key, made, computed=True)
            self.made.add(key)
            return
        raise OutputError(Problem(f"`{label}` cannot be made: what it is made of keeps changing"))
