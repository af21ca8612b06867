"""Components of sources that are elsewhere, had without the rest of their files and held to the lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from builder.base.errors import CkptError, Problem, SourceError
from builder.base.progress import Reporter
from builder.formats.blob import BlobTensor, FileBlob
from builder.plan import Node, Plan, SourceJob
from builder.plan.graph import Applied, ComponentJob, Origin, OutputJob, StepJob, Take
from builder.plan.resolve import full_names
from builder.recipe.lock import LockedComponent, LockedOutput
from builder.store import Store
from builder.tensors.cast import PROFILE


def in_parts(plan: Plan, source: Node, wanted: Iterable[Node]) -> bool:
    """Whether only the components `wanted` of a source are to be fetched.

    That takes a file that can be read on its host and of which less than half is wanted; and a lock that
    says what each component must be, as the digest of the whole file cannot be compared.
    """
    job = source.job
    assert isinstance(job, SourceJob)
    if source.state != "fetch" or source.key is None or not job.sources.addresses(job.source):
        return False
    if any(_pinned(plan, node) is None for node in wanted):
        return False
    try:
        checkpoint = job.sources.open(job.source).checkpoint
        takes = {t for node in wanted for t in _takes(plan, node) if t.node == source.id}
        names = {name for take in takes for name in full_names(take)}
    except CkptError:
        return False  # what is wrong shows when the file is had
    size = sum(checkpoint[name].nbytes for name in names)
    return job.sources.remote(job.source) and 2 * size < checkpoint.size


def bring(plan: Plan, node: Node, store: Store, reporter: Reporter) -> None:
    """Fetch what a component takes from sources that are not on this machine; raises as `fetch_component`."""
    from builder.sources.net.remote import fetch_component

    for take in _takes(plan, node):
        if not take.sources.remote(take.source):
            continue
        opened = take.sources.open(take.source)
        with opened.lock:  # another step may want the same
            checkpoint = opened.checkpoint
            names = {n: n for n in full_names(take) if not _is_here(checkpoint[n])}
            if not names:
                continue
            with store.scratch() as folder:  # the open file stays readable, and nothing is left behind
                path = folder / "component.safetensors"
                local = fetch_component(checkpoint, names, path, reporter=reporter, task=node.id)
            checkpoint.tensors |= local.tensors
            checkpoint.blobs = (*checkpoint.blobs, *local.blobs)


def hold_to_lock(plan: Plan, node: Node) -> None:
    """Raise SourceError when a component of which a source is elsewhere is not what the lock says."""
    assert isinstance(node.job, ComponentJob) and node.made is not None
    if any(take.sources.remote(take.source) for take in _takes(plan, node)):
        locked = _pinned(plan, node)
        _compare(node.id, locked.sha256 if locked is not None else None, node.made.digest.sha256)


def hold_output_to_lock(plan: Plan, node: Node, tensor_digest: str) -> None:
    """Raise SourceError when an output does not consist of what the lock says, as `hold_to_lock`."""
    assert isinstance(node.job, OutputJob)
    sources = [plan.node(n) for n in plan.ancestors(node.id)]
    if any(isinstance(s.job, SourceJob) and s.job.sources.opened_remotely(s.job.source) for s in sources):
        locked = _locked(plan, node.job)
        _compare(node.id, locked.tensor_digest if locked is not None else None, tensor_digest)


def _compare(what: str, expected: str | None, found: str | None) -> None:
    if found != expected:
        raise SourceError(
            Problem(
                f"`{what}` is not what the lock says",
                evidence=(f"expected SHA-256 {expected}", f"received SHA-256 {found}"),
                hint="`ckpt lock --upgrade` takes the source as it is now",
            )
        )


def _is_here(tensor: object) -> bool:
    return not isinstance(tensor, BlobTensor) or isinstance(tensor.blob, FileBlob)


def _takes(plan: Plan, node: Node) -> Iterator[Take]:
    """What a component is made of, as sources hold it."""
    assert isinstance(node.job, ComponentJob)
    origins: list[Origin] = [node.job.origin]
    while origins:
        origin = origins.pop()
        if isinstance(origin, Take):
            yield origin
        elif isinstance(origin, Applied):
            step = plan.node(origin.node).job
            assert isinstance(step, StepJob)
            origins += step.inputs.values()


def _is_of_this_recipe(plan: Plan) -> bool:
    """Whether the lock speaks of what this very recipe makes."""
    lock = plan.lock
    return lock is not None and (lock.recipe, lock.profile) == (plan.recipe.digest, PROFILE)


def _pinned(plan: Plan, node: Node) -> LockedComponent | None:
    """What the lock says of a component, wherever it is used."""
    jobs = [o.job for o in plan.outputs() if isinstance(o.job, OutputJob)] if _is_of_this_recipe(plan) else []
    for job in jobs:
        for cls, (_, name) in job.slots.items():
            if name == node.id and plan.lock is not None:
                return plan.lock.component(job.output.name, cls)
    return None


def _locked(plan: Plan, job: OutputJob) -> LockedOutput | None:
    lock = plan.lock if _is_of_this_recipe(plan) else None
    return lock.outputs.get(job.output.name) if lock is not None else None
