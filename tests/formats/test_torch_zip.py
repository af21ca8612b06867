"""PyTorch's zip files: what we read is what torch reads."""

from __future__ import annotations

import argparse
import collections
import io
import sys
import threading
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.formats import open_checkpoint
from builder.formats.blob import BlobTensor, FileBlob
from builder.formats.torch.containers import open_torch
from builder.formats.torch.zip_directory import Inflated
from tests.help.torch_forms import content, name, patch, pickled, records, same, save, zipped

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Named tensors, some of which are views of one another's storages."""
    made: dict[str, torch.Tensor] = {}
    for index in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        count = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        data = torch.frombuffer(bytearray(raw or b"\0" * 16), dtype=torch.uint8).clone()
        if dtype is torch.bool:
            data &= 1
        base = data.view(dtype)[: int(np.prod(shape, dtype=int))].clone().reshape(shape)
        for view in range(draw(st.integers(1, 3))):
            made[f"{index}.{view}"] = _view(draw, base)
    return made


def _view(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    for _ in range(draw(st.integers(0, 3))):
        if not tensor.dim():
            tensor = tensor.expand(draw(st.integers(0, 4)))
            continue
        axis = draw(st.integers(0, tensor.dim() - 1))
        match draw(st.sampled_from(["permute", "slice", "step", "select", "unsqueeze", "expand"])):
            case "permute":
                tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
            case "slice":
                tensor = tensor.narrow(
                    axis, start := draw(st.integers(0, tensor.size(axis))), tensor.size(axis) - start
                )
            case "step":
                tensor = tensor[(slice(None),) * axis + (slice(None, None, draw(st.integers(1, 3))),)]
            case "select" if tensor.size(axis):
                tensor = tensor.select(axis, draw(st.integers(0, tensor.size(axis) - 1)))
            case "unsqueeze":
                tensor = tensor.unsqueeze(axis)
            case "expand":
                tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples."""
    return tmp_path_factory.mktemp("torch") / "model.ckpt"


# What torch itself can no longer read from its legacy files.
NEW = {torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}


@settings(max_examples=80)
@given(tensors(), st.booleans(), st.integers(2, 5), st.booleans())
def test_we_read_what_torch_reads(
    path: Path, state: dict[str, torch.Tensor], legacy: bool, protocol: int, nested: bool
) -> None:
    save(path, {"state_dict": state, "epoch": 1} if nested else state, legacy=legacy, protocol=protocol)
    if not legacy or NEW.isdisjoint(t.dtype for t in state.values()):
        loaded = torch.load(path, weights_only=protocol == 2)
        state = loaded["state_dict"] if nested else loaded
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == ("torch-legacy" if legacy else "torch-zip")
        assert checkpoint.nesting == ("state_dict" if nested else "")
        same(checkpoint, state)


def _swapped(tensor: torch.Tensor) -> bytes:
    """A storage's bytes as a machine of the other byte order has them."""
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return np.frombuffer(bytes(tensor.untyped_storage()), f"V{size}").view(f"u{size}").byteswap().tobytes()


@settings(max_examples=40)
@given(tensors())
def test_files_of_big_endian_machines(path: Path, state: dict[str, torch.Tensor]) -> None:
    save(path, state)
    found = records(path) | {"byteorder": b"big"}
    storages = {t.untyped_storage()._cdata: t for t in reversed(state.values())}
    order = dict.fromkeys(t.untyped_storage()._cdata for t in state.values())
    for index, key in enumerate(order):
        found[f"data/{index}"] = _swapped(storages[key])
    zipped(path, found.items())
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, state)


def test_parameters_with_gradients_and_hooks(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    parameter._backward_hooks = collections.OrderedDict()
    state = {"w": parameter, "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    with open_checkpoint(save(tmp_path / "a.pt", state)) as checkpoint:
        same(checkpoint, {k: v.detach() for k, v in state.items()})


def test_tied_tensors_share_their_bytes(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    with open_checkpoint(save(tmp_path / "a.pt", {"a": tied, "b": tied, "c": tied[1]})) as checkpoint:
        same(checkpoint, {"a": tied, "b": tied, "c": tied[1]})
        a, b, c = (checkpoint[n] for n in "abc")
        assert isinstance(a, BlobTensor)
        assert isinstance(b, BlobTensor)
        assert isinstance(c, BlobTensor)
        assert a.offset == b.offset == c.offset - 16


class ModelCheckpoint:
    """Stands where training libraries have their callbacks."""

    def __init__(self) -> None:
        self.best = np.float64(0.5)
        self.moving = {"average": torch.ones(2)}


@pytest.fixture
def lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as pytorch_lightning writes them, with the globals that SD v1 files have."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(place)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.setattr(ModelCheckpoint, "__module__", place)
    value = {
        "epoch": 12,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(1.5), "best_model_path": ""}},
        "optimizer_states": [
            {"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}
        ],
        "lr_schedulers": [],
        "hyper_parameters": argparse.Namespace(a=1),
        "live": ModelCheckpoint(),
        "state_dict": collections.OrderedDict(
            {"a": torch.zeros(2), "b": torch.tensor(3), "c": torch.tensor([1], dtype=torch.int32)}
        ),
    }
    return save(tmp_path / "sd.ckpt", value)


def test_a_lightning_checkpoint(lightning: Path) -> None:
    with open_checkpoint(lightning) as checkpoint:
        assert checkpoint.nesting == "state_dict"
        assert {k: v.shape for k, v in checkpoint.items()} == {
            "optimizer_states.0.state.0.exp_avg": (3,),
            "live.moving.average": (2,),
            "a": (2,),
            "b": (),
            "c": (1,),
        }
        assert checkpoint.others == {
            "epoch": "int 12",
            "global_step": "int 470000",
            "pytorch-lightning_version": "str '1.4.2'",
            "callbacks": "dict of 1 entry",
            "optimizer_states.0.state.0.step": "int 5",
            "optimizer_states.0.param_groups": "list of 1 entry",
            "lr_schedulers": "list of 0 entries",
            "hyper_parameters": "object `argparse.Namespace`",
            "live": "object `pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint`",
        }
        numpy = np.float64(0).__reduce__()[0].__module__  # which version 2 of numpy moved
        assert set(checkpoint.globals) == {
            "torch.FloatStorage",
            "torch.IntStorage",
            "torch.LongStorage",
            "torch._utils._rebuild_tensor_v2",
            "collections.OrderedDict",
            f"{numpy}.scalar",
            "numpy.dtype",
            "_codecs.encode",
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "argparse.Namespace",
        }


W = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("value", "nesting", "names"),
    [
        ({"a": W}, "", ["a"]),
        ({"state_dict": {"a": W}}, "state_dict", ["a"]),
        ({"model": {"a": W}}, "model", ["a"]),
        ({"params": {"a": W}}, "params", ["a"]),
        ({"params": {"a": W}, "params_ema": {"a": W}}, "params_ema", ["params.a", "a"]),
        ({"module": {"a": W}}, "module", ["a"]),
        ({"ema": {"a": W}}, "ema", ["a"]),
        ({"model_state_dict": {"a": W}, "loss": 0.5}, "model_state_dict", ["a"]),
        ({"state_dict": {"model": {"a": W, "b": W}, "x": W}}, "state_dict.model", ["a", "b", "state_dict.x"]),
        ({"state_dict": {"a": W, "b": W}, "extra": W}, "state_dict", ["a", "b", "extra"]),
        ({"module.a": W, "module.b.c": W}, "module", ["a", "b.c"]),
        ({"module.a": W, "b": W}, "", ["module.a", "b"]),
        ({"state_dict": {"module._orig_mod.a": W}}, "state_dict.module._orig_mod", ["a"]),
        ({"model.diffusion_model.x": W}, "", ["model.diffusion_model.x"]),
        ({"model.encoder.x": W}, "", ["model.encoder.x"]),
        ({"model.model.diffusion_model.x": W, "model.y": W}, "model", ["model.diffusion_model.x", "y"]),
        ({"model.first_stage_model.x": W}, "model", ["first_stage_model.x"]),
        ({"module.model.cond_stage_model.x": W}, "module.model", ["cond_stage_model.x"]),
        ({"unet": {"a": W}, "vae": {"b": [W]}}, "", ["unet.a", "vae.b.0"]),
        ([W, {"x": W}], "", ["0", "1.x"]),
        ((W,), "", ["0"]),
        (W, "", ["value"]),
        ({"string_to_param": {"*": W}}, "", ["string_to_param.*"]),
        ({1: W, b"two": W, (3, 4): W, None: W}, "", ["1", "two", "tuple of 2 entries", "None"]),
        ({"state_dict": {"a": W}, "again": {"x": {"a": W}}}, "state_dict", ["a", "again.x.a"]),
        (W.untyped_storage(), "", ["value"]),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_where_tensors_lie(
    tmp_path: Path, value: object, nesting: str, names: list[str], legacy: bool
) -> None:
    with open_checkpoint(save(tmp_path / "a.pt", value, legacy=legacy)) as checkpoint:
        assert (checkpoint.nesting, list(checkpoint)) == (nesting, names)
        assert all(bytes(t.tobytes()) == content(W) for t in checkpoint.values())


def test_a_part_met_twice_is_listed_once_and_said_so(tmp_path: Path) -> None:
    state = {"a": W}
    with open_checkpoint(
        save(tmp_path / "a.pt", {"state_dict": state, "model": state, "x": [state]})
    ) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert checkpoint.others == dict.fromkeys(["model", "x"], "") | {
            "model": "a part of the file that is met elsewhere too",
            "x": "list of 1 entry",
        }


def test_a_value_that_holds_itself(tmp_path: Path) -> None:
    state: dict[str, object] = {"a": W}
    state["self"] = state
    with open_checkpoint(save(tmp_path / "a.pt", state)) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert list(checkpoint.others) == ["self"]


def test_a_whole_module_goes_by_the_names_of_its_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with open_checkpoint(save(tmp_path / "a.pt", module)) as checkpoint:
        same(checkpoint, dict(module.state_dict()))
        assert checkpoint.others["(the whole file)"] == "object `torch.nn.modules.container.Sequential`"


def test_attributes_of_tensors_are_found(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(W)
    tensor.scale = torch.ones(2)  # type: ignore[attr-defined]
    with open_checkpoint(save(tmp_path / "a.pt", {"w": tensor})) as checkpoint:
        same(checkpoint, {"w": W, "w.scale": torch.ones(2)})


def test_optimizers_are_counted(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    value = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    with open_checkpoint(save(tmp_path / "a.pt", value)) as checkpoint:
        assert list(checkpoint)[:2] == ["weight", "bias"]
        assert "optimizer.state.0.exp_avg" in checkpoint
        assert len(checkpoint) == 2 + 3 * 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            lambda: torch.ones(2, dtype=torch.complex128),
            "complex128 tensor [2], of a type that is not supported",
        ),
        (
            lambda: torch.ones(2, dtype=torch.complex32),
            "complex32 tensor [2], of a type that is not supported",
        ),
        (lambda: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), "object `torch._utils._rebuild_qtensor`"),
        (lambda: W.to_sparse(), "object `torch._utils._rebuild_sparse_tensor`"),
        (lambda: torch.empty(2, device="meta"), "object `torch._utils._rebuild_meta_tensor_no_storage`"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "object `a tensor with bits to be negated`"),
    ],
    ids=["complex128", "complex32", "quantized", "sparse", "meta", "conjugated"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_other_kinds_are_named_but_not_read(
    tmp_path: Path, value: Callable[[], torch.Tensor], text: str
) -> None:
    with open_checkpoint(save(tmp_path / "a.pt", {"a": W, "odd": value()})) as checkpoint:
        assert "odd" not in checkpoint
        assert checkpoint.others["odd"] == text


def test_the_archive_may_have_any_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W})
    found = records(path)
    for root in ("", "x/", "deep/er/", "ünï/"):
        zipped(path, found.items(), root=root)
        with open_checkpoint(path) as checkpoint:
            same(checkpoint, {"a": W})


def test_zips_packed_anew(tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 200), "t": torch.randn(200, 300).t(), "n": torch.tensor(7)}
    path = save(tmp_path / "a.pt", state)
    found = records(path)
    for deflate in (lambda n: True, lambda n: n == "data.pkl", lambda n: n.startswith("data/")):
        zipped(path, [("", b""), *reversed(found.items())], deflate=deflate, comment=b"repacked")
        with open_checkpoint(path) as checkpoint:
            assert {n: bytes(t.tobytes()) for n, t in checkpoint.items()} == {
                n: content(t) for n, t in state.items()
            }


def test_a_deflated_tensor_is_read_from_several_threads_and_backward(tmp_path: Path) -> None:
    tensor = torch.arange(1_000_000)
    path = save(tmp_path / "a.pt", {"a": tensor})
    zipped(path, records(path).items(), deflate=lambda n: True)
    want = content(tensor)
    with open_checkpoint(path) as checkpoint:
        found = checkpoint["a"]
        wrong: list[int] = []

        def reader(starts: list[int]) -> None:
            for start in starts:
                out = bytearray(80_000)
                found.read_into(start, memoryview(out))
                if bytes(out) != want[start : start + 80_000]:
                    wrong.append(start)

        starts = [0, 4_000_000, 800, 7_920_000, 40]
        threads = [threading.Thread(target=reader, args=(starts[i:] + starts[:i],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_checksums_of_nought_are_no_checksums(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W})
    zipped(path, records(path).items())
    for record in ("data.pkl", "data/0"):
        patch(path, record, "local", crc=0)
        patch(path, record, "central", crc=0)
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W})


def test_records_that_no_tensor_uses_are_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W})
    zipped(path, [*records(path).items(), ("data/7", b"12345"), ("notes.txt", b"")])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.others == {
            "archive/data/7": "record of 5 bytes that no tensor uses",
            "archive/notes.txt": "record of 0 bytes that no tensor uses",
        }


def test_a_tensor_says_where_it_lies(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W, "t": W.t()})
    with open_checkpoint(path) as checkpoint:
        a = checkpoint["a"]
        assert isinstance(a, BlobTensor)
        assert path.read_bytes()[a.offset :].startswith(content(W))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::3, ::2],
        lambda t: t[:, 5],
        lambda t: t.reshape(30, 30, 1400).permute(2, 0, 1),
        lambda t: t[:40].unsqueeze(1).expand(-1, 30, -1),
        lambda t: t.as_strided((700, 700), (1, 1)),
    ],
    ids=["transposed", "stepped", "column", "permuted", "expanded", "overlapping"],
)
@pytest.mark.parametrize("window", [8, 4096, 1 << 16, 4 << 20])
def test_strided_views_in_windows(tmp_path: Path, view: object, window: int) -> None:
    assert callable(view)
    tensor = torch.arange(900 * 1400, dtype=torch.int32).reshape(900, 1400)
    viewed = view(tensor)
    if window < 1 << 16:
        viewed = viewed[: window // 8]
    with open_checkpoint(save(tmp_path / "a.pt", {"v": viewed, "whole": tensor})) as checkpoint:
        out = io.BytesIO()
        for piece in checkpoint["v"].windows(window):
            out.write(piece)
        assert out.getvalue() == content(viewed)


def test_a_large_transposed_tensor_takes_little_memory(tmp_path: Path) -> None:
    tensor = torch.arange(64 << 20, dtype=torch.uint8).reshape(8192, 8192)
    path = save(tmp_path / "a.pt", {"v": tensor.t()})
    want = tensor.t().contiguous().flatten()
    with open_checkpoint(path) as checkpoint:
        found = checkpoint["v"]
        at = 0
        tracemalloc.start()
        try:
            for piece in found.windows(4 << 20):
                assert torch.equal(torch.frombuffer(piece, dtype=torch.uint8), want[at : at + len(piece)])
                at += len(piece)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert at == 64 << 20
    assert peak < 24 << 20


def test_numpy_and_torch_are_not_needed_to_open(tmp_path: Path) -> None:
    import subprocess

    path = save(tmp_path / "a.pt", {"a": W, "v": W.t()})
    code = (
        "import sys; from builder.formats import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "c['a'].tobytes(); print(len(c), *({'torch', 'numpy', 'pickle'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["2"]


def test_opening_needs_no_more_than_a_blob(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W})
    blob = FileBlob(path)
    with open_torch(blob, "its name") as checkpoint:
        assert checkpoint.name == "its name"
        assert checkpoint.size == path.stat().st_size


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "a.safetensors", {"a": W})) as checkpoint:
        assert checkpoint.container == "torch-zip"


def test_names_with_odd_characters(tmp_path: Path) -> None:
    state = {"": W, "a\0b": W, "../up": W, "ü\u202e": W, "a b\n": W}
    with open_checkpoint(save(tmp_path / "a.pt", state)) as checkpoint:
        same(checkpoint, state)


def test_a_protocol_of_the_future_in_data_pkl(tmp_path: Path) -> None:
    tensors = {"w": name("torch", "float16")}
    path = zipped(tmp_path / "a.pt", [("data.pkl", pickled(tensors))])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.others == {"w": "the name `torch.float16`"}


def test_zip64(tmp_path: Path) -> None:
    state = {"a": W}
    found = records(save(tmp_path / "a.pt", state))
    path = tmp_path / "b.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in found.items():
            with archive.open(zipfile.ZipInfo(f"x/{record}"), "w", force_zip64=True) as out:
                out.write(data)
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, state)


def test_a_deflated_storage_that_is_read_out_of_order_is_unpacked_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = 0
    plain = Inflated._inflate

    def counted(self: Inflated, most: int) -> bytes:
        nonlocal unpacked
        piece = plain(self, most)
        unpacked += len(piece)
        return piece

    monkeypatch.setattr(Inflated, "_inflate", counted)
    wide = torch.arange(1 << 21, dtype=torch.int32).reshape(1 << 10, 1 << 11)
    saved = save(tmp_path / "saved.pt", {"t": wide.t()})
    path = zipped(tmp_path / "model.pt", records(saved).items(), deflate=lambda n: n.startswith("data/"))
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"t": wide.t()})
        same(checkpoint, {"t": wide.t()})
    assert unpacked < 6 * wide.numel() * 4
