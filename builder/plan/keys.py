"""Under which the store remembers what steps make: keys over what decides bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from builder.models.metric import is_digits
from builder.models.prediction import MARKERS, WORDS, Marker, Prediction, carried
from builder.plan.graph import (
    VERSIONS,
    Beside,
    ComponentJob,
    Job,
    Key,
    OutputJob,
    StepJob,
    marker_data,
    origin_data,
)
from builder.sources.job import SourceJob
from builder.store.records import digest, size, texts
from builder.tensors.digests import Row, expression_key
from builder.tensors.lazy import BY_CODE, DType

if TYPE_CHECKING:
    from builder.models.catalog import Catalog, Component
    from builder.store import Store


def action_key(job: Job, action: Callable[[Key], str | None]) -> str | None:
    """The key of a step or a component with its inputs known by content; None while one is not.

    `action` gives that of each input: of a source, its SHA-256.
    """
    known = {key: action(key) for key in job.inputs}
    if isinstance(job, (SourceJob, OutputJob)) or None in known.values():
        return None
    names = {key: str(name) for key, name in known.items()}
    if isinstance(job, StepJob):
        return job.expression(names)
    assert isinstance(job, ComponentJob)
    origin = origin_data(job.origin, names)
    return expression_key("finish", VERSIONS["finish"], cls=job.cls, origin=origin, **job.params())


def tables(catalog: Catalog, cls: str, component: str | None) -> tuple[str, ...]:
    """Digests of what the catalog says of the components that a slot may be filled with."""
    components = catalog.classes[cls]
    if component is not None:
        components = (catalog.component(component), *components[:1])
    return tuple(_table(c) for c in components)


EMPTY = Row(DType.F32, (0,), blake3().hexdigest())  # that of a marker without a value


@lru_cache(maxsize=256)
def _table(component: Component) -> str:
    rows = sorted((n, list(r.shape), r.optional) for n, r in component.tensors.items())
    text = json.dumps([component.name, component.prefix, component.promote, rows])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def assembly_key(job: OutputJob, components: Mapping[str, str], beside: Mapping[str, Row]) -> str:
    """The key of an output: by what its components are (BLAKE3 by class), not by how they were made.

    `beside` holds the rows of the tensors that lie beside the components.
    """
    return expression_key(
        "assemble",
        VERSIONS["assemble"],
        slots={cls: [*written, components[cls]] for cls, (written, _) in job.slots.items()},
        beside={n: [r.dtype.code, list(r.shape), r.digest] for n, r in beside.items()},
        metadata=dict(job.metadata),
        container=job.container.params(),
    )


def beside_key(sha256: str, beside: Beside) -> str:
    """Under which the store remembers the digests of what of a base lies beside components."""
    return expression_key("beside", VERSIONS["assemble"], base=sha256, names=beside.names)


def recall_beside(store: Store, sha256: str | None, beside: Beside) -> dict[str, Row] | None:
    """The rows of what lies beside an output's components; None until its base was read once."""
    rows = {m.name: Row(m.dtype, m.shape, blake3(m.data).hexdigest()) for m in beside.markers}
    if not beside.names:
        return rows
    if sha256 is None:
        return None

    def parse(fact: dict[str, Any]) -> dict[str, Row]:
        held = {n: fact["tensors"][n] for n in beside.names}
        return {n: Row(BY_CODE[c], tuple(map(size, s)), digest(d)) for n, (c, s, d) in held.items()}

    found = store.recall("beside", beside_key(sha256, beside), parse)
    return rows | found if found is not None else None


def note_beside(store: Store, sha256: str, beside: Beside, rows: Mapping[str, Row]) -> None:
    """Have the rows of what lies beside an output's components remembered."""
    held = {n: [rows[n].dtype.code, list(rows[n].shape), rows[n].digest] for n in beside.names}
    store.note("beside", beside_key(sha256, beside), {"tensors": held})


def _prediction_key(sha256: str) -> str:
    return expression_key("prediction", 1, source=sha256)


def recall_prediction(store: Store, sha256: str | None, catalog: Catalog) -> Prediction | None:
    """What a source says of what its denoiser predicts; None until a build carried that over."""
    if sha256 is None:
        return None

    def parse(fact: dict[str, Any]) -> Prediction:
        markers = (
            Marker(n, BY_CODE[c], tuple(map(size, s)), bytes.fromhex(d)) for n, c, s, d in fact["markers"]
        )
        whole = [m for m in markers if m.name in MARKERS and 8 * len(m.data) == prod(m.shape) * m.dtype.bits]
        words = {k: v for k, v in texts(fact["words"]).items() if k in WORDS}
        if len(whole) < len(fact["markers"]) or len(words) < len(fact["words"]):
            raise ValueError("another version's")
        return carried(whole, words, catalog)

    return store.recall("prediction", _prediction_key(sha256), parse)


class KnownOutput(NamedTuple):
    """What is remembered of an output that was written.

    `files` are the SHA-256 of a folder's small ones; `autov3` is empty where nobody asked for it.
    """

    sha256: str
    size: int
    tensor_digest: str
    metric: str
    files: Mapping[str, str]
    autov3: str = ""


def recall_output(store: Store, action: str) -> KnownOutput | None:
    """What the assembly of this key made; None until it did."""

    def parse(fact: dict[str, Any]) -> KnownOutput:
        metric = str(fact["metric"])
        if metric and not all(map(is_digits, metric.split("/"))):
            raise ValueError("no metric")
        sha256, tensors = digest(fact["sha256"]), digest(fact["tensor_digest"])
        autov3 = fact["autov3"] and digest(fact["autov3"])
        return KnownOutput(sha256, size(fact["size"]), tensors, metric, texts(fact["files"]), autov3)

    return store.recall("output", action, parse)


def note_output(store: Store, action: str, output: KnownOutput) -> None:
    """Have remembered what the assembly of this key made."""
    store.note("output", action, {**output._asdict(), "files": dict(output.files)})


def note_prediction(store: Store, sha256: str, found: Prediction) -> None:
    """Have remembered what a source says of what its denoiser predicts."""
    fact = {"markers": [marker_data(m) for m in found.markers], "words": dict(found.words)}
    store.note("prediction", _prediction_key(sha256), fact)
