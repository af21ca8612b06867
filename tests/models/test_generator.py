"""Generated checkpoints are what they claim to be, to our readers and to the programs of others."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from benchmarks.generate import write
from benchmarks.harness import Sample, Target, outcome
from builder.base.errors import OutputError, Problem, SourceError, UsageError
from builder.formats import open_checkpoint
from builder.formats.write_torch import writing_torch
from builder.models.catalog import load_catalog
from builder.models.identify import identify
from builder.models.samples import CLEAN, DIRTY, SPREADS, Dirt, Repeated, make
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import carry_out

WRITABLE = [d for d in DType if d.torch_name and d.bits >= 8]


@st.composite
def tables(draw: st.DrawFn) -> dict[str, LazyTensor]:
    """Any tensors of any types that torch has."""
    names = draw(st.lists(st.text(min_size=1, max_size=9), unique=True, max_size=6))
    table: dict[str, LazyTensor] = {}
    for name in names:
        dtype = draw(st.sampled_from(WRITABLE))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        empty = MemoryTensor(dtype, (0, *shape), b"")
        size = empty.dtype.itemsize
        for extent in shape:
            size *= extent
        data = draw(st.binary(min_size=size, max_size=size))
        table[name] = MemoryTensor(dtype, shape, bytes(b & 1 for b in data) if dtype is DType.BOOL else data)
    return table


def content(values: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, in C order."""
    return bytes(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@settings(max_examples=60)
@given(table=tables(), nesting=st.sampled_from(["", "state_dict"]))
def test_torch_and_our_reader_read_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, LazyTensor], nesting: str
) -> None:
    path = tmp_path_factory.mktemp("torch") / "t.pt"
    carry_out(writing_torch(path, table, nesting=nesting, durable=False))
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        loaded = loaded[nesting] if nesting else loaded
        assert list(loaded) == list(table)
        for name, tensor in table.items():
            assert loaded[name].dtype == tensor.dtype.torch
            assert tuple(loaded[name].shape) == tensor.shape
            assert loaded[name].is_contiguous()
            assert content(loaded[name]) == tensor.tobytes()
    with open_checkpoint(path) as ours:
        assert {n: (t.dtype, t.shape, bytes(t.tobytes())) for n, t in ours.items()} == {
            n: (t.dtype, t.shape, bytes(t.tobytes())) for n, t in table.items()
        }
        assert ours.nesting == (nesting if table else ours.nesting)


def test_records_are_aligned_stored_and_dated_the_same(tmp_path: Path) -> None:
    table: dict[str, LazyTensor] = {
        "a" * n: MemoryTensor(DType.U8, (n,), bytes(range(n))) for n in range(1, 200, 7)
    }
    table["zeros"] = MemoryTensor(DType.F32, (100_000,), bytes(400_000))
    written = []
    for threads in (1, 4):
        path = tmp_path / f"{threads}.pt"
        carry_out(writing_torch(path, table), threads=threads)
        written.append(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            for info in archive.infolist():
                name, extra = struct.unpack_from("<HH", written[-1], info.header_offset + 26)
                assert (info.header_offset + 30 + name + extra) % 64 == 0
                assert (info.compress_type, info.date_time[:3]) == (0, (1980, 1, 1))
    assert written[0] == written[1]
    assert path.stat().st_blocks * 512 < 300_000  # zeros take no space


def test_zip64_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit of 4 GiB is met by lowering it: every field that may need 64 bits then uses them.
    monkeypatch.setattr("builder.formats.write_torch._LIMIT", 4096)
    path = tmp_path / "wide.pt"
    table: dict[str, LazyTensor] = {
        str(n): MemoryTensor(DType.I64, (n,), bytes(range(8)) * n) for n in (1, 512, 600)
    }
    carry_out(writing_torch(path, table))
    loaded = torch.load(path, weights_only=True)
    assert {n: content(t) for n, t in loaded.items()} == {n: t.tobytes() for n, t in table.items()}


def test_a_tensor_that_cannot_be_read_leaves_the_old_file(tmp_path: Path) -> None:
    class Broken(LazyTensor):
        def read_into(self, start: int, out: memoryview) -> None:
            raise SourceError(Problem("gone"))

    path = tmp_path / "t.pt"
    path.write_bytes(b"old")
    table: dict[str, LazyTensor] = {str(n): MemoryTensor(DType.U8, (9,), bytes(9)) for n in range(50)}
    with pytest.raises(SourceError, match="gone"):
        carry_out(writing_torch(path, {**table, "broken": Broken(DType.U8, (1,))}))
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt"]
    assert path.read_bytes() == b"old"


def test_what_torch_has_no_tensors_of(tmp_path: Path) -> None:
    path = tmp_path / "f6.pt"
    with pytest.raises(OutputError, match="PyTorch files hold no F6_E2M3 tensors"):
        carry_out(writing_torch(path, {"t": MemoryTensor(DType.F6_E2M3, (4,), bytes(3))}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("dirt", [CLEAN, DIRTY, Dirt(nai_names=True)])
def test_the_miniature_is_identified(tmp_path: Path, form: str, dirt: Dirt) -> None:
    path = tmp_path / f"mini.{form}"
    write(make("SD-mini", dirt=dirt, seed=3), path, "ckpt" if form == "ckpt" else "safetensors")
    with open_checkpoint(path) as checkpoint:
        found = identify(checkpoint.tensors, load_catalog())
        assert (found.architecture, found.intact) == ("SD-mini", True)
        classes = {m.component.cls for m in found.matches}
        assert ("EMA-UNET-mini" in classes) == dirt.ema
        assert any(n.startswith("loss.") for n in checkpoint) == dirt.junk
        assert ("callbacks" in checkpoint.others) == (dirt.lightning and form == "ckpt")
        named = "cond_stage_model.transformer.embeddings.position_ids" in checkpoint
        assert named == dirt.nai_names
        ids = next(t for n, t in checkpoint.items() if n.endswith("position_ids"))
        assert ids.dtype is (DType.F32 if dirt.position_ids else DType.I64)


def test_formats_agree_and_seeds_differ(tmp_path: Path) -> None:
    first, again, other = (make("SD-mini", precision=DType.F32, seed=s) for s in (1, 1, 2))
    write(first, tmp_path / "a.ckpt", "ckpt")
    write(again, tmp_path / "b.safetensors", "safetensors")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert set(file.keys()) == set(loaded)
        for name, values in loaded.items():
            assert content(values) == content(file.get_tensor(name)) == first.tensors[name].tobytes()
    weights = [n for n, t in first.tensors.items() if t.dtype is DType.F32 and t.numel > 64]
    assert all(first.tensors[n].tobytes() != other.tensors[n].tobytes() for n in weights)
    spreads = [float(loaded[n].std()) for n in weights if loaded[n].numel() > 5000]
    assert all(min(abs(s / known - 1) for known in SPREADS) < 0.1 for s in spreads)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2])
def test_weights_of_any_precision_are_finite_and_small(dtype: DType) -> None:
    model = make("VAE-mini", precision=dtype)
    for tensor in model.tensors.values():
        values = torch.frombuffer(tensor.tobytes(), dtype=dtype.torch).float()
        assert bool((values.abs() < 2).all())
        assert values.numel() == 1 or bool((values != values[0]).any())


def test_a_class_alone_has_bare_names() -> None:
    assert "decoder.conv_in.weight" in make("VAE-mini").tensors
    with pytest.raises(UsageError, match="the catalog has no `SD-mni`"):
        make("SD-mni")


def test_lightning_entries_load_where_lightning_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dirty.ckpt"
    write(make("SD-mini", dirt=DIRTY), path, "ckpt")
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(path, weights_only=True)
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {})  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    loaded = torch.load(path, weights_only=False)
    assert (loaded["epoch"], loaded["global_step"]) == (12, 840_000)
    assert loaded["callbacks"] == {module.ModelCheckpoint: {"best_score": 0.0421}}
    ids = loaded["state_dict"]["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert ids[0, -1].item() == pytest.approx(75.9975, abs=2**-5)
    with open_checkpoint(path) as checkpoint:
        assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in checkpoint.globals


@given(st.integers(1, 50), st.integers(0, 49), st.integers(0, 300), st.integers(0, 300))
def test_a_repeated_block_is_endless(size: int, shift: int, start: int, length: int) -> None:
    block = bytes(range(size))
    tensor = Repeated(DType.U8, (start + length,), memoryview(block), shift)
    out = bytearray(length)
    tensor.read_into(start, memoryview(out))
    assert out == (block * 800)[shift % size + start :][:length]


def test_the_command_line_makes_sparse_files(tmp_path: Path) -> None:
    for form in ("ckpt", "safetensors"):
        path = tmp_path / f"vae.{form}"
        command = [
            "-m",
            "benchmarks.generate",
            "--arch",
            "VAE-v1",
            "--format",
            form,
            "--sparse",
            "-o",
            str(path),
        ]
        subprocess.run([sys.executable, *command], check=True)
        assert path.stat().st_size > 160_000_000
        assert path.stat().st_blocks * 512 < 2_000_000
        with open_checkpoint(path) as checkpoint:
            assert identify(checkpoint.tensors, load_catalog()).architecture == "VAE-v1"


def test_checksums_cover_zeros(tmp_path: Path) -> None:
    carry_out(writing_torch(tmp_path / "z.pt", {"z": MemoryTensor(DType.U8, (9_000_000,), bytes(9_000_000))}))
    with zipfile.ZipFile(tmp_path / "z.pt") as archive:
        assert zlib.crc32(bytes(9_000_000)) == archive.getinfo("archive/data/0").CRC


def test_benchmarks_run() -> None:
    command = ["-m", "benchmarks", "inspect", "read-zip", "--size", "small", "--runs", "1", "--json"]
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    inspect, reading = json.loads(done.stdout)["benchmarks"]
    assert (inspect["name"], list(reading["samples"])) == ("inspect", ["floor", "ours"])
    for samples in reading["samples"].values():
        assert all(s["seconds"] > 0 and s["bytes"] > 1_000_000 for s in samples)


def test_outcomes_are_of_the_same_round() -> None:
    samples = {"ours": [Sample(1.0, 10.0), Sample(4.0, 30.0)], "naive": [Sample(3.0, 1.0), Sample(8.0, 1.0)]}
    faster, memory = Target("naive", "ours", at_least=2.5), Target("ours", at_most=10, unit="bytes")
    found = [outcome(t, samples) for t in (faster, memory)]
    assert [(o.low, o.median, o.high, o.met) for o in found] == [(2.0, 2.5, 3.0, True), (10, 20, 30, False)]
