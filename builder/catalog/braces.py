"""The brace language of names: `{a,b}` and `{0..11}` stand for each of their alternatives."""

from __future__ import annotations

import re
from itertools import product
from math import prod

LIMIT = 100_000  # names that one pattern may stand for

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
    parts, braces, rest = _sequence(_TOKEN.findall(pattern)[::-1], nested=False)
    assert not rest
    if prod(map(len, parts)) > LIMIT:
        raise BraceError(f"stands for more than {LIMIT} names")
    return ["".join(p) for p in product(*parts)], len(parts[braces[-1]]) if braces else 1


def escape(name: str) -> str:
    """The pattern that stands for exactly this name."""
    return re.sub(r"[{},\\]", r"\\\g<0>", name)


def _sequence(tokens: list[str], nested: bool) -> tuple[list[list[str]], list[int], list[str]]:
    """Alternatives of each part, which of the parts are braces, and the tokens left (last first)."""
    parts: list[list[str]] = []
    braces: list[int] = []
    while tokens:
        token = tokens[-1]
        if nested and token in {",", "}"}:
            break
        tokens.pop()
        if token == "{":
            braces.append(len(parts))
            parts.append(_alternatives(tokens))
        elif token == "}":
            raise BraceError("`}` without its `{`")
        elif token[0] == "\\":
            if len(token) == 1:
                raise BraceError("ends in a backslash")
            parts.append([token[1]])
        else:
            parts.append([token])
    return parts, braces, tokens


def _alternatives(tokens: list[str]) -> list[str]:
    found: list[str] = []
    ranged = False
    while True:
        span = _RANGE.fullmatch(tokens[-1]) if tokens else None
        if span and tokens[-2:-1] in ([","], ["}"]):
            tokens.pop()
            first, last = int(span[1]), int(span[2])
            if last < first or last - first >= LIMIT:
                raise BraceError(f"`{span[0]}` is not a range")
            found += map(str, range(first, last + 1))
            ranged = True
        else:
            parts, _, tokens = _sequence(tokens, nested=True)
            if prod(map(len, parts)) > LIMIT:
                raise BraceError(f"stands for more than {LIMIT} names")
            found += map("".join, product(*parts))
        if not tokens:
            raise BraceError("`{` without its `}`")
        if tokens.pop() == "}":
            break
    if len(found) < 2 and not ranged:
        raise BraceError("a brace needs two alternatives or a range")
    return found
