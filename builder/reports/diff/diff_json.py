"""A comparison as one JSON object for programs; its shape is a promise (`schema`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from builder.reports.diff.causes import causes
from builder.reports.diff.compare import Diff, Part, Side, TensorDiff, Total, type_counts
from builder.reports.diff.values import Rounding, Spot
from builder.tensors.lazy import LazyTensor

SCHEMA = 1

Json = dict[str, Any]


def to_json(diff: Diff, full: bool = False) -> Json:
    """The comparison as plain values; what each field means is in docs/commands.md.

    With `full` every tensor that is not the same to the bit is listed, and every one that one file has
    alone; else those whose values differ by more than rounding, and groups of the others.
    """
    a, b = diff.a.checkpoint, diff.b.checkpoint
    return {
        "schema": SCHEMA,
        "same": diff.same,
        "causes": list(causes(diff)),
        "a": _side(diff.a),
        "b": _side(diff.b),
        "header": {
            "same": diff.same_header,
            "metadata": mapping_changes(a.metadata, b.metadata),
            "others": mapping_changes(a.others, b.others),
        },
        "components": [_part(p, a.tensors, b.tensors) for p in diff.parts],
        "full": full,
        "only_a": _alone(diff.only_a, a, full),
        "only_b": _alone(diff.only_b, b, full),
        "values": _total(diff.total),
        "tensors": [_diff(t) for t in diff.tensors if not (t.identical if full else t.alike)],
    }


def _alone(names: Iterable[str], tensors: Mapping[str, LazyTensor], full: bool) -> list[Json]:
    """Tensors that one file has alone, or how many there are of each beginning."""
    if full:
        return [_tensor(n, tensors[n]) for n in sorted(names)]
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [
        {"group": head, "tensors": len(held), "bytes": sum(tensors[n].nbytes for n in held)}
        for head, held in groups.items()
    ]


def mapping_changes(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys that one mapping has alone, and those whose values differ."""
    return {
        "only_a": sorted(a.keys() - b.keys()),
        "only_b": sorted(b.keys() - a.keys()),
        "differ": sorted(k for k in a.keys() & b.keys() if a[k] != b[k]),
    }


def _side(side: Side) -> Json:
    c = side.checkpoint
    return {
        "path": side.path,
        "container": c.container,
        "size": c.size,
        "tensors": len(c),
        "architecture": side.identity.architecture,
        "known": dict(side.known),
    }


def _part(part: Part, a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor]) -> Json:
    return {
        "class": part.cls or None,
        "a": part.a and {"component": part.a.component.name, "prefix": part.a.prefix},
        "b": part.b and {"component": part.b.component.name, "prefix": part.b.prefix},
        "dtypes": {
            "a": type_counts((*(t.pair.a for t in part.tensors), *part.only_a), a),
            "b": type_counts((*(t.pair.b for t in part.tensors), *part.only_b), b),
        },
        "tensors": len(part.tensors),
        "identical": sum(t.identical for t in part.tensors),
        "renamed": sum(t.renamed for t in part.tensors),
        "changed": len(part.changed),
        "only_a": len(part.only_a),
        "only_b": len(part.only_b),
        "values": _total(part.total),
    }


def _total(total: Total) -> Json:
    return {
        "elements": total.elements,
        "differing": total.differing,
        "not_numbers": total.not_numbers,
        "unit": total.unit.code if total.unit else None,
        "ulp": {"max": total.steps, "histogram": _histogram(total.distances)},
        "first": total.first and _place(*total.first),
        "farthest": total.farthest and _place(*total.farthest),
        "largest": total.largest and _place(*total.largest),
    }


def _place(tensor: TensorDiff, spot: Spot) -> Json:
    return {"tensor": tensor.pair.a, **_spot(spot, tensor.shapes[0])}


def _spot(spot: Spot, shape: Sequence[int]) -> Json:
    a, b = (v if math.isfinite(v) else None for v in (spot.a, spot.b))
    apart = spot.difference if a is not None and b is not None else None
    return {"index": list(unravel(spot.at, shape)), "a": a, "b": b, "difference": apart}


def unravel(at: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of an element by its number in C order."""
    index: list[int] = []
    for size in reversed(shape):
        at, rest = divmod(at, max(1, size))
        index.append(rest)
    return tuple(reversed(index))


def _histogram(distances: Sequence[int]) -> list[Json]:
    return [
        {"from": 1 << k - 1, "to": (1 << k) - 1, "count": count}
        for k, count in enumerate(distances)
        if k and count
    ]


def _tensor(name: str, tensor: LazyTensor) -> Json:
    return {"name": name, "dtype": tensor.dtype.code, "shape": list(tensor.shape)}


def _diff(tensor: TensorDiff) -> Json:
    pair, values = tensor.pair, tensor.values
    found: Json = {
        "a": {"name": pair.a, "dtype": tensor.dtypes[0].code, "shape": list(tensor.shapes[0])},
        "b": {"name": pair.b, "dtype": tensor.dtypes[1].code, "shape": list(tensor.shapes[1])},
        "class": pair.cls or None,
        "alike": tensor.alike,
    }
    if values is None:
        return {**found, "values": None}
    shape = tensor.shapes[0]
    return {
        **found,
        "values": {
            "elements": values.elements,
            "differing": values.differing,
            "not_numbers": values.not_numbers,
            "comparable": values.comparable,
            "unit": values.unit.code if values.unit else None,
            "ulp": {"max": values.steps, "histogram": _histogram(values.distances)},
            "first": values.first and _spot(values.first, shape),
            "farthest": values.farthest and _spot(values.farthest, shape),
            "largest": values.largest and _spot(values.largest, shape),
            "rounding": [_rounding(r) for r in values.rounding],
        },
    }


def _rounding(rounding: Rounding) -> Json:
    return {"of": rounding.of, "via": rounding.via.code if rounding.via else None}
