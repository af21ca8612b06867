"""Digests of tensors, and of components over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from builder.tensors.lazy import WINDOW, DType, LazyTensor


@dataclass(frozen=True, slots=True)
class Digest:
    """Content of a tensor or of a component: XXH3-128 for the local store, SHA-256 for what is shared.

    Both are lower-case hex; `sha256` is None where only the fast one was asked for.
    """

    xxh3: str
    sha256: str | None


class Row(NamedTuple):
    """A tensor's line in a component's digest."""

    dtype: DType
    shape: tuple[int, ...]
    digest: Digest


class TensorHasher:
    """Digests a tensor's bytes as they pass."""

    def __init__(self, sha256: bool = True) -> None:
        self._xxh3 = xxhash.xxh3_128()
        self._sha256 = hashlib.sha256() if sha256 else None

    def update(self, data: memoryview | bytes | bytearray) -> None:
        """Take the next bytes."""
        self._xxh3.update(data)
        if self._sha256 is not None:
            self._sha256.update(data)

    def digest(self) -> Digest:
        """The digest of all bytes taken."""
        return Digest(self._xxh3.hexdigest(), self._sha256.hexdigest() if self._sha256 else None)


def tensor_digest(tensor: LazyTensor, sha256: bool = True, window: int = WINDOW) -> Digest:
    """The digest of a tensor's bytes (little endian, C order), read window by window."""
    hasher = TensorHasher(sha256)
    for piece in tensor.windows(window):
        hasher.update(piece)
    return hasher.digest()


def component_digest(rows: Mapping[str, Row]) -> Digest:
    """The digest of named tensors: over one line a tensor, sorted by name.

    A line is the compact ASCII JSON array `[name, dtype code, shape, hex digest]` and a newline; the
    XXH3-128 of the lines that carry the XXH3-128, the SHA-256 of those that carry the SHA-256.
    """
    xxh3 = xxhash.xxh3_128(_lines((n, r, r.digest.xxh3) for n, r in rows.items())).hexdigest()
    strong = {n: r.digest.sha256 for n, r in rows.items()}
    if None in strong.values():
        return Digest(xxh3, None)
    sha256 = hashlib.sha256(_lines((n, r, str(strong[n])) for n, r in rows.items())).hexdigest()
    return Digest(xxh3, sha256)


def _lines(rows: Iterable[tuple[str, Row, str]]) -> bytes:
    return b"".join(
        json.dumps([name, row.dtype.code, list(row.shape), digest], separators=(",", ":")).encode() + b"\n"
        for name, row, digest in sorted(rows, key=lambda r: r[0])
    )
