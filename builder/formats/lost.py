"""Weights that are zeros, and where in their files: what a download has lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from builder.base.errors import Problem
from builder.base.words import counted, listed
from builder.formats.blob import BlobTensor, FileBlob
from builder.tensors.cast import Cast
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.moves import Reshaped
from builder.tensors.zeros import Stretch

LONG = 1 << 14  # bytes of zeros in a row that weights do not have by chance
_BEGINNING = 4096  # bytes that tell whether a stretch is one in the source as well
_TOLD = 3  # stretches in a message
_WEIGHTS = {DType.I8, DType.U8}  # beside the floating types

Place = tuple[str, int]  # a file, and a position in it


@dataclass(frozen=True)
class Lost:
    """A stretch of zeros where weights should be, `length` bytes from `offset` of `file` on.

    `tensors` are those that it reaches into, in the order of the file; `wholly` those that are zeros
    throughout. `file` and `offset` are None where the tensor does not lie in a file as it is.
    """

    file: str | None
    offset: int | None
    length: int
    tensors: tuple[str, ...]
    wholly: tuple[str, ...]


def find_lost(
    tensors: Mapping[str, LazyTensor],
    zeros: Mapping[str, tuple[Stretch, ...]],
    written: Callable[[str], Place] | None = None,
) -> tuple[Lost, ...]:
    """The stretches of zeros in which a matrix of weights lies, or which are long; in the order of the file.

    `zeros` are those of a pass over the tensors. What was computed lies where `written` says that it was
    written to.
    """
    pieces = [
        _Piece(name, *place, stretch == (0, tensors[name].nbytes))
        for name, found in zeros.items()
        for stretch in found
        if (place := _place(name, tensors[name], stretch, written)) is not None
    ]
    return tuple(lost for lost in _joined(pieces) if lost.length >= LONG or _matrices(lost, tensors))


def problem_of(found: Iterable[Lost]) -> Problem | None:
    """What is lost, in words; None where nothing is."""
    lost = tuple(found)
    if not lost:
        return None
    names = dict.fromkeys(n for each in lost for n in each.tensors)
    wholly = {n for each in lost for n in each.wholly}
    kinds = [f"{counted(len(wholly), 'tensor')} wholly"] * bool(wholly)
    kinds += [f"{len(names) - len(wholly):,} in part"] * (len(names) > len(wholly))
    more = counted(len(lost) - _TOLD, "more such run")
    return Problem(
        f"zeros where weights should be: {' and '.join(kinds)}",
        evidence=(*map(_line, lost[:_TOLD]), *([more] if len(lost) > _TOLD else [])),
        hint="unless they were never trained, a download has lost them: compare the SHA-256 with the "
        "publisher's, and get it again",
    )


def _line(lost: Lost) -> str:
    where = "" if lost.offset is None else f" from byte {lost.offset:,} of `{lost.file}` on"
    return f"{lost.length:,} bytes{where}: {listed(lost.tensors, 2)}"


@dataclass(frozen=True)
class _Piece:
    """A stretch of one tensor, and where it lies in a file; `file` is None where that is unknown."""

    name: str
    file: str | None
    offset: int
    length: int
    whole: bool


def _place(
    name: str, tensor: LazyTensor, stretch: Stretch, written: Callable[[str], Place] | None
) -> tuple[str | None, int, int] | None:
    """The file in which a stretch of a tensor lies, from where on, and how long; None where it is none."""
    start, length = stretch[0], stretch[1] - stretch[0]
    while isinstance(tensor, Cast | Reshaped):
        itemsize, tensor = tensor.dtype.itemsize, tensor.source
        start, length = (at // itemsize * tensor.dtype.itemsize for at in (start, length))
        beginning = bytearray(min(length, _BEGINNING // tensor.dtype.itemsize * tensor.dtype.itemsize))
        tensor.read_into(start, memoryview(beginning))
        if any(beginning):  # rounding made it zeros, from numbers that are too small
            return None
    if isinstance(tensor, BlobTensor) and isinstance(tensor.blob, FileBlob):
        return tensor.blob.name, tensor.offset + start, length
    file, offset = written(name) if written is not None else (None, 0)
    return file, offset + stretch[0], stretch[1] - stretch[0]


def _joined(pieces: Iterable[_Piece]) -> Iterator[Lost]:
    """Pieces that lie side by side in a file, as one."""
    at: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.file or "", p.offset)):
        if at and (piece.file is None or (at[-1].file, _end(at[-1])) != (piece.file, piece.offset)):
            yield _lost(at)
            at = []
        at.append(piece)
    if at:
        yield _lost(at)


def _end(piece: _Piece) -> int:
    return piece.offset + piece.length


def _lost(pieces: list[_Piece]) -> Lost:
    first, file = pieces[0], pieces[0].file
    return Lost(
        file,
        None if file is None else first.offset,
        sum(p.length for p in pieces),
        tuple(p.name for p in pieces),
        tuple(p.name for p in pieces if p.whole),
    )


def _matrices(lost: Lost, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a matrix of weights is zeros throughout: vectors often are, such as biases."""
    found = (tensors[n] for n in lost.wholly)
    return any(len(t.shape) > 1 and t.numel > 1 and (t.dtype.floating or t.dtype in _WEIGHTS) for t in found)
