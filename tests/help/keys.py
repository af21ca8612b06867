"""Ed25519 keys as files, of seeds and points that RFC 8032 publishes; nothing is needed to make them."""

from __future__ import annotations

import base64
from pathlib import Path

SEED = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
POINT = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
OTHER_SEED = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
OTHER_POINT = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"

_PRIVATE = bytes.fromhex("302e020100300506032b657004220420")  # what DER has before the seed
_PUBLIC = bytes.fromhex("302a300506032b6570032100")


def der(point: str = POINT) -> bytes:
    """A public key as DER."""
    return _PUBLIC + bytes.fromhex(point)


def private(path: Path, seed: str = SEED) -> Path:
    """A private key's file."""
    return _pem(path, "PRIVATE", _PRIVATE + bytes.fromhex(seed))


def public(path: Path, point: str = POINT) -> Path:
    """A public key's file."""
    return _pem(path, "PUBLIC", der(point))


def public_line(path: Path, point: str = POINT) -> Path:
    """The same as OpenSSH has it."""
    fields = b"ssh-ed25519", bytes.fromhex(point)
    data = b"".join(len(f).to_bytes(4, "big") + f for f in fields)
    path.write_text(f"ssh-ed25519 {base64.b64encode(data).decode()} somebody\n")
    return path


def _pem(path: Path, kind: str, data: bytes) -> Path:
    text = base64.encodebytes(data).decode()
    path.write_text(f"-----BEGIN {kind} KEY-----\n{text}-----END {kind} KEY-----\n")
    return path
