"""Drawings as SVG, made here: no script and no style in them, and words for those who do not see them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise

from builder.base.progress import human_bytes
from builder.plan import Node, Plan
from builder.web.html import Markup, tag, visible

_NUMBERS = count()

Bar = tuple[str, Sequence[tuple[str, int, str]]]  # a label, and pieces: name, amount, class


def drawing(title: str, description: str, width: float, height: float, *content: Markup) -> Markup:
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
    )


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars of bytes, each of pieces one after the other."""
    most = max((sum(n for _, n, _ in pieces) for _, pieces in rows), default=0) or 1
    drawn: list[Markup] = []
    for index, (label, pieces) in enumerate(rows):
        y, x = index * 34, 70.0
        drawn.append(tag("text", label, x=0, y=y + 20))
        for name, amount, kind in pieces:
            wide = 520 * amount / most
            about = tag("title", f"{name}: {human_bytes(amount)}")
            at = {"x": f"{x:.2f}", "y": y + 4, "width": f"{max(wide - 1, 0.5):.2f}", "height": 24}
            drawn.append(tag("rect", about, class_=kind, **at))
            x += wide
    told = {label: ", ".join(f"{name} {human_bytes(n)}" for name, n, _ in pieces) for label, pieces in rows}
    said = "; ".join(f"{label}: {words}" for label, words in told.items())
    return tag("div", drawing(title, said, 600, 34 * len(rows), *drawn), class_="bars")


def levels(title: str, rows: Sequence[tuple[str, float, str]], most: float) -> Markup:
    """A bar a row: label, amount, and words at the end of it."""
    drawn: list[Markup] = []
    for index, (label, amount, words) in enumerate(rows):
        y, wide = index * 22, 300 * min(1.0, amount / most)
        drawn += [
            tag("text", label, x=96, y=y + 15, text_anchor="end"),
            tag("rect", x=104, y=y + 3, width=300, height=16, class_="empty"),
            tag("rect", x=104, y=y + 3, width=f"{wide:.2f}", height=16, class_="changed"),
            tag("text", words, x=412, y=y + 15),
        ]
    said = "; ".join(f"{label}: {words}" for label, _, words in rows)
    return tag(
        "div",
        drawing(title, said, 600, 22 * len(rows), *drawn),
        class_="levels",
        tabindex=0,
        role="group",
        aria_label=title,
    )


# -- the plan

BOX, HIGH, GAP, ROW = 210, 46, 70, 62  # of nodes, in pixels: width, height, and the distances between


def plan(found: Plan) -> Markup:
    """The plan as a graph, in layers from sources to outputs."""
    layers = _layers(found)
    at = {
        key: (x * (BOX + GAP), y * ROW + (max(map(len, layers)) - len(layer)) * ROW / 2)
        for x, layer in enumerate(layers)
        for y, key in enumerate(layer)
    }
    lines = [_edge(at[i.key], at[node.key]) for node in found for i in found.inputs(node.key)]
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


def _layers(found: Plan) -> list[list[str]]:
    """The nodes by how far they are from sources; those of a layer near what they are made of."""
    import networkx as nx

    order = {key: index for index, key in enumerate(found.nodes)}
    layers = [sorted(g, key=order.__getitem__) for g in nx.topological_generations(found.graph)]
    for _ in range(2):
        for before, layer in pairwise(layers):
            rank = {key: index for index, key in enumerate(before)}

            def middle(key: str, rank: dict[str, int] = rank) -> float:
                near = [rank[i] for i in found.nodes[key].job.inputs if i in rank]
                return sum(near) / len(near) if near else 0.0

            layer.sort(key=middle)
    return layers


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    x, y, u, v = start[0] + BOX, start[1] + HIGH / 2, end[0], end[1] + HIGH / 2
    bend = (u - x) / 2
    return tag("path", d=f"M{x:g} {y:g}C{x + bend:g} {y:g} {u - bend:g} {v:g} {u:g} {v:g}", class_="edge")


def _box(node: Node, x: float, y: float) -> Markup:
    label = visible(node.label)
    label = label if len(label) <= 28 else f"{label[:27]}…"
    busy = node.state in ("make", "hash", "fetch")
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
