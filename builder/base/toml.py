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
        line = self.text[first : stop if stop >= 0 else None]
        width = max(1, min(end, first + len(line)) - start)
        return Place(self.path, index + 1, start - first + 1, width, line)

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
    try:
        return Document(path, text, tomli.loads(text))
    except tomli.TOMLDecodeError as wrong:
        draft = Document(path, text, {})
        fact = re.sub("'([^'\n]+)'", r"`\1`", wrong.msg[:1].lower() + wrong.msg[1:])
        if fact == r"illegal character `\n`":
            fact = "the line ends inside a string"
        start = min(wrong.pos, len(text.rstrip()))
        span = (start, start + 1)
        if fact.startswith(("cannot overwrite", "cannot declare", "cannot mutate")):
            # The parser stands behind the statement by now: point at its key.
            found = _Spans(text[: wrong.pos]).statement
            if found is not None:
                names, span = found
                fact = f"`{'.'.join(names)}` is given twice"
        raise error(Problem(fact, draft.at(*span))) from None
    except RecursionError:
        raise error(Problem("arrays or tables are nested too deeply", Place(path))) from None
    except ValueError:  # of an integer longer than Python reads
        raise error(Problem("a number has too many digits", Place(path))) from None


def load(path: Path, error: type[CkptError], name: str | None = None) -> Document:
    """Parse a TOML file, called `name` in messages (default: its path); raises `error`."""
    name = str(path) if name is None else name
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as wrong:
        raise error(Problem(f"cannot read `{name}`: {(wrong.strerror or str(wrong)).lower()}")) from None
    except UnicodeDecodeError as wrong:
        line = wrong.object.count(b"\n", 0, wrong.start) + 1
        byte = wrong.object[wrong.start]
        raise error(Problem("not UTF-8 text", Place(name, line), (f"byte 0x{byte:02x}",))) from None
    return parse(text.removeprefix("\ufeff"), name, error)


class _Spans:
    """The span of every key and value of a text that is valid TOML, at least up to its last statement."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.keys: dict[Keys, Span] = {}
        self.values: dict[Keys, Span] = {}
        self.statement: tuple[list[str], Span] | None = None
        self._lengths: dict[Keys, int] = {}  # of the arrays of tables so far
        with suppress(RecursionError):  # what was found so far still stands
            self._document()

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
            self.keys.setdefault(path, span)
            self.values.setdefault(path, span)
        name, span = parts[-1]
        path = (*path, name)
        if array:
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            self.keys.setdefault(path, span)
            self.values.setdefault(path, span)
            path = (*path, index)
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
            self.keys.setdefault(path, span)
        self._skip(_SPACE)
        self._take("=")
        self._skip(_SPACE)
        span = self._value(path)
        for depth in range(len(table) + 1, len(path) + 1):
            self.values.setdefault(path[:depth], span)
        if top:
            self.statement = statement

    def _value(self, path: Keys) -> Span:
        start = self.pos
        if self._take("["):
            index = 0
            while not self._closed("]"):
                item = (*path, index)
                self.keys[item] = self.values[item] = self._value(item)
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
