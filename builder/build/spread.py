"""A plan's components and outputs as tasks of any executor: they hand each other digests, never tensors."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path

from builder import __version__
from builder.base.errors import CkptError, LockError, OutputError, Problem, SourceError, clipped
from builder.base.progress import Reporter
from builder.build.carry_out import Builder, make_together
from builder.build.context import Context
from builder.build.expect import Built
from builder.build.in_parts import Parts
from builder.build.outputs import Assembly, Product
from builder.operations import OPERATIONS
from builder.plan.graph import ComponentJob, Key, OutputJob, Plan, StepJob, joined
from builder.plan.keys import note_output
from builder.sources.job import SourceJob
from builder.sources.opened import Sources
from builder.workspace import Settings, Workspace

Work = tuple[Builder, Assembly]

ATTEMPTS = 3  # of a task whose worker was lost
MOST = 256  # tasks that an executor is given at a time
POLL = 0.5  # seconds after which it is asked whether to go on
SEEN = 60.0  # seconds until a network's file system shows what another machine wrote, at most


@dataclass(frozen=True)
class Means:
    """What workers work with, beside their own environment; `shared` is the store that all of them share."""

    shared: str
    models: tuple[Path, ...] = ()
    components: tuple[Path, ...] = ()
    offline: bool = False
    outside: bool = False
    threads: int | None = None


def means_of(
    settings: Settings, *, offline: bool = False, outside: bool = False, threads: int | None = None
) -> Means:
    """What workers need of the settings of a build, with whole paths."""
    models, components = (
        tuple(p.absolute() for p in paths) for paths in (settings.models, settings.components)
    )
    return Means(settings.shared, models, components, offline, outside, threads)


@dataclass(frozen=True)
class Told:
    """What a source is, by the word of the machine that read it; `resolved` is where it was had from."""

    sha256: str
    size: int
    resolved: str = ""


@dataclass(frozen=True)
class Task:
    """A component for the shared store, or an output: the node `key` of a plan of what it hangs on."""

    plan: Plan
    key: Key
    means: Means
    told: Mapping[Key, Told]
    locked: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Done:
    """What became of a task: an output's product, what was made, what sources are, what there is to say."""

    product: Product | None = None
    fresh: tuple[Key, ...] = ()
    told: Mapping[Key, Told] = field(default_factory=dict)
    said: tuple[Problem | str, ...] = ()
    error: CkptError | None = None


class _Heard(Reporter):
    """What is said on a worker, to be said where the build was begun."""

    def __init__(self) -> None:
        self.said: list[Problem | str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def warn(self, problem: Problem) -> None:
        self.said.append(problem)


def make(version: str, sent: bytes) -> Done:
    """Make a component or an output, on a worker; what fails is part of the answer.

    `sent` is a pickled Task, which is not looked at where it is another `version` that asks for it. Raises
    OutputError then, and for what no build raises, with where that was.
    """
    if version != __version__:
        fact = f"a worker has ckpt-build {__version__}, and {version} is asked for"
        raise OutputError(Problem(fact, hint="install the same version everywhere"))
    try:
        return _make(pickle.loads(sent))
    except Exception as error:
        fact = f"a worker on `{socket.gethostname()}` cannot work"
        hint = "each worker needs ckpt-build with all that it needs, and memory for its threads' windows"
        raise OutputError(Problem(fact, evidence=(_said(error),), hint=hint)) from None


def _make(task: Task) -> Done:
    means, heard = task.means, _Heard()
    settings = replace(
        Settings.from_environment(),
        shared=means.shared,
        share=True,
        models=means.models,
        components=means.components,
    )
    try:
        with (
            Workspace(settings, offline=means.offline, outside=means.outside, reporter=heard) as workspace,
            workspace.sources() as sources,
        ):
            done = make_node(task, sources, heard)
            workspace.tidy()
    except CkptError as error:
        return Done(said=tuple(heard.said), error=_plain(error))
    return replace(done, said=tuple(heard.said))


def make_node(task: Task, sources: Sources, reporter: Reporter) -> Done:
    """Make a component or an output with these sources; raises CkptError."""
    plan = task.plan
    jobs = {k: n.job for k, n in plan.nodes.items() if isinstance(n.job, SourceJob)}
    for key, job in jobs.items():
        if key in task.told:
            sources.tell(job, task.told[key].sha256, task.told[key].size)
    context = Context(plan, sources, OPERATIONS, task.means.threads or os.cpu_count() or 1, True, reporter)
    with closing(context):
        builder = Builder(context, Parts(context, task.partial), plan.lock if task.locked else None, None)
        if isinstance(plan.nodes[task.key].job, OutputJob):
            builder.begin()
            for assembly in builder.assemblies() if builder.error is None else ():
                builder.finish(assembly, make_together(context, [assembly])[0])
        else:
            made = context.made(task.key)
            if made is None or not context.store.holds(made.digest):
                builder.have_sources([task.key])
            builder.keep(task.key)
        if builder.error is not None:
            raise builder.error
        told = {
            k: Told(sha256, sources.size(j) or 0, sources.resolved.get(j, ""))
            for k, j in jobs.items()
            if (sha256 := sources.sha256(j)) is not None
        }
        return Done(builder.products.get(task.key), tuple(builder.made), told)


def tasks_of(plan: Plan, outputs: Sequence[Key]) -> dict[Key, tuple[Key, ...]]:
    """The nodes of a plan that are tasks, each with those that it waits for, which come before it.

    These are outputs, and components that are kept, that steps compute, or that several outputs have: what
    one output alone takes of a source is read where that output is written.
    """
    near = {*outputs, *plan.ancestors(*outputs)}
    uses = Counter(k for o in outputs for k in dict.fromkeys(plan.nodes[o].job.inputs))
    found: dict[Key, tuple[Key, ...]] = {}
    for node in (n for n in plan if n.key in near):
        before = plan.ancestors(node.key)
        is_task = node.key in outputs
        if isinstance(node.job, ComponentJob):
            steps = (k for k in before if isinstance(plan.nodes[k].job, StepJob))
            is_task = node.job.store or uses[node.key] > 1 or (uses[node.key] > 0 and any(steps))
        if is_task:
            found[node.key] = tuple(k for k in before if k in found)
    return found


@dataclass
class Farm:
    """An executor's workers, who make components and outputs where they are, and what they are told.

    They see the files of the recipe under the same paths, and write the outputs there. `lost` are what the
    executor raises, beside its standard exceptions, of a worker that is gone: another one tries again.
    """

    executor: Executor
    means: Means
    lost: tuple[type[BaseException], ...] = ()

    def __call__(self, works: Sequence[Work], keep_going: bool) -> None:
        """Have outputs made, and what became of each noted by its builder."""
        for builder, assembly in works:
            if assembly.node.state == "unchanged":
                builder.finish(assembly, make_together(builder.context, [assembly])[0])
        pending = {a.node.key: (b, a) for b, a in works if a.node.key not in b.products}
        if pending:
            _Run(self, [b for b, _ in pending.values()], pending, keep_going).run()


class _Run:
    def __init__(
        self, farm: Farm, builders: Sequence[Builder], works: Mapping[Key, Work], keep_going: bool
    ) -> None:
        self.farm, self.works, self.keep_going = farm, works, keep_going
        own = list({id(b): b for b in builders}.values())
        self.plan = joined([b.plan for b in own])
        waits = tasks_of(self.plan, list(works))
        self.order = TopologicalSorter(waits)
        self.order.prepare()
        self.ready: deque[Key] = deque()
        self.after: defaultdict[Key, list[Key]] = defaultdict(list)  # the outputs that wait for a task
        for key in works:
            for before in waits[key]:
                self.after[before].append(key)
        self.owners: dict[Key, Builder] = {}
        for builder in own:
            for key in builder.plan.nodes:
                self.owners.setdefault(key, builder)
        self.has_failed = False
        self.losses: Counter[Key] = Counter()
        self.told: dict[Key, Told] = {}
        self.running: dict[Future[Done], Key] = {}

    def run(self) -> None:
        """Hand out what is ready, and take what is done, until there is no more."""
        try:
            while True:
                for key in self._ready():
                    self._submit(key)
                if not self.running:
                    return
                finished, _ = wait(self.running, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in finished:
                    key = self.running.pop(future)
                    self._tell(key, "finish")
                    self._take(key, future)
                for key in self.running.values():
                    self._tell(key, "advance", 0)  # where the whole may be given up
        finally:
            for future, key in self.running.items():
                future.cancel()
                self._tell(key, "finish")

    def _tell(self, key: Key, what: str, *count: int) -> None:
        """Have a reporter hear of a task."""
        getattr(self.owners[key].context.reporter, what)(self.plan.nodes[key].label, *count)

    def _ready(self) -> Iterator[Key]:
        """The tasks that wait for nothing, while an executor may be given more."""
        self.ready.extend(self.order.get_ready())
        while self.ready and len(self.running) < MOST and (self.keep_going or not self.has_failed):
            yield self.ready.popleft()

    def _submit(self, key: Key) -> None:
        builder, farm = self.owners[key], self.farm
        plan = builder.plan.part(key)
        told = {k: self.told[k] for k in plan.nodes if k in self.told}
        task = Task(plan, key, farm.means, told, builder.locked is not None, builder.parts.believing)
        try:
            self.running[farm.executor.submit(make, __version__, pickle.dumps(task))] = key
            self._tell(key, "start", plan.nodes[key].writes or 0)
        except Exception as error:  # whatever an executor raises that takes no more
            fact, hint = "the executor takes no tasks", "what was made until now is in the shared store"
            self._fail(key, OutputError(Problem(fact, evidence=(_said(error),), hint=hint)))

    def _take(self, key: Key, future: Future[Done]) -> None:
        builder = self.owners[key]
        try:
            done = future.result()
            self._check(key, done)
        except CkptError as error:
            self._fail(key, error)
            return
        except Exception as error:
            lost = isinstance(error, (BrokenExecutor, CancelledError, *self.farm.lost))
            self.losses[key] += lost
            if lost and self.losses[key] < ATTEMPTS:
                label = self.plan.nodes[key].label
                builder.context.reporter.note(f"the worker that made `{label}` was lost: it is made again")
                self._submit(key)
            else:  # or it cannot even begin, as one without the package
                self._fail(key, self._gone(key, error))
            return
        for said in done.said:
            reporter = builder.context.reporter
            reporter.warn(said) if isinstance(said, Problem) else reporter.note(said)
        if done.error is not None:
            self._fail(key, done.error)
            return
        self.order.done(key)
        sources = builder.context.sources  # which all have in common
        for source, told in done.told.items():
            job = self.plan.nodes[source].job if source in self.plan.nodes else None
            if isinstance(job, SourceJob):
                self.told[source] = told
                sources.tell(job, told.sha256, told.size)
                if told.resolved:
                    sources.resolved[job] = told.resolved
        builder.made |= set(done.fresh)
        if done.product is not None:
            builder, assembly = self.works[key]
            builder.finish(assembly, done.product)
            _remember(builder.context, assembly, done.product)

    def _check(self, key: Key, done: object) -> None:
        """Raise OutputError where an answer is none, or tells of a file that is not there as it says."""
        label = self.plan.nodes[key].label
        if not isinstance(done, Done):
            fact = f"a worker's answer about `{label}` is none"
            raise OutputError(Problem(fact, evidence=(_said(done),), hint="is it ckpt-build that answers?"))
        if done.error is not None or key not in self.works:
            return
        job, product = self.works[key][1].job, done.product
        if product is None or product.built.path != job.target or product.parts.keys() != job.slots.keys():
            fact = f"a worker's answer about `{label}` is of something else"
            raise OutputError(Problem(fact, hint="is it ckpt-build that answers?"))
        until = time.monotonic() + SEEN
        single = job.container.single
        while not (is_there := _is_there(product.built, single)) and time.monotonic() < until:
            time.sleep(POLL)
        if not is_there:
            raise OutputError(
                Problem(
                    f"`{job.target}` is not here as the worker that made it says",
                    evidence=(f"it wrote {product.built.size:,} bytes",),
                    hint="workers and this machine have to see the same files under the same paths",
                )
            )

    def _gone(self, key: Key, error: BaseException) -> CkptError:
        label, times = self.plan.nodes[key].label, self.losses[key]
        often = f", {times} times" if times > 1 else ""
        fact = f"`{label}` could not be made elsewhere{often}"
        hint = "each worker needs ckpt-build, and memory for its threads' windows"
        return OutputError(Problem(fact, evidence=(_said(error),), hint=hint))

    def _fail(self, key: Key, error: CkptError) -> None:
        """Have a task failed, and all outputs that wait for it."""
        self.has_failed = True
        for output in (key, *self.after[key]):
            if output in self.works:
                builder, assembly = self.works[output]
                builder.finish(assembly, error)


def _said(something: object) -> str:
    """An exception, or what is none, in a line."""
    said = (str(something).strip().splitlines() or [""])[0]
    return f"{type(something).__name__}: {clipped(said, 200)}"


def _is_there(built: Built, single: bool) -> bool:
    """Whether an output lies in its place, and in its size if it is a `single` file."""
    try:
        with os.scandir(built.path.parent):  # has a network's file system ask anew
            found = built.path.lstat()
    except OSError:
        return False
    return not single or (stat.S_ISREG(found.st_mode) and found.st_size == built.size)


def _remember(context: Context, assembly: Assembly, product: Product) -> None:
    """Have known here what a worker made: the components by the shared store's word."""
    for cls, (_, key) in assembly.job.slots.items():
        action = context.action(key)
        if action is not None and context.store.lookup(action, cls) is None:
            context.store.claim(action, product.parts[cls])
    if product.known is not None:
        note_output(context.store, *product.known)


def _plain(error: CkptError) -> CkptError:
    """An error as one that can be sent: of the nearest kind that is made of problems alone."""
    kinds = (SourceError, LockError, OutputError)
    kind = next((k for k in kinds if isinstance(error, k)), None)
    own = type(error).__init__ is CkptError.__init__
    return (type(error) if own else kind or CkptError)(*error.problems)
