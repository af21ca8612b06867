"""A component of the plan as a mapping of lazy tensors, composed from what it is made of."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from builder.base.errors import Problem
from builder.build.schedule import Cancelled
from builder.models.catalog import Catalog
from builder.operations.fixes import FIXES, truncated_position_ids
from builder.plan.graph import Applied, ComponentJob, Finished, Origin, Plan, StepJob, Take
from builder.plan.resolve import taken
from builder.store import Store
from builder.tensors.cast import Faults, cast_all
from builder.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class Finish:
    """A component ready to be written: its tensors, what was done to them, and the faults they will show."""

    component: str
    tensors: Mapping[str, LazyTensor]
    changes: tuple[str, ...]
    faults: Faults


def finish(
    plan: Plan, job: ComponentJob, catalog: Catalog, store: Store, stop: threading.Event, opened: ExitStack
) -> Finish:
    """Compose a component: taken or computed, repaired, rounded. Nothing is read but small tensors.

    Stored components that it is made of stay open in `opened`; reading them, or this, may raise
    DamagedEntry.
    """
    tensors, component = evaluate(plan, job.origin, store, opened)
    changes: list[str] = []
    renamed = catalog.components[component].mislabelled
    if renamed:
        changes.append(f"clip-names: {len(tensors):,} tensors get the names that loaders expect")
    for name in (n for n in job.fixes if n != "clip-names" or not renamed):
        tensors, done = FIXES[name].apply(tensors)
        changes += [f"{name}: {change}" for change in done] or [f"{name}: nothing to change"]
    tensors, done = truncated_position_ids(tensors)
    changes += done
    faults = Faults()
    cast = cast_all(
        tensors,
        job.precision,
        faults=faults,
        overflow=job.overflow,
        non_finite=job.non_finite,
        narrow=job.narrow,
    )
    return Finish(component, {n: Stoppable(t, stop) for n, t in cast.items()}, tuple(changes), faults)


def evaluate(
    plan: Plan, origin: Origin, store: Store, opened: ExitStack
) -> tuple[Mapping[str, LazyTensor], str]:
    """The tensors of an origin under unprefixed names, and the component's name in the catalog."""
    if isinstance(origin, Take):
        return taken(origin)
    node = plan.node(origin.node)
    if isinstance(origin, Finished):
        assert node.made is not None
        checkpoint = store.open(node.made, verify=False)
        if checkpoint is None:
            raise store.gone(node.made)
        opened.enter_context(checkpoint)
        return checkpoint.tensors, node.made.component
    assert isinstance(origin, Applied) and isinstance(node.job, StepJob)
    job = node.job
    inputs = {p: evaluate(plan, o, store, opened) for p, o in job.inputs.items()}
    made = job.operation.apply({p: tensors for p, (tensors, _) in inputs.items()}, job.params)
    return made, inputs[job.operation.inputs[0]][1]


class Stoppable(LazyTensor):
    """A tensor that is no longer read once the build has stopped."""

    __slots__ = ("_stop", "_tensor")

    def __init__(self, tensor: LazyTensor, stop: threading.Event) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self._tensor = tensor
        self._stop = stop

    def read_into(self, start: int, out: memoryview) -> None:
        if self._stop.is_set():
            raise Cancelled(Problem("the build was stopped"))
        self._tensor.read_into(start, out)
