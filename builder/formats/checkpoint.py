"""A checkpoint: named lazy tensors, and what else its file says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from builder.formats.blob import Blob
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed import IN_HEADER, described

WRAPPERS = ("module.", "_orig_mod.")  # what wrappers of modules put before every name
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile, which may wrap any module inside too


@dataclass(eq=False)
class Checkpoint(Mapping[str, LazyTensor]):
    """Named tensors of one file (or sharded set), opened but not read.

    `container` is one of `safetensors`, `safetensors-sharded`, `torch-zip`, `torch-legacy`, `torch-tar`,
    `gguf`, `diffusers` (a model's folder, its tensors under the names of the original layout).
    `size` is in bytes, of all files. `globals` are the names a pickle refers to, none of which was
    imported. `others` are entries that are not tensors, such as `epoch`, with a short description each.
    `nesting` is where in the file the tensors lie, such as `state_dict`; names come without it.
    `mended` says what is wrong with the file and was passed over, where it was opened for repair.
    """

    name: str
    container: str
    size: int
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    globals: tuple[str, ...] = ()
    others: dict[str, str] = field(default_factory=dict)
    nesting: str = ""
    blobs: tuple[Blob, ...] = ()
    mended: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def close(self) -> None:
        """Close every file; tensors can no longer be read."""
        for blob in self.blobs:
            blob.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wrapped(name: str, prefix: str) -> bool:
    """Whether a name has more than this before it."""
    return name.startswith(prefix) and len(name) > len(prefix)


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under the names that its modules have without wrappers: `nesting` says what went.

    What a wrapper of a module inside put there goes where no two tensors get one name by that.
    """
    tensors, prefix = checkpoint.tensors, ""
    while word := next(
        (w for w in WRAPPERS if tensors and all(_wrapped(n, prefix + w) for n in tensors)), ""
    ):
        prefix += word
    outer = {n[len(prefix) :]: t for n, t in tensors.items()}
    inner = (
        {_COMPILED.sub("", n): t for n, t in outer.items()}
        if any("_orig_mod." in n for n in outer)
        else outer
    )
    checkpoint.tensors = inner if len(inner) == len(outer) and "" not in inner else outer
    checkpoint.nesting = ".".join(filter(None, (checkpoint.nesting, prefix.rstrip("."))))
    # What says of packed layers may do so under either names.
    return with_descriptions(checkpoint)


def with_descriptions(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what its metadata say of packed layers as tensors beside those layers.

    Programs read both alike, but a description in the metadata would be lost with the file's header.
    """
    made = described(checkpoint.tensors, checkpoint.metadata.get(IN_HEADER, ""))
    if made is not None:
        del checkpoint.metadata[IN_HEADER]
        checkpoint.metadata |= {IN_HEADER: made.rest} if made.rest is not None else {}
        checkpoint.tensors |= {n: t for n, t in made.tensors.items() if n not in checkpoint}
    return checkpoint
