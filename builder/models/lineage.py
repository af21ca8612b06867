"""Which published model a component is, of those with the same table: by weights, markers or metadata."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from builder.models.identity import Identity, Match

if TYPE_CHECKING:
    from builder.models.catalog import Catalog, KnownPart

# Metadata that name the model, the most exact first.
_SAID = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")


class Lineage(NamedTuple):
    """The published models that a component may be: a table tells what it is made of, not which it is.

    `model` is the one that `by` shows it to be, in words; None: nothing shows it.
    """

    component: str
    models: tuple[str, ...]
    model: str | None = None
    by: str | None = None


def main_part(identity: Identity, catalog: Catalog) -> Match | None:
    """The component of a file that makes it this or that model: what denoises, or the only one."""
    own = [m for m in identity.matches if not m.ema] or list(identity.matches)
    denoisers = [m for m in own if m.component.cls in catalog.denoisers]
    return denoisers[0] if denoisers else own[0] if len(own) == 1 else None


def lineage(
    match: Match,
    names: Collection[str],
    metadata: Mapping[str, str],
    catalog: Catalog,
    published: KnownPart | None = None,
) -> Lineage | None:
    """What model a component is, in a file with these tensors and metadata; None: nothing is said of that.

    `published` are the weights that it is known to have.
    """
    component = match.component
    models = component.models
    if published is not None:
        return Lineage(component.name, models, published.name, "the digest of its weights")
    for marker, model in component.marks.items():
        if marker in names or match.prefix + marker in names:
            return Lineage(component.name, models, model, f"the marker `{marker}`")
    families = {_plain(name) for spec in catalog.modelspecs for name in spec.names}
    for key in _SAID:
        said = metadata.get(key, "")
        if _plain(said) not in families and (named := _named(said, models)) is not None:
            return Lineage(component.name, models, named, f"`{key}`")
    return Lineage(component.name, models) if models else None


def _named(said: str, models: Iterable[str]) -> str | None:
    """The model that metadata name, whatever the case and what stands between the words."""
    return next((m for m in models if said and _plain(m) == _plain(said)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name[:200].casefold())
