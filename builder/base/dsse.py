"""Signed envelopes (DSSE v1): the bytes of a payload and their type, signed with Ed25519."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from builder.base.errors import Problem, UsageError
from builder.base.files import read_bounded

MOST = 64  # signatures of an envelope that are looked at; each takes a tenth of a millisecond
_MAX_KEY = 1 << 16  # bytes of a key's file
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_OF_URLS = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key that signatures are checked with; `id` is the SHA-256, in hex, of its DER."""

    inner: Any
    id: str

    @classmethod
    def read(cls, path: Path, option: str) -> PublicKey:
        """The key of a file: PEM, or a line of OpenSSH's. Raises UsageError, which names the `option`."""
        raw = _read(path)
        if b"PRIVATE KEY-----" in raw:
            hint = f"`openssl pkey -in {quote(str(path))} -pubout -out PUB` writes the public one"
            raise _wrong(path, option, "it is a private key", hint)
        load, serialization = _loaders("Ed25519PublicKey")
        ssh = raw.lstrip().startswith(b"ssh-")
        loader = serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key
        return cls._of(load(path, option, loader, raw), serialization)

    @classmethod
    def _of(cls, inner: Any, serialization: Any) -> PublicKey:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        der = inner.public_bytes(serialization.Encoding.DER, form)
        return cls(inner, hashlib.sha256(der).hexdigest())

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether a signature of a message is of this key."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.inner.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """An Ed25519 key to sign with."""

    inner: Any
    public: PublicKey

    @classmethod
    def read(cls, path: Path, option: str) -> PrivateKey:
        """The key of a file: PEM, or OpenSSH's. Raises UsageError, which names the `option`."""
        raw = _read(path)
        if b"PUBLIC KEY-----" in raw or raw.lstrip().startswith(b"ssh-"):
            raise _wrong(path, option, "it is a public key", "name the private one that it belongs to")
        load, serialization = _loaders("Ed25519PrivateKey")
        ssh = b"OPENSSH PRIVATE KEY-----" in raw
        read = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
        inner = load(path, option, lambda data: read(data, password=None), raw)
        return cls(inner, PublicKey._of(inner.public_key(), serialization))


@dataclass(frozen=True)
class Envelope:
    """A payload, its type, and what are said to be signatures of both."""

    payload: bytes
    type: str
    signatures: tuple[bytes, ...]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Envelope:
        """The envelope of a JSON object; raises ValueError, in words.

        Which key a signature says that it is of is not looked at: that is a hint, and anyone's.
        """
        kind, said = data.get("payloadType"), data.get("signatures")
        if not isinstance(kind, str):
            raise ValueError("its `payloadType` is no string")
        if not isinstance(said, list) or not 0 < len(said) <= MOST:
            raise ValueError(f"its `signatures` are no list of 1 to {MOST}")
        found = [s.get("sig") if isinstance(s, dict) else None for s in said]
        return cls(_decoded(data.get("payload"), "payload"), kind, tuple(_decoded(s, "sig") for s in found))

    def signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures is of a key."""
        message = pae(self.type, self.payload)
        return any(key.verifies(signature, message) for signature in self.signatures)


def pae(kind: str, payload: bytes) -> bytes:
    """The bytes that are signed: the lengths of a type and a payload, and both."""
    said = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(said), said, len(payload), payload)


def seal(kind: str, payload: bytes, key: PrivateKey) -> bytes:
    """An envelope with one signature, as a line of JSON."""
    signature = {"keyid": key.public.id, "sig": _encoded(key.inner.sign(pae(kind, payload)))}
    data = {"payloadType": kind, "payload": _encoded(payload), "signatures": [signature]}
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: object, what: str) -> bytes:
    """The bytes of Base64, of either alphabet, as the protocol has it; raises ValueError."""
    plain = text.translate(_OF_URLS) if isinstance(text, str) else "?"
    try:
        if _BASE64.fullmatch(plain) is not None:
            return base64.b64decode(plain, validate=True)
    except binascii.Error:
        pass
    raise ValueError(f"`{what}` is no Base64")


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_KEY)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UsageError(Problem(f"cannot read the key `{path}`", evidence=(why,))) from None


def _wrong(path: Path, option: str, why: str, hint: str | None = None) -> UsageError:
    return UsageError(Problem(f"`{path}` is no key for `{option}`", evidence=(why,), hint=hint))


def _loaders(kind: str) -> tuple[Any, Any]:
    """What loads a key of a kind or says what is wrong, and the module that reads keys."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        fact = "signatures need `cryptography`, which is not installed"
        raise UsageError(Problem(fact, hint="`pip install 'ckpt-build[sign]'`")) from None

    def load(path: Path, option: str, loader: Any, raw: bytes) -> Any:
        new = "`openssl genpkey -algorithm ed25519 -out KEY` makes one"
        if kind == "Ed25519PublicKey":
            new = "`openssl pkey -in KEY -pubout` writes it, of the key that signed"
        try:
            key = loader(raw)
        except TypeError:  # as it says that a password is needed
            ssh = b"OPENSSH" in raw
            bare = (
                "a copy, and `ssh-keygen -p` of that,"
                if ssh
                else f"`openssl pkey -in {quote(str(path))} -out COPY`"
            )
            hint = f"{bare} gives one without a password: keep it where no other can read it"
            raise _wrong(path, option, "it is encrypted", hint) from None
        except (ValueError, UnsupportedAlgorithm):
            encrypted = b"ENCRYPTED" in raw
            raise _wrong(path, option, "it is encrypted" if encrypted else "it is no key", new) from None
        if not isinstance(key, getattr(ed25519, kind)):
            raise _wrong(path, option, "it is of another kind than Ed25519", new)
        return key

    return load, serialization
