"""What a build would do, made without reading tensor data."""

from builder.plan.model import ComponentJob, Node, OutputJob, Plan, SourceJob, StepJob, component_specs
from builder.plan.resolve import make_plan
from builder.plan.sources import OpenSource, Sources

__all__ = [
    "ComponentJob",
    "Node",
    "OpenSource",
    "OutputJob",
    "Plan",
    "SourceJob",
    "Sources",
    "StepJob",
    "component_specs",
    "make_plan",
]
