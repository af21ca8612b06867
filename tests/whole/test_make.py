"""What `make` would run."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.help.building import ROOT


def commands(target: str) -> list[str]:
    """The lines of a target in a fresh clone, none of which is run."""
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return made.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_demo_installs_what_it_needs_and_no_more() -> None:
    installs = [line for line in commands("demo") if " install " in line]
    assert installs and not any("dev" in line for line in installs)
    (torch,) = [line for line in installs if line.endswith(" torch")]
    assert ("https://download.pytorch.org/whl/cpu" in torch) == (sys.platform == "linux")
    assert "--index-url" not in torch.split(), "the usual index goes on serving all else"
    assert [line for line in commands("test") if "'.[dev]'" in line]
