"""The process around a command: its streams, its exit codes, its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.base.errors import Place, Problem, render
from builder.cli import run
from builder.cli.command import Command, Group
from builder.formats.write_safetensors import write
from builder.tensors.lazy import DType, MemoryTensor
from tests.help.commands import commands

CKPT = [sys.executable, "-m", "builder"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    write(path, {"a": MemoryTensor(DType.U8, (1,), b"a")}, durable=False)
    return str(path)


def test_a_reader_that_leaves_is_no_answer() -> None:
    shown = subprocess.Popen(
        [*CKPT, "components", "show", "UNET-v1-SD", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert shown.stdout is not None and shown.stderr is not None
    with shown, shown.stdout, shown.stderr:
        shown.stdout.close()
        said = shown.stderr.read()
    assert (shown.returncode, said) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_below_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*CKPT, "components", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (7, "error: no space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_few_letters_gets_all_of_the_report(file: str, encoding: str) -> None:
    done = subprocess.run(
        [*CKPT, "inspect", "--no-metric", file],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"nothing in the catalog matches" in done.stdout


def test_an_address_may_be_longer_than_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--no-metric", f"sd1:{'x' * 5000}"]) in (2, 5, 6)
    assert capsys.readouterr().err.startswith("error: ")


def test_a_message_is_never_longer_than_anyone_reads() -> None:
    long = "x" * 1_000_000
    text = render(Problem(f"tensor `{long}`", Place(long), (long, "y"), long))
    assert len(text) < 20_000 and "(1,000,000 characters)" in text and "   = y\n" in text


def test_every_command_takes_a_value_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [words for words, command in commands() if not isinstance(command, Command | Group)]
    for words in ("merge a b -o c --alpha 0.3 --alpha 0.5", "store gc --max-size 1MB --max-size=2MB"):
        assert run(words.split()) == 2
        assert "is given 2 times" in capsys.readouterr().err
    assert run(["convert", "a", "-o", "b", "--output", "c"]) == 2
    assert capsys.readouterr().err.startswith("error: Option '-o' / '--output' is given 2 times.\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("plan x.toml --dot --mermaid", "`--dot` and `--mermaid` exclude each other"),
        ("plan x.toml --json --output-format sarif", "`--json` and `--output-format` exclude each other"),
    ],
)
def test_one_form_is_asked_for(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    assert told in "".join(capsys.readouterr())


def test_what_may_be_said_again_may(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "path", "--json", "--json"]) == 0
    assert run(["inspect", "none", "--metric", "--no-metric", "-q", "-q"]) == 6, "the last of a switch counts"
    assert "cannot open `none`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("build hf:/org/name/x.toml", "`hf:/org/name/x.toml` is neither a file nor the address of a recipe"),
        ("plan htps://example.org/x.toml", "`htps://` begins no address of a recipe"),
    ],
)
def test_what_is_meant_as_an_address_is_no_path(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words.split()) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "hint: a recipe's address is `https://…/x.toml`" in said


def test_the_recipe_beside_one_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mix.toml", "mix.lock.toml"):
        (tmp_path / name).write_text("format = 1\n")
    for command in ("build", "lock", "verify", "share"):
        assert run([command, f"{tmp_path}/mx.toml"]) == 3
        assert f"hint: did you mean `{tmp_path}/mix.toml`?" in capsys.readouterr().err
