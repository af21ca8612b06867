"""Writing GGUF files: a diffusion model's tensors as they are, rounded, or in blocks of Q8_0."""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

from builder.base.disk import new_file, write_all, write_through
from builder.base.errors import CkptError, OutputError, Problem
from builder.base.progress import SILENT, Reporter
from builder.base.words import fits_pattern
from builder.formats.gguf import ALIGNED, ALIGNMENT, ARCHITECTURE, ORIGINAL_SHAPE, TYPES, Type
from builder.formats.write_safetensors import Accept, Written
from builder.tensors.cast import PRECISIONS, Cast, Fault, Faults, Narrow, NonFinite, Overflow, Precision
from builder.tensors.conversions import floats
from builder.tensors.ggml_blocks import BLOCKS, LARGE, SMALL, encode_q8_0
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.moves import Reshaped
from builder.tensors.packed import packing
from builder.tensors.scan import Pass, Passing, Span, alone

VERSION = 3
BLOCKS_VERSION = 2  # of ggml's blocks
MAX_NAME = 127  # bytes; what programs that know image models have room for
FEW = 1024  # elements; up to as many are never packed or rounded
_RESHAPED = 512  # elements; from as many on
_GAP = 16  # bytes between tensors in the order of the pass, so that each has windows of its own

_CODES = {type_: code for code, type_ in TYPES.items()}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_STRING, _UINT32, _INT32, _ARRAY = 8, 4, 5, 9
_Q8 = BLOCKS["Q8_0"]
# Of metadata, what is said anew, or is of other formats.
_OWN = {ARCHITECTURE, ALIGNED, "general.quantization_version", "general.file_type", "format"}
_LARGEST = 65504.0 * 127  # that a block of Q8_0 holds


@dataclass(frozen=True)
class Encoding:
    """How a diffusion model is written as GGUF, by what programs know it by there.

    `precision` is that of matrices, and with `quantize` they are in blocks of that. Vectors, what is small or
    has more than four dimensions, and the tensors `full` are FP32, those that are `whole` in no blocks: both
    are patterns over names. With `reshaped`, rows that are no multiple of 256 are stored as such, beside
    their own shape. `keep` leaves every tensor in its type.
    """

    architecture: str
    precision: Precision = "fp16"
    narrow: Narrow = False
    quantize: Literal["q8_0"] | None = None
    reshaped: bool = False
    full: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    overflow: Overflow = "error"
    non_finite: NonFinite = "error"


class Item(NamedTuple):
    """A tensor in the file: `size` bytes from `start` on, and its shape there, as torch has it."""

    name: str
    type: Type
    shape: tuple[int, ...]
    start: int
    size: int


class Layout(NamedTuple):
    """Where everything of a file will be: `head` is its first bytes, `items` are in the order of theirs."""

    head: bytes
    items: list[Item]
    size: int


Specs = Mapping[str, tuple[DType, tuple[int, ...]]]


def plan_layout(specs: Specs, encoding: Encoding, metadata: Mapping[str, str]) -> Layout:
    """The layout of a GGUF file of tensors of these dtypes and shapes, without touching any data.

    Tensors are in the order of their names, texts of the metadata in that of their keys. Raises OutputError
    for what the format, or a program that reads it, cannot hold.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, Type] = {}
    for name, (dtype, shape) in sorted(specs.items()):
        shapes[name] = _stored(shape) if encoding.reshaped else shape
        types[name] = _type(name, dtype, shape, shapes[name], encoding)
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME or not name or "\0" in name:
            evidence = f"programs have room for {MAX_NAME} bytes"
            raise OutputError(
                Problem(f"a tensor cannot be named `{name}` in a GGUF file", evidence=(evidence,))
            )
    keys = [
        _key(ARCHITECTURE, _STRING, _text(encoding.architecture)),
        _key("general.quantization_version", _UINT32, struct.pack("<I", BLOCKS_VERSION)),
        _key("general.file_type", _UINT32, struct.pack("<I", _file_type(types, shapes))),
    ]
    for name, (_, shape) in sorted(specs.items()):
        if shape != shapes[name]:
            array = struct.pack(f"<IQ{len(shape)}i", _INT32, len(shape), *shape)
            keys.append(_key(ORIGINAL_SHAPE + name, _ARRAY, array))
    keys += [_key(k, _STRING, _text(v)) for k, v in sorted(metadata.items()) if k not in _OWN]
    items, infos, at = [], [], 0
    for name, type_ in types.items():
        size = _size(type_, shapes[name])
        items.append(Item(name, type_, shapes[name], at, size))
        dims = shapes[name][::-1]
        infos.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _CODES[type_], at))
        at += _padded(size)
    counts = struct.pack("<4sIQQ", b"GGUF", VERSION, len(items), len(keys))
    head = b"".join((counts, *keys, *infos))
    head += bytes(_padded(len(head)) - len(head))
    return Layout(head, [i._replace(start=i.start + len(head)) for i in items], len(head) + at)


def _type(
    name: str, dtype: DType, shape: tuple[int, ...], stored: tuple[int, ...], encoding: Encoding
) -> Type:
    wanted = PRECISIONS[encoding.precision]
    if wanted is None or not dtype.floating:
        if dtype not in _CODES:
            hint = "give a precision: `fp16`, `bf16` or `fp32`" if dtype.floating else None
            evidence = (f"tensor `{name}`, {dtype.code} {list(shape)}",)
            raise OutputError(Problem(f"GGUF has no type for {dtype.code}", evidence=evidence, hint=hint))
        return dtype
    if len(shape) < 2 or len(shape) > 4 or prod(shape) <= FEW or _fits(encoding.full, name):
        return DType.F32
    if (
        encoding.quantize is None
        or _fits(encoding.whole, name, name.rpartition(".")[0])
        or stored[-1] % SMALL
    ):
        kept = dtype.bits < wanted.bits if encoding.narrow == "fewer" else encoding.narrow
        return dtype if kept and dtype.bits <= wanted.bits and dtype in _CODES else wanted
    return _Q8


def _fits(patterns: Iterable[str], *names: str) -> bool:
    return any(fits_pattern(p, n) if "*" in p else p == n for p in patterns for n in names)


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor is stored in, whose rows are whole blocks of any type where that may be."""
    count = prod(shape)
    reshaped = len(shape) > 1 and count >= _RESHAPED and not count % LARGE and shape[-1] % LARGE
    return (count // LARGE, LARGE) if reshaped else shape


def _file_type(types: Mapping[str, Type], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """ggml's number of the type that most of a file is of, FP32 where there is no such number."""
    sizes: dict[str, int] = {}
    for name, type_ in types.items():
        called = type_.code if isinstance(type_, DType) else type_.name
        sizes[called] = sizes.get(called, 0) + prod(shapes[name])
    return _FILE_TYPES.get(max(sizes, key=sizes.__getitem__, default=""), 0)


def _size(type_: Type, shape: tuple[int, ...]) -> int:
    count = prod(shape)
    return count * type_.itemsize if isinstance(type_, DType) else count // type_.elements * type_.itemsize


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    try:
        data = value.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = value[max(0, error.start - 40) : error.end]
        fact = "a name or a text is not valid Unicode and cannot be written"
        raise OutputError(Problem(fact, evidence=(f"…{shown!r}",))) from None
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def writing_gguf(
    path: Path | str,
    tensors: Mapping[str, LazyTensor],
    encoding: Encoding,
    metadata: Mapping[str, str] | None = None,
    *,
    sha256: bool = True,
    digests: bool = False,
    groups: Mapping[str, str] | None = None,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
    reporter: Reporter = SILENT,
    task: str = "",
    accept: Accept = lambda written: written.path,
) -> Passing[Written]:
    """The work of writing a GGUF file in one pass, whose windows hold whole blocks.

    All is as for `writing` of `write_safetensors`, but that digests, zeros and histograms are of the tensors
    as they are given, and no offsets are told: what is in the file are other bytes. Raises OutputError also
    where values would not survive; finite values beyond a block's range are an error or clamped, those that
    are none always one.
    """
    path, metadata = Path(path), metadata or {}
    if packed := packing(tensors):
        raise packed.refused(
            "have no place in a GGUF file", "a precision makes them numbers: `fp16` or `bf16`"
        )
    layout = plan_layout({n: (t.dtype, t.shape) for n, t in tensors.items()}, encoding, metadata)
    spans, at = [], 0
    for item in layout.items:
        tensor = tensors[item.name]
        spans.append(Span(item.name, _Given(tensor, tensor.shape), at, tensor.nbytes))
        at += tensor.nbytes + _GAP
    whole = hashlib.sha256(layout.head)
    reporter.start(task, sum(s.length for s in spans))
    try:
        with new_file(path, durable=durable, inputs=inputs) as file:
            file.reserve(layout.size)
            write_all(file.fd, memoryview(layout.head), 0)
            packer = _Packer(file.fd, layout.items, spans, encoding, durable)
            found = yield from alone(
                Pass(
                    spans,
                    write=packer.write,
                    whole=[_InOrder(packer, whole)] if sha256 else [],
                    groups=groups or {},
                    digests=digests,
                    advance=lambda count: reporter.advance(task, count),
                )
            )
            if (error := packer.error(path.name)) is not None:
                raise error
            written = Written.of(path, file.fd, whole.hexdigest() if sha256 else None, found, {})
            file.path = accept(written)
    finally:
        reporter.finish(task)
    return written._replace(path=file.path)


class _Given(Reshaped):
    """A tensor that is packed as it is read."""

    __slots__ = ()

    @property
    def computed(self) -> bool:
        """True: it is rounded."""
        return True


class _Packer:
    """Writes windows of tensors, in any order, as what they are in the file; holds that until it is taken."""

    def __init__(
        self, fd: int, items: list[Item], spans: list[Span], encoding: Encoding, durable: bool
    ) -> None:
        self._rounded, self._unfit = Faults(), Faults()
        self._write = write_through if durable else write_all
        self._fd, self._items, self._spans, self._packing = fd, items, spans, encoding
        self._starts = [s.offset for s in spans]
        self._made: dict[tuple[int, int], bytes | memoryview] = {}  # by tensor and the window's first byte

    def error(self, name: str) -> CkptError | None:
        """The error that names every tensor with values that a file of this name cannot hold, or None."""
        if (unfit := self._unfit.error(f"`{name}`", None)) is not None:
            hint = "no block holds them: leave `quantize` out"
            if self._packing.overflow != "clamp":
                hint += ", or clamp what is too large (`overflow`)"
            return OutputError(*(replace(p, hint=hint) for p in unfit.problems))
        return self._rounded.error(f"`{name}`", PRECISIONS[self._packing.precision])

    def write(self, window: memoryview, offset: int) -> None:
        """Pack and write a window, which is of one tensor and begins at an offset of the pass."""
        index = bisect(self._starts, offset) - 1
        item, span = self._items[index], self._spans[index]
        start = offset - span.offset
        data = self._packed(item, span.tensor.dtype, window)
        if start + len(window) == span.length:
            data = bytes(data) + bytes(_padded(item.size) - item.size)
        at = item.start + (start // span.tensor.dtype.itemsize * item.size // max(1, span.tensor.numel))
        self._write(self._fd, memoryview(data), at)
        self._made[index, start] = data

    def take(self, place: tuple[int, int], size: int) -> tuple[bytes | memoryview, tuple[int, int]]:
        """What a window of `size` bytes became, and the place of the one behind it."""
        index, start = place
        end = start + size
        following = (index + 1, 0) if end == self._spans[index].length else (index, end)
        return self._made.pop(place), following

    def _packed(self, item: Item, dtype: DType, window: memoryview) -> bytes | memoryview:
        if not window or item.type is dtype:
            return bytes(window)
        if isinstance(item.type, DType):
            values = MemoryTensor(dtype, (len(window) // dtype.itemsize,), bytes(window))
            encoding = self._packing
            cast = Cast(
                values,
                item.type,
                name=item.name,
                faults=self._rounded,
                overflow=encoding.overflow,
                non_finite=encoding.non_finite,
            )
            return bytes(cast.tobytes())
        return self._blocks(item.name, dtype, window)

    def _blocks(self, name: str, dtype: DType, window: memoryview) -> bytes:
        import numpy as np
        import torch

        values = floats(torch.frombuffer(window, dtype=dtype.torch)).numpy()
        largest = float(np.abs(values).max())
        if not largest <= _LARGEST:  # NaN is not
            finite = np.isfinite(values)
            fault = Fault(
                nan=int(np.isnan(values).sum()),
                infinite=int(np.isinf(values).sum()),
            )
            if self._packing.overflow != "clamp":
                beyond = np.abs(values[finite]) > _LARGEST
                fault.overflow = int(beyond.sum())
                fault.largest = float(np.abs(values[finite]).max(initial=0.0)) if fault.overflow else 0.0
            if fault != Fault():
                self._unfit.add(name, fault)
            values = np.clip(np.where(finite, values, np.float32(0)), -_LARGEST, _LARGEST).astype("f4")
        return encode_q8_0(values).tobytes()


class _InOrder:
    """Gives a hash what windows became, as they come in their order."""

    def __init__(self, packer: _Packer, whole: hashlib._Hash) -> None:
        self._packer, self._whole = packer, whole
        self._place = (0, 0)

    def update(self, window: memoryview, /) -> None:
        """Take what the next window became."""
        data, self._place = self._packer.take(self._place, len(window))
        self._whole.update(data)
