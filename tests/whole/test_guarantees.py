"""Every test that the guarantees name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"^- `([\w/]+\.py)::(\w+)`$", TEXT, re.M)
    assert len(named) > 50 and TEXT.count("::") == len(named) + 1, "and each is written as the others"
    defined = {
        (path.relative_to(TESTS).as_posix(), node.name)
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert not set(named) - defined


def test_every_guarantee_names_some() -> None:
    sections = re.split(r"^(?:## \d|\*\*)", TEXT, flags=re.M)[1:]
    assert len(sections) >= 9
    assert all("\n- `" in section for section in sections)
