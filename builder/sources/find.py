"""Finding the files that a recipe names on this machine, and holding them to their pins."""

from __future__ import annotations

import hashlib
import json
import os
import stat as modes
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from builder.base.errors import FetchError, MissingError, Place, Problem, SourceError, nearest
from builder.base.progress import SILENT, Reporter
from builder.formats import sniff
from builder.formats.blob import FileBlob, checking
from builder.formats.open import files_of as checkpoint_files
from builder.store import Store

BESIDE = "beside the recipe"

# Bounds of a search: a folder of models is not a whole disk.
MAX_DEPTH = 16
MAX_FILES = 200_000


class Wanted(Protocol):
    """What is looked for: a source as a recipe (or a lock) describes it."""

    @property
    def name(self) -> str:
        """What the recipe calls it."""

    @property
    def file(self) -> str | None:
        """A path from the recipe's folder; elsewhere its last part counts."""

    @property
    def sha256(self) -> str | None:
        """The pinned digest, in lower-case hex."""

    @property
    def size(self) -> int | None:
        """The pinned size in bytes."""

    @property
    def urls(self) -> Sequence[str]:
        """Where it can be had from."""


@dataclass(frozen=True, slots=True)
class Found:
    """A source on this machine: its file, and by what it was found.

    `sha256` is None as long as nobody has read the file as it is now; `size` is in bytes.
    """

    path: Path
    sha256: str | None
    size: int
    how: str


def find_source(
    wanted: Wanted,
    *,
    folder: Path,
    model_folders: Sequence[Path],
    store: Store,
    refused: Collection[Path] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    reporter: Reporter = SILENT,
    check: Callable[[Path], object] | None = None,
) -> Found:
    """The file on this machine that a source stands for; nothing is hashed.

    Looked for beside the recipe, in `folder`; in the folders of models, by name and then, if it is
    pinned, by size and digest; among the store's downloads and in the Hugging Face cache, by digest. What
    lies beside the recipe is taken as it is; elsewhere those of `refused` are passed over, and of a pinned
    source the first is taken that may be it, as far as digests are remembered: who reads it has the last
    word. `check` sees each file beside the recipe before it is opened, and may raise. Raises FetchError,
    naming the places, when it is nowhere, and SourceError when what lies beside the recipe is of another
    size than is pinned.
    """
    search = _Search(wanted, store)
    search.refused |= dict.fromkeys(refused, "is not what was pinned")
    if wanted.file is not None:
        path = folder / wanted.file
        search.looked.append(f"beside the recipe: `{path}`")
        for _ in _stats([path], modes.S_ISREG, modes.S_ISDIR):
            with checking(check):
                digest, size = recall_files(path, store)
            if wanted.size is not None and wanted.size != size:
                raise SourceError(not_pinned(path, f"{wanted.size:,} bytes", f"{size:,} bytes"))
            return Found(path, digest, size, BESIDE)
    found = _in_models(search, model_folders, reporter)
    if found is None and wanted.sha256 is not None:
        search.looked.append("among the store's downloads")
        found = search.choose([store.download_path(wanted.sha256)], "download")
    if found is None and wanted.sha256 is not None:
        from builder.sources.net.hosts import hugging_face_cache

        cache = hugging_face_cache(environment)
        search.looked.append(f"in the Hugging Face cache: `{cache}`")
        # Large files are kept there under their SHA-256.
        blobs = sorted(cache.glob(f"*/blobs/{wanted.sha256}"))
        found = search.choose(blobs, "Hugging Face cache")
    if found is None:
        if wanted.file is not None:
            search.names += [
                p.name for p, _ in _stats(_entries((folder / wanted.file).parent), modes.S_ISREG)
            ]
        raise search.failure()
    return found


def this_file(path: Path, store: Store) -> Found:
    """A file that is named by its path, whatever is wrong with it."""
    try:
        return Found(path, *recall_files(path, store), BESIDE)
    except SourceError:
        return Found(path, None, 0, BESIDE)


def not_pinned(path: Path, pinned: str, found: str) -> Problem:
    """That a file is another one than was pinned."""
    return Problem(
        f"`{path.name}` is not what was pinned",
        Place(str(path)),
        (f"pinned: {pinned}", f"found:  {found}"),
        "get the file that was pinned, or pin this one if it is the one you mean",
    )


@dataclass
class _Search:
    """The choice among files for one source, and the story of it."""

    wanted: Wanted
    store: Store
    looked: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of files in those places
    refused: dict[Path, str] = field(default_factory=dict)

    def choose(self, candidates: Iterable[Path], how: str) -> Found | None:
        """The first candidate that is what is pinned; those of known digest come first."""
        pinned, size = self.wanted.sha256, self.wanted.size
        unread: list[tuple[Path, int]] = []
        for path, _ in _stats(candidates, modes.S_ISREG, modes.S_ISDIR):
            if path in self.refused:
                continue
            try:
                digest, length = recall_files(path, self.store)
            except SourceError as error:
                self.refused[path] = f"is refused: {error.problems[0].fact}"
                continue
            if size is not None and length != size:
                self.refused[path] = f"has {length:,} bytes instead of {size:,}"
            elif pinned is None or digest == pinned:
                return Found(path, digest, length, how)
            elif digest is None:
                unread.append((path, length))
            else:
                self.refused[path] = f"has the SHA-256 {digest}"
        return next((Found(path, None, length, how) for path, length in unread), None)

    def failure(self) -> FetchError:
        """That it is nowhere, and what was found instead."""
        wanted = self.wanted
        refused = [f"not `{path}`: it {why}" for path, why in self.refused.items()]
        name = Path(wanted.file).name if wanted.file is not None else None
        if wanted.urls:
            hint = f"it can be had from {wanted.urls[0]}"
        elif name and (near := nearest(name, self.names)) not in {None, name}:
            hint = f"did you mean `{near}`?"
        elif wanted.file is not None:
            hint = "put the file there, or set `CKPT_MODELS` to the folder that holds it"
        else:
            hint = "set `CKPT_MODELS` to the folder that holds it"
        pin = [f"wanted: SHA-256 {wanted.sha256}"] if wanted.sha256 else []
        return (FetchError if wanted.urls else MissingError)(
            Problem(
                f"the source `{wanted.name}` is nowhere to be found",
                evidence=(*pin, *self.looked, *refused),
                hint=hint,
            )
        )


def files_of(path: Path) -> list[Path]:
    """The files that a source's tensors lie in: its own, or the shards of a set."""
    if not path.is_dir():
        with closing(FileBlob(path)) as blob:
            head = blob.read(0, min(blob.size, sniff.HEAD))
        if sniff.is_safetensors(head) or head.lstrip()[:1] != b"{":
            return [path]
    return checkpoint_files(path)


def set_digest(digests: Mapping[str, str]) -> str:
    """The digest a source is pinned by, of its files' by path: of one file that, of several one over theirs.

    For a set, its index among its files, it is the SHA-256 of the compact ASCII JSON object of their digests
    by name, sorted; names are relative to the folder that holds them all, with `/`.
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    folder = os.path.commonpath([Path(path).parent for path in digests])
    named = {Path(os.path.relpath(path, folder)).as_posix(): digest for path, digest in digests.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_files(path: Path, store: Store, reporter: Reporter) -> str:
    """The digest that a checkpoint is pinned by, hashed once for as long as it stays as it is.

    Raises SourceError.
    """
    return set_digest({str(file): store.sha256(file, reporter) for file in files_of(path)})


def recall_files(path: Path, store: Store) -> tuple[str | None, int]:
    """The digest that a checkpoint is pinned by, if it is remembered, and its bytes; raises SourceError."""
    try:
        stats = {file: file.stat() for file in files_of(path)}
    except OSError as error:
        raise SourceError(Problem(f"cannot read `{path}`", evidence=(str(error.strerror),))) from None
    found = {file: store.remembered_sha256(stat) for file, stat in stats.items()}
    known = {file: digest for file, digest in found.items() if digest is not None}
    size = sum(stat.st_size for stat in stats.values())
    whole = len(known) == len(stats)
    return set_digest({str(file): digest for file, digest in known.items()}) if whole else None, size


def _in_models(search: _Search, folders: Sequence[Path], reporter: Reporter) -> Found | None:
    wanted = search.wanted
    if not folders:
        search.looked.append("in no folder of models: `CKPT_MODELS` is not set")
        return None
    there = [folder for folder in folders if folder.is_dir()]
    search.looked += [f"in the folder of models `{folder}`" for folder in there]
    if not there:
        search.looked.append("in no folder of models: `CKPT_MODELS` names none that is there")
    by_name = "folder of models, by name"
    name = None
    if wanted.file is not None:
        # The very path below a folder is worth a look of its own: it spares walking through them all.
        path = Path(wanted.file)
        inside = not path.is_absolute() and ".." not in path.parts
        found = search.choose((f / path for f in folders if inside), by_name)
        if found is not None:
            return found
        name = path.name
    elif wanted.sha256 is None:
        return None
    files = files_below(folders, reporter)
    search.names += [path.name for path, _ in files]
    found = search.choose((path for path, _ in files if path.name == name), by_name)
    if found is not None or wanted.sha256 is None:
        return found
    if wanted.size is not None:
        alike = [path for path, stat in files if stat.st_size == wanted.size]
    else:
        # Reading every file there is would take minutes: only those of known digest are compared.
        alike = [path for path, stat in files if search.store.remembered_sha256(stat) == wanted.sha256]
    return search.choose(alike, "folder of models, by digest")


def files_below(folders: Sequence[Path], reporter: Reporter) -> list[tuple[Path, os.stat_result]]:
    """Every regular file below the folders, in the order of the folders and then of the names."""
    seen: set[tuple[int, int]] = set()
    walk = (found for folder in folders for found in _walk(folder, seen, MAX_DEPTH))
    files = list(islice(walk, MAX_FILES))
    if len(files) == MAX_FILES:
        reporter.warn(
            Problem(
                "the folders of models hold too many files to look at all",
                evidence=(f"{MAX_FILES:,} were looked at",),
                hint="name smaller folders in `CKPT_MODELS`",
            )
        )
    return files


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in the order of names; of one that cannot be read, nothing."""
    try:
        return sorted(islice(folder.iterdir(), MAX_FILES))
    except (OSError, ValueError):
        return []


def _walk(folder: Path, seen: set[tuple[int, int]], depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files below a folder, hidden ones left out; links are followed, each folder is met once."""
    try:
        here = folder.stat()
    except OSError:
        return
    if depth == 0 or (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    for path, stat in _stats(_entries(folder), modes.S_ISREG, modes.S_ISDIR):
        if path.name.startswith("."):
            continue
        if modes.S_ISDIR(stat.st_mode):
            yield from _walk(path, seen, depth - 1)
        else:
            yield path, stat


def _stats(paths: Iterable[Path], *kinds: Callable[[int], bool]) -> Iterator[tuple[Path, os.stat_result]]:
    """Those paths that lead to something of one of the kinds (a regular file), with its stat."""
    for path in paths:
        try:
            stat = path.stat()
        except (OSError, ValueError):  # not there, out of reach, or no name that a file can have
            continue
        if any(kind(stat.st_mode) for kind in kinds):
            yield path, stat
