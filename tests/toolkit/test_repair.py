"""A broken file from which no tensor suffers has a way out: `ckpt convert --repair`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.help.building import Folder, content, files, model, save


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with a good file, and one that goes on after its last tensor."""
    made = Folder.below(tmp_path)
    data = save(made / "good.safetensors", model()).read_bytes()
    (made / "long.safetensors").write_bytes(data + bytes(5000))
    return made


def headed(data: bytes, metadata: object) -> bytes:
    """A safetensors file with other metadata."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_the_message_says_what_is_too_much_and_the_way_out(folder: Folder) -> None:
    said = folder("inspect", "long.safetensors")
    size = sum(len(data) for *_, data in content(folder / "good.safetensors").values())
    assert said.code == 6
    assert said.err == (
        "error: the file goes on after its last tensor\n"
        "  --> long.safetensors\n"
        f"   = the tensors end at byte {size:,} of the data, {size + 5000:,} are there: "
        "5,000 bytes too many\n"
        f"   = all {len(model()):,} tensors are there\n"
        "hint: `ckpt convert FILE --repair -o OTHER.safetensors` writes them as a valid file\n"
    )


def test_the_way_out_is_one(folder: Folder) -> None:
    good = (folder / "good.safetensors").read_bytes()
    (folder / "odd.safetensors").write_bytes(headed(good, {"step": 100, "title": "x"}))
    for name, mended in (
        ("long", "5,000 bytes behind the last tensor left out"),
        ("odd", "metadata that were no strings are now: `step`"),
        ("good", "nothing was wrong with the file"),
    ):
        said = folder("convert", f"{name}.safetensors", "--repair", "-o", f"{name}-mended.safetensors")
        assert (said.code, said.err) == (0, f"note: repair: {mended}\n")
        assert content(folder / f"{name}-mended.safetensors") == content(folder / "good.safetensors")
        assert folder("inspect", "--no-metric", f"{name}-mended.safetensors").code == 0
    metadata = folder("inspect", "--json", "odd-mended.safetensors").json["files"][0]["metadata"]
    assert metadata == {"step": "100", "title": "x"}


def test_nothing_else_is_repaired(folder: Folder) -> None:
    data = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-100])
    before = files(folder.path)
    said = folder("convert", "cut.safetensors", "--repair", "-o", "x.safetensors")
    assert said.code == 6 and "the file ends before its tensors do" in said.err
    said = folder("convert", "long.safetensors", "--repair", "-o", "x.safetensors", "--save-recipe", "x.toml")
    assert said.code == 2 and "no recipe reads a broken file" in said.err
    assert files(folder.path) == before


def test_a_shard_is_repaired_too(folder: Folder) -> None:
    assert folder("convert", "good.safetensors", "-o", "set.safetensors.index.json").code == 0
    (shard,) = folder.path.glob("set-*.safetensors")
    shard.write_bytes(shard.read_bytes() + b"tail")
    assert folder("inspect", "set.safetensors.index.json").code == 6
    said = folder("convert", "set.safetensors.index.json", "--repair", "-o", "one.safetensors")
    assert said.err == f"note: repair: {shard.name}: 4 bytes behind the last tensor left out\n"
    assert content(folder / "one.safetensors") == content(folder / "good.safetensors")


def test_a_part_of_a_folder_is_repaired_too(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini"))
    assert folder("convert", "mini.safetensors", "-o", "model/").code == 0
    part = folder / "model/vae/diffusion_pytorch_model.safetensors"
    part.write_bytes(part.read_bytes() + b"tail")
    assert folder("convert", "model", "-o", "no.safetensors").code == 6
    said = folder("convert", "model", "--repair", "-o", "one.safetensors")
    assert said.code == 0 and "4 bytes behind the last tensor left out" in said.err
    assert content(folder / "one.safetensors") == content(folder / "mini.safetensors")
