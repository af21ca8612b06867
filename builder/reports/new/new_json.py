"""What a model is made of as plain values for programs; their shape is a promise."""

from __future__ import annotations

from typing import Any

from builder.reports.new.describe import Draft
from builder.reports.new.merged import Merged

Json = dict[str, Any]


def to_json(draft: Draft) -> Json:
    """A draft as plain values; what each field means is in docs/commands.md."""
    return {
        "architecture": draft.architecture.name,
        "components": [
            {
                "class": cls,
                "how": taken.how or None,
                "path": str(taken.file.path),
                "component": taken.match.component.name,
                "merge": _merge(draft.merges[cls]) if cls in draft.merges else None,
            }
            for cls, taken in draft.taken.items()
        ],
        "tensor_digest": draft.tensor_digest,
        "same": draft.faithful,
    }


def _merge(merged: Merged) -> Json:
    o = merged.origin
    return {
        "found": o.found,
        "parents": [str(t.file.path) for t in merged.parents],
        "op": o.op or None,
        "inputs": [*o.inputs],
        "arithmetic": o.arithmetic if o.op else None,
        "tensors": o.tensors,
        "equal": o.equal,
        "uncompared": o.uncompared,
        "blocks": [
            {
                "block": s.block,
                "tensors": s.tensors,
                "elements": s.elements,
                "weights": [*s.weights],
                "residual": s.residual,
                "rounding": s.rounding,
                "explained": s.explained,
            }
            for s in o.shares
        ],
    }
