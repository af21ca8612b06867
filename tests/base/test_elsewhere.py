"""Systems without the locks and the calls of Linux: what is made is the same."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.help.building import ROOT, Folder

# As on Windows: no locks, no positioned reads and writes, no folders held open, no nameless files.
WITHOUT = """
import os, sys
sys.modules["fcntl"] = None
for name in ("preadv", "pread", "pwritev", "pwrite", "O_TMPFILE", "posix_fadvise", "fstatvfs"):
    delattr(os, name)
os.supports_dir_fd = set()
"""


def test_a_build_without_them(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path).tiny()
    other = folder.beside("other", store="other-store")
    folder.build()
    (other / "set").mkdir()
    earlier = "".join(
        f"assert run({command.split()}) == 0\n"
        for command in (
            "build tiny.toml",
            "build tiny.toml",
            "extract tiny.safetensors VAE -o v.safetensors",
            "prune dirty.ckpt",
        )
    )
    last = ("convert", "tiny.safetensors", "-o", "set/x.safetensors.index.json")
    said = other.process(*last, before=WITHOUT + earlier)
    assert said.code == 0, said.err
    assert (other / "tiny.safetensors").read_bytes() == (folder / "tiny.safetensors").read_bytes()
    assert not [p for p in other.path.rglob("*") if ".ckpt-" in p.name]


def test_only_the_disk_knows_of_locks_and_positions() -> None:
    """Every other module goes through `builder.base.disk`."""
    wrong = []
    for path in sorted((ROOT / "builder").rglob("*.py")):
        if path.name == "disk.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(a.name in ("fcntl", "msvcrt") for a in node.names):
                wrong.append(f"{path}: fcntl")
            if isinstance(node, ast.Attribute) and node.attr in ("pwrite", "preadv", "pread", "O_TMPFILE"):
                wrong.append(f"{path}:{node.lineno}: {node.attr}")
    assert not wrong
