"""With `--json`, whatever becomes of a command is one object on stdout, and nothing is on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.base.errors import Place, Problem, problem_data
from tests.help.building import ROOT, Folder, Said
from tests.help.commands import ENDING, WAYS, commands, prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return prepared(Folder.below(tmp_path_factory.mktemp("json")))


def answer(said: Said) -> dict[str, Any]:
    """The object, and the only thing that was said."""
    assert said.err == ""
    found = json.loads(said.out)
    assert isinstance(found, dict) and found["schema"] == 1 and found["code"] == said.code
    assert all(isinstance(note, str) for note in found["notes"])
    for problem in (*found["errors"], *found["warnings"]):
        assert problem.keys() == {"fact", "place", "evidence", "hint"} and problem["fact"]
    return found


def test_every_command_is_tried() -> None:
    assert dict(commands()).keys() == WAYS.keys()


@pytest.mark.parametrize("name", ENDING)
def test_what_is_done_is_one_object(name: str, folder: Folder, tmp_path: Path) -> None:
    here = folder.beside(f"good {name}")
    said = here(*name.split(), *WAYS[name].good.split(), "--json")
    found = answer(said)
    assert said.code == 0 and not found["errors"], said.out
    assert len(found) > 5, "it has more to say than how it ended"


@pytest.mark.parametrize("name", WAYS)
def test_what_fails_is_one_object(name: str, folder: Folder) -> None:
    here = folder.beside(f"bad {name}")
    said = here(*name.split(), *WAYS[name].bad.split(), "--json")
    assert said.code == WAYS[name].code, said.out
    assert bool(answer(said)["errors"]) == (name != "diff")  # that they differ is an answer


@pytest.mark.parametrize("name", WAYS)
def test_words_that_are_none_are_told_as_data(name: str, folder: Folder) -> None:
    (error,) = answer(folder(*name.split(), "--nonsense", "--json"))["errors"]
    assert "--nonsense" in error["fact"] and error["hint"] == f"`ckpt {name} --help` lists what there is"


def test_an_unknown_command_is_told_as_data(folder: Folder) -> None:
    (error,) = answer(folder("bild", "--json"))["errors"]
    assert (error["fact"], error["hint"]) == ("no command `bild`", "did you mean `build`?")


def test_notes_and_warnings_are_data(folder: Folder) -> None:
    here = folder.beside("notes")
    args = ("replace", "dirty.ckpt", "VAE=vae.safetensors", "-o", "new.safetensors")
    told = [line.removeprefix("note: ") for line in here(*args).err.splitlines() if line.startswith("note: ")]
    (here / "new.safetensors").unlink()
    assert told and answer(here(*args, "--json", "--quiet"))["notes"] == told


def test_an_error_says_where(folder: Folder) -> None:
    (error,) = answer(folder("plan", "wrong.toml", "--json"))["errors"]
    assert error["fact"] == "unknown key `fixs`" and error["hint"] == "did you mean `fixes`?"
    assert error["place"] == {"path": "wrong.toml", "line": 4, "column": 1}


def test_a_problem_is_data_as_it_is() -> None:
    problem = Problem("a\x1b", Place("p", 3, 4, text="code"), ("e",), None)
    place = {"path": "p", "line": 3, "column": 4}
    assert problem_data(problem) == {"fact": "a\x1b", "place": place, "evidence": ["e"], "hint": None}
    assert problem_data(Problem("x"))["place"] is None


def test_help_and_the_version_are_texts(folder: Folder) -> None:
    assert folder("build", "--help", "--json").out.startswith("Usage: ckpt build")
    assert folder("-V").out.startswith("ckpt, version ")


def test_what_stands_behind_two_dashes_is_a_name(folder: Folder) -> None:
    said = folder("inspect", "--", "--json")
    assert said.code == 6 and said.out == "" and said.err.startswith("error: ")


def test_files_that_a_watched_folder_held_are_data(folder: Folder) -> None:
    here = folder.beside("watched")
    (here / "in").mkdir()
    (here / "dirty.ckpt").rename(here / "in" / "dirty.ckpt")
    watch = ("prune", "--watch", "in", "--settle", "0", "--json")
    (error,) = answer(here(*watch))["errors"]
    assert error["hint"] == "add `--once`"
    (file,) = answer(here(*watch, "--once"))["files"]
    assert file["state"] == "pruned" and file["target"].endswith("dirty.safetensors")


def test_a_page_says_where_it_is_and_goes_on(folder: Folder) -> None:
    command = [sys.executable, "-m", "builder", "ui", "--no-browser", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **folder.variables}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder.path, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as page:
        assert page.stdout is not None
        lines = [page.stdout.readline()]
        while lines[-1] not in ("}\n", ""):
            lines.append(page.stdout.readline())
        page.send_signal(signal.SIGINT)
        rest, _ = page.communicate(timeout=60)
    assert json.loads("".join(lines))["address"].startswith("http://127.0.0.1:")
    assert (page.returncode, rest) == (0, "")


def test_a_full_disk_below_stdout_is_told(folder: Folder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a disk that is always full")
    code = 'import os\nos.dup2(os.open("/dev/full", os.O_WRONLY), 1)'
    said = folder.process("store", "path", "--json", before=code)
    assert (said.code, said.err) == (7, "error: no space left on device\n")


def test_a_fault_of_ours_is_data_too(folder: Folder) -> None:
    before = """
from builder.cli import main as run, store
def broken(*_):
    raise KeyError
store.Settings.from_environment = broken
"""
    said = folder.process("store", "path", "--json", before=before)
    assert said.code == 70 and "KeyError" in said.err
    assert json.loads(said.out)["errors"][0]["fact"] == "this is a mistake in ckpt itself"
