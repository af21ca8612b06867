"""Small records of a store: written at once, checked when read, and where the store lies."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from builder.base.disk import write_bytes
from builder.base.errors import Problem, UsageError
from builder.base.files import parse_json, read_bounded
from builder.store.strays import make_way

MAX_RECORD = 32 << 20  # bytes; most take some hundreds, the table of a component 100 a tensor
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Made:
    """What an action made: a component, by name, class and content (BLAKE3-256, hex).

    `tensors` counts them and `bytes` is the size of their data. `changes` say in words what fixes did.
    """

    component: str
    cls: str
    digest: str
    tensors: int
    bytes: int
    changes: tuple[str, ...] = ()


def is_digest(text: object) -> bool:
    """Whether this is a digest of 256 bits in lower-case hex, and so may be part of a path."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def digest(value: object) -> str:
    """A record's value that is a digest; raises ValueError."""
    if not isinstance(value, str) or not is_digest(value):
        raise ValueError("no digest")
    return value


def texts(value: Mapping[str, object]) -> dict[str, str]:
    """A record's value that is an object of strings; raises TypeError, AttributeError."""
    found = {key: said for key, said in value.items() if isinstance(said, str)}
    if len(found) < len(value):
        raise TypeError("not all are strings")
    return found


def size(value: object) -> int:
    """A record's value that is a number of bytes or an extent; raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("no size")
    return value


def default_root(environment: Mapping[str, str] | None = None) -> Path:
    """The store's folder: `CKPT_STORE`, else `ckpt-build` in the user's cache folder."""
    said = os.environ if environment is None else environment
    try:
        if chosen := said.get("CKPT_STORE"):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            base = Path(said.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Caches"
        else:
            xdg = said.get("XDG_CACHE_HOME", "")
            base = Path(xdg) if xdg.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(
            Problem("no home folder to keep the store in", hint="set `CKPT_STORE` to a whole path")
        ) from None
    return base / "ckpt-build"


def write_record(path: Path, data: dict[str, Any], root: Path | None = None) -> None:
    """Put a sealed record in place at once; raises OSError or OutputError.

    It is not flushed to the disk: a record that a power cut empties fails its seal and is none. What it is
    of is sealed with it: under another key or kind it is none. `root` is the store's folder, in which
    whatever is in the way is set aside.
    """
    if root is not None:
        make_way(root, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**data, "of": _subject(path)}
    write_bytes(path, _canonical({**data, "seal": _seal(data)}), durable=False)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record at `path`; None when there is none, or when it is not what was written there."""
    try:
        data = parse_json(read_bounded(path, MAX_RECORD, follow=False))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict):
        return None
    seal = data.pop("seal", None)
    return data if seal == _seal(data) and data.pop("of", None) == _subject(path) else None


def made_to_record(made: Made) -> dict[str, Any]:
    """A record of what an action made."""
    return {
        "component": made.component,
        "class": made.cls,
        "blake3": made.digest,
        "tensors": made.tensors,
        "bytes": made.bytes,
        "changes": list(made.changes),
    }


def made_from_record(record: dict[str, Any]) -> Made | None:
    """What a record says was made; None when another version, or somebody else, wrote it."""
    try:
        if not is_digest(record["blake3"]):
            return None
        return Made(
            str(record["component"]),
            str(record["class"]),
            record["blake3"],
            int(record["tensors"]),
            int(record["bytes"]),
            tuple(map(str, record["changes"])),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _subject(path: Path) -> str:
    """What a record is of, by its place: its kind and its key."""
    return f"{path.parent.parent.name}/{path.stem}"


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _seal(data: dict[str, Any]) -> str:
    # Found by accident alone is damage: a seal that anyone can forge is enough for that.
    return xxhash.xxh3_128_hexdigest(_canonical(data))
