"""PyTorch's containers before zip: one stream, and the oldest in a tar."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from builder.formats import open_checkpoint
from builder.formats.blob import BlobTensor
from builder.formats.torch.legacy import MAGIC
from tests.help.torch_forms import (
    call,
    content,
    name,
    outside,
    pickled,
    refused,
    same,
    save,
    storage,
    tarred,
    tensor,
)

W = torch.arange(6.0).reshape(2, 3)


def stream(
    value: object,
    storages: list[tuple[str, bytes]],
    *,
    magic: object = MAGIC,
    protocol: object = 1001,
    info: object = None,
    keys: object = None,
) -> bytes:
    """A legacy file by its parts; each storage as its key and its bytes with the count before them."""
    parts = [magic, protocol, info or {"little_endian": True}, value]
    parts.append([k for k, _ in storages] if keys is None else keys)
    return b"".join(pickled(p) for p in parts) + b"".join(data for _, data in storages)


def counted(tensor: torch.Tensor, count: int | None = None) -> bytes:
    return struct.pack("<q", tensor.numel() if count is None else count) + content(tensor)


def legacy(key: str, numel: int, view: object = None) -> tuple[object, ...]:
    return (*storage(key, numel), view)


def test_a_stream_by_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = {"a": tensor(legacy("1", 6), (2, 3)), "b": tensor(legacy("1", 6), (3,), offset=3)}
    path.write_bytes(stream(state, [("1", counted(W))]))
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W, "b": W[1]})
        assert isinstance(checkpoint["a"], BlobTensor)
        assert not checkpoint.others
    same_as_torch(path)


def same_as_torch(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, torch.load(path, weights_only=False))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = save(tmp_path / "a.pt", {"a": W, "b": W.t(), "c": torch.tensor(1)}, legacy=True, protocol=protocol)
    same_as_torch(path)


def test_storages_are_little_endian_whatever_the_file_says_of_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = {"a": tensor(legacy("1", 6), (2, 3))}
    path.write_bytes(stream(state, [("1", counted(W))], info={"little_endian": False}))
    same_as_torch(path)


def test_views_of_storages(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = {
        "all": tensor(legacy("1", 6), (6,)),
        "part": tensor(legacy("1", 6, ("9", 2, 3)), (3,)),
        "deeper": tensor(legacy("1", 6, ("9", 2, 3)), (2,), offset=1),
    }
    path.write_bytes(stream(state, [("1", counted(W))]))
    same_as_torch(path)
    with open_checkpoint(path) as checkpoint:
        assert bytes(checkpoint["deeper"].tobytes()) == struct.pack("<2f", 3, 4)


def test_classes_with_their_source(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    module = call(
        outside(("module", name("torch.nn.modules.linear", "Linear"), "linear.py", "class Linear: …"))
    )
    path.write_bytes(stream({"a": tensor(legacy("1", 6), (6,)), "m": module}, [("1", counted(W))]))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert checkpoint.others == {"m": "object `torch.nn.modules.linear.Linear`"}


def test_a_whole_module(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(tmp_path / "a.pt", module, legacy=True)
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, dict(module.state_dict()))


def test_what_follows_the_last_storage_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": W}, legacy=True)
    path.write_bytes(path.read_bytes() + b"more")
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W})
        assert checkpoint.others == {"(the end of the file)": "4 bytes that no tensor uses"}


GOOD = {"a": tensor(legacy("1", 6), (2, 3))}
DATA = [("1", counted(W))]


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (pickle.dumps({"a": 1}, 2), "the file is a pickle, but not one that PyTorch wrote"),
        (pickle.dumps([W.tolist()], 4), "the file is a pickle, but not one that PyTorch wrote"),
        (stream(GOOD, DATA, magic=float(MAGIC)), "the file is a pickle, but not one that PyTorch wrote"),
        (stream(GOOD, DATA, protocol=1000), "the file has a protocol version that PyTorch never had"),
        (stream(GOOD, []), "the data of `a` is missing"),
        (stream(GOOD, [*DATA, ("2", counted(W))]), "the file's list of storages does not fit to its pickle"),
        (stream(GOOD, [*DATA, *DATA]), "the file's list of storages does not fit to its pickle"),
        (stream(GOOD, DATA, keys=7), "the file's list of storages does not fit to its pickle"),
        (stream(GOOD, DATA, keys=[["1"]]), "the file's list of storages does not fit to its pickle"),
        (
            stream(GOOD, [("1", counted(W, 7))]),
            "the file is damaged: a storage has another size than its pickle says",
        ),
        (
            stream(GOOD, [("1", counted(W, -6))]),
            "the file is damaged: a storage has another size than its pickle says",
        ),
        (stream(GOOD, [("1", counted(W)[:-1])]), "the file is damaged: it ends before its contents do"),
        (stream(GOOD, [("1", b"123")]), "the file is damaged: it ends in the middle"),
        (
            stream({"a": tensor(legacy("1", 6, ("9", 4, 3)), (3,))}, DATA),
            "the pickle `main pickle` is malformed: a view of a storage goes past it",
        ),
        (
            stream({"a": tensor(legacy("1", 6, ("9", -1, 3)), (3,))}, DATA),
            "the pickle `main pickle` is malformed: a view of a storage goes past it",
        ),
        (
            stream({"x": outside(("other", 1, 2)), **GOOD}, DATA),
            "the pickle `main pickle` is malformed: it refers to something outside itself that is no storage",
        ),
        (
            stream({"a": tensor(legacy("1", 6), (6,)), "b": tensor(legacy("1", 9), (9,))}, DATA),
            "the data of `b` goes past its storage",
        ),
        (
            stream(GOOD, DATA, info=name("os", "system")),
            "the file holds code: its pickle refers to `os.system`",
        ),
        (
            stream(GOOD, DATA, keys=name("os", "system")),
            "the file holds code: its pickle refers to `os.system`",
        ),
        (stream(name("os", "system"), DATA), "the file holds code: its pickle refers to `os.system`"),
        (pickled(name("os", "system")), "the file holds code: its pickle refers to `os.system`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_streams_are_refused(tmp_path: Path, data: bytes, fact: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    assert refused(path).fact == fact


def test_a_stream_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    data = stream(GOOD, DATA)
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        assert refused(path).fact


def test_a_tar(tmp_path: Path) -> None:
    tensors = {
        "a": (W, 1),
        "t": (W.t(), 1),
        "n": (torch.tensor(5), 2),
        "e": (torch.ones(1).expand(4), 3),
        "h": (torch.ones(3).half(), 4),
    }
    path = tarred(tmp_path / "a.pt", tensors, {})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "torch-tar"
        same(checkpoint, {n: t for n, (t, _) in tensors.items()})
    same_as_torch(path)


def test_a_tar_with_views_of_storages(tmp_path: Path) -> None:
    part = torch.arange(3.0)
    path = tarred(tmp_path / "a.pt", {"a": (W, 1), "p": (part, 7)}, {7: (1, 2, 3)})
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W, "p": W.flatten()[2:5]})
    same_as_torch(path)


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def _tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size, info.type = len(data), kind
            archive.addfile(info, io.BytesIO(data))
    return path


def test_broken_tars_are_refused(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.pt", {"a": (W, 1), "b": (W, 1)}, {})
    good = _members(path)
    whole = path.read_bytes()

    def fact(**changed: bytes) -> str:
        _tar(path, list((good | changed).items()))
        return refused(path).fact

    number = pickle.dumps
    past = pickle.dumps(1, 2) + pickled((1000, 1, name("torch", "FloatTensor")))
    assert fact(storages=number(1, 2)) == "the pickle `storages` is malformed: it ends in the middle"
    assert fact(storages=number(-1, 2)) == "the file is malformed: the number of its parts is none"
    assert fact(storages=number("x", 2)) == "the file is malformed: the number of its parts is none"
    assert fact(storages=number(1, 2) + number(7, 2)) == (
        "the file is malformed: a storage is not described by its key, place and type"
    )
    assert fact(storages=number(0, 2) + number([(1, 2, 3, 4)], 2)) == (
        "the file is malformed: a view of a storage goes past it"
    )
    assert fact(tensors=past) == "the member `tensors` is damaged: it ends in the middle"
    assert fact(tensors=past + struct.pack("<iiqqq", 1, 0, 7, 1, 0)) == (
        "the file is malformed: a tensor of shape [7] goes past its storage of 24 bytes"
    )
    assert fact(tensors=past + struct.pack("<iiqqq", 1, 0, -7, 1, 0)) == (
        "the file is malformed: a tensor's shape or strides are no counts"
    )
    assert (
        fact(tensors=past + struct.pack("<ii", 65, 0)) == "the file is malformed: a tensor has 65 dimensions"
    )
    assert fact(pickle=pickled({"a": outside(5)})) == (
        "the pickle `pickle` is malformed: it refers to something outside itself that is no tensor"
    )
    assert (
        fact(pickle=pickled(name("os", "system"))) == "the file holds code: its pickle refers to `os.system`"
    )
    assert (
        fact(sys_info=pickled(name("os", "system")))
        == "the file holds code: its pickle refers to `os.system`"
    )

    _tar(path, [(n, d) for n, d in good.items() if n != "tensors"])
    assert refused(path).evidence == ("it has no `tensors`",)
    _tar(path, [*good.items(), ("pickle", good["pickle"])])
    assert refused(path).fact.endswith("the member `pickle` is no plain file, or comes twice")
    _tar(path, [("pickle", b"")], tarfile.SYMTYPE)
    assert refused(path).fact.endswith("the member `pickle` is no plain file, or comes twice")
    path.write_bytes(whole[:-1024].replace(b"mtime=", b"path=x"))
    assert refused(path).fact.endswith("a member has two names or two sizes")
    for cut in (700, 1500, 2100, 2600, 4000):
        path.write_bytes(whole[:cut])
        assert refused(path).fact
    path.write_bytes(b"x" + whole[1:])
    assert refused(path).fact.endswith("a header of its members is damaged")


def test_other_members_of_a_tar_are_told(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.pt", {"a": (W, 1)}, {})
    _tar(path, [*_members(path).items(), ("notes", b"123")])
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W})
        assert checkpoint.others == {"notes": "member of 3 bytes that no tensor uses"}
