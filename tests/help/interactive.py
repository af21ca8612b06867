"""Python as a document shows it, run again: sessions with their prompts, and cells of notebooks."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def alone(folder: Path, store: Path) -> Iterator[None]:
    """For what is run in this process, in a folder, as if nothing of this machine's own were set."""
    before, here = dict(os.environ), Path.cwd()
    os.environ.update({"CKPT_STORE": str(store), "CKPT_MODELS": "", "CKPT_COMPONENTS": ""})
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def session(text: str, names: dict[str, Any]) -> str:
    """A session with its prompts, and what Python says now after each of them."""
    said = []
    for example in doctest.DocTestParser().get_examples(text):
        first, *rest = example.source.splitlines()
        said += [f">>> {first}", *(f"... {line}".rstrip() for line in rest)]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(example.source, "<session>", "single"), names)
            except Exception as error:
                out.write(f"Traceback (most recent call last):\n  ...\n{type(error).__name__}: {error}\n")
        said += out.getvalue().splitlines()
    return "\n".join(said) + "\n"


def cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a notebook's cell: what it prints, and the value of an expression at its end."""
    tree, out = ast.parse(source), io.StringIO()
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "<cell>", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    found: list[dict[str, Any]] = []
    if out.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": _lines(out.getvalue())})
    if value is not None:
        shown = {"text/plain": _lines(repr(value))}
        found.append({"data": shown, "metadata": {}, "output_type": "execute_result"})
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
