"""Recipes of other programs, brought in: what metadata, graphs and configurations say of a merge."""

from builder.reports.imports.read import is_text, read_recipe
from builder.reports.imports.sketch import Sketch
from builder.reports.imports.sketch_text import write

__all__ = ["Sketch", "is_text", "read_recipe", "write"]
