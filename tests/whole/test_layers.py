"""Imports go down only, and only the command line speaks."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2] / "builder"
FACE = ROOT.parent / "ckpt_build"  # which stands on the house, and is for others to look at

# The rooms from the ground up: a module may import from its own room and from those before it.
ROOMS = [
    *("base", "tensors", "formats", "models", "operations"),
    *("store", "recipe", "sources", "plan", "workspace", "build"),
    *("reports", "toolkit"),
    "web",
    "cli",
]

# Imports that still go up. There are to be fewer of them.
KNOWN: set[tuple[str, str]] = set()


def _imports(path: Path) -> set[str]:
    """The modules of `builder` that a module names in imports, wherever they stand."""
    return {name.removeprefix("builder.") for name in _all_imports(path) if name.startswith("builder.")}


def _all_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "builder":
            found |= {f"builder.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _modules() -> list[tuple[str, Path]]:
    """Every module by its name below `builder`."""
    files = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or not p.stem.startswith("__"))
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts), f) for f in files]


def _room(module: str) -> int:
    return ROOMS.index(module.partition(".")[0])


def test_every_module_is_in_a_room() -> None:
    assert not {module.partition(".")[0] for module, _ in _modules()} - set(ROOMS)


def test_the_guide_names_every_module_and_no_other() -> None:
    guide = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room, named in re.findall(r"^\| `(\w+)/` \| (`.*?`) \|", guide, re.MULTILINE):
        modules = {p.stem for p in (ROOT / room).glob("[!_]*") if p.is_dir() or p.suffix == ".py"}
        said = re.findall(r"`(\w+\*?)/?`", named)
        assert not {m for m in modules if not any(fnmatch(m, name) for name in said)}, room
        assert not {name for name in said if not any(fnmatch(m, name) for m in modules)}, room


def test_imports_go_down_only() -> None:
    modules = _modules()
    names = {r for n, _ in modules for r in (n, n.removesuffix(".__init__"))}
    up = {
        (module, name)
        for module, path in modules
        for name in _imports(path) & names
        if _room(name) > _room(module)
    }
    assert up == KNOWN


def test_only_the_command_line_prints_or_exits() -> None:
    speaking = {"print", "sys.exit", "exit", "os._exit"}
    wrong = [
        f"{path}:{node.lineno}"
        for module, path in [*_modules(), *((f.stem, f) for f in sorted(FACE.rglob("*.py")))]
        if not module.startswith("cli.")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in speaking
    ]
    assert not wrong, "\n".join(wrong)


def test_the_face_is_on_top_and_knows_no_command_line() -> None:
    """Nothing of the house looks at it, and of what prints it knows the way in alone."""
    assert not [m for m, path in _modules() if any(n.startswith("ckpt_build") for n in _all_imports(path))]
    speaking = {
        (path.stem, name)
        for path in sorted(FACE.rglob("*.py"))
        for name in _imports(path)
        if name.partition(".")[0] in ("cli", "web", "__main__")
    }
    assert speaking == {("__main__", "__main__")}


def test_what_is_for_other_programs_knows_the_face_alone() -> None:
    found = {
        name
        for path in (ROOT.parent / "integrations").rglob("*.py")
        for name in _all_imports(path)
        if name.partition(".")[0] in ("builder", "ckpt_build", "components_db")
    }
    assert found == {"ckpt_build"}
