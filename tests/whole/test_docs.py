"""What README and docs show is what the program says."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from builder.toolkit.demo import write_sources
from tests.help.building import ROOT, Folder

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def _blocks(text: str) -> list[str]:
    return [b for b in BLOCK.findall(text) if b.startswith("$ ckpt ") or "\n$ ckpt " in b]


def _run(line: str, folder: Path) -> str:
    """What a command prints on a terminal that shows both streams, without its colours."""
    words = shlex.split(line, comments=True)
    assert words[0] == "ckpt", line
    shown = Folder(folder, folder.parent / "store", {"CKPT_COMPONENTS": ""}).shown(*words[1:])
    return shown.rstrip("\n") + "\n" if shown else ""


def _shown(block: str, folder: Path) -> str:
    lines = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{_run(line[2:], folder)}" for line in lines)


@pytest.mark.parametrize("path", [d for d in DOCS if _blocks(d.read_text())], ids=lambda p: p.name)
def test_commands_show_what_they_print(path: Path, tmp_path: Path) -> None:
    """Every block of a document, from top to bottom, in one folder that holds the demo's files."""
    folder = tmp_path / "demo"
    write_sources(folder)
    text = path.read_text(encoding="utf-8")
    for block in _blocks(text):
        shown = _shown(block, folder)
        if UPDATE:
            text = text.replace(f"```console\n{block}```", f"```console\n{shown}```", 1)
        else:
            assert shown == block
    if UPDATE:
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert not missing


def test_every_command_is_documented() -> None:
    from builder.cli import COMMANDS

    said = (ROOT / "README.md").read_text() + "".join(d.read_text() for d in DOCS)
    assert not [c for c in COMMANDS if f"`ckpt {c}" not in said and f"`{c}`" not in said]
