"""What a file is, told by its leading bytes."""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD = 4096  # bytes that are enough to tell


class Stranger(NamedTuple):
    """A file that is no checkpoint: what it is, what shows it, and one thing to do."""

    what: str
    evidence: tuple[str, ...] = ()
    hint: str | None = None


_CONVERT = "convert it to safetensors with the program that made it"
_UNPACK = "unpack it first"
_MODEL = "give the file that holds the model itself"
_PROGRAM = "do not run it, and get the model elsewhere"
_AGAIN = "download it again, and check its SHA-256"

_MAGIC: dict[bytes, tuple[str, str | None]] = {
    b"lmgg": ("a GGML file, which packs its weights", "take the model's safetensors version"),
    b"tjgg": ("a GGML file, which packs its weights", "take the model's safetensors version"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, such as Keras writes", _CONVERT),
    b"\x93NUMPY": ("a NumPy array", _CONVERT),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", _UNPACK),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"BZh": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\0": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("an lz4 archive", _UNPACK),
    b"SQLite format 3\0": ("an SQLite database", _MODEL),
    b"PAR1": ("a Parquet table", _MODEL),
    b"ARROW1\0\0": ("an Arrow table", _MODEL),
    b"\x89PNG\r\n\x1a\n": ("a PNG image", _MODEL),
    b"\xff\xd8\xff": ("a JPEG image", _MODEL),
    b"GIF8": ("a GIF image", _MODEL),
    b"II*\0": ("a TIFF image", _MODEL),
    b"%PDF-": ("a PDF document", _MODEL),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office document", _MODEL),
    b"bplist00": ("a macOS property list", _MODEL),
    b"\0\0\0\1Bud1": ("a macOS folder's settings (.DS_Store)", _MODEL),
    b"L\0\0\0\1\x14\2\0": ("a Windows shortcut", "give the file that it leads to"),
    b"[InternetShortcut]": ("a shortcut to a web page", "download the file that it leads to"),
    b"d8:announce": ("a torrent, not the file it stands for", "download the file with it"),
    b"-----BEGIN PGP": ("a PGP message", "decrypt it first"),
    b"\x7fELF": ("an ELF program", _PROGRAM),
    b"\xcf\xfa\xed\xfe": ("a macOS program", _PROGRAM),
    b"#!": ("a script", _PROGRAM),
    b"MZ": ("a Windows program", _PROGRAM),
    b"\0\x05\x16\x07": (
        "a macOS AppleDouble file, which holds no data of its own",
        "take the one not named `._…`",
    ),
}
_LFS = re.compile(r"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?oid sha256:(\w+)\nsize (\d+)")


_TEXTS = re.compile(r"""\s*(<|\{|\[(?=\s*[\[{"\]\d-]))""")


def is_safetensors(head: bytes) -> bool:
    """Whether this begins as a safetensors file whose header is under 4 GiB."""
    return head[4:9] == b"\0\0\0\0{"


def is_gguf(head: bytes) -> bool:
    """Whether this begins as a GGUF file."""
    return head[:4] == b"GGUF"


def is_npz(head: bytes) -> bool:
    """Whether this is a zip whose first file is a NumPy array."""
    length = int.from_bytes(head[26:28], "little")
    return head[:4] == b"PK\3\4" and head[30 : 30 + length].endswith(b".npy")


def _decoded(head: bytes) -> str | None:
    """The head as text, or None when it is not text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut by the head's end is fine
            return None
        text = head[: error.start].decode("utf-8-sig")
    return text if text.strip() and all(c.isprintable() or c in "\t\n\r\f" for c in text) else None


def stranger(head: bytes) -> Stranger | None:
    """What a file that is no checkpoint is, or None when that is unknown."""
    if not head:
        return Stranger("an empty file", hint=_AGAIN)
    for magic, (what, hint) in _MAGIC.items():
        if head.startswith(magic):
            return Stranger(what, hint=hint)
    if head[4:8] == b"TFL3":
        return Stranger("a TensorFlow Lite model", hint=_CONVERT)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Stranger("a WebP image", hint=_MODEL)
    if head[4:8] == b"ftyp":
        return Stranger("a video or an image (MP4, HEIF)", hint=_MODEL)
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x28", b"\x32", b"\x3a", b"\x42"):
        what = "a TensorFlow saved model" if head[1] == 1 else "an ONNX model"
        return Stranger(what, hint=_CONVERT)
    if not head.strip(b"\0"):
        return Stranger(
            "zeros where its contents should begin", hint=f"the download did not finish: {_AGAIN}"
        )
    if is_npz(head):
        return Stranger("a NumPy archive (.npz)", hint=_CONVERT)
    text = _decoded(head)
    return _text(text) if text is not None else None


def _text(text: str) -> Stranger:
    if pointer := _LFS.match(text):
        return Stranger(
            "a Git LFS pointer, not the file it stands for",
            (f"oid sha256:{pointer[1]}", f"size {int(pointer[2]):,} bytes"),
            "fetch the file with `git lfs pull`",
        )
    # What it says is not shown: a recipe may name any file, and its text may be a secret.
    found = _TEXTS.match(text)
    what = {"<": "an HTML or XML page", "{": "JSON", "[": "JSON"}[found[1]] if found else "text"
    return Stranger(what, hint=f"a download may have saved an error page: {_AGAIN}")
