"""Records in the form that bazel-remote keeps and checks: results of the Remote Execution API."""

from __future__ import annotations

from collections.abc import Iterator

# Fields of `ActionResult`, of its `OutputFile` and of that one's `Digest`.
_OUTPUT_FILES, _STDOUT_RAW = 2, 5
_PATH, _DIGEST = 1, 2
_HASH, _SIZE = 1, 2
_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # bytes of those that are of one size


def encode(record: bytes, path: str, sha256: str, size: int) -> bytes:
    """The result of an action that made one file, and said `record`.

    The file is named so that a cache which checks results drops the record with the file.
    """
    digest = _field(_HASH, sha256.encode()) + _varint(_SIZE << 3 | _VARINT) + _varint(size)
    file = _field(_PATH, path.encode()) + _field(_DIGEST, digest)
    return _field(_OUTPUT_FILES, file) + _field(_STDOUT_RAW, record)


def decode(result: bytes) -> bytes:
    """The record in a result, which may have got fields of the cache's own; raises ValueError."""
    found = [value for number, value in _fields(result) if number == _STDOUT_RAW]
    if len(found) != 1:
        raise ValueError("no record")
    return found[0]


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes, by number."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == _VARINT:
            _, at = _read_varint(data, at)
            continue
        size = _FIXED.get(tag & 7)
        if size is None:
            if tag & 7 != _BYTES:
                raise ValueError("no message")
            size, at = _read_varint(data, at)
        if size > len(data) - at:
            raise ValueError("cut short")
        if tag & 7 == _BYTES:
            yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise ValueError("no number")
