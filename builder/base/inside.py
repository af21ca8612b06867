"""What a stranger's file may name: paths that stay in its folder, whatever links lie there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath


def leads_out(folder: Path, name: str, allowed: Iterable[Path] = ()) -> str | None:
    """Why the path `name`, from `folder`, lies neither in it nor in one of `allowed`; None where it does.

    Links are followed as far as there are any: one that leads out is found wherever it stands.
    """
    if any(is_inside(folder / name, root) for root in (folder, *allowed)):
        return None
    posix = PurePosixPath(name)
    if posix.is_absolute() or PureWindowsPath(name).drive:
        return "it is a path of one machine"
    return "`..` leads out of it" if ".." in posix.parts else "a link leads out of it"


def is_name(word: str) -> bool:
    """Whether a word names something in a folder, and is no path to anything else."""
    return word not in ("", ".", "..") and not set(word) & {"/", "\\", "\0"}


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path really lies in a folder, after all links."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)
