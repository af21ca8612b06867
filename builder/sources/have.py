"""Having a recipe's sources, and saying what they turned out to be."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from builder.base.errors import FetchError
from builder.base.progress import SILENT, Reporter
from builder.recipe.lock import LockedSource
from builder.sources.find import Found, verify_source
from builder.sources.opened import Sources
from builder.store import Store

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.sources.net.hosts import Pin


def see(sources: Sources, name: str, catalog: Catalog, store: Store, reporter: Reporter) -> Found:
    """Have a source and its digest, hashing it unless that is remembered.

    Raises SourceError when it is not what was pinned, FetchError when it cannot be had.
    """
    found = sources.find(name)
    if found is None:
        found = sources.fetch(name)
    seen = verify_source(
        found,
        sources.wanted(name).sha256,
        store=store,
        known=lambda sha256: file.name if (file := catalog.known.file(sha256)) is not None else None,
        reporter=reporter,
    )
    sources.provide(name, seen)
    return seen


def resolve_sources(
    sources: Sources, *, catalog: Catalog, store: Store, reporter: Reporter = SILENT
) -> dict[str, LockedSource]:
    """What a recipe's sources are, and those of the recipes it includes; raises as `see`.

    A source that is not here is not downloaded where the recipe or the lock pins it, or its host states
    its digest.
    """
    locked: dict[str, LockedSource] = {}
    for name, spec in sources.recipe.sources.items():
        if spec.recipe is not None:
            locked |= resolve_sources(sources.inner(name), catalog=catalog, store=store, reporter=reporter)
            continue
        pin = _stated(sources, name) if sources.remote(name) else None
        if pin is None:
            sha256 = str(see(sources, name, catalog, store, reporter).sha256)
            made = locked_source(sources, name, sha256, sources.resolved.get(name, ""))
        else:
            made = locked_source(sources, name, str(pin.sha256), pin.url, pin.size)
        locked[sources.scope + name] = made
    return locked


def _stated(sources: Sources, name: str) -> Pin | None:
    """What the first host that states a digest says of a source, or the pin that it has; None: unknown.

    A host that cannot be asked, or has another file, is passed over.
    """
    from builder.sources.net.acquire import lookup_by_hash, resolve
    from builder.sources.net.hosts import Pin

    wanted, addresses, session = sources.wanted(name).sha256, sources.addresses(name), sources.session()
    silent = False
    for address in addresses:
        with suppress(FetchError):
            pin = resolve(address, session=session)
            if pin.sha256 is not None and wanted in {None, pin.sha256}:
                return pin
            silent |= pin.sha256 is None
    if wanted is None:
        return None
    if not addresses:
        with suppress(FetchError):
            return lookup_by_hash(wanted, session=session) or Pin("", wanted)
    return Pin("", wanted) if silent or not addresses else None


def _requested(sources: Sources, name: str) -> str:
    spec = sources.spec(name)
    if spec.file:
        return PurePosixPath(spec.file).name
    if not spec.urls:
        return f"sha256:{spec.sha256}"
    first = spec.urls[0]
    return PurePosixPath(first).name if first.startswith("file:") else first


def locked_source(
    sources: Sources, name: str, sha256: str, resolved: str, size: int | None = None
) -> LockedSource:
    """What is to be locked of a source; what the lock says of the same file stays."""
    old = sources.locked(name)
    if old is None or old.sha256 != sha256:
        old = LockedSource("", sha256, 0)
    size = size or sources.size(name) or old.size
    return LockedSource(_requested(sources, name), sha256, size, resolved or old.resolved)
