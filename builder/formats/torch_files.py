"""PyTorch's files of every age, told apart by their first bytes."""

from __future__ import annotations

from builder.errors import Place, Problem, SourceError
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.formats.torch_zip import open_zip

HEAD = 512  # bytes that tell


def looks_like_torch(head: bytes) -> str | None:
    """The container that a file's first `HEAD` bytes announce, or None.

    One of `torch-zip`, `torch-legacy` (any pickle, whoever wrote it) and `torch-tar`.
    """
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "torch-zip"
    if head[257:262] == b"ustar":
        return "torch-tar"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "torch-legacy"
    return None


def open_torch(blob: FileBlob, name: str) -> Checkpoint:
    """Open a PyTorch file without running it; reads its table of contents and nothing else.

    `name` is what messages call the file. Raises SourceError when the file is not one, is damaged, or
    holds code. The blob stays open with the checkpoint, and is its caller's on errors.
    """
    container = looks_like_torch(blob.read(0, min(HEAD, blob.size)))
    if container == "torch-zip":
        return open_zip(blob, name)
    raise SourceError(Problem("the file is not one of PyTorch's", Place(name)))
