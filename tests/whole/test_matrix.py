"""The matrix touches every path, is the same in the settings at hand, and names what differs."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli

from builder.operations import OPERATIONS
from builder.recipe.values import QUANTIZE
from builder.tensors.lazy import DType
from tests.help.building import ROOT
from tests.matrix.__main__ import Cell, around, differences, measured
from tests.matrix.paths import ELSEWHERE, FLOATS, write_all

QUICK = "[bmt]*"  # baked, merges and what is tidied: the paths that are quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("matrix")
    write_all(made)
    return made


@pytest.fixture(scope="module")
def here(folder: Path) -> dict[str, Any]:
    return dict(measured(Cell("here"), folder, QUICK))


def test_every_operation_and_every_type_takes_part(folder: Path) -> None:
    recipes = [tomli.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.toml")]
    used = {s["op"] for r in recipes for s in r.get("steps", {}).values()}
    assert used == OPERATIONS.keys() - ELSEWHERE
    assert {r.get("arithmetic", "exact") for r in recipes} == {"exact", "file"}
    outputs = [o for r in recipes for o in r["output"]]
    assert {o["quantize"] for o in outputs if "quantize" in o} == QUANTIZE.keys()
    assert {d.code for d in FLOATS} > {"F64", "F32", "F16", "BF16"} and DType.I8 not in FLOATS


@pytest.mark.slow
def test_settings_of_the_process_decide_nothing(folder: Path, here: dict[str, Any]) -> None:
    """All at once: what differs would be looked for by `make matrix`, one after the other."""
    assert not here["failed"] and len(here["outputs"]) > 50
    names = ("instructions of libraries", "flush to zero", "umask 077", "locale C", "time zone and hash seed")
    cells = [c for c in around() if c.name in names]
    assert len(cells) == len(names)
    environment = {k: v for c in cells for k, v in c.environment.items()}
    options = tuple(o for c in cells for o in c.options)
    found = measured(
        Cell("all", options=("--threads", "5", *options), environment=environment), folder, QUICK
    )
    assert found["versions"]["machine"].endswith("DEFAULT"), "the processor's instructions were not used"
    assert differences(here, found) == []


@pytest.mark.slow
def test_the_first_tensor_that_differs_is_named(here: dict[str, Any]) -> None:
    other = copy.deepcopy(here)
    first, second, third = list(other["outputs"])[:3]
    names = list(other["outputs"][first]["tensors"])
    other["outputs"][first]["tensors"] |= {names[1]: "0", names[2]: "0"}
    other["outputs"][second]["sha256"] = "0"
    del other["outputs"][third]
    other["failed"]["x.toml"] = "cannot be read\nmore"
    assert differences(here, other) == [
        "x.toml was not built: cannot be read",
        f"{first}: 2 of {len(names):,} tensors differ, the first is `{names[1]}`",
        f"{second}: no tensor differs, the header does",
        f"{third}: not made",
    ]


@pytest.mark.slow
def test_a_difference_ends_with_1(tmp_path: Path) -> None:
    """In a Python whose torch adds in another way."""
    wrong = tmp_path / "wrong"
    code = "import torch\nplain = torch.Tensor.mul_\ntorch.Tensor.mul_ = lambda a, b: plain(a, b * 1.001)\n"
    wrong.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n{code}"
        "assert sys.argv[1] == '-m'\nsys.path.insert(0, '')\n"
        "sys.argv = sys.argv[2:]\nrunpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    wrong.chmod(0o755)
    run = (
        "--run",
        f"wrong={wrong}",
        "--run",
        f"gone={tmp_path}/no",
        "--only",
        "[wg]*",
        "--recipes",
        "merge-c*",
    )
    command = [sys.executable, "-m", "tests.matrix", *run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "tensors differ, the first is `" in done.stdout, done.stdout
    assert re.search(r"^FAILED   gone: ", done.stdout, re.MULTILINE), done.stdout


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {x.replace("==", ">=", 1).replace("_", "-", 1) for x in lines if x and x[0] != "#"}
    declared = {d.replace("'", '"') for d in project["dependencies"]}

    def plain(said: set[str]) -> set[str]:
        return {re.sub(r"(\.0)+(?=;|$)", "", s.replace(" ", "").replace("_v", "-v")) for s in said}

    assert plain(pinned) - plain(declared) <= {"torch>=2.13"}, "torch is too large to have two of"
    assert {p.partition(">=")[0] for p in pinned} == {d.partition(">=")[0] for d in declared}
    assert json.dumps(sorted(declared))
