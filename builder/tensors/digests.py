"""Digests of tensors, and of components over them: BLAKE3-256, on which trust may rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from blake3 import blake3

from builder.tensors.lazy import DType, LazyTensor

PROFILE = 1  # of the arithmetic: rounding, order of sums, what becomes of what is not finite


class Row(NamedTuple):
    """A tensor's line in a component's digest; `digest` is the BLAKE3-256 of its bytes, lower-case hex."""

    dtype: DType
    shape: tuple[int, ...]
    digest: str


def tensor_digest(tensor: LazyTensor) -> str:
    """The BLAKE3-256 of a tensor's bytes (little endian, C order) as hex, read window by window."""
    hasher = blake3()
    for piece in tensor.windows():
        hasher.update(piece)
    return hasher.hexdigest()


def component_digest(rows: Mapping[str, Row]) -> str:
    """The digest of named tensors: BLAKE3-256, as hex, over one line a tensor, sorted by name.

    A line is the compact ASCII JSON array `[name, dtype code, shape, hex digest]` and a newline.
    """
    lines = (
        json.dumps([name, row.dtype.code, list(row.shape), row.digest], separators=(",", ":")) + "\n"
        for name, row in sorted(rows.items())
    )
    return blake3("".join(lines).encode()).hexdigest()


def expression_key(op: str, version: int, **params: Any) -> str:
    """The key of an expression: the BLAKE3-256, as hex, of its operation, version and canonical parameters.

    The numeric profile is part of every key: with other arithmetic, the same expression makes other bytes.
    """
    said = {"op": op, "version": version, "profile": PROFILE, **params}
    return blake3(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
