"""What a build would do: drawn, and in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builder.base.words import counted
from builder.plan import ComponentJob, Node, OutputJob, Plan
from builder.plan.explain import totals
from builder.toolkit.command_recipe import CommandRecipe
from builder.web import drawing
from builder.web.html import Content, Markup, join, problem, size, table, tag, ticked
from builder.web.site import Site


def plan_of(site: Site, command: CommandRecipe, goal: Path) -> Plan:
    """The plan of a command's recipe, without network; raises CkptError."""
    with site.workspace() as workspace, workspace.sources() as sources:
        recipe = _named(command, goal).recipe(site.catalog)
        return workspace.plan(recipe, sources, place=lambda _: goal)


def recipe_text(command: CommandRecipe, goal: Path) -> str:
    """The recipe as it stands beside the file that it makes."""
    return _named(command, goal).text(goal.parent)


def _named(command: CommandRecipe, goal: Path) -> CommandRecipe:
    return replace(command, output={"file": goal.name, **command.output})


def preview(plan: Plan) -> Markup:
    """A plan: the graph, each step in words, and what is left out."""
    rows = [
        (node.label, node.kind, tag("span", node.state, class_=f"state {node.state}"), _size(node), node.why)
        for node in plan.by_kind()
    ]
    left = [
        tag(
            "li",
            f"left out of {found.base}: {reason}, {counted(len(names), 'tensor')}, ",
            size(found.sizes[reason]),
        )
        for found in plan.left_out
        for reason, names in found.names.items()
    ]
    reads, writes = totals(plan)
    return join(
        tag("h2", "The plan"),
        [problem(p, "warning") for p in plan.warnings],
        tag("p", "Reads ", size(reads), ", writes ", size(writes), "."),
        drawing.plan(plan),
        table(("Step", "Kind", "State", "Size", "Why"), rows, caption="The plan, step by step", numbers=(3,)),
        tag("ul", left, [tag("li", ticked(note)) for note in plan.notes]) if left or plan.notes else None,
    )


def _size(node: Node) -> Content:
    count = node.writes if isinstance(node.job, (ComponentJob, OutputJob)) else node.reads
    return size(count) if count else None
