"""What a command has to say in the forms that continuous integration reads: GitHub, SARIF, JUnit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from builder import __version__
from builder.base.errors import ExitCode, Problem, printable, render
from builder.base.recipe_address import is_address

FORMS = ("text", "json", "github", "sarif", "junit")
COLLECTING = ("json", "sarif", "junit")  # one document on stdout, and nothing else anywhere

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES: Mapping[int, str] = {
    ExitCode.NO: "The answer is no: files differ, or one is broken.",
    ExitCode.USAGE: "The command line asks for something that is not there.",
    ExitCode.RECIPE: "The recipe is invalid.",
    ExitCode.LOCK: "The lock is missing, unreadable or stale.",
    ExitCode.FETCH: "A source could not be had from anywhere.",
    ExitCode.SOURCE: "A source is refused, or is not what was pinned.",
    ExitCode.MISMATCH: "An output cannot be written, or is not what it should be.",
    ExitCode.UNREPRODUCIBLE: "Building again gave other bytes.",
}
_OTHER = "A mistake in ckpt itself, or an interruption."


class Case(NamedTuple):
    """One recipe of those that a command is about: its name, how it ended, and what is wrong with it."""

    name: str
    code: int = 0
    problems: Sequence[Problem] = ()
    skipped: bool = False


def cases_of(command: str, cases: Sequence[Case], errors: Sequence[Problem], code: int) -> list[Case]:
    """The cases, and the command itself as one for what is wrong with none of them."""
    told = {p for case in cases for p in case.problems}
    rest = [p for p in errors if p not in told]
    own = [Case(command, code, rest)] if rest or not cases else []
    return [*cases, *own]


def github(problem: Problem, severity: str = "error") -> str:
    """An annotation of GitHub Actions: a line that marks a line of a file."""
    at, fields = problem.place, {}
    if at is not None:
        fields["file"] = at.path
        if at.line is not None:
            fields |= {"line": str(at.line), "col": str(at.column or 1)}
    lines = (problem.fact, *problem.evidence, *([f"hint: {problem.hint}"] if problem.hint else []))
    said = "\n".join(map(printable, lines))
    marks = ",".join(f"{k}={_property(printable(v))}" for k, v in fields.items())
    return f"::{severity}{f' {marks}' if marks else ''}::{_data(said)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def sarif(cases: Sequence[Case], warnings: Sequence[Problem], code: int) -> str:
    """A SARIF 2.1.0 log: a result for each problem."""
    results = [_result(p, "error", _rule(case.code)) for case in cases for p in case.problems]
    results += [_result(p, "warning", "warning") for p in warnings]
    rules = [
        *({"id": _rule(c), "shortDescription": {"text": said}} for c, said in _RULES.items()),
        {"id": "other", "shortDescription": {"text": _OTHER}},
        {"id": "warning", "shortDescription": {"text": "Something to know although the work went on."}},
    ]
    driver = {"name": "ckpt-build", "version": __version__, "rules": rules}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": code == 0, "exitCode": code}],
        "results": results,
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: int) -> str:
    return ExitCode(code).name.lower() if code in _RULES else "other"


def _result(problem: Problem, level: str, rule: str) -> dict[str, Any]:
    lines = (problem.fact, *problem.evidence, *([problem.hint] if problem.hint else []))
    found: dict[str, Any] = {
        "ruleId": rule,
        "level": level,
        "message": {"text": "\n".join(map(printable, lines))},
    }
    if (at := problem.place) is not None:
        place: dict[str, Any] = {"artifactLocation": {"uri": _uri(at.path)}}
        if at.line is not None:
            place["region"] = {"startLine": at.line, "startColumn": at.column or 1}
        found["locations"] = [{"physicalLocation": place}]
    return found


def _uri(path: str) -> str:
    if is_address(path):
        return quote(path, safe="%:/?#[]@!$&'()*+,;=")
    if Path(path).is_absolute():
        return Path(path).as_uri()
    return quote(Path(path).as_posix())


def junit(command: str, cases: Sequence[Case]) -> str:
    """A JUnit report: a test case for each recipe."""
    failed, skipped = sum(c.code != 0 for c in cases), sum(c.skipped for c in cases)
    counts = f'tests="{len(cases)}" failures="{failed}" errors="0"'
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<testsuites {counts}>",
        f'  <testsuite name={_attribute(command)} {counts} skipped="{skipped}">',
    ]
    for case in cases:
        head = f"    <testcase classname={_attribute(command)} name={_attribute(case.name)}"
        if case.code == 0:
            lines.append(f"{head}>\n      <skipped/>\n    </testcase>" if case.skipped else f"{head}/>")
            continue
        first = case.problems[0].fact if case.problems else f"exit code {case.code}"
        text = "\n\n".join(render(p) for p in case.problems)
        kind = _attribute(_rule(case.code))
        body = f"<failure type={kind} message={_attribute(first)}>{_text(text)}</failure>"
        lines.append(f"{head}>\n      {body}\n    </testcase>")
    return "\n".join([*lines, "  </testsuite>", "</testsuites>"])


_NO_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(text: str) -> str:
    return escape(_NO_XML.sub("?", text))


def _attribute(text: str) -> str:
    return quoteattr(_NO_XML.sub("?", printable(text)))
