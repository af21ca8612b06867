"""What is taken of sources: the tensors to be read, and the component that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.base.errors import Place, Problem, RecipeError
from builder.models.cut import choose, cut, usual
from builder.models.identity import Identity, Match
from builder.models.matching import as_class
from builder.plan.graph import (
    CHECKPOINT,
    ComponentJob,
    Origin,
    Plan,
    StepJob,
    Take,
    Whole,
    taken_as,
)
from builder.sources.job import SourceJob
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed.decode import WIDER

if TYPE_CHECKING:
    from builder.sources.opened import Sources


def sizes_of(plan: Plan, sources: Sources, origin: Origin) -> dict[str, int]:
    """The bytes to be read for a component, by what is taken; raises RecipeError where a source lacks it."""
    return {
        taken_as(take): sum(t.nbytes for t in taken(plan, sources, take).values())
        for take in plan.takes(origin)
    }


def taken(plan: Plan, sources: Sources, origin: Take | Whole) -> Mapping[str, LazyTensor]:
    """What is taken of a source, under unprefixed names; raises RecipeError when it does not have it."""
    job = plan.nodes[origin.node].job
    assert isinstance(job, SourceJob)
    if isinstance(origin, Whole):
        return whole(job, origin, sources)
    opened = sources.open(job)
    return cut(opened.checkpoint, opened.identity, match_of(job, origin, sources), origin.cls).tensors


def place_of(plan: Plan, sources: Sources, origin: Origin) -> Place | None:
    """The file that an origin is of; None where it is made of several."""
    job = plan.nodes[origin.node].job
    return Place(sources.open(job).checkpoint.name) if isinstance(job, SourceJob) else None


def component_name(plan: Plan, sources: Sources, origin: Origin) -> str | None:
    """The catalog's name of what an origin gives; None where its source cannot be seen from here."""
    node = plan.nodes[origin.node]
    if isinstance(origin, Take):
        assert isinstance(node.job, SourceJob)
        if not sources.seen(node.job):
            return None
        return match_of(node.job, origin, sources).component.name
    if isinstance(origin, Whole):
        return CHECKPOINT
    if isinstance(node.job, StepJob):
        if node.job.cls == CHECKPOINT:
            return CHECKPOINT
        return component_name(plan, sources, node.job.inputs_by_name[node.job.first])
    assert isinstance(node.job, ComponentJob)
    return component_name(plan, sources, node.job.origin)


def whole(job: SourceJob, origin: Whole, sources: Sources) -> dict[str, LazyTensor]:
    """All tensors of a source; raises SourceError where two would have one name."""
    opened = sources.open(job)
    return usual(opened.checkpoint, opened.identity, origin.spelt, sources.catalog)


def match_of(job: SourceJob, take: Take, sources: Sources) -> Match:
    """What of a source is taken; raises RecipeError, where the recipe asks for it, when it is not there."""
    opened = sources.open(job)
    match = choose(opened.checkpoint, opened.identity, take.cls, take.component, sources.catalog)
    if match is not None:
        return match
    wanted = take.component or take.cls
    near = [r for r in opened.identity.rejected if wanted in (r.component.name, r.component.cls)]
    evidence = [r.describe() for r in near[:2]]
    hint = near[0].hint if near else None
    alike = [m for m in opened.identity.matches if as_class(m, take.cls, opened.checkpoint, sources.catalog)]
    if len(alike) > 1:
        several = quoted(f"{m.component.name} under {m.prefix}" for m in alike)
        evidence.append(f"it may be either of {several}")
        hint = "`ckpt extract` writes the one that you mean as a file of its own"
    raise RecipeError(
        Problem(
            f"`{job.name}` has no {wanted}",
            take.place,
            (*evidence, *holds(opened.identity)),
            WIDER if opened.identity.undecoded else hint,
        )
    )


def holds(identity: Identity) -> tuple[str, ...]:
    """What a file holds, as evidence that something else is not there."""
    held = sorted({m.component.name for m in identity.matches})
    return f"it holds {quoted(held) or 'nothing that the catalog knows'}", *identity.undecoded


def quoted(names: Any) -> str:
    """Names in backticks, with commas."""
    return ", ".join(f"`{n}`" for n in names)
