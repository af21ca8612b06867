"""Imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "builder"

# From the ground up; a module may import from its left and from every line above.
LAYERS: list[list[str]] = [
    ["errors", "toml", "braces", "tensors", "progress", "digests", "numeric"],
    ["layouts", "formats", "fetch", "hashes", "store", "sources"],
    ["catalog", "identify", "scan", "metric"],
    ["fixes", "merges", "lora", "operations", "samples"],
    ["profiles", "recipe", "lock", "plan"],
    ["explain", "run", "quick", "parts", "convert", "report", "diff", "author", "prune", "watch"],
    ["demo", "cli"],
]
ORDER = {name: index for index, name in enumerate(n for layer in LAYERS for n in layer)}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in found if name.startswith("builder.")}


def _modules() -> list[tuple[str, Path]]:
    files = sorted(ROOT.rglob("*.py"))
    return [(f.relative_to(ROOT).with_suffix("").parts[0], f) for f in files]


def test_imports_go_down_only() -> None:
    wrong = []
    for module, path in _modules():
        if module in {"__init__", "__main__"}:
            continue
        assert module in ORDER, f"{module} has no layer"
        wrong += [
            f"{path.name}: {module} imports {name}"
            for name in _imports(path)
            if name != module and name in ORDER and ORDER[name] > ORDER[module]
        ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints_or_exits() -> None:
    speaking = {"print", "sys.exit", "exit", "os._exit"}
    wrong = [
        f"{path}:{node.lineno}"
        for module, path in _modules()
        if module not in {"cli", "__main__"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in speaking
    ]
    assert not wrong, "\n".join(wrong)
