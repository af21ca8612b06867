"""What components are taken of: a source, a step or an included recipe, seen as a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from builder.base.errors import Problem, RecipeError
from builder.models.catalog import Architecture
from builder.models.prediction import Prediction, prediction, read_markers
from builder.plan.graph import Key, Origin, Take
from builder.plan.keys import recall_prediction, tables
from builder.plan.nodes import Nodes
from builder.plan.taken import component_name, quoted
from builder.recipe import Pick
from builder.sources.job import SourceJob


class Told(NamedTuple):
    """What a denoiser predicts; `by` is the source that it comes from, and what that says."""

    prediction: Prediction
    by: tuple[Key, Prediction] | None = None


@dataclass(frozen=True)
class Model:
    """A source, step or sub-recipe as a set of components, each of which becomes a node when it is taken.

    `told` says what its denoiser predicts. One with `metadata`, which a file of it says of itself, is no
    model but an adapter: all of it is one component, and `published` is the precision of such a file.
    """

    name: str
    classes: Callable[[], tuple[str, ...]]
    architecture: Callable[[], Architecture | None]
    origin: Callable[[Pick], Origin]
    told: Callable[[], Told]
    first: Model | None = None  # of a step, the one whose classes it changes
    metadata: Callable[[], Mapping[str, str]] | None = None
    published: Callable[[], str] = lambda: "fp16"


def source_model(nodes: Nodes, name: str) -> Model:
    """A source of the recipe that is a file; it is looked at when something is asked of it."""

    def classes() -> tuple[str, ...]:
        job = nodes.source(name)
        if (known := nodes.sources.known_architecture(job)) is not None:
            return nodes.catalog.architecture(known).slots
        identity = nodes.sources.open(job).identity
        return tuple(dict.fromkeys(m.component.cls for m in identity.matches if not m.ema))

    def architecture() -> Architecture | None:
        job = nodes.source(name)
        if (known := nodes.sources.known_architecture(job)) is not None:
            return nodes.catalog.architecture(known)
        identity = nodes.sources.open(job).identity
        found = identity.architecture if identity.intact else identity.incomplete
        return nodes.catalog.architecture(found) if found is not None else None

    def origin(pick: Pick) -> Origin:
        return Take(
            nodes.source(name).key,
            pick.cls,
            pick.component,
            tables(nodes.catalog, pick.cls, pick.component),
            nodes.recipe.place(*pick.at, value=True),
        )

    return Model(name, classes, architecture, cache(origin), lambda: _told_by(nodes, nodes.source(name)))


def _told_by(nodes: Nodes, job: SourceJob) -> Told:
    """What a source says of what its denoiser predicts; it is looked at where that is not remembered."""
    found = recall_prediction(nodes.store, nodes.sources.sha256(job), nodes.catalog)
    if found is None and nodes.is_seen(job):
        checkpoint = nodes.sources.open(job).checkpoint
        found = read_markers(prediction(checkpoint, checkpoint.metadata, nodes.catalog), checkpoint)
    found = found or Prediction()
    return Told(found, (job.key, found))


def check_component(nodes: Nodes, pick: Pick, origin: Origin, held: Any) -> None:
    """Raise RecipeError when what another model makes is not the component that is asked for."""
    if pick.component is None:
        return
    found = component_name(nodes.plan, nodes.sources, origin)
    if found is not None and found != pick.component:
        raise absent(nodes, pick, [found, *(c for c in held if c != pick.cls)])


def absent(nodes: Nodes, pick: Pick, held: Any) -> RecipeError:
    """The error that a model, which holds others, has not what is asked for."""
    return RecipeError(
        Problem(
            f"`{pick.source}` has no {pick.component or pick.cls}",
            nodes.recipe.place(*pick.at, value=True),
            (f"it holds {quoted(sorted(held)) or 'nothing that the catalog knows'}",),
        )
    )
