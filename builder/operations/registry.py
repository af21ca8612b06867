"""The operations that a step may name: what each takes, and how it turns mappings into a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from builder.tensors.lazy import LazyTensor

Kind = Literal["number", "integer", "string", "boolean", "choice", "block-weights"]
Apply = Callable[[Mapping[str, Mapping[str, LazyTensor]], Mapping[str, Any]], Mapping[str, LazyTensor]]


@dataclass(frozen=True)
class Param:
    """A parameter of an operation: its kind, bounds (inclusive) and default (None: it must be given)."""

    kind: Kind
    doc: str
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Operation:
    """A named mapping → mapping.

    `inputs` and `optional_inputs` are the parameters that name a source or a step. `apply` gets the
    inputs' components of one class by parameter name, each a mapping of unprefixed names, and the
    canonical parameters; it returns the component it makes, without computing anything. `version` is part
    of every key: a change of the result must change it.
    """

    name: str
    version: int
    doc: str
    inputs: tuple[str, ...]
    apply: Apply
    optional_inputs: tuple[str, ...] = ()
    params: Mapping[str, Param] = field(default_factory=dict)


OPERATIONS: dict[str, Operation] = {}
