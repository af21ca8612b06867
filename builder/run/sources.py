"""Having a plan's sources, and saying what they turned out to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from builder.errors import Problem, SourceError
from builder.lock import Lock, LockedSource
from builder.plan import Node, Plan, SourceJob, Sources
from builder.progress import SILENT, Reporter
from builder.sources import verify_source
from builder.store import Store

if TYPE_CHECKING:
    from builder.catalog import Catalog
    from builder.fetch.client import Session
    from builder.fetch.hosts import Pin


def see(node: Node, catalog: Catalog, store: Store, reporter: Reporter) -> None:
    """Have the source of a node and its digest, hashing it unless that is remembered.

    Raises SourceError when it is not what was pinned, FetchError when it cannot be had.
    """
    job = node.job
    assert isinstance(job, SourceJob)
    found = job.sources.find(job.source)
    if found is None:
        found = job.sources.fetch(job.source)
    seen = verify_source(
        found,
        job.sources.spec(job.source).sha256,
        store=store,
        known=lambda sha256: file.name if (file := catalog.known.file(sha256)) is not None else None,
        reporter=reporter,
    )
    job.sources.provide(job.source, seen)
    node.key = seen.sha256


def resolve_sources(
    plan: Plan, *, catalog: Catalog, store: Store, network: Callable[[], Session], reporter: Reporter = SILENT
) -> Lock:
    """The lock of a plan's sources, none of its components or outputs; raises as `see`.

    A source that is not here and whose host states its digest is pinned without being downloaded.
    """
    resolved = {}
    for node in plan:
        if not isinstance(node.job, SourceJob):
            continue
        sources, name = node.job.sources, node.job.source
        pin = _stated(sources, name, network) if sources.remote(name) else None
        if pin is None:
            see(node, catalog, store, reporter)
        else:
            node.key = pin.sha256
            resolved[name] = LockedSource(_requested(sources, name), str(pin.sha256), pin.size or 0, pin.url)
    return Lock(plan.recipe.digest, {**locked_sources(plan), **resolved})


def _stated(sources: Sources, name: str, network: Callable[[], Session]) -> Pin | None:
    """What the first host that states a digest says of a source; raises SourceError against the pin."""
    from builder.fetch.acquire import resolve

    pinned = sources.pin(name)
    for address in sources.addresses(name):
        pin = resolve(address, session=network())
        if pin.sha256 is None:
            continue
        if pinned is not None and pin.sha256 != pinned:
            raise SourceError(
                Problem(
                    f"`{name}` is not what was pinned",
                    evidence=(f"pinned SHA-256: {pinned}", f"its host says:  {pin.sha256}", f"at {address}"),
                    hint="`ckpt lock --upgrade` takes the file as it is now, unless the recipe pins it",
                )
            )
        return pin
    return None


def _requested(sources: Sources, name: str) -> str:
    spec = sources.spec(name)
    if spec.file:
        return PurePosixPath(spec.file).name
    first = next(iter(spec.urls), "")
    return PurePosixPath(first).name if first.startswith("file:") else first


def locked_sources(plan: Plan) -> dict[str, LockedSource]:
    """What the sources of the recipe itself (not of those it includes) are, as far as it is known.

    A source whose components were all stored may not be on this machine: what the lock says of it stays.
    """
    sources = {}
    for node in plan:
        job = node.job
        if not isinstance(job, SourceJob) or node.key is None or job.sources is not plan.sources[0]:
            continue
        spec, found = job.sources.spec(job.source), job.sources.find(job.source)
        old = plan.lock.sources.get(job.source) if plan.lock is not None else None
        size = found.size if found is not None else spec.size or (old.size if old is not None else 0)
        requested = _requested(job.sources, job.source)
        resolved = job.sources.resolved.get(job.source) or (old.resolved if old is not None else "")
        sources[job.source] = LockedSource(requested, node.key, size, resolved)
    return sources
