"""The demo lives beside what a folder holds, and replaces nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.base.errors import OutputError
from builder.toolkit.demo import PRODUCTS, use_other_vae, write_sources


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
    use_other_vae(tmp_path)
    assert own.read_bytes() == good
    for name in PRODUCTS:
        (tmp_path / name).write_text("made")
    write_sources(tmp_path)
    assert (tmp_path / "good.vae.safetensors").read_bytes() == good
