"""What the work found and made, as the plain values that are given out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from builder.build import Build, many
from builder.plan import ComponentJob, OutputJob, StepJob, explain
from builder.plan import Node as PlanNode
from builder.plan import Plan as MadePlan
from builder.recipe import recipe as model
from builder.reports.inspect import Report
from builder.reports.inspect import render as inspection_to_text
from builder.reports.inspect import to_json as inspection_to_json
from builder.sources.job import SourceJob
from builder.sources.opened import Sources
from builder.toolkit.made import several_to_json, several_to_text, to_json, to_text
from ckpt_build.listening import Listener
from ckpt_build.results import Component, Inspection, Node, Outcome, Output, Plan, Result, Results, Share

KINDS: dict[type, Literal["source", "step", "component", "output"]] = {
    SourceJob: "source",
    StepJob: "step",
    ComponentJob: "component",
    OutputJob: "output",
}


def inspection_of(report: Report, full: bool) -> Inspection:
    """What an inspection found."""
    identity = report.identity
    parts = [
        Component(
            p.match.component.name,
            p.match.component.cls,
            p.match.prefix,
            p.tensors,
            p.parameters,
            p.bytes,
            dict(p.dtypes),
            p.digest,
            p.known,
        )
        for p in report.parts
    ]
    ema, junk, unknown = (Share(s.keys, s.bytes) for s in (report.ema, report.junk, report.unknown))
    return Inspection(
        Path(report.path),
        report.container,
        report.size,
        identity.architecture,
        identity.intact,
        report.sound,
        report.kind and report.kind.kind,
        tuple(parts),
        report.metric.text if report.metric else None,
        ema,
        junk,
        unknown,
        report.pruned,
        report.prediction.kind,
        report.faults,
        dict(report.metadata),
        dict(report.hashes),
        inspection_to_json([report])["files"][0],
        inspection_to_text(report, full=full),
    )


def plan_of(
    made: MadePlan, sources: Sources, listener: Listener, several: Sequence[model.Recipe] = ()
) -> Plan:
    """A plan of one recipe, or one of `several`."""
    nodes = tuple(_node(n, sources) for n in made.by_kind())
    reads, writes = explain.totals(made)
    return Plan(
        ", ".join(r.name for r in several or [made.recipe]),
        nodes,
        reads,
        writes,
        tuple(made.notes),
        tuple(listener.warnings),
        explain.to_json(made, several),
        explain.to_text(made),
    )


def _node(node: PlanNode, sources: Sources) -> Node:
    job, path, sha256 = node.job, None, None
    if isinstance(job, SourceJob):
        found, sha256 = sources.find(job), node.action
        path = found.path if found is not None else None
    elif isinstance(job, OutputJob):
        path = job.target
    return Node(
        node.key,
        node.label,
        KINDS[type(job)],
        node.state,
        node.why,
        tuple(job.inputs),
        node.reads,
        node.writes,
        path,
        sha256,
    )


def results_of(outcomes: Sequence[many.Outcome], listener: Listener) -> Results:
    """What became of several recipes."""
    return Results(
        tuple(
            Outcome(
                str(o.path),
                o.state,
                result_of(o.made) if o.made is not None else None,
                o.error.problems if o.error is not None else (),
            )
            for o in outcomes
        ),
        tuple(listener.notes),
        tuple(listener.warnings),
        several_to_json(outcomes),
        several_to_text(outcomes),
    )


def result_of(made: Build, listener: Listener | None = None) -> Result:
    """What a build made, and what was said meanwhile if that is all its own."""
    return Result(
        tuple(
            Output(b.name, b.path, b.state, b.size, b.sha256, b.tensor_digest, b.metric or None, b.statement)
            for b in made.outputs
        ),
        tuple(sorted(made.made)),
        dict(sorted(made.changes.items())),
        dict(made.sources),
        tuple(listener.notes) if listener is not None else (),
        tuple(listener.warnings) if listener is not None else (),
        to_json(made),
        to_text(made),
    )
