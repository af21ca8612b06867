"""Work under way and done."""

from __future__ import annotations

from typing import Any

from builder.base.errors import Problem, UsageError
from builder.web.forms import button, hidden, the_same
from builder.web.html import Content, Markup, problem, table, tag
from builder.web.jobs import Job
from builder.web.pages import page
from builder.web.site import Form, Json, Response, Site, go_to

WORDS = {
    "waiting": "waits for other work",
    "running": "under way",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled: nothing half made is left",
}


def follow(job: Job) -> Response:
    """The page of a job that was just put into the queue."""
    return go_to(f"job?id={job.number}")


def show_all(site: Site, query: Form) -> Markup:
    """Every job, the latest first."""
    rows = [
        (tag("a", job.title, href=f"job?id={job.number}"), WORDS[job.state], _cancel(job))
        for job in site.jobs.all()
    ]
    if not rows:
        return page("Work", tag("p", "Nothing was asked for yet."), current="work")
    busy = any(not job.over for job in site.jobs.all())
    shown = table(("Work", "State", "Stop"), rows, caption="What was asked for, the latest first")
    return page("Work", shown, current="work", refresh=3 if busy else 0)


def show(site: Site, query: Form) -> Markup:
    """One job: how far it is, or what became of it."""
    job = _job(site, query)
    said = [problem(p, severity) for severity, p in job.said]
    content: list[Content] = [
        tag("p", tag("strong", WORDS[job.state]), role="status", class_=f"state {job.state}", id="state")
    ]
    if not job.over:
        content += [
            tag(
                "div",
                map(_task, job.to_json()["tasks"]),
                id="tasks",
                data_events=f"events?job={job.number}",
            ),
            tag("p", role="status", class_="unseen", id="progress"),
            _cancel(job),
        ]
    content += [problem(p) for p in job.problems]
    if job.outcome is not None:
        content.append(job.outcome.shown)
    if said:
        content.append(
            tag(
                "details",
                tag("summary", f"What was said on the way ({len(said)})"),
                said,
                open=len(said) <= 5,
            )
        )
    content.append(the_same(job.command, job.recipe, f"api/job?id={job.number}"))
    return page(job.title, content, current="work", refresh=0 if job.over else 2)


def data(site: Site, query: Form) -> Json:
    """Where a job stands, with the object of `--json` as its result."""
    return _job(site, query).to_json()


def cancel(site: Site, form: Form) -> Response:
    """Stop a job."""
    job = _job(site, form)
    job.cancel()
    return go_to(f"job?id={job.number}")


def _job(site: Site, form: Form) -> Job:
    number = form.get("id")
    job = site.jobs.get(int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else None
    if job is None:
        raise UsageError(Problem(f"there is no work `{number}`", hint="`Work` lists what there is"))
    return job


def _task(task: dict[str, Any]) -> Markup:
    done, total = task["done"], task["total"]
    bar = tag("progress", max=total or None, value=min(done, total) if total else None)
    said = tag("label", tag("span", task["task"]), bar)
    return tag("p", said, tag("small", task["told"]), class_="task")


def _cancel(job: Job) -> Markup | None:
    if job.over:
        return None
    return tag(
        "form", hidden(id=str(job.number)), button("Cancel", class_="danger"), method="post", action="cancel"
    )
