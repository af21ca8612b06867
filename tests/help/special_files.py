"""Files that are no regular ones, and must be refused without waiting or reading for ever."""

from __future__ import annotations

import os
import socket as sockets
from pathlib import Path


def pipe(path: Path) -> None:
    """A named pipe that nobody writes to."""
    os.mkfifo(path)


def zeros(path: Path) -> None:
    """A link to a device that never ends."""
    path.symlink_to("/dev/zero")


def socket(path: Path) -> None:
    """A socket that nobody listens to."""
    here = Path.cwd()
    os.chdir(path.parent)  # the whole path may be too long for one
    with sockets.socket(sockets.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)
