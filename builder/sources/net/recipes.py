"""A recipe from its address, with its lock and what it includes, put into a folder of its own."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from builder.base import toml
from builder.base.addresses import HuggingFace, Web, parse_address, safe_path
from builder.base.errors import FetchError, Problem, clipped
from builder.base.recipe_address import LOCK, Git, RecipeAddress, beside, names_for_ever, path_of
from builder.formats.write_sharded import SUFFIX
from builder.recipe import Recipe, Source
from builder.recipe import lock as locks
from builder.recipe.profiles import MAX_SIDECAR, MAX_VOCABULARY
from builder.recipe.read import MAX_SIZE
from builder.sources.net.client import Session
from builder.sources.net.failure import Failure
from builder.sources.net.git import open_repository
from builder.sources.net.hosts import download_url, pin_of
from builder.sources.net.ranges import refuse_encoded
from builder.sources.net.text import safe_name
from builder.store import Store
from builder.store.records import MAX_RECORD, texts

MAX_FILES = 256  # that are asked for beside one recipe: a tokenizer's folder is some forty
MAX_SECONDS = 60.0  # for one of them
MAX_BYTES = 256 << 20  # of all of them
MAX_TIME = 600.0  # seconds for all of them
MAX_PARTS = 16  # of the path of one: each is a folder, and what is too deep is hard to be rid of
_ABSENT = {404, 410}
_KEPT = "recipe"  # facts of the store: files of a commit

# The bytes of the file at an address, at most so many; None where there is none. Raises Failure.
Read = Callable[[RecipeAddress, int], bytes | None]


@dataclass(frozen=True)
class FetchedRecipe:
    """A recipe that was fetched into `folder`, as the file `path`, with its lock if `locked`.

    `address` is exact where that can be.
    """

    address: RecipeAddress
    folder: Path
    path: Path
    locked: bool = False

    def renamed(self, text: str) -> str:
        """A message that names files by their addresses, not by where they were put."""
        return re.sub(re.escape(f"{self.folder}/") + r"([^`\s:]*)", self._address_of, text)

    def _address_of(self, found: re.Match[str]) -> str:
        own = found[1] == self.path.name  # which may be none that this system has
        return str(self.address if own else beside(self.address, found[1]))

    def addressed(self, recipe: Recipe) -> Recipe:
        """The recipe with addresses for those of its sources that are files beside it, and nothing else."""
        included = {name: self.addressed(inner) for name, inner in recipe.included.items()}
        if isinstance(self.address, Git) or recipe.path is None:
            return replace(recipe, address=str(self.address), included=included)
        here = beside(self.address, recipe.path.relative_to(self.folder).as_posix())
        sources = {
            n: replace(s, urls=(str(beside(here, path)),)) if (path := _beside_alone(s)) else s
            for n, s in recipe.sources.items()
        }
        return replace(recipe, address=str(here), included=included, sources=sources)

    def problem(self, problem: Problem, *, of_lock: bool = False) -> Problem:
        """A problem in which files are named by their addresses.

        The lock is its author's: no hint is to write it anew, where the problem is one `of_lock` or says so.
        """
        hint = (problem.hint or "").replace("put the file there, or set", "set") or None
        if self.locked and (of_lock or "`ckpt lock" in (hint or "")):
            hint = "`--no-lock` builds it without its lock: what comes out is then on nobody's word"
        elif "--allow-outside" in (hint or ""):
            hint = "that is for its author to mend: by its address it is built from its own folder alone"
        return replace(problem, hint=hint).renamed(self.renamed)


def _beside_alone(source: Source) -> str | None:
    """The path of a source that is one file beside its recipe, and is said to be nowhere else."""
    if source.file is None or source.urls or source.file.endswith((SUFFIX, "/")):
        return None
    path = PurePosixPath(source.file).as_posix()  # less its empty and `.` parts
    return path if safe_path(path) else None


def fetch_recipe(
    address: RecipeAddress,
    root: Path,
    session: Session,
    store: Store,
    *,
    lock: bool = True,
    vocabulary: Collection[str] = (),
) -> FetchedRecipe:
    """Fetch a recipe into a folder below `root`: itself, its lock if that is wanted and there is one, the
    recipes that it includes, the configurations that it copies and the files of its tokenizers, which are
    called as `vocabulary` says; all from its own folder.

    Nothing else is asked for. A branch becomes the commit that it is now. What was fetched of a commit is
    kept in the store, and had from there the next time. Raises FetchError.
    """
    try:
        if (kept := _kept(address, root / "recipe", store, lock)) is not None:
            return kept
        fetched = _fetched(address, root, session, lock, vocabulary)
    except Failure as failure:
        raise _unfetched(session, address, failure) from None
    _keep(fetched, store, lock)
    return fetched


def _kept(address: RecipeAddress, folder: Path, store: Store, lock: bool) -> FetchedRecipe | None:
    """A recipe of a commit, put into `folder` as it was fetched before; None where it is not known."""
    files = store.recall(_KEPT, _key(address, lock), _files) if names_for_ever(address) else None
    for name, data in (files or {}).items():
        _put(folder / name, data)
    return _named_in(address, folder) if files else None


def _keep(fetched: FetchedRecipe, store: Store, lock: bool) -> None:
    """Keep what was fetched of a commit, where a record has room for it."""
    paths = [p for p in fetched.folder.rglob("*") if p.is_file()] if names_for_ever(fetched.address) else []
    if not paths or sum(p.stat().st_size for p in paths) > MAX_RECORD // 2:
        return
    said = {
        p.relative_to(fetched.folder).as_posix(): base64.b64encode(p.read_bytes()).decode("ascii")
        for p in paths
    }
    store.note(_KEPT, _key(fetched.address, lock), {"files": said})


def _key(address: RecipeAddress, lock: bool) -> str:
    return hashlib.sha256(f"{address} {lock}".encode()).hexdigest()


def _files(record: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a record, by their paths; raises ValueError, LookupError, TypeError, AttributeError."""
    found = {name: base64.b64decode(data, validate=True) for name, data in texts(record["files"]).items()}
    if not all(map(_is_file_name, found)):
        raise ValueError("no paths")
    return found


def _named_in(address: RecipeAddress, folder: Path) -> FetchedRecipe:
    """What lies in a folder, as a fetched recipe."""
    path = folder / safe_name(path_of(address).rpartition("/")[2])
    return FetchedRecipe(address, folder, path, locks.lock_path(path).exists())


def _fetched(
    address: RecipeAddress, root: Path, session: Session, lock: bool, vocabulary: Collection[str]
) -> FetchedRecipe:
    """A recipe and all that goes with it, from its host; raises Failure, or FetchError of its lock."""
    exact, read = _opened(address, root, session)
    data = read(exact, MAX_SIZE)
    if data is None:
        raise Failure("there is no such file")
    fetched = _named_in(exact, root / "recipe")
    _put(fetched.path, data)
    if lock:
        where = beside(exact, path_of(exact).rpartition("/")[2].removesuffix(".toml") + LOCK)
        try:
            found = read(where, locks.MAX_SIZE)
        except Failure as failure:
            failure.hint = failure.hint or "`--no-lock` does without its lock"
            raise _unfetched(session, where, failure) from None
        if found is not None:
            _put(locks.lock_path(fetched.path), found)
    _fetch_named(fetched, read, vocabulary)
    return _named_in(exact, fetched.folder)


def _opened(address: RecipeAddress, root: Path, session: Session) -> tuple[RecipeAddress, Read]:
    """The address of what is there now, and what reads that and all that is beside it."""
    if isinstance(address, Git):
        repository = open_repository(address, root / "git", session)
        return repository.address, lambda a, most: repository.read(path_of(a), most)
    if isinstance(address, HuggingFace) and not address.pinned:
        exact = parse_address(pin_of(address, session).url)
        assert isinstance(exact, HuggingFace)
        address = exact
    return address, lambda a, most: session.retrying(lambda: _download(a, most, session))


def _download(address: RecipeAddress, most: int, session: Session) -> bytes | None:
    assert isinstance(address, (Web, HuggingFace))
    response = session.request("GET", download_url(address, session))
    try:
        if response.status in _ABSENT:
            response.explanation()
            return None
        if response.status != 200:
            raise response.failure()
        refuse_encoded(response)
        body, until = bytearray(response.read()), time.monotonic() + MAX_SECONDS
        if not (path_of(address).endswith(".json") and body.lstrip()[:1] == b"{"):  # as a tokenizer's is
            response.refuse_pages(bytes(body))
        while piece := response.read():
            body += piece
            if len(body) > most:
                raise Failure(f"it has more than {most:,} bytes")
            if time.monotonic() > until:
                raise Failure(f"it takes more than {MAX_SECONDS:g} seconds")
        if len(body) > most:
            raise Failure(f"it has more than {most:,} bytes")
        return bytes(body)
    finally:
        response.close()


def _fetch_named(fetched: FetchedRecipe, read: Read, vocabulary: Collection[str]) -> None:
    """Fetch what the recipe, and those that it includes, name in its folder; what is not there stays so."""
    waiting, seen = [fetched.path.name], {fetched.path.name}
    left, until = MAX_BYTES, time.monotonic() + MAX_TIME
    while waiting:
        recipe = PurePosixPath(waiting.pop())
        for name, most in _named(fetched.folder / recipe, vocabulary):
            path = (recipe.parent / name).as_posix()
            if path in seen or not safe_path(path):
                continue  # what is not beside the recipe, the reader of recipes refuses
            if not _is_file_name(path):
                raise Failure(f"`{clipped(path, 200)}`, which it names, is no path that every system has")
            if len(seen) > MAX_FILES:
                raise Failure(f"it brings more than {MAX_FILES} files along")
            if time.monotonic() > until:
                raise Failure(f"what it brings along takes more than {MAX_TIME:g} seconds")
            seen.add(path)
            data = read(beside(fetched.address, path), most)
            if data is not None:
                left -= len(data)
                if left < 0:
                    raise Failure(f"it brings more than {MAX_BYTES:,} bytes along")
                _put(fetched.folder / path, data)
                waiting += [path] * path.endswith(".toml")


def _is_file_name(path: str) -> bool:
    """Whether a path may be one of a file in a folder, on every system."""
    parts = path.split("/")
    return safe_path(path) and len(parts) <= MAX_PARTS and all(safe_name(part) == part for part in parts)


def _named(path: Path, vocabulary: Collection[str]) -> Iterator[tuple[str, int]]:
    """The files that a recipe names, each with the most bytes that one has, if it is a recipe: what is wrong
    is said elsewhere."""
    try:
        said: dict[str, Any] = toml.load(path, FetchError).data
    except FetchError:
        return
    sources, outputs = said.get("sources"), said.get("output")
    for name in _texts_of("recipe", list(sources.values()) if isinstance(sources, dict) else []):
        yield name, MAX_SIZE
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for name in _texts_of("config", outputs):
        yield name, MAX_SIDECAR
    for name in _texts_of("tokenizer", outputs):
        yield from ((f"{name}/{file}", MAX_VOCABULARY) for file in vocabulary)


def _texts_of(key: str, tables: Iterable[Any]) -> Iterator[str]:
    """What tables say under a key, where that is a text."""
    for table in tables:
        if isinstance(table, dict) and isinstance(name := table.get(key), str) and name:
            yield name


def _put(path: Path, data: bytes) -> None:
    """Write a file; raises Failure where that cannot be, as in a folder of the name that another file has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise Failure(f"`{path.name}` cannot be put into the store: {error.strerror}") from None


def _unfetched(session: Session, address: RecipeAddress, failure: Failure) -> FetchError:
    evidence = (failure.fact, *failure.evidence)
    return FetchError(
        Problem(
            f"`{address}` cannot be fetched",
            evidence=tuple(session.scrub(line) for line in evidence),
            hint=failure.hint,
        )
    )
