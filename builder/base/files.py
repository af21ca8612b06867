"""Small files that anyone may have made: read whole where they are regular files of a bounded size."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from builder.base.errors import CkptError, Place, Problem

_MOST_NESTED = 100_000  # each list or object takes a hundred bytes for the two that it is written with
_DEEPEST = 64  # lists and objects within each other
_STRING = re.compile(rb'"[^"]*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Not every system has all of them.
_FLAGS = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("BINARY", "NONBLOCK", "NOCTTY"))
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # where a link is put there in the very moment


class NotRegular(OSError):
    """Something else than a file is there; `strerror` says what."""


def open_regular(path: Path | str, *, follow: bool = True) -> tuple[int, os.stat_result]:
    """A descriptor that reads a regular file, and what the file was when it was opened.

    What the path leads to is looked at on the descriptor, so nothing can be put in its place meanwhile; a
    pipe is not waited for. Without `follow`, a link is no regular file. Raises NotRegular for all but
    regular files, and OSError.
    """
    try:
        if not follow and os.path.islink(path):  # noqa: PTH114 - which raises nothing
            raise NotRegular(errno.ELOOP, "a link, not a file")
        descriptor = os.open(path, _FLAGS if follow else _FLAGS | _NO_LINK)
    except ValueError:
        raise OSError(errno.EINVAL, "no path holds NUL") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise NotRegular(errno.EINVAL, what)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def read_bounded(path: Path | str, limit: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file that has at most `limit` of them, no link unless `follow`.

    Raises OSError, with words to show.
    """
    descriptor, status = open_regular(path, follow=follow)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {limit:,}")
        return file.read(status.st_size)


def read_text(
    path: Path | str, limit: int, error: type[CkptError], name: str | None = None, *, follow: bool = True
) -> str:
    """The UTF-8 text of such a file, called `name` in messages (default: its path).

    Raises FileNotFoundError when nothing is there, and `error` for all else.
    """
    name = str(path) if name is None else name
    try:
        return read_bounded(path, limit, follow=follow).decode("utf-8")
    except FileNotFoundError:
        raise
    except NotRegular as wrong:
        raise error(Problem(f"`{name}` is {wrong.strerror}")) from None
    except OSError as wrong:
        raise error(Problem(f"cannot read `{name}`: {(wrong.strerror or str(wrong)).lower()}")) from None
    except UnicodeDecodeError as wrong:
        line = wrong.object.count(b"\n", 0, wrong.start) + 1
        byte = wrong.object[wrong.start]
        raise error(Problem("not UTF-8 text", Place(name, line), (f"byte 0x{byte:02x}",))) from None


def parse_json(raw: bytes | str, **how: Any) -> Any:
    """The value of a JSON text that is mostly names and values; `how` as for `json.loads`.

    Memory is linear in the text: lists and objects without number are refused, and such as are nested
    deeper than people's. So are strings with half a character, which no other program could be told of.
    Raises ValueError.
    """
    data = raw.encode() if isinstance(raw, str) else raw
    text = data.removeprefix(b"\xef\xbb\xbf").decode()
    # Counted before anything is built: brackets in strings go first, and escapes before those.
    bare = _STRING.sub(b"", data.replace(rb"\\", b"").replace(rb"\"", b"")).translate(None, _NO_BRACKETS)
    if bare.count(b"[") + bare.count(b"{") > _MOST_NESTED:
        raise ValueError(f"it has more than {_MOST_NESTED:,} lists and objects")
    depth = 0
    for bracket in bare:
        depth += 1 if bracket in b"[{" else -1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
    value = json.loads(text, **how)
    if _SURROGATE.search(data):
        json.dumps(value, ensure_ascii=False).encode()  # raises where half a character stands alone
    return value


def decoded(said: object) -> dict[str, Any]:
    """An object that may be a JSON text, or one in another; empty where it is none, or no good JSON."""
    for _ in range(8):
        if not isinstance(said, str):
            break
        try:
            said = parse_json(said)
        except (ValueError, RecursionError):
            break
    return said if isinstance(said, dict) else {}
