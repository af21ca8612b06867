"""Sharded sets: an index, and shards that lie beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.tensors.lazy import DType, MemoryTensor

ONE, TWO = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"


def shard(path: Path, *names: str, metadata: dict[str, str] | None = None) -> None:
    write(
        path, {n: MemoryTensor(DType.U8, (3,), n.encode().ljust(3)) for n in names}, metadata, durable=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shard(tmp_path / ONE, "a", "b", metadata={"format": "pt", "x": "one"})
    shard(tmp_path / TWO, "c", metadata={"format": "pt", "y": "two"})
    index(tmp_path, {"a": ONE, "b": ONE, "c": TWO}, {"total_size": 9, "x": "index"})
    return tmp_path


def index(folder: Path, weight_map: Any, metadata: Any = None) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}), encoding="utf-8")
    return path


def test_a_set_is_one_checkpoint(folder: Path) -> None:
    for given in (folder, folder / "m.safetensors.index.json"):
        with open_checkpoint(given) as found:
            assert found.container == "safetensors-sharded"
            assert {n: bytes(t.tobytes()) for n, t in found.items()} == {
                "a": b"a  ",
                "b": b"b  ",
                "c": b"c  ",
            }
            assert found.size == (folder / ONE).stat().st_size + (folder / TWO).stat().st_size
            assert found.metadata == {"format": "pt", "x": "index", "y": "two"}
            assert found.name == str(given)


def test_tensors_that_the_index_leaves_out_belong_to_the_set(folder: Path) -> None:
    index(folder, {"a": ONE, "c": TWO})
    with open_checkpoint(folder) as found:
        assert set(found) == {"a", "b", "c"}


def test_shards_that_the_index_does_not_name_are_not_read(folder: Path) -> None:
    (folder / "m-00003-of-00002.safetensors").write_bytes(b"junk")
    with open_checkpoint(folder) as found:
        assert len(found) == 3


@pytest.mark.parametrize(
    ("weight_map", "fact", "evidence"),
    [
        ({}, "`weight_map` is not an object of tensor names", ("it is {}",)),
        ([], "`weight_map` is not an object of tensor names", ("it is []",)),
        ({"a": 1}, "the shard of tensor `a` is not a name", ("it is 1",)),
        ({"a": "gone.safetensors"}, "the shard `gone.safetensors` is missing", ()),
        ({"a": "x" * 300}, f"the shard `{'x' * 300}` is missing", ()),
        ({"a": ONE, "c": ONE}, f"tensor `c` is not in its shard `{ONE}`", ("no shard has it",)),
        ({"a": ONE, "b": TWO}, f"tensor `b` is not in its shard `{TWO}`", (f"it is in `{ONE}`",)),
        ({"a": ONE, "x": "again"}, "two shards have tensor `a`", ("`again` and `" + ONE + "`",)),
        ({"a": "m.bin"}, "the shard `m.bin` is a PyTorch file, not safetensors", ()),
    ],
)
def test_what_is_refused(folder: Path, weight_map: Any, fact: str, evidence: tuple[str, ...]) -> None:
    shard(folder / "again", "a")
    torch.save({"a": torch.zeros(1)}, folder / "m.bin")
    path = index(folder, weight_map)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    problem = caught.value.problems[0]
    assert problem.fact == fact
    assert problem.place is not None
    assert problem.place.path == str(path)
    assert problem.evidence == evidence


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "x\0", "./x"])
def test_a_shard_lies_beside_its_index(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    path = index(folder / "sub", {"a": name})
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert caught.value.problems[0].fact == f"the shard `{name}` of tensor `a` is not a plain file name"


def test_a_shard_is_a_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    for name, what in {"pipe": "not a regular file", "sub": "a folder, not a file"}.items():
        with pytest.raises(SourceError) as caught:
            open_checkpoint(index(folder, {"a": name}))
        assert caught.value.problems[0].fact == f"`{folder / name}` is {what}"


def test_a_damaged_shard_is_named(folder: Path) -> None:
    data = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(data[:-1])
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert caught.value.problems[0].fact == "the file ends before its tensors do"
    assert caught.value.problems[0].place is not None
    assert caught.value.problems[0].place.path == str(folder / TWO)


def test_links_to_shards_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As in the cache of a hub, where every file is a link into a folder of blobs."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    with open_checkpoint(snapshot) as found:
        assert set(found) == {"a", "b", "c"}


def test_nothing_stays_open(folder: Path) -> None:
    def opened() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before = opened()
    open_checkpoint(folder).close()
    index(folder, {"a": ONE, "c": TWO, "x": TWO})
    with pytest.raises(SourceError):
        open_checkpoint(folder)
    assert opened() == before


def test_half_a_character_is_no_name(folder: Path) -> None:
    with pytest.raises(SourceError, match="no checkpoint but JSON"):
        open_checkpoint(index(folder, {"a": "\ud800"}))
