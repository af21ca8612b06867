"""The one way to a component: from its match in a file to its own names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from builder.base.errors import Place, Problem, SourceError
from builder.models.catalog import RANK, Names
from builder.models.catalog.tables import NAMINGS, Patterns
from builder.models.identify import identify
from builder.models.identity import Identity, Match
from builder.models.matching import as_class, attention_changes, layers_of
from builder.tensors.lazy import LazyTensor
from builder.tensors.moves import Reshaped
from builder.tensors.packed.decode import Numbers, decoded
from builder.tensors.packed.encode import Quantize, encoded
from builder.tensors.packed.schemes import packing

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

    Whatever prefix and spelling the file has, names become the catalog's; a linear layer's weights become a
    1x1 convolution's where that is meant, and what diffusers splits is joined; raises SourceError where
    its parts have scales of their own. An average that is promoted
    gets the names of what it averages.
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
    modules = {full.rpartition(".")[0] for whole in match.made.values() for full in whole.names}
    if scaled := next((n for n in identity.scales if not modules.isdisjoint(layers_of(n))), None):
        raise SourceError(
            Problem(
                f"`{component.name}` is packed, and split as diffusers has it",
                evidence=(f"`{scaled}` is the scale of a part of what would be one tensor",),
                hint="take the source that it was made from",
            )
        )
    made |= {bare: source.make(tensors) for bare, source in match.made.items()}
    changes = []
    if match.renamed or match.reshaped:
        words = attention_changes(len(match.renamed), (rules[bare].shape for bare in match.reshaped))
        changes.append(f"vae-attention-shape: {words}")
    if component.mislabelled:
        changes.append(f"clip-names: {len(made):,} tensors get the names that loaders expect")
    elif match.diffusers:
        changes.append(f"diffusers' names: {len(made):,} tensors get those of the original layout")
    return Cut(component.name, made, tuple(changes))


def _promoted(identity: Identity, match: Match) -> dict[str, str]:
    """From the names of an average to those of what it averages, its companions' too."""
    component = match.component
    model = identity.find(component.average_of or "")
    if model is None or component.naming is None:
        return component.promote
    return component.promote | {NAMINGS[component.naming](name): name for name in model.companions}


def numbers(
    tensors: Mapping[str, LazyTensor],
    component: str | None,
    catalog: Catalog,
    hint: str,
    place: Place | None = None,
) -> Numbers:
    """The tensors of a component (None: of a whole file), with what is packed decoded in the table's shapes.

    Raises SourceError for what cannot be decoded; `hint` says what to do, `place` where they are.
    """
    if not packing(tensors):
        return Numbers(dict(tensors))
    if component is not None:
        rules = {name: rule.shape for name, rule in catalog.component(component).tensors.items()}
    else:
        matches = identify(tensors, catalog).matches
        rules = {full: m.component.tensors[bare].shape for m in matches for bare, full in m.names.items()}
    return decoded(tensors, {n: shape for n, shape in rules.items() if RANK not in shape}, hint, place)


def packed_anew(
    tensors: Mapping[str, LazyTensor], cls: str | None, quantize: Quantize | None, catalog: Catalog
) -> dict[str, LazyTensor]:
    """What becomes of those tensors of a class (None: of a whole file) that are packed; nothing is read."""
    if quantize is None:
        return {}
    stays = {c: Patterns(patterns) for c, patterns in quantize.unquantized.items()}
    if cls is not None:
        return encoded(tensors, quantize.scheme, stays[cls].fit)
    made: dict[str, LazyTensor] = {}
    for match in (m for m in identify(tensors, catalog).matches if m.component.cls in stays):
        layers = {full.rpartition(".")[0]: bare.rpartition(".")[0] for bare, full in match.names.items()}
        staying = {full for full, own in layers.items() if stays[match.component.cls].fit(own)}
        held = {full: tensors[full] for full in match.names.values()}
        made |= encoded(held, quantize.scheme, staying.__contains__)
    return made


def joined(tensors: Mapping[str, LazyTensor], identity: Identity) -> tuple[dict[str, LazyTensor], Identity]:
    """The same where each tensor of a component is one, named so: what diffusers splits is joined."""
    made, matches = dict(tensors), []
    for match in identity.matches:
        parts = cut(tensors, identity, match, match.component.cls).tensors if match.made else {}
        for whole in match.made.values():
            for full in whole.names:
                made.pop(full, None)
        new = {bare: match.under + bare for bare in match.made}
        made |= {full: parts[bare] for bare, full in new.items()}
        matches.append(replace(match, names={**match.names, **new}, made={}) if new else match)
    return made, replace(identity, matches=tuple(matches))


def foreign(identity: Identity, catalog: Catalog) -> tuple[str, ...]:
    """The classes of a model whose components have names that other programs gave them."""
    at = catalog.architectures.get(identity.architecture or "")
    return tuple(
        m.component.cls
        for m in identity.matches
        if identity.intact
        and not (m.usual or m.component.mislabelled)
        and (at is None or m.component.cls in at.slots)
    )


def usual(
    tensors: Mapping[str, LazyTensor], identity: Identity, classes: Collection[str], catalog: Catalog
) -> dict[str, LazyTensor]:
    """A checkpoint, the components of these classes under their usual names and in their usual shapes.

    All else stays as it is. Raises SourceError where two tensors would have one name.
    """
    at = catalog.architectures.get(identity.architecture or "")
    made: dict[str, LazyTensor] = {}
    rest = dict(tensors)
    for match in (m for m in identity.matches if m.component.cls in classes):
        cls = match.component.cls
        home = at if at is not None and not at.bare and cls in at.slots else None
        names = Names(catalog.component_for(cls, home).prefix) if home else catalog.classes[cls][0].alone
        made |= {names.name(n): t for n, t in cut(tensors, identity, match, cls).tensors.items()}
        for name in match.full:
            rest.pop(name)
    if doubled := sorted(made.keys() & rest.keys()):
        raise SourceError(Problem(f"two tensors would be called `{doubled[0]}`"))
    return made | rest


def choose(
    tensors: Mapping[str, LazyTensor], identity: Identity, cls: str, component: str | None, catalog: Catalog
) -> Match | None:
    """The match that fills a slot: the component named, else the one of the class.

    A component under other names, as EMA, fills the slot of the one whose names it can be given; one whose
    table is equal but for optional tensors fills it as well.
    """
    found = next((m for m in identity.matches if m.component.cls == cls), None)
    if component is not None:
        for match in identity.matches:
            held = match.component
            if held.name == component and (
                held.cls == cls or (held.base is not None and catalog.component(held.base).cls == cls)
            ):
                return match
        found = None
    if found is None:
        alike = [t for m in identity.matches if (t := as_class(m, cls, tensors, catalog)) is not None]
        found = alike[0] if len(alike) == 1 and component in (None, alike[0].component.name) else None
    return found
