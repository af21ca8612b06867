"""Model checkpoints from Python: opened, inspected, compared, and built from recipes.

    from ckpt_build import Workspace

    work = Workspace()
    report = work.inspect("dirty.ckpt")
    recipe = work.load("demo.toml")
    result = work.build(recipe)

`Workspace` is where all of it begins; docs/python.md shows the rest. What fails raises a `CkptError`, whose
`problems` say what, where and what to do, and whose `str()` is all of that as a person reads it. Nothing
here prints, changes the environment or the settings of torch, handles signals, or leaves threads behind.
Whatever does not lie in this package may change without notice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_build.home import use_our_own

use_our_own()

if TYPE_CHECKING:
    from ckpt_build.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        # Loaded when it is asked for: the command, which is in this package too, starts without it.
        if name.startswith("_") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("ckpt_build.api"), name)

    def __dir__() -> list[str]:
        return importlib.import_module("ckpt_build.api").__all__
