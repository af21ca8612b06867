"""The brace language of names: `{a,b}` and `{0..11}` stand for each of their alternatives."""

from __future__ import annotations

import re
from itertools import product

LIMIT = 100_000  # names that one pattern may stand for
_MOST_CHARACTERS = 16 << 20  # of all those names
_DEEPEST = 8  # braces in each other

_TOKEN = re.compile(r"\\.|[{},\\]|[^{},\\]+", re.DOTALL)
_RANGE = re.compile(r"(0|[1-9]\d{0,8})\.\.(0|[1-9]\d{0,8})")


class BraceError(ValueError):
    """A pattern is wrong; says how."""


def expand(pattern: str) -> tuple[list[str], int]:
    """The names a pattern stands for, in order, and the number of alternatives of its last brace.

    `a.{b,c{0..2}}` is a.b, a.c0, a.c1, a.c2 and 4; without a brace the number is 1. Braces nest, an
    alternative that reads `n..m` is a range, and a backslash takes its meaning from `{`, `}`, `,` and
    itself. The last brace varies fastest. Raises BraceError.
    """
    if "{" not in pattern and "\\" not in pattern and "}" not in pattern:
        return [pattern], 1
    parts, braces = _sequence(_TOKEN.findall(pattern)[::-1], 0)
    return _joined(parts), len(parts[braces[-1]]) if braces else 1


def beginnings(pattern: str) -> set[str]:
    """What the names that a pattern stands for have before their first dots. Raises BraceError."""
    depth = at = 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "{") - (token == "}")
        if not depth and "." in token:
            pattern = pattern[: at + token.index(".")]
            break
        at += len(token)
    return {name.partition(".")[0] for name in expand(pattern)[0]}


def escape(name: str) -> str:
    """The pattern that stands for exactly this name."""
    return re.sub(r"[{},\\]", r"\\\g<0>", name)


def _joined(parts: list[list[str]]) -> list[str]:
    count = 1
    for part in parts:
        count *= len(part)
        if count > LIMIT:
            raise BraceError(f"stands for more than {LIMIT} names")
    if count * sum(max(map(len, part)) for part in parts) > _MOST_CHARACTERS:
        raise BraceError(f"stands for names of more than {_MOST_CHARACTERS} characters")
    return ["".join(choice) for choice in product(*parts)]


def _sequence(tokens: list[str], depth: int) -> tuple[list[list[str]], list[int]]:
    """The alternatives of each part, and which of the parts are braces; takes tokens from the end."""
    if depth > _DEEPEST:
        raise BraceError("braces are nested too deeply")
    parts: list[list[str]] = []
    braces: list[int] = []
    while tokens and not (depth and tokens[-1] in {",", "}"}):
        token = tokens.pop()
        if token == "{":
            braces.append(len(parts))
            parts.append(_alternatives(tokens, depth + 1))
        elif token == "}":
            raise BraceError("`}` without its `{`")
        elif token == "\\":
            raise BraceError("ends in a backslash")
        else:
            parts.append([token[1:] if token[0] == "\\" else token])
    return parts, braces


def _alternatives(tokens: list[str], depth: int) -> list[str]:
    """The alternatives up to the closing brace."""
    found: list[str] = []
    ranged = False
    while True:
        alone = tokens[-2:-1] in ([","], ["}"])
        span = _RANGE.fullmatch(tokens[-1]) if alone else None
        if span:
            tokens.pop()
            first, last = int(span[1]), int(span[2])
            if not first <= last < first + LIMIT:
                raise BraceError(f"`{span[0]}` is not a range")
            found += map(str, range(first, last + 1))
            ranged = True
        else:
            found += _joined(_sequence(tokens, depth)[0])
        if len(found) > LIMIT:
            raise BraceError(f"stands for more than {LIMIT} names")
        if not tokens:
            raise BraceError("`{` without its `}`")
        if tokens.pop() == "}":
            break
    if len(found) < 2 and not ranged:
        raise BraceError("a brace needs two alternatives or a range")
    return found
