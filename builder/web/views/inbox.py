"""A folder whose files are pruned and put where they belong."""

from __future__ import annotations

from pathlib import Path

from builder.base.errors import CkptError, ExitCode
from builder.base.words import command_line, counted
from builder.recipe.names import SHARD, SUFFIXES
from builder.toolkit.prune import Options
from builder.toolkit.watch import SETTLE, Event, Watch, layout_of
from builder.web.forms import (
    button,
    field,
    fixes_of,
    folder,
    made_options,
    making,
    option_words,
    select,
    the_same,
    tick,
)
from builder.web.html import Content, Markup, code, join, problem, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.replace import folder_of

ABOUT = (
    "Models, parts of models, LoRAs and the like move from the inbox to the folders that programs look for "
    "them in, pruned. What is unknown stays; what is broken moves to Failed, with the reason beside it."
)

WORDS = {
    "pruned": "pruned, and moved",
    "moved": "moved",
    "known": "was there already",
    "failed": "broken: moved",
    "stays": "stays: nothing it could be put with",
    "kept": "stays for now",
}


def show(site: Site, query: Form) -> Markup:
    """Which folder, and where its files go."""
    inbox = query.get("inbox", folder_of(site))
    path = site.path(inbox)
    waiting = sorted(
        p.name
        for p in path.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and not SHARD.fullmatch(p.name)
    )
    programs = {"": "as the folders say", **{p: p for p in site.catalog.programs}}
    listed = tag("ul", (tag("li", code(n)) for n in waiting[:200]), class_="list")
    return page(
        "Inbox",
        tag("p", ABOUT),
        tag(
            "form",
            field("Inbox", folder(site, "inbox", inbox)),
            button("Look", class_="quiet"),
            class_="inline",
        ),
        tag("h2", f"{counted(len(waiting), 'file')} in it"),
        listed if waiting else None,
        tag(
            "form",
            tag("input", type="hidden", name="inbox", value=inbox),
            tag(
                "fieldset",
                tag("legend", "Where to"),
                field("Models", folder(site, "into", query.get("into", inbox))),
                field("Folders as in", select("layout", programs, query.get("layout"))),
            ),
            tick("recursive", "Folders in it, too", query.ticked("recursive")),
            tick("keep_ema", "Keep averages (EMA)", query.ticked("keep_ema")),
            making(query),
            button("Prune and sort them"),
            method="post",
            action="inbox",
        ),
        the_same(_command(site, query, path, site.path(query.get("into", inbox)))),
        current="inbox",
    )


def run(site: Site, form: Form) -> Response:
    """Do what there is to do in the inbox, once."""
    inbox, into = site.path(form.get("inbox")), site.path(form.get("into"))
    said, recursive = made_options(form), form.ticked("recursive")
    options = Options(
        precision=said["precision"],
        keep_ema=form.ticked("keep_ema"),
        fixes=fixes_of(form),
        profile=said["profile"],
        overflow=said["overflow"] or "error",
        non_finite=said["non_finite"] or "error",
    )
    layout = _layout(site, form, into)

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace:
            watch = Watch(inbox, into, layout, options, workspace, recursive=recursive)
            events: list[Event] = []
            try:
                with watch.alone():
                    events.extend(watch.poll())
                    if watch.waiting and not job.stop.wait(SETTLE):
                        events.extend(watch.poll())
            except CkptError:
                for event in events:  # which stands, whatever stopped the rest
                    job.note(f"`{event.path.name}`: {WORDS[event.state]}")
                raise
        bad = any(e.state in ("failed", "kept") for e in events)
        waiting = [str(p) for p in watch.waiting]
        data = {"schema": 1, "events": [_json(e) for e in events], "waiting": waiting}
        return Outcome(_shown(events, waiting), data, int(ExitCode.SOURCE) if bad else 0)

    command = _command(site, form, inbox, into)
    return follow(site.jobs.add(f"Sort {inbox.name}", work, command=command))


def _layout(site: Site, form: Form, into: Path) -> str:
    return form.get("layout") or layout_of(into, site.catalog)


def _command(site: Site, form: Form, inbox: Path, into: Path) -> str:
    words: list[object] = ["prune", "--watch", inbox, *(["--into", into] if into != inbox else [])]
    words += ["--layout", _layout(site, form, into), "--once", *option_words(form)]
    words += ["--recursive"] * form.ticked("recursive") + ["--keep-ema"] * form.ticked("keep_ema")
    return command_line(*words)


def _shown(events: list[Event], waiting: list[str]) -> Markup:
    rows: list[tuple[Content, ...]] = [
        (code(e.path.name), WORDS[e.state], code(str(e.target)) if e.target else None, e.what or None)
        for e in events
    ]
    return join(
        table(("File", "What became of it", "Where", "What it is"), rows, caption="What was done")
        if rows
        else tag("p", "There was nothing to do."),
        [problem(p) for e in events for p in e.problems],
        tag("h2", "Changed a moment ago, or not whole yet: left for the next time") if waiting else None,
        tag("ul", (tag("li", code(p)) for p in waiting)) if waiting else None,
    )


def _json(event: Event) -> dict[str, object]:
    return {
        "path": str(event.path),
        "state": event.state,
        "target": str(event.target) if event.target else None,
        "what": event.what,
        "error": [{"fact": p.fact, "evidence": list(p.evidence), "hint": p.hint} for p in event.problems],
    }
