"""The steps of the GitHub Action: the key of its cache, and the build with what a workflow is told of it."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

ANNOTATIONS = ("::error ", "::error::", "::warning ", "::warning::")


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
    """Build the recipes as one, and tell the workflow what was built; the exit code of `ckpt build`."""
    options = shlex.split(os.environ.get("INPUT_ARGS", ""))
    if os.environ.get("INPUT_LOCKED", "true") == "true":
        options.append("--locked")
    command = [sys.executable, "-m", "ckpt_build", "build", "--json", "--output-format=github"]
    code, document = shown([*command, "--keep-going", *options, "--", *map(str, recipes())])
    said = json.loads(document or "{}")
    outputs = [output for one in said.get("recipes", [said]) for output in one.get("outputs", ())]
    if outputs:
        first = outputs[0]
        told = {"sha256": first["sha256"], "tensor-digest": first["tensor_digest"]}
        tell("GITHUB_OUTPUT", **told, outputs=json.dumps(outputs))
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write("| file | state | bytes | SHA-256 |\n|---|---|---:|---|\n")
            for o in outputs:
                summary.write(f"| {cell(o['path'])} | {o['state']} | {o['size']:,} | `{o['sha256']}` |\n")
    return code


def shown(command: list[str]) -> tuple[int, str]:
    """Run a command; its exit code, and what it says on stdout. What it says on stderr is shown as it comes.

    Of that no line is taken for a command to the runner, whatever a recipe or a file says: it lies between
    marks that nobody can know before. What marks a line of a file follows after the last.
    """
    token, marks = secrets.token_hex(16), []
    print(f"::stop-commands::{token}", flush=True)
    with tempfile.TemporaryFile() as stdout:
        with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            for data in process.stderr:
                line = data.decode("utf-8", "replace").rstrip()
                if line.startswith(ANNOTATIONS):
                    marks.append(line)
                else:
                    print(line, flush=True)
        stdout.seek(0)
        said = stdout.read().decode("utf-8", "replace")
    print("\n".join([f"::{token}::", *marks]), flush=True)
    return process.returncode, said


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
