"""A package of others that cannot be loaded is told as such, whatever the command was doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.help.building import ROOT, Folder

BROKEN = {
    "a library that it needs": 'raise OSError("libcudart.so.12: cannot open shared object file")',
    "a package that it needs": "import not_there",
    "part of it": "raise ImportError('undefined symbol: cudnnGetVersion')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder.below(tmp_path_factory.mktemp("broken")).tiny()


def said(folder: Folder, path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **folder.variables, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-m", "builder", *args]
    return subprocess.run(
        command, cwd=folder.path, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("words", ["build tiny.toml", "inspect dirty.ckpt", "extract dirty.ckpt VAE"])
def test_a_broken_torch_is_a_message(folder: Folder, tmp_path: Path, code: str, words: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    before = sorted(folder.path.iterdir())
    done = said(folder, tmp_path, *words.split())
    *notes, _, _, _ = lines = done.stderr.splitlines()
    lines = lines[len(notes) :]
    assert all(note.startswith("note: ") for note in notes)
    assert done.returncode == 69 and done.stdout == "", done.stderr
    assert lines[0] == "error: `torch`, which ckpt needs, cannot be loaded"
    assert lines[1].startswith("   = ") and lines[2].startswith("hint: install it anew: ")
    assert sorted(folder.path.iterdir()) == before


def test_what_needs_no_torch_goes_on(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError")
    assert said(folder, tmp_path, "plan", "tiny.toml").returncode == 0


def test_a_fault_of_our_own_imports_is_ours(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['builder.cli.store'] = None\n")
    done = said(folder, tmp_path, "store", "path")
    assert done.returncode == 70 and "this is a mistake in ckpt itself" in done.stderr
