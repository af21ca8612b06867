"""What a page on a terminal is made of: columns, lines broken at spaces, widths in cells, styles."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

LABEL = 11  # columns of the labels at the left

_CODE = re.compile(r"\x1b\[[0-9;]*m")
_WORD = re.compile(r"(?:\x1b\[[0-9;]*m)* *[^ ]+")
_HEAD = re.compile(r" *(?:[=✗!≠] |-->  ?|[a-z]+: )?")  # behind which the rest of a line hangs
_QUOTED = re.compile(r" *\d* \|")  # a line of a file, under which carets point
_LEAST = 24  # cells of a last column that what follows can hang below


class Style:
    """Escape codes of a terminal, or none of them. Nothing is meant by colour alone."""

    def __init__(self, color: bool) -> None:
        self._color = color

    def __call__(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text else text

    def strong(self, text: str) -> str:
        return self("1", text)

    def dim(self, text: str) -> str:
        return self("2", text)

    def good(self, text: str) -> str:
        return self("1;32", text)

    def bad(self, text: str) -> str:
        return self("1;31", text)

    def caution(self, text: str) -> str:
        return self("33", text)

    def words(self, text: str) -> str:
        """The same with the words coloured that begin its lines and say what they are."""
        codes = {**_MESSAGES, **_STATES}
        return _FIRST.sub(lambda m: self(codes[m[0]], m[0]), text)


_MESSAGES = {"error": "1;31", "warning": "1;33", "note": "1", "hint": "1;36"}
_STATES = {
    **dict.fromkeys(("written", "made", "verified", "copied", "pruned", "moved"), "1;32"),
    **dict.fromkeys(("failed", "refused"), "1;31"),
}
_FIRST = re.compile(rf"^(?:(?:{'|'.join(_MESSAGES)})(?=: )|(?:{'|'.join(_STATES)})(?=  ))", re.MULTILINE)


@lru_cache(1024)
def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cells(text: str) -> int:
    """How many cells of a terminal a line takes: wide characters two, combining ones and colours none."""
    plain = _CODE.sub("", text) if "\x1b" in text else text
    return len(plain) if plain.isascii() else sum(map(_width, plain))


def pad(text: str, width: int, *, right: bool = False) -> str:
    """`text` with spaces up to `width` cells, at its `right` side."""
    room = " " * (width - cells(text))
    return room + text if right else text + room


def columns(rows: Iterable[Sequence[str]], right: Collection[int] = (), *, indent: int = 0) -> list[str]:
    """Rows as lines, their cells below each other; those of the columns `right` end at one place."""
    table = list(rows)
    widths = [max(map(cells, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = (pad(c, w, right=n in right) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append((" " * indent + "  ".join(padded)).rstrip())
    return lines


def clip(text: str, width: int) -> str:
    """As much of a plain line as `width` cells hold."""
    while cells(text) > width:
        text = text[:-1]
    return text


def fold(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` cells, broken at spaces alone; None: as it is.

    What does not fit hangs below the last column of its line, or what it is indented by. A word that is
    longer than a line is left whole; so is a line of a file that is quoted.
    """
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _folded(line, width))


def _folded(line: str, width: int) -> list[str]:
    if cells(line) <= width or _QUOTED.match(line):
        return [line]
    words = _WORD.findall(line)
    hang, below = _hang(words, width)
    lines, current = [], ""
    for number, word in enumerate(words):
        if current.strip() and (number == below or cells(current + word) > width):
            lines.append(current)
            current = " " * hang + word.lstrip(" ")
        else:
            current += word
    return [*lines, current]


def _hang(words: list[str], width: int) -> tuple[int, int | None]:
    """The cells before what follows a line that is broken, and the word that does so in any case."""
    plain = _CODE.sub("", words[0])
    lead = len(plain) - len(plain.lstrip(" "))
    last = max((n for n, word in enumerate(words) if n and word.startswith("  ")), default=None)
    if last is None:
        head = _HEAD.match(_CODE.sub("", "".join(words)))
        return min(len(head[0]) if head is not None else lead, width // 4), None
    column = cells("".join(words[:last])) + len(words[last]) - len(words[last].lstrip(" "))
    longest = max(cells(word.lstrip(" ")) for word in words[last:])
    fits = width - column >= max(_LEAST, longest)
    return (column, None) if fits else (min(lead + 2, width // 4), last)
