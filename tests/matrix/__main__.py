"""`make matrix`: the same recipes everywhere; where an output differs, the first tensor of it that does."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MADE = ROOT / ".venv-matrix"  # the environments of other versions
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LOCALES = ("C", "C.UTF-8", "de_DE.utf8", "tr_TR.utf8", "zh_CN.gb18030")
# What runs this machine's programs as on a processor without AVX.
WITHOUT_AVX = ("qemu-x86_64-static", "-cpu", "Westmere")

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """Where the recipes are built: a command that is Python, what it is told, and what is around it.

    Of a cell that cannot be had here, `missing` says why.
    """

    name: str
    python: tuple[str, ...] = (sys.executable,)
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


def around() -> Iterator[Cell]:
    """This Python in every setting that bytes could depend on."""
    yield Cell("here")
    yield from (Cell(f"{n} threads", options=("--threads", str(n))) for n in (1, 8))
    for name in ("default", "avx2", "avx512"):
        yield Cell(f"instructions {name}", environment={"ATEN_CPU_CAPABILITY": name})
    least = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"}
    yield Cell("instructions of libraries", environment={**least, "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"})
    yield Cell("flush to zero", options=("--flush",))
    yield from (Cell(f"umask {mode}", options=("--umask", mode)) for mode in ("000", "077"))
    for name in LOCALES:
        there = name in ("C", *_locales())
        missing = "" if there else "not installed"
        yield Cell(f"locale {name}", environment={"LC_ALL": name, "PYTHONUTF8": "0"}, missing=missing)
    yield Cell("time zone and hash seed", environment={"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7"})
    there = shutil.which(WITHOUT_AVX[0])
    missing = "" if there else f"{WITHOUT_AVX[0]} is not installed"
    yield Cell("x86 without AVX", (*WITHOUT_AVX, sys.executable), missing=missing)


def others(pythons: Iterable[str]) -> Iterator[Cell]:
    """The Pythons of `pythons`, each with the lowest versions that are declared and with the newest."""
    found = {v: p for p in pythons if (v := _version(p))}
    for version in PYTHONS:
        for which in ("lowest", "newest"):
            name, python = f"python {version}, {which} versions", found.get(version)
            if python is None:
                yield Cell(name, missing="no such Python on the path: name one by --python")
                continue
            try:
                yield Cell(name, (str(_environment(python, version, which)),))
            except subprocess.CalledProcessError as error:
                said = (error.stderr or "").strip().splitlines()
                yield Cell(name, missing=f"cannot be installed: {said[-1] if said else error}")


def _version(python: str) -> str | None:
    """`3.12` of a Python that runs."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _environment(python: str, version: str, which: str) -> Path:
    """The Python of an environment with this package in it, made where it is not there; torch comes first."""
    folder = MADE / f"{version}-{which}"
    inside = folder / "bin" / "python"
    if (folder / "done").is_file():
        return inside
    pip = (str(inside), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    torch = shlex.split(os.environ.get("TORCH_OPTIONS", ""))
    lowest = ("-c", str(ROOT / "constraints-oldest.txt")) if which == "lowest" else ()
    for command in (
        (python, "-m", "venv", str(folder)),
        (*pip, *lowest, "torch", *torch),
        (*pip, *lowest, str(ROOT)),
    ):
        subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / "done").touch()
    return inside


def _locales() -> list[str]:
    if shutil.which("locale") is None:
        return []
    return subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.split()


def measured(cell: Cell, folder: Path, recipes: str = "*") -> Report:
    """What the recipes of `folder` make in a cell; raises RuntimeError where its Python ends otherwise."""
    command = (*cell.python, "-m", "tests.matrix.probe", str(folder), "--recipes", recipes, *cell.options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cell.environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(str(error)) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[0])
    report: Report = json.loads(done.stdout)
    return report


def differences(expected: Report, found: Report) -> list[str]:
    """A line for each output that is another: the first of its tensors that differs."""
    said = [f"{n} was not built: {why.splitlines()[0]}" for n, why in found["failed"].items()]
    for name, output in expected["outputs"].items():
        other = found["outputs"].get(name)
        if other == output:
            continue
        if other is None:
            said.append(f"{name}: not made")
            continue
        one, two = output["tensors"], other["tensors"]
        wrong = [n for n in (*one, *(n for n in two if n not in one)) if one.get(n) != two.get(n)]
        if wrong:
            said.append(f"{name}: {len(wrong):,} of {len(one):,} tensors differ, the first is `{wrong[0]}`")
        else:
            what = "metric" if output["sha256"] == other["sha256"] else "header"
            said.append(f"{name}: no tensor differs, the {what} does")
    return said


def main() -> int:
    """The command line: 1 where something differs or a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    add = parser.add_argument
    add("--python", action="append", default=[], metavar="PYTHON", help="one beside those on PATH")
    add(
        "--run",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="a command that is Python, as it is",
    )
    add("--only", default="*", metavar="GLOB", help="cells by name")
    add("--recipes", default="*", metavar="GLOB", help="recipes by name")
    add("--list", action="store_true", help="name the cells, and build nothing")
    args = parser.parse_args()
    from tests.matrix.paths import write_all

    given = [Cell(n, tuple(shlex.split(c))) for n, _, c in (r.partition("=") for r in args.run)]
    pythons = [*(f"python{v}" for v in PYTHONS), sys.executable, *args.python]
    wrong = False
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if args.list:
            print(*(c.name for c in (*around(), *given)), sep="\n")
            return 0
        write_all(folder)
        expected = measured(Cell("here"), folder, args.recipes)
        print(f"{len(expected['outputs'])} outputs; {_said(expected)}", flush=True)
        wrong |= bool(expected["failed"])
        for line in differences(expected, expected):
            print(f"  {line}", flush=True)
        for cell in _cells(args.only, given, pythons):
            wrong |= not _one(cell, folder, args.recipes, expected)
    return int(wrong)


def _cells(only: str, given: Iterable[Cell], pythons: Iterable[str]) -> Iterator[Cell]:
    yield from (c for c in (*around(), *given) if fnmatch.fnmatch(c.name, only))
    if any(fnmatch.fnmatch(f"python {v}", only) for v in PYTHONS):
        yield from others(pythons)


def _one(cell: Cell, folder: Path, recipes: str, expected: Report) -> bool:
    """Build in a cell and say what came of it; whether that is what was expected."""
    if cell.missing:
        print(f"skipped  {cell.name}: {cell.missing}", flush=True)
        return True
    try:
        found = measured(cell, folder, recipes)
    except RuntimeError as error:
        print(f"FAILED   {cell.name}: {error}", flush=True)
        return False
    lines = differences(expected, found)
    print(f"{'DIFFERS' if lines else 'same'}{'':<{2 if lines else 5}}{cell.name}: {_said(found)}", flush=True)
    for line in lines:
        print(f"         {line}", flush=True)
    return not lines


def _said(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())


if __name__ == "__main__":
    sys.exit(main())
