"""Recipes that touch every computing path, built wherever their outputs must be the same."""
