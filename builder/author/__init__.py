"""Recipes for models that exist: what they are made of is found, and written down."""

from builder.author.explain import Draft, describe
from builder.author.text import write

__all__ = ["Draft", "describe", "write"]
