"""Sources found, opened, fetched and hashed: all of a plan that lives, and none of it in the plan."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from builder.base.addresses import LocalFile, parse_address
from builder.base.errors import CkptError, FetchError, Place, Problem, RecipeError, SourceError
from builder.base.inside import is_inside, leads_out
from builder.base.parallel import Cancelled
from builder.base.progress import Reporter
from builder.formats.blob import FileBlob, checking
from builder.formats.checkpoint import Checkpoint
from builder.formats.hashes import sha256_blob
from builder.formats.open import open_checkpoint
from builder.models.identify import identify
from builder.models.identity import Identity
from builder.recipe.read import outside
from builder.sources.find import BESIDE, Found, find_source, hash_files, not_pinned, set_digest, this_file
from builder.sources.job import SourceJob

if TYPE_CHECKING:
    from builder.models.catalog import Catalog, Known
    from builder.recipe.lock import LockedSource
    from builder.recipe.recipe import Recipe
    from builder.sources.net.client import Session
    from builder.store import Store


@dataclass
class OpenSource:
    """A source's table of contents, and what it is; who fetches tensors of a remote one holds `lock`."""

    checkpoint: Checkpoint
    identity: Identity
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> list[FileBlob]:
        """The local files that its tensors lie in."""
        return [b for b in self.checkpoint.blobs if isinstance(b, FileBlob)]


class Sources:
    """The live side of a plan's sources; close it, or use it in `with`. Serves several threads.

    `folders` are searched for files; `network` opens the network, None where there is none. `environment`
    says where other programs keep downloads. With `outside`, recipes may name files anywhere.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        folders: Sequence[Path],
        network: Callable[[], Session] | None,
        reporter: Reporter,
        environment: Mapping[str, str] = MappingProxyType({}),
        outside: bool = False,
    ) -> None:
        self.catalog = catalog
        self.store = store
        self._folders = folders
        self._network = network
        self._session: Session | None = None
        self._reporter = reporter
        self._environment = environment
        self._outside = outside
        self._found: dict[object, Found | FetchError] = {}
        self._open: dict[SourceJob, OpenSource] = {}
        self._closed: list[OpenSource] = []
        self._unseen: dict[SourceJob, str | None] = {}
        self._bounds: dict[tuple[Path, str | None], tuple[Path, ...]] = {}  # folders that files are to lie in
        self._refused: set[Path] = set()
        self._guard = threading.RLock()
        self._told: dict[SourceJob, tuple[str, int]] = {}
        self.resolved: dict[SourceJob, str] = {}

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        with self._guard:
            for opened in (*self._open.values(), *self._closed):
                opened.checkpoint.close()
            self._open.clear()
            self._closed.clear()
            self._session = None

    # -- what a recipe means

    def job(
        self, recipe: Recipe, name: str, entry: str, locked: LockedSource | None, root: Path | None = None
    ) -> SourceJob:
        """A source of a recipe as a value; `entry` is its name in the lock.

        `root` is the recipe that is built, which may include this one: what lies in its folder may be named.
        Raises RecipeError for a file that lies elsewhere.
        """
        spec = recipe.sources[name]
        self._check_inside(recipe, name, root, locked)
        job = SourceJob(
            identity="",
            name=name,
            entry=entry,
            folder=recipe.path.parent if recipe.path else Path(),
            file=spec.file,
            sha256=spec.sha256,
            size=spec.size,
            urls=spec.urls,
            locked=locked,
            place=recipe.place("sources", name),
        )
        if (pinned := self.wanted(job).sha256) is not None:
            identity = f"sha256:{pinned}"
        elif isinstance(found := self._search(job), Found):
            identity = f"file:{os.path.realpath(found.path)}"
        else:
            identity = "at:" + "\n".join([*spec.urls, str(job.folder / (spec.file or name))])
        return replace(job, identity=identity)

    def _check_inside(
        self, recipe: Recipe, name: str, root: Path | None, locked: LockedSource | None
    ) -> None:
        """Raise RecipeError when a source lies elsewhere than in the recipe's folder and those of models.

        By the recipe, or by its lock, which is as much a stranger's.
        """
        if recipe.path is None or recipe.own or self._outside:
            return
        spec, folder = recipe.sources[name], recipe.path.parent
        allowed = (*self._folders, *([root.parent] if root is not None else []))
        self._bounds[folder, spec.file] = (folder, *allowed)
        local = [("file", spec.file, spec.file)] if spec.file is not None else []
        for url in (*spec.urls, *([locked.resolved] if locked is not None and locked.resolved else [])):
            where = parse_address(url)
            if isinstance(where, LocalFile):
                local.append(("urls", url, where.path))
        for key, said, path in local:
            if (why := leads_out(folder, path, allowed)) is not None:
                place = recipe.place("sources", name, key, value=True)
                raise RecipeError(outside(said, why, place, source=True))

    def file(self, path: Path) -> SourceJob:
        """A file of this machine as a source: the one that a recipe means which names it without a pin.

        Raises SourceError when it cannot be there: who names a file means no namesake elsewhere.
        """
        if not os.path.exists(path):  # noqa: PTH110 - which raises nothing
            FileBlob(path).close()  # which says why
        known_as = f"file:{os.path.realpath(path)}"
        job = SourceJob(known_as, path.name, "", path.parent, path.name, None, None, (), None, None)
        with self._guard:  # it is this very file that is meant: what is wrong with it shows when it is opened
            if job not in self._found:
                self._found[job] = this_file(path, self.store)
        return job

    def check_there(self, paths: Iterable[Path]) -> None:
        """Raise SourceError for the files that cannot be there, all of them at once, before any is read."""
        problems: list[Problem] = []
        for path in dict.fromkeys(paths):
            try:
                self.file(path)
            except SourceError as error:
                problems += error.problems
        if problems:
            raise SourceError(*problems)

    def wanted(self, job: SourceJob) -> SourceJob:
        """A source with the digest and the size that it must have, by the recipe or by the lock.

        A source without an address is a file of this machine, which may change; its lock follows.
        """
        locked = job.locked
        if locked is None or job.sha256 not in {locked.sha256, None}:
            return job
        if job.sha256 is None and not self.addresses(job):
            return job
        return replace(job, sha256=locked.sha256, size=job.size or locked.size or None)

    def addresses(self, job: SourceJob) -> list[str]:
        """Where a source can be had from: as the lock resolved it, then as the recipe says."""
        resolved = [job.locked.resolved] if job.locked is not None and job.locked.resolved else []
        return list(dict.fromkeys([*resolved, *job.urls]))

    # -- finding

    def find(self, job: SourceJob) -> Found | None:
        """The local file of a source, or None when it is nowhere on this machine; nothing is hashed."""
        with self._guard:
            known = self._found.get(job)
            if not isinstance(known, Found):
                known = self._search(job)
                self._found[job] = known
            return known if isinstance(known, Found) else None

    def _search(self, job: SourceJob) -> Found | FetchError:
        where = (job.folder, job.file, job.sha256, job.size, job.urls, job.locked)
        with self._guard:
            if where not in self._found:
                try:
                    self._found[where] = find_source(
                        self.wanted(job),
                        folder=job.folder,
                        model_folders=self._folders,
                        store=self.store,
                        refused=self._refused,
                        environment=self._environment,
                        reporter=self._reporter,
                        check=self._check_place(job),
                    )
                except FetchError as error:
                    self._found[where] = error
            return self._found[where]

    def missing(self, job: SourceJob) -> CkptError:
        """Why a source is nowhere to be found."""
        found = self._search(job)
        assert isinstance(found, FetchError)
        return found

    def remote(self, job: SourceJob) -> bool:
        """Whether a source is not here, but may be had from somewhere."""
        known = self.addresses(job) or job.sha256 is not None
        return self.find(job) is None and self._network is not None and bool(known)

    def sha256(self, job: SourceJob) -> str | None:
        """The digest of a source as it is pinned, or as it is remembered of the file; None: unknown."""
        found = self.find(job)
        here = found.sha256 if found is not None else self.wanted(job).sha256
        return job.sha256 or here or self._told.get(job, (None, 0))[0]

    def tell(self, job: SourceJob, sha256: str, size: int) -> None:
        """Take another machine's word for what a source is, until it is read here."""
        self._told[job] = sha256, size

    def size(self, job: SourceJob) -> int | None:
        """The bytes of a source, as far as they are known."""
        if (found := self.find(job)) is not None:
            return found.size
        opened = self._open.get(job)
        known = opened.checkpoint.size if opened is not None else self._told.get(job, ("", None))[1]
        return self.wanted(job).size or known

    def another(self, job: SourceJob, path: Path) -> bool:
        """Refuse the file that was found for a source; whether there is another that may be it.

        Of several recipes that have the source, each may ask.
        """
        with self._guard:
            if path in self._refused:
                return self.find(job) is not None or self.remote(job)
            found = self._found.pop(job, None)
            if not isinstance(found, Found) or found.how == BESIDE:
                return False
            self._refused.add(found.path)
            if (opened := self._open.pop(job, None)) is not None:
                self._closed.append(opened)
            self._found.clear()
            return self.find(job) is not None or self.remote(job)

    def refuse_others(self) -> bool:
        """Read what was taken for pinned sources by name or size, and refuse a file that is another one.

        Says whether one was refused.
        """
        with self._guard:
            guessed = [
                (job, found)
                for job, found in self._found.items()
                if isinstance(job, SourceJob) and isinstance(found, Found) and found.how != BESIDE
            ]
        for job, found in guessed:
            pinned = self.wanted(job).sha256
            if pinned is not None and self._is_other(found, pinned):
                self.another(job, found.path)
                return True
        return False

    def _is_other(self, found: Found, pin: str) -> bool:
        if found.sha256 is not None:
            return found.sha256 != pin
        try:
            return hash_files(found.path, self.store, self._reporter) != pin
        except SourceError:
            return True

    # -- opening

    def open(self, job: SourceJob, *, repair: bool = False) -> OpenSource:
        """A source's table of contents and identity; raises CkptError when it cannot be had.

        Of one that is not here, as its host shows it, where that can be. `repair` is as for
        `open_checkpoint`; once it is open, a source stays as it was opened.
        """
        with self._guard:
            if job not in self._open:
                found = self.find(job)
                beside = found is None or found.how == BESIDE
                with checking(self._check_place(job) if beside else None):
                    checkpoint = (
                        self._open_remote(job) if found is None else self._open_file(found.path, repair)
                    )
                try:
                    self._open[job] = OpenSource(checkpoint, identify(checkpoint, self.catalog))
                except BaseException:
                    checkpoint.close()
                    raise
            return self._open[job]

    def _check_place(self, job: SourceJob) -> Callable[[Path], object]:
        """What raises RecipeError for a file, as of a set or a folder, that a link leads elsewhere from."""
        bounds = self._bounds.get((job.folder, job.file))

        def check(path: Path) -> None:
            if bounds is not None and not any(is_inside(path, folder) for folder in bounds):
                raise RecipeError(outside(path.name, "a link leads out of it", job.place, source=True))

        return check

    def _open_file(self, path: Path, repair: bool = False) -> Checkpoint:
        return open_checkpoint(path, self.catalog.layouts, repair=repair)

    def drop(self, job: SourceJob) -> None:
        """Close a source that is not needed after all."""
        with self._guard:
            if (opened := self._open.pop(job, None)) is not None:
                opened.checkpoint.close()

    def _open_remote(self, job: SourceJob) -> Checkpoint:
        from builder.sources.net.remote import open_remote

        if not self.remote(job):
            raise self.missing(job)
        refused: CkptError = self.missing(job)
        wanted = self.wanted(job)
        hosts = []
        for address in self.addresses(job):
            where = parse_address(address)
            if not isinstance(where, LocalFile):
                hosts.append(where)
                continue
            try:
                return self._open_file(where.under(job.folder))
            except CkptError as error:
                refused = error
        if not hosts:
            raise refused
        return open_remote(hosts, session=self.session(), size=wanted.size, sha256=wanted.sha256)

    def is_open(self, job: SourceJob) -> bool:
        """Whether a source's table of contents was read."""
        return job in self._open

    def seen(self, job: SourceJob) -> bool:
        """Whether a source's contents can be seen from here; raises as `open` when nothing is known of it."""
        return self.known_architecture(job) is None

    def known_architecture(self, job: SourceJob) -> str | None:
        """What a source is by its digest, when its contents cannot be seen; None when they can be.

        That is enough to plan with, and too little to build. Raises as `open` when nothing is known;
        UnseenError where it may still be downloaded.
        """
        if self.find(job) is not None:
            return None
        with self._guard:
            if job not in self._unseen:
                try:
                    self.open(job)
                    self._unseen[job] = None
                except CkptError as error:
                    file = self.catalog.known.file(self.wanted(job).sha256 or "")
                    if file is None or file.architecture is None:
                        if self.remote(job):
                            raise UnseenError(job, error) from None
                        raise
                    self._unseen[job] = file.architecture
            return self._unseen[job]

    # -- fetching

    def fetch(self, job: SourceJob) -> Found:
        """Download a source, or take it from a cache; raises FetchError, or SourceError for another file."""
        from builder.sources.net.acquire import fetch

        if not self.remote(job):
            raise self.missing(job)
        wanted = self.wanted(job)
        try:
            got = fetch(
                self.addresses(job),
                sha256=wanted.sha256,
                size=wanted.size,
                store=self.store,
                session=self.session(),
                reporter=self._reporter,
                base=job.folder,
                name=job.name,
            )
        except SourceError as error:
            if job.sha256 is not None:
                raise
            hint = "the lock pins it: `ckpt lock --upgrade` takes it as it is now"
            raise SourceError(*(replace(p, hint=hint) for p in error.problems)) from None
        found = Found(got.path, got.sha256, got.size, got.address or "a cache")
        self._provide(job, found)
        if got.address is not None and not got.address.startswith("file:"):
            self.resolved[job] = got.address
        return found

    def _provide(self, job: SourceJob, found: Found) -> None:
        """Say where a source is now, after it was fetched: from now on it is read from there.

        Raises SourceError when it holds something else than was planned with.
        """
        with self._guard:
            before = self._open.pop(job, None)
            self._unseen.pop(job, None)
            self._found[job] = found
            if before is not None:
                self._closed.append(before)
                with open_checkpoint(found.path, self.catalog.layouts) as now:
                    then = before.checkpoint
                    if (_contents(now), now.metadata) != (_contents(then), then.metadata):
                        raise SourceError(
                            Problem(f"`{job.name}` is not what its host showed at first", hint="build again")
                        )

    def session(self) -> Session:
        """The network, opened when it is first used; a stop of its own ends what these sources fetch."""
        assert self._network is not None
        with self._guard:
            if self._session is None:
                self._session = self._network().anew()
            return self._session

    def stop(self) -> None:
        """Break off whatever is being fetched."""
        if self._session is not None:
            self._session.stop()

    # -- hashing

    def remembered(self, job: SourceJob) -> str | None:
        """The digest of a source's opened files, if it is remembered of just those; else None."""
        opened = self.open(job)
        known = {b.name: self.store.remembered_sha256(b.stat) for b in opened.files}
        if None in known.values() or len(known) < len(opened.checkpoint.blobs):
            return None
        return set_digest({name: str(sha256) for name, sha256 in known.items()})

    def hash(self, job: SourceJob, stop: threading.Event | None = None) -> Found:
        """The digest of a source, of the very files that its tensors are read from; remembered by them.

        Raises SourceError when it is not what was pinned or changes meanwhile, and as `open`.
        """
        found = self.find(job)
        if found is None:
            raise self.missing(job)
        digests: dict[str, str] = {}
        for blob in self.open(job).files:
            known = self.store.remembered_sha256(blob.stat)
            if known is None:
                seen = self.store.memory.settle(blob.stat, stop)
                known = sha256_blob(blob, stop=stop, reporter=self._reporter)
                self.store.memory.remember(blob.stat, known, seen)
            digests[blob.name] = known
        seen_now = replace(found, sha256=set_digest(digests))
        self.check(job, seen_now)
        with self._guard:
            self._found[job] = seen_now
        return seen_now

    def check(self, job: SourceJob, found: Found) -> None:
        """Raise SourceError when a source is not what was pinned, or was when another machine read it."""
        pinned = self.wanted(job).sha256 or self._told.get(job, (None, 0))[0]
        if pinned is not None and found.sha256 != pinned:
            known = self.catalog.known
            said = (_known_as(s, known) for s in (pinned, str(found.sha256)))
            raise NotPinned(job, found.path, not_pinned(found.path, *said))

    def check_unchanged(self, job: SourceJob) -> None:
        """Raise SourceError when a file of a source changed since it was opened."""
        for blob in self.open(job).files:
            if not blob.unchanged():
                raise SourceError(
                    Problem(
                        f"the source `{job.name}` changed while it was read",
                        Place(blob.name),
                        hint="wait until it is whole, and build again",
                    )
                )


class UnseenError(CkptError):
    """What a source holds cannot be seen on its host: it has to be downloaded before it is planned with."""

    def __init__(self, job: SourceJob, error: CkptError) -> None:
        super().__init__(*error.problems)
        self.job = job
        self.exit_code = error.exit_code


class NotPinned(SourceError):
    """The file at `path`, which was found for a source, is another one."""

    def __init__(self, job: SourceJob, path: Path, problem: Problem) -> None:
        super().__init__(problem)
        self.job, self.path = job, path


@contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """Tell a download that was broken off from one that failed."""
    try:
        yield
    except FetchError:
        if stop.is_set():
            raise Cancelled from None
        raise


def _known_as(sha256: str, known: Known) -> str:
    file = known.file(sha256)
    return f"{sha256} (`{file.name}`)" if file is not None else sha256


def _contents(checkpoint: Checkpoint) -> Mapping[str, object]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.items()}
