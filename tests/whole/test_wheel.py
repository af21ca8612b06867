"""What is installed: all of it, typed, and its own `builder` whatever lies in the folder that one is in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.help.building import ROOT

PACKAGES = ("builder", "ckpt_build", "components_db")
STRANGER = "raise SystemExit('a stranger was run')\n"
# As a program uses the face; what is wrong in it is marked so.
PROGRAM = """\
from pathlib import Path
from threading import Event
from typing import assert_type

from ckpt_build import CkptError, ExitCode, Node, Output, Plan, Problem, Progress, Recipe, Tensor, Workspace


def heard(progress: Progress) -> None:
    assert_type(progress.done, int)


work = Workspace(store="store", models=[Path("models")], offline=True)
with work.open("model.safetensors") as checkpoint:
    assert_type(checkpoint["name"], Tensor)
    assert_type(checkpoint.get("name"), Tensor | None)
    assert_type(checkpoint["name"].shape, tuple[int, ...])
recipe = work.load("recipe.toml")
assert_type(recipe, Recipe)
assert_type(work.compose(name="x", base="s", sources={"s": Path("s.ckpt")}), Recipe)
assert_type(work.plan(recipe), Plan)
assert_type(work.plan(recipe).nodes, tuple[Node, ...])
try:
    assert_type(work.build(recipe, progress=heard, cancel=Event()).output, Output)
except CkptError as error:
    assert_type(error.problems, tuple[Problem, ...])
    assert_type(error.exit_code, ExitCode)
assert_type(work.inspect("a.ckpt").metric, str | None)
assert_type(work.diff("a.ckpt", Path("b.ckpt")).same, bool)
parts: dict[str, str] = {"VAE": "b.ckpt"}
assert_type(work.replace("a.ckpt", parts, "c.ckpt").warnings, tuple[Problem, ...])
work.inspect(1)  # error: [arg-type]
work.inspect("a.ckpt").metrics  # error: [attr-defined]
"""


def run(*command: str | Path, **how: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, since building leaves folders behind."""
    absent = find_spec("pip") is None or find_spec("setuptools") is None
    if absent or int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs pip and setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    made = folder / "dist"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps")
    run(*pip, "--no-build-isolation", "--no-index", "-w", made, folder)
    (found,) = made.iterdir()
    return found


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    files = (p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file())
    assert held == {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    assert {"ckpt_build/py.typed", "builder/py.typed", "components_db/v1/VAE-v1-SD.toml"} <= held


def test_what_is_installed_runs_among_strangers(wheel: Path, tmp_path: Path) -> None:
    """Packages of its names lie in the folder that one is in, and come first on the path."""
    installed, here = tmp_path / "installed", tmp_path / "here"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps")
    run(*pip, "--no-index", "--no-compile", "--target", installed, wheel)
    for name in ("builder", "components_db"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(STRANGER)
    path = os.pathsep.join(map(str, (here, installed)))
    environment = {**os.environ, "PYTHONPATH": path, "CKPT_STORE": str(tmp_path / "store"), "CKPT_MODELS": ""}
    for command in ([installed / "bin" / "ckpt"], [sys.executable, "-m", "ckpt_build"]):
        said = run(*command, "components", "list", cwd=here, env=environment)
        assert "VAE-v1-SD" in said
    code = "import ckpt_build, builder; ckpt_build.write_demo('demo'); print(builder.__file__)"
    said = run(sys.executable, "-c", code, cwd=here, env=environment)
    assert Path(said.strip()) == installed / "builder" / "__init__.py"
    assert run(installed / "bin" / "ckpt", "build", "demo/demo.toml", cwd=here, env=environment)
    assert (here / "demo" / "demo.safetensors").is_file()


def test_a_program_is_checked_against_its_types(tmp_path: Path) -> None:
    """By mypy's strict rules, which find what is wrong in it and nothing else."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    wrong = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if "# error" in line}
    assert set(found) == wrong, done.stdout
