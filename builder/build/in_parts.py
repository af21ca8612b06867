"""Components of sources that are elsewhere, had without the rest of their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from builder.base.errors import CkptError, Problem, SourceError
from builder.build.context import Context
from builder.formats.blob import BlobTensor, FileBlob
from builder.plan.graph import Key, Node, OutputJob, Take, Whole
from builder.plan.taken import match_of
from builder.sources.job import SourceJob
from builder.sources.opened import stoppable
from builder.store import Made


class Parts:
    """What is fetched in parts, and by whose word it is known to be right.

    A part of a file cannot be compared with the file's digest. So it is taken where this store has seen the
    whole file of that digest, and knows what is made of it; else only where `believing` allows it, by the
    lock's word: what is made so is never remembered as what the pinned file gives.
    """

    def __init__(self, context: Context, believing: bool) -> None:
        self._context = context
        self.believing = believing
        self._sources: set[Key] = set()

    def decide(self, key: Key, job: SourceJob, components: list[Key]) -> bool:
        """Whether only `components` of a source that is not here are to be fetched.

        That takes a file that can be read on its host, and of which less than half is wanted.
        """
        context = self._context
        if context.sources.wanted(job).sha256 is None or not context.sources.addresses(job):
            return False
        if any(self._expected(c) is None for c in components) or self._beside(key):
            return False
        try:
            checkpoint = context.sources.open(job).checkpoint
            names = {n for c in components for j, t in self._takes(c) if j is job for n in self._names(j, t)}
        except CkptError:
            return False  # what is wrong shows when the file is had
        size = sum(checkpoint[name].nbytes for name in names)
        if not context.sources.remote(job) or 2 * size >= checkpoint.size:
            return False
        self._sources.add(key)
        for component in components:
            if context.made(component) is None:
                label = context.node(component).label
                word = "that it is of the file that is pinned, only the lock says"
                context.reporter.note(f"{label}: this part of `{job.name}` alone is fetched; {word}")
        return True

    def fetched(self, key: Key) -> bool:
        """Whether a component is of a source of which only parts are here."""
        return bool(self._sources & {k for k, _ in self._context.source_nodes([key])})

    def bring(self, key: Key) -> None:
        """Fetch what a component takes from sources that are not on this machine."""
        from builder.sources.net.remote import fetch_component

        context = self._context
        for job, take in self._takes(key):
            if context.sources.find(job) is not None:
                continue
            opened = context.sources.open(job)
            with opened.lock:  # another component may want the same
                checkpoint = opened.checkpoint
                names = {n: n for n in self._names(job, take) if not _is_here(checkpoint[n])}
                if not names:
                    continue
                # The open file stays readable, and nothing is left behind.
                with context.store.scratch() as folder, stoppable(context.stop):
                    path = Path(folder, "component.safetensors")
                    label = context.node(key).label
                    local = fetch_component(checkpoint, names, path, reporter=context.reporter, task=label)
                checkpoint.tensors |= local.tensors
                checkpoint.blobs = (*checkpoint.blobs, *local.blobs)

    def check(self, node: Node, made: Mapping[str, Made]) -> None:
        """Raise SourceError when a component that was fetched so is not what it is known to be."""
        assert isinstance(node.job, OutputJob)
        for cls, (_, key) in node.job.slots.items():
            if not self.fetched(key):
                continue
            expected, found = self._expected(key), made[cls].digest
            if found != expected:
                known = self._context.made(key) is not None
                than = "it was when the whole file was read" if known else "the lock says"
                raise SourceError(
                    Problem(
                        f"`{self._context.node(key).label}` is not what {than}",
                        evidence=(f"expected BLAKE3 {expected}", f"received BLAKE3 {found}"),
                        hint="`ckpt lock --upgrade` takes the source as it is now",
                    )
                )

    def trusted(self, key: Key) -> bool:
        """Whether what a component is was not taken on somebody's word."""
        return not self.fetched(key) or self._context.made(key) is not None

    def _expected(self, key: Key) -> str | None:
        """The digest that a component must have, by what the store has seen, or by what is believed."""
        made = self._context.made(key)
        if made is not None:
            return made.digest
        locked = self._context.locked(key) if self.believing else None
        return locked.blake3 if locked is not None else None

    def _beside(self, key: Key) -> bool:
        """Whether an output carries tensors or metadata of a source: no digest speaks of those alone."""
        sources = self._context.sources
        for job in (n.job for n in self._context.plan.outputs() if n.state != "unchanged"):
            assert isinstance(job, OutputJob)
            if job.told is not None and job.told[0] == key and (job.told[1].markers or job.told[1].words):
                return True
            if job.base == key:
                source = self._context.node(key).job
                assert isinstance(source, SourceJob)
                if job.beside.names or set(sources.open(source).checkpoint.metadata) - {"format"}:
                    return True
        return False

    def _names(self, job: SourceJob, take: Take | Whole) -> list[str]:
        """The names, in a source's file, of the tensors that are taken."""
        sources = self._context.sources
        if isinstance(take, Whole):
            return list(sources.open(job).checkpoint)
        return list(match_of(job, take, sources).full)

    def _takes(self, key: Key) -> Iterator[tuple[SourceJob, Take | Whole]]:
        """What a component is made of, as sources hold it."""
        for take in self._context.plan.takes(self._context.component(key).origin):
            job = self._context.node(take.node).job
            assert isinstance(job, SourceJob)
            yield job, take


def _is_here(tensor: object) -> bool:
    return not isinstance(tensor, BlobTensor) or isinstance(tensor.blob, FileBlob)
