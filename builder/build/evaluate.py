"""A component of the plan as a mapping of lazy tensors, composed from what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from builder.base.errors import CkptError
from builder.build.context import Context
from builder.models.cut import Cut, cut
from builder.operations.fixes import FIXES, truncated_position_ids
from builder.plan.graph import CHECKPOINT, ComponentJob, Finished, Key, Origin, StepJob, Take, Whole
from builder.plan.resolve import match_of, whole
from builder.sources.job import SourceJob
from builder.tensors.cast import PRECISIONS, Faults, cast_all
from builder.tensors.lazy import LazyTensor


@dataclass
class Composer:
    """Composes components; stored ones that they are made of stay open in `opened`.

    `faults` are what the composed tensors will show when they are read, each with a label and a precision.
    """

    context: Context
    opened: ExitStack
    faults: list[tuple[str, str, Faults]] = field(default_factory=list)

    def error(self) -> CkptError | None:
        """The error that names every faulty tensor that was read, or None."""
        for label, precision, faults in self.faults:
            if (error := faults.error(f"`{label}`", PRECISIONS[precision])) is not None:
                return error
        return None

    def finish(self, key: Key) -> Cut:
        """A component taken or computed, repaired, rounded. Nothing is read but small tensors.

        Reading stored components that it is made of, or this, may raise DamagedEntry.
        """
        job = self.context.component(key)
        component, tensors, changes = self.origin(job.origin)
        if isinstance(job.origin, Whole):
            kept = job.precision == "keep"  # nothing is looked at
            return Cut(component, tensors if kept else self._cast(key, tensors, job.origin.exempt), changes)
        done = [*changes]
        fixed = {c.partition(":")[0] for c in changes}
        made: Mapping[str, LazyTensor] = tensors
        for name in (n for n in job.fixes if n not in fixed):
            made, words = FIXES[name].apply(made)
            done += [f"{name}: {word}" for word in words] or [f"{name}: nothing to change"]
        made, words = truncated_position_ids(made, self.context.node(key).label)
        return Cut(component, self._cast(key, made), (*done, *words))

    def _cast(
        self, key: Key, tensors: Mapping[str, LazyTensor], exempt: Sequence[str] = ()
    ) -> dict[str, LazyTensor]:
        """Tensors in the precision of a component, but those that are exempt."""
        job, faults = self.context.component(key), Faults()
        self.faults.append((self.context.node(key).label, job.precision, faults))
        cast = cast_all(
            {n: t for n, t in tensors.items() if n not in exempt},
            job.precision,
            faults=faults,
            overflow=job.overflow,
            non_finite=job.non_finite,
            narrow=job.narrow,
        )
        return {n: cast.get(n, t) for n, t in tensors.items()}

    def origin(self, origin: Origin) -> Cut:
        """What an origin gives, under unprefixed names."""
        job = self.context.node(origin.node).job
        if isinstance(origin, Take):
            assert isinstance(job, SourceJob)
            return self._taken(origin, job)
        if isinstance(origin, Whole):
            assert isinstance(job, SourceJob)
            return Cut(CHECKPOINT, whole(job, origin, self.context.sources), ())
        if isinstance(job, StepJob):
            return self._applied(job)
        assert isinstance(job, ComponentJob)
        found = self.stored(origin.node) or self.finish(origin.node)
        if not isinstance(origin, Finished) or origin.promote is None:
            return found
        names = self.context.sources.catalog.component(origin.promote).promote
        return found._replace(tensors={names.get(n, n): t for n, t in found.tensors.items()})

    def stored(self, key: Key) -> Cut | None:
        """A component from where its bytes lie, each tensor verified as it is read; None: nowhere."""
        made = self.context.made(key)
        stored = self.context.store.open(made.digest) if made is not None else None
        if made is None or stored is None:
            return None
        self.opened.callback(stored.close)
        return Cut(made.component, dict(stored.tensors), made.changes)

    def _taken(self, take: Take, job: SourceJob) -> Cut:
        sources = self.context.sources
        opened = sources.open(job)
        return cut(opened.checkpoint, opened.identity, match_of(job, take, sources), take.cls)

    def _applied(self, job: StepJob) -> Cut:
        operation = self.context.operations[job.op]
        inputs = {p: self.origin(o) for p, o in job.inputs_by_name.items()}
        made = operation.apply({p: i.tensors for p, i in inputs.items()}, job.params)
        return Cut(inputs[operation.inputs[0]].component, dict(made), ())
