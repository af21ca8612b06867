"""From what a pickle holds to a checkpoint of lazy tensors."""

from __future__ import annotations

from typing import Protocol

from builder.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch_tree import gather
from builder.formats.torch_values import Storage
from builder.formats.views import tensor_at
from builder.tensors import LazyTensor

# Tied tensors and expanded views count each time; what is a hundred times its file was made to drown us.
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
    tensors: dict[str, LazyTensor] = {}
    stored: dict[object, int] = {}
    for key, ref in found.tensors.items():
        place, start = locate(ref.storage, key)
        stored[ref.storage.key] = max(ref.storage.nbytes, stored.get(ref.storage.key, 0))
        elements = ref.elements
        if elements.dtype is None:
            found.others[key] = f"{elements.name} tensor {list(ref.shape)}, of a type that is not supported"
            continue
        offset = start + ref.offset * elements.itemsize
        tensors[key] = tensor_at(place, offset, elements.dtype, ref.shape, ref.strides, big_endian=big_endian)
    total, most = sum(t.nbytes for t in tensors.values()), sum(stored.values())
    if total > max(_MAX_SMALL, _MAX_REPEATS * most):
        raise SourceError(
            Problem(
                "the file's tensors repeat its data beyond reason",
                Place(name),
                (f"{total:,} bytes of tensors from {most:,} bytes of data",),
                "the file was made to mislead; get the model elsewhere",
            )
        )
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
