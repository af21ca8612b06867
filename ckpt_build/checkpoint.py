"""A checkpoint as a mapping from names to tensors that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from builder.formats import checkpoint as formats
from builder.tensors.lazy import DType, LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Tensor:
    """A tensor that is described before it is read; reading may be done from several threads at once."""

    __slots__ = ("_lazy", "name")

    def __init__(self, name: str, lazy: LazyTensor) -> None:
        self.name = name
        self._lazy = lazy

    @property
    def dtype(self) -> str:
        """The type of its elements, by safetensors' code: `F32`, `F16`, `BF16`, `F8_E4M3`, `I64`, …"""
        return self._lazy.dtype.code

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of each dimension, in elements; `()` for a single number."""
        return self._lazy.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self._lazy.numel

    @property
    def nbytes(self) -> int:
        """Number of bytes of all elements."""
        return self._lazy.nbytes

    def tobytes(self) -> bytes:
        """All elements, little endian, in C order. Raises SourceError when they cannot be read."""
        return bytes(self._lazy.tobytes())

    def torch(self) -> torch.Tensor:
        """A torch tensor of the same dtype and shape, on the CPU, whose memory is its own.

        Two F4 share a byte, so torch's last dimension of those is half as long. Raises SourceError when it
        cannot be read, TypeError for a type that this torch does not have.
        """
        import torch

        code, dtype = self._lazy.dtype, getattr(torch, self._lazy.dtype.torch_name or "", None)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"torch {torch.__version__} has no {code.code}: `tobytes()` has its elements")
        shape = (*self.shape[:-1], self.shape[-1] // 2) if code is DType.F4 else self.shape
        if not self.nbytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._lazy.tobytes(), dtype=torch.uint8).view(dtype).reshape(shape)

    def numpy(self) -> NDArray[Any]:
        """A numpy array of the same type and shape, whose memory is its own.

        Raises SourceError when it cannot be read, TypeError for a type that numpy does not have, as BF16.
        """
        found = _numpy_type(self._lazy.dtype)
        if found is None:
            raise TypeError(f"numpy has no {self.dtype}: `torch()` has it, and `.float()` of that")
        import numpy as np

        return np.frombuffer(self._lazy.tobytes(), found).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.dtype}, {list(self.shape)})"


def _numpy_type(dtype: DType) -> np.dtype[Any] | None:
    import numpy as np

    kinds = {"BOOL": "?", "C64": "<c8", "BF16": None}
    if dtype.code in kinds or "_" in dtype.code or dtype.bits < 8:
        said = kinds.get(dtype.code)
    else:
        said = f"<{dtype.code[0].lower()}{dtype.itemsize}"
    return np.dtype(said) if said is not None else None


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors of a file, opened but not read; close it, or use it in `with`.

    `len`, `in`, `items` and the like are those of any mapping. A file, a sharded set and a model's folder
    in diffusers' layout are all the same here.
    """

    def __init__(self, opened: formats.Checkpoint) -> None:
        self._opened = opened

    @property
    def container(self) -> str:
        """What it lies in: `safetensors`, `safetensors-sharded`, `torch-zip`, `torch-legacy`, `torch-tar`
        or `diffusers`.
        """
        return self._opened.container

    @property
    def size(self) -> int:
        """Bytes, of all of its files."""
        return self._opened.size

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a safetensors file says of itself; empty for PyTorch files."""
        return dict(self._opened.metadata)

    @property
    def others(self) -> Mapping[str, str]:
        """Entries of a PyTorch file that are no tensors, such as `epoch`, each described."""
        return dict(self._opened.others)

    def close(self) -> None:
        """Close every file; tensors can no longer be read."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        return Tensor(name, self._opened[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)

    def __contains__(self, name: object) -> bool:
        return name in self._opened

    def __repr__(self) -> str:
        return f"<Checkpoint {self._opened.name!r}, {self.container}, {len(self)} tensors>"
