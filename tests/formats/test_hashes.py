"""Every kind of hash, as its own community computes it."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from builder.base.errors import SourceError
from builder.base.progress import Reporter
from builder.formats.hashes import file_hashes, sha256_file
from builder.tensors.lazy import WINDOW


def test_hello_world(tmp_path: Path) -> None:
    path = tmp_path / "hello.txt"
    path.write_bytes(b"hello world")
    assert file_hashes(path) == {
        "SHA256": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
        "AutoV1": None,
        "AutoV2": "b94d27b993",
        "AutoV3": None,
        "sshs_model_hash": None,
        "modelspec.hash_sha256": None,
        "CRC32": "0D4A1185",
        "BLAKE3": "d74981efa70a0c880b8d8c1985d075dbcbf679b99a5f9914e5aaf96b831a9e24",
    }


@pytest.mark.parametrize("size", [0x100000, 0x100001, 0x10FFFF, 0x110000, WINDOW, 2 * WINDOW + 12345])
def test_against_the_whole_file_in_memory(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.ckpt"
    data = os.urandom(size)
    path.write_bytes(data)
    found = file_hashes(path)
    assert found["SHA256"] == hashlib.sha256(data).hexdigest()
    assert found["CRC32"] == f"{zlib.crc32(data):08X}"
    assert found["BLAKE3"] == blake3(data).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found["AutoV1"] == (legacy if size > 0x100000 else None)
    plain = sha256_file(path)
    assert (plain.sha256, plain.size) == (found["SHA256"], size)
    assert plain.stat.st_ino == path.stat().st_ino


@pytest.mark.parametrize("numel", [1, 3_000_000])
def test_the_data_of_safetensors_without_its_header(tmp_path: Path, numel: int) -> None:
    values = torch.randn(numel)
    found = []
    for title in ("a", "another title that moves the data"):
        path = tmp_path / f"{len(title)}.safetensors"
        save_file({"t": values}, path, {"title": title})
        found.append(file_hashes(path))
    strong = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    for hashes in found:
        assert hashes["AutoV3"] == strong[:12]
        assert hashes["sshs_model_hash"] == strong
        assert hashes["modelspec.hash_sha256"] == f"0x{strong}"
    assert found[0]["SHA256"] != found[1]["SHA256"]


@pytest.mark.parametrize(
    "head", [b"", b"\x08", b"\xff" * 8 + b"{", bytes(8) + b"[]", b"\x40" + bytes(7) + b"{}"]
)
def test_what_does_not_begin_as_safetensors_has_no_data_hash(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(head)
    assert file_hashes(path)["AutoV3"] is None


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_under_the_reader_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(bytes(4 * WINDOW))

    class Meddler(Reporter):
        def advance(self, task: str, count: int) -> None:
            if change == "rewrite":
                path.write_bytes(b"\1" * 4 * WINDOW)
            else:
                os.truncate(path, (5 if change == "grow" else 2) * WINDOW)

    for hashing in (sha256_file, file_hashes):
        path.write_bytes(bytes(4 * WINDOW))
        with pytest.raises(SourceError, match=r"changed while it was read|ends before"):
            hashing(path, reporter=Meddler())


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError, match=r"folder|cannot open"):
            file_hashes(path)
