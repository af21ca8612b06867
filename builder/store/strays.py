"""What a store did not put where it lies: a link, a pipe or a folder in the place of a file, and such."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# The folders of a store, and how many folders deep their files lie; 0: whatever a process puts there.
FOLDERS = {
    "actions": 2,
    "blobs": 2,
    "components": 2,
    "downloads": 1,
    "downloads/partial": 1,
    "facts": 3,
    "files": 2,
    "quarantine": 0,
    "tmp": 0,
}

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
}


def kind_of(path: Path) -> str:
    """What stands at a path, in words."""
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "a device")
    except OSError:
        return "nothing"


def walk(folder: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """What lies `depth` folders deep, in order, and whether it is what is due there: a regular file.

    No link is followed; what is above that and no folder comes too. Hidden files are a file manager's.
    """
    if folder.is_symlink() or not folder.is_dir():
        if os.path.lexists(folder):
            yield folder, False
        return
    if depth == 0:
        return
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if depth > 1:
                yield from walk(path, depth - 1)
            elif (folder.name, entry.name) != ("downloads", "partial"):
                yield path, entry.is_file(follow_symlinks=False)


def files(root: Path, folder: str, suffix: str = "") -> list[Path]:
    """The regular files of one of a store's folders."""
    return [p for p, due in walk(root / folder, FOLDERS[folder]) if due and p.name.endswith(suffix)]


def strays(root: Path) -> list[Path]:
    """All of a store that stands where something else is due."""
    return [p for folder, depth in FOLDERS.items() for p, due in walk(root / folder, depth) if not due]


def make_way(root: Path, path: Path) -> None:
    """Set aside what keeps a store's file from its place: a link, what is no folder above it, no file there.

    A store may come from elsewhere: its links would have files of the user's written to. Raises OSError.
    """
    for place in (*reversed([p for p in path.parents if p != root and root in p.parents]), path):
        try:
            mode = place.lstat().st_mode
        except FileNotFoundError:
            return
        if not (stat.S_ISREG(mode) if place == path else stat.S_ISDIR(mode)):
            set_aside(root, place)


def set_aside(root: Path, path: Path) -> None:
    """Move something out of use, whatever it is; raises OSError."""
    folder = root / "quarantine"
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        folder.unlink()
    if path == folder:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")
