"""Recipes: the language, its reader, its model and its schema."""

from builder.recipe.check import slot_problems
from builder.recipe.model import Expect, FromBase, NewBase, Output, Pick, Recipe, Source, Step
from builder.recipe.read import load_recipe, parse_recipe

__all__ = [
    "Expect",
    "FromBase",
    "NewBase",
    "Output",
    "Pick",
    "Recipe",
    "Source",
    "Step",
    "load_recipe",
    "parse_recipe",
    "slot_problems",
]
