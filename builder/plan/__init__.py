"""What a build would do, made without reading tensor data."""

from builder.plan.graph import ComponentJob, Node, OutputJob, Plan, StepJob, component_specs, joined
from builder.plan.resolve import make_plan

__all__ = [
    "ComponentJob",
    "Node",
    "OutputJob",
    "Plan",
    "StepJob",
    "component_specs",
    "joined",
    "make_plan",
]
