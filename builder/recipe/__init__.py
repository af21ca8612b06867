"""Recipes: the language, its reader, its model and its schema."""

from builder.recipe.check import slot_problems
from builder.recipe.read import load_recipe, parse_recipe
from builder.recipe.recipe import Expect, FromBase, NewBase, Output, Pick, Recipe, Source, Step

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
