"""Where a component goes that becomes a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from builder.base.errors import Problem, UsageError
from builder.build import Built
from builder.models.catalog import PARTS
from builder.models.identity import Match
from builder.models.parts import kind
from builder.recipe import Pick
from builder.recipe.names import Target, free_name, recipe_name, stem
from builder.toolkit.command_recipe import CommandRecipe, output_keys, output_path, vacant
from builder.workspace import Workspace


def target_of(
    file: Path, match: Match, cls: str, output: Target | None, form: str | None, workspace: Workspace
) -> tuple[Path, Callable[[Built], Path] | None]:
    """The file to write, and how it is named once its metric is known, if it is named by that.

    What has the name already stays, and serves where it is the same.
    """
    if output is not None and not output.folder:
        path = output_path(output.path, [file], folders=True)
        if form is not None and path.suffix != f".{form}":
            fact = f"`--format {form}` and `{path.name}` say different formats"
            raise UsageError(Problem(fact, hint="leave one of the two out"))
        return path, None
    folder = output.path if output is not None else file.parent
    average = "-ema" if match.component.cls != cls else ""
    scale = workspace.catalog.scales.get(cls)
    suffix = f".{kind(cls) if scale else cls}.{form or 'safetensors'}".lower()

    def named(built: Built) -> Path:
        digits = built.metric.split("/")[PARTS.index(scale.part)] if scale and built.metric else ""
        known = f"-{digits}" if digits.isdigit() else ""
        return vacant(folder / f"{stem(file)}{average}{known}{suffix}", built, workspace.store, suffix)

    return free_name(folder / f"{stem(file)}{average}{suffix}", suffix), named


def extraction(
    file: Path, match: Match, cls: str, fixes: Sequence[str] = (), **output: str | None
) -> CommandRecipe:
    """The recipe of a component of a file as a file of its own; `output` as for `output_keys`."""
    name = recipe_name(file)
    pick = Pick(cls, name, None if match.component.cls == cls else match.component.name)
    keys = output_keys(**output)
    return CommandRecipe(
        f"{name}.{kind(cls).lower()}", {name: file}, new=cls, components={cls: pick}, fixes=fixes, output=keys
    )
