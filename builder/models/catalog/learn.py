"""Writing a table: the tensors of a component, compressed into braces and headings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from builder.base.braces import escape
from builder.base.errors import CatalogError, Problem
from builder.models.catalog.components import parse_table
from builder.models.catalog.tables import TensorRule, elements

ROWS = 12  # keys under one heading, beyond which its parts get headings of their own
PAIRS = 4  # tensors of a module that share a line, such as a weight and its bias

Words = tuple[str, ...]


class _Row(NamedTuple):
    """One key of a table: the alternatives of each word and separator of the names it stands for, and a
    rule, or one for each alternative of the last word."""

    parts: tuple[Words, ...]
    rules: tuple[TensorRule, ...]

    @property
    def path(self) -> Words:
        """The patterns between the dots of the names."""
        patterns = [escape(words[0]) if len(words) == 1 else _brace(words) for words in self.parts]
        dots = [-1, *(i for i, words in enumerate(self.parts) if words == (".",)), len(patterns)]
        return tuple("".join(patterns[a + 1 : b]) for a, b in pairwise(dots))


def _value(rules: Sequence[TensorRule]) -> str:
    if len(rules) > 1:
        return str([list(rule.shape) for rule in rules])
    [rule] = rules
    shape = str(list(rule.shape))
    more = f', dtype = "{rule.dtype}"' * (rule.dtype is not None) + ", optional = true" * rule.optional
    return f"{{ shape = {shape}{more} }}" if more else shape


def compress(tensors: Mapping[str, TensorRule], **fields: str) -> str:
    """The TOML table that expands to exactly these tensors; `fields` are its name, class and so on.

    Numbered and parallel parts become braces, modules of many tensors headings. Raises CatalogError for
    a text that TOML has no way to write, one with half a surrogate pair, and for a name that is no word.
    """
    for name in (*fields.values(), *tensors):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise CatalogError(Problem(f"`{name}` is not Unicode text and cannot be written in TOML"))
    rows = fold(tensors)
    counts = [f"keys = {len(tensors):_}"]
    if (total := elements(tensors.values())) is not None:
        counts.append(f"parameters = {total:_}")
    head = [*(f"{key} = {string(value)}" for key, value in fields.items()), *counts]
    flat = [(".".join(path), value) for path, value in rows]
    plain = [(escape(name), _value([rule])) for name, rule in tensors.items()]
    # A heading may take another meaning than the name it stems from, and braces may become too many.
    for sections in (_sections(rows, 0), [("", flat)], [("", plain)]):
        text = "\n".join([*head, *_body(sections)]) + "\n"
        if _expands_to(text, tensors):
            return text
    parse_table(text, "table.toml")
    raise AssertionError("a table without headings and braces expands to what it was made of")


def fold(tensors: Mapping[str, TensorRule]) -> list[tuple[Words, str]]:
    """The tensors as a few lines in the natural order: names in braces, parted at their dots, and shapes."""
    rows = _merge(_merge(_modules(tensors), "[0-9]+"), ".*")  # numbers first: they repeat whole modules
    rows.sort(key=lambda row: [_natural(part[0]) for part in row.parts])
    return [(row.path, _value(row.rules)) for row in rows]


def _modules(tensors: Mapping[str, TensorRule]) -> list[_Row]:
    """A row for each module: the tensors whose names differ in the last word only."""
    modules: dict[tuple[Words, ...], dict[str, TensorRule]] = {}
    for name, rule in tensors.items():
        *stem, last = re.split("([._])", name)
        modules.setdefault(tuple((part,) for part in stem), {})[last] = rule
    rows = []
    for parts, members in modules.items():
        words = tuple(sorted(members, key=_natural))
        rules = tuple(members[word] for word in words)
        if len(set(rules)) == 1:
            rows.append(_Row((*parts, words), rules[:1]))
        elif len(words) <= PAIRS and all(rule == TensorRule(rule.shape) for rule in rules):
            rows.append(_Row((*parts, words), rules))
        else:
            rows += [_Row((*parts, (word,)), (rule,)) for word, rule in zip(words, rules, strict=True)]
    return rows


def _merge(rows: list[_Row], kind: str) -> list[_Row]:
    """Join rows that differ in the alternatives of a single word, which are of a kind, until none do."""
    match = re.compile(kind, re.DOTALL).fullmatch
    while True:
        before = len(rows)
        deepest = max((len(row.parts) for row in rows), default=0)
        for at in range(0, deepest, 2)[::-1]:
            groups: dict[Any, list[_Row]] = {}
            for row in rows:
                if len(row.parts) <= at or not all(map(match, row.parts[at])):
                    groups[row] = [row]
                    continue
                pairs = len(row.parts) == at + 1 and len(row.rules) > 1  # its shapes are of these very words
                rest = (row.parts[:at], row.parts[at + 1 :], row.rules, pairs and row.parts[at])
                groups.setdefault(rest, []).append(row)
            rows = [_joined(group, at) if len(group) > 1 else group[0] for group in groups.values()]
        if len(rows) == before:
            return rows


def _joined(group: list[_Row], at: int) -> _Row:
    words = sorted((word for row in group for word in row.parts[at]), key=_natural)
    first = group[0]
    return _Row((*first.parts[:at], tuple(words), *first.parts[at + 1 :]), first.rules)


def _natural(word: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2 before 10, and a weight before its bias."""
    if word == "weight":
        return [(0, 0, "")]
    pieces = re.findall(r"\d+|\D+", word)
    return [(1, int(p), p) if p.isascii() and p.isdigit() and len(p) < 10 else (2, 0, p) for p in pieces]


def _sections(rows: list[tuple[Words, str]], depth: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The headings and the lines under each; a module of many lines gets a heading of its own."""
    groups: dict[Words, list[tuple[Words, str]]] = {}
    for row in rows:
        groups.setdefault(row[0][: depth + 1], []).append(row)
    own: list[tuple[Words, str]] = []
    inner: list[list[tuple[Words, str]]] = []
    for members in groups.values():
        deep = all(len(path) > depth + 1 for path, _ in members)
        large = len(members) > 2 and (depth == 0 or len(rows) > ROWS)
        if deep and large:
            inner.append(members)
        else:
            own += members
    if own:
        yield ".".join(own[0][0][:depth]), [(".".join(path[depth:]), value) for path, value in own]
    for members in inner:
        paths = [path for path, _ in members]
        common = depth + 1
        while len({path[: common + 1] for path in paths}) == 1 and min(map(len, paths)) > common + 1:
            common += 1
        yield from _sections(members, common)


def _body(sections: Iterable[tuple[str, list[tuple[str, str]]]]) -> Iterator[str]:
    for heading, rows in sections:
        yield ""
        bare = re.fullmatch("[A-Za-z0-9_-]+", heading)
        yield f"[tensors.{heading if bare else string(heading)}]" if heading else "[tensors]"
        for key, value in rows:
            yield f"{string(key)} = {value}"


def string(text: str) -> str:
    """A TOML string in which all that does not print is escaped: it may go to a terminal."""
    return '"' + "".join(_character(c) for c in text) + '"'


def _character(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    return c if c.isprintable() else f"\\U{ord(c):08x}"


def _brace(words: Words) -> str:
    """One brace for these words, with what they have in common outside of it."""
    head, tail = _common(words)
    inner = [word[len(head) : len(word) - len(tail)] for word in words]
    found: list[str] = []
    for _, group in groupby(enumerate(inner), key=lambda pair: _run(*pair)):
        run = [word for _, word in group]
        found += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(escape, run)
    return f"{escape(head)}{{{','.join(found)}}}{escape(tail)}"


def _run(index: int, word: str) -> int | str:
    """The same for numbers that follow each other."""
    return int(word) - index if re.fullmatch("0|[1-9][0-9]{0,8}", word) else word


def _common(words: Words) -> tuple[str, str]:
    """What all words begin with, up to a number, and what they end with, from a number on."""
    head = re.sub("[0-9]+$", "", _prefix(words))
    rest = [word[len(head) :] for word in words]
    if not all(word[:1].isdigit() for word in rest):
        return "", ""
    return head, re.sub("^[0-9]+", "", _prefix([word[::-1] for word in rest])[::-1])


def _prefix(words: Sequence[str]) -> str:
    first, last = min(words), max(words)
    return first[: next((i for i, c in enumerate(first) if c != last[i]), len(first))]


def _expands_to(text: str, tensors: Mapping[str, TensorRule]) -> bool:
    try:
        return parse_table(text, "table.toml").expand({}) == dict(tensors)
    except CatalogError:
        return False
