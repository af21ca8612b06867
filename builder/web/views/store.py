"""The store of made components."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from builder.base.errors import Problem, UsageError
from builder.base.progress import human_bytes
from builder.base.words import command_line, counted, parse_size
from builder.store import Store
from builder.store.upkeep import Item, item_json, items, to_json
from builder.store.upkeep import check as check_all
from builder.store.upkeep import collect as collect_all
from builder.web.forms import button, field, text, the_same
from builder.web.html import Content, Markup, code, join, problem, size, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Json, Response, Site
from builder.web.views.jobs import follow

SHOWN = 500


def _stored(store: Store) -> list[Item]:
    return [i for i in reversed(items(store)) if i.kind != "fact"]


def show(site: Site, query: Form) -> Markup:
    """What is stored, the most recently used first."""
    with site.workspace() as workspace:
        store = workspace.store
        found = _stored(store)
    total = sum(i.size for i in found)
    rows = [_row(i) for i in found[:SHOWN]]
    head = ("Component", "Size", "Digest", "Last used", "Made of", "Lies in")
    more = tag("p", f"and {len(found) - SHOWN:,} more") if len(found) > SHOWN else None
    return page(
        "Store",
        tag("p", counted(len(found), "item"), ", ", size(total), ", in ", code(str(store.root))),
        table(head, rows, caption="What is stored", numbers=(1,)) if rows else None,
        more,
        tag(
            "form",
            field(
                "Keep at most",
                text("size", query.get("size"), placeholder="10GB"),
                "Empty: only litter goes. What was not used for longest goes first.",
            ),
            button("Make room"),
            method="post",
            action="gc",
        ),
        tag(
            "form",
            tag("p", "Read everything that is stored, and set aside what is damaged."),
            button("Check it"),
            method="post",
            action="store-check",
        ),
        the_same(command_line("store", "list"), data="api/store"),
        current="store",
    )


def _row(item: Item) -> tuple[Content, ...]:
    name = {"component": item.component or "?", "download": "(download)", "partial": "(unfinished download)"}
    used = datetime.fromtimestamp(item.used // 10**9)
    where = [*(["the store"] if item.size else []), *(Path(p).name for p in item.places)]
    return (
        name.get(item.kind, item.kind),
        size(item.size) if item.size else None,
        tag("code", item.digest[:12], class_="together"),
        tag("span", used.strftime("%Y-%m-%d %H:%M"), class_="number"),
        item.source or None,
        ", ".join(where) or "nowhere",
    )


def data(site: Site, query: Form) -> Json:
    """The object of `ckpt store list --json`."""
    with site.workspace() as workspace:
        return to_json(workspace.store, _stored(workspace.store))


def collect(site: Site, form: Form) -> Response:
    """Remove litter, and what was not used for longest."""
    said = form.get("size").strip()
    most = parse_size(said) if said else None
    if said and most is None:
        raise UsageError(Problem(f"`{said}` is no size", hint="as `10GB`, `500MB` or `2GiB`"))

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace:
            done = collect_all(workspace.store, most)
        freed = sum(i.size for i in done.removed) + done.litter
        kept = sum(i.size for i in done.kept)
        rows = [item_json(i) for i in done.removed]
        told = {"schema": 1, "removed": rows, "freed": freed, "kept": kept}
        gone = [i for i in done.removed if i.kind != "fact"]
        listed = tag("ul", (tag("li", i.component or i.kind, " ", code(i.digest[:12])) for i in gone))
        said = tag("p", f"Freed {human_bytes(freed)}, kept {human_bytes(kept)}.")
        return Outcome(join(said, listed if gone else None), told)

    words = ["store", "gc", *(["--max-size", said] if said else [])]
    return follow(site.jobs.add("Make room in the store", work, command=command_line(*words)))


def check(site: Site, form: Form) -> Response:
    """Read everything that is stored."""

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace:
            found = [i for i in items(workspace.store) if i.kind in ("component", "download")]
            problems = check_all(workspace.store, threads=min(4, os.cpu_count() or 1), reporter=job)
        verdict = f"{len(problems)} damaged, set aside" if problems else "all sound"
        rows = [{"fact": p.fact, "evidence": list(p.evidence), "hint": p.hint} for p in problems]
        shown = join(tag("p", f"Checked {counted(len(found), 'item')}: {verdict}."), map(problem, problems))
        return Outcome(shown, {"schema": 1, "checked": len(found), "damaged": rows}, 1 if problems else 0)

    return follow(site.jobs.add("Check the store", work, command=command_line("store", "check")))
