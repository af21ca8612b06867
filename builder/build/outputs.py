"""Outputs: assembled from stored components, held to what is expected of them, put in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from builder.base.disk import write_bytes
from builder.base.errors import LockError, OutputError, Problem, SourceError
from builder.build.context import Context
from builder.build.evaluate import Stoppable
from builder.build.expect import Built, missed
from builder.build.in_parts import hold_output_to_lock
from builder.build.measure import Metrics
from builder.build.write import write_output
from builder.formats.write_safetensors import Written
from builder.plan.graph import Node, OutputJob, Plan, SourceJob
from builder.plan.keys import assembly_key, extras_key, known_extras, output_format
from builder.plan.metadata import final_metadata
from builder.plan.resolve import output_state
from builder.recipe.lock import Lock, LockedComponent, LockedOutput, LockedSource, differences, lock_path
from builder.sources.find import files_of
from builder.sources.have import locked_source
from builder.store import DamagedEntry
from builder.store.entries import VerifiedTensor
from builder.tensors.digests import Digest, Row, component_digest, tensor_digest
from builder.tensors.lazy import LazyTensor


def put(
    context: Context,
    node: Node,
    metrics: Metrics,
    *,
    locked: Lock | None = None,
    naming: Callable[[str], Path] | None = None,
) -> Built:
    """Have an output in its place, written unless it is there; `locked` and `naming` as `build` has them.

    Raises DamagedEntry for a component that must be made again, OutputError when what is made is not what
    the recipe expects, LockError when it is not what `locked` says; then the place is as it was.
    """
    return _Assembly(context, node, metrics, locked, naming).put()


def lock_of(context: Context, built: Mapping[str, Built]) -> Lock:
    """The lock of outputs that were built, by node."""
    components, outputs = [], {}
    for id_, made in built.items():
        job = context.plan.node(id_).job
        assert isinstance(job, OutputJob)
        for cls, (_, name) in job.slots.items():
            part = context.part(name)
            components.append(
                LockedComponent(
                    job.output.name,
                    cls,
                    part.component,
                    context.taken_from(name),
                    part.digest.xxh3,
                    str(part.digest.sha256),
                    part.tensors,
                )
            )
        outputs[job.output.name] = LockedOutput(
            job.output.file, made.sha256, made.tensor_digest, made.size, made.metric
        )
    return Lock(context.plan.recipe.digest, _locked_sources(context.plan), tuple(components), outputs)


def _locked_sources(plan: Plan) -> dict[str, LockedSource]:
    """What the sources of the recipe, and of those it includes, are as far as it is known.

    A source whose components were all stored may not be on this machine: what the lock says of it stays.
    """
    jobs = [(n.job, n.key) for n in plan]
    return {
        job.sources.scope + job.source: locked_source(
            job.sources, job.source, key, job.sources.resolved.get(job.source, "")
        )
        for job, key in jobs
        if isinstance(job, SourceJob) and key is not None
    }


class _Assembly:
    """One output in the making."""

    def __init__(
        self,
        context: Context,
        node: Node,
        metrics: Metrics,
        locked: Lock | None,
        naming: Callable[[str], Path] | None,
    ) -> None:
        assert isinstance(node.job, OutputJob)
        self.context, self.node, self.job = context, node, node.job
        self.metrics, self.locked, self.naming = metrics, locked, naming
        self.parts = {cls: context.part(name) for cls, (_, name) in self.job.slots.items()}

    def put(self) -> Built:
        store = self.context.store
        extras = self._extras()
        digests = {name: self.parts[cls].digest.xxh3 for cls, (_, name) in self.job.slots.items()}
        self.node.key = key = assembly_key(self.job, digests, extras)
        rows = self._rows(extras)
        tensors = str(component_digest(rows).sha256)
        hold_output_to_lock(self.context.plan, self.node, tensors)
        target = self.job.target if self.naming is None else self.naming(self.metrics.text(self.parts))
        made = self._unchanged(key, target, tensors)
        if made is None:

            def accept(written: Written) -> None:
                nonlocal made
                self._compare(rows, written)
                made = self._built(target, str(written.sha256), written.size, tensors, "written")
                self._hold(made)

            written = self._write(target, accept)
            assert made is not None
            self._remember(target, written)
            store.note("output", key, {"sha256": made.sha256, "size": made.size})
        else:
            self._hold(made)
        if self.job.sidecar is not None:
            write_bytes(target.with_suffix(".yaml"), self.job.sidecar, inputs=self._inputs())
        return made

    def _unchanged(self, key: str, target: Path, tensors: str) -> Built | None:
        """The output, if it is in its place as this would make it."""
        store = self.context.store
        fact = store.recall("output", key)
        if fact is None:
            return None
        state, _ = output_state(store, key, target)
        if state == "hash" and store.sha256(target, self.context.stopping) == fact["sha256"]:
            state = "unchanged"
        if state != "unchanged":
            return None
        return self._built(target, fact["sha256"], fact["size"], tensors, "unchanged")

    def _built(self, target: Path, sha256: str, size: int, tensors: str, state: str) -> Built:
        metric = self.metrics.text(self.parts)
        return Built(self.job.output.name, target, sha256, size, tensors, metric, state)

    def _hold(self, made: Built) -> None:
        """Raise unless it is what the recipe expects, and what the lock that must not change says."""
        if problems := missed(self.job.recipe, self.job.output, made):
            raise OutputError(*problems)
        if self.locked is None:
            return
        if changes := differences(self.locked, lock_of(self.context, {self.node.id: made}), partial=True):
            raise LockError(
                Problem(
                    "the lock is stale",
                    evidence=tuple(changes),
                    hint="`ckpt build` without `--locked` accepts the change",
                )
            )

    # -- what it consists of

    def _extras(self) -> dict[str, Digest]:
        """The digests of what lies beside the components."""
        if self.node.state == "unchanged":
            known = known_extras(self.context.plan, self.job, self.context.store)
            if known is not None:
                return known
        return self._read_extras()

    def _read_extras(self) -> dict[str, Digest]:
        """The digests of what lies beside the components, read from the base as it is now."""
        context, extras = self.context, dict(self.job.extras)
        bases = context.base(self.job)
        for base in bases:
            assert isinstance(base.job, SourceJob)
            held = base.job.sources.open(base.job.source).checkpoint  # fetched, it is no longer remote
            extras = {n: held.get(n, t) for n, t in extras.items()}
        self.job = replace(self.job, extras=extras)
        found = {n: tensor_digest(t) for n, t in extras.items()}
        for base in bases:
            context.settled(base)
            if base.key is not None:
                fact = {n: [d.xxh3, d.sha256] for n, d in found.items()}
                context.store.note("extras", extras_key(base.key, self.job), fact)
        return found

    def _rows(self, extras: Mapping[str, Digest]) -> dict[str, Row]:
        """The digest of every tensor, by full name; raises DamagedEntry for what is gone."""
        rows = {n: Row(t.dtype, t.shape, extras[n]) for n, t in self.job.extras.items()}
        for cls, (prefix, _) in self.job.slots.items():
            found = self.context.store.rows(self.parts[cls])
            if found is None:
                raise self.context.store.gone(self.parts[cls])
            rows |= {prefix + name: row for name, row in found.items()}
        return rows

    # -- writing

    def _write(self, target: Path, accept: Callable[[Written], object]) -> Written:
        context, job = self.context, self.job
        container = output_format(job.target)
        tensors: dict[str, LazyTensor] = dict(job.extras)
        sources = {cls: context.taken_from(name) for cls, (_, name) in job.slots.items()}
        metadata = final_metadata(job.metadata, {c: (sources[c], m) for c, m in self.parts.items()})
        with ExitStack() as opened:
            for cls, (prefix, _) in job.slots.items():
                checkpoint = context.store.open(self.parts[cls], verify=False)
                if checkpoint is None:
                    raise context.store.gone(self.parts[cls])
                opened.enter_context(checkpoint)
                for name, tensor in checkpoint.items():
                    # A safetensors file is digested as it is written, and compared before it is put in place.
                    if isinstance(tensor, VerifiedTensor) and container == "safetensors":
                        tensor = tensor.unchecked
                    tensors[prefix + name] = Stoppable(tensor, context.stop)
            return write_output(
                container,
                target,
                tensors,
                metadata,
                threads=context.threads,
                inputs=self._inputs(),
                reporter=context.reporter,
                task=job.output.file,
                accept=accept,
            )

    def _compare(self, rows: Mapping[str, Row], written: Written) -> None:
        """Raise DamagedEntry when what was read from the store is not what was put into it."""
        store = self.context.store
        wrong = {n for n, d in written.tensors.items() if d.xxh3 != rows[n].digest.xxh3}
        for cls, (prefix, _) in self.job.slots.items():
            made = self.parts[cls]
            for name in store.rows(made) or ():
                if prefix + name in wrong:
                    evidence = f"tensor `{name}` is not the one that was stored"
                    raise DamagedEntry(store.component_path(made.digest.xxh3), made.digest.xxh3, evidence)
        if wrong:
            raise SourceError(
                Problem(
                    "what lies beside the components changed while it was read",
                    evidence=tuple(sorted(wrong)[:1]),
                )
            )

    def _inputs(self) -> list[Path]:
        """Every file that this build reads: none of them may be overwritten."""
        plan = self.context.plan
        recipes = [s.recipe.path for s in plan.sources if s.recipe.path is not None]
        inputs = [*recipes, *map(lock_path, recipes)]
        for job in (n.job for n in plan if isinstance(n.job, SourceJob)):
            if (found := job.sources.find(job.source)) is not None:
                inputs.append(found.path)
                with suppress(SourceError):
                    inputs += files_of(found.path)
        return inputs

    def _remember(self, target: Path, written: Written) -> None:
        """Have the output's digest known, unless another build has put its own there since."""
        with suppress(OSError):
            now, then = target.stat(), written.stat
            if os.path.samestat(now, then) and now.st_mtime_ns == then.st_mtime_ns:
                self.context.store.memory.remember(now, str(written.sha256), seen=None)
