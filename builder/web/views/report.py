"""What is in one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from builder.base.words import CONTAINERS, command_line, counted
from builder.models.identity import Rejection
from builder.reports.inspect import Part, Report, to_json, types_of
from builder.web.forms import button, hidden, the_same, tick
from builder.web.html import Content, Markup, code, facts, join, problem, size, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.shelf import twins
from builder.web.site import Form, Json, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.library import address, lines, link

MOST = 2000  # names of tensors in a list


def show(site: Site, query: Form) -> Markup:
    """The report of a file: short, and the whole of it below."""
    reference = query.get("file")
    path = site.path(reference)
    report = site.shelf.report(path, site.catalog)
    others = twins(lines(site)[0]).get(reference, [])
    return page(
        reference.rpartition("/")[2],
        tag("p", code(reference)),
        tag(
            "p",
            link("prune", "Prune it", file=reference),
            link("extract", "Extract a component", file=reference),
            link("replace", "Replace components", base=reference),
            link("diff", "Compare it", a=reference),
            class_="actions",
        ),
        shown(report),
        tag("h2", "Twins") if others else None,
        tag("ul", (tag("li", link("report", other, file=other), ": ", same) for other, same in others))
        if others
        else None,
        tag(
            "form",
            hidden(file=reference),
            tag(
                "fieldset",
                tag("legend", "Read more of it"),
                tick("full", "Every tensor, not only the model's components"),
                tick("hashes", "The file's hashes of every kind in use"),
                button("Read the weights"),
            ),
            method="post",
            action="report",
        ),
        the_same(command_line("inspect", path), data=address("api/inspect", file=reference)),
        current="library",
    )


def data(site: Site, query: Form) -> Json:
    """The object of `ckpt inspect --json`."""
    return to_json([site.shelf.report(site.path(query.get("file")), site.catalog)])


def read(site: Site, form: Form) -> Response:
    """Read the weights of a file, and then show what is in it."""
    reference, full, hashes = form.get("file"), form.ticked("full"), form.ticked("hashes")
    path = site.path(reference)

    def work(job: Job) -> Outcome:
        report = site.shelf.report(path, site.catalog, metric=True, full=full, hashes=hashes, reporter=job)
        back = tag("p", link("report", "To the file's page", file=reference))
        return Outcome(join(shown(report), back), to_json([report]), 0 if report.sound else 1)

    words = ["inspect", *(["--full"] if full else []), *(["--hashes"] if hashes else []), path]
    return follow(site.jobs.add(f"Read {reference}", work, command=command_line(*words)))


def shown(report: Report) -> Markup:
    """A report: what a person needs first, and all else in parts that open."""
    identity = report.identity
    name = (report.kind and report.kind.text) or identity.architecture or "unknown"
    verdict = tag("strong", name, class_="good" if report.kind is not None else "bad")
    head = tag(
        "p",
        verdict,
        " · ",
        CONTAINERS.get(report.container, report.container),
        " · ",
        size(report.size),
        class_="verdict",
    )
    rows = [_part(p) for p in report.parts]
    columns = ("Component", "Class", "Type", "Tensors", "Size", "Known as")
    return join(
        head,
        tag("section", tag("h2", "Faults"), (problem(p, "warning") for p in report.faults))
        if report.faults
        else None,
        table(columns, rows, caption="Components", numbers=(3, 4)) if rows else None,
        facts(_facts(report)),
        _more("Not in this file, though some of it is", [_rejection(r) for r in identity.rejected]),
        _more("Remarks", [tag("p", n) for n in identity.notes]),
        _names("Unknown", report, identity.unknown),
        _names("Junk", report, identity.junk),
        _names("EMA", report, identity.ema),
        _names("Extra", report, identity.optional),
        _names("Scales of packed weights", report, identity.scales),
        _pairs("Metadata", report.metadata),
        _pairs("Entries that are no tensors", report.others),
        _pairs("Hashes", {k: v or "–" for k, v in report.hashes.items()}),
        _more("Globals that the pickle names, none of them run", [tag("p", code(g)) for g in report.globals]),
        _more("Details of components", [_details(p) for p in report.parts]),
    )


def _part(part: Part) -> tuple[Content, ...]:
    match = part.match
    return (
        match.component.name,
        match.component.cls,
        types_of(part),
        f"{part.tensors:,}",
        size(part.bytes),
        part.known or None,
    )


def _facts(report: Report) -> Iterable[tuple[str, Content]]:
    yield "metric", f"({report.metric.text})" if report.metric else "not read"
    yield "model", report.model
    yield "published as", report.published.name if report.published else None
    if report.prediction.signs:
        yield "predicts", f"{report.prediction.kind}, says {report.prediction.signs[0].what}"
    for label, share in (("EMA", report.ema), ("junk", report.junk), ("unknown", report.unknown)):
        if share.names:
            yield label, join(size(share.bytes), f" in {counted(share.keys, 'key')}")
    if report.precision_waste:
        yield "precision", join(size(report.precision_waste), " wasted: 16 bits a number would do")
    if report.identity.intact and report.pruned < report.size:
        yield "pruned", join(size(report.size), " → ", size(report.pruned))


def _rejection(rejected: Rejection) -> Markup:
    missing = [tag("li", code(n), " is missing") for n in rejected.missing[:20]]
    shapes = [
        tag("li", code(m.name), f" has the shape {list(m.found)}, not {list(m.expected)}")
        for m in rejected.misshapen[:20]
    ]
    more = len(rejected.missing) + len(rejected.misshapen) - len(missing) - len(shapes)
    rest = tag("li", f"and {more:,} more") if more else None
    return join(tag("p", rejected.describe()), tag("ul", missing, shapes, rest))


def _details(part: Part) -> Markup:
    match = part.match
    return join(
        tag("h3", match.component.name),
        facts(
            [
                ("prefix", code(match.prefix) if match.prefix else "bare names"),
                ("parameters", f"{part.parameters:,}"),
                ("content", code(f"blake3:{part.digest}") if part.digest else "not read"),
                ("lacks", ", ".join(match.missing_optional)),
                ("remark", match.component.note),
            ]
        ),
    )


def _names(title: str, report: Report, names: tuple[str, ...]) -> Markup | None:
    shown = [
        tag("li", code(n), f" {report.tensors[n].dtype.code} {list(report.tensors[n].shape)}")
        for n in names[:MOST]
    ]
    if len(names) > MOST:
        shown.append(tag("li", f"and {len(names) - MOST:,} more"))
    return _more(f"{title}: {counted(len(names), 'tensor')}", [tag("ul", shown)] if shown else [])


def _pairs(title: str, pairs: Mapping[str, str]) -> Markup | None:
    rows = [(key, code(value)) for key, value in sorted(pairs.items())]
    return _more(f"{title}: {len(rows)}", [facts(rows)] if rows else [])


def _more(title: str, content: list[Markup]) -> Markup | None:
    return tag("details", tag("summary", title), content) if content else None
