"""The demo lives beside what a folder holds, and replaces nothing of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from builder.base.errors import OutputError
from builder.toolkit.demo import PRODUCTS, swap_vaes, write_sources
from tests.help.building import Folder


def test_what_is_there_stays(tmp_path: Path) -> None:
    names = [*write_sources(tmp_path / "whole"), *PRODUCTS]
    for name in names:
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text("the user's own")
        with pytest.raises(OutputError, match=f"{name}` exists already, and is none of the demo's"):
            write_sources(folder)
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, "the user's own")]


def test_a_demo_may_be_shown_again_where_it_was(tmp_path: Path) -> None:
    write_sources(tmp_path)
    good = (tmp_path / "good.vae.safetensors").read_bytes()
    own = tmp_path / "hard link"
    own.hardlink_to(tmp_path / "good.vae.safetensors")
    swap_vaes(tmp_path)
    assert own.read_bytes() == good
    for name in PRODUCTS:
        (tmp_path / name).write_text("made")
    write_sources(tmp_path)
    assert (tmp_path / "good.vae.safetensors").read_bytes() == good


def test_it_leaves_what_the_first_build_made(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    said = folder("demo", "left", "--json")
    assert said.code == 0, said.err
    built = [a["outputs"][0]["sha256"] for s in said.json["steps"] if "outputs" in (a := s["answer"])]
    first, _, other, *rest = built
    assert other != first and set(rest) == {first}
    assert hashlib.sha256((folder / "left/demo.safetensors").read_bytes()).hexdigest() == first
