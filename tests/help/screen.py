"""A terminal of 80 columns that a command runs in."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping

from tests.help.building import ROOT, Folder

COLUMNS = 80
CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def shown(
    folder: Folder, *args: str, code: str = "", environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The exit code of `ckpt`, or of Python statements, and all that came to the terminal."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    ours = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    running = subprocess.Popen(
        [sys.executable, *(("-c", code) if code else ("-m", "builder")), *args],
        cwd=folder.path,
        env={**ours, "PYTHONPATH": str(ROOT), "TERM": "xterm", **folder.variables, **(environment or {})},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    came = bytearray()
    while True:
        try:
            if not (data := os.read(master, 1 << 16)):
                break
        except OSError:  # as Linux says that nobody has it open any more
            break
        came += data
    os.close(master)
    return running.wait(60), came.decode().replace("\r\n", "\n")


def lines(text: str) -> list[str]:
    """What stands on the terminal in the end: without colours, and without lines that were drawn over."""
    return [CODES.sub("", line.split("\r")[-1]) for line in text.split("\n")]
