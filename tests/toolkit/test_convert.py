"""`ckpt convert` between containers and precisions: nothing is dropped, nothing half-made is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.disk import new_folder, new_set
from builder.base.errors import OutputError, UsageError
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.formats.write_sharded import plan_shards
from builder.recipe.names import form_of
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.moves import Joined, Reshaped, Rows, Transposed
from builder.toolkit.convert import convert
from tests.help.building import ROOT, Folder, content, files, model, save, save_dirty, values

NAMES = ("out.safetensors", "out.ckpt", "out.pt", "out.safetensors.index.json")
DTYPES = [DType.BOOL, DType.U8, DType.I64, DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for name in draw(
        st.lists(st.text("ab.é_\n", min_size=1, max_size=8), min_size=1, max_size=6, unique=True)
    ):
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        size = int(np.prod(shape)) * dtype.itemsize
        bits = st.integers(0, 1) if dtype is DType.BOOL else st.integers(0, 255)
        tensors[name] = MemoryTensor(dtype, shape, bytes(draw(st.lists(bits, min_size=size, max_size=size))))
    return tensors


@settings(max_examples=40)
@given(checkpoints(), st.permutations(NAMES), st.integers(1, 40))
def test_every_tensor_survives_every_container(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, LazyTensor], forms: list[str], size: int
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    source = folder / "in.safetensors"
    write(source, tensors, {"format": "pt"}, durable=False)
    before, first = content(source), source.read_bytes()
    with Folder.below(folder).workspace() as workspace, workspace.sources() as sources:
        for number, form in enumerate(forms):
            target = folder / str(number) / form
            target.parent.mkdir()
            limit = size if form.endswith(".json") else None
            made = convert(source, str(target), workspace, sources, shard_size=limit)
            assert (made.tensors, content(target)) == (len(tensors), before)
            source = target
        convert(source, str(folder / "last.safetensors"), workspace, sources)
    assert (folder / "last.safetensors").read_bytes() == first


def test_a_pytorch_file_is_a_plain_dict_that_loads_safely(folder: Folder) -> None:
    source = save_dirty(folder / "dirty.ckpt")
    said = folder("convert", source, "-o", "plain.pt")
    assert said.code == 0
    assert "not carried over" in said.err and "`epoch`" in said.err
    loaded = torch.load(folder / "plain.pt", weights_only=True)
    assert type(loaded) is dict
    before = content(folder / "dirty.ckpt")
    assert loaded.keys() == before.keys()
    for name, (_, shape, data) in before.items():
        assert isinstance(loaded[name], torch.Tensor) and tuple(loaded[name].shape) == shape
        assert loaded[name].contiguous().numpy().tobytes() == data
    assert any(n.startswith("model_ema.") for n in loaded) and "loss.logvar" in loaded


def test_metadata_goes_wherever_it_can(folder: Folder) -> None:
    metadata = {"format": "pt", "modelspec.title": "Ünïcode", "sd_merge_recipe": '{"a": 1}'}
    write(folder / "a.safetensors", model("VAE-mini"), metadata, durable=False)
    assert folder("convert", "a.safetensors", "-o", "b.safetensors.index.json").code == 0
    assert folder("convert", "b.safetensors.index.json", "-o", "c.safetensors").code == 0
    assert (folder / "c.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
    said = folder("convert", "c.safetensors", "-o", "d.ckpt", "--json")
    assert said.json["lost"] == ["metadata, which a dict of tensors cannot hold"]
    assert folder("convert", "d.ckpt", "-o", "e.safetensors").code == 0
    with open_checkpoint(folder / "e.safetensors") as found:
        assert found.metadata == {"format": "pt"}


def test_shards_hold_what_they_may(folder: Folder) -> None:
    save(folder / "m.safetensors", model("SD-mini"))
    said = folder(
        "convert", "m.safetensors", "-o", "set/m.safetensors.index.json", "--shard-size", "1MB", "--json"
    )
    made = sorted((folder / "set").iterdir())
    shards = [p for p in made if p.suffix == ".safetensors"]
    assert len(shards) > 2
    assert [p.name for p in shards] == [
        f"m-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert said.json["size"] == sum(p.stat().st_size for p in made)
    index = json.loads((folder / "set" / "m.safetensors.index.json").read_text())
    total = 0
    for path in shards:
        theirs = safetensors.torch.load_file(path)
        size = sum(t.nbytes for t in theirs.values())
        assert size <= 1_000_000
        assert all(index["weight_map"][name] == path.name for name in theirs)
        total += size
    assert index["metadata"]["total_size"] == total
    assert content(folder / "set") == content(folder / "m.safetensors")


def test_a_shard_that_begins_like_a_pickle(folder: Folder) -> None:
    for length in range(256):  # of a name: some header's length begins with a pickle's first byte
        path = folder / "m.safetensors"
        write(path, {"n" * (length + 1): values([1.0])}, {"format": "pt"}, durable=False)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert folder("convert", "m.safetensors", "-o", "s.safetensors.index.json").code == 0
    shard = folder / "s-00001-of-00001.safetensors"
    assert shard.read_bytes()[0] == 0x80
    assert content(folder / "s.safetensors.index.json") == content(path)


def test_a_tensor_too_large_for_a_shard_has_its_own() -> None:
    tensors = {n: MemoryTensor(DType.U8, (s,), bytes(s)) for n, s in {"a": 3, "b": 9, "c": 2, "d": 2}.items()}
    assert [s.names for s in plan_shards(tensors, "m", 4)] == [("a",), ("b",), ("c", "d")]


def test_a_set_of_nothing_is_refused(folder: Folder) -> None:
    write(folder / "m.safetensors", {}, durable=False)
    said = folder("convert", "m.safetensors", "-o", "s.safetensors.index.json")
    assert said.code == 7 and "no tensors" in said.err
    assert files(folder.path) == {"m.safetensors"}
    assert folder("convert", "m.safetensors", "-o", "m.pt").code == 0
    assert torch.load(folder / "m.pt", weights_only=True) == {}


def test_precision(folder: Folder) -> None:
    tensors = {
        "w": values([[1.00048828125, -3.0]]),
        "double": values([0.1, 1e-9], "<f8"),
        "ids": values([0, 1, 2], "<i8"),
        "betas": values(np.linspace(0.001, 0.012, 1000)),
    }
    save(folder / "m.safetensors", tensors)
    before = safetensors.torch.load_file(folder / "m.safetensors")
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        out = f"{precision}.safetensors"
        assert folder("convert", "m.safetensors", "-o", out, "--precision", precision).code == 0
        after = safetensors.torch.load_file(folder / out)
        for name in ("w", "double"):
            assert after[name].dtype == dtype
            assert torch.equal(after[name], before[name].float().to(dtype))
        for name in ("ids", "betas"):  # no weights: an index, and the noise schedule
            assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])


def test_values_that_would_not_survive_are_an_error_unless_asked_for(folder: Folder) -> None:
    save(folder / "m.safetensors", {"w": values([1e6, 2.0]), "x": values([float("nan"), -1.0])})
    targets = ("o.safetensors", "o.ckpt", "o.safetensors.index.json")
    for target in targets:
        said = folder("convert", "m.safetensors", "-o", target, "--precision", "fp16")
        assert said.code == 7
        assert "1 finite values are beyond F16" in said.err and "--overflow clamp" in said.err
        assert "1 are NaN" in said.err and "--non-finite keep" in said.err
        assert files(folder.path) == {"m.safetensors"}
        assert folder("convert", "m.safetensors", "-o", target).code == 0  # as it is: no value is looked at
        assert content(folder / target) == content(folder / "m.safetensors")
        for made in files(folder.path) - {"m.safetensors"}:
            (folder / made).unlink()
    options = ("--precision", "fp16", "--overflow", "clamp", "--non-finite", "keep")
    assert folder("convert", "m.safetensors", "-o", "o.pt", *options).code == 0
    loaded = torch.load(folder / "o.pt", weights_only=True)
    assert loaded["w"].tolist() == [65504.0, 2.0] and loaded["x"].isnan().tolist() == [True, False]


def test_the_output_is_never_an_input(folder: Folder) -> None:
    save(folder / "m.safetensors", model("VAE-mini"))
    before = (folder / "m.safetensors").read_bytes()
    (folder / "link.safetensors").symlink_to("m.safetensors")
    os.link(folder / "m.safetensors", folder / "hard.safetensors")
    for target in ("m.safetensors", "link.safetensors", "hard.safetensors", "./x/../m.safetensors"):
        (folder / "x").mkdir(exist_ok=True)
        said = folder("convert", "m.safetensors", "-o", target)
        assert said.code == 7 and "is one of the inputs" in said.err
    assert folder("convert", "m.safetensors", "-o", "s.safetensors.index.json").code == 0
    said = folder("convert", "s.safetensors.index.json", "-o", "s-00001-of-00001.safetensors")
    assert said.code == 7 and "is one of the inputs" in said.err
    said = folder("convert", "s.safetensors.index.json", "-o", "s.safetensors.index.json")
    assert said.code == 7 and "exists already" in said.err
    assert (folder / "m.safetensors").read_bytes() == before


def test_what_is_there_is_not_replaced_by_several_files(folder: Folder) -> None:
    save(folder / "m.safetensors", model("VAE-mini"))
    folder.write("n-00001-of-00001.safetensors", "mine")
    before = files(folder.path)
    said = folder("convert", "m.safetensors", "-o", "n.safetensors.index.json")
    assert said.code == 7 and "`n-00001-of-00001.safetensors` exists already" in said.err.replace(
        f"{folder.path}/", ""
    )
    assert files(folder.path) == before and (folder / "n-00001-of-00001.safetensors").read_text() == "mine"
    save(folder / "model.safetensors", model("SD-mini"))
    folder.write("taken/notes.txt", "mine")
    before = files(folder.path)
    said = folder("convert", "model.safetensors", "-o", "taken/")
    assert said.code == 7 and "exists already" in said.err and "another name" in said.err
    assert files(folder.path) == before


def test_a_file_takes_the_place_of_an_older_one(folder: Folder) -> None:
    save(folder / "m.safetensors", model("VAE-mini"))
    folder.write("out.pt", "old")
    assert folder("convert", "m.safetensors", "-o", "out.pt").code == 0
    assert content(folder / "out.pt") == content(folder / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.safetensors", "safetensors"),
        ("A.SAFETENSORS", "safetensors"),
        ("a.sft", "safetensors"),
        ("a.v1.ckpt", "torch"),
        ("a.pth", "torch"),
        ("pytorch_model.bin", "torch"),
        ("x/a.safetensors.index.json", "sharded"),
        ("folder", "diffusers"),
        ("folder/", "diffusers"),
        ("model-v1.5", "diffusers"),
        ("dots.in.name/", "diffusers"),
    ],
)
def test_the_name_says_the_form(name: str, form: str) -> None:
    assert form_of(name) == form


def test_requests_that_make_no_sense(folder: Folder) -> None:
    save(folder / "m.safetensors", model("VAE-mini"))
    folder.write("junk.ckpt", "<html>login</html>")
    before = files(folder.path)
    for args, code, text in (
        (("m.safetensors", "-o", "m.onnx"), 2, "suffix of no container"),
        (("m.safetensors", "-o", "m.gguf"), 3, "a GGUF file holds a diffusion model by itself"),
        (("m.safetensors", "-o", "a.pt", "--shard-size", "2GB"), 2, "`a.safetensors.index.json`"),
        (("m.safetensors", "-o", "a.safetensors.index.json", "--shard-size", "huge"), 2, "is no size"),
        (("m.safetensors", "-o", "a.pt", "--precision", "fp8"), 2, "fp8"),
        (("m.safetensors",), 2, "--output"),
        (("none.safetensors", "-o", "a.pt"), 6, "cannot open"),
        (("junk.ckpt", "-o", "a.pt"), 6, "HTML"),
        (("m.safetensors", "-o", "folder"), 6, "it is VAE-mini"),
        (("m.safetensors", "-o", "."), 6, "it is VAE-mini"),
        (("m.safetensors", "-o", "a.pt", "--prediction", "v"), 2, "`--prediction` is for a diffusers folder"),
        (("m.safetensors", "-o", "a.pt", "--tokenizer", "."), 2, "`--tokenizer` is for a diffusers folder"),
        (("m.safetensors", "-o", "x" * 300 + ".pt"), 7, "File name too long"),
        (("m.safetensors", "-o", "x." + "y" * 300), 2, "suffix of no container"),
        (("m.safetensors", "-o", "x" * 300 + ".safetensors.index.json"), 7, "File name too long"),
        (("x" * 300, "-o", "a.pt"), 6, "File name too long"),
    ):
        said = folder("convert", *args)
        assert (said.code, text in said.err) == (code, True), said.err
        assert "Traceback" not in said.err
    assert files(folder.path) == before


def test_what_a_container_cannot_hold_is_named(folder: Folder) -> None:
    packed = MemoryTensor(DType.F6_E2M3, (4,), bytes(3))
    write(folder / "packed.safetensors", {"w": packed}, durable=False)
    said = folder("convert", "packed.safetensors", "-o", "a.pt")
    assert said.code == 7 and "no F6_E2M3 tensors" in said.err
    torch.save({"a\0b": torch.zeros(1)}, folder / "odd.pt")
    said = folder("convert", "odd.pt", "-o", "a.safetensors")
    assert said.code == 7 and "cannot be named" in said.err
    assert files(folder.path) == {"packed.safetensors", "odd.pt"}


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from builder.base.disk import new_folder
        with new_folder(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    target = tmp_path / "model"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(target)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with new_folder(target) as first:
        (first / "whole").write_text("x")
        with new_folder(tmp_path / "other"):
            assert first.exists()  # another's that is under way is no litter
    assert files(tmp_path) == {"model", "model/whole", "other"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    for making in (new_folder, new_set):
        with pytest.raises(UsageError), making(tmp_path / "x") as folder:
            (folder / "half").write_text("x")
            raise UsageError
        with pytest.raises(OutputError, match="cannot write"), making(tmp_path / "x") as folder:
            (folder / "no" / "such").write_text("x")
        assert not files(tmp_path)


# ── tensors made of others ──


@settings(max_examples=60)
@given(st.data())
def test_moved_elements_are_those_that_torch_moves(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    array = np.arange(height * width, dtype="<i8").reshape(height, width)
    plain = MemoryTensor(DType.I64, array.shape, array.tobytes())
    first = data.draw(st.integers(0, height))
    last = data.draw(st.integers(first, height))
    made: list[tuple[LazyTensor, np.ndarray]] = [
        (Transposed(plain), array.T),
        (Transposed(Transposed(plain)), array),
        (Rows(plain, first, last - first), array[first:last]),
        (Reshaped(plain, (height, width, 1)), array[:, :, None]),
        (
            Joined([plain, Rows(plain, first, last - first), plain]),
            np.concatenate([array, array[first:last], array]),
        ),
    ]
    for tensor, expected in made:
        assert tensor.shape == expected.shape
        count = expected.size
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        out = bytearray((stop - start) * 8)
        if out:
            tensor.read_into(start * 8, memoryview(out))
        assert bytes(out) == np.ascontiguousarray(expected).tobytes()[start * 8 : stop * 8]
        window = data.draw(st.integers(1, 5)) * 8
        assert b"".join(bytes(w) for w in tensor.windows(window)) == np.ascontiguousarray(expected).tobytes()


def test_a_large_transpose_takes_little_memory() -> None:
    class Counting(LazyTensor):
        """A matrix whose element is its index."""

        def read_into(self, start: int, out: memoryview) -> None:
            out[:] = np.arange(start // 4, (start + len(out)) // 4, dtype="<u4").tobytes()

    tensor = Transposed(Counting(DType.U32, (6000, 4000)))
    tracemalloc.start()
    window = next(islice(tensor.windows(), 3, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20  # of 96 MB
    found = np.frombuffer(window, "<u4")
    at = 3 * len(found) + np.arange(len(found))
    assert np.array_equal(found, at // 6000 + at % 6000 * 4000)


def test_a_scheduler_that_contradicts_the_markers_is_told(folder: Folder) -> None:
    marker = MemoryTensor(DType.F32, (0,), b"")
    save(folder / "m.safetensors", {**model("SD-mini"), "v_pred": marker})
    said = folder("convert", "m.safetensors", "-o", "out/", "--prediction", "epsilon")
    assert said.code == 0 and "says two things of what it predicts" in said.err
    assert folder("convert", "m.safetensors", "-o", "two/").err.count("says two things") == 0
