"""Files made to mislead: each is refused with one clear message."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from builder.formats import open_checkpoint
from tests.help.torch_forms import (
    call,
    content,
    name,
    outside,
    patch,
    pickled,
    records,
    refused,
    same,
    save,
    storage,
    tensor,
    zipped,
)

W = torch.arange(6.0).reshape(2, 3)
UNTRUSTED = "the zip archive cannot be trusted: "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plain zip with one tensor `a`."""
    saved = save(tmp_path / "saved.pt", {"a": W})
    return zipped(tmp_path / "model.ckpt", records(saved).items())


def holding(path: Path, value: object, data: bytes = content(W), **kinds: bool) -> Path:
    """A zip whose pickle is `value`, with one storage of `data`."""
    parts = [("data.pkl", value if isinstance(value, bytes) else pickled(value)), ("data/0", data)]
    return zipped(path, [*parts, ("version", b"3\n")], deflate=lambda n: kinds.get("deflate", False))


def edit(path: Path, change: Callable[[bytearray], bytes | bytearray | None]) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


# Headers.


@pytest.mark.parametrize("flag", [1, 1 << 6, 1 << 13])
def test_encrypted_records(path: Path, flag: int) -> None:
    patch(path, "data/0", "central", flags=flag)
    assert refused(path).fact == UNTRUSTED + "the record `archive/data/0` is encrypted"


@pytest.mark.parametrize(("method", "word"), [(12, "bzip2"), (14, "lzma"), (93, "zstd"), (77, "number 77")])
def test_methods_that_pytorch_never_uses(path: Path, method: int, word: str) -> None:
    patch(path, "data/0", "central", method=method)
    assert refused(path).fact.endswith(f"is packed by a method that PyTorch never uses: {word}")


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1},
        {"method": 8},
        {"crc": 5},
        {"packed": 5},
        {"size": 5},
        {"packed": 0, "size": 0},
        {"flags": 8},
    ],
    ids=str,
)
def test_local_headers_that_disagree(path: Path, fields: dict[str, int]) -> None:
    patch(path, "data/0", "local", **fields)
    assert refused(path).fact == UNTRUSTED + "the headers of the record `archive/data/0` disagree"


def test_sizes_left_to_a_descriptor_are_taken_from_the_directory(path: Path) -> None:
    for where in ("local", "central"):
        patch(path, "data/0", where, flags=8)
    patch(path, "data/0", "local", crc=0, packed=0, size=0)
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W})
    patch(path, "data/0", "local", packed=24)
    assert "disagree" in refused(path).fact


def test_names_that_disagree(path: Path) -> None:
    edit(path, lambda d: d.replace(b"archive/data/0", b"archive/data/1", 1))
    assert refused(path).fact == UNTRUSTED + "the headers of the record `archive/data/0` disagree"


def test_stored_records_with_two_sizes(path: Path) -> None:
    patch(path, "data/0", "central", size=25)
    assert refused(path).fact == UNTRUSTED + "the record `archive/data/0` has two sizes"


@pytest.mark.parametrize("size", [100, 5000, 0xFFFFFFFE])
def test_records_that_reach_into_the_next_or_past_the_end(path: Path, size: int) -> None:
    for where in ("local", "central"):
        patch(path, "data/0", where, packed=size, size=size)
    assert (
        refused(path).fact == UNTRUSTED + "the record `archive/data/0` overlaps another, or goes past the end"
    )


def test_two_records_with_the_same_bytes(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("archive/data/0").header_offset
    patch(path, "version", "central", offset=at)
    assert "overlaps another" in refused(path).fact


def test_records_elsewhere_than_the_directory_says(path: Path) -> None:
    patch(path, "data/0", "central", offset=3)
    assert refused(path).fact.startswith(UNTRUSTED)
    patch(path, "data/0", "central", offset=0xFFFFFF)
    assert refused(path).fact.startswith(UNTRUSTED)


def test_sizes_that_need_what_is_missing(path: Path) -> None:
    patch(path, "data/0", "central", packed=0xFFFFFFFF, size=0xFFFFFFFF)
    assert refused(path).fact == UNTRUSTED + "the size or place of a record is missing"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_come_twice(path: Path) -> None:
    zipped(path, [*records(path).items(), ("data/0", b"x" * 24)])
    assert refused(path).fact == UNTRUSTED + "it has two records named `archive/data/0`"


def test_two_pickles(path: Path) -> None:
    zipped(path, [*records(path).items(), ("other/data.pkl", b"N.")])
    problem = refused(path)
    assert problem.fact == "the zip archive has more than one `data.pkl`"
    assert problem.evidence == ("archive/data.pkl", "archive/other/data.pkl")


def test_other_archives(path: Path) -> None:
    zipped(path, [("model_index.json", b"{}"), ("unet/x.bin", b"")], root="")
    problem = refused(path)
    assert problem.fact == "the file is a zip archive, but not one that PyTorch wrote: it has no `data.pkl`"
    zipped(path, [])
    assert refused(path).evidence == ("it is empty",)


def test_programs(path: Path) -> None:
    zipped(path, [*records(path).items(), ("constants.pkl", b"N."), ("code/__torch__.py", b"")])
    assert refused(path).fact == "the file is a TorchScript program, not a checkpoint"


def test_a_real_program(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    module = torch.nn.ReLU()
    torch.jit.save(torch.jit.trace(module, torch.ones(1)), buffer)
    path = tmp_path / "model.pt"
    path.write_bytes(buffer.getvalue())
    assert refused(path).fact == "the file is a TorchScript program, not a checkpoint"


# The directory.


def test_files_cut_anywhere(path: Path) -> None:
    data = path.read_bytes()
    for size in range(1, len(data), 3):
        path.write_bytes(data[:size])
        assert refused(path).fact


def test_bytes_before_and_after(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"PK\3\4" + data)
    assert "its directory does not end where its end begins" in refused(path).fact
    path.write_bytes(data + b"x")
    assert refused(path).fact == UNTRUSTED + "its directory is missing"


def test_bytes_between_start_and_first_record(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    data = bytearray(path.read_bytes())
    at = start
    while data[at : at + 4] == b"PK\1\2":
        n_name, n_extra, n_comment = struct.unpack_from("<HHH", data, at + 28)
        (header,) = struct.unpack_from("<I", data, at + 42)
        struct.pack_into("<I", data, at + 42, header + 4)
        at += 46 + n_name + n_extra + n_comment
    struct.pack_into("<I", data, at + 16, start + 4)
    path.write_bytes(b"PK\3\4" + data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "other programs read it"
    assert refused(path).fact == UNTRUSTED + "it begins with bytes that belong to no record"


def test_a_directory_in_the_comment(path: Path) -> None:
    inner = path.read_bytes()[-22:]
    zipped(path, records(path).items(), comment=b"hello" + inner)
    assert refused(path).fact == UNTRUSTED + "it has two directories"


@pytest.mark.parametrize(
    ("offset", "form", "value", "fact"),
    [
        (4, "<H", 1, "it is one part of several"),
        (8, "<H", 1, "it is one part of several"),
        (12, "<I", 7, "its directory does not end where its end begins"),
        (16, "<I", 7, "its directory does not end where its end begins"),
        (16, "<I", 0xFFFFFFFF, "its directory does not end where its end begins"),
        (20, "<H", 9, "its directory is missing"),
    ],
)
def test_ends_that_lie(path: Path, offset: int, form: str, value: int, fact: str) -> None:
    edit(path, lambda d: struct.pack_into(form, d, len(d) - 22 + offset, value))
    assert refused(path).fact == UNTRUSTED + fact


@pytest.mark.parametrize(
    ("count", "fact"), [(1, "has more bytes than entries"), (99, "ends in the middle of an entry")]
)
def test_counts_that_lie(path: Path, count: int, fact: str) -> None:
    edit(path, lambda d: struct.pack_into("<HH", d, len(d) - 14, count, count))
    assert refused(path).fact.startswith(UNTRUSTED + "its directory " + fact)


def test_wide_ends(path: Path) -> None:
    data = path.read_bytes()
    count, size, start = struct.unpack("<HII", data[-12:-2])

    def wide(count: int = count, size: int = size, start: int = start, at: int = len(data) - 22) -> bytes:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        return data[:-22] + end + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) + data[-22:]

    path.write_bytes(wide())
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W})
    path.write_bytes(wide(count=count + 1))
    assert refused(path).fact == UNTRUSTED + "its two ends disagree about the directory"
    path.write_bytes(wide(start=1 << 63))
    assert refused(path).fact == UNTRUSTED + "its two ends disagree about the directory"
    path.write_bytes(wide(at=1 << 63))
    assert refused(path).fact == UNTRUSTED + "the end of its directory is not where it says"
    path.write_bytes(wide(at=0))
    assert refused(path).fact == UNTRUSTED + "the end of its directory is not where it says"


# Packed records.


def test_a_bomb(path: Path) -> None:
    value = {"a": tensor(storage("0", 6), (2, 3))}
    holding(path, value, b"\0" * (64 << 20), deflate=True)
    problem = refused(path)
    assert problem.fact == "the data of `a` is not what its record holds"
    for where in ("local", "central"):
        patch(path, "data/0", where, size=24)
    assert refused(path).fact == (
        "the record `archive/data/0` is damaged: it unpacks to more than its 24 bytes"
    )


def test_much_of_the_same_is_no_bomb(path: Path) -> None:
    value = {"a": tensor(storage("0", 4 << 20), (2048, 2048))}
    holding(path, value, b"\0" * (16 << 20), deflate=True)
    assert path.stat().st_size < 20_000
    with open_checkpoint(path) as checkpoint:
        assert sum(p.nbytes for p in checkpoint["a"].windows()) == 16 << 20


def deflated(data: bytes, level: int = 0, end: int = zlib.Z_FINISH) -> bytes:
    engine = zlib.compressobj(level, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush(end)


GOOD = content(W)


@pytest.mark.parametrize(
    ("stream", "crc", "fact"),
    [
        (deflated(GOOD), zlib.crc32(GOOD), None),
        (deflated(GOOD), zlib.crc32(GOOD) ^ 1, "its checksum is wrong"),
        (deflated(GOOD), 0, "its checksum is wrong"),
        (deflated(GOOD[:23]), zlib.crc32(GOOD), "it ends too early"),
        (deflated(GOOD + b"x"), zlib.crc32(GOOD), "it unpacks to more than its 24 bytes"),
        (deflated(GOOD) + b"x", zlib.crc32(GOOD), "bytes follow its end"),
        (deflated(GOOD) + bytes(100_000), zlib.crc32(GOOD), "bytes follow its end"),
        (deflated(GOOD, end=zlib.Z_FULL_FLUSH), zlib.crc32(GOOD), "it has no end"),
        (deflated(GOOD, end=zlib.Z_FULL_FLUSH) + b"\xff" * 9, zlib.crc32(GOOD), "it is not deflated"),
        (deflated(GOOD)[:10], zlib.crc32(GOOD), "it ends too early"),
        (b"\xff" * 20, zlib.crc32(GOOD), "it is not deflated"),
        (b"", zlib.crc32(GOOD), "it ends too early"),
    ],
)
def test_damaged_packed_records(path: Path, stream: bytes, crc: int, fact: str | None) -> None:
    holding(path, {"a": tensor(storage("0", 6), (2, 3))}, stream)
    for where in ("local", "central"):
        patch(path, "data/0", where, method=8, size=24, crc=crc)
    if fact is None:
        with open_checkpoint(path) as checkpoint:
            same(checkpoint, {"a": W})
    else:
        assert refused(path).fact == f"the record `archive/data/0` is damaged: {fact}"


def test_a_damaged_pickle(path: Path) -> None:
    edit(path, lambda d: d.replace(b"FloatStorage", b"floatStorage", 1))
    assert refused(path).fact == "the record `data.pkl` is damaged: its checksum is wrong"


# Pickles.


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (tensor(storage("0", 7), (6,)), "the data of `a` is not what its record holds"),
        (tensor(storage("0", 1 << 62), (6,)), "the data of `a` is not what its record holds"),
        (tensor(storage("0", -1), (6,)), "a storage's number of elements is none"),
        (tensor(storage("0", 1 << 63), (6,)), "a storage's number of elements is none"),
        (tensor(storage("0", 6), (7,)), "a tensor of shape [7] goes past its storage of 24 bytes"),
        (
            tensor(storage("0", 6), (2, 3), offset=1),
            "a tensor of shape [2, 3] goes past its storage of 24 bytes",
        ),
        (tensor(storage("0", 6), (2, 3), strides=(4, 1)), "a tensor of shape [2, 3] goes past its storage"),
        (tensor(storage("0", 6), (3,), strides=(1 << 62,)), "a tensor of shape [3] goes past its storage"),
        (tensor(storage("0", 6), (1 << 62, 4), strides=(4, 1)), "goes past its storage of 24 bytes"),
        (tensor(storage("0", 6), (-6,), strides=(1,)), "a tensor's shape or strides are no counts"),
        (tensor(storage("0", 6), (6,), strides=(-1,)), "a tensor's shape or strides are no counts"),
        (tensor(storage("0", 6), (1 << 63,), strides=(0,)), "a tensor's shape or strides are no counts"),
        (tensor(storage("0", 6), (True,), strides=(1,)), "a tensor's shape or strides are no counts"),
        (tensor(storage("0", 6), (6,), strides=(1, 1)), "offset, shape and strides do not fit together"),
        (tensor(storage("0", 6), (6,), offset=-1), "offset, shape and strides do not fit together"),
        (tensor(storage("0", 6), (6,), offset=1 << 63), "offset, shape and strides do not fit together"),
        (tensor(storage("0", 6), (6,), offset=None), "offset, shape and strides do not fit together"),
        (tensor(storage("0", 6), (1,) * 65), "a tensor has 65 dimensions"),
        (
            tensor(storage("0", 6), (1 << 40,), strides=(0,)),
            "the file's tensors repeat its data beyond reason",
        ),
        (tensor(storage("1", 6), (6,)), "the data of `a` is missing"),
        (tensor(storage("../0", 6), (6,)), "the data of `a` is missing"),
        (tensor(storage("0", 6, "EvilStorage"), (6,)), "`torch.EvilStorage` is not a known kind of storage"),
        (tensor(storage(None, 6), (6,)), "it refers to something outside itself that is no storage"),
        (tensor(("module", "x", "y", "z"), (6,)), "it refers to something outside itself that is no storage"),
        (outside("text"), "it refers to something outside itself that is no storage"),
        (call(name("torch._utils", "_rebuild_tensor_v2"), 1, 0, (1,), (1,)), "a tensor's storage is none"),
        (
            call(name("torch._utils", "_rebuild_tensor_v2"), 1),
            "a tensor is made of the wrong number of things",
        ),
        (
            call(name("torch._utils", "_rebuild_tensor_v3"), 1),
            "a tensor is made of the wrong number of things",
        ),
        (call(name("torch._utils", "_rebuild_tensor"), 1), "a tensor is made of the wrong number of things"),
        (
            call(
                name("torch._utils", "_rebuild_tensor_v3"), outside(storage("0", 6)), 0, (1,), (1,), 0, 0, "f"
            ),
            "an element type is not a name",
        ),
        (
            call(
                name("torch._utils", "_rebuild_tensor_v3"),
                *(outside(storage("0", 6)), 0, (1,), (1,), False, None),
                name("torch", "float3"),
            ),
            "`torch.float3` is not a known element type",
        ),
        (
            call(
                name("torch._utils", "_rebuild_tensor_v3"),
                *(outside(storage("0", 24, "UntypedStorage")), 0, (4,), (1,), False, None),
                name("torch", "float64"),
            ),
            "a tensor of shape [4] goes past its storage of 24 bytes",
        ),
        (
            call(name("torch._tensor", "_rebuild_from_type_v2"), 1),
            "a tensor's subclass is made of the wrong things",
        ),
        (call(name("os", "system"), "touch ran"), "the file holds code: its pickle refers to `os.system`"),
        (call(name("torch.storage", "_load_from_bytes"), b"x"), "the file holds code: its pickle refers to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_pickles(path: Path, value: object, fact: str) -> None:
    holding(path, {"a": value})
    assert fact in refused(path).fact


def test_a_storage_may_be_mentioned_with_other_sizes_only_within_its_record(path: Path) -> None:
    value = {"a": tensor(storage("0", 2), (2,)), "b": tensor(storage("0", 6), (6,))}
    holding(path, value)
    with open_checkpoint(path) as checkpoint:
        same(checkpoint, {"a": W.flatten()[:2], "b": W.flatten()})
    holding(path, value | {"c": tensor(storage("0", 9), (9,))})
    assert refused(path).fact == "the data of `c` is not what its record holds"


def test_names_that_come_out_the_same(path: Path) -> None:
    item = tensor(storage("0", 6), (6,))
    for value in ({1: item, "1": item}, {"a": {"b": item}, "a.b": item}):
        holding(path, value)
        assert refused(path).fact.startswith("two tensors of the file are named `")


def test_a_key_that_comes_twice(path: Path) -> None:
    item = pickled("a")[2:-1] + pickled(tensor(storage("0", 6), (6,)))[2:-1] + b"s"
    holding(path, b"\x80\x02}" + item + item + b".")
    assert refused(path).fact == "two tensors of the file are named `a`"


def test_bytes_after_the_pickle(path: Path) -> None:
    holding(path, pickled({}) + b"more")
    assert refused(path).fact == "bytes follow the end of `data.pkl`"


def test_byte_orders_that_are_none(path: Path) -> None:
    for word in (b"", b"middle", b"little" * 9):
        zipped(path, [*[(n, d) for n, d in records(path).items() if n != "byteorder"], ("byteorder", word)])
        assert refused(path).fact == "the file's byte order is not known"


def test_a_deep_tensor(path: Path) -> None:
    inner = pickled(tensor(storage("0", 6), (6,)))[2:-1]
    holding(path, b"\x80\x02" + b"]" * 200_000 + inner + b"a" * 200_000 + b".")
    assert refused(path).fact == "the file's tensors are too many, or too deep within each other, to be named"


def test_a_deep_nothing(path: Path) -> None:
    holding(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 0


def test_lists_of_lists_of_the_same_lists(path: Path) -> None:
    inner = pickled(tensor(storage("0", 6), (6,)))[2:-1]
    doubled = b"".join(b"]q%c(h%ch%ce" % (i + 100, i + 99, i + 99) for i in range(1, 60))
    holding(path, b"\x80\x02]q\x64" + inner + b"a" + doubled + b".")
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 1
        assert len(checkpoint.others) == 59


def test_a_tensor_met_many_times(path: Path) -> None:
    inner = pickled(tensor(storage("0", 1 << 12), (1 << 12,)))[2:-1]
    holding(path, b"\x80\x02](" + inner + b"2" * 200_000 + b"e.", b"\0" * (1 << 14))
    assert refused(path).fact == "the file's tensors repeat its data beyond reason"


def test_names_of_terminals_are_kept_from_them(path: Path) -> None:
    from builder.base.errors import render

    holding(path, {"\x1b[2Ja\u202e": tensor(storage("7", 6), (6,))})
    assert "\x1b" not in render(refused(path))


def test_nothing_is_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    for code in (call(name("os", "system"), "touch ran"), call(name("pathlib", "Path.touch"), "ran")):
        holding(path, {"a": code})
        assert refused(path).fact.startswith("the file holds code")
    assert set(tmp_path.iterdir()) == before


def test_a_pickle_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickled(name("os", "system")))
    assert refused(path).fact == "the file holds code: its pickle refers to `os.system`"
