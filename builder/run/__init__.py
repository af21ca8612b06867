"""Carrying out a plan: components are made, outputs assembled, what was expected compared."""

from builder.run.build import Build, build
from builder.run.expect import Built
from builder.run.sources import resolve_sources
from builder.run.verify import verify

__all__ = ["Build", "Built", "build", "resolve_sources", "verify"]
