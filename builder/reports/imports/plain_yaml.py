"""The plain part of YAML that people write configurations in: mappings, lists, words and numbers."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from builder.base.errors import Place, Problem, SourceError

_LARGEST = 1 << 16  # characters; people write a page
_DEEPEST = 40
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


class _Line(NamedTuple):
    number: int
    indent: int
    text: str


def parse(text: str, name: str) -> Any:
    """The value of a text; raises SourceError, with the line, for what is none or is other YAML.

    Tags, anchors, blocks of text and several documents are no part of this.
    """
    return _Parser(text, name).document()


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self.name, self.at = name, 0
        self.lines: list[_Line] = []
        if len(text) > _LARGEST:
            raise self.wrong(f"it has {len(text):,} characters, more than {_LARGEST:,}", 1)
        for number, raw in enumerate(text.splitlines(), 1):
            bare = _uncommented(raw)
            if bare.strip() and not (bare == "---" and not self.lines):
                indent = len(bare) - len(bare.lstrip(" "))
                if bare[indent] == "\t":
                    raise self.wrong("a tab indents it", number)
                self.lines.append(_Line(number, indent, bare.strip()))

    def wrong(self, why: str, number: int) -> SourceError:
        return SourceError(Problem("no plain YAML", Place(self.name, number), (why,)))

    def document(self) -> Any:
        if not self.lines:
            raise self.wrong("there is nothing in it", 1)
        value = self.block(self.lines[0].indent, 0)
        if self.at < len(self.lines):
            raise self.wrong("it belongs to nothing above", self.lines[self.at].number)
        return value

    def block(self, indent: int, depth: int) -> Any:
        """What is written from here on at this depth or deeper."""
        line = self.lines[self.at]
        if depth > _DEEPEST:
            raise self.wrong("it is nested too deeply", line.number)
        if line.text == "-" or line.text.startswith("- "):
            return self.sequence(indent, depth)
        if _split(line.text) is not None:
            return self.mapping(indent, depth)
        self.at += 1
        return self.scalar(line.text, line.number)

    def sequence(self, indent: int, depth: int) -> list[Any]:
        found = []
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.indent != indent or not (line.text == "-" or line.text.startswith("- ")):
                break
            rest = line.text[1:].lstrip()
            if rest:
                # What stands behind the dash is a block of its own, as deep as it begins.
                inner = indent + len(line.text) - len(rest)
                self.lines[self.at] = _Line(line.number, inner, rest)
                found.append(self.block(inner, depth + 1))
            else:
                self.at += 1
                found.append(self.below(indent, depth))
        return found

    def mapping(self, indent: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.at < len(self.lines) and self.lines[self.at].indent == indent:
            line = self.lines[self.at]
            parts = _split(line.text)
            if parts is None:
                raise self.wrong("a key and a colon are expected", line.number)
            key, rest = str(self.scalar(parts[0], line.number, key=True)), parts[1]
            if key in found:
                raise self.wrong(f"`{key}` is there twice", line.number)
            self.at += 1
            found[key] = self.scalar(rest, line.number) if rest else self.below(indent, depth, lists=True)
        return found

    def below(self, indent: int, depth: int, *, lists: bool = False) -> Any:
        """The value of a key or a dash that has none on its line; a list may stand below its key."""
        if self.at < len(self.lines):
            line = self.lines[self.at]
            dashed = lists and line.indent == indent and (line.text == "-" or line.text.startswith("- "))
            if line.indent > indent or dashed:
                return self.block(line.indent, depth + 1)
        return None

    def scalar(self, text: str, number: int, *, key: bool = False) -> Any:
        """A value on one line."""
        value, rest = self.flow(text, number, 0, inside=False)
        if rest:
            raise self.wrong("something stands behind the value", number)
        return text if key and not isinstance(value, str) else value

    def flow(self, text: str, number: int, depth: int, *, inside: bool) -> tuple[Any, str]:
        """The value that a text begins with, and what is behind it."""
        if depth > _DEEPEST:
            raise self.wrong("it is nested too deeply", number)
        if text[:1] in ("[", "{"):
            return self.flow_list(text, number, depth)
        if text[:1] in ('"', "'"):
            match = _QUOTED.match(text)
            if match is None:
                raise self.wrong("a string is not closed", number)
            return self.quoted(match[0], number), text[match.end() :].lstrip()
        if text[:1] in tuple("&*!|>%@`"):
            raise self.wrong(f"`{text[:1]}` is beyond plain YAML", number)
        end = re.search(r"[,\[\]{}]|:(?=\s|$)", text) if inside else None
        word = (text[: end.start()] if end else text).strip()
        if ": " in word or word.endswith(":"):
            raise self.wrong("a value holds a colon: put it in quotes", number)
        return _plain(word), text[end.start() :] if end else ""

    def quoted(self, text: str, number: int) -> str:
        """What a string in quotes says."""
        if text[0] == "'":
            return text[1:-1].replace("''", "'")
        try:
            return str(json.loads(text))
        except ValueError:
            raise self.wrong("a string with an escape that is none", number) from None

    def flow_list(self, text: str, number: int, depth: int) -> tuple[Any, str]:
        """A list or a mapping on one line."""
        opened, closes = text[0], {"[": "]", "{": "}"}[text[0]]
        items: list[Any] = []
        pairs: dict[str, Any] = {}
        text = text[1:].lstrip()
        while not text.startswith(closes):
            value, text = self.flow(text, number, depth + 1, inside=True)
            if opened == "{":
                if not text.startswith(":"):
                    raise self.wrong("a key and a colon are expected", number)
                inner, text = self.flow(text[1:].lstrip(), number, depth + 1, inside=True)
                pairs[str(value)] = inner
            else:
                items.append(value)
            if text.startswith(","):
                text = text[1:].lstrip()
            elif not text.startswith(closes):
                raise self.wrong(f"`{closes}` is missing on the line", number)
        return (items if opened == "[" else pairs), text[1:].lstrip()


def _split(text: str) -> tuple[str, str] | None:
    """The key of a line, and what is behind its colon; None for a line that has no key."""
    if text[:1] in ('"', "'"):
        match = _QUOTED.match(text)
        rest = text[match.end() :].lstrip() if match else ""
        return (match[0], rest[1:].strip()) if match and re.match(r":(\s|$)", rest) else None
    end = text.find(": ")
    if end < 0:
        end = len(text) - 1 if text.endswith(":") else -1
    key = text[:end].strip() if end > 0 else ""
    return (key, text[end + 1 :].strip()) if key and not set(key) & set("[]{}\"',") else None


def _uncommented(line: str) -> str:
    """A line without its comment: a `#` behind a space, outside of quotes."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (at == 0 or line[at - 1] in " [{,:"):
            quote = letter
        elif letter == "#" and (at == 0 or line[at - 1] in " \t"):
            return line[:at].rstrip()
    return line.rstrip()


def _plain(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if len(word) <= 40 and _NUMBER.fullmatch(word):
        found = float(word.replace("_", ""))
        return int(found) if re.fullmatch(r"[-+]?[\d_]+", word) else found
    return word
