"""What pruning would take out of a file, and the pruning of it."""

from __future__ import annotations

from pathlib import Path

from builder.base.words import CONTAINERS, command_line, counted
from builder.recipe.names import free_name, portable, stem
from builder.toolkit import prune_text
from builder.toolkit.prune import Options, Pruning, Result, Share, plan_pruning, prune, recipe_of, unmatched
from builder.web.drawing import bars
from builder.web.forms import (
    anew,
    button,
    field,
    files,
    fixes_of,
    hidden,
    made_options,
    making,
    option_words,
    output,
    save,
    target,
    text,
    the_same,
    tick,
)
from builder.web.html import Content, Markup, code, join, problem, size, table, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Json, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.library import address
from builder.web.views.made import outputs
from builder.web.views.planned import recipe_text

NAMES = 200  # of tensors that go, in a list


def show(site: Site, query: Form) -> Markup:
    """What goes and what stays, before anything is done."""
    reference = query.get("file")
    if not reference:
        chosen = tag("form", field("File", files(site, "file")), button("Show what would go"))
        return page("Prune", chosen, current="library")
    path = site.path(reference)
    pruning = _planned(site, path, _options(query))
    usual = free_name(path.parent / portable(f"{stem(path)}-pruned.safetensors")).name
    able = pruning.refusal is None and not pruning.unmatched
    goal = path.parent / query.get("name", usual)
    recipe = recipe_text(recipe_of(pruning), goal) if able else ""
    home = reference.rpartition("/")[0]
    asked = [
        hidden(file=reference),
        tick("keep_ema", "Keep the average (EMA)", query.ticked("keep_ema")),
        field(
            "Keep",
            text("keep", query.get("keep")),
            "Names, patterns as loss.*, or classes; separated by spaces.",
        ),
        tick("force", "Also what is broken or unknown, or mostly junk", query.ticked("force")),
        making(query),
        anew("Preview", "prune"),
    ]
    doing = [output(site, query, usual, home), button("Prune it")]
    return page(
        f"Prune {path.name}",
        described(pruning),
        tag(
            "form",
            tag("fieldset", tag("legend", "How"), asked),
            doing if able else None,
            method="post",
            action="prune",
        ),
        the_same(_command(site, path, query), recipe, address("api/prune", file=reference)),
        current="library",
    )


def data(site: Site, query: Form) -> Json:
    """The object of `ckpt prune --dry-run --json`."""
    path = site.path(query.get("file"))
    pruning = _planned(site, path, _options(query))
    state = "tidy" if pruning.tidy else "refused" if pruning.refusal is not None else "to do"
    found = Result(path, state, pruning, problems=(pruning.refusal,) if pruning.refusal else ())
    return {"schema": 1, "files": [prune_text.to_json(found)]}


def run(site: Site, form: Form) -> Response:
    """Prune a file."""
    path, options = site.path(form.get("file")), _options(form)
    goal, saved = target(site, form), save(site, form)
    planned = _planned(site, path, options)
    if planned.unmatched:
        raise unmatched(planned)
    recipe = recipe_text(recipe_of(planned.checked), goal)

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace, workspace.sources() as sources:
            pruning = plan_pruning(path, sources, options)
            made = prune(pruning, goal, workspace, sources, save=saved)
        result = Result(path, made.outputs[0].state, pruning, made.outputs[0])
        shown = join(outputs(site, made, saved), described(pruning))
        return Outcome(shown, {"schema": 1, "files": [prune_text.to_json(result)]})

    command = _command(site, path, form, goal, saved)
    return follow(site.jobs.add(f"Prune {path.name}", work, command=command, recipe=recipe))


def described(pruning: Pruning) -> Markup:
    """What goes, what is mended and what stays, before and after."""
    report = pruning.report
    goes = [
        (_reason(s, pruning), f"{len(s.names):,}", size(max(0, s.bytes)), _names(s)) for s in pruning.goes
    ]
    stays = [(s.reason, f"{len(s.names):,}", size(s.bytes)) for s in (*pruning.parts, *pruning.rest)]
    before = {s.reason: max(0, s.bytes) for s in pruning.goes}
    kept = {s.reason: s.bytes for s in (*pruning.parts, *pruning.rest)}
    what = (report.kind and report.kind.text) or pruning.identity.architecture or "unknown"
    said: list[Content] = [
        tag("p", what, ": ", size(report.size), " before, ", tag("strong", size(pruning.left)), " after")
    ]
    if pruning.refusal is not None:
        said.append(problem(pruning.refusal, "refused"))
    if pruning.unmatched:
        said += map(problem, unmatched(pruning).problems)
    if pruning.tidy:
        said.append(tag("p", "There is nothing to prune: it is tidy.", class_="good"))
    staying = [(name, count, "stays") for name, count in kept.items()]
    going = [(name, count, "goes") for name, count in before.items()]
    said.append(bars("Before and after", [("before", [*staying, *going]), ("after", staying)]))
    if goes:
        said.append(table(("What goes", "Tensors", "Saves", "Names"), goes, caption="Goes", numbers=(1, 2)))
    elif pruning.repacked:
        said.append(tag("p", f"{CONTAINERS[report.container]} becomes safetensors"))
    if pruning.repairs:
        said.append(table(("Component", "Repair"), pruning.repairs, caption="Is mended"))
    if stays:
        said.append(table(("What stays", "Tensors", "Size"), stays, caption="Stays", numbers=(1, 2)))
    return join(*said)


def _reason(share: Share, pruning: Pruning) -> str:
    words = {
        "precision": f"rounded to {prune_text.rounded_to(pruning)}",
        "positions": "positions made int64",
    }
    return words.get(share.reason, share.reason)


def _names(share: Share) -> Markup:
    names = [tag("li", code(n)) for n in share.names[:NAMES]]
    more = len(share.names) - len(names)
    rest = tag("li", f"and {more:,} more") if more else None
    return tag("details", tag("summary", counted(len(share.names), "tensor")), tag("ul", names, rest))


def _planned(site: Site, path: Path, options: Options) -> Pruning:
    with site.workspace() as workspace, workspace.sources() as sources:
        return plan_pruning(path, sources, options)


def _options(form: Form) -> Options:
    said = made_options(form)
    return Options(
        precision=said["precision"],
        keep_ema=form.ticked("keep_ema"),
        keep=tuple(form.get("keep").split()),
        force=form.ticked("force"),
        fixes=fixes_of(form),
        profile=said["profile"],
        overflow=said["overflow"] or "error",
        non_finite=said["non_finite"] or "error",
    )


def _command(site: Site, path: Path, form: Form, goal: Path | None = None, saved: Path | None = None) -> str:
    words: list[str | Path] = ["prune", path, *option_words(form)]
    words += ["--keep-ema"] * form.ticked("keep_ema") + ["--force"] * form.ticked("force")
    words += [w for word in form.get("keep").split() for w in ("--keep", word)]
    if goal is not None:
        words += ["-o", goal]
    if saved is not None:
        words += ["--save-recipe", saved]
    return command_line(*words)
