"""All that the package promises, in one place."""

from collections.abc import Mapping
from pathlib import Path

from builder import __version__
from builder.base.errors import (
    CatalogError,
    CkptError,
    ExitCode,
    FetchError,
    LockError,
    OutputError,
    Place,
    Problem,
    RecipeError,
    SourceError,
    UnreproducibleError,
    UsageError,
)
from builder.base.parallel import Cancelled
from ckpt_build.checkpoint import Checkpoint, Tensor
from ckpt_build.recipe import Recipe
from ckpt_build.results import (
    Collected,
    Component,
    Difference,
    Inspection,
    Item,
    Node,
    Outcome,
    Output,
    Plan,
    Progress,
    Result,
    Results,
    Share,
)
from ckpt_build.store import Store
from ckpt_build.workspace import Workspace

__all__ = [
    "Cancelled",
    "CatalogError",
    "Checkpoint",
    "CkptError",
    "Collected",
    "Component",
    "Difference",
    "ExitCode",
    "FetchError",
    "Inspection",
    "Item",
    "LockError",
    "Node",
    "Outcome",
    "Output",
    "OutputError",
    "Place",
    "Plan",
    "Problem",
    "Progress",
    "Recipe",
    "RecipeError",
    "Result",
    "Results",
    "Share",
    "SourceError",
    "Store",
    "Tensor",
    "UnreproducibleError",
    "UsageError",
    "Workspace",
    "__version__",
    "write_demo",
]


def write_demo(folder: str | Path) -> Mapping[str, str]:
    """Write the files of `ckpt demo` into a folder: what each is, by name.

    A dirty training checkpoint, two VAEs, and a recipe that makes a clean model of them, all miniature.
    Raises OutputError where something else has one of their names.
    """
    from builder.toolkit.demo import write_sources

    return write_sources(Path(folder))
