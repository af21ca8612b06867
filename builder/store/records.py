"""Small records of a store: written at once, checked when read, and where the store lies."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from builder.base.disk import write_bytes
from builder.base.errors import Problem, UsageError
from builder.base.files import parse_json, read_bounded
from builder.tensors.digests import Digest

MAX_RECORD = 4 << 20  # bytes; most take some hundreds
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Made:
    """What an action made: a component, by name, class and content.

    `tensors` counts them and `bytes` is the size of their data, without the file's header.
    """

    component: str
    cls: str
    digest: Digest
    tensors: int
    bytes: int


def default_root() -> Path:
    """The store's folder: `CKPT_STORE`, else `ckpt-build` in the user's cache folder."""
    try:
        if chosen := os.environ.get("CKPT_STORE"):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Caches"
        else:
            xdg = os.environ.get("XDG_CACHE_HOME", "")
            base = Path(xdg) if xdg.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(
            Problem("no home folder to keep the store in", hint="set `CKPT_STORE` to a whole path")
        ) from None
    return base / "ckpt-build"


def write_record(path: Path, data: dict[str, Any]) -> None:
    """Put a sealed record in place at once; raises OSError or OutputError.

    It is not flushed to the disk: a record that a power cut empties fails its seal and is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _canonical({**data, "seal": _seal(data)}), durable=False)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record at `path`; None when there is none, or when it is not what was written."""
    try:
        data = parse_json(read_bounded(path, MAX_RECORD))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict):
        return None
    seal = data.pop("seal", None)
    return data if seal == _seal(data) else None


def made_to_record(made: Made) -> dict[str, Any]:
    """A record of what an action made."""
    return {
        "component": made.component,
        "class": made.cls,
        "xxh3": made.digest.xxh3,
        "sha256": made.digest.sha256,
        "tensors": made.tensors,
        "bytes": made.bytes,
    }


def made_from_record(record: dict[str, Any]) -> Made | None:
    """What a record says was made; None when another version wrote it."""
    try:
        digest = Digest(record["xxh3"], record["sha256"])
        return Made(record["component"], record["class"], digest, record["tensors"], record["bytes"])
    except KeyError:
        return None


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _seal(data: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_canonical(data))
