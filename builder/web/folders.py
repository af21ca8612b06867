"""The folders that the page is for: what is asked for by name lies in them, whatever links there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from builder.base.errors import OutputError, Place, Problem, SourceError, UsageError
from builder.base.inside import is_inside, leads_out
from builder.formats.open import is_model
from builder.recipe.lock import LOCK
from builder.recipe.names import SHARD, SUFFIXES

MAX_DEPTH = 16
MAX_LISTED = 5000  # files and folders that a page knows


@dataclass(frozen=True)
class Listed:
    """What the folders hold, by reference: checkpoints, recipes and folders; and how many links lead out."""

    files: tuple[str, ...]
    recipes: tuple[str, ...]
    folders: tuple[str, ...]
    links_out: int
    cut: bool


class Folders:
    """Folders by label. A reference is `LABEL/path`, with `/` on every system.

    Raises UsageError where one of them is none.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.roots: dict[str, Path] = {}
        for path in paths:
            if not path.is_dir():
                raise UsageError(Problem(f"`{path}` is no folder", hint="name the folder of your models"))
            if any(path.samefile(known) for known in self.roots.values()):
                continue
            name = path.resolve().name or "root"
            label, number = name, 1
            while label in self.roots:
                number += 1
                label = f"{name}-{number}"
            self.roots[label] = path

    def path(self, reference: str) -> Path:
        """The file or folder of a reference; raises SourceError for what lies elsewhere, or is not there."""
        path = self._below(reference)
        if not os.path.lexists(path):
            raise SourceError(Problem(f"there is no `{reference}` any more", hint="go back to the library"))
        return path

    def new(self, folder: str, name: str, *, replace: bool = False) -> Path:
        """The path of a file to be made in a folder; raises UsageError or OutputError.

        What is there is replaced only where that is asked for.
        """
        if not name or name in (".", "..") or any(c in name for c in "/\\\0") or not name.isprintable():
            fact = f"`{name}` cannot be the name of a file" if name else "the file to write has no name"
            raise UsageError(Problem(fact, hint="give a name without `/`, as `model.safetensors`"))
        path = self.path(folder) / name
        if os.path.lexists(path) and not replace:
            hint = "give another name, or tick the box that replaces it"
            raise OutputError(Problem(f"`{name}` is there already", Place(str(path)), hint=hint))
        return self._below(self.reference(path))

    def reference(self, path: Path) -> str:
        """The reference of a path that lies in one of the folders; raises SourceError for any other."""
        for label, root in self.roots.items():
            if path == root or root in path.parents:
                return (Path(label) / path.relative_to(root)).as_posix()
        raise SourceError(Problem(f"`{path}` is in none of the folders of this page"))

    def listed(self) -> Listed:
        """What there is now, in the order of names; hidden files are left out."""
        found: dict[str, list[str]] = {kind: [] for kind in ("file", "recipe", "folder", "out")}
        walk = (
            ((Path(label) / path.relative_to(root)).as_posix(), kind)
            for label, root in self.roots.items()
            for path, kind in ((root, "folder"), *self._walk(root, MAX_DEPTH, set()))
        )
        for reference, kind in islice(walk, MAX_LISTED):
            found[kind].append(reference)
        cut = next(walk, None) is not None
        files, recipes, folders = (tuple(found[kind]) for kind in ("file", "recipe", "folder"))
        return Listed(files, recipes, folders, len(found["out"]), cut)

    def _below(self, reference: str) -> Path:
        label, _, rest = reference.partition("/")
        root = self.roots.get(label)
        why = "no folder of this page is called so" if root is None else None
        if root is not None and "\0" not in rest:
            why = leads_out(root, rest or ".", [r for r in self.roots.values() if r != root])
        if root is None or why is not None or "\0" in rest or ".." in Path(rest).parts:
            why = why or "that is no name"
            raise SourceError(Problem(f"`{reference}` is outside the folders of this page", evidence=(why,)))
        return root / rest

    def _walk(self, folder: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str]]:
        try:
            here = folder.stat()
            entries = sorted(folder.iterdir())
        except OSError:
            return
        if depth == 0 or (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        for path in (p for p in entries if not p.name.startswith(".")):
            suffix = path.suffix.lower()
            if path.is_symlink() and not any(is_inside(path, r) for r in self.roots.values()):
                if suffix in SUFFIXES or path.is_dir():
                    yield path, "out"
            elif path.is_dir():
                if is_model(path):
                    yield path, "file"
                else:
                    yield path, "folder"
                    yield from self._walk(path, depth - 1, seen)
            elif suffix in SUFFIXES and not SHARD.fullmatch(path.name):
                yield path, "file"
            elif path.name.endswith(".toml") and not path.name.endswith(LOCK):
                yield path, "recipe"
