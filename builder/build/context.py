"""What every step of a build works with: the plan, its live sources, and what became known of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

from builder.base.progress import Reporter
from builder.operations.registry import Operation
from builder.plan.graph import ComponentJob, Key, Node, OutputJob, Plan
from builder.plan.keys import action_key
from builder.recipe.lock import LockedComponent
from builder.sources.find import Found
from builder.sources.job import SourceJob
from builder.sources.opened import Sources, stoppable
from builder.store import Made, Store
from builder.tensors.digests import PROFILE


@dataclass
class Context:
    """A plan and the means to carry it out; once `stop` is set, nothing more is read.

    Without `hashing`, sources that nothing pins are not hashed, and what is made of them is not remembered.
    """

    plan: Plan
    sources: Sources
    operations: Mapping[str, Operation]
    threads: int
    hashing: bool
    reporter: Reporter
    stop: threading.Event = field(default_factory=threading.Event)
    _actions: dict[Key, str] = field(default_factory=dict)
    _hashing: dict[Key, Future[Found]] = field(default_factory=dict)
    _whole: Context | None = None

    def of(self, plan: Plan) -> Context:
        """The same for one of the plans that this one's joins: what becomes known, both know."""
        return self if plan is self.plan else replace(self, plan=plan, _whole=self)

    @property
    def store(self) -> Store:
        """Where what is made is remembered."""
        return self.sources.store

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        if self._whole is not None:
            return self._whole._executor
        # Apart from the threads of a pass: none of its windows waits until a source is hashed.
        return ThreadPoolExecutor(max(1, self.threads // 2), thread_name_prefix="hash")

    def close(self) -> None:
        """End all work that is under way, and wait for its end."""
        self.cancel()
        if "_executor" in self.__dict__:
            self._executor.shutdown(cancel_futures=True)

    def cancel(self) -> None:
        """Have all work end soon."""
        self.stop.set()
        self.sources.stop()

    # -- sources

    def source_nodes(self, keys: Iterable[Key]) -> list[tuple[Key, SourceJob]]:
        """The sources that nodes hang on, in the order of the plan."""
        near = {*keys, *self.plan.ancestors(*keys)}
        return [(n.key, n.job) for n in self.plan if n.key in near and isinstance(n.job, SourceJob)]

    def begin_hashing(self, key: Key, job: SourceJob) -> None:
        """Have a source hashed beside other work, if its digest is needed and not known of its very files."""
        if key in self._hashing or not self.needs_digest(job) or self.sources.find(job) is None:
            return
        if self.sources.remembered(job) is None:
            self._hashing[key] = self._executor.submit(self.sources.hash, job, self.stop)

    def needs_digest(self, job: SourceJob) -> bool:
        """Whether it must be known what a source is."""
        return self.hashing or self.sources.wanted(job).sha256 is not None

    def settle(self, key: Key, job: SourceJob) -> None:
        """Wait until it is known that what was read of a source is of the file that it should be.

        Raises SourceError when it is another, or changed meanwhile.
        """
        if self.sources.find(job) is None:
            return  # fetched in parts, which have a digest of their own
        if self.needs_digest(job):
            self.begin_hashing(key, job)
            if key in self._hashing:
                self._hashing[key].result()
            else:
                self.sources.hash(job, self.stop)
        self.sources.check_unchanged(job)

    def fetch(self, job: SourceJob) -> None:
        """Have a source on this machine."""
        with stoppable(self.stop):
            self.sources.fetch(job)

    # -- what is known of components

    def action(self, key: Key) -> str | None:
        """Under which the store knows what a node makes; of a source its SHA-256; None while unknown."""
        job = self.plan.nodes[key].job
        if isinstance(job, SourceJob):
            return self.sources.sha256(job)
        if key not in self._actions and (action := action_key(job, self.action)) is not None:
            self._actions[key] = action  # what is not known yet is asked again
        return self._actions.get(key)

    def made(self, key: Key) -> Made | None:
        """What a component's node is known to make."""
        action = self.action(key)
        made = self.store.lookup(action, self.component(key).cls) if action is not None else None
        if action is None or made is None or not self.store.is_claimed(action):
            return made
        locked = self.locked(key)
        if locked is None or locked.blake3 == made.digest:
            return made
        said = f"the lock says BLAKE3 {locked.blake3}", f"it says       BLAKE3 {made.digest}"
        self.store.doubt(action, *said)
        return None

    def claimed(self, *keys: Key) -> list[str]:
        """The actions of these components, and of those they hang on, that the shared store alone knows."""
        near = {*keys, *self.plan.ancestors(*keys)}
        jobs = (k for k in near if isinstance(self.plan.nodes[k].job, ComponentJob))
        return [a for k in jobs if (a := self.action(k)) is not None and self.store.is_claimed(a)]

    def remember(self, key: Key, made: Made, *, computed: bool) -> None:
        """Have known what a component's action made, and shared where that is asked for.

        What was not made here alone, but is the shared store's or of what that had, is known by its word.
        """
        if (action := self.action(key)) is None:
            return
        inputs = self.plan.nodes[key].job.inputs
        if not self.claimed(*inputs) and (computed or not self.store.is_claimed(action)):
            self.store.record(action, made)
        elif computed:
            self.store.claim(action, made)
        self.store.share(action, made, threads=self.threads, stop=self.stop)

    def locked(self, key: Key) -> LockedComponent | None:
        """What the lock says of a component, wherever it is used."""
        lock = self.plan.lock
        if lock is None or (lock.recipe, lock.profile) != (self.plan.recipe.digest, PROFILE):
            return None
        for job in (n.job for n in self.plan.outputs()):
            assert isinstance(job, OutputJob)
            for cls, (_, node) in job.slots.items():
                if node == key:
                    return lock.component(job.output.name, cls)
        return None

    def component(self, key: Key) -> ComponentJob:
        """The job of a component's node."""
        job = self.plan.nodes[key].job
        assert isinstance(job, ComponentJob)
        return job

    def node(self, key: Key) -> Node:
        """The node of a key."""
        return self.plan.nodes[key]
