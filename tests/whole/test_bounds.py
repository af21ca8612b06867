"""What `make test-oldest` installs are the lowest versions that the package allows."""

from __future__ import annotations

import re

import tomli

from tests.help.building import ROOT


def test_the_oldest_versions_are_the_declared_ones() -> None:
    declared = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (ROOT / "constraints-oldest.txt").read_text()
    pinned = re.findall(r"^([\w-]+)==([\d.]+)", text, re.MULTILINE)
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in declared]

    def spelt(name: str, version: str) -> tuple[str, str]:
        return name.replace("_", "-"), re.sub(r"(\.0)+$", "", version)

    said = {spelt(b[1], b[2]) for b in bounds if b is not None}
    assert len(bounds) == len(said)
    assert said - {("torch", "2.4")} == {spelt(*p) for p in pinned} - {("torch", "2.13")}
