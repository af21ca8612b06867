"""Which outputs are written at once, in passes that read once what they have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from builder.base.descriptors import files_at_once
from builder.plan.graph import Key, OutputJob, Plan
from builder.sources.job import SourceJob


def written_at_once(plan: Plan, outputs: Sequence[Key]) -> list[list[Key]]:
    """The outputs that have sources in common, at most `files_at_once()` of them, like beside like.

    A folder in diffusers' layout has its tensors in an order of its own: it is written beside its like alone.
    """
    order = {n.key: i for i, n in enumerate(plan) if isinstance(n.job, SourceJob)}
    by_layout: dict[str, dict[Key, tuple[Key, ...]]] = {}
    for key in outputs:
        sources = tuple(sorted(plan.ancestors(key) & order.keys(), key=order.__getitem__))
        by_layout.setdefault(_job(plan, key).container.layout, {})[key] = sources
    found = [g for own in by_layout.values() for keys in _related(own) for g in _cut(plan, keys, own)]
    place = {key: n for n, key in enumerate(outputs)}
    return sorted(found, key=lambda keys: place[keys[0]])


def _related(sources: Mapping[Key, Sequence[Key]]) -> list[list[Key]]:
    """The outputs that have sources in common, with each other or with one between them."""
    users: dict[Key, list[Key]] = {}
    for key, own in sources.items():
        for source in own:
            users.setdefault(source, []).append(key)
    place = {key: n for n, key in enumerate(sources)}
    left, found = set(sources), []
    for first in sources:
        if first not in left:
            continue
        group = {first: None}
        near = [first]
        while near:
            more = [k for source in sources[near.pop()] for k in users.pop(source, ()) if k not in group]
            near += dict.fromkeys(more)
            group |= dict.fromkeys(more)
        left -= group.keys()
        found.append(sorted(group, key=place.__getitem__))
    return found


def _cut(plan: Plan, keys: Sequence[Key], sources: Mapping[Key, Sequence[Key]]) -> Iterator[list[Key]]:
    """As many outputs as are written at once; where that is not all, those with the same sources together."""
    files = {key: _files(plan, key) for key in keys}
    most = files_at_once()
    if sum(files.values()) > most:
        keys = sorted(keys, key=lambda k: tuple(sources[k]))
    few: list[Key] = []
    for key in keys:
        if few and sum(files[k] for k in few) + files[key] > most:
            yield few
            few = []
        few.append(key)
    yield few


def _files(plan: Plan, key: Key) -> int:
    """How many files an output is at most, as far as they are written at once."""
    job, size = _job(plan, key), plan.nodes[key].writes or 0
    parts = len(job.slots) + 1 if job.container.layout else 1  # and one for the rest
    shards = 2 * size // job.container.shard_size if job.container.shard_size else 0
    return min(files_at_once(), parts + shards)


def _job(plan: Plan, key: Key) -> OutputJob:
    job = plan.nodes[key].job
    assert isinstance(job, OutputJob)
    return job
