"""What can go wrong, as data: a fact, its place, the evidence and one hint."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

_LONGEST = 4000  # characters of a fact; a hostile file's names may have millions
_MOST_EVIDENCE = 50  # lines of a problem; a lock may differ in thousands
_LONGEST_WORD = 100  # characters of a word that others are likened to
_LIKELY = 10  # words that are looked at closely
_NEAR = 0.6  # of 1: how much two words must have in common


class ExitCode(IntEnum):
    """What the process says to its caller."""

    DONE = 0
    NO = 1  # the answer is no: a difference, a broken file
    USAGE = 2
    RECIPE = 3
    LOCK = 4
    FETCH = 5
    SOURCE = 6  # a source is refused, or is not what was pinned
    MISMATCH = 7  # an output or an expectation is missed, or cannot be written
    UNREPRODUCIBLE = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fact was seen; lines and columns count from 1.

    `text` is the line itself, less its first `cut` characters and those that are too far from the place.
    """

    path: str
    line: int | None = None
    column: int | None = None
    width: int = 1
    text: str | None = None
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One fact for a person: what, where, which values show it, and one thing to do."""

    fact: str
    place: Place | None = None
    evidence: tuple[str, ...] = ()
    hint: str | None = None

    def renamed(self, rename: Callable[[str], str]) -> Problem:
        """The same, with all of its words as `rename` has them."""
        return Problem(
            rename(self.fact),
            self.place and replace(self.place, path=rename(self.place.path)),
            tuple(map(rename, self.evidence)),
            self.hint and rename(self.hint),
        )


class CkptError(Exception):
    """Base of every error meant for a person; holds one or more problems."""

    exit_code = ExitCode.NO

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        """The problems in full, as a person reads them."""
        return "\n\n".join(render(p).removeprefix("error: ") for p in self.problems)


class UsageError(CkptError):
    """The command line asks for something that is not there."""

    exit_code = ExitCode.USAGE


class RecipeError(CkptError):
    """The recipe is invalid; all its problems come in one go."""

    exit_code = ExitCode.RECIPE


class CatalogError(CkptError):
    """A catalog file is invalid."""

    exit_code = ExitCode.USAGE


class LockError(CkptError):
    """The lock is missing, unreadable or stale."""

    exit_code = ExitCode.LOCK


class FetchError(CkptError):
    """A source could not be had from anywhere."""

    exit_code = ExitCode.FETCH


class MissingError(FetchError):
    """A source is not on this machine, and there is no address to have it from."""


class SourceError(CkptError):
    """A file is refused, is unreadable or is not what was pinned."""

    exit_code = ExitCode.SOURCE


class OutputError(CkptError):
    """An output cannot be written, or an expectation about it is missed."""

    exit_code = ExitCode.MISMATCH


class UnreproducibleError(CkptError):
    """Building again gave other bytes."""

    exit_code = ExitCode.UNREPRODUCIBLE


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when none is near."""
    if len(word) > _LONGEST_WORD:
        return None
    known = {w.casefold(): w for w in sorted(words, reverse=True) if len(w) <= _LONGEST_WORD}
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(word.casefold())
    likely: list[tuple[float, str]] = []
    for other in known:
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() >= _NEAR and (most := matcher.quick_ratio()) >= _NEAR:
            likely.append((most, other))
    # The quick ratio is never less than the ratio, which may take the cube of a word's length to find out.
    best: tuple[float, str] = (_NEAR, "")
    for most, other in heapq.nlargest(_LIKELY, likely):
        if most < best[0]:
            break
        matcher.set_seq1(other)
        best = max(best, (matcher.ratio(), other))
    return known.get(best[1])


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """The hint that names the nearest known word, or None."""
    near = nearest(word, words)
    return f"did you mean `{near}`?" if near else None


def printable(text: str) -> str:
    """`text` with control, bidirectional and other unprintable characters escaped.

    Names come from strangers' files: what they hold must not drive a terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def clipped(text: str, limit: int = 500) -> str:
    """At most `limit` characters of `text`, and its length when there are more."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def shown(text: str) -> str:
    """What a person is shown of a stranger's text: `printable`, and cut where nobody would read on."""
    return printable(clipped(text, _LONGEST))


def problem_data(problem: Problem) -> dict[str, Any]:
    """A problem as plain values, for programs: its text is as it is, not escaped."""
    at = problem.place
    place = {"path": at.path, "line": at.line, "column": at.column} if at is not None else None
    return {"fact": problem.fact, "place": place, "evidence": list(problem.evidence), "hint": problem.hint}


def render(problem: Problem, severity: str = "error", width: int | None = None) -> str:
    """The text of a problem as a person reads it, without a trailing newline.

    Of a line that is quoted no more is shown than `width` columns hold.
    """
    lines = [f"{severity}: {shown(problem.fact)}"]
    place = problem.place
    if place is not None:
        where = shown(place.path)
        if place.line is not None:
            where += f":{place.line}" + (f":{place.column}" if place.column is not None else "")
        lines.append(f"  --> {where}")
        if place.line is not None and place.text is not None:
            lines += _quoted(place, place.line, place.text, width)
    lines += [f"   = {shown(e)}" for e in problem.evidence[:_MOST_EVIDENCE]]
    if len(problem.evidence) > _MOST_EVIDENCE:
        lines.append(f"   … and {len(problem.evidence) - _MOST_EVIDENCE:,} more")
    if problem.hint:
        lines.append(f"hint: {shown(problem.hint)}")
    return "\n".join(lines)


def _quoted(place: Place, line: int, text: str, width: int | None) -> list[str]:
    """The line of a place, and carets below what is meant."""
    gutter = " " * len(str(line))
    text, at, marks = text.replace("\t", " "), (place.column or 1) - 1 - place.cut, max(1, place.width)
    room = max(10, width - len(gutter) - 3) if width is not None else len(text)
    first = max(0, min(at - room // 4, len(text) - room)) if at >= room - marks else 0
    lines = [f"{gutter} |", f"{line} | {printable(text[first : first + room])}"]
    if place.column is not None:
        lines.append(f"{gutter} | {' ' * (at - first)}{'^' * max(1, min(marks, room - at + first))}")
    return lines
