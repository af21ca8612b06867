"""How many files may be open."""

from __future__ import annotations

import os
from contextlib import suppress

try:
    import resource
except ImportError:  # Windows, which bounds files otherwise
    resource = None  # type: ignore[assignment]

MORE = "`ulimit -n 65536` allows this shell's programs more"  # what helps where none is left
_AT_ONCE = 64  # files that are written side by side
_EACH = 6  # descriptors that one of them takes, mostly fewer
_OPEN = 10_240  # descriptors that a command wants; macOS gives no more


def files_at_once() -> int:
    """How many files may be in the making side by side: 64, or what there are descriptors left for.

    Each has its folder open, and files that what is made before comes from.
    """
    if resource is None:
        return _AT_ONCE
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return _AT_ONCE
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError:  # none is left, which whoever opens the next file tells of
        return 1
    os.close(lowest)
    return max(1, min(_AT_ONCE, (most - lowest) // _EACH))


def open_more() -> None:
    """Let this process, and those that it starts, have more files open, as far as it may."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = _OPEN if hard == resource.RLIM_INFINITY else min(_OPEN, hard)
        if resource.RLIM_INFINITY != soft < more:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
