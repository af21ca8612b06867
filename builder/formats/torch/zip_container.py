"""PyTorch's zip container: a pickle beside one record for each storage."""

from __future__ import annotations

import zlib

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch.assembly import assemble
from builder.formats.torch.pickles import load
from builder.formats.torch.tensors_in_pickles import BUILDERS, Storage, storage_of
from builder.formats.torch.zip_directory import Record, content, read_records

_MAX_DEFLATED_PICKLE = 64 << 20
_MAX_RATIO = 100  # a state dict's pickle deflates to a tenth
_LITTLE = 1 << 20  # bytes that may be whatever they are packed from
_PIECE = 1 << 20

# Records that say how the archive was written.
_HOUSEKEEPING = frozenset(
    {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


def open_zip(blob: Blob, name: str) -> Checkpoint:
    """The checkpoint in a zip that `torch.save` wrote, which `name` is for messages.

    Raises SourceError when it is none, is damaged, may be read in two ways, or holds code.
    """
    records = {n: r for n, r in read_records(blob, name).items() if r.size or not n.endswith("/")}
    root = _root(records, name)
    own = {n.removeprefix(root): r for n, r in records.items() if n.startswith(root)}
    if "constants.pkl" in own or any(n.startswith("code/") for n in own):
        raise _refused(name, "the file is a TorchScript program, not a checkpoint")
    big_endian = _big_endian(blob, own, name)
    pickled = content(blob, own["data.pkl"], name)
    _check(pickled, own["data.pkl"], name)
    read = load(pickled, file=name, part="data.pkl", builders=BUILDERS, persistent=storage_of)
    if read.end != pickled.size:
        raise _refused(name, "bytes follow the end of `data.pkl`", f"{pickled.size - read.end:,} bytes")
    storages = _Storages(blob, own, name)
    checkpoint = assemble(
        blob, name, "torch-zip", read.value, read.globals, storages.locate, big_endian=big_endian
    )
    used = _HOUSEKEEPING | storages.contents.keys()
    for path, record in records.items():
        if not path.startswith(root) or path.removeprefix(root) not in used:
            checkpoint.others[path] = f"record of {record.size:,} bytes that no tensor uses"
    return checkpoint


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
            f"its records are {', '.join(f'`{n}`' for n in list(records)[:3])}…"
            if records
            else "it is empty",
            hint="if a checkpoint is packed in it, unpack it first",
        )
    return found[0].removesuffix("data.pkl")


def _big_endian(blob: Blob, own: dict[str, Record], file: str) -> bool:
    record = own.get("byteorder")
    if record is None:
        return False
    word = bytearray(min(record.size, 16))
    content(blob, record, file).read_into(0, memoryview(word))
    if word == b"little" or word == b"big":
        return word == b"big"
    raise _refused(file, "the file's byte order is not known", f"its record says {bytes(word)!r}")


def _check(pickled: Blob, record: Record, file: str) -> None:
    """Read a pickle once before any of it is believed; archives that know no checksum say 0."""
    most = min(_MAX_DEFLATED_PICKLE, _LITTLE + _MAX_RATIO * record.packed)
    if record.deflated and record.size > most:
        raise _refused(file, "the record `data.pkl` is deflated and too large", f"{record.size:,} bytes")
    crc = 0
    buffer = memoryview(bytearray(min(record.size, _PIECE)))
    for start in range(0, record.size, _PIECE):
        piece = buffer[: record.size - start]
        pickled.read_into(start, piece)
        crc = zlib.crc32(piece, crc)
    if record.crc and crc != record.crc:
        raise _refused(file, "the record `data.pkl` is damaged: its checksum is wrong")


class _Storages:
    """Where the storages are; each record is opened once, however many storages mention it."""

    def __init__(self, blob: Blob, records: dict[str, Record], file: str) -> None:
        self.contents: dict[str, tuple[Blob, int]] = {}
        self._blob = blob
        self._records = records
        self._file = file

    def locate(self, storage: Storage, tensor: str) -> tuple[Blob, int]:
        """A stored record's bytes are a range of the file; a deflated one is a blob of its own."""
        path = f"data/{storage.key}"
        record = self._records.get(path)
        if record is None:
            raise _refused(self._file, f"the data of `{tensor}` is missing", f"there is no record `{path}`")
        if storage.nbytes > record.size or (record.deflated and storage.nbytes != record.size):
            raise _refused(
                self._file,
                f"the data of `{tensor}` is not what its record holds",
                f"{storage.nbytes:,} bytes of data, {record.size:,} bytes in the record `{path}`",
            )
        if path not in self.contents:
            inflated = content(self._blob, record, self._file) if record.deflated else None
            self.contents[path] = (inflated, 0) if inflated else (self._blob, record.offset)
        return self.contents[path]
