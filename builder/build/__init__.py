"""Carrying out a plan: components are made, outputs assembled, what was expected compared."""

from builder.build.carry_out import Build, build
from builder.build.expect import Built
from builder.build.verify import verify

__all__ = ["Build", "Built", "build", "verify"]
