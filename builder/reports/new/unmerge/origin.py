"""What is known of how a component was merged: its parents, and their weights by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from builder.tensors.cast import Precision

BASE = "base"  # what is in no block

Found = Literal["exact", "rounding", "part"]
Arithmetic = Literal["exact", "file"]


@dataclass(frozen=True)
class Share:
    """A block: how much of each parent is in it, and what that does not explain.

    `residual` is the root mean square of what is left, `rounding` that of rounding once to the type of the
    tensors; both as shares of the tensors' own. `explained`: it is no more than a few roundings leave.
    """

    block: str
    tensors: int
    elements: int
    weights: tuple[float, ...]
    residual: float
    rounding: float
    explained: bool


@dataclass(frozen=True)
class Origin:
    """What is known of how a component was merged.

    `parents` are candidates by their number, and `shares` have a weight for each. `found` says how well:
    `exact` where the step made all tensors anew, to the last bit; `rounding` where the sums are right but for
    rounding; `part` where something else is in it, and there is no step. `equal` of the `tensors` were made
    anew; `uncompared` ones have values in a parent that are no numbers, and are in no share. The step is `op`
    of `inputs` (parents by their place in `parents`) with its parameters as an operation takes them, those
    that weigh as of the class alone.
    """

    parents: tuple[int, ...]
    found: Found
    shares: tuple[Share, ...]
    equal: int
    tensors: int
    uncompared: int = 0
    op: str = ""
    inputs: tuple[int, ...] = ()
    params: Mapping[str, Any] | None = None
    arithmetic: Arithmetic = "exact"
    precision: Precision | None = None
