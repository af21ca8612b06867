"""Whose `builder` runs: the command's own, whatever lies on the path or in the folder that one is in."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

import ckpt_build
from tests.help.building import ROOT, Folder

STRANGER = "raise SystemExit('a stranger was run')\n"
NAMES = ("builder", "components_db")
# What pip makes of [project.scripts], in a folder of its own.
SCRIPT = "import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"


def strangers(folder: Path, *, packages: bool = True) -> Path:
    """Packages of our names, or folders without code, that do harm when they are imported."""
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "cli.py").write_text(STRANGER)
        if packages:
            (folder / name / "__init__.py").write_text(STRANGER)
    return folder


def script(folder: Path) -> Path:
    """The console script."""
    said = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["ckpt"]
    module, _, name = said.partition(":")
    path = folder / "bin" / "ckpt"
    path.parent.mkdir()
    path.write_text(SCRIPT.format(module=module, name=name))
    return path


@pytest.mark.parametrize("packages", [True, False], ids=["packages", "folders"])
@pytest.mark.parametrize("way", ["module", "script"])
def test_a_strangers_builder_is_not_run(tmp_path: Path, way: str, packages: bool) -> None:
    """One in the folder that one is in, and one that comes first on the path."""
    folder = Folder.below(tmp_path).tiny()
    strangers(folder.path, packages=packages)
    elsewhere = strangers(tmp_path / "elsewhere", packages=packages)
    run = ["-m", "ckpt_build"] if way == "module" else [str(script(tmp_path))]
    done = subprocess.run(
        [sys.executable, *run, "build", "tiny.toml"],
        cwd=folder.path,
        env={**os.environ, **folder.variables, "PYTHONPATH": os.pathsep.join([str(elsewhere), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("written") and (folder / "tiny.safetensors").is_file()


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_is_free_of_strangers_too(tmp_path: Path) -> None:
    done = python("import ckpt_build; print(ckpt_build.Workspace().store.path)", strangers(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_process_that_has_another_builder_is_told(tmp_path: Path) -> None:
    (tmp_path / "builder.py").write_text("mine = 1\n")
    done = python("import builder, ckpt_build", tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"another package `builder` ({tmp_path / 'builder.py'})" in last and "before it" in last


def test_plans_and_errors_are_known_in_another_process(tmp_path: Path) -> None:
    """What is sent to a worker loads the packages that it needs, whatever is on that one's path."""
    folder = Folder.below(tmp_path).tiny()
    code = (
        "import pickle, sys\n"
        "plan, error = pickle.loads(bytes.fromhex(sys.stdin.read()))\n"
        "print(plan.nodes[-1].label, plan.graph.number_of_edges(), type(error).__name__)\n"
    )

    work = ckpt_build.Workspace(environment=folder.variables)
    plan = work.plan(work.load(folder / "tiny.toml"))
    sent = pickle.dumps((plan, ckpt_build.SourceError(ckpt_build.Problem("no"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=sent.hex(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(strangers(tmp_path / "s")), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "output tiny.safetensors 7 SourceError\n", done.stderr


def test_the_command_starts_without_what_python_needs() -> None:
    """Nothing of the face but the name of the command is loaded for it."""
    mine = "sorted(m for m in sys.modules if m.startswith('ckpt_build'))"
    code = f"import sys, ckpt_build.__main__\nprint(*{mine})"
    assert python(code, ROOT).stdout.split() == ["ckpt_build", "ckpt_build.__main__", "ckpt_build.home"]
