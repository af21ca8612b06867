"""The members of a tar archive, read strictly."""

from __future__ import annotations

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob

_BLOCK = 512
_MAX_MEMBERS = 1000
_REGULAR = (b"0", b"\0")
_EXTENDED = (b"x", b"g")  # attributes such as times, which may also replace a name or size
_MAX_EXTENDED = 64 << 10


def read_members(blob: Blob, file: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every regular file of a tar by its name; names are keys and nothing else.

    Raises SourceError when the archive is damaged, or has members whose meaning could be disputed.
    """
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while at + _BLOCK <= blob.size:
        head = bytearray(_BLOCK)
        blob.read_into(at, memoryview(head))
        if not any(head):
            break
        name, size, kind = _header(bytes(head), file, at)
        at += _BLOCK
        if size > blob.size - at:
            raise _refused(file, f"the member `{name}` goes past the end of the file")
        if kind in _EXTENDED:
            _check_extended(blob, at, size, file)
        elif kind not in _REGULAR or name in members or len(members) >= _MAX_MEMBERS:
            raise _refused(file, f"the member `{name}` is no plain file, or comes twice")
        else:
            members[name] = (at, size)
        at += -(-size // _BLOCK) * _BLOCK
    return members


def _header(head: bytes, file: str, at: int) -> tuple[str, int, bytes]:
    """Name, size and kind that a header says, whose checksum must be right."""
    summed = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    digits, size = head[148:156].strip(b"\0 "), head[124:136].strip(b"\0 ")
    try:
        if int(digits, 8) != summed or b"_" in size or int(size, 8) < 0:
            raise ValueError
        name = head[:100].split(b"\0", 1)[0].decode("utf-8")
    except ValueError:
        raise _refused(file, "a header of its members is damaged", f"at byte {at:,}") from None
    return name.removeprefix("./"), int(size, 8), head[156:157]


def _check_extended(blob: Blob, at: int, size: int, file: str) -> None:
    if size > _MAX_EXTENDED:
        raise _refused(file, "a member has more attributes than a tar needs")
    data = bytearray(size)
    blob.read_into(at, memoryview(data))
    if b" path=" in data or b" size=" in data or b" GNU.sparse" in data:
        raise _refused(file, "a member has two names or two sizes")


def _refused(file: str, fact: str, *evidence: str) -> SourceError:
    hint = "it is damaged or was made to mislead; get the file again or elsewhere"
    return SourceError(Problem(f"the tar archive cannot be trusted: {fact}", Place(file), evidence, hint))
