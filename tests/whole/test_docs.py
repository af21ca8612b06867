"""What README and docs show is what the program says."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from builder import cli
from builder.base import signals
from builder.base.errors import ExitCode
from builder.cli import terminal
from builder.toolkit.demo import write_sources
from tests.help import keys
from tests.help.building import ROOT, Folder
from tests.help.commands import commands

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def _blocks(text: str) -> list[str]:
    return [b for b in BLOCK.findall(text) if b.startswith("$ ckpt ") or "\n$ ckpt " in b]


def _run(line: str, folder: Path) -> str:
    """What a command prints on a terminal that shows both streams, without its colours."""
    line, _, first = line.partition(" | head -")
    words = shlex.split(line, comments=True)
    assert words[0] == "ckpt", line
    shown = Folder(folder, folder.parent / "store", {"CKPT_COMPONENTS": ""}).shown(*words[1:])
    if first:
        shown = "\n".join(shown.split("\n")[: int(first)])
    return shown.rstrip("\n") + "\n" if shown else ""


def _shown(block: str, folder: Path) -> str:
    lines = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{_run(line[2:], folder)}" for line in lines)


@pytest.mark.parametrize("path", [d for d in DOCS if _blocks(d.read_text())], ids=lambda p: p.name)
def test_commands_show_what_they_print(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a document, from top to bottom, in one folder with the demo's files and two keys."""
    monkeypatch.setattr(terminal, "LINE_EVERY", 3600.0)  # of progress, which a machine at work would show
    folder = tmp_path / "demo"
    write_sources(folder)
    keys.private(folder / "key.pem")
    keys.public(folder / "pub.pem")
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


COMMANDS = ROOT / "docs" / "commands.md"


def _sections() -> dict[str, str]:
    parts = re.split(r"(?m)^## ckpt (\w+)\n", COMMANDS.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_and_option_is_documented() -> None:
    """In the section of its command, in whose usage the command stands too."""
    missing, sections = [], _sections()
    for words, command in commands():
        text = sections.get(words.split()[0], "")
        usage = text.partition("```\n")[2].partition("```")[0]
        if f"ckpt {words.split()[0]}" not in usage or words.split()[-1] not in usage:
            missing.append(words)
        for param in command.params:
            for names in (param.opts, param.secondary_opts):
                options = [n for n in names if n.startswith("-")]
                if options and not any(re.search(rf"(?<![\w-]){n}\b", text) for n in options):
                    missing.append(f"{words} {options[0]}")
    assert not missing
    assert sections.keys() == {words.split()[0] for words, _ in commands()}
    assert list(sections) == sorted(sections)
    named = re.findall(r"\[(\w+)\]\(#ckpt-\1\)", COMMANDS.read_text(encoding="utf-8").partition("\n## ")[0])
    assert named == list(cli.COMMANDS), "in the order of `ckpt --help`"


@pytest.mark.parametrize("name", sorted(_sections()))
def test_every_command_has_the_one_shape(name: str) -> None:
    """Usage, what it does, an example that is run, and what it prints as data."""
    text = _sections()[name]
    assert text.startswith(f"\n```\nckpt {name}")
    assert _blocks(text)
    assert re.search(r"(?m)^`--json`", text)


def test_every_exit_code_is_documented() -> None:
    table = COMMANDS.read_text(encoding="utf-8").partition("### Exit codes")[2].partition("### ")[0]
    said = {int(code) for row in re.findall(r"(?m)^\| ([\d, ]+) \|", table) for code in row.split(",")}
    ours = {cli.BROKEN, cli.UNAVAILABLE, cli.READER_GONE, signals.INTERRUPTED, signals.TERMINATED}
    assert said == {*map(int, ExitCode), *ours}


def test_every_command_has_a_topic() -> None:
    said = ROOT / "builder" / "cli"
    modules = {p.stem for p in said.glob("*.py") if 'click.command("' + p.stem in p.read_text()}
    groups = {p.stem for p in said.glob("*.py") if 'click.group("' + p.stem in p.read_text()}
    assert modules | groups == set(cli.COMMANDS)
