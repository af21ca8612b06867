"""PyTorch's containers before zip: a row of pickles and raw storages, in one stream or in a tar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch.assembly import assemble
from builder.formats.torch.pickles import Global, Malformed, Unpickled, load
from builder.formats.torch.tar_directory import read_members
from builder.formats.torch.tensors_in_pickles import BUILDERS, Storage, storage_of, tensor_of
from builder.formats.torch.zip_directory import Part

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_PARTS = 100_000  # storages or tensors of a tar, each with a pickle of its own
_COUNT = 8  # bytes before each storage that say how many elements it has

# Storages are little endian in both containers, whatever `sys_info` says of the machine that wrote them.


@dataclass(slots=True)
class _Stream:
    """Pickles and numbers one after the other, in a file or a member of it; `at` is where the next begins."""

    blob: Blob
    file: str
    member: str = ""
    at: int = 0

    def pickle(self, part: str = "", persistent: Callable[[object], object] | None = None) -> Unpickled:
        read = load(
            self.blob,
            self.at,
            file=self.file,
            part=part or self.member,
            builders=BUILDERS,
            persistent=persistent,
        )
        self.at = read.end
        return read

    def numbers(self, count: int, width: int = 8) -> list[int]:
        """Little-endian signed integers."""
        if count * width > self.blob.size - self.at:
            raise self.refused("it ends in the middle")
        data = bytearray(count * width)
        self.blob.read_into(self.at, memoryview(data))
        self.at += len(data)
        return [
            int.from_bytes(data[i : i + width], "little", signed=True) for i in range(0, len(data), width)
        ]

    def storage(self, storage: Storage) -> int:
        """Step over a storage's count and elements; where the elements begin."""
        (count,) = self.numbers(1)
        start = self.at
        if count != storage.numel:
            raise self.refused(
                "a storage has another size than its pickle says", f"{count:,} and {storage.numel:,} elements"
            )
        if storage.nbytes > self.blob.size - start:
            raise self.refused(
                "it ends before its contents do",
                f"a storage of {storage.nbytes:,} bytes, of which {self.blob.size - start:,} are there",
            )
        self.at += storage.nbytes
        return start

    def refused(self, fact: str, *evidence: str) -> SourceError:
        what = f"the member `{self.member}`" if self.member else "the file"
        return _refused(self.file, f"{what} is damaged: {fact}", *evidence)


def _refused(file: str, fact: str, *evidence: str) -> SourceError:
    hint = "the file is damaged or was made to mislead; get it again or elsewhere"
    return SourceError(Problem(fact, Place(file), evidence, hint))


def open_legacy(blob: Blob, name: str) -> Checkpoint:
    """The checkpoint in the stream that `torch.save` wrote before 1.6; raises SourceError."""
    stream = _Stream(blob, name)
    magic = stream.pickle("magic number")
    if magic.value != MAGIC or type(magic.value) is not int:
        raise SourceError(
            Problem(
                "the file is a pickle, but not one that PyTorch wrote",
                Place(name),
                ("it does not begin with PyTorch's magic number",),
            )
        )
    protocol = stream.pickle("protocol version").value
    if protocol != _PROTOCOL or type(protocol) is not int:
        raise _refused(name, "the file has a protocol version that PyTorch never had")
    info = stream.pickle("sys_info")
    roots: dict[object, Storage] = {}
    main = stream.pickle("main pickle", lambda key: _legacy_id(key, roots))
    keys = stream.pickle("storage keys")
    starts = {key: stream.storage(roots[key]) for key in _known(keys.value, roots, name)}

    def locate(storage: Storage, tensor: str) -> tuple[Blob, int]:
        root = roots[storage.key]
        if storage.key not in starts:
            raise _refused(name, f"the data of `{tensor}` is missing", f"there is no storage `{storage.key}`")
        if storage.start * storage.elements.itemsize + storage.nbytes > root.nbytes:
            raise _refused(name, f"the data of `{tensor}` goes past its storage")
        return blob, starts[storage.key] + storage.start * storage.elements.itemsize

    names = frozenset().union(*(p.globals for p in (magic, info, main, keys)))
    checkpoint = assemble(blob, name, "torch-legacy", main.value, names, locate)
    _note_rest(checkpoint, blob.size - stream.at)
    return checkpoint


def _legacy_id(key: object, roots: dict[object, Storage]) -> object:
    """What a persistent id stands for: a storage, a view of one, or a class with its source."""
    match key:
        case ("module" | b"module", Global() as cls, _, _):
            return cls
        case (kind, cls, root_key, location, numel, view):
            root = storage_of((kind, cls, root_key, location, numel))
            roots.setdefault(root.key, root)
            match view:
                case None:
                    return root
                case (_, int() as start, int() as count) if start >= 0 and 0 <= count <= root.numel - start:
                    return replace(root, start=start, numel=count)
            raise Malformed("a view of a storage goes past it")
    raise Malformed("it refers to something outside itself that is no storage")


def _known(keys: object, roots: dict[object, Storage], name: str) -> Iterator[str]:
    """The storages in the order of the file, each of which the main pickle must have mentioned."""
    seen: set[object] = set()
    for key in keys if type(keys) is list else [keys]:
        key = key.decode("ascii", "backslashreplace") if type(key) is bytes else key
        if type(key) is not str or key not in roots or key in seen:
            raise _refused(name, "the file's list of storages does not fit to its pickle")
        seen.add(key)
        yield key


def _note_rest(checkpoint: Checkpoint, rest: int) -> None:
    if rest:
        checkpoint.others["(the end of the file)"] = f"{rest:,} bytes that no tensor uses"


def open_tar(blob: Blob, name: str) -> Checkpoint:
    """The checkpoint in a tar that the first versions of PyTorch wrote; raises SourceError."""
    members = read_members(blob, name)
    missing = {"pickle", "storages", "tensors"} - members.keys()
    if missing:
        raise SourceError(
            Problem(
                "the file is a tar archive, but not one that PyTorch wrote",
                Place(name),
                (f"it has no {', '.join(f'`{m}`' for m in sorted(missing))}",),
                "if a checkpoint is packed in it, unpack it first",
            )
        )
    streams = {m: _Stream(Part(blob, *members[m]), name, m) for m in members}
    names: set[str] = set()
    values: dict[int, object] = {}
    starts: dict[object, int] = {}
    try:
        _tar_storages(streams["storages"], values, starts, names)
        _tar_tensors(streams["tensors"], values, names)
    except Malformed as error:
        raise _refused(name, f"the file is malformed: {error}") from None
    main = streams["pickle"].pickle("pickle", lambda key: _tar_id(key, values))
    names |= main.globals
    if "sys_info" in streams:
        names |= streams["sys_info"].pickle("sys_info").globals
    offset = members["storages"][0]

    def locate(storage: Storage, tensor: str) -> tuple[Blob, int]:
        return blob, offset + starts[storage.key] + storage.start * storage.elements.itemsize

    checkpoint = assemble(blob, name, "torch-tar", main.value, frozenset(names), locate)
    for member in members.keys() - {"pickle", "storages", "tensors", "sys_info"}:
        checkpoint.others[member] = f"member of {members[member][1]:,} bytes that no tensor uses"
    return checkpoint


def _tar_storages(
    stream: _Stream, values: dict[int, object], starts: dict[object, int], names: set[str]
) -> None:
    """The member `storages`: each with its key, location and type before it; then views of them."""
    for _ in range(_count(stream)):
        read = stream.pickle()
        names |= read.globals
        match read.value:
            case (int() as key, _, Global() as cls) if key not in values:
                (numel,) = stream.numbers(1)
                stream.at -= _COUNT
                root = storage_of(("storage", cls, key, None, numel))
                starts[key] = stream.storage(root)
                values[key] = root
            case _:
                raise Malformed("a storage is not described by its key, place and type")
    views = stream.pickle().value
    for view in views if type(views) is list else [views]:
        match view:
            case (int() as key, int() as root_key, int() as start, int() as numel) if key not in values:
                whole = values.get(root_key)
                if (
                    not isinstance(whole, Storage)
                    or not 0 <= start <= start + numel <= whole.numel
                    or numel < 0
                ):
                    raise Malformed("a view of a storage goes past it")
                values[key] = replace(whole, start=whole.start + start, numel=numel)
            case _:
                raise Malformed("a view of a storage is not described by keys, offset and size")


def _tar_tensors(stream: _Stream, values: dict[int, object], names: set[str]) -> None:
    """The member `tensors`: each with its key, storage and type before its shape, strides and offset."""
    for _ in range(_count(stream)):
        read = stream.pickle()
        names |= read.globals
        match read.value:
            case (int() as key, int() as storage, Global()) if key not in values:
                (ndim,) = stream.numbers(1, 4)
                stream.numbers(1, 4)  # ndim once had 8 bytes
                if not 0 <= ndim <= 64:
                    raise Malformed(f"a tensor has {ndim:,} dimensions")
                shape, strides = tuple(stream.numbers(ndim)), tuple(stream.numbers(ndim))
                (offset,) = stream.numbers(1)
                values[key] = tensor_of(values.get(storage), offset, shape, strides)
            case _:
                raise Malformed("a tensor is not described by its key, storage and type")


def _count(stream: _Stream) -> int:
    count = stream.pickle().value
    if type(count) is not int or not 0 <= count <= stream.blob.size:
        raise Malformed("the number of its parts is none")
    if count > _MAX_PARTS:
        raise Malformed(f"it has {count:,} parts, more than {_MAX_PARTS:,}")
    return count


def _tar_id(key: object, values: dict[int, object]) -> object:
    """What a persistent id stands for: a tensor, a storage, or a class with its source."""
    match key:
        case (Global() as cls, *_):
            return cls
        case str() if key.isascii() and key.isdigit() and len(key) < 25:
            key = int(key)
    if type(key) is int and key in values:
        return values[key]
    raise Malformed("it refers to something outside itself that is no tensor")
