"""The directory of a zip archive, read strictly: one meaning or an error."""

from __future__ import annotations

import struct
import tempfile
import threading
import weakref
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import IO

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob

MAX_RECORDS = 1 << 18
_MAX_DIRECTORY = 64 << 20
_STORED, _DEFLATED = 0, 8
_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "aes"}
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_DESCRIPTOR = 1 << 3
_UTF8 = 1 << 11
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")


@dataclass(frozen=True, slots=True)
class Record:
    """A file within the archive; `offset` is where its bytes begin, after its local header."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    deflated: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    raw: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


class _Refused(Exception):
    """What is wrong with the archive: the fact, and what shows it."""


def read_records(blob: Blob, file: str) -> dict[str, Record]:
    """Every record of an archive by its name, in the order of the file.

    Names are keys and nothing else. Raises SourceError when the archive is damaged, encrypted, or may be
    read in two ways: headers that disagree, names that come twice, records that overlap, bytes before the
    first record or after the last.
    """
    try:
        start, size, count = _directory(blob)
        entries = sorted(_entries(blob, start, size, count), key=lambda e: e.header)
        names = [_name(e) for e in entries]
        if len(set(names)) < len(names):
            twice = next(n for n, count in Counter(names).items() if count > 1)
            raise _Refused(f"it has two records named `{twice}`")
        if entries and entries[0].header:
            raise _Refused(
                "it begins with bytes that belong to no record", "its first record is not at byte 0"
            )
        ends = [*(e.header for e in entries), start][1:]
        return {n: _record(blob, e, n, end) for n, e, end in zip(names, entries, ends, strict=True)}
    except _Refused as error:
        fact, *evidence = error.args
        raise SourceError(
            Problem(
                f"the zip archive cannot be trusted: {fact}",
                Place(file),
                tuple(evidence),
                "it is damaged or was made to mislead; get the file again or elsewhere",
            )
        ) from None


def _read(blob: Blob, offset: int, size: int) -> bytes:
    data = bytearray(size)
    blob.read_into(offset, memoryview(data))
    return bytes(data)


def _directory(blob: Blob) -> tuple[int, int, int]:
    """Where the directory is: its offset, its bytes and its number of entries."""
    tail_at = max(0, blob.size - _END.size - _MAX16)
    tail = _read(blob, tail_at, blob.size - tail_at)
    ends = []
    at = tail.find(b"PK\5\6")
    while at >= 0:
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail):
            ends.append(at)
        at = tail.find(b"PK\5\6", at + 1)
    if not ends:
        raise _Refused("its directory is missing", "the file is truncated, or something was added to it")
    if len(ends) > 1:
        raise _Refused("it has two directories", "its comment holds another one")
    end_at = tail_at + ends[0]
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, ends[0])
    found = (disk, first_disk, here, count, size, start)
    if end_at >= _LOCATOR64.size:
        locator = _read(blob, end_at - _LOCATOR64.size, _LOCATOR64.size)
        if locator[:4] == b"PK\6\7":
            _, disk64, at64, disks = _LOCATOR64.unpack(locator)
            end_at -= _LOCATOR64.size
            if disk64 or disks > 1 or at64 + _END64.size > end_at:
                raise _Refused("the end of its directory is not where it says")
            sign, length, _, _, *found64 = _END64.unpack(_read(blob, at64, _END64.size))
            if sign != b"PK\6\6" or at64 + 12 + length != end_at:
                raise _Refused("the end of its directory is not where it says")
            limits = (_MAX16, _MAX16, _MAX16, _MAX16, _MAX32, _MAX32)
            if any(a not in (b, most) for a, b, most in zip(found, found64, limits, strict=True)):
                raise _Refused("its two ends disagree about the directory")
            found = (found64[0], found64[1], found64[2], found64[3], found64[4], found64[5])
            end_at = at64
    disk, first_disk, here, count, size, start = found
    if disk or first_disk or here != count:
        raise _Refused("it is one part of several")
    if start + size != end_at:
        raise _Refused(
            "its directory does not end where its end begins",
            f"{size:,} bytes from byte {start:,} on, and the end at byte {end_at:,}",
        )
    if count > MAX_RECORDS or size > _MAX_DIRECTORY:
        raise _Refused(f"it has {count:,} records, more than {MAX_RECORDS:,}")
    return start, size, count


def _entries(blob: Blob, start: int, size: int, count: int) -> list[_Entry]:
    data = _read(blob, start, size)
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            raise _Refused("its directory ends in the middle of an entry")
        sign, _, _, flags, method, _, _, crc, packed, full, n_name, n_extra, n_comment, disk, _, _, header = (
            _CENTRAL.unpack_from(data, at)
        )
        name_at = at + _CENTRAL.size
        extra_at = name_at + n_name
        at = extra_at + n_extra + n_comment
        if sign != b"PK\1\2" or at > size:
            raise _Refused("its directory is garbled")
        if _MAX32 in (packed, full, header) or disk == _MAX16:
            full, packed, header, disk = _wide(
                data[extra_at : extra_at + n_extra],
                [(full, _MAX32, 8), (packed, _MAX32, 8), (header, _MAX32, 8), (disk, _MAX16, 4)],
            )
        if disk:
            raise _Refused("it is one part of several")
        entries.append(_Entry(data[name_at:extra_at], flags, method, crc, packed, full, header))
    if at != size:
        raise _Refused("its directory has more bytes than entries")
    return entries


def _wide(extra: bytes, fields: list[tuple[int, int, int]]) -> list[int]:
    """The values of fields, from the zip64 extra where a field itself is too narrow for its value."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == 1 and at + length <= len(extra):
            body, values = extra[at : at + length], []
            for value, most, width in fields:
                if value == most:
                    if len(body) < width:
                        break
                    value, body = int.from_bytes(body[:width], "little"), body[width:]
                values.append(value)
            else:
                return values
        at += length
    raise _Refused("the size or place of a record is missing")


def _name(entry: _Entry) -> str:
    try:
        return entry.raw.decode("utf-8" if entry.flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise _Refused("the name of a record is not text", repr(entry.raw[:80])) from None


def _record(blob: Blob, entry: _Entry, name: str, end: int) -> Record:
    """A record by both its headers, which must agree; its bytes must lie before `end`."""
    if entry.flags & _ENCRYPTED:
        raise _Refused(f"the record `{name}` is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        method = _METHODS.get(entry.method, f"number {entry.method}")
        raise _Refused(f"the record `{name}` is packed by a method that PyTorch never uses: {method}")
    if entry.method == _STORED and entry.packed != entry.size:
        raise _Refused(f"the record `{name}` has two sizes", f"{entry.packed:,} and {entry.size:,} bytes")
    if entry.header + _LOCAL.size > end:
        raise _Refused(f"the record `{name}` overlaps another")
    head = _read(blob, entry.header, min(_LOCAL.size + len(entry.raw), end - entry.header))
    sign, _, flags, method, _, _, crc, packed, size, n_name, n_extra = _LOCAL.unpack_from(head)
    if sign != b"PK\3\4":
        raise _Refused(f"the record `{name}` is not where the directory says")
    offset = entry.header + _LOCAL.size + n_name + n_extra
    if offset + entry.packed > end:
        raise _Refused(f"the record `{name}` overlaps another, or goes past the end")
    if _MAX32 in (packed, size):
        extra = _read(blob, offset - n_extra, n_extra)
        size, packed = _wide(extra, [(size, _MAX32, 8), (packed, _MAX32, 8)])
    later = flags & _DESCRIPTOR and (crc, packed, size) == (0, 0, 0)
    mine = (flags & ~_UTF8, method, head[_LOCAL.size :], *(() if later else (crc, packed, size)))
    theirs = (
        entry.flags & ~_UTF8,
        entry.method,
        entry.raw,
        *(() if later else (entry.crc, entry.packed, entry.size)),
    )
    if mine != theirs or n_name != len(entry.raw):
        raise _Refused(f"the headers of the record `{name}` disagree")
    return Record(name, offset, entry.packed, entry.size, entry.crc, entry.method == _DEFLATED)


def content(blob: Blob, record: Record, file: str) -> Blob:
    """A record's bytes, unpacked where they are packed."""
    if record.deflated:
        return Inflated(blob, record, file)
    return Part(blob, record.offset, record.size)


class Part:
    """A range of a blob, as a blob."""

    def __init__(self, blob: Blob, offset: int, size: int) -> None:
        self.name = blob.name
        self.size = size
        self._blob = blob
        self._offset = offset

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on."""
        self._blob.read_into(self._offset + offset, out)

    def close(self) -> None:
        """Nothing: the whole is closed by who opened it."""


class Inflated:
    """A deflated record as a blob, unpacked as it is read.

    Reading onward keeps nothing. Who goes back, such as a transposed view does at each of its rows, has the
    record unpacked once more, into a nameless temporary file that later reads are from. Never more than
    the declared size is unpacked, and where the last byte is reached, the record's end and checksum are
    checked. The file is gone with this, or when this is closed.
    """

    _INPUT = 64 << 10
    _KEPT = 1 << 20  # bytes kept at once
    _FEW = 4 << 20  # bytes that are unpacked anew before they are kept, and
    _PASSES = 3  # times the whole

    def __init__(self, blob: Blob, record: Record, file: str) -> None:
        self.name = blob.name
        self.size = record.size
        self._blob = blob
        self._record = record
        self._file = file
        self._lock = threading.Lock()
        self._whole: IO[bytes] | None = None
        self._at = 0  # up to where the record was read
        self._again = 0  # bytes that were unpacked in vain, since reading went back
        self._engine: zlib._Decompress | None = None  # only while reading, since a file has thousands of us

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on; raises SourceError when the record is damaged."""
        with self._lock:
            done = 0
            if offset < self._at:
                self._again += self._at
                self._engine = None
            if self._again > max(self._FEW, self._PASSES * self.size):
                self._read_kept(offset, out)
                return
            while done < len(out):
                if self._engine is None:
                    self._rewind()
                if self._at < offset:
                    self._inflate(min(offset - self._at, self._INPUT))
                    continue
                piece = self._inflate(len(out) - done)
                out[done : done + len(piece)] = piece
                done += len(piece)
                offset += len(piece)

    def _read_kept(self, offset: int, out: memoryview) -> None:
        try:
            if self._whole is None:
                self._whole = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the record is
                weakref.finalize(self, self._whole.close)
                self._rewind()
                while self._at < self.size:
                    self._whole.write(self._inflate(min(self._KEPT, self.size - self._at)))
                self._at = 0
            self._whole.seek(offset)
            out[:] = self._whole.read(len(out))
        except OSError as error:
            self.close()
            fact = f"cannot keep the unpacked record `{self._record.name}` in a temporary file"
            hint = "free some space, set `TMPDIR`, or convert the file first"
            raise SourceError(Problem(fact, Place(self._file), (str(error.strerror),), hint)) from None
        except BaseException:
            self.close()
            raise

    def _rewind(self) -> None:
        self._engine = zlib.decompressobj(-15)
        self._at = 0
        self._taken = 0
        self._crc = 0
        self._rest = b""

    def _inflate(self, most: int) -> bytes:
        """The next bytes, at least one and at most `most`."""
        piece = self._unpack(most)
        if not piece:
            raise self._damaged("it ends too early")
        self._at += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        if self._at == self.size:
            self._finish()
        return piece

    def _unpack(self, most: int) -> bytes:
        """What the stream has next, at most `most` bytes; nothing at its end."""
        assert self._engine is not None
        record = self._record
        while True:
            if not self._rest and self._taken < record.packed:
                count = min(self._INPUT, record.packed - self._taken)
                self._rest = _read(self._blob, record.offset + self._taken, count)
                self._taken += count
            try:
                piece = self._engine.decompress(self._rest, most)
            except zlib.error:
                raise self._damaged("it is not deflated") from None
            self._rest = self._engine.unconsumed_tail
            if piece or self._engine.eof or not (self._rest or self._taken < record.packed):
                return piece

    def _finish(self) -> None:
        """Check that the stream ends where its size says, with the checksum that the directory says."""
        assert self._engine is not None
        if self._unpack(1):
            raise self._damaged(f"it unpacks to more than its {self.size:,} bytes")
        if not self._engine.eof:
            raise self._damaged("it has no end")
        if self._engine.unused_data or self._taken < self._record.packed:
            raise self._damaged("bytes follow its end")
        if self._crc != self._record.crc:
            raise self._damaged("its checksum is wrong")
        self._engine = None

    def _damaged(self, what: str) -> SourceError:
        self._engine = None
        return SourceError(
            Problem(
                f"the record `{self._record.name}` is damaged: {what}",
                Place(self._file),
                hint="get the file again or elsewhere",
            )
        )

    def close(self) -> None:
        """Let go of what was kept; the whole is closed by who opened it."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None
