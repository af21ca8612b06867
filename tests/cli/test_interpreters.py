"""The command line under an interpreter that was started in other ways than usual."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.help.building import ROOT, Folder, content, model, save

ALL_HELP = """
import sys
from builder.cli import COMMANDS, main
def help(*args):
    print("$", *args)
    try:
        main([*args, "--help"])
    except SystemExit as end:
        assert end.code == 0, end.code
help()
for name in COMMANDS:
    help(name)
for args in (("store", "list"), ("store", "gc"), ("components", "learn"), ("components", "list")):
    help(*args)
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def python(*args: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, check=False)


def test_help_is_the_same_without_docstrings() -> None:
    usual, stripped = python("-c", ALL_HELP), python("-OO", "-c", ALL_HELP)
    assert (usual.returncode, stripped.returncode, stripped.stderr) == (0, 0, b"")
    assert usual.stdout.count(b"\n$") > 15
    assert stripped.stdout == usual.stdout


@pytest.mark.skipif(os.name != "posix", reason="elsewhere names are Unicode")
@pytest.mark.parametrize("flags", [(), pytest.param(("-E",), marks=pytest.mark.slow)], ids=str)
def test_an_ascii_locale_finds_what_recipes_name(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = Folder.below(tmp_path)
    save(folder / "vä.safetensors", model("VAE-mini"))
    said = 'format = 1\nname = "ö"\nbase = "NEW VAE-mini"\n'
    folder.write("r.toml", f'{said}components.VAE-mini = "v"\nsources.v.file = "vä.safetensors"\n')
    variables = {**ASCII, "CKPT_STORE": str(folder.store), "CKPT_MODELS": ""}
    launch = "import sys; sys.path.insert(0, sys.argv.pop(1)); from builder.cli import main; main()"
    built = python(*flags, "-c", launch, str(ROOT), "build", "r.toml", cwd=folder.path, **variables)
    assert built.returncode == 0, built.stderr
    assert content(folder / "ö.safetensors").keys() == content(folder / "vä.safetensors").keys()
    named = python(*flags, "-c", launch, str(ROOT), "inspect", "vä.safetensors", cwd=folder.path, **variables)
    assert named.returncode == 0, named.stderr
