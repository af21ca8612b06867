"""The keys of a plan's steps: digests of what decides their bytes, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.models.catalog import Component
from builder.plan.graph import Applied, ComponentJob, Finished, Origin, OutputJob, Plan, StepJob, Take
from builder.tensors.cast import PROFILE
from builder.tensors.digests import Digest, tensor_digest

if TYPE_CHECKING:
    from builder.store import Store

# A change of what is made from the same inputs must change its version here.
VERSIONS = {"take": 1, "finish": 1, "assemble": 1}


def key_of(op: str, version: int, **params: Any) -> str:
    """The key of a step: SHA-256, cut to 128 bits, of its operation, version and canonical parameters."""
    said = {"op": op, "version": version, "profile": PROFILE, **params}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def origin_key(plan: Plan, origin: Origin) -> str | None:
    """The key of a component before it is finished; None while a digest is missing."""
    node = plan.node(origin.node)
    if isinstance(origin, Take):
        if node.key is None:
            return None
        return key_of(
            "take",
            VERSIONS["take"],
            cls=origin.cls,
            component=origin.component,
            tables=_tables(origin),
            source=node.key,
        )
    if isinstance(origin, Finished):
        return node.made.digest.xxh3 if node.made is not None else None
    assert isinstance(origin, Applied) and isinstance(node.job, StepJob)
    return step_key(plan, node.job)


def _tables(origin: Take) -> list[str]:
    """What the catalog says of the components that could be meant: another table, another choice."""
    catalog = origin.sources.catalog
    components = catalog.classes[origin.cls]
    if origin.component is not None:
        components = (catalog.component(origin.component), *components[:1])
    return [_table(c) for c in components]


@lru_cache(maxsize=256)
def _table(component: Component) -> str:
    rows = sorted((n, list(r.shape), r.optional) for n, r in component.tensors.items())
    text = json.dumps([component.name, component.prefix, component.promote, rows])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def step_key(plan: Plan, job: StepJob) -> str | None:
    """The key of one class of a step's model."""
    inputs = {p: origin_key(plan, o) for p, o in job.inputs.items()}
    if None in inputs.values():
        return None
    operation = job.operation
    return key_of(operation.name, operation.version, cls=job.cls, params=dict(job.params), inputs=inputs)


def component_key(plan: Plan, job: ComponentJob) -> str | None:
    """The key of a finished component."""
    source = origin_key(plan, job.origin)
    if source is None:
        return None
    return key_of("finish", VERSIONS["finish"], **job.params(), cls=job.cls, input=source)


def assembly_key(job: OutputJob, digests: Mapping[str, str], extras: Mapping[str, Digest]) -> str:
    """The key of an output: by what its components are (XXH3 by node), not by how they were made.

    `extras` holds the digests of the tensors that lie beside the components.
    """
    return key_of(
        "assemble",
        VERSIONS["assemble"],
        slots={cls: [prefix, digests[node]] for cls, (prefix, node) in job.slots.items()},
        extras={n: [t.dtype.code, list(t.shape), extras[n].xxh3] for n, t in job.extras.items()},
        metadata=dict(job.metadata),
        format=output_format(job.target),
    )


def known_extras(plan: Plan, job: OutputJob, store: Store) -> dict[str, Digest] | None:
    """The digests of what lies beside an output's components; None until the base was read once."""
    if job.base is None or not job.extras:
        return {n: tensor_digest(t) for n, t in job.extras.items()}  # markers, which are made here
    sha256 = plan.node(job.base).key
    fact = store.recall("extras", extras_key(sha256, job)) if sha256 is not None else None
    return {n: Digest(*fact[n]) for n in job.extras} if fact is not None else None


def extras_key(sha256: str, job: OutputJob) -> str:
    """Under which the store remembers the digests of a base's optional tensors."""
    return key_of("extras", VERSIONS["assemble"], base=sha256, names=sorted(job.extras))


def output_format(target: Path) -> str:
    """The container of an output, from its file's suffix."""
    return "torch" if target.suffix in {".ckpt", ".pt", ".pth", ".bin"} else "safetensors"
