"""PyTorch files, written: a zip archive of tensors, and a pickle that any `torch.load` reads safely."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from builder.base.disk import new_file, read_at, write_all
from builder.base.errors import OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.formats.write_safetensors import Accept, Written
from builder.tensors.lazy import WINDOW, DType, LazyTensor
from builder.tensors.scan import Pass, Passing, Span, alone

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


def writing_torch(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    *,
    nesting: str = "",
    extras: Mapping[str, bytes] | None = None,
    sha256: bool = False,
    digests: bool = False,
    groups: Mapping[str, str] | None = None,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
    reporter: Reporter = SILENT,
    task: str = "writing",
    accept: Accept = lambda written: written.path,
) -> Passing[Written]:
    """The work of writing a dict of tensors as `torch.save` would, but always the same bytes, in one pass.

    With `nesting` the tensors lie in a dict of that name inside the file's dict. `extras` are further
    entries of the file's dict: the opcodes (pickle protocol 2, without header and STOP) that push each
    value; with none, `torch.load(weights_only=True)` reads the file. The order of tensors is kept. All else
    is as for `writing` of `write_safetensors`; with `sha256` the file is read again, as what stands before a
    tensor follows from it.
    Raises OutputError for a type that torch has no tensors of, and as `writing` does.
    """
    table = _Pickle().file(tensors, nesting, extras or {})
    paths = {f"data/{number}": name for number, name in enumerate(tensors)}
    first, last = {"data.pkl": table, "byteorder": b"little"}, {"version": b"3\n"}
    plain = first | last
    sizes = {p: tensors[n].nbytes for p, n in paths.items()}
    records = _lay_out({**_sizes(first), **sizes, **_sizes(last)})
    spans = [Span(n := paths[r.path], tensors[n], r.start, r.size) for r in records if r.path in paths]
    path = Path(path)
    sums: dict[str, int] = {}
    reporter.start(task, sum(s.length for s in spans))
    try:
        with new_file(path, durable=durable, inputs=inputs) as file:
            file.reserve(records[-1].start + records[-1].size)
            found = yield from alone(
                Pass(
                    spans,
                    write=partial(_write_unless_blank, file.fd),
                    groups=groups or {},
                    digests=digests,
                    checksums=sums,
                    advance=lambda count: reporter.advance(task, count),
                )
            )
            for record in (r for r in records if r.path in plain):
                write_all(file.fd, plain[record.path], record.start)
            known = {**{p: sums[n] for p, n in paths.items()}, **{p: zlib.crc32(d) for p, d in plain.items()}}
            _write_headers(file.fd, records, [known[r.path] for r in records])
            digest = _sha256(file.fd) if sha256 else None
            written = Written.of(path, file.fd, digest, found, {s.name: s.offset for s in spans})
            file.path = accept(written)
    finally:
        reporter.finish(task)
    return written._replace(path=file.path)


def _write_unless_blank(fd: int, data: memoryview, offset: int) -> None:
    """Write, but for zeros, which stay a hole."""
    if any(data[:64]) or data.tobytes().count(0) != len(data):
        write_all(fd, data, offset)


def _sha256(fd: int) -> str:
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(WINDOW)), 0
    while count := read_at(fd, buffer, offset):
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()


def _sizes(data: Mapping[str, bytes]) -> dict[str, int]:
    return {path: len(each) for path, each in data.items()}


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

    path: str
    size: int
    offset: int
    start: int

    @property
    def name(self) -> bytes:
        """The whole name in the archive."""
        return f"{ROOT}/{self.path}".encode()


_ELSEWHERE = 0xFFFFFFFF  # says that a value is in the 64-bit fields
_LIMIT = _ELSEWHERE  # which values from here on need
_DATE = 0x21  # 1980-01-01, the first that zip can say


def _lay_out(sizes: Mapping[str, int]) -> list[_Record]:
    records: list[_Record] = []
    offset = 0
    for path, size in sizes.items():
        name = f"{ROOT}/{path}".encode()
        bare = offset + 30 + len(name) + (20 if size >= _LIMIT else 0)
        start = -(-(bare + 4) // ALIGNMENT) * ALIGNMENT  # room for the padding's own header
        records.append(_Record(path, size, offset, start))
        offset = start + size
    return records


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
