"""PyTorch's zip container: a pickle beside one record for each storage."""

from __future__ import annotations

import zlib

from builder.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.checkpoint import Checkpoint
from builder.formats.pickles import load
from builder.formats.torch_tree import Found, gather
from builder.formats.torch_values import BUILDERS, Storage, TensorRef, storage_of
from builder.formats.views import tensor_at
from builder.formats.zipfiles import Record, content, read_records
from builder.tensors import LazyTensor

_MAX_DEFLATED_PICKLE = 64 << 20

# Records that say how the archive was written.
_HOUSEKEEPING = frozenset(
    {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


def open_zip(blob: Blob, name: str) -> Checkpoint:
    """The checkpoint in a zip that `torch.save` wrote; raises SourceError."""
    records = {n: r for n, r in read_records(blob, name).items() if not (n.endswith("/") and not r.size)}
    root = _root(records, name)
    own = {n.removeprefix(root): r for n, r in records.items() if n.startswith(root)}
    if "constants.pkl" in own or any(n.startswith("code/") for n in own):
        raise _refused(name, "the file is a TorchScript program, not a checkpoint")
    big_endian = _byte_order(blob, own, name)
    pickled = _pickle(blob, own["data.pkl"], name)
    read = load(pickled, file=name, part="data.pkl", builders=BUILDERS, persistent=storage_of)
    if read.end != pickled.size:
        raise _refused(name, "bytes follow the end of `data.pkl`", f"{pickled.size - read.end:,} bytes")
    found = gather(read.value, name)
    archive = _Archive(blob, own, name, big_endian)
    tensors = archive.tensors(found)
    for record in records.values():
        inner = record.name.removeprefix(root) if record.name.startswith(root) else None
        if inner not in _HOUSEKEEPING and inner not in archive.contents:
            found.others[record.name] = f"record of {record.size:,} bytes that no tensor uses"
    return Checkpoint(
        name,
        "torch-zip",
        blob.size,
        tensors,
        globals=tuple(sorted(read.globals)),
        others=found.others,
        nesting=found.nesting,
        blobs=(blob,),
    )


def _refused(file: str, fact: str, *evidence: str, hint: str | None = None) -> SourceError:
    return SourceError(Problem(fact, Place(file), evidence, hint))


def _root(records: dict[str, Record], file: str) -> str:
    """The folder that the checkpoint is in; PyTorch names it after the file, and others as they like."""
    found = [n for n in records if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(found) > 1:
        raise _refused(file, "the zip archive has more than one `data.pkl`", *found[:10])
    if not found:
        raise _refused(
            file,
            "the file is a zip archive, but not one that PyTorch wrote: it has no `data.pkl`",
            f"it holds {len(records):,} records, such as {', '.join(f'`{n}`' for n in list(records)[:3])}",
            hint="unpack the archive and use the checkpoint in it",
        )
    return found[0].removesuffix("data.pkl")


def _byte_order(blob: Blob, own: dict[str, Record], file: str) -> bool:
    record = own.get("byteorder")
    if record is None:
        return False
    word = bytearray(min(record.size, 16))
    content(blob, record, file).read_into(0, memoryview(word))
    if word == b"little" or word == b"big":
        return word == b"big"
    raise _refused(file, "the file's byte order is not known", f"its record says {bytes(word)!r}")


def _pickle(blob: Blob, record: Record, file: str) -> Blob:
    """The bytes of `data.pkl`, whose checksum is right."""
    if record.deflated and record.size > _MAX_DEFLATED_PICKLE:
        raise _refused(file, "`data.pkl` is packed and too large to be unpacked", f"{record.size:,} bytes")
    pickled = content(blob, record, file)
    if record.deflated:
        data = bytearray(record.size)
        pickled.read_into(0, memoryview(data))
        return _Memory(blob.name, bytes(data))
    crc = 0
    buffer = memoryview(bytearray(min(record.size, 1 << 20)))
    for start in range(0, record.size, 1 << 20):
        piece = buffer[: min(len(buffer), record.size - start)]
        pickled.read_into(start, piece)
        crc = zlib.crc32(piece, crc)
    if record.crc and crc != record.crc:
        raise _refused(file, "the record `data.pkl` is damaged: its checksum is wrong")
    return pickled


class _Memory:
    """Bytes at hand, as a blob."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self._data[offset : offset + len(out)]

    def close(self) -> None:
        pass


class _Archive:
    """The storages' records, each found and checked once."""

    def __init__(self, blob: Blob, records: dict[str, Record], file: str, big_endian: bool) -> None:
        self.blob = blob
        self.records = records
        self.file = file
        self.big_endian = big_endian
        self.contents: dict[str, tuple[Blob, int]] = {}

    def tensors(self, found: Found) -> dict[str, LazyTensor]:
        """Lazy tensors for references; what has no element type of ours goes to the others."""
        made: dict[str, LazyTensor] = {}
        for name, ref in found.tensors.items():
            blob, offset = self.content(ref.storage, name)
            dtype = ref.elements.dtype
            if dtype is None:
                found.others[name] = _foreign(ref)
                continue
            at = offset + ref.offset * dtype.itemsize
            made[name] = tensor_at(blob, at, dtype, ref.shape, ref.strides, big_endian=self.big_endian)
        return made

    def content(self, storage: Storage, tensor: str) -> tuple[Blob, int]:
        """Where a storage's bytes are: a blob and the offset in it."""
        key = f"data/{storage.key}"
        record = self.records.get(key)
        if record is None:
            raise _refused(self.file, f"the data of `{tensor}` is missing", f"there is no record `{key}`")
        if storage.nbytes > record.size:
            raise _refused(
                self.file,
                f"the data of `{tensor}` is incomplete",
                f"its storage has {storage.nbytes:,} bytes, the record `{key}` only {record.size:,}",
            )
        found = self.contents.get(key)
        if found is None:
            found = (self.blob, record.offset)
            if record.deflated:
                found = (content(self.blob, record, self.file), 0)
            self.contents[key] = found
        return found


def _foreign(ref: TensorRef) -> str:
    return f"{ref.elements.name} tensor {list(ref.shape)}, which no component can have"
