"""What is taken of sources: the tensors to be read, the component that they are, and its size."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from builder.base.errors import Place, Problem, RecipeError
from builder.models.catalog.tables import Patterns
from builder.models.cut import choose, cut, numbers, packed_anew, usual
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
    component_specs,
    taken_as,
)
from builder.sources.job import SourceJob
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed.decode import WIDER

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
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


def component_sizes(
    plan: Plan, sources: Sources, job: ComponentJob
) -> tuple[Mapping[str, int] | None, int | None]:
    """The bytes that are read for a component, by what is taken of sources, and those that it has.

    None for what is not known yet.
    """
    if is_elsewhere(plan, sources, job):
        return None, None
    reads = sizes_of(plan, sources, job.origin)
    if job.cls == CHECKPOINT and not isinstance(job.origin, Whole):
        return reads, None  # which tensors an adapter has is known when it is begun
    tensors = made_of(plan, sources, job)
    if job.precision == "keep" and (blocks := {b for t in tensors.values() if (b := _blocks(t))}):
        held = " and ".join(sorted(blocks))
        plan.say(f"`{job.source}` is in blocks of {held}: they become the FP32 numbers that they are")
    packed = packed_anew(tensors, None if job.cls == CHECKPOINT else job.cls, job.quantize, sources.catalog)
    specs = component_specs(tensors, job.precision, job.narrow, Patterns(job.kept), packed)
    return reads, sum(d.bits * prod(s) // 8 for d, s in specs.values())


def made_of(plan: Plan, sources: Sources, job: ComponentJob) -> Mapping[str, LazyTensor]:
    """What of a source has the names and shapes of a component: of a step, its first input's.

    What is packed is as numbers, where these are wanted.
    """
    origin, decoded, hint = job.origin, job.decodes, job.hint
    while not isinstance(origin, Take | Whole):
        near = plan.nodes[origin.node].job
        assert isinstance(near, StepJob | ComponentJob)
        decoded, hint = (True, WIDER) if isinstance(near, StepJob) else (decoded or near.decodes, hint)
        origin = near.inputs_by_name[near.first] if isinstance(near, StepJob) else near.origin
    held = taken(plan, sources, origin)
    if not decoded:
        return held
    named = component_name(plan, sources, origin)
    whole_ = None if named == CHECKPOINT else named
    return numbers(held, whole_, sources.catalog, hint, place_of(plan, sources, origin)).tensors


def is_elsewhere(plan: Plan, sources: Sources, job: ComponentJob) -> bool:
    """Whether a component is made of a source that is not here."""
    keys = {job.origin.node, *plan.ancestors(job.origin.node)}
    jobs = (plan.nodes[k].job for k in keys)
    return any(isinstance(j, SourceJob) and sources.find(j) is None for j in jobs)


def published_in(plan: Plan, sources: Sources, cls: str, origin: Origin | None = None) -> str:
    """What the components of a class are published in; `origin` decides where that is not the same."""
    members = sources.catalog.classes[cls]
    several = origin is not None and len({c.precision for c in members}) > 1
    name = component_name(plan, sources, origin) if origin is not None and several else None
    return (sources.catalog.components[name] if name is not None else members[0]).precision


def kept(catalog: Catalog, cls: str, precision: str | None) -> tuple[str, ...]:
    """Patterns of the tensors of a class that a precision is not for."""
    if precision in (None, "keep") or cls == CHECKPOINT:
        return ()
    return catalog.classes[cls][0].traits.kept.all


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


def _blocks(tensor: LazyTensor) -> str:
    """The type of the blocks that a tensor lies in; empty where it is as it is read."""
    stored = tensor.stored[0]
    return stored if stored != tensor.dtype.code else ""
