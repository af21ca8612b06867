"""PyTorch files, written: a zip archive of tensors, and a pickle that any `torch.load` reads safely."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from builder.base.disk import replacing, write_all
from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor

ROOT = "archive"
ALIGNMENT = 64  # of every record's data, as torch does

# Element types that have a storage class; the newer ones are untyped bytes and a dtype.
_STORAGES = {
    DType.BOOL: "BoolStorage",
    DType.U8: "ByteStorage",
    DType.I8: "CharStorage",
    DType.I16: "ShortStorage",
    DType.I32: "IntStorage",
    DType.I64: "LongStorage",
    DType.F16: "HalfStorage",
    DType.BF16: "BFloat16Storage",
    DType.F32: "FloatStorage",
    DType.F64: "DoubleStorage",
    DType.C64: "ComplexFloatStorage",
}


def write_torch(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    *,
    nesting: str = "",
    extras: Mapping[str, bytes] | None = None,
    threads: int = 2,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
    reporter: Reporter = SILENT,
    task: str = "writing",
    accept: Callable[[int], object] = lambda fd: None,
) -> None:
    """Write a dict of tensors as `torch.save` would, but streaming and always the same bytes.

    With `nesting` the tensors lie in a dict of that name inside the file's dict. `extras` are further
    entries of the file's dict: the opcodes (pickle protocol 2, without header and STOP) that push each
    value; with none, `torch.load(weights_only=True)` reads the file. The order of tensors is kept.
    `accept` sees the open file before it takes its place, and may raise.
    Raises OutputError for a type that torch has no tensors of, and as `replacing` does.
    """
    table = _Pickle().file(tensors, nesting, extras or {})
    records = _lay_out(
        {
            "data.pkl": _bytes(table),
            "byteorder": _bytes(b"little"),
            **{f"data/{number}": tensor for number, tensor in enumerate(tensors.values())},
            "version": _bytes(b"3\n"),
        }
    )
    reporter.start(task, sum(r.size for r in records))
    try:
        with replacing(path, durable=durable, inputs=inputs) as fd:
            sums = _copy(fd, records, threads, reporter, task)
            _write_headers(fd, records, sums)
            accept(fd)
    finally:
        reporter.finish(task)


def _bytes(data: bytes) -> LazyTensor:
    return MemoryTensor(DType.U8, (len(data),), data)


class _Pickle:
    """Writes pickle protocol 2, just what a table of tensors needs."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[bytes, int] = {}

    def file(self, tensors: Mapping[str, LazyTensor], nesting: str, extras: Mapping[str, bytes]) -> bytes:
        self.out += b"}("
        if nesting:
            self.text(nesting)
            self.out += b"}("
        for key, (name, tensor) in enumerate(tensors.items()):
            self.text(name)
            self.tensor(str(key), name, tensor)
        if nesting:
            self.out += b"u"
        for name, opcodes in extras.items():  # last, because their own memo overwrites ours
            self.text(name)
            self.out += opcodes
        self.out += b"u."
        return bytes(self.out)

    def tensor(self, key: str, name: str, tensor: LazyTensor) -> None:
        typed = tensor.dtype in _STORAGES
        if not typed and (tensor.dtype.torch_name is None or tensor.dtype.bits < 8):
            fact = f"PyTorch files hold no {tensor.dtype.code} tensors"
            raise OutputError(Problem(fact, evidence=(f"`{name}`",), hint="write a safetensors file"))
        self.name(b"torch._utils", b"_rebuild_tensor_v2" if typed else b"_rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage")
        if typed:
            self.name(b"torch", _STORAGES[tensor.dtype].encode())
        else:
            self.name(b"torch.storage", b"UntypedStorage")
        self.text(key)
        self.text("cpu")
        self.number(tensor.numel if typed else tensor.nbytes)
        self.out += b"tQ"  # the storage, by a tuple that torch.load looks up
        self.number(0)
        self.numbers(tensor.shape)
        self.numbers(_strides(tensor.shape))
        self.out += b"\x89"  # requires no gradient
        self.name(b"collections", b"OrderedDict")
        self.out += b")R"  # of no hooks
        if not typed:
            self.name(b"torch", str(tensor.dtype.torch_name).encode())
        self.out += b"tR"

    def text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data

    def number(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + bytes([value])
        elif value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            self.out += b"\x8a\x08" + struct.pack("<q", value)

    def numbers(self, values: Sequence[int]) -> None:
        self.out += b"("
        for value in values:
            self.number(value)
        self.out += b"t"

    def name(self, module: bytes, name: bytes) -> None:
        opcodes = b"c" + module + b"\n" + name + b"\n"
        if opcodes in self.memo:
            self.out += b"h" + bytes([self.memo[opcodes]])
        else:
            self.memo[opcodes] = len(self.memo)
            self.out += opcodes + b"q" + bytes([self.memo[opcodes]])


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(1, extent)
    return strides[::-1]


@dataclass(frozen=True, slots=True)
class _Record:
    """A file of the archive: its local header begins at `offset`, its data at `start`."""

    name: bytes
    tensor: LazyTensor
    offset: int
    start: int

    @property
    def size(self) -> int:
        return self.tensor.nbytes


_ELSEWHERE = 0xFFFFFFFF  # says that a value is in the 64-bit fields
_LIMIT = _ELSEWHERE  # which values from here on need
_DATE = 0x21  # 1980-01-01, the first that zip can say


def _lay_out(contents: Mapping[str, LazyTensor]) -> list[_Record]:
    records, offset = [], 0
    for path, tensor in contents.items():
        name = f"{ROOT}/{path}".encode()
        bare = offset + 30 + len(name) + (20 if tensor.nbytes >= _LIMIT else 0)
        start = -(-(bare + 4) // ALIGNMENT) * ALIGNMENT  # room for the padding's own header
        records.append(_Record(name, tensor, offset, start))
        offset = start + tensor.nbytes
    return records


def _copy(fd: int, records: Sequence[_Record], threads: int, reporter: Reporter, task: str) -> list[int]:
    """Write every record's data; the CRC-32 of each."""

    stop = threading.Event()

    def copy(record: _Record) -> int:
        crc, offset = 0, record.start
        for data in record.tensor.windows():
            if stop.is_set():
                break
            crc = zlib.crc32(data, crc)
            if not _blank(data):  # zeros stay a hole
                write_all(fd, data, offset)
            offset += len(data)
            reporter.advance(task, len(data))
        return crc

    with ThreadPoolExecutor(max(1, threads), "write") as pool:
        try:
            return list(pool.map(copy, records))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _blank(data: memoryview) -> bool:
    return not any(data[:64]) and data.tobytes().count(0) == len(data)


def _write_headers(fd: int, records: Sequence[_Record], sums: Sequence[int]) -> None:
    directory = bytearray()
    for record, crc in zip(records, sums, strict=True):
        large, far = record.size >= _LIMIT, record.offset >= _LIMIT
        size = _ELSEWHERE if large else record.size
        version = 45 if large or far else 20
        common = (0x800, 0, 0, _DATE, crc, size, size, len(record.name))  # UTF-8, stored
        sizes = struct.pack("<QQ", record.size, record.size) if large else b""
        extra = _extra(1, sizes)
        room = record.start - record.offset - 30 - len(record.name) - len(extra)
        extra += struct.pack("<2sH", b"FB", room - 4) + b"Z" * (room - 4)
        local = struct.pack("<4s5H3I2H", b"PK\x03\x04", version, *common, len(extra)) + record.name + extra
        write_all(fd, memoryview(local), record.offset)
        extra = _extra(1, sizes + (struct.pack("<Q", record.offset) if far else b""))
        head = (b"PK\x01\x02", version, version, *common, len(extra), 0, 0, 0, 0)
        directory += (
            struct.pack("<4s6H3I5H2I", *head, _ELSEWHERE if far else record.offset) + record.name + extra
        )
    start = records[-1].start + records[-1].size
    write_all(fd, memoryview(directory + _end(len(records), len(directory), start)), start)


def _extra(kind: int, data: bytes) -> bytes:
    return struct.pack("<HH", kind, len(data)) + data if data else b""


def _end(count: int, size: int, start: int) -> bytes:
    """The end of central directory, with its 64-bit form before it where that is needed."""
    wide = b""
    if count >= 0xFFFF or size >= _LIMIT or start >= _LIMIT:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    fields = (0xFFFF, 0xFFFF, _ELSEWHERE, _ELSEWHERE) if wide else (count, count, size, start)
    return wide + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *fields, 0)
