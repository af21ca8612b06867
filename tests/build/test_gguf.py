"""GGUF files as sources and outputs of recipes and commands."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from builder.formats import open_checkpoint
from builder.recipe.lock import read_lock
from builder.recipe.values import QUANTIZE
from builder.tensors.ggml_blocks import BLOCKS
from builder.tensors.packed.encode import FORMS
from tests.help.building import UNET, Folder, content, model, save, save_dirty, values
from tests.help.gguf_files import packed, write

RECIPE = 'format = 1\nname = "m"\nbase = "NEW UNET-mini"\ncomponents.UNET-mini = "{}"\n'
SOURCE = '[sources.{0}]\nfile = "{0}.{1}"\n'
GGUF = '[output]\nfile = "m.gguf"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """With a UNET in blocks, the same as the numbers that they stand for, and whole models."""
    made = Folder.below(tmp_path)
    blocks = packed(model("UNET-mini", seed=3))
    write(made / "blocks.gguf", {n.removeprefix(UNET): t for n, t in blocks.items()}, "sd1")
    with open_checkpoint(made / "blocks.gguf") as held:
        kinds = {t.stored[0] for t in held.values()}
        numbers = {n: values(np.frombuffer(t.tobytes(), "f4").reshape(t.shape)) for n, t in held.items()}
    assert kinds == {"F32", "Q8_0"}
    save(made / "numbers.safetensors", numbers)
    save(made / "other.safetensors", model("SD-mini", seed=5))
    save_dirty(made / "dirty.ckpt", "mini")
    return made


def stored(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as held:
        return {n: t.stored[0] for n, t in held.items()}


# As sources.


@pytest.mark.parametrize("precision", ["fp16", "fp32", "keep"])
def test_blocks_are_the_numbers_that_they_stand_for(folder: Folder, precision: str) -> None:
    """Another container of the same tensors gives the same bytes."""
    output = f'[output]\nprecision = "{precision}"\n'
    folder.write("a.toml", RECIPE.format("s") + SOURCE.format("s", "gguf") + output)
    (folder / "s.gguf").write_bytes((folder / "blocks.gguf").read_bytes())
    said = folder("build", "a.toml")
    assert said.code == 0, said.err
    first = (folder / "m.safetensors").read_bytes()
    folder.write("a.toml", RECIPE.format("s") + SOURCE.format("s", "safetensors") + output)
    (folder / "s.safetensors").write_bytes((folder / "numbers.safetensors").read_bytes())
    folder.build("a.toml")
    assert (folder / "m.safetensors").read_bytes() == first
    assert ("in blocks of Q8_0" in said.err) is (precision == "keep")


def test_a_merge_of_blocks_and_numbers(folder: Folder) -> None:
    step = '[steps.mix]\nop = "weighted-sum"\na = "{}"\nb = "other"\nalpha = 0.3\n'
    made = []
    for name, kind in (("blocks", "gguf"), ("numbers", "safetensors")):
        sources = SOURCE.format(name, kind) + SOURCE.format("other", "safetensors")
        folder.write("mix.toml", RECIPE.format("mix") + sources + step.format(name))
        folder.build("mix.toml")
        made.append(content(folder / "m.safetensors"))
    assert made[0] == made[1]


def test_commands_take_a_gguf_file(folder: Folder) -> None:
    assert folder("diff", "blocks.gguf", "numbers.safetensors").code == 0
    assert folder("extract", "blocks.gguf", "UNET-mini", "-o", "e.safetensors").code == 0
    assert {t for t, _, _ in content(folder / "e.safetensors").values()} == {"F16"}
    said = folder("convert", "blocks.gguf", "-o", "c.safetensors")
    assert "note: `blocks` is in blocks of Q8_0: they become the FP32 numbers that they are" in said.err
    assert content(folder / "c.safetensors") == content(folder / "numbers.safetensors")
    made = folder("replace", "other.safetensors", "UNET-mini=blocks.gguf", "-o", "r.safetensors")
    assert made.code == 0, made.err
    said = folder("prune", "blocks.gguf")
    assert said.code and "not pruned: its weights are in blocks" in said.err
    assert folder("prune", "--force", "blocks.gguf").code == 0
    assert {t for t, _, _ in content(folder / "blocks-pruned.safetensors").values()} == {"F16"}
    assert folder("new", "blocks.gguf", "-o", "new.toml").code == 0
    assert "blocks.gguf" in (folder / "new.toml").read_text()


def test_what_inspect_says(folder: Folder) -> None:
    said = folder("inspect", "blocks.gguf", "--no-metric")
    assert said.code == 0
    assert "UNET-mini · GGUF for sd1 · " in said.out
    assert "types      F32 605 tensors (1.7 MB), Q8_0 81 tensors (143 kB)" in said.out
    assert "wasted" not in said.out and "pruned" not in said.out  # to 16 bits: it would grow
    (file,) = folder("inspect", "blocks.gguf", "--json").json["files"]
    assert file["container"] == "gguf"
    assert file["types"] == {
        "F32": {"tensors": 605, "bytes": 1_669_744},
        "Q8_0": {"tensors": 81, "bytes": 142_528},
    }
    (part,) = file["components"]
    assert (part["bytes"], part["dtypes"]) == (1_669_744 + 142_528, {"F32": 605, "Q8_0": 81})
    (numbers,) = folder("inspect", "numbers.safetensors", "--json").json["files"]
    assert part["digest"] == numbers["components"][0]["digest"]


# As outputs.


def test_a_model_in_blocks_is_built_once(folder: Folder) -> None:
    output = GGUF + 'quantize = "q8_0"\n'
    folder.write("m.toml", RECIPE.format("dirty") + SOURCE.format("dirty", "ckpt") + output)
    folder.know("dirty.ckpt")
    (first,) = folder.build("m.toml")["outputs"]
    assert first["state"] == "written"
    data = (folder / "m.gguf").read_bytes()
    assert folder.states("m.toml")["output m.gguf"] == "unchanged"
    (again,) = folder.build("m.toml", "--locked")["outputs"]
    assert again == {**first, "state": "unchanged"}
    assert folder("build", "m.toml", "--check").code == 0
    assert folder("verify", "m.toml").code == 0
    locked = read_lock(folder / "m.lock.toml")
    assert locked is not None and locked.outputs["m"].sha256 == first["sha256"]
    (folder / "m.gguf").unlink()
    folder.build("m.toml", "--locked")
    assert (folder / "m.gguf").read_bytes() == data
    reader = gguf.GGUFReader(folder / "m.gguf")
    architecture = reader.get_field("general.architecture")
    assert architecture is not None and architecture.contents() == "sd1"
    assert len(reader.tensors) == 686
    kinds = stored(folder / "m.gguf")
    assert kinds["middle_block.0.in_layers.2.weight"] == "Q8_0"
    assert kinds["middle_block.0.in_layers.2.bias"] == "F32"
    assert "F16" in kinds.values()  # of what no whole blocks fit


def test_numbers_are_rounded_once_and_vectors_not_at_all(folder: Folder) -> None:
    (folder / "m.toml").write_text(RECIPE.format("numbers") + SOURCE.format("numbers", "safetensors") + GGUF)
    folder.build("m.toml")
    with (
        open_checkpoint(folder / "numbers.safetensors") as source,
        open_checkpoint(folder / "m.gguf") as made,
    ):
        assert set(source) == set(made)
        for name, tensor in source.items():
            wanted = np.frombuffer(tensor.tobytes(), "f4")
            vector = len(tensor.shape) < 2 or tensor.numel <= 1024
            assert made[name].shape == tensor.shape
            assert bytes(made[name].tobytes()) == wanted.astype("f4" if vector else "f2").tobytes(), name


def test_another_output_of_the_same_component(folder: Folder) -> None:
    """What is known of a component by one form holds for the other."""
    outputs = '[[output]]\nname = "a"\nfile = "a.gguf"\nquantize = "q8_0"\n'
    outputs += '[[output]]\nname = "b"\nfile = "b.safetensors"\nprecision = "fp32"\n'
    folder.write("m.toml", RECIPE.format("dirty") + SOURCE.format("dirty", "ckpt") + outputs)
    folder.know("dirty.ckpt")
    folder.build("m.toml")
    first = {n: (folder / n).read_bytes() for n in ("a.gguf", "b.safetensors")}
    for name in first:
        (folder / name).unlink()
        folder.build("m.toml")
        assert (folder / name).read_bytes() == first[name]
    assert folder("build", "m.toml", "--check").code == 0
    locked = read_lock(folder / "m.lock.toml")
    assert locked is not None and len({c.blake3 for c in locked.components}) == 1


def test_commands_that_write_a_gguf_file(folder: Folder) -> None:
    said = folder("extract", "dirty.ckpt", "UNET-mini", "-o", "a.gguf", "--quantize", "q8_0")
    assert said.code == 0, said.err
    assert folder("convert", "a.gguf", "-o", "b.gguf", "--quantize", "q8_0").code == 0
    assert content(folder / "a.gguf") == content(folder / "b.gguf")
    assert folder("convert", "a.gguf", "-o", "c.gguf").code == 0  # all as it is, so blocks as numbers
    assert content(folder / "c.gguf") == content(folder / "a.gguf")
    assert set(stored(folder / "c.gguf").values()) == {"F32", "F16"}
    assert folder("extract", "dirty.ckpt", "UNET-mini", "--format", "gguf").code == 0


WRONG = {
    "a whole model": ("dirty", 'base = "dirty"', GGUF, "holds a diffusion model by itself"),
    "blocks elsewhere": (
        "numbers",
        'base = "numbers"',
        '[output]\nquantize = "q8_0"\n',
        '`quantize = "q8_0"` is for a GGUF file, and `m.safetensors` is one file',
    ),
    "blocks of what is kept": (
        "numbers",
        'base = "numbers"',
        GGUF + 'quantize = "q8_0"\nprecision = "keep"\n',
        "nothing is packed where all is kept",
    ),
    "another scheme": (
        "numbers",
        'base = "numbers"',
        GGUF + 'quantize = "fp8"\n',
        '`quantize = "fp8"` is for one file or a sharded set, and `m.gguf` is a GGUF file',
    ),
    "all that a file has": (
        "numbers",
        'base = "numbers"',
        GGUF + "verbatim = true\n",
        "`verbatim` is for one file or a sharded set or a diffusers folder, and `m.gguf` is a GGUF file",
    ),
    "another type": (
        "numbers",
        'base = "numbers"',
        GGUF + 'quantize = "q4_k"\n',
        "unknown scheme `q4_k`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_written(folder: Folder, name: str) -> None:
    source, base, output, fact = WRONG[name]
    kind = "ckpt" if source == "dirty" else "safetensors"
    recipe = f'format = 1\nname = "m"\n{base}\n' + SOURCE.format(source, kind) + output
    folder.write("m.toml", recipe)
    said = folder("build", "m.toml")
    assert said.code == 3
    assert fact in said.err
    assert not (folder / "m.gguf").exists()


def test_what_has_no_place_is_told(folder: Folder) -> None:
    tensors = {**model("SD-mini"), "v_pred": values(np.zeros(0))}
    save(folder / "v.safetensors", tensors)
    said = folder("extract", "v.safetensors", "UNET-mini", "-o", "a.gguf")
    assert said.code == 0
    assert "a GGUF file has no place for `v_pred`" in said.err
    assert "v_pred" not in stored(folder / "a.gguf")


def test_every_way_to_pack_is_one_that_is_made() -> None:
    assert {w for w, q in QUANTIZE.items() if "gguf" not in q.forms} == set(FORMS)
    assert {w for w, q in QUANTIZE.items() if "gguf" in q.forms} <= {name.lower() for name in BLOCKS}
