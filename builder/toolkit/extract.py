"""Where a component goes that becomes a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builder.base.errors import Problem, UsageError
from builder.models.catalog import PARTS, Catalog
from builder.models.identify import Match
from builder.models.parts import kind
from builder.recipe.names import free_name, stem
from builder.toolkit.quick import output_path


def target_of(
    file: Path, match: Match, cls: str, output: Path | None, form: str | None, catalog: Catalog
) -> Path | Callable[[str], Path]:
    """The file to write, or how it is named once its metric is known."""
    if output is not None and not output.is_dir():
        output_path(output, [file])
        if form is not None and output.suffix != f".{form}":
            fact = f"`--format {form}` and `{output.name}` say different formats"
            raise UsageError(Problem(fact, hint="leave one of the two out"))
        return output
    folder = output if output is not None else file.parent
    average = "-ema" if match.component.cls != cls else ""
    scale = catalog.scales.get(cls)
    suffix = f".{kind(cls) if scale else cls}.{form or 'safetensors'}".lower()

    def named(metric: str) -> Path:
        digits = metric.split("/")[PARTS.index(scale.part)] if scale and metric else ""
        known = f"-{digits}" if digits.isdigit() else ""
        return free_name(folder / f"{stem(file)}{average}{known}{suffix}", suffix)

    return named
