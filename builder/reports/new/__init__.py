"""Recipes for models that exist: what they are made of is found, and written down."""

from builder.reports.new.describe import Draft, describe
from builder.reports.new.recipe_text import write

__all__ = ["Draft", "describe", "write"]
