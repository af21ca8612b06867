"""The process around a command: its streams, its exit codes, its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.base.errors import Place, Problem, render
from builder.cli import run
from builder.formats.write_safetensors import write
from builder.tensors.lazy import DType, MemoryTensor

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
