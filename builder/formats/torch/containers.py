"""PyTorch's files of every age, told apart by their first bytes."""

from __future__ import annotations

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch.legacy import MAGIC, open_legacy, open_tar
from builder.formats.torch.zip_container import open_zip

HEAD = 512  # bytes that tell


def looks_like_torch(head: bytes) -> str | None:
    """The container that a file's first `HEAD` bytes announce, or None.

    One of `torch-zip` (any zip), `torch-tar` (any tar) and `torch-legacy` (any binary pickle).
    """
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "torch-zip"
    if head[257:262] == b"ustar":
        return "torch-tar"
    if head[:1] == b"\x80" or head.startswith(f"L{MAGIC}".encode()):
        return "torch-legacy"
    return None


_OPENERS = {"torch-zip": open_zip, "torch-tar": open_tar, "torch-legacy": open_legacy}


def open_torch(blob: FileBlob, name: str) -> Checkpoint:
    """Open a PyTorch file without running it: its table of contents is read, its tensors are not.

    `name` is what messages call the file. Raises SourceError when the file is none, is damaged, or holds
    code. The blob is closed with the checkpoint; on an error it is still its caller's.
    """
    container = looks_like_torch(blob.read(0, min(HEAD, blob.size)))
    if container is None:
        raise SourceError(Problem("the file is none of PyTorch's", Place(name)))
    return _OPENERS[container](blob, name)
