"""What the documents show of Python is what it does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import ckpt_build
from ckpt_build import api
from tests.help.building import ROOT
from tests.help.interactive import alone, cell, session

DOCUMENT = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))
MOST = 40_000  # bytes of the notebook


def test_every_session_of_the_document(tmp_path: Path) -> None:
    """From top to bottom, in one folder that holds the demo's files."""
    text, names = DOCUMENT.read_text(encoding="utf-8"), dict[str, Any]()
    ckpt_build.write_demo(tmp_path / "demo")
    with alone(tmp_path / "demo", tmp_path / "store"):
        for block in BLOCK.findall(text):
            shown = session(block, names)
            if UPDATE:
                text = text.replace(f"```pycon\n{block}```", f"```pycon\n{shown}```", 1)
            else:
                assert shown == block
    if UPDATE:
        DOCUMENT.write_text(text, encoding="utf-8")


def test_the_programs_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt_build.write_demo(tmp_path / "demo")
    with alone(tmp_path / "demo", tmp_path / "store"):
        for path in (ROOT / "README.md", DOCUMENT):
            for program in PROGRAM.findall(path.read_text(encoding="utf-8")):
                exec(program, {})
    assert "a896a1020128b3793d30b5e298222c623a10e87221adc1d98c5c2ad008b1226d" in capsys.readouterr().out


def test_the_document_names_all_that_is_promised() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    methods = [n for n in vars(ckpt_build.Workspace) if not n.startswith("_")]
    named = set(re.findall(r"\w+", text))
    assert not [n for n in [*api.__all__, *methods] if n not in named]
    assert not [n for n in api.__all__ if not getattr(ckpt_build, n).__doc__]
    assert set(api.__all__) <= set(dir(ckpt_build))


def test_the_notebook(tmp_path: Path) -> None:
    """Its cells, run in their order in one process, give the outputs that are in it."""
    notebook, names, count = json.loads(NOTEBOOK.read_text(encoding="utf-8")), dict[str, Any](), 0
    with alone(tmp_path, tmp_path / "store"):
        for each in (c for c in notebook["cells"] if c["cell_type"] == "code"):
            count += 1
            outputs = cell("".join(each["source"]), names)
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
            if UPDATE:
                each |= {"execution_count": count, "outputs": outputs}
            assert (each["execution_count"], each["outputs"]) == (count, outputs)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if UPDATE:
        NOTEBOOK.write_text(text, encoding="utf-8")
    assert NOTEBOOK.read_text(encoding="utf-8") == text and len(text) < MOST
    assert count > 5 and str(tmp_path) not in text and "/tmp" not in text and str(Path.home()) not in text
