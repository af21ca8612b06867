"""Drawings as SVG, made here: no script and no style in them, and words for those who do not see them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise

from builder.base.progress import human_bytes
from builder.plan import Node, Plan
from builder.plan.graph import TO_DO
from builder.web.html import Markup, tag, visible

_NUMBERS = count()

Bar = tuple[str, Sequence[tuple[str, int, str]]]  # a label, and pieces: name, amount, class


def drawing(
    title: str, description: str, width: float, height: float, *content: Markup, **more: str
) -> Markup:
    """An image with a title and a description."""
    mark = next(_NUMBERS)
    return tag(
        "svg",
        tag("title", title, id=f"t{mark}"),
        tag("desc", description, id=f"d{mark}"),
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"t{mark} d{mark}",
        **more,
    )


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars of bytes, each of pieces one after the other."""
    most = max((sum(n for _, n, _ in pieces) for _, pieces in rows), default=0) or 1
    drawn = [
        tag("div", tag("span", label), _bar(label, pieces, most), class_="bar") for label, pieces in rows
    ]
    kinds = dict.fromkeys(kind for _, pieces in rows for _, _, kind in pieces)
    keys = (tag("span", level(1.0, kind), kind, class_="key") for kind in kinds)
    return tag("figure", tag("figcaption", title, ": ", keys), drawn, class_="bars")


def _bar(label: str, pieces: Sequence[tuple[str, int, str]], most: int) -> Markup:
    drawn: list[Markup] = []
    x = 0.0
    for name, amount, kind in pieces:
        wide = 1000 * amount / most
        at = {"x": f"{x:.2f}", "y": 0, "width": f"{max(wide - 1, 0.5):.2f}", "height": 24}
        drawn.append(tag("rect", tag("title", f"{name}: {human_bytes(amount)}"), class_=kind, **at))
        x += wide
    said = ", ".join(f"{name} {human_bytes(n)}" for name, n, _ in pieces)
    return drawing(label, said, 1000, 24, *drawn, preserveAspectRatio="none")


def level(share: float, kind: str) -> Markup:
    """A bar that is filled to a share of 1; words beside it say the same."""
    return tag(
        "svg",
        tag("rect", width=100, height=10, class_="empty"),
        tag("rect", width=f"{100 * min(1.0, share):.2f}", height=10, class_=kind),
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="level",
    )


# -- the plan

BOX, HIGH, GAP, ROW = 210, 46, 70, 62  # of nodes, in pixels: width, height, and the distances between


def plan(found: Plan) -> Markup:
    """The plan as a graph, in layers from sources to outputs."""
    layers, before = _layers(found)
    at = {
        key: (x * (BOX + GAP), y * ROW + (max(map(len, layers)) - len(layer)) * ROW / 2)
        for x, layer in enumerate(layers)
        for y, key in enumerate(layer)
    }
    lines = [_edge(at[a], at[b]) for b, inputs in before.items() for a in inputs]
    lines += [_through(at[key]) for key in at if key not in found.nodes]
    boxes = [_box(node, *at[node.key]) for node in found]
    width = len(layers) * (BOX + GAP) - GAP if layers else 0
    height = max(map(len, layers), default=0) * ROW
    made_of = {n.key: ", ".join(i.label for i in found.inputs(n.key)) for n in found}
    said = "; ".join(
        f"{n.label}: {n.state}" + (f", of {made_of[n.key]}" if made_of[n.key] else "")
        for n in found.by_kind()
    )
    drawn = drawing("The plan", said, width, height, *lines, *boxes)
    return tag("div", drawn, class_="graph", tabindex=0, role="group", aria_label="The plan, drawn")


def _layers(found: Plan) -> tuple[list[list[str]], dict[str, dict[str, None]]]:
    """The nodes by how far they are from sources, near what they are made of; and the inputs of each.

    What is used further on has a place of its own in each layer between, so that no line runs behind a box.
    """
    import networkx as nx

    order = {key: index for index, key in enumerate(found.nodes)}
    depth = {k: d for d, generation in enumerate(nx.topological_generations(found.graph)) for k in generation}
    for key in reversed(list(nx.topological_sort(found.graph))):
        after = [depth[k] for k in found.graph.successors(key)]
        if after and found.nodes[key].job.inputs:  # as near as may be to what is made of it
            depth[key] = min(after) - 1
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    before: dict[str, dict[str, None]] = {}
    for key in sorted(depth, key=order.__getitem__):
        layers[depth[key]].append(key)
        for start in found.nodes[key].job.inputs:
            between = [f"{start} in {d}" for d in range(depth[start] + 1, depth[key])]
            for a, b in pairwise([start, *between, key]):
                before.setdefault(b, {})[a] = None
    for passing in (key for key in before if key not in depth):
        layers[int(passing.rpartition(" ")[2])].append(passing)
    for _ in range(2):
        for left, layer in pairwise(layers):
            rank = {key: index for index, key in enumerate(left)}

            def middle(key: str, rank: dict[str, int] = rank) -> float:
                near = [rank[i] for i in before.get(key, ()) if i in rank]
                return sum(near) / len(near) if near else 0.0

            layer.sort(key=middle)
    return layers, before


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    x, y, u, v = start[0] + BOX, start[1] + HIGH / 2, end[0], end[1] + HIGH / 2
    bend = (u - x) / 2
    return tag("path", d=f"M{x:g} {y:g}C{x + bend:g} {y:g} {u - bend:g} {v:g} {u:g} {v:g}", class_="edge")


def _through(start: tuple[float, float]) -> Markup:
    x, y = start[0], start[1] + HIGH / 2
    return tag("path", d=f"M{x:g} {y:g}H{x + BOX:g}", class_="edge")


def _box(node: Node, x: float, y: float) -> Markup:
    label = visible(node.label)
    label = label if len(label) <= 28 else f"{label[:27]}…"
    busy = node.state in TO_DO
    return tag(
        "g",
        tag("title", f"{node.label}: {node.state}. {node.why}"),
        tag(
            "rect",
            x=f"{x:g}",
            y=f"{y:g}",
            width=BOX,
            height=HIGH,
            rx=4,
            class_=f"box {node.kind}" + " busy" * busy,
        ),
        tag("text", label, x=f"{x + 10:g}", y=f"{y + 19:g}"),
        tag("text", f"{node.kind} · {node.state}", x=f"{x + 10:g}", y=f"{y + 36:g}", class_="state"),
    )
