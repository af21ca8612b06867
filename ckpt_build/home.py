"""Whose `builder` it is: the packages beside this one, whatever else on the path has their names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
OURS = ("components_db", "builder")


def use_our_own() -> None:
    """Load the packages that lie beside this one, so that every later import of their names means them.

    A package is looked up on the path once, its modules in the package itself: nothing of the path has to
    change. Raises ImportError where a process has loaded another package of such a name before.
    """
    for name in OURS:
        place = HOME / name
        loaded = sys.modules.get(name)
        if loaded is not None:
            if place not in map(_resolved, getattr(loaded, "__path__", ())):
                raise ImportError(_taken(name, getattr(loaded, "__file__", None)), name=name)
            continue
        spec = importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise


def _resolved(folder: str) -> Path:
    return Path(folder).resolve()


def _taken(name: str, file: str | None) -> str:
    return (
        f"this process has loaded another package `{name}` ({file or 'without a file'}), "
        "and ckpt-build has one of that name: import `ckpt_build` before it, or run `ckpt` on its own"
    )
