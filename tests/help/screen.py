"""A terminal of 80 columns that a command runs in."""

from __future__ import annotations

import atexit
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from tests.help.building import ROOT, TINY, Folder

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
    variables = {
        **ours,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        **folder.variables,
        **(environment or {}),
    }
    if code:
        command = [sys.executable, "-c", code, *args]
        running = subprocess.Popen(
            command, cwd=folder.path, env=variables, stdin=slave, stdout=slave, stderr=slave
        )
    else:
        asked = {"terminal": os.ttyname(slave), "folder": str(folder.path), "environment": variables}
        begun = _ask(asked | {"args": args})
        assert begun == "begun"
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
    ended = running.wait(60) if code else int(_answer())
    return ended, came.decode().replace("\r\n", "\n")


# Starting Python and torch anew takes seconds for each command: a process that has both forks for each.


@cache
def _forks() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.help.screen"]
    made = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(made.communicate)
    return made


def _ask(asked: Mapping[str, Any]) -> str:
    process = _forks()
    assert process.stdin is not None
    print(json.dumps(asked), file=process.stdin, flush=True)
    return _answer()


def _answer() -> str:
    process = _forks()
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def _main() -> None:
    """Carry out every command line that comes in, in a process and on a terminal of its own."""
    import torch

    from builder.cli import main
    from builder.models.catalog import load_catalog

    assert torch.get_num_threads() == 1, "a fork has no other threads"
    load_catalog((TINY,))
    for line in sys.stdin:
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        asked = json.loads(line)
        terminal = os.open(asked["terminal"], os.O_RDWR | os.O_NOCTTY)
        print("begun", flush=True)
        for descriptor in range(3):
            os.dup2(terminal, descriptor)
        os.close(terminal)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        main(asked["args"])


def lines(text: str) -> list[str]:
    """What stands on the terminal in the end: without colours, and without lines that were drawn over."""
    return [CODES.sub("", line.split("\r")[-1]) for line in text.split("\n")]


if __name__ == "__main__":
    _main()
