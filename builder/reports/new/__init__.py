"""Recipes for models that exist: what they are made of is found, and written down."""

from builder.reports.new.describe import Draft, describe
from builder.reports.new.merge_text import left_over, summed
from builder.reports.new.new_json import to_json
from builder.reports.new.recipe_text import write

__all__ = ["Draft", "describe", "left_over", "summed", "to_json", "write"]
