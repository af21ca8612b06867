"""Carrying out a plan: components are made, outputs assembled, what was expected compared."""

from builder.run.build import Build, Built, build

__all__ = ["Build", "Built", "build"]
