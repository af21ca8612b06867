"""The GGUF format: a strict reader of its header."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

from builder.base.errors import Place, Problem, SourceError
from builder.base.words import counted
from builder.formats.blob import Blob, BlobTensor
from builder.formats.checkpoint import Checkpoint
from builder.formats.llama_names import INTERLEAVED, KEYS, QUERIES, halves_apart, hugging_face_names
from builder.tensors.ggml_blocks import BLOCKS, BlockTensor, BlockType
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.moves import Reordered

VERSIONS = (2, 3)
ALIGNMENT = 32  # unless the file says another
ARCHITECTURE, ALIGNED, SPLIT = "general.architecture", "general.alignment", "split.count"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # before the name of a tensor that was stored in another

MAX_HEADER = 100_000_000  # bytes
MAX_KEYS = 100_000
_MAX_NAME = 1 << 16  # bytes; keys may have as many
_MAX_TEXT = 1 << 16  # bytes of a text that is kept
_MAX_DIMS = 8  # ggml has 4; the weights of video models have 5
_MAX_ALIGNMENT = 1 << 20
_DEEPEST = 4  # arrays within each other
_TOO_MANY = 1 << 63
_PIECE = 1 << 18  # bytes of the header that are read at once

Type = BlockType | DType

TYPES: dict[int, Type] = {
    0: DType.F32,
    1: DType.F16,
    2: BLOCKS["Q4_0"],
    3: BLOCKS["Q4_1"],
    6: BLOCKS["Q5_0"],
    7: BLOCKS["Q5_1"],
    8: BLOCKS["Q8_0"],
    10: BLOCKS["Q2_K"],
    11: BLOCKS["Q3_K"],
    12: BLOCKS["Q4_K"],
    13: BLOCKS["Q5_K"],
    14: BLOCKS["Q6_K"],
    24: DType.I8,
    25: DType.I16,
    26: DType.I32,
    27: DType.I64,
    28: DType.F64,
    30: DType.BF16,
}
_OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
# Of the values of keys: those of a fixed size, by the words of `struct`.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TRUNCATED = "the file is truncated: download or copy it again, and check its SHA-256"

Value = str | int | float | bool | tuple[int, ...]


class _Info(NamedTuple):
    """A tensor's line in the header: `start` is in bytes, from where the data begins."""

    type: Type
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        count = prod(self.shape)
        if isinstance(self.type, DType):
            return count * self.type.itemsize
        return count // self.type.elements * self.type.itemsize


def from_blob(blob: Blob, name: str) -> Checkpoint:
    """The checkpoint in a GGUF file, its table of contents wholly checked.

    Tensors have their shapes as torch has them, so the last dimension is the first of the file; numbers in
    blocks are FP32. Those of text encoders that llama.cpp has named get the names and the order of Hugging
    Face's layout. Texts are metadata; what else the file says of itself is among `others`.
    Raises SourceError for a file that is not valid, is one of several, or has a type that is not known.
    """
    header = _Header(blob)
    texts = {k: v for k, v in header.values.items() if isinstance(v, str)}
    said = {k: str(v) for k, v in header.values.items() if not isinstance(v, str | tuple)}
    tensors = {n: _tensor(i, blob, header.data_offset) for n, i in header.tensors.items()}
    return Checkpoint(
        name=name,
        container="gguf",
        size=blob.size,
        tensors=_hugging_face(tensors, header),
        metadata=texts,
        others={**said, **header.arrays},
        blobs=(blob,),
    )


def _tensor(info: _Info, blob: Blob, base: int) -> LazyTensor:
    if isinstance(info.type, DType):
        return BlobTensor(info.type, info.shape, blob, base + info.start)
    return BlockTensor(info.type, info.shape, blob, base + info.start)


def _hugging_face(tensors: Mapping[str, LazyTensor], header: _Header) -> dict[str, LazyTensor]:
    """Tensors under Hugging Face's names, and in its order, where llama.cpp has others."""
    architecture = str(header.values.get(ARCHITECTURE, ""))
    made = {new: tensors[old] for old, new in hugging_face_names(architecture, tensors).items()}
    if architecture == INTERLEAVED:
        made |= {n: header.in_order(n, made[n]) for n in made if QUERIES in n or KEYS in n}
    return made


class _Header:
    """What a GGUF file says of itself: values and tensors by name, and arrays that are not kept, in words."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self._data = b""
        self._at = self._end = 0  # in `_data`; of `_data`, in the file
        self.values: dict[str, Value] = {}
        self.arrays: dict[str, str] = {}
        self.tensors: dict[str, _Info] = {}
        tensors, keys = self._counts()
        for _ in range(keys):
            self._key()
        if self.values.get(SPLIT, 1) not in (0, 1):
            evidence = f"`{SPLIT}` is {self.values[SPLIT]}"
            hint = "join its parts by `llama-gguf-split --merge`, or take a file that is whole"
            raise self._bad("the file is one of several that a model was split into", evidence, hint=hint)
        unknown: dict[str, list[str]] = {}
        for _ in range(tensors):
            self._tensor(unknown)
        if unknown:
            raise self._not_read(unknown)
        alignment = self._alignment()
        self.data_offset = -(-self._place // alignment) * alignment
        self._check(alignment)

    @property
    def _place(self) -> int:
        return self._end - len(self._data) + self._at

    def _bad(self, fact: str, *evidence: str, hint: str | None = None) -> SourceError:
        return SourceError(Problem(fact, Place(self.blob.name), evidence, hint))

    def in_order(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """Queries or keys of which each head's halves lie row by row, as Hugging Face has them."""
        key = f"{INTERLEAVED}.attention.head_count"
        if KEYS in name and f"{key}_kv" in self.values.keys() | self.arrays.keys():
            key = f"{key}_kv"
        heads = self.values.get(key)
        rows = tensor.shape[0] if tensor.shape else 0
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            said = self.arrays.get(key, "missing" if heads is None else str(heads))
            evidence = f"the tensor has {counted(rows, 'row')}, the key is {said:.40}"
            hint = "take a file that llama.cpp converted: the order of the rows hangs on it"
            raise self._bad(f"`{key}` does not tell the heads of `{name}`", evidence, hint=hint)
        return Reordered(tensor, halves_apart(rows, heads))

    # -- bytes

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        at = self._at + count
        if at > len(self._data):
            self._read(count)
            at = count
        data = self._data[self._at : at]
        self._at = at
        return data

    def _skip(self, count: int) -> None:
        if self._at + count <= len(self._data):
            self._at += count
            return
        place = self._place + count
        self._bound(place)
        self._data, self._at, self._end = b"", 0, place

    def _read(self, count: int) -> None:
        """Have at least so many bytes from here on."""
        place = self._place
        self._bound(place + count)
        size = min(max(count, _PIECE), self.blob.size - place)
        data = bytearray(size)
        self.blob.read_into(place, memoryview(data))
        self._data, self._at, self._end = bytes(data), 0, place + size

    def _bound(self, end: int) -> None:
        if end > self.blob.size:
            have = f"the file has {self.blob.size:,} bytes"
            raise self._bad("the GGUF header reaches past the end of the file", have, hint=_TRUNCATED)
        if end > MAX_HEADER:
            raise self._bad("the GGUF header is too long", f"it has more than {MAX_HEADER:,} bytes")

    def _number(self, form: str) -> int:
        found: int = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]
        return found

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if length > _MAX_NAME:
            raise self._bad(f"the name of a {what} is too long", f"{length:,} bytes, at {self._place:,}")
        return self._text(self._take(length), f"the name of a {what}")

    def _text(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"{what} is not UTF-8", f"{error.reason}, before byte {self._place:,}") from None

    # -- what they say

    def _counts(self) -> tuple[int, int]:
        """How many tensors and keys follow."""
        head = self._take(8)
        version = int.from_bytes(head[4:], "little")
        if not version & 0xFFFF and version:
            hint = "take the file for little-endian machines, which nearly all are"
            raise self._bad("the GGUF file is big-endian, which is not read", hint=hint)
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            hint = f"take one of version {known[-1]}, which programs of today write"
            raise self._bad(f"the GGUF file is of version {version}", f"read are {known}", hint=hint)
        tensors, keys = struct.unpack("<QQ", self._take(16))
        # Each takes some bytes: no file has more.
        if keys > MAX_KEYS or tensors * 24 > self.blob.size:
            raise self._bad(
                "the GGUF file has too many entries", f"{keys:,} keys, {tensors:,} tensors are told"
            )
        return tensors, keys

    def _key(self) -> None:
        key = self._name("key")
        if not key:
            raise self._bad("the GGUF file has a key without a name")
        if key in self.values or key in self.arrays:
            raise self._bad(f"the GGUF file has the key `{key}` twice")
        kind = self._number("I")
        if kind in _NUMBERS:
            self.values[key] = self._number(_NUMBERS[kind])
        elif kind == _STRING:
            self._string(key)
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._bad(f"the key `{key}` has an unknown type", f"type {kind}")

    def _string(self, key: str) -> None:
        length = self._number("Q")
        if length > _MAX_TEXT:
            self._skip(length)
            self.arrays[key] = f"a text of {length:,} bytes"
        else:
            self.values[key] = self._text(self._take(length), f"the value of `{key}`")

    def _array(self, key: str) -> None:
        """Only a tensor's shape is kept."""
        kind, count = struct.unpack("<IQ", self._take(12))
        if key.startswith(ORIGINAL_SHAPE):
            if kind not in (4, 5, 10, 11) or count > _MAX_DIMS:
                raise self._bad(f"`{key}` is no shape", f"{count:,} values of type {kind}")
            self.values[key] = tuple(self._number(_NUMBERS[kind]) for _ in range(count))
        else:
            self._items(key, kind, count, 1)
            self.arrays[key] = f"an array of {counted(count, 'value')}"

    def _items(self, key: str, kind: int, count: int, depth: int) -> None:
        """Pass over the items of an array."""
        if kind in _NUMBERS:
            self._skip(count * struct.calcsize("<" + _NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            for _ in range(count):
                inner, held = struct.unpack("<IQ", self._take(12))
                self._items(key, inner, held, depth + 1)
        else:
            what = "is nested too deeply" if kind == _ARRAY else "has values of an unknown type"
            raise self._bad(f"the array `{key}` {what}", f"type {kind}")

    def _tensor(self, unknown: dict[str, list[str]]) -> None:
        name = self._name("tensor")
        if name in self.tensors:
            raise self._bad(f"the GGUF file names tensor `{name}` twice")
        if "\0" in name or not name:
            raise self._bad(f"the tensor name `{name}` is empty, or holds a NUL character")
        dims = self._number("I")
        if dims > _MAX_DIMS:
            raise self._bad(f"tensor `{name}` has too many dimensions", f"{dims:,}, of at most {_MAX_DIMS}")
        *extents, code, start = struct.unpack(f"<{dims}QIQ", self._take(8 * dims + 12))
        if code not in TYPES:
            unknown.setdefault(_OTHER_TYPES.get(code, f"type {code}"), []).append(name)
        shape = tuple(reversed(extents))
        if prod(filter(None, shape)) >= _TOO_MANY:
            raise self._bad(f"the shape of tensor `{name}` overflows", str(list(shape)))
        type_ = TYPES.get(code, DType.U8)
        if isinstance(type_, BlockType) and (not shape or shape[-1] % type_.elements):
            evidence = f"{type_.name} {list(shape)}: a block has {type_.elements} elements"
            raise self._bad(f"the rows of tensor `{name}` are no whole blocks", evidence)
        self.tensors[name] = _Info(type_, shape, start)

    def _not_read(self, unknown: Mapping[str, list[str]]) -> SourceError:
        names = " and ".join(sorted(unknown))
        evidence = (f"{counted(len(held), 'tensor')} as `{held[0]}`: {t}" for t, held in unknown.items())
        known = ", ".join(BLOCKS)
        hint = f"take the model as one of {known}, or as F16 or BF16"
        return self._bad(f"the GGUF file is packed as {names}, which is not read", *evidence, hint=hint)

    def _alignment(self) -> int:
        found = self.values.get(ALIGNED, ALIGNMENT)
        if type(found) is not int or not 0 < found <= _MAX_ALIGNMENT or found & (found - 1):
            raise self._bad(f"`{ALIGNED}` is no power of two", f"it is {found!s:.40}")
        return found

    def _check(self, alignment: int) -> None:
        """Raise unless each tensor lies where it may, and give those in another shape their own."""
        room = self.blob.size - self.data_offset
        last, end = "", 0
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].size)):
            if info.start % alignment:
                where = f"it begins at byte {info.start:,} of the data, which is no multiple of {alignment}"
                raise self._bad(f"tensor `{name}` is out of alignment", where)
            if info.start < end:
                raise self._bad(
                    f"tensors `{last}` and `{name}` overlap",
                    f"`{last}` ends at byte {end:,} of the data, `{name}` begins at {info.start:,}",
                )
            last, end = name, info.start + info.size
            if end > max(room, 0) and info.size:
                have = f"`{name}` ends at byte {end:,} of the data, {max(room, 0):,} are there"
                raise self._bad("the file ends before its tensors do", have, hint=_TRUNCATED)
        for key, shape in _shapes(self.values):
            name = key.removeprefix(ORIGINAL_SHAPE)
            held = self.tensors.get(name)
            if held is None or prod(shape) != prod(held.shape) or min(shape, default=1) < 0:
                have = f"it has {list(held.shape)}" if held is not None else "there is no such tensor"
                raise self._bad(f"`{key}` is no shape of its tensor", f"{list(shape)}", have)
            self.tensors[name] = _Info(held.type, shape, held.start)


def _shapes(values: Mapping[str, Value]) -> Iterable[tuple[str, tuple[int, ...]]]:
    return [(k, v) for k, v in values.items() if isinstance(v, tuple)]
