"""Weights of a merge: a number, or one for each class, block of a UNET, and pattern over tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

# Canonical weights are a float, or a table of what is given:
#   base    a float: of all that nothing else speaks of
#   blocks  floats by block
#   parts   by class or by its first word (`UNET`): weights again, without parts and tensors
#   tensors pairs of a pattern over unprefixed names and a float, of which the last that matches holds
Weights = float | Mapping[str, Any]


def of_class(weights: Weights, cls: str, blocks: Iterable[str] = ()) -> Weights:
    """What weights say of one class: a float, or a table of `base`, `blocks` (of those it has), `tensors`.

    A class without blocks has the base alone.
    """
    if not isinstance(weights, Mapping):
        return weights
    own = _own(weights, cls)
    tensors = weights.get("tensors", [])
    base = own.get("base", weights.get("base", 0.0))
    held = {b: w for b, w in own.get("blocks", {}).items() if b in blocks and w != base}
    if not held and not tensors:
        return float(base)
    return {"base": base, **({"blocks": held} if held else {}), **({"tensors": tensors} if tensors else {})}


def _own(weights: Mapping[str, Any], cls: str) -> Mapping[str, Any]:
    """What is said of a class: of itself, of its first word, or else of all."""
    parts = weights.get("parts", {})
    own = parts.get(cls, parts.get(cls.partition("-")[0], weights))
    return own if isinstance(own, Mapping) else {"base": own}


def blocks_of(weights: Weights, cls: str) -> tuple[str, ...]:
    """The blocks that weights of a class name."""
    return tuple(_own(weights, cls).get("blocks", {})) if isinstance(weights, Mapping) else ()


def is_given(weights: Weights, cls: str) -> bool:
    """Whether weights speak of a class by name."""
    parts = weights.get("parts", {}) if isinstance(weights, Mapping) else {}
    return cls in parts or cls.partition("-")[0] in parts


def by_tensor(weights: Weights, names: Iterable[str], block: Callable[[str], str | None]) -> dict[str, float]:
    """The weight of each tensor, of weights that are `of_class`."""
    if not isinstance(weights, Mapping):
        return dict.fromkeys(names, float(weights))
    base, blocks = weights["base"], weights.get("blocks", {})
    found = {name: blocks.get(block(name), base) if blocks else base for name in names}
    for pattern, weight in weights.get("tensors", []):
        found |= {name: weight for name in found if fnmatchcase(name, pattern)}
    return found


def patterns(weights: Weights) -> tuple[str, ...]:
    """The patterns over tensors' names that weights hold."""
    return tuple(p for p, _ in weights.get("tensors", [])) if isinstance(weights, Mapping) else ()
