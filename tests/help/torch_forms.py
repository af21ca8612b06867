"""Makes PyTorch files of every age for tests, whole and broken."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from builder.base.errors import Problem, SourceError
from builder.formats import open_checkpoint
from builder.formats.checkpoint import Checkpoint

HEADERS = {
    "local": {
        "flags": (6, "<H"),
        "method": (8, "<H"),
        "crc": (14, "<I"),
        "packed": (18, "<I"),
        "size": (22, "<I"),
    },
    "central": {
        "flags": (8, "<H"),
        "method": (10, "<H"),
        "crc": (16, "<I"),
        "packed": (20, "<I"),
        "size": (24, "<I"),
        "disk": (34, "<H"),
        "offset": (42, "<I"),
    },
}


def content(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as they should be read: little endian and in C order."""
    if not tensor.numel():
        return b""
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .flatten()
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def save(path: Path, value: object, *, legacy: bool = False, protocol: int = 2) -> Path:
    """A file that torch wrote."""
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def same(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Assert that a checkpoint holds exactly these tensors, byte for byte."""
    assert list(checkpoint) == list(tensors)
    for name, tensor in tensors.items():
        found = checkpoint[name]
        assert (found.dtype.torch, found.shape) == (tensor.dtype, tuple(tensor.shape)), name
        assert bytes(found.tobytes()) == content(tensor), name


def refused(path: Path) -> Problem:
    """The one problem for which a file is refused, when it is opened or when it is read."""
    with pytest.raises(SourceError) as caught, open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.values():
            for _ in tensor.windows():
                pass
    (problem,) = caught.value.problems
    return problem


def records(path: Path) -> dict[str, bytes]:
    """The records of a zip, without the folder that they are in."""
    with zipfile.ZipFile(path) as archive:
        return {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


def zipped(
    path: Path,
    contents: Iterable[tuple[str, bytes]],
    *,
    root: str = "archive/",
    deflate: Callable[[str], bool] = lambda name: False,
    comment: bytes = b"",
) -> Path:
    """A zip of records as a common zip program writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents:
            method = zipfile.ZIP_DEFLATED if deflate(name) else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(root + name), data, method)
        archive.comment = comment
    return path


def patch(path: Path, name: str, where: str, **fields: int) -> Path:
    """Change fields of one of a record's two headers."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(name))
        raw = info.filename.encode()
        at = info.header_offset if where == "local" else _central(path.read_bytes(), archive.start_dir, raw)
    data = bytearray(path.read_bytes())
    for field, value in fields.items():
        offset, form = HEADERS[where][field]
        struct.pack_into(form, data, at + offset, value)
    path.write_bytes(data)
    return path


def _central(data: bytes, at: int, name: bytes) -> int:
    while data[at : at + 4] == b"PK\1\2":
        n_name, n_extra, n_comment = struct.unpack_from("<HHH", data, at + 28)
        if data[at + 46 : at + 46 + n_name] == name:
            return at
        at += 46 + n_name + n_extra + n_comment
    raise LookupError(name)


def tarred(
    path: Path, tensors: dict[str, tuple[torch.Tensor, int]], views: dict[int, tuple[int, int, int]]
) -> Path:
    """A file as PyTorch 0.1 wrote it: each tensor with the number of its storage, and views of storages.

    `views` maps a storage's number to root, offset and size.
    """
    storages, shapes, state = io.BytesIO(), io.BytesIO(), {}
    roots = {number: tensor for tensor, number in tensors.values() if number not in views}
    pickle.dump(len(roots), storages, 2)
    for number, tensor in roots.items():
        storages.write(pickled((number, "cpu", _Name("torch", _storage(tensor)))))
        data = tensor.untyped_storage()
        storages.write(struct.pack("<q", data.nbytes() // tensor.element_size()) + bytes(data))
    pickle.dump([(number, *view) for number, view in views.items()], storages, 2)
    pickle.dump(len(tensors), shapes, 2)
    for key, (name, (tensor, number)) in enumerate(tensors.items(), start=1000):
        shapes.write(pickled((key, number, _Name("torch", _storage(tensor).replace("Storage", "Tensor")))))
        n = tensor.dim()
        shapes.write(
            struct.pack(f"<ii{n}q{n}qq", n, 0, *tensor.shape, *tensor.stride(), tensor.storage_offset())
        )
        state[name] = _Outside(key)
    members = {"sys_info": pickle.dumps({"little_endian": True}, 2), "pickle": pickled(state)}
    members |= {"storages": storages.getvalue(), "tensors": shapes.getvalue()}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # which takes an extended header
            archive.addfile(info, io.BytesIO(data))
    return path


def _storage(tensor: torch.Tensor) -> str:
    return tensor.type().removeprefix("torch.").replace("Tensor", "Storage")


class _Name:
    """Pickles as a global."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Outside:
    """Pickles as a persistent id."""

    def __init__(self, key: object) -> None:
        self.key = key


class _Call:
    """Pickles as a call of a global."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args


class _Pickler(pickle._Pickler):
    def persistent_id(self, value: object) -> object:
        return value.key if isinstance(value, _Outside) else None

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Name):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Call):
            self.save(value.function)
            self.save(value.args)
            self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def pickled(value: object, protocol: int = 2) -> bytes:
    """A pickle; names, calls and persistent ids may be made up with `name`, `call` and `outside`."""
    out = io.BytesIO()
    _Pickler(out, protocol).dump(value)
    return out.getvalue()


name = _Name
call = _Call
outside = _Outside


def tensor(
    key: object, shape: tuple[int, ...], *, offset: object = 0, strides: tuple[int, ...] | None = None
) -> object:
    """A tensor as a pickle spells it, whose storage is outside."""
    steps = torch.empty(shape, device="meta").stride() if strides is None else strides
    return _Call(_Name("torch._utils", "_rebuild_tensor_v2"), outside(key), offset, shape, steps, False, None)


def storage(key: object, numel: int, kind: str = "FloatStorage") -> tuple[object, ...]:
    """A storage's persistent id."""
    return ("storage", _Name("torch", kind), key, "cpu", numel)
