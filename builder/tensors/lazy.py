"""Tensors that are described before they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WINDOW = 1 << 20  # bytes; small enough for the processor's cache, large enough to hide a call's cost


class DType(Enum):
    """Element types, in the order of the safetensors library (which orders a file's tensors by it)."""

    BOOL = ("BOOL", 8, "bool")
    F4 = ("F4", 4, "float4_e2m1fn_x2")
    F6_E2M3 = ("F6_E2M3", 6, None)
    F6_E3M2 = ("F6_E3M2", 6, None)
    U8 = ("U8", 8, "uint8")
    I8 = ("I8", 8, "int8")
    F8_E5M2 = ("F8_E5M2", 8, "float8_e5m2")
    F8_E4M3 = ("F8_E4M3", 8, "float8_e4m3fn")
    F8_E8M0 = ("F8_E8M0", 8, "float8_e8m0fnu")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz")
    I16 = ("I16", 16, "int16")
    U16 = ("U16", 16, "uint16")
    F16 = ("F16", 16, "float16")
    BF16 = ("BF16", 16, "bfloat16")
    I32 = ("I32", 32, "int32")
    U32 = ("U32", 32, "uint32")
    F32 = ("F32", 32, "float32")
    C64 = ("C64", 64, "complex64")
    F64 = ("F64", 64, "float64")
    I64 = ("I64", 64, "int64")
    U64 = ("U64", 64, "uint64")

    def __init__(self, code: str, bits: int, torch_name: str | None) -> None:
        self.code = code
        self.bits = bits
        self.torch_name = torch_name

    @property
    def itemsize(self) -> int:
        """Bytes an element; 1 for the types of less than a byte, which have no address of their own."""
        return max(1, self.bits // 8)

    @property
    def floating(self) -> bool:
        """Whether this holds real numbers that a precision may be chosen for."""
        return self.code[0] == "F" or self is DType.BF16

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of the same elements; imports torch."""
        import torch

        assert self.torch_name is not None, f"torch has no {self.code}"
        found = getattr(torch, self.torch_name)
        assert isinstance(found, torch.dtype)
        return found


BY_CODE = {d.code: d for d in DType}
BY_TORCH_NAME = {d.torch_name: d for d in DType if d.torch_name}


class LazyTensor(ABC):
    """A tensor whose dtype and shape are known and whose bytes are read on demand.

    Bytes are always little endian, in C order, without padding, whatever the file holds. Reading is
    positioned and may be done from several threads at once.
    """

    __slots__ = ("dtype", "shape")

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    @property
    def computed(self) -> bool:
        """Whether reading computes with torch: a pass then takes care of torch's threads and its rounding."""
        return False

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The tensors that this one reads, if it does not read a file or memory."""
        return ()

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dim tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all elements."""
        return self.numel * self.dtype.bits // 8

    @property
    def stored(self) -> tuple[str, int]:
        """What it is in its file, which may be blocks: the type's name, and the bytes that it takes."""
        return self.dtype.code, self.nbytes

    @abstractmethod
    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `start` on.

        `start` and `len(out)` are multiples of the element's size, and the range lies in the tensor.
        Raises SourceError when the bytes cannot be had.
        """

    def windows(self, size: int = WINDOW) -> Iterator[memoryview]:
        """The bytes from first to last in pieces of at most `size` bytes.

        One buffer serves all pieces: each is valid until the next is asked for.
        """
        total = self.nbytes
        buffer = memoryview(bytearray(min(size, total)))
        for start in range(0, total, size):
            piece = buffer[: min(size, total - start)]
            self.read_into(start, piece)
            yield piece

    def tobytes(self) -> bytearray:
        """All bytes at once; for tensors known to be small."""
        data = bytearray(self.nbytes)
        if data:
            self.read_into(0, memoryview(data))
        return data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.dtype.code} {list(self.shape)}>"


class Derived(LazyTensor):
    """A tensor whose elements are those of one `source`, all or some of them, in their type."""

    __slots__ = ("source",)

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        super().__init__(source.dtype, shape)
        self.source = source

    @property
    def computed(self) -> bool:
        """As the source."""
        return self.source.computed

    @property
    def made_of(self) -> Sequence[LazyTensor]:
        """The source."""
        return (self.source,)


class MemoryTensor(LazyTensor):
    """A tensor whose bytes are at hand, such as one that a fix makes."""

    __slots__ = ("_data",)

    def __init__(self, dtype: DType, shape: tuple[int, ...], data: bytes) -> None:
        super().__init__(dtype, shape)
        assert len(data) == self.nbytes, f"{len(data)} bytes for {self!r}"
        self._data = data

    def read_into(self, start: int, out: memoryview) -> None:
        """Copy from memory."""
        out[:] = self._data[start : start + len(out)]
