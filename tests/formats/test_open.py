"""Opening: what a file is, is told by its bytes, and strangers are named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.tensors.lazy import DType, MemoryTensor


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.zeros(3))
    return out.getvalue()


def plain_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("readme.txt", "nothing here")
    return out.getvalue()


AGAIN = "download it again, and check its SHA-256"
PAGE = f"a download may have saved an error page: {AGAIN}"
PROGRAM = "do not run it, and get the model elsewhere"
MODEL = "give the file that holds the model itself"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4265380512\n"
STRANGERS: dict[str, tuple[bytes, str, tuple[str, ...], str | None]] = {
    "empty": (b"", "an empty file", (), AGAIN),
    "zeros": (
        bytes(5000),
        "zeros where its contents should begin",
        (),
        f"the download did not finish: {AGAIN}",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file, such as Keras writes", (), None),
    "npy": (b"\x93NUMPY\1\0v\0{'descr'", "a NumPy array", (), None),
    "npz": (npz(), "a NumPy archive (.npz)", (), None),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive", (), "unpack it first"),
    "rar": (b"Rar!\x1a\7\1\0", "a RAR archive", (), "unpack it first"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "a gzip archive", (), "unpack it first"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05", "an ONNX model", (), None),
    "saved model": (b"\x08\x01\x12\xc0\x9a", "a TensorFlow saved model", (), None),
    "tflite": (b"\x1c\0\0\0TFL3\x14\0", "a TensorFlow Lite model", (), None),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image", (), MODEL),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image", (), MODEL),
    "webp": (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP image", (), MODEL),
    "mp4": (b"\0\0\0\x18ftypmp42\0\0", "a video or an image (MP4, HEIF)", (), MODEL),
    "sqlite": (b"SQLite format 3\0\x10\0\1\1\0@  ", "an SQLite database", (), MODEL),
    "parquet": (b"PAR1\x15\4\x15\x10", "a Parquet table", (), MODEL),
    ".DS_Store": (b"\0\0\0\1Bud1\0\0\x10", "a macOS folder's settings (.DS_Store)", (), MODEL),
    "program": (b"MZ\x90\0\3", "a Windows program", (), PROGRAM),
    "script": (b"#!/bin/sh\nrm", "a script", (), PROGRAM),
    "shortcut": (
        b"[InternetShortcut]\r\nURL=https://example.org",
        "a shortcut to a web page",
        (),
        "download the file that it leads to",
    ),
    "torrent": (
        b"d8:announce35:udp://tracker.example",
        "a torrent, not the file it stands for",
        (),
        "download the file with it",
    ),
    "settings": (b"[section]\nkey = 1\n", "text", (), PAGE),
    "list": (b'[\n  {"error": 1}]', "JSON", (), PAGE),
    "AppleDouble": (
        b"\0\5\x16\7\0\2\0\0Mac OS X",
        "a macOS AppleDouble file, which holds no data of its own",
        (),
        "take the one not named `._…`",
    ),
    "html": (
        b"\r\n<!DOCTYPE html><html><head><style>p {}</style><title>404</title></head><body>Not Found",
        "an HTML or XML page",
        (),
        PAGE,
    ),
    "json": (b'{"error":"Unauthorized"}', "JSON", (), PAGE),
    "text": ("\ufeffAccess denied: é".encode(), "text", (), PAGE),
    "long text": (
        ("é" * 5000).encode(),
        "text",
        (),
        PAGE,
    ),
    "lfs": (
        LFS.encode(),
        "a Git LFS pointer, not the file it stands for",
        ("oid sha256:" + "ab" * 32, "size 4,265,380,512 bytes"),
        "fetch the file with `git lfs pull`",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ""])
@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    data, what, evidence, hint = STRANGERS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    problem = caught.value.problems[0]
    assert problem.fact == f"this is no checkpoint but {what}"
    assert problem.place is not None
    assert problem.place.path == str(path)
    assert problem.evidence == evidence
    assert hint in (None, problem.hint)


def test_unknown_bytes_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(bytes(range(200, 250)))
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    problem = caught.value.problems[0]
    assert problem.fact == "this is no checkpoint, nor any kind of file that is known"
    assert problem.evidence == ("50 bytes",)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ((1 << 63).to_bytes(8, "little") + b"{}", "the safetensors header is too long"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "the safetensors header is too long"),
        ((50).to_bytes(8, "little") + b"{}", "the safetensors header reaches past the end of the file"),
    ],
)
def test_a_broken_safetensors_file_is_known_for_one(tmp_path: Path, data: bytes, fact: str) -> None:
    (tmp_path / "model.ckpt").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path / "model.ckpt")
    assert caught.value.problems[0].fact == fact


def test_the_suffix_decides_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", {"x": MemoryTensor(DType.U8, (1,), b"x")}, durable=False)
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "c.png", _use_new_zipfile_serialization=False)
    containers = {"a.ckpt": "safetensors", "b.safetensors": "torch-zip", "c.png": "torch-legacy"}
    for name, container in containers.items():
        with open_checkpoint(tmp_path / name) as found:
            assert (found.container, list(found), found.name) == (container, ["x"], str(tmp_path / name))


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_an_archive_of_other_things_is_refused(tmp_path: Path, archive: str) -> None:
    path = tmp_path / "model.pt"
    if archive == "zip":
        path.write_bytes(plain_zip())
    else:
        (tmp_path / "readme").write_text("nothing")
        with tarfile.open(path, "w") as file:
            file.add(tmp_path / "readme", "readme")
    with pytest.raises(SourceError):
        open_checkpoint(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    long = "x" * 300
    for name, fact in {
        "pipe": f"`{tmp_path / 'pipe'}` is not a regular file",
        "gone": f"cannot open `{tmp_path / 'gone'}`",
        "loop": f"cannot open `{tmp_path / 'loop'}`",
        long: f"cannot open `{tmp_path / long}`",
        "nul\0": f"cannot open `{tmp_path / 'nul'}\0`",
    }.items():
        with pytest.raises(SourceError) as caught:
            open_checkpoint(tmp_path / name)
        assert caught.value.problems[0].fact == fact


def test_what_is_out_of_reach(tmp_path: Path) -> None:
    """In a process without rights, whoever runs the tests."""
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "a.safetensors").write_bytes(b"")
    script = """
import os, sys
from builder.base.errors import SourceError
from builder.formats import open_checkpoint
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        open_checkpoint(path)
    except SourceError as error:
        print(error.problems[0].fact)
"""
    try:
        locked.chmod(0)
        paths = [str(locked), str(locked / "a.safetensors")]
        found = subprocess.run(
            [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
        )
    finally:
        locked.chmod(0o700)
    folder, file = found.stdout.splitlines()
    assert f"`{locked}`" in folder
    assert file == f"cannot open `{locked / 'a.safetensors'}`"


def test_folders(tmp_path: Path) -> None:
    def refusal() -> tuple[str, tuple[str, ...]]:
        with pytest.raises(SourceError) as caught:
            open_checkpoint(tmp_path)
        return caught.value.problems[0].fact, caught.value.problems[0].evidence

    no_set = f"`{tmp_path}` is a folder that does not hold one sharded set"
    assert refusal() == (no_set, ("it holds no file `*.index.json`",))
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    assert refusal() == (no_set, ("it holds `a.safetensors.index.json`, `b.safetensors.index.json`",))
    (tmp_path / "model_index.json").write_text("{}")
    assert refusal()[0] == (
        f"`{tmp_path}` is a model in diffusers' layout, but of a kind that has no original layout here"
    )


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_checkpoint_or_one_clean_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    try:
        open_checkpoint(path).close()
    except SourceError as error:
        assert len(error.problems) == 1


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before = opened()
    for n, (data, *_) in enumerate(STRANGERS.values()):
        path = tmp_path / str(n)
        path.write_bytes(data)
        with pytest.raises(SourceError):
            open_checkpoint(path)
    assert opened() == before


def test_of_a_folder_it_is_said_what_to_give(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.ckpt", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    problem = caught.value.problems[0]
    assert problem.evidence == ("it holds `a.ckpt`, `b.safetensors`",)
    assert problem.hint == f"give a file, such as `{tmp_path / 'a.ckpt'}`"
