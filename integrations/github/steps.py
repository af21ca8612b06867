"""The steps of the GitHub Action: the key of its cache, and the build with what a workflow is told of it."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any


def recipes() -> list[Path]:
    """What is to be built, one a line of the input."""
    found = [Path(line.strip()) for line in os.environ["INPUT_RECIPE"].splitlines() if line.strip()]
    if not found:
        sys.exit("error: the input `recipe` names no file")
    return found


def key() -> None:
    """Where the store lies, and its cache's key: what the locks say, or recipes that have none yet."""
    store = Path(os.environ["RUNNER_TEMP"]) / "ckpt-store"
    pinned = sha256()
    for recipe in recipes():
        lock = recipe.with_suffix(".lock.toml")
        there = lock if lock.is_file() else recipe
        if not there.is_file():
            sys.exit(f"error: there is no recipe `{recipe}`")
        pinned.update(sha256(there.read_bytes()).digest())
    # The store's content is the same on every system; where it lies is part of a cache's identity.
    begin = f"ckpt-store-{os.environ.get('RUNNER_OS') or platform.system()}-"
    tell("GITHUB_OUTPUT", store=str(store), key=begin + pinned.hexdigest(), restore=begin)
    tell("GITHUB_ENV", CKPT_STORE=str(store), CKPT_STORE_KEEP="all")


def build() -> int:
    """Build each recipe, say what went wrong where it went wrong; the exit code of the first that failed."""
    options = shlex.split(os.environ.get("INPUT_ARGS", ""))
    if os.environ.get("INPUT_LOCKED", "true") == "true":
        options.append("--locked")
    outputs, code = [], 0
    for recipe in recipes():
        command = [sys.executable, "-m", "ckpt_build", "build", str(recipe), "--json", *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        try:
            said = json.loads(done.stdout)
        except ValueError:  # it ended before it could say anything, as where an option is wrong
            said = {"errors": [{"fact": f"`ckpt build` ended with {done.returncode}"}]}
        quoted("\n".join([*lines(said), done.stderr]))
        for severity in ("warning", "error"):
            for problem in said.get(f"{severity}s", ()):
                annotate(severity, recipe, problem)
        outputs += said.get("outputs", ())
        code = code or done.returncode
    if outputs:
        first = outputs[0]
        said = {"sha256": first["sha256"], "tensor-digest": first["tensor_digest"]}
        tell("GITHUB_OUTPUT", **said, outputs=json.dumps(outputs))
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write("| file | state | bytes | SHA-256 |\n|---|---|---:|---|\n")
            for o in outputs:
                summary.write(f"| {cell(o['path'])} | {o['state']} | {o['size']:,} | `{o['sha256']}` |\n")
    return code


def quoted(text: str) -> None:
    """Show text of which no line is taken for a command to the runner, whatever a recipe or a file says."""
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}\n{text.rstrip()}\n::{token}::", flush=True)


def lines(said: dict[str, Any]) -> Iterator[str]:
    """What the build said, for people."""
    for output in said.get("outputs", ()):
        yield plain(f"{output['state']}  {output['path']}  sha256 {output['sha256']}")
    for note in said.get("notes", ()):
        yield plain(f"note: {note}")
    for severity in ("warning", "error"):
        for problem in said.get(f"{severity}s", ()):
            yield plain(f"{severity}: {problem['fact']}")
            if place := problem.get("place"):
                yield plain("  --> " + ":".join(str(v) for v in place.values() if v is not None))
            yield from (plain(f"   = {e}") for e in problem.get("evidence", ()))
            if problem.get("hint"):
                yield plain(f"hint: {problem['hint']}")


def annotate(severity: str, recipe: Path, problem: dict[str, Any]) -> None:
    """Mark the place of a problem, the recipe where it has none in one."""
    place = problem.get("place") or {}
    where = {"file": str(recipe)}
    if str(place.get("path", "")).endswith(".toml"):
        where = {"file": place["path"], "line": place["line"], "col": place["column"]}
    marks = ",".join(f"{k}={escaped(str(v), ':,')}" for k, v in where.items() if v is not None)
    print(f"::{severity} {marks}::{escaped(plain(problem['fact']))}", flush=True)


def plain(text: str) -> str:
    """Text that drives no terminal."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def escaped(text: str, also: str = "") -> str:
    """Text as a command to the runner has it."""
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in text)


def cell(text: str) -> str:
    """Text as a table's cell has it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def tell(file: str, **values: str) -> None:
    """Set outputs or variables; raises ValueError for a value that would end its line and set another."""
    with Path(os.environ[file]).open("a", encoding="utf-8") as out:
        for name, value in values.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"{name} has several lines")
            out.write(f"{name}={value}\n")


if __name__ == "__main__":
    sys.exit({"key": key, "build": build}[sys.argv[1]]())
