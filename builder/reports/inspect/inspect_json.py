"""Reports as one JSON object for programs; its shape is a promise (`schema`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from builder.base.errors import Problem, problem_data
from builder.formats.lost import Lost
from builder.models.identity import Rejection
from builder.reports.inspect.examine import Part, Report, Share
from builder.reports.inspect.positions import Position

SCHEMA = 1
EXAMPLES = 5

Json = dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A file that could not be inspected, and why."""

    path: str
    problems: tuple[Problem, ...]


def to_json(reports: Iterable[Report | Refused]) -> Json:
    """The reports as plain values, in their order; what each field means is in docs/inspect.md."""
    return {"schema": SCHEMA, "files": [_refused(r) if isinstance(r, Refused) else _file(r) for r in reports]}


def _refused(refused: Refused) -> Json:
    return {"path": refused.path, "error": [problem_data(p) for p in refused.problems]}


def _file(report: Report) -> Json:
    identity = report.identity
    return {
        "path": report.path,
        "container": report.container,
        "size": report.size,
        "architecture": identity.architecture,
        "intact": identity.intact,
        "kind": report.kind and report.kind.kind,
        "described": (report.kind and report.kind.text) or None,
        "incomplete": {"architecture": identity.incomplete, "absent": list(identity.absent)}
        if identity.incomplete
        else None,
        "absent": list(identity.absent),
        "lineage": report.lineage and report.lineage._asdict(),
        "components": [_part(p) for p in report.parts],
        "types": {t: {"tensors": n, "bytes": size} for t, (n, size) in report.types.items()},
        "packed": [
            {
                "component": q.component,
                "weights": q.weights,
                "schemes": dict(q.schemes),
                "bits_per_weight": round(q.bits, 3) if q.bits is not None else None,
            }
            for q in report.quantized
        ],
        "metric": report.metric.text if report.metric else None,
        "known": {
            "file": report.published and report.published.name,
            "model": report.model,
            "components": {p.match.component.name: p.known for p in report.parts if p.known},
        },
        "junk": _share(report.junk),
        "ema": {
            "component": next((p.match.component.name for p in report.parts if p.match.ema), None),
            **_share(report.ema),
        },
        "precision_waste": report.precision_waste,
        "pruned": report.pruned,
        "position_ids": {
            "tensors": {
                n: {"dtype": t.dtype.code, "shape": list(t.shape)}
                for n, t in report.positions.tensors.items()
            },
            "wrong": [_position(p) for p in report.positions.wrong],
        },
        "prediction": {
            "kind": report.prediction.kind,
            "zero_snr": report.prediction.zero_snr,
            "markers": list(report.prediction.names),
            "signs": [{"says": s.kind, "what": s.what} for s in report.prediction.signs],
        },
        "non_finite": {n: {"nan": s.nan, "infinite": s.infinite} for n, s in report.non_finite.items()},
        "zeros": [_lost(z) for z in report.lost],
        "faults": [problem_data(p) for p in report.faults],
        "rejected": [_rejection(r) for r in identity.rejected],
        "notes": list(identity.notes),
        "unknown": list(identity.unknown),
        "optional": list(identity.optional),
        "scales": list(identity.scales),
        "globals": list(report.globals),
        "nesting": report.nesting,
        "others": dict(report.others),
        "metadata": dict(report.metadata),
        "hashes": dict(report.hashes),
    }


def _part(part: Part) -> Json:
    match = part.match
    return {
        "class": match.component.cls,
        "component": match.component.name,
        "prefix": match.prefix,
        "tensors": part.tensors,
        "digest": part.digest and f"blake3:{part.digest}",
        "parameters": part.parameters,
        "bytes": part.bytes,
        "dtypes": dict(part.dtypes),
        "rank": list(match.rank) if match.rank else None,
        "missing_optional": list(match.missing_optional),
        "companions": list(match.companions),
    }


def _share(share: Share) -> Json:
    return {"keys": share.keys, "bytes": share.bytes}


def _position(p: Position) -> Json:
    value = p.value if math.isfinite(p.value) else None
    return {"tensor": p.tensor, "position": p.position, "value": value, "loaded": p.loaded}


def _lost(lost: Lost) -> Json:
    return {
        "file": lost.file,
        "offset": lost.offset,
        "length": lost.length,
        "tensors": list(lost.tensors),
        "wholly": list(lost.wholly),
    }


def _rejection(r: Rejection) -> Json:
    return {
        "class": r.component.cls,
        "component": r.component.name,
        "prefix": r.prefix,
        "present": r.present,
        "total": r.total,
        "missing": _some(r.missing, r.missing[:EXAMPLES]),
        "misshapen": _some(
            r.misshapen,
            [
                {"name": m.name, "expected": list(m.expected), "found": list(m.found)}
                for m in r.misshapen[:EXAMPLES]
            ],
        ),
        "outdone_by": r.outdone_by,
    }


def _some(everything: Sequence[Any], examples: Sequence[Any]) -> Json:
    return {"count": len(everything), "examples": list(examples)}
