"""From what a pickle holds to a checkpoint of lazy tensors."""

from __future__ import annotations

from math import prod
from typing import Protocol

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch.tensors_in_pickles import Storage, TensorRef
from builder.formats.torch.tree import Found, gather
from builder.formats.views import A_CALL, tensor_at
from builder.tensors.lazy import LazyTensor

# Tied tensors and expanded views count each time, and views with gaps with what is between their elements;
# what is a hundred times its file was made to drown us.
_MAX_REPEATS = 64
_MAX_SMALL = 1 << 30


class Locate(Protocol):
    """Finds a storage's bytes: a blob and the offset in it of the storage's first element.

    `tensor` is who asks, for errors. Raises SourceError when the bytes are not all there.
    """

    def __call__(self, storage: Storage, tensor: str) -> tuple[Blob, int]: ...


def assemble(
    blob: Blob,
    name: str,
    container: str,
    value: object,
    names: frozenset[str],
    locate: Locate,
    *,
    big_endian: bool = False,
) -> Checkpoint:
    """The checkpoint whose pickle holds `value` and refers to `names`; raises SourceError."""
    found = gather(value, name)
    _limit(found, name)
    tensors: dict[str, LazyTensor] = {}
    for key, ref in found.tensors.items():
        place, start = locate(ref.storage, key)
        dtype = ref.elements.dtype
        if dtype is None:
            kind = f"{ref.elements.name} tensor {list(ref.shape)}"
            found.others[key] = f"{kind}, of a type that is not supported"
            continue
        offset = start + ref.offset * dtype.itemsize
        tensors[key] = tensor_at(place, offset, dtype, ref.shape, ref.strides, big_endian=big_endian)
    return Checkpoint(
        name,
        container,
        blob.size,
        tensors,
        globals=tuple(sorted(names)),
        others=found.others,
        nesting=found.nesting,
        blobs=(blob,),
    )


def _to_read(ref: TensorRef) -> int:
    """The bytes that reading a tensor may take: its own, and those in its gaps or the calls to skip them."""
    runs = prod(n for n, s in zip(ref.shape, ref.strides, strict=True) if s > 1)
    extent = (ref.extent - ref.offset) * ref.elements.itemsize
    return max(ref.nbytes, min(extent, runs * A_CALL)) if ref.nbytes else 0


def _limit(found: Found, file: str) -> None:
    storages = {r.storage.key: r.storage.nbytes for r in found.tensors.values()}
    total, stored = sum(map(_to_read, found.tensors.values())), sum(storages.values())
    if total > max(_MAX_SMALL, _MAX_REPEATS * stored):
        raise SourceError(
            Problem(
                "the file's tensors repeat its data beyond reason",
                Place(file),
                (f"{total:,} bytes of tensors from {stored:,} bytes of data",),
                "the file was made to mislead; get the model elsewhere",
            )
        )
