"""Weights that are zeros are said, with where in the file they lie: a download may have lost them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from builder.formats import open_checkpoint
from builder.formats.blob import BlobTensor
from builder.tensors.lazy import LazyTensor, MemoryTensor
from tests.help.building import CLIP, UNET, VAE, Folder, catalog, content, like, model, save, values
from tests.help.torch_forms import records, zipped


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where in a file its tensors' bytes lie: from, up to."""
    with open_checkpoint(path, catalog().layouts) as checkpoint:
        return {
            n: (t.offset, t.offset + t.nbytes) for n, t in checkpoint.items() if isinstance(t, BlobTensor)
        }


def lose(path: Path, start: int, stop: int) -> Path:
    """A file with zeros from `start` to `stop`, and none beside them."""
    with path.open("r+b") as file:
        file.seek(start - 1)
        file.write(b"\x01" + bytes(stop - start) + b"\x01")
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_lost_stretch_is_named_by_inspect(folder: Folder, name: str) -> None:
    path = save(folder / name, model("SD-mini"))
    at = places(path)
    largest = max(at, key=lambda n: at[n][1] - at[n][0])
    start, stop = at[largest]
    lose(path, start + 101, stop - 7)
    said = folder("inspect", "--json", name).json["files"][0]
    length = stop - 7 - start - 101
    assert length > 1 << 14
    assert said["zeros"] == [
        {"file": name, "offset": start + 101, "length": length, "tensors": [largest], "wholly": []}
    ]
    shown = folder("inspect", name)
    assert shown.code == 0
    assert "! zeros where weights should be: 1 in part\n" in shown.out
    assert f"    {length:,} bytes from byte {start + 101:,} of `{name}` on: `{largest}`\n" in shown.out


def test_a_stretch_over_many_tensors_is_one(folder: Folder) -> None:
    path = save(folder / "model.safetensors", model("SD-mini"))
    at = places(path)
    order = sorted((n for n in at if n.startswith(UNET)), key=lambda n: at[n])
    first, last = at[order[3]][0], at[order[40]][1]
    lose(path, first - 5, last + 3)
    (found,) = folder("inspect", "--json", "model.safetensors").json["files"][0]["zeros"]
    # Of the few bytes in the tensors before and behind, nobody can tell whether they belong to it.
    assert (found["offset"], found["length"]) == (first, last - first)
    assert found["tensors"] == found["wholly"] == order[3:41]


def wiped(tensors: Mapping[str, LazyTensor], *names: str) -> dict[str, LazyTensor]:
    """With these tensors all zeros."""
    blank = {n: MemoryTensor(t.dtype, t.shape, bytes(t.nbytes)) for n, t in tensors.items() if n in names}
    assert len(blank) == len(names)
    return {**tensors, **blank}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{VAE}decoder.conv_out.weight", True),  # 864 bytes of weights
        (f"{VAE}decoder.conv_out.bias", False),  # as any untrained bias
        (f"{CLIP}final_layer_norm.bias", False),
    ],
)
def test_what_zeros_are_worth_a_word(folder: Folder, name: str, told: bool) -> None:
    save(folder / "model.safetensors", wiped(model("SD-mini"), name))
    found = folder("inspect", "--json", "model.safetensors").json["files"][0]["zeros"]
    assert [z["wholly"] for z in found] == ([[name]] if told else [])
    built = folder("prune", "model.safetensors", "-o", "out.safetensors")
    assert built.code == 0
    assert ("warning: zeros where weights should be: 1 tensor wholly" in built.err) == told


def test_a_build_says_it_of_the_source(folder: Folder) -> None:
    """FP32 in the source, FP16 in the product: the place is that of the bytes which were lost."""
    name = f"{VAE}decoder.conv_out.weight"
    save(folder / "model.safetensors", wiped(model("SD-mini"), name))
    start, stop = places(folder / "model.safetensors")[name]
    said = folder("extract", "model.safetensors", "VAE", "-o", "vae.safetensors")
    assert said.code == 0
    assert said.err == (
        "warning: zeros where weights should be: 1 tensor wholly\n"
        f"   = {stop - start:,} bytes from byte {start:,} of `model.safetensors` on: "
        "`decoder.conv_out.weight`\n"
        "hint: unless they were never trained, a download has lost them: compare the SHA-256 with the "
        "publisher's, and get it again\n"
    )


def test_what_was_built_before_is_said_again_where_it_now_lies(folder: Folder) -> None:
    name = f"{VAE}decoder.conv_out.weight"
    save(folder / "dirty.ckpt", wiped(model("SD-mini"), name))
    folder.write("r.toml", 'format = 1\nname = "r"\nbase = "d"\nsources.d.file = "dirty.ckpt"\n')
    assert "of `dirty.ckpt` on" in folder("build", "r.toml").err
    (folder / "r.toml").write_text((folder / "r.toml").read_text() + "[output]\nmetadata.a = 'b'\n")
    again = folder("build", "r.toml").err
    start, stop = places(folder / "r.safetensors")[name]
    where = f"{stop - start:,} bytes from byte {start:,} of `r.safetensors` on"
    assert f"   = {where}: `{name}`\n" in again


def test_a_tensor_that_does_not_lie_in_the_file_as_it_is(folder: Folder) -> None:
    name = f"{VAE}decoder.conv_out.weight"
    path = save(folder / "model.ckpt", wiped(model("SD-mini"), name))
    zipped(folder / "packed.ckpt", records(path).items(), deflate=lambda _: True)
    found = folder("inspect", "--json", "packed.ckpt").json["files"][0]["zeros"]
    length = model("SD-mini")[name].nbytes
    assert found == [{"file": None, "offset": None, "length": length, "tensors": [name], "wholly": [name]}]
    assert f"    {length:,} bytes: `{name}`\n" in folder("inspect", "packed.ckpt").out


def test_zeros_that_rounding_makes_were_not_lost(folder: Folder) -> None:
    name = f"{VAE}decoder.conv_out.weight"
    tiny = like(model("SD-mini")[name], fill=1e-20)
    save(folder / "model.safetensors", {**model("SD-mini"), name: tiny})
    said = folder("extract", "model.safetensors", "VAE", "-o", "vae.safetensors")
    assert (said.code, said.err) == (0, "")
    made = content(folder / "vae.safetensors")["decoder.conv_out.weight"]
    assert made == ("F16", tiny.shape, bytes(2 * tiny.numel))


def test_junk_is_nobodys_loss(folder: Folder) -> None:
    junk = {"first_stage_model.loss.discriminator.main.0.weight": values(np.zeros((64, 64)))}
    save(folder / "model.safetensors", {**model("SD-mini"), **junk})
    assert folder("inspect", "--json", "--full", "model.safetensors").json["files"][0]["zeros"] == []
