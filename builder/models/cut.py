"""The one way to a component: from its match in a file to its own names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from builder.base.errors import Problem, SourceError
from builder.models.catalog.tables import NAMINGS
from builder.models.identify import Identity, Match
from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Reshaped

if TYPE_CHECKING:
    from builder.models.catalog import Catalog


class Cut(NamedTuple):
    """A component cut out of a file: its name in the catalog, its tensors, and what had to be changed.

    Tensors have the unprefixed names and the shapes of the catalog; companions, which the catalog's table
    does not have, come along under theirs. `changes` are in words, each after the name of the fix that it is.
    """

    component: str
    tensors: dict[str, LazyTensor]
    changes: tuple[str, ...]


def cut(tensors: Mapping[str, LazyTensor], identity: Identity, match: Match, cls: str) -> Cut:
    """A match as a component of class `cls`; nothing is read.

    Names that the file spells otherwise, as diffusers does a VAE's attention, become the catalog's, and a
    linear layer's weights a 1x1 convolution's where that is meant. An average that is promoted gets the
    names of what it averages.
    """
    component = match.component
    promoted = _promoted(identity, match) if component.cls != cls else {}
    rules = component.tensors
    made: dict[str, LazyTensor] = {}
    for bare, full in match.whole.items():
        tensor = tensors[full]
        if bare in match.reshaped:
            tensor = Reshaped(tensor, rules[bare].shape)
        made[promoted.get(bare, bare)] = tensor
    changes = []
    if component.mislabelled:
        changes.append(f"clip-names: {len(made):,} tensors get the names that loaders expect")
    if match.renamed or match.reshaped:
        words = [f"{len(match.renamed)} renamed"] * bool(match.renamed)
        words += [f"{len(match.reshaped)} reshaped to [n, n, 1, 1]"] * bool(match.reshaped)
        changes.append(f"vae-attention-shape: {', '.join(words)}")
    return Cut(component.name, made, tuple(changes))


def _promoted(identity: Identity, match: Match) -> dict[str, str]:
    """From the names of an average to those of what it averages, its companions' too."""
    component = match.component
    model = identity.find(component.average_of or "")
    if model is None or component.naming is None:
        return component.promote
    return component.promote | {NAMINGS[component.naming](name): name for name in model.companions}


def usual(tensors: Mapping[str, LazyTensor], identity: Identity, catalog: Catalog) -> dict[str, LazyTensor]:
    """A full checkpoint, the parts of its architecture under their usual names and in their usual shapes.

    All else stays as it is. Raises SourceError where two tensors would have one name.
    """
    architecture = catalog.architecture(str(identity.architecture))
    made: dict[str, LazyTensor] = {}
    rest = dict(tensors)
    for match in (m for m in identity.matches if m.component.cls in architecture.slots):
        prefix = catalog.component_for(match.component.cls, architecture).prefix
        made |= {prefix + n: t for n, t in cut(tensors, identity, match, match.component.cls).tensors.items()}
        for name in match.whole.values():
            rest.pop(name)
    if doubled := sorted(made.keys() & rest.keys()):
        raise SourceError(Problem(f"two tensors would be called `{doubled[0]}`"))
    return made | rest


def choose(matches: Sequence[Match], cls: str, component: str | None, catalog: Catalog) -> Match | None:
    """The match that fills a slot: the component named, else the one of the class.

    A component under other names, as EMA, fills the slot of the one whose names it can be given.
    """
    if component is None:
        return next((m for m in matches if m.component.cls == cls), None)
    for match in matches:
        found = match.component
        if found.name == component and (
            found.cls == cls or (found.base is not None and catalog.component(found.base).cls == cls)
        ):
            return match
    return None
