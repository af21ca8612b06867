"""Carrying out a plan: outputs written in one pass each, and held to what was expected."""

from builder.build.carry_out import Build, build
from builder.build.expect import Built
from builder.build.recipes import build_recipe
from builder.build.verify import verify

__all__ = ["Build", "Built", "build", "build_recipe", "verify"]
