"""The lines that docs/commands.md gives for each shell complete commands and their words, in that shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.help.building import ROOT

DOCS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")

# How each shell is asked for the completions of `ASKED`, after its line; they come a line each.
ASK = {
    "bash": """COMP_WORDS=(ASKED); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_ckpt_completion ckpt
printf '%s\\n' "${COMPREPLY[@]}\"""",
    "fish": "complete --do-complete 'ASKED'",
}


def line_of(shell: str) -> str:
    """What docs/commands.md says to put into the shell's configuration."""
    (line,) = re.findall(rf"(?m)^\| {shell}[^|]*\|[^|]*\| `(.*)` \|$", DOCS)
    return line.replace("\\|", "|")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A folder with `ckpt`, before all others."""
    command = tmp_path / "bin" / "ckpt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m builder "$@"\n')
    command.chmod(0o755)
    return f"{command.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ckpt pl", {"plan"}),
        ("ckpt store g", {"gc"}),
        ("ckpt build --no-l", {"--no-lock"}),
        ("ckpt merge --overflow c", {"clamp"}),
        ("ckpt merge --op wei", {"weighted-sum"}),
        ("ckpt components le", {"learn"}),
        ("ckpt components show vae-m", {"VAE-mini-SD"}),
        ("ckpt help me", {"merge"}),
        ("ckpt help store g", {"gc"}),
    ],
)
def test_words_are_completed(shell: str, words: str, found: set[str], path: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    script = f"{line_of(shell)}\n{ASK[shell].replace('ASKED', words)}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert {line.split("\t")[0] for line in done.stdout.split("\n") if line} == found
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str, path: str) -> None:
    (asked,) = re.findall(r"_CKPT_COMPLETE=(\w+)_source", line_of(shell))
    environment = {**os.environ, "PATH": path, "_CKPT_COMPLETE": f"{shell}_source"}
    done = subprocess.run(["ckpt"], env=environment, capture_output=True, text=True, check=True)
    assert asked == shell and f"_CKPT_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell) is not None:
        check = [shell, "--no-execute" if shell == "fish" else "-n"]
        assert subprocess.run(check, input=done.stdout, text=True, check=True).returncode == 0
