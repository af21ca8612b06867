"""TOML with places: what a document says, and where it says it."""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from builder.base.errors import CkptError, Place, Problem
from builder.base.files import read_text

MAX_SIZE = 1 << 20  # bytes; what people write by hand, and tables made for them, are far smaller
MAX_DEPTH = 32  # of arrays and tables in each other
MAX_VALUES = 100_000  # keys and elements; each is remembered with its place where a message needs one
_MOST_MARKS = 200_000  # of keys and tables; the parser takes a kilobyte for each that there may be
_MOST_DOTTED = 40_000_000  # references, a half of which it may keep; reached by six thousand dots in a line
_MOST_BITS = 4096  # of an integer; Python refuses to spell those of three times as many
_LONGEST_LINE = 200  # characters of a line that a message shows

Keys = tuple[str | int, ...]
Span = tuple[int, int]

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_SCALAR = re.compile(
    r'"""(?:\\.|"{1,2}(?!")|[^"\\])*"{3,5}'
    r"|'''(?:'{1,2}(?!')|[^'])*'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|[^\s,\]}#]+(?: \d[^\s,\]}#]*)?",  # the second part: a date and a time with a space between
    re.DOTALL,
)


@dataclass(frozen=True)
class Document:
    """A parsed TOML document: `data` as plain Python values, `path` and `text` for messages."""

    path: str
    text: str
    data: dict[str, Any]

    def place(self, *keys: str | int, value: bool = False) -> Place:
        """Where a key stands, or its value; a string is a key, a number an index into an array.

        An element of an array, or a table under its heading, is its own key and value. Of what is not
        written, the place is that of the nearest thing above it that is.
        """
        spans = self._spans.values if value else self._spans.keys
        while keys not in spans:
            if not keys:
                return Place(self.path)
            keys = keys[:-1]
        return self.at(*spans[keys])

    def at(self, start: int, end: int) -> Place:
        """The place of the characters from `start` up to `end`, cut to the first line of them."""
        index = bisect_right(self._line_starts, start) - 1
        first = self._line_starts[index]
        stop = self.text.find("\n", first)
        stop = len(self.text) if stop < 0 else stop
        width = max(1, min(end, stop) - start)
        # Of a long line, what is around the place: a hundred problems may be in one line of a megabyte.
        cut = 0 if stop - first <= _LONGEST_LINE else max(0, start - first - _LONGEST_LINE // 4)
        line = self.text[first + cut : min(stop, first + cut + _LONGEST_LINE)]
        return Place(self.path, index + 1, start - first + 1, min(width, _LONGEST_LINE), line, cut)

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(m.end() for m in re.finditer("\n", self.text))]

    @cached_property
    def _spans(self) -> _Spans:
        return _Spans(self.text)


def parse(text: str, path: str, error: type[CkptError]) -> Document:
    """Parse a TOML document; `path` is its name in messages.

    Raises `error` with the place where the syntax is wrong.
    """
    text = text.replace("\r\n", "\n")
    if sum(map(text.count, ".=[{")) > _MOST_MARKS or _dotted(text) > _MOST_DOTTED:
        raise error(Problem(f"it has more than {MAX_VALUES:,} keys and values", Place(path)))
    try:
        document = Document(path, text, tomli.loads(text))
    except tomli.TOMLDecodeError as wrong:
        draft = Document(path, text, {})
        fact = re.sub("'([^'\n]+)'", r"`\1`", wrong.msg[:1].lower() + wrong.msg[1:])
        if fact == r"illegal character `\n`":
            fact = "the line ends inside a string"
        start = min(wrong.pos, len(text.rstrip()))
        span = (start, start + 1)
        if fact.startswith(("cannot overwrite", "cannot declare", "cannot mutate")):
            # The parser stands behind the statement by now: point at its key.
            found = _Spans(text[: wrong.pos], keep=False).statement
            if found is not None:
                names, span = found
                fact = f"`{'.'.join(names)}` is given twice"
        raise error(Problem(fact, draft.at(*span))) from None
    except RecursionError:
        raise error(Problem("arrays or tables are nested too deeply", Place(path))) from None
    except ValueError:  # of an integer longer than Python reads
        raise error(Problem("a number has too many digits", Place(path))) from None
    _bound(document, error)
    return document


def _dotted(text: str) -> int:
    """How much the parser may remember of dotted keys: for each part, all the parts before it."""
    return sum(line.count(".") ** 2 for line in text.split("\n"))


def _bound(document: Document, error: type[CkptError]) -> None:
    """Raise `error` for what would take long to look at: too much, too deep, or too large a number."""
    count, depth, level = 0, 0, [document.data]
    while level:
        count += sum(map(len, level))
        if count > MAX_VALUES:
            raise error(Problem(f"it has more than {MAX_VALUES:,} keys and values", Place(document.path)))
        if depth > MAX_DEPTH:
            raise error(Problem("arrays or tables are nested too deeply", Place(document.path)))
        below: list[Any] = []
        for inner in level:
            for value in inner.values() if isinstance(inner, dict) else inner:
                if isinstance(value, (dict, list)):
                    below.append(value)
                elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
                    raise error(Problem("a number has too many digits", Place(document.path)))
        level = below
        depth += 1


def load(path: Path, error: type[CkptError], name: str | None = None, *, limit: int = MAX_SIZE) -> Document:
    """Parse a TOML file of at most `limit` bytes, called `name` in messages (default: its path).

    Raises `error`.
    """
    name = str(path) if name is None else name
    try:
        text = read_text(path, limit, error, name)
    except FileNotFoundError as wrong:
        raise error(Problem(f"cannot read `{name}`: {str(wrong.strerror).lower()}")) from None
    return parse(text.removeprefix("\ufeff"), name, error)


class _Spans:
    """The span of every key and value of a text that is valid TOML, at least up to its last statement.

    Without `keep`, only that statement.
    """

    def __init__(self, text: str, keep: bool = True) -> None:
        self.text = text
        self._keep = keep
        self.pos = 0
        self.keys: dict[Keys, Span] = {}
        self.values: dict[Keys, Span] = {}
        self.statement: tuple[list[str], Span] | None = None
        self._lengths: dict[Keys, int] = {}  # of the arrays of tables so far
        with suppress(RecursionError):  # what was found so far still stands
            self._document()

    def _note(self, path: Keys, key: Span | None, value: Span | None) -> None:
        """Remember where a path is first written."""
        if self._keep and key is not None:
            self.keys.setdefault(path, key)
        if self._keep and value is not None:
            self.values.setdefault(path, value)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.pos)
        if found is None:
            self.pos = len(self.text)
            return ""
        self.pos = found.end()
        return found[0]

    def _take(self, token: str) -> bool:
        found = self.text.startswith(token, self.pos)
        self.pos += len(token) * found
        return found

    def _document(self) -> None:
        table: Keys = ()
        self._skip(_BLANK)
        while self.pos < len(self.text):
            if self._take("[["):
                table = self._heading(array=True)
                self._take("]]")
            elif self._take("["):
                table = self._heading(array=False)
                self._take("]")
            else:
                self._pair(table, top=True)
            self._skip(_BLANK)

    def _heading(self, array: bool) -> Keys:
        parts = self._dotted()
        path: Keys = ()
        for name, span in parts[:-1]:
            path = self._latest((*path, name))
            self._note(path, span, span)
        name, span = parts[-1]
        path = (*path, name)
        if array:
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            self._note(path, span, span)
            path = (*path, index)
        if self._keep:
            self.keys[path] = self.values[path] = span
        return path

    def _latest(self, path: Keys) -> Keys:
        return (*path, self._lengths[path] - 1) if path in self._lengths else path

    def _dotted(self) -> list[tuple[str, Span]]:
        parts: list[tuple[str, Span]] = []
        while not parts or self._take("."):
            self._skip(_SPACE)
            start = self.pos
            raw = self._skip(_KEY)
            parts.append((_unquote(raw), (start, self.pos)))
            self._skip(_SPACE)
        self.statement = [name for name, _ in parts], (parts[0][1][0], parts[-1][1][1])
        return parts

    def _pair(self, table: Keys, top: bool = False) -> None:
        path = table
        parts = self._dotted()
        statement = self.statement
        for name, span in parts:
            path = (*path, name)
            self._note(path, span, None)
        self._skip(_SPACE)
        self._take("=")
        self._skip(_SPACE)
        span = self._value(path)
        for depth in range(len(table) + 1, len(path) + 1):
            self._note(path[:depth], None, span)
        if top:
            self.statement = statement

    def _value(self, path: Keys) -> Span:
        start = self.pos
        if self._take("["):
            index = 0
            while not self._closed("]"):
                item = (*path, index)
                span = self._value(item)
                self._note(item, span, span)
                index += 1
        elif self._take("{"):
            while not self._closed("}"):
                self._pair(path)
        else:
            self._skip(_SCALAR)
        return start, self.pos

    def _closed(self, bracket: str) -> bool:
        self._skip(_BLANK)
        if self._take(","):
            self._skip(_BLANK)
        return self._take(bracket) or self.pos >= len(self.text)


def _unquote(raw: str) -> str:
    if raw[:1] == '"' and "\\" in raw:
        try:
            return str(tomli.loads(f"key = {raw}")["key"])
        except tomli.TOMLDecodeError:
            return raw
    return raw[1:-1] if raw[:1] in {'"', "'"} else raw


def escaped(text: str) -> str:
    """A TOML document with what does not print written as `\\u` and digits; it means the same.

    Names come from strangers' files, and a document that is written may be shown on a terminal.
    """
    return "".join(c if c.isprintable() or c == "\n" else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
