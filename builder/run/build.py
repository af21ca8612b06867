"""Building: what the plan leaves to be made is made in parallel, and put in place when it is right."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.digests import Digest, Row, component_digest, tensor_digest
from builder.errors import FetchError, LockError, OutputError, Place, Problem, SourceError
from builder.formats.atomic import write_bytes
from builder.formats.writer import Written
from builder.lock import Lock, LockedComponent, LockedOutput, differences, lock_path
from builder.metric import SCALES, Metric, measure
from builder.numeric import PRECISIONS
from builder.plan import Plan
from builder.plan.keys import assembly_key, component_key, extras_key, known_extras, output_format
from builder.plan.metadata import final_metadata
from builder.plan.model import ComponentJob, Node, OutputJob, SourceJob
from builder.plan.resolve import output_state
from builder.progress import SILENT, Reporter
from builder.run.evaluate import Stoppable, finish
from builder.run.expect import Built, missed
from builder.run.remote import bring, hold_output_to_lock, hold_to_lock, in_parts
from builder.run.schedule import Cancelled, Task, run_all
from builder.run.sources import locked_sources, see
from builder.run.write import write_output
from builder.sources import files_of
from builder.store import DamagedEntry, Made, Store
from builder.store.entries import VerifiedTensor
from builder.tensors import WINDOW, LazyTensor

if TYPE_CHECKING:
    from builder.catalog import Catalog

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
    threads = threads or os.cpu_count() or 1
    return _Builder(plan, catalog, store, threads, locked, hashing, naming, assemble, reporter).run()


def stale(changes: list[str]) -> LockError:
    """That the lock is not what the recipe resolves to now, with what changed."""
    return LockError(
        Problem(
            "the lock is stale",
            evidence=tuple(changes),
            hint="`ckpt build` without `--locked` accepts the change",
        )
    )


class _Builder:
    def __init__(
        self,
        plan: Plan,
        catalog: Catalog,
        store: Store,
        threads: int,
        locked: Lock | None,
        hashing: bool,
        naming: Callable[[str], Path] | None,
        assemble: bool,
        reporter: Reporter,
    ) -> None:
        self.plan = plan
        self.catalog = catalog
        self.store = store
        self.threads = threads
        self.locked = locked
        self.hashing = hashing
        self.naming = naming
        self.assemble = assemble
        self.reporter = reporter
        self.stop = threading.Event()
        self.result = Build()
        self.built: dict[str, Built] = {}
        self._notes = threading.Lock()

    def run(self) -> Build:
        """Make everything that is to be made."""
        for source in map(self.plan.node, self.plan.unseen):
            assert isinstance(source.job, SourceJob)
            raise source.job.sources.missing(source.job.source)
        tasks = list(self._tasks())
        workers = max(2, min(self.threads, MEMORY // (6 * WINDOW * self.threads)))
        with ThreadPoolExecutor(workers, thread_name_prefix="build") as executor:
            run_all(tasks, executor, self._cancel)
        if not self.assemble:
            return self.result
        self.result.outputs = [self.built[n.id] for n in self.plan.outputs()]
        self.result.lock = self._lock()
        return self.result

    def _cancel(self) -> None:
        self.stop.set()
        for sources in self.plan.sources:
            sources.stop()

    # -- what is to be done, and after what

    def _tasks(self) -> Iterator[Task]:
        missing = {n.id: n for n in self.plan if isinstance(n.job, ComponentJob) and n.made is None}
        sources = {i: self._sources(i) for i in missing}
        bases = {
            n.id: self._base(n.job)
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
        for node in self.plan.outputs() if self.assemble else ():
            parts = self.plan.ancestors(node.id)
            after = {f"record {p}" for p in parts if p in missing}
            after |= {s.id for s in bases.get(node.id, ()) if s.id in unseen}
            yield Task(node.id, partial(self._assemble, node), frozenset(after))

    def _sources(self, id_: str) -> list[Node]:
        found = (self.plan.node(n) for n in sorted(self.plan.ancestors(id_)))
        return [n for n in found if isinstance(n.job, SourceJob)]

    def _base(self, job: OutputJob) -> list[Node]:
        """The source that gives an output what lies beside its components: tensors, metadata."""
        if job.base is None:
            return []
        base = self.plan.node(job.base)
        assert isinstance(base.job, SourceJob)
        # What a host shows of a file's metadata is not believed: no digest in a lock speaks of it alone.
        carried = base.state == "fetch" and set(base.job.sources.metadata(base.job.source)) - {"format"}
        return [base] if job.extras or carried else []

    def _wait_for(self, source: Node) -> bool:
        assert isinstance(source.job, SourceJob)
        return source.state == "fetch" or source.job.sources.pinned_by_lock(source.job.source)

    def _see(self, node: Node) -> None:
        node.key = self._digest(node)

    def _digest(self, node: Node) -> str:
        """Have the source of a node, as `see` does."""
        job = node.job
        assert isinstance(job, SourceJob)
        with self._stoppable():
            return str(see(job.sources, job.source, self.catalog, self.store, self.reporter).sha256)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Tell a download that was broken off from one that failed."""
        try:
            yield
        except FetchError:
            if self.stop.is_set():
                raise Cancelled(Problem("the build was stopped")) from None
            raise

    # -- components

    def _make(self, node: Node) -> None:
        parts = [n for n in map(self.plan.node, self.plan.ancestors(node.id)) if n.kind == "component"]
        self._with_parts(parts, f"`{node.id}`", partial(self._make_once, node))

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

    def _make_once(self, node: Node) -> None:
        job = node.job
        assert isinstance(job, ComponentJob)
        key = component_key(self.plan, job)
        if key is not None and (made := self.store.lookup(key)) is not None:
            node.made = made
            return
        import torch

        torch.set_num_threads(1)  # the threads are ours; torch's own would be one team for each
        with self._stoppable():
            bring(self.plan, node, self.store, self.reporter)
        with ExitStack() as opened:
            done = finish(self.plan, job, self.store, self.stop, opened)

            def sound() -> None:
                if (error := done.faults.error(f"`{node.id}`", PRECISIONS[job.precision])) is not None:
                    raise error

            node.made = self.store.put(
                None,
                done.component,
                job.cls,
                done.tensors,
                threads=self.threads,
                reporter=self.reporter,
                task=node.id,
                check=sound,
            )
        with self._notes:
            self.result.made.append(node.id)
            self.result.changes[node.id] = done.changes

    def _unhashed(self, source: Node) -> bool:
        """Whether a source is taken for what it is, and what is made of it not remembered."""
        return source.state == "hash" and source.key is None and not self.hashing

    def _record(self, node: Node) -> None:
        """Say what made a component, now that its sources are known to be what they should be."""
        assert isinstance(node.job, ComponentJob) and node.made is not None
        node.key = component_key(self.plan, node.job)
        if node.key is None:
            return  # of sources that were not to be hashed
        for source in self._sources(node.id):
            self._settled(source)
        hold_to_lock(self.plan, node)
        self.store.record(node.key, node.made)

    def _settled(self, node: Node) -> None:
        """Raise SourceError unless what was read of a source is of the file that its digest is of."""
        job = node.job
        assert isinstance(job, SourceJob)
        same = job.sources.unchanged(job.source)
        if same and node.state == "known":  # it was told by its times, before it was opened
            same = self._digest(node) == node.key
        if not same:
            found = job.sources.find(job.source)
            raise SourceError(
                Problem(
                    f"the source `{job.source}` changed while it was read",
                    Place(str(found.path)) if found is not None else None,
                    hint="wait until it is whole, and build again",
                )
            )

    # -- outputs

    def _assemble(self, node: Node) -> None:
        job = node.job
        assert isinstance(job, OutputJob)
        parts = [self.plan.node(name) for _, name in job.slots.values()]

        def put() -> None:
            self.built[node.id] = self._output(node, job)

        self._with_parts(parts, f"`{job.output.file}`", put)
        if job.sidecar is not None:
            write_bytes(self.built[node.id].path.with_suffix(".yaml"), job.sidecar)

    def _remake(self, parts: list[Node], digest: str) -> None:
        """Make a component again whose stored copy is damaged."""
        for node in parts:
            if node.made is None or node.made.digest.xxh3 != digest:
                continue
            for source in self._sources(node.id):
                self._see(source)
            self._make(node)
            self._record(node)

    def _output(self, node: Node, job: OutputJob) -> Built:
        extras = known_extras(self.plan, job, self.store) if node.state == "unchanged" else None
        if extras is None:
            job, extras = self._read_extras(job)
        parts = {cls: self._part(name) for cls, (_, name) in job.slots.items()}
        digests = {name: parts[cls].digest.xxh3 for cls, (_, name) in job.slots.items()}
        node.key = assembly_key(job, digests, extras)
        rows = self._rows(job, parts, extras)
        tensor_digest = str(component_digest(rows).sha256)
        hold_output_to_lock(self.plan, node, tensor_digest)
        metric = self._metric(parts)
        target = self.naming(metric) if self.naming is not None else job.target
        state, _ = output_state(self.store, node.key, target)
        fact = self.store.recall("output", node.key)
        if (
            state == "hash"
            and fact is not None
            and self.store.sha256(target, self.reporter) == fact["sha256"]
        ):
            state = "unchanged"

        def built(sha256: str, size: int, state: str) -> Built:
            made = Built(job.output.name, target, sha256, size, tensor_digest, metric, state)
            if problems := missed(job.recipe, job.output, made):
                raise OutputError(*problems)
            self._agree(job, made)
            return made

        if state == "unchanged" and fact is not None:
            return built(fact["sha256"], fact["size"], state)

        def accept(written: Written) -> None:
            self._compare(job, parts, rows, written)
            built(str(written.sha256), written.size, "written")

        written = self._write(job, target, parts, accept)
        sha256 = str(written.sha256)
        self._remember(target, written)
        self.store.note("output", node.key, {"sha256": sha256, "size": written.size})
        return Built(job.output.name, target, sha256, written.size, tensor_digest, metric, "written")

    def _remember(self, target: Path, written: Written) -> None:
        """Have the output's digest known, unless another build has put its own there since."""
        with suppress(OSError):
            now, then = target.stat(), written.stat
            if os.path.samestat(now, then) and now.st_mtime_ns == then.st_mtime_ns:
                self.store.memory.remember(now, str(written.sha256), seen=None)

    def _part(self, name: str) -> Made:
        made = self.plan.node(name).made
        assert made is not None
        return made

    def _read_extras(self, job: OutputJob) -> tuple[OutputJob, dict[str, Digest]]:
        """The job and its digests of what lies beside the components, read from the base as it is now."""
        extras = dict(job.extras)
        for base in self._base(job):
            assert isinstance(base.job, SourceJob)
            held = base.job.sources.open(base.job.source).checkpoint  # fetched, it is no longer remote
            extras = {n: held.get(n, t) for n, t in extras.items()}
        found = {n: tensor_digest(t) for n, t in extras.items()}
        for base in self._base(job):
            self._settled(base)
            if base.key is not None:
                fact = {n: [d.xxh3, d.sha256] for n, d in found.items()}
                self.store.note("extras", extras_key(base.key, job), fact)
        return replace(job, extras=extras), found

    def _rows(
        self, job: OutputJob, parts: Mapping[str, Made], extras: Mapping[str, Digest]
    ) -> dict[str, Row]:
        """The digest of every tensor of an output, by full name; raises DamagedEntry for what is gone."""
        rows = {n: Row(t.dtype, t.shape, extras[n]) for n, t in job.extras.items()}
        for cls, (prefix, _) in job.slots.items():
            found = self.store.rows(parts[cls])
            if found is None:
                raise self.store.gone(parts[cls])
            rows |= {prefix + name: row for name, row in found.items()}
        return rows

    def _write(
        self,
        job: OutputJob,
        target: Path,
        parts: Mapping[str, Made],
        accept: Callable[[Written], object],
    ) -> Written:
        container = output_format(job.target)
        tensors: dict[str, LazyTensor] = dict(job.extras)
        sources = {cls: self._taken_from(name) for cls, (_, name) in job.slots.items()}
        metadata = final_metadata(job.metadata, {c: (sources[c], m) for c, m in parts.items()})
        with ExitStack() as opened:
            for cls, (prefix, _) in job.slots.items():
                checkpoint = self.store.open(parts[cls], verify=False)
                if checkpoint is None:
                    raise self.store.gone(parts[cls])
                opened.enter_context(checkpoint)
                for name, tensor in checkpoint.items():
                    # A safetensors file is digested as it is written, and compared before it is put in place.
                    if isinstance(tensor, VerifiedTensor) and container == "safetensors":
                        tensor = tensor.unchecked
                    tensors[prefix + name] = Stoppable(tensor, self.stop)
            return write_output(
                container,
                target,
                tensors,
                metadata,
                threads=self.threads,
                inputs=self._inputs(),
                reporter=self.reporter,
                task=job.output.file,
                accept=accept,
            )

    def _compare(
        self, job: OutputJob, parts: Mapping[str, Made], rows: Mapping[str, Row], written: Written
    ) -> None:
        """Raise DamagedEntry when what was read from the store is not what was put into it."""
        wrong = {n for n, d in written.tensors.items() if d.xxh3 != rows[n].digest.xxh3}
        for cls, (prefix, _) in job.slots.items():
            for name in self.store.rows(parts[cls]) or ():
                if prefix + name in wrong:
                    digest = parts[cls].digest.xxh3
                    evidence = f"tensor `{name}` is not the one that was stored"
                    raise DamagedEntry(self.store.component_path(digest), digest, evidence)
        if wrong:
            raise SourceError(
                Problem(
                    "what lies beside the components changed while it was read",
                    evidence=tuple(sorted(wrong)[:1]),
                )
            )

    def _taken_from(self, name: str) -> str:
        job = self.plan.node(name).job
        assert isinstance(job, ComponentJob)
        return job.source

    def _inputs(self) -> list[Path]:
        """Every file that this build reads: none of them may be overwritten."""
        recipes = [s.recipe.path for s in self.plan.sources if s.recipe.path is not None]
        inputs = [*recipes, *map(lock_path, recipes)]
        for job in (n.job for n in self.plan if isinstance(n.job, SourceJob)):
            if (found := job.sources.find(job.source)) is not None:
                inputs.append(found.path)
                with suppress(SourceError):
                    inputs += files_of(found.path)
        return inputs

    # -- what is known of the product

    def _metric(self, parts: Mapping[str, Made]) -> str:
        """The metric of components, each part measured once and then remembered by content."""
        known = Metric()
        for cls, made in parts.items():
            if cls not in SCALES:
                continue
            fact = self.store.recall("metric", made.digest.xxh3)
            if fact is None or cls not in fact:
                checkpoint = self.store.open(made, verify=False)
                if checkpoint is None:
                    raise self.store.gone(made)
                with checkpoint:
                    found = measure({cls: checkpoint}, threads=self.threads, reporter=self.reporter)
                fact = {cls: getattr(found, SCALES[cls].part)}
                self.store.note("metric", made.digest.xxh3, fact)
            known = replace(known, **{SCALES[cls].part: str(fact[cls])})
        return known.text if known != Metric() else ""

    def _agree(self, job: OutputJob, made: Built) -> None:
        """Raise LockError when the lock that must not change would."""
        if self.locked is None:
            return
        now = self._lock_of([(job, made)])
        if changes := differences(self.locked, now, partial=True):
            raise stale(changes)

    def _lock(self) -> Lock:
        jobs = [(n.job, self.built[n.id]) for n in self.plan.outputs()]
        return self._lock_of([(job, made) for job, made in jobs if isinstance(job, OutputJob)])

    def _lock_of(self, outputs: list[tuple[OutputJob, Built]]) -> Lock:
        components, locked = [], {}
        for job, made in outputs:
            for cls, (_, name) in job.slots.items():
                part = self._part(name)
                components.append(
                    LockedComponent(
                        job.output.name,
                        cls,
                        part.component,
                        self._taken_from(name),
                        part.digest.xxh3,
                        str(part.digest.sha256),
                        part.tensors,
                    )
                )
            locked[job.output.name] = LockedOutput(
                job.output.file, made.sha256, made.tensor_digest, made.size, made.metric
            )
        sources = locked_sources(self.plan)
        return Lock(self.plan.recipe.digest, sources, tuple(components), locked)
