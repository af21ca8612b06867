"""What kind of file named tensors make: told by their components, else by names, shapes and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from builder.models.catalog import Catalog, KindRule, ModelRule
from builder.models.identity import Identity
from builder.models.parts import kind
from builder.tensors.packed.schemes import Spec

MANY = 20_000  # tensors; the largest files known have some thousands

_SAID = ("modelspec.architecture", "ss_base_model_version")  # metadata that name the model


class FileKind(NamedTuple):
    """What a file is to programs.

    `kind` is `checkpoint`, or a word as `VAE` for which programs have a folder. `called` says in words what
    it is, where no table of the catalog does; `model` then is the one that it goes with, and `rank` the
    least and the greatest rank of its tensors, where they are known.
    """

    kind: str
    called: str | None = None
    model: str | None = None
    rank: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """All of it in words, as in `a LoRA of SD XL, rank 32`; empty for what the catalog has a name for."""
        of = f" of {self.model}" if self.model else ""
        low, high = self.rank or (0, 0)
        rank = f", rank {low}" if low == high else f", ranks {low} to {high}"
        return f"{self.called}{of}{rank if self.rank else ''}" if self.called else ""


def kind_of_file(
    specs: Mapping[str, Spec], metadata: Mapping[str, str], identity: Identity, catalog: Catalog
) -> FileKind | None:
    """What kind of file these tensors make; None for what is unknown, incomplete, or nearly something known.

    Touches no tensor data.
    """
    if identity.intact and identity.architecture is not None:
        name = identity.architecture
        slots = catalog.architectures[name].slots if name in catalog.architectures else (name,)
        kinds = {kind(s) for s in slots}
        return FileKind(kinds.pop() if len(kinds) == 1 else "checkpoint")
    if identity.matches or not 0 < len(specs) <= MANY or _near(identity):
        return None
    rule = next((r for r in catalog.kinds if _fits(r, specs, metadata)), None)
    if rule is None:
        return None
    models = (m for m in catalog.models if rule.kind in m.of)
    said = [v.casefold() for key in _SAID if (v := metadata.get(key))]
    known = sorted(models, key=lambda m: not any(v.startswith(m.said) for v in said))
    model = next((m.name for m in known if _goes_with(m, specs, said)), None)
    ranks = [s.shape[0] for n, s in specs.items() if s.shape and rule.rank.fit(n)]
    return FileKind(rule.kind, rule.called, model, (min(ranks), max(ranks)) if ranks else None)


def _near(identity: Identity) -> bool:
    """Whether most of a component is there, and not all: such a file may be damaged."""
    return any(
        2 * r.present > r.total and r.component.parameters is not None and r.outdone_by is None
        for r in identity.rejected
    )


def _fits(rule: KindRule, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bool:
    shapes = [s.shape for s in specs.values()]
    return (
        (not rule.any or rule.any.any(specs))
        and all(patterns.any(specs) for patterns in rule.all)
        and (not rule.only or all(map(rule.only.fit, specs)))
        and (rule.most is None or len(specs) <= rule.most)
        and (not rule.last or all(shape and shape[-1] in rule.last for shape in shapes))
        and (rule.rows is None or all(0 < prod(shape[:-1]) <= rule.rows for shape in shapes))
        and (not rule.says or any(key in metadata and p.fit(metadata[key]) for key, p in rule.says.items()))
    )


def _goes_with(rule: ModelRule, specs: Mapping[str, Spec], said: list[str]) -> bool:
    return (
        any(value.startswith(rule.said) for value in said)
        or rule.any.any(specs)
        or (bool(rule.all) and all(patterns.any(specs) for patterns in rule.all))
        or any(s.shape[-1:] == (size,) and p.fit(n) for p, size in rule.sizes for n, s in specs.items())
    )
