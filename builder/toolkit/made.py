"""What a build made, told to people and to programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from builder.base.errors import printable, problem_data
from builder.base.progress import Reporter, human_bytes
from builder.base.words import counted, listed
from builder.build import Build
from builder.build.many import Outcome
from builder.plan import OutputJob, Plan


def to_json(made: Build) -> dict[str, Any]:
    """The outputs, what was made for them and what fixes changed, as plain values."""
    return {
        "schema": 1,
        "outputs": [
            {
                "name": b.name,
                "path": str(b.path),
                "state": b.state,
                "size": b.size,
                "sha256": b.sha256,
                "tensor_digest": b.tensor_digest,
                "metric": b.metric or None,
                "statement": str(b.statement) if b.statement is not None else None,
            }
            for b in made.outputs
        ],
        "made": sorted(made.made),
        "changes": {k: list(v) for k, v in sorted(made.changes.items())},
    }


def to_text(made: Build) -> str:
    """Two lines an output, and one more of its statement."""
    lines = []
    for b in made.outputs:
        metric = f"  ({b.metric})" if b.metric else ""
        lines += [
            f"{b.state:<9}  {printable(str(b.path))}  {human_bytes(b.size)}{metric}",
            f"  sha256 {b.sha256}",
        ]
        if b.statement is not None:
            lines.append(f"  statement {printable(b.statement.name)}")
    return "\n".join(lines)


def several_to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What became of several recipes, as plain values."""
    return {
        "recipes": [
            {
                "recipe": str(o.path),
                "state": o.state,
                **({k: v for k, v in to_json(o.made).items() if k != "schema"} if o.made else {}),
                "errors": [problem_data(p) for p in (o.error.problems if o.error is not None else ())],
            }
            for o in outcomes
        ]
    }


def several_to_text(outcomes: Sequence[Outcome]) -> str:
    """The outputs of several recipes, and a line for each that has none, and one for all."""
    lines = []
    for o in outcomes:
        if o.made is not None:
            lines.append(to_text(o.made))
        if o.state != "built":
            lines.append(f"{o.state:<9}  {printable(str(o.path))}")
    states = [o.state for o in outcomes]
    counts = [f"{states.count(s)} {s}" for s in ("built", "failed", "not begun") if s in states]
    return "\n".join([*lines, f"{counted(len(outcomes), 'recipe')}: {', '.join(counts)}"])


def note_left_out(plan: Plan, reporter: Reporter) -> None:
    """Say what of a base will not be in the outputs that are to be written, a note each reason."""
    pending = {
        n.job.output.file for n in plan.outputs() if n.state != "unchanged" and isinstance(n.job, OutputJob)
    }
    several = len(plan.outputs()) > 1
    for left in (found for found in plan.left_out if found.output in pending):
        where = f" for `{left.output}`" if several else ""
        for reason, names in left.names.items():
            size = human_bytes(left.sizes[reason])
            reporter.note(
                f"left out of `{left.base}`{where}: {reason}, {counted(len(names), 'tensor')}, {size}"
            )
    for node in plan.outputs():
        assert isinstance(node.job, OutputJob)
        if node.state != "unchanged" and (lacking := node.job.container.lacking):
            way = "`tokenizer` under [output] names a folder that has it"
            reporter.note(without_tokenizer(lacking if node.job.container.vocabulary else (), way))


def without_tokenizer(lacking: tuple[str, ...], way: str) -> str:
    """That a folder has none of its tokenizers, or lacks these, and the way to one."""
    named = listed(lacking) if lacking else "a tokenizer"
    return f"without {named}, whose vocabulary no checkpoint holds: {way}"


def note_steps(plan: Plan, reporter: Reporter, options: Mapping[str, str] = MappingProxyType({})) -> None:
    """Say what steps leave alone, a note each, unless nothing is to be written.

    `options` are the words of the command line for those of a recipe.
    """
    if any(n.state != "unchanged" for n in plan.outputs()):
        for note in plan.notes:
            for key, option in options.items():
                note = note.replace(f"`{key}`", f"`{option}`")
            reporter.note(note)


def note_changes(made: Build, reporter: Reporter) -> None:
    """Say what fixes changed, a note each."""
    for label, changes in made.changes.items():
        for change in changes:
            reporter.note(f"{label}: {change}")
