"""A recipe from its address, with its lock and what it includes, put into a folder of its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.base import toml
from builder.base.addresses import HuggingFace, Web, parse_address, safe_path
from builder.base.errors import FetchError, Problem
from builder.base.recipe_address import LOCK, Git, RecipeAddress, beside, path_of
from builder.recipe import Recipe
from builder.recipe import lock as locks
from builder.recipe.profiles import MAX_SIDECAR
from builder.recipe.read import MAX_SIZE
from builder.sources.net.client import Session
from builder.sources.net.failure import Failure
from builder.sources.net.git import open_repository
from builder.sources.net.hosts import download_url, pin_of
from builder.sources.net.ranges import refuse_encoded
from builder.sources.net.text import safe_name

MAX_FILES = 64  # recipes and configurations that one recipe brings along
MAX_SECONDS = 60.0  # for one of them
_ABSENT = {404, 410}

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
        return str(beside(self.address, found[1]))

    def addressed(self, recipe: Recipe) -> Recipe:
        """The recipe with addresses for those of its sources that are files beside it, and nothing else."""
        included = {name: self.addressed(inner) for name, inner in recipe.included.items()}
        if isinstance(self.address, Git) or recipe.path is None:
            return replace(recipe, address=str(self.address), included=included)
        here = beside(self.address, recipe.path.relative_to(self.folder).as_posix())
        sources = {
            n: replace(s, urls=(str(beside(here, s.file)),))
            if s.file and not s.urls and safe_path(s.file)
            else s
            for n, s in recipe.sources.items()
        }
        return replace(recipe, address=str(here), included=included, sources=sources)

    def problem(self, problem: Problem, *, of_lock: bool = False) -> Problem:
        """A problem in which files are named by their addresses.

        The lock is its author's: no hint is to write it anew, where the problem is one `of_lock` or says so.
        """
        if self.locked and (of_lock or "`ckpt lock" in (problem.hint or "")):
            hint = "`--no-lock` builds it without its lock: what comes out is then on nobody's word"
            problem = replace(problem, hint=hint)
        return problem.renamed(self.renamed)


def fetch_recipe(address: RecipeAddress, root: Path, session: Session, *, lock: bool = True) -> FetchedRecipe:
    """Fetch a recipe into a folder below `root`: itself, its lock if that is wanted and there is one, the
    recipes that it includes and the configurations that it copies, all from its own folder.

    Nothing else is asked for. A branch becomes the commit that it is now. Raises FetchError.
    """
    folder = root / "recipe"
    try:
        exact, read = _opened(address, root, session)
        data = read(exact, MAX_SIZE)
        if data is None:
            raise Failure("there is no such file")
    except Failure as failure:
        raise _unfetched(session, address, failure) from None
    fetched = FetchedRecipe(exact, folder, folder / safe_name(path_of(exact).rpartition("/")[2]))
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
            fetched = replace(fetched, locked=True)
    try:
        _fetch_named(fetched, read)
    except Failure as failure:
        raise _unfetched(session, address, failure) from None
    return fetched


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


def _fetch_named(fetched: FetchedRecipe, read: Read) -> None:
    """Fetch what the recipe, and those that it includes, name in its folder; what is not there stays so."""
    waiting, seen = [fetched.path.name], {fetched.path.name}
    while waiting:
        recipe = waiting.pop()
        above = recipe.rpartition("/")[0]
        for name in _named(fetched.folder / recipe):
            path = f"{above}/{name}" if above else name
            if path in seen or not safe_path(path) or any(safe_name(p) != p for p in path.split("/")):
                continue  # whatever it is, it is not beside the recipe, and the reader of recipes says so
            if len(seen) > MAX_FILES:
                raise Failure(f"it brings more than {MAX_FILES} files along")
            seen.add(path)
            included = path.endswith(".toml")
            data = read(beside(fetched.address, path), MAX_SIZE if included else MAX_SIDECAR)
            if data is not None:
                _put(fetched.folder / path, data)
                waiting += [path] * included


def _named(path: Path) -> Iterator[str]:
    """The recipes and configurations that a recipe names, if it is one: what is wrong is said elsewhere."""
    try:
        said: dict[str, Any] = toml.load(path, FetchError).data
    except FetchError:
        return
    sources, outputs = said.get("sources"), said.get("output")
    tables = [("recipe", s) for s in sources.values()] if isinstance(sources, dict) else []
    tables += [("config", o) for o in (outputs if isinstance(outputs, list) else [outputs])]
    for key, table in tables:
        if isinstance(table, dict) and isinstance(name := table.get(key), str) and name:
            yield name


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _unfetched(session: Session, address: RecipeAddress, failure: Failure) -> FetchError:
    evidence = (failure.fact, *failure.evidence)
    return FetchError(
        Problem(
            f"`{address}` cannot be fetched",
            evidence=tuple(session.scrub(line) for line in evidence),
            hint=failure.hint,
        )
    )
