"""What a recipe's sources turned out to be, for its lock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from builder.base.errors import FetchError, LockError, MissingError, Place, Problem
from builder.base.words import command_line
from builder.recipe.lock import Lock, LockedSource, changed
from builder.sources.job import SourceJob, entry_name
from builder.sources.opened import Sources
from builder.tensors.digests import PROFILE

if TYPE_CHECKING:
    from builder.recipe.recipe import Recipe
    from builder.sources.net.hosts import Pin


@contextmanager
def telling_all(recipe: Recipe, sources: Sources, lock: Lock | None) -> Iterator[None]:
    """Have a source that is nowhere told of together with all others that are."""
    try:
        yield
    except MissingError as error:
        told = dict.fromkeys((*_missing(recipe, sources, lock), *error.problems))
        raise MissingError(*told) from None


def source_jobs(
    recipe: Recipe, sources: Sources, lock: Lock | None, scope: tuple[str, ...] = (), root: Path | None = None
) -> Iterator[SourceJob]:
    """The sources of a recipe and of those that it includes, with what the lock says of each."""
    root = root or recipe.path
    for name, spec in recipe.sources.items():
        if spec.recipe is not None:
            yield from source_jobs(recipe.included[name], sources, lock, (*scope, name), root)
            continue
        entry = entry_name((*scope, name))
        locked = lock.sources.get(entry) if lock is not None else None
        yield sources.job(recipe, name, entry, locked, root)


def _missing(recipe: Recipe, sources: Sources, lock: Lock | None) -> Iterator[Problem]:
    """Why each source is nowhere, if it is."""
    for job in source_jobs(recipe, sources, lock):
        if sources.find(job) is None and not sources.remote(job):
            yield from sources.missing(job).problems


def check_lock(recipe: Recipe, lock: Lock) -> None:
    """Raise LockError unless a lock is what this recipe resolves to, as far as the two can tell.

    No source is looked at: that it is what the lock pins, a build finds out.
    """
    pins = _pins(recipe)
    now = {"recipe": recipe.digest, "numeric profile": str(PROFILE)}
    now |= {f"source `{name}`": pin or lock.pins().get(name, "") for name, pin in pins.items()}
    then = {"recipe": lock.recipe, "numeric profile": str(lock.profile)}
    then |= {f"source `{name}`": pin for name, pin in lock.pins().items()}
    if lock.outputs:
        now |= {f"output `{o.name}`": o.file for o in recipe.outputs}
        then |= {f"output `{name}`": o.file for name, o in lock.outputs.items()}
    if changes := changed(then, now) + [f"source `{n}`: not pinned" for n in pins if n not in lock.sources]:
        place = Place(str(recipe.lock))
        hint = f"`{command_line('lock', recipe.path)}` writes it anew"
        raise LockError(Problem("the lock is stale", place, tuple(changes), hint))


def _pins(recipe: Recipe, scope: tuple[str, ...] = ()) -> dict[str, str | None]:
    """The digest that each source is pinned by, if it is, by its name in the lock."""
    found: dict[str, str | None] = {}
    for name, spec in recipe.sources.items():
        if name in recipe.included:
            found |= _pins(recipe.included[name], (*scope, name))
        else:
            found[entry_name((*scope, name))] = spec.sha256
    return found


def resolve_sources(recipe: Recipe, sources: Sources, lock: Lock | None) -> dict[str, LockedSource]:
    """What a recipe's sources are, and those of the recipes it includes.

    A source that is not here is not downloaded where the recipe or the lock pins it, or its host states
    its digest. Raises SourceError when one is not what was pinned, FetchError when it cannot be had.
    """
    found: dict[str, LockedSource] = {}
    for job in source_jobs(recipe, sources, lock):
        pin = _stated(sources, job) if sources.remote(job) else None
        if pin is not None:
            found[job.entry] = _locked(sources, job, str(pin.sha256), pin.url, pin.size)
            continue
        if sources.find(job) is None:
            sources.fetch(job)
        sha256 = str(sources.hash(job).sha256)
        found[job.entry] = _locked(sources, job, sha256, sources.resolved.get(job, ""))
    return found


def _stated(sources: Sources, job: SourceJob) -> Pin | None:
    """What the first host that states a digest says of a source, or the pin that it has; None: unknown.

    A host that cannot be asked, or has another file, is passed over.
    """
    from builder.sources.net.acquire import lookup_by_hash, resolve
    from builder.sources.net.hosts import Pin

    wanted, addresses, session = sources.wanted(job).sha256, sources.addresses(job), sources.session()
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


def locked_sources(entries: Mapping[str, SourceJob], sources: Sources) -> dict[str, LockedSource]:
    """What sources are as far as it is known, by their names in the lock.

    A source whose components were all known may not be on this machine: what the lock says of it stays.
    """
    found = {}
    for entry, job in sorted(entries.items()):
        if (sha256 := sources.sha256(job)) is not None:
            found[entry] = _locked(sources, job, sha256, sources.resolved.get(job, ""))
    return found


def _requested(job: SourceJob) -> str:
    if job.file:
        return PurePosixPath(job.file).name
    if not job.urls:
        return f"sha256:{job.sha256}"
    first = job.urls[0]
    return PurePosixPath(first).name if first.startswith("file:") else first


def _locked(
    sources: Sources, job: SourceJob, sha256: str, resolved: str, size: int | None = None
) -> LockedSource:
    old = job.locked
    if old is None or old.sha256 != sha256:
        old = LockedSource("", sha256, 0)
    size = size or sources.size(job) or old.size
    return LockedSource(_requested(job), sha256, size, resolved or old.resolved)
