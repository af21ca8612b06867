"""A plan in words, as JSON, and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from builder.base.errors import printable
from builder.base.page import columns
from builder.base.progress import human_bytes
from builder.plan import ComponentJob, Node, OutputJob, Plan, StepJob
from builder.plan.at_once import written_at_once
from builder.plan.graph import TO_DO, total
from builder.recipe import Recipe
from builder.sources.job import SourceJob


def to_text(plan: Plan) -> str:
    """One line a step: what happens, to what, how much of it, from what, and why."""
    rows = [_row(plan, node) for node in plan.by_kind()]
    lines = columns(rows, {2}) if rows else []
    reads, writes = totals(plan)
    if not any(n.state in TO_DO for n in plan):
        lines.append("nothing to do")
    else:
        lines.append(f"reads {_bytes(reads)}, writes {_bytes(writes)}")
    return "\n".join(lines)


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else human_bytes(count)


def totals(plan: Plan) -> tuple[int | None, int | None]:
    """Bytes to be read and to be written by the whole plan, None where some are not known yet.

    A component that is made goes straight into its output; what is stored is read from where it lies. What
    outputs that are written at once take alike is read once.
    """
    pending = {n.key: n for n in plan.outputs() if n.state != "unchanged"}
    read = [n.reads for n in plan if isinstance(n.job, SourceJob) and n.state in TO_DO]
    for keys in written_at_once(plan, list(pending)):
        used = [plan.nodes[k] for k in dict.fromkeys(i for key in keys for i in pending[key].job.inputs)]
        parts = [n for n in used if isinstance(n.job, ComponentJob)]
        made = [n for n in parts if n.state == "make"]
        read += [n.writes for n in parts if n.state != "make"]
        read += [None for n in made if n.reads is None]
        read += {taken: size for n in made for taken, size in n.takes.items()}.values()
    kept = [n for n in plan if isinstance(n.job, ComponentJob) and n.job.store and n.state == "make"]
    return total(read), total(n.writes for n in [*pending.values(), *kept])


def _row(plan: Plan, node: Node) -> tuple[str, str, str, str]:
    size = node.writes if isinstance(node.job, (ComponentJob, OutputJob)) else node.reads
    inputs = plan.inputs(node.key) if isinstance(node.job, StepJob) else []
    made_of = f"of {', '.join(n.label for n in inputs)}; " if inputs else ""
    return (
        node.state,
        printable(node.label),
        _bytes(size) if size != 0 else "",
        printable(f"{made_of}{node.why}"),
    )


def to_json(plan: Plan, recipes: Sequence[Recipe] = ()) -> dict[str, Any]:
    """The plan as data, schema 1: steps in an order in which they can be done; of one or several recipes."""
    reads, writes = totals(plan)
    return {
        "schema": 1,
        **({"recipes": [r.name for r in recipes]} if recipes else {"recipe": plan.recipe.name}),
        "reads": reads,
        "writes": writes,
        "steps": [
            {
                "key": n.key,
                "label": n.label,
                "kind": n.kind,
                "state": n.state,
                "why": n.why,
                "action": n.action,
                "inputs": list(n.job.inputs),
                "reads": n.reads,
                "writes": n.writes,
                **_details(n),
            }
            for n in plan.by_kind()
        ],
        "notes": list(plan.notes),
        "left_out": [
            {
                "base": left.base,
                "output": left.output,
                "reasons": {
                    reason: {"keys": len(names), "bytes": left.sizes[reason]}
                    for reason, names in left.names.items()
                },
            }
            for left in plan.left_out
        ],
    }


def _details(node: Node) -> dict[str, Any]:
    job = node.job
    if isinstance(job, SourceJob):
        return {"file": job.file, "sha256": node.action}
    if isinstance(job, StepJob):
        how = {"arithmetic": job.arithmetic, "precision": job.precision}
        return {"op": job.op, "class": job.cls, "params": dict(job.params), **how}
    if isinstance(job, ComponentJob):
        digest = node.made.digest if node.made is not None else None
        return {"class": job.cls, "digest": digest, **job.params()}
    return {"file": job.output.file, "architecture": job.architecture.name}


def to_dot(plan: Plan) -> str:
    """The plan in Graphviz's language."""
    shapes = {"source": "folder", "step": "ellipse", "component": "box", "output": "note"}
    lines = ["digraph plan {", "  rankdir=LR;"]
    for node in plan.by_kind():
        style = "filled" if node.state in TO_DO else "solid"
        label = _quoted(f"{node.label}\n{node.state}")
        lines.append(f"  {_quoted(node.key[:12])} [label={label}, shape={shapes[node.kind]}, style={style}];")
    lines += [
        f"  {_quoted(i.key[:12])} -> {_quoted(n.key[:12])};"
        for n in plan.by_kind()
        for i in plan.inputs(n.key)
    ]
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    escaped = printable(text.replace("\n", "\0")).replace("\\x00", "\0")
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"').replace("\0", "\\n") + '"'


def to_mermaid(plan: Plan) -> str:
    """The plan as a Mermaid flowchart, which Markdown viewers draw."""
    names = {n.key: f"n{i}" for i, n in enumerate(plan.by_kind())}
    lines = ["flowchart LR"]
    for node in plan.by_kind():
        label = printable(node.label).replace('"', "#quot;")
        lines.append(f'  {names[node.key]}["{label}<br/><i>{node.state}</i>"]')
    lines += [f"  {names[i.key]} --> {names[n.key]}" for n in plan.by_kind() for i in plan.inputs(n.key)]
    return "\n".join(lines)
