"""Finding the files that a recipe names on this machine, and holding them to their pins."""

from __future__ import annotations

import hashlib
import os
import stat as modes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from builder.base.errors import FetchError, Place, Problem, SourceError
from builder.base.progress import SILENT, Reporter
from builder.formats import sniff
from builder.formats.blob import FileBlob
from builder.formats.open import files_of as checkpoint_files
from builder.store import Store

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


def model_folders() -> tuple[Path, ...]:
    """The folders that `CKPT_MODELS` lists, separated as in PATH."""
    listed = os.environ.get("CKPT_MODELS", "").split(os.pathsep)
    return tuple(Path(os.path.expanduser(f)) for f in listed if f)  # noqa: PTH111 - never raises


def find_source(
    wanted: Wanted,
    *,
    folder: Path,
    model_folders: Sequence[Path],
    store: Store,
    hashing: bool = True,
    reporter: Reporter = SILENT,
) -> Found:
    """The file on this machine that a source stands for.

    Looked for beside the recipe, in `folder`; in the folders of models, by name and then, if it is
    pinned, by size and digest; among the store's downloads and in the Hugging Face cache, by digest. What
    lies beside the recipe is taken as it is; elsewhere a pin decides, for which files that may be it are
    hashed, once. Without `hashing` the first that may be it is taken unread. In both cases
    `verify_source` has the last word. Raises FetchError, naming the places, when it is nowhere, and
    SourceError when what lies beside the recipe is of another size than is pinned.
    """
    search = _Search(wanted, store, hashing, reporter)
    if wanted.file is not None:
        path = folder / wanted.file
        search.looked.append(f"beside the recipe: `{path}`")
        for _ in _stats([path], modes.S_ISREG, modes.S_ISDIR):
            digest, size = _known(path, store)
            if wanted.size is not None and wanted.size != size:
                raise _not_pinned(path, f"{wanted.size:,} bytes", f"{size:,} bytes")
            return Found(path, digest, size, "beside the recipe")
    found = _in_models(search, model_folders)
    if found is None and wanted.sha256 is not None:
        search.looked.append("among the store's downloads")
        found = search.choose([store.download_path(wanted.sha256)], "download")
    if found is None and wanted.sha256 is not None:
        from builder.sources.net.hosts import hugging_face_cache

        cache = hugging_face_cache()
        search.looked.append(f"in the Hugging Face cache: `{cache}`")
        # Large files are kept there under their SHA-256.
        blobs = sorted(cache.glob(f"*/blobs/{wanted.sha256}"))
        found = search.choose(blobs, "Hugging Face cache")
    if found is None:
        raise search.failure()
    return found


def verify_source(
    found: Found,
    pinned: str | None,
    *,
    store: Store,
    known: Callable[[str], str | None] = lambda _: None,
    reporter: Reporter = SILENT,
) -> Found:
    """The same source with its SHA-256, hashed unless that is remembered.

    `known` says what a digest is known as. Raises SourceError when it is not what was pinned, cannot be
    read, or changes while it is read.
    """
    sha256 = _hash(found.path, store, reporter)
    if pinned is not None and sha256 != pinned:
        said = (f"{digest}{_known_as(known(digest))}" for digest in (pinned, sha256))
        raise _not_pinned(found.path, *said)
    return replace(found, sha256=sha256)


def _not_pinned(path: Path, pinned: str, found: str) -> SourceError:
    return SourceError(
        Problem(
            f"`{path.name}` is not what was pinned",
            Place(str(path)),
            (f"pinned: {pinned}", f"found:  {found}"),
            "get the file that was pinned, or pin this one if it is the one you mean",
        )
    )


@dataclass
class _Search:
    """The choice among files for one source, and the story of it."""

    wanted: Wanted
    store: Store
    hashing: bool
    reporter: Reporter
    looked: list[str] = field(default_factory=list)
    refused: dict[Path, str] = field(default_factory=dict)

    def choose(self, candidates: Iterable[Path], how: str) -> Found | None:
        """The first candidate that is what is pinned; those of known digest come first."""
        pinned, size = self.wanted.sha256, self.wanted.size
        unread: list[tuple[Path, int]] = []
        for path, _ in _stats(candidates, modes.S_ISREG, modes.S_ISDIR):
            if path in self.refused:
                continue
            try:
                digest, length = _known(path, self.store)
            except SourceError as error:
                self.refused[path] = f"is refused: {error}"
                continue
            if size is not None and length != size:
                self.refused[path] = f"has {length:,} bytes instead of {size:,}"
            elif pinned is None or digest == pinned:
                return Found(path, digest, length, how)
            elif digest is None:
                unread.append((path, length))
            else:
                self.refused[path] = f"has the SHA-256 {digest}"
        for path, length in unread:
            if not self.hashing:
                return Found(path, None, length, how)
            try:
                digest = _hash(path, self.store, self.reporter)
            except SourceError as error:
                self.refused[path] = f"is refused: {error}"
                continue
            if digest == pinned:
                return Found(path, digest, length, how)
            self.refused[path] = f"has the SHA-256 {digest}"
        return None

    def failure(self) -> FetchError:
        """That it is nowhere, and what was found instead."""
        wanted = self.wanted
        refused = [f"not `{path}`: it {why}" for path, why in self.refused.items()]
        if wanted.urls:
            hint = f"it can be had from {wanted.urls[0]}"
        elif wanted.file is not None:
            hint = "put the file there, or set `CKPT_MODELS` to the folder that holds it"
        else:
            hint = "set `CKPT_MODELS` to the folder that holds it"
        pin = [f"wanted: SHA-256 {wanted.sha256}"] if wanted.sha256 else []
        return FetchError(
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


def _digest(path: Path, digests: Mapping[Path, str]) -> str:
    """The digest a source is pinned by: a file's SHA-256, for a sharded set that over its shards'.

    For a set it is what `sha256sum SHARD… | sha256sum` prints in its folder, shards sorted by name.
    """
    if path in digests:
        return digests[path]
    lines = (f"{digest}  {file.name}\n" for file, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash(path: Path, store: Store, reporter: Reporter) -> str:
    return _digest(path, {file: store.sha256(file, reporter) for file in files_of(path)})


def _known(path: Path, store: Store) -> tuple[str | None, int]:
    """A source's digest, if it is remembered, and its size in bytes; raises SourceError."""
    try:
        stats = {file: file.stat() for file in files_of(path)}
    except OSError as error:
        raise SourceError(Problem(f"cannot read `{path}`", evidence=(str(error.strerror),))) from None
    found = {file: store.remembered_sha256(stat) for file, stat in stats.items()}
    known = {file: digest for file, digest in found.items() if digest is not None}
    size = sum(stat.st_size for stat in stats.values())
    return _digest(path, known) if len(known) == len(stats) else None, size


def _in_models(search: _Search, folders: Sequence[Path]) -> Found | None:
    wanted = search.wanted
    if not folders:
        search.looked.append("in no folder of models: `CKPT_MODELS` is not set")
        return None
    search.looked += [f"in the folder of models `{folder}`" for folder in folders]
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
    files = files_below(folders, search.reporter)
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


def _walk(folder: Path, seen: set[tuple[int, int]], depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files below a folder, hidden ones left out; links are followed, each folder is met once."""
    try:
        here = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if depth == 0 or (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    for path, stat in _stats(entries, modes.S_ISREG, modes.S_ISDIR):
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


def _known_as(name: str | None) -> str:
    return f" (`{name}`)" if name else ""
