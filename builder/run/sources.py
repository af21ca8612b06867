"""Having a plan's sources, and saying what they turned out to be."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from builder.lock import Lock, LockedSource
from builder.plan import Node, Plan, SourceJob
from builder.plan.metadata import recipe_digest
from builder.progress import SILENT, Reporter
from builder.sources import verify_source
from builder.store import Store

if TYPE_CHECKING:
    from builder.catalog import Catalog


def see(node: Node, catalog: Catalog, store: Store, reporter: Reporter) -> None:
    """Have the source of a node and its digest, hashing it unless that is remembered.

    Raises SourceError when it is not what was pinned, FetchError when it cannot be had.
    """
    job = node.job
    assert isinstance(job, SourceJob)
    found = job.sources.find(job.source)
    if found is None:
        raise job.sources.missing(job.source)
    seen = verify_source(
        found,
        job.sources.spec(job.source).sha256,
        store=store,
        known=lambda sha256: file.name if (file := catalog.known.file(sha256)) is not None else None,
        reporter=reporter,
    )
    job.sources.provide(job.source, seen)
    node.key = seen.sha256


def resolve_sources(plan: Plan, *, catalog: Catalog, store: Store, reporter: Reporter = SILENT) -> Lock:
    """The lock of a plan's sources, none of its components or outputs; raises as `see`."""
    for node in plan:
        if isinstance(node.job, SourceJob):
            see(node, catalog, store, reporter)
    return Lock(recipe_digest(plan.recipe), locked_sources(plan, None))


def locked_sources(plan: Plan, before: Lock | None) -> dict[str, LockedSource]:
    """What the sources of the recipe itself (not of those it includes) are, as far as it is known.

    A source whose components were all stored may not be on this machine: what `before` says of it stays.
    """
    sources = {}
    for node in plan:
        job = node.job
        if not isinstance(job, SourceJob) or node.key is None or job.sources is not plan.sources[0]:
            continue
        spec, found = job.sources.spec(job.source), job.sources.find(job.source)
        old = before.sources.get(job.source) if before is not None else None
        size = found.size if found is not None else spec.size or (old.size if old is not None else 0)
        requested = PurePosixPath(spec.file).name if spec.file else next(iter(spec.urls), "")
        sources[job.source] = LockedSource(requested, node.key, size, old.resolved if old is not None else "")
    return sources
