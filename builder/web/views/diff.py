"""What tells two files apart."""

from __future__ import annotations

from collections.abc import Iterable

from builder.base.words import CONTAINERS, command_line, counted
from builder.reports.diff import BlockChange, Diff, by_block, causes, compare, to_json
from builder.reports.diff.compare import Part
from builder.web import drawing
from builder.web.forms import button, field, files, tick
from builder.web.html import Content, Markup, code, join, size, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Response, Site
from builder.web.views.jobs import follow

MOST = 200  # tensors in the table
MOST_BITS = 16.0


def show(site: Site, query: Form) -> Markup:
    """Choose two files."""
    form = tag(
        "form",
        field("A", files(site, "a", query.get("a"))),
        field("B", files(site, "b", query.get("b"))),
        tick("full", "List every tensor that differs"),
        button("Compare them"),
        method="post",
        action="diff",
    )
    about = "Every tensor that both have is read once: what differs, by how much, in which blocks, and why."
    return page("Diff", tag("p", about), form, current="diff")


def run(site: Site, form: Form) -> Response:
    """Compare two files."""
    a, b, full = site.path(form.get("a")), site.path(form.get("b")), form.ticked("full")

    def work(job: Job) -> Outcome:
        diff = compare(a, b, catalog=site.catalog, reporter=job)
        return Outcome(_shown(diff, site, full), to_json(diff, full), 0 if diff.same else 1)

    command = command_line("diff", a, b, *(["--full"] if full else []))
    return follow(site.jobs.add(f"Compare {a.name} and {b.name}", work, command=command))


def _shown(diff: Diff, site: Site, full: bool) -> Markup:
    sides = [
        (
            letter,
            code(s.path),
            s.identity.architecture or "unknown",
            CONTAINERS.get(s.checkpoint.container, s.checkpoint.container),
            size(s.checkpoint.size),
            f"{len(s.checkpoint):,}",
        )
        for letter, s in (("A", diff.a), ("B", diff.b))
    ]
    said = list(causes(diff))
    changes = [c for c in by_block(diff, site.catalog) if c.cls]
    verdict = "The tensors are the same." if diff.same else "They differ."
    return join(
        table(
            ("", "File", "What it is", "Container", "Size", "Tensors"),
            sides,
            caption="The two files",
            numbers=(4, 5),
        ),
        tag("p", tag("strong", verdict), class_="verdict"),
        tag("ul", (tag("li", cause) for cause in said)) if said else None,
        table(
            ("Class", "In A", "In B", "Tensors of both", "Changed", "Values that differ"),
            [_part(p) for p in diff.parts if p.a or p.b or p.tensors],
            caption="Components",
            numbers=(3, 4, 5),
        ),
        tag("h2", "Change in each block") if changes else None,
        tag("p", "How many of a value's last bits change on average: 0 is the same, about 10 another model.")
        if changes
        else None,
        [_drawn(cls, [c for c in changes if c.cls == cls]) for cls in dict.fromkeys(c.cls for c in changes)],
        _tensors(diff, full),
        _alone("A", diff.only_a),
        _alone("B", diff.only_b),
    )


def _part(part: Part) -> tuple[Content, ...]:
    total = part.total
    share = total.differing / total.elements if total.elements else 0.0
    return (
        part.cls or "in no component",
        part.a.component.name if part.a else None,
        part.b.component.name if part.b else None,
        f"{len(part.tensors):,}" if part.tensors else None,
        f"{len(part.changed):,}" if part.tensors else None,
        _percent(share) if part.tensors else None,
    )


def _percent(share: float) -> str:
    return "0 %" if not share else "<0.01 %" if share < 0.0001 else f"{share:.2%}".replace("%", " %")


def _drawn(cls: str, changes: list[BlockChange]) -> Markup:
    """The change of a class; one line where there is none."""
    if not any(c.differing for c in changes):
        return tag("p", tag("strong", cls), ": nothing changes but the rounding, if that.")
    rows = [
        (
            c.block or ("outside of blocks" if len(changes) > 1 else "all of it"),
            drawing.level(c.bits / MOST_BITS, "changed"),
            f"{c.bits:.1f} bits",
            _percent(c.differing / max(1, c.elements)),
        )
        for c in changes
    ]
    head = ("Block", "Change", "On average", "Values that differ")
    return table(head, rows, caption=cls, numbers=(2, 3), kind="levels")


def _tensors(diff: Diff, full: bool) -> Content:
    found = [t for t in diff.tensors if not (t.identical if full else t.alike)]
    if not found:
        return None
    found.sort(key=lambda t: -(t.values.steps if t.values else 0))
    rows = [
        (
            code(t.pair.a),
            t.pair.cls or None,
            f"{t.dtypes[0].code} / {t.dtypes[1].code}",
            _percent(t.values.differing / max(1, t.values.elements)) if t.values else "other shape",
            f"{t.values.steps:,}" if t.values and t.values.steps else None,
        )
        for t in found[:MOST]
    ]
    more = tag("p", f"and {len(found) - MOST:,} more") if len(found) > MOST else None
    head = ("Tensor", "Class", "Types", "Differ", "Most ULP")
    return tag(
        "details",
        tag("summary", counted(len(found), "tensor") + " that differ"),
        table(head, rows, caption="Tensors that differ", numbers=(3, 4)),
        more,
    )


def _alone(letter: str, names: Iterable[str]) -> Content:
    held = list(names)
    if not held:
        return None
    more = tag("li", f"and {len(held) - MOST:,} more") if len(held) > MOST else None
    return tag(
        "details",
        tag("summary", f"Only in {letter}: {counted(len(held), 'tensor')}"),
        tag("ul", (tag("li", code(n)) for n in held[:MOST]), more),
    )
