"""What the folders hold."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from builder.base.words import command_line, counted
from builder.reports.inspect import to_json
from builder.web.forms import button, field, text
from builder.web.html import Content, Markup, code, join, problem, size, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.shelf import Line, twins
from builder.web.site import Form, Json, Response, Site
from builder.web.views.jobs import follow

BUDGET = 2.0  # seconds that a page waits for tables of contents; the rest is there when it is loaded again
SHOWN = 200  # files on a page


def address(view: str, **fields: str) -> str:
    """The address of a view with fields."""
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items())
    return f"{view}?{query}" if query else view


def link(view: str, label: Content, **fields: str) -> Markup:
    """A link to a view with fields."""
    return tag("a", label, href=address(view, **fields))


def lines(site: Site, budget: float | None = BUDGET) -> tuple[dict[str, Line], list[str]]:
    """What is known of every file, by reference, and those that there was no time for."""
    found: dict[str, Line] = {}
    left: list[str] = []
    until = time.monotonic() + (budget if budget is not None else float("inf"))
    with site.workspace() as workspace:
        for reference in site.folders.listed().files:
            if time.monotonic() > until and found:
                left.append(reference)
                continue
            try:
                found[reference] = site.shelf.line(site.path(reference), site.catalog, workspace.store)
            except OSError:  # gone since it was listed
                continue
    return found, left


def show(site: Site, query: Form) -> Markup:
    """The files, what each is, and what they have in common."""
    found, left = lines(site)
    listed = site.folders.listed()
    alike = twins(found)
    word = query.get("q").casefold()
    shown = {r: line for r, line in found.items() if word in f"{r} {line.what}".casefold()}
    rows = [_row(reference, line, alike[reference]) for reference, line in list(shown.items())[:SHOWN]]
    notes: list[Content] = []
    if left:
        notes.append(tag("p", f"{counted(len(left), 'file')} more: load the page again.", role="status"))
    if len(shown) > SHOWN:
        notes.append(tag("p", f"{len(shown) - SHOWN:,} more are not shown: search for some."))
    if listed.links_out:
        out = counted(listed.links_out, "link")
        notes.append(tag("p", f"{out} out of these folders: left alone. Name the other folder, too."))
    if listed.cut:
        notes.append(tag("p", "There is too much in these folders: not all of it is listed."))
    total = sum(line.size for line in found.values())
    spare = sum(line.spare for line in found.values())
    unread = [r for r, line in found.items() if not line.read and not line.problems]
    intro = join(counted(len(found), "file"), ", ", size(total), "; pruning would save ", size(spare), ".")
    search = tag(
        "form",
        field("Search", text("q", query.get("q"), "search")),
        button("Search"),
        class_="inline",
        role="search",
    )
    reading = tag(
        "form",
        button(f"Read the weights of {counted(len(unread), 'file')}"),
        tag("small", " Then known parts and twins are found by what the files hold, not by their names."),
        method="post",
        action="read",
    )
    empty = tag("p", "No checkpoint lies in these folders." if not word else "Nothing fits that.")
    head = ("File", "What it is", "Precision", "Size", "Junk", "Known parts", "Twins", "Do")
    return page(
        "Library",
        tag("p", intro),
        search if found else None,
        table(head, rows, caption="Checkpoints", numbers=(3, 4)) if rows else empty,
        notes,
        reading if unread else None,
        tag("p", tag("a", "As JSON", href="api/library")) if found else None,
        current="library",
        refresh=2 if left else 0,
    )


def _row(reference: str, line: Line, alike: list[tuple[str, str]]) -> tuple[Content, ...]:
    what: Content = line.what
    if line.problems:
        what = tag("span", "refused: ", line.problems[0].fact, class_="bad")
    elif line.faults:
        what = join(line.what, " ", tag("small", counted(line.faults, "fault"), class_="bad"))
    others = [tag("div", link("report", other, file=other), ": ", same) for other, same in alike]
    doing = [
        link("prune", "prune", file=reference),
        " ",
        link("extract", "extract", file=reference),
        " ",
        link("replace", "replace", base=reference),
    ]
    junk = line.junk + line.ema
    return (
        link("report", reference, file=reference),
        what,
        line.precision or None,
        size(line.size),
        size(junk) if junk else None,
        line.known or (None if line.read or line.problems else "not read"),
        tag("details", tag("summary", f"{len(others)} files"), others) if len(others) > 1 else others or None,
        tag("span", doing, class_="together") if not line.problems else None,
    )


def data(site: Site, query: Form) -> Json:
    """The library as plain values."""
    found, left = lines(site)
    alike = twins(found)

    def row(reference: str, line: Line) -> dict[str, Any]:
        return {
            "file": reference,
            "path": str(site.path(reference)),
            "what": line.what,
            "architecture": line.architecture,
            "precision": line.precision,
            "size": line.size,
            "junk": line.junk,
            "ema": line.ema,
            "known": [{"class": p.cls, "name": p.known} for p in line.parts if p.known],
            "twins": [{"file": other, "same": same} for other, same in alike[reference]],
            "error": [p.fact for p in line.problems],
        }

    return {"schema": 1, "files": [row(r, line) for r, line in found.items()], "unread": left}


def read(site: Site, form: Form) -> Response:
    """Read the weights of every file once."""
    todo = [r for r, line in lines(site, None)[0].items() if not line.read and not line.problems]
    paths = [site.path(reference) for reference in todo]

    def work(job: Job) -> Outcome:
        reports = [site.shelf.report(p, site.catalog, metric=True, reporter=job) for p in paths]
        shown = tag("p", f"{counted(len(reports), 'file')} read. ", link("./", "To the library"))
        faults = [
            tag("section", tag("h2", code(r.path)), map(problem, r.faults)) for r in reports if r.faults
        ]
        return Outcome(join(shown, faults), to_json(reports))

    command = command_line("inspect", *paths)
    return follow(site.jobs.add(f"Read {counted(len(todo), 'file')}", work, command=command))
