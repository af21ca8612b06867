"""Models merged by an operation, with a weight for each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.base.errors import CkptError, Problem, UsageError
from builder.base.words import command_line
from builder.operations import OPERATIONS
from builder.operations.presets import V1_BLOCKS, presets
from builder.operations.registry import Operation, Param
from builder.recipe.names import free_name
from builder.toolkit.command_recipe import CommandRecipe, output_path
from builder.toolkit.command_recipe import run as build
from builder.toolkit.made import to_json
from builder.toolkit.merge import merging
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
    select,
    target,
    the_same,
    tick,
)
from builder.web.html import Content, Markup, join, problem, tag, ticked
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.made import outputs
from builder.web.views.planned import plan_of, preview, recipe_text
from builder.web.views.replace import folder_of

ROWS = 3  # of inputs that are a list, at least

# Those that make a model; an adapter's file and the methods of other programs are for recipes.
MERGES = {n: o for n, o in OPERATIONS.items() if not (o.makes_file or o.of_methods)}


def show(site: Site, query: Form) -> Markup:
    """Choose an operation, its inputs and weights; then see the plan."""
    operation = _operation(query)
    chosen = select("op", list(MERGES), operation.name)
    inputs: list[Content] = [
        field(name.upper() if len(name) == 1 else name, files(site, f"in.{name}", query.get(f"in.{name}")))
        for name in operation.inputs
    ]
    if operation.many:
        used = len(query.starting("many.file."))
        inputs += [_row(site, query, operation, n) for n in range(max(ROWS, used + 1))]
    params = [_param(site, query, operation, name, p) for name, p in operation.params.items()]
    weighed = any(p.kind == "weights" for p in operation.params.values())
    home = _home(site, query)
    usual = free_name(site.path(home) / "merged.safetensors").name
    return page(
        "Merge",
        tag("form", field("Operation", chosen), button("Choose", class_="quiet"), class_="inline"),
        tag("p", ticked(operation.doc)),
        tag(
            "form",
            hidden(op=operation.name),
            tag(
                "fieldset",
                tag("legend", "Models"),
                inputs,
                anew("Show their blocks" if weighed else "Choose more", "merge"),
            ),
            tag("fieldset", tag("legend", "Weights"), params) if params else None,
            tick("vae", "Merge the VAE, too", query.ticked("vae"), "Else it is that of the first model."),
            making(query),
            output(site, query, usual, home),
            anew("Preview", "merge", "preview"),
            " ",
            button("Merge them"),
            method="post",
            action="merge",
        ),
        _preview(site, query, usual) if query.ticked("preview") else None,
        current="merge",
    )


def run(site: Site, form: Form) -> Response:
    """Write the merged model."""
    goal, saved = target(site, form), save(site, form)
    command = _composed(site, form)
    output_path(goal, command.sources.values())
    plan_of(site, command, goal)  # what is wrong with it is said on this page, not later

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace, workspace.sources() as sources:
            made = build(command, goal, workspace, sources, save=saved)
        return Outcome(outputs(site, made, saved), to_json(made))

    title, line = f"Merge into {goal.name}", _command(site, form, _models(site, form), goal, saved)
    return follow(site.jobs.add(title, work, command=line, recipe=recipe_text(command, goal)))


def _operation(form: Form) -> Operation:
    return MERGES.get(form.get("op"), MERGES["weighted-sum"])


def _row(site: Site, query: Form, operation: Operation, number: int) -> Markup:
    chosen = files(
        site,
        f"many.file.{number}",
        query.get(f"many.file.{number}"),
        optional=True,
        aria_label=f"{operation.many} {number + 1}",
    )
    weight = tag(
        "input",
        type="number",
        name=f"many.weight.{number}",
        step="any",
        value=query.get(f"many.weight.{number}", "1"),
        aria_label=f"weight {number + 1}",
    )
    return tag(
        "p",
        chosen,
        " × " if operation.weighted else None,
        weight if operation.weighted else None,
        class_="row",
    )


def _param(site: Site, query: Form, operation: Operation, name: str, param: Param) -> Markup:
    if param.kind == "weights":
        return _weights(site, query, operation, name, param)
    value = query.get(f"p.{name}", _said(param.default))
    if param.kind == "boolean":
        # A box that is not ticked is not sent: a choice says both.
        return field(name, select(f"p.{name}", ("true", "false"), value), ticked(param.doc))
    if param.kind == "choice":
        return field(name, select(f"p.{name}", param.choices, value), ticked(param.doc))
    control = tag(
        "input",
        type="number",
        name=f"p.{name}",
        value=value,
        min=param.minimum,
        max=param.maximum,
        step=1 if param.kind == "integer" else "any",
        required=not param.optional,
    )
    return field(name, control, ticked(param.doc))


def _said(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:.6g}"
    return "" if default is None else str(default).lower()


def _weights(site: Site, query: Form, operation: Operation, name: str, param: Param) -> Markup:
    """A weight for the whole, and sliders for blocks where the model's are known."""
    cls, blocks = _blocks(site, query, operation)
    base = query.get(f"p.{name}", f"{param.default:.6g}")
    control = tag("input", type="number", name=f"p.{name}", value=base, step="any", required=True)
    about = ticked(f"{param.doc} This one is of all that is in no block, such as the text encoder.")
    parts: list[Content] = [field(name, control, about)]
    if blocks:
        known = presets().get(query.get(f"preset.{name}"))
        fresh = known is not None and query.ticked("apply")
        weights = dict(zip(blocks, known, strict=True)) if known is not None and fresh else {}
        sliders = [
            _slider(
                f"b.{name}.{block}",
                block,
                f"{weights[block]:g}" if block in weights else query.get(f"b.{name}.{block}", base),
            )
            for block in blocks
        ]
        choose: list[Content] = []
        if len(blocks) == V1_BLOCKS:
            choices = {"": "none", **{p: p for p in presets()}}
            choose = [
                field("Preset", select(f"preset.{name}", choices, query.get(f"preset.{name}"))),
                anew("Set the sliders", "merge", "apply"),
            ]
        parts.append(
            tag(
                "details",
                tag("summary", f"{name} of each block of {cls}"),
                choose,
                tag("div", sliders, class_="sliders"),
                open=True,
            )
        )
    return tag("div", parts, class_="weights")


def _slider(name: str, block: str, value: str) -> Markup:
    control = tag("input", type="range", name=name, min=0, max=1, step=0.01, value=value, id=name)
    return tag("p", tag("label", block, for_=name), control, tag("output", value, for_=name), class_="slider")


def _blocks(site: Site, query: Form, operation: Operation) -> tuple[str, tuple[str, ...]]:
    """The class of the first model that has blocks, and their names."""
    for name in operation.inputs:
        if reference := query.get(f"in.{name}"):
            with site.workspace() as workspace:
                line = site.shelf.line(site.path(reference), site.catalog, workspace.store)
            for part in line.parts:
                traits = site.catalog.traits.get(part.cls)
                if traits is not None and traits.blocks:
                    return part.cls, traits.blocks
    return "", ()


def _home(site: Site, query: Form) -> str:
    chosen = [*query.starting("in.").values(), *query.starting("many.file.").values()]
    return query.get("folder") or (chosen[0].rpartition("/")[0] if chosen else folder_of(site))


def _composed(site: Site, form: Form) -> CommandRecipe:
    """The recipe that the form says; raises CkptError."""
    operation, models = _operation(form), _models(site, form)
    with site.workspace() as workspace, workspace.sources() as sources:
        return merging(models, operation.name, _params(form), sources, fixes_of(form), **made_options(form))


def _models(site: Site, form: Form) -> list[tuple[Path, float | None]]:
    """The files, those of inputs first, and the weights of the others."""
    operation = _operation(form)
    models: list[tuple[Path, float | None]] = []
    for name in operation.inputs:
        if not form.get(f"in.{name}"):
            raise UsageError(Problem(f"the model `{name}` is not chosen", hint="choose a file for each"))
        models.append((site.path(form.get(f"in.{name}")), None))
    rows = form.starting("many.file.") if operation.many else {}
    if operation.many and not rows:
        raise UsageError(Problem(f"nothing is chosen for `{operation.many}`", hint="choose a file"))
    for number, reference in rows.items():
        weight = _number(form.get(f"many.weight.{number}", "1"), "weight") if operation.weighted else None
        models.append((site.path(reference), weight))
    return models


def _params(form: Form) -> dict[str, str]:
    """What the form says of the operation, as `ckpt merge` takes it."""
    operation = _operation(form)
    said = {name: _value(form, name, p) for name, p in operation.params.items() if form.get(f"p.{name}")}
    usual = {name: _said(param.default) for name, param in operation.params.items()}
    params = {name: text for name, text in said.items() if text != usual[name]}
    return params | ({"VAE": "true"} if form.ticked("vae") else {})


def _value(form: Form, name: str, param: Param) -> str:
    said = form.get(f"p.{name}")
    if param.kind in ("boolean", "choice", "string"):
        return said
    value = _number(said, name)
    blocks = {b: _number(w, b) for b, w in form.starting(f"b.{name}.").items()}
    others = [f"{b}={_text(w)}" for b, w in blocks.items() if w != value]
    return ",".join([f"base={_text(value)}", *others]) if others else _text(value)


def _command(
    site: Site, form: Form, models: list[tuple[Path, float | None]], goal: Path, saved: Path | None
) -> str:
    words: list[object] = [p if w is None else f"{p}={_text(w)}" for p, w in models]
    words += ["--op", _operation(form).name]
    for name, value in _params(form).items():
        option = [f"--{name}", value] if name in ("alpha", "beta") else ["--set", f"{name}={value}"]
        words += ["--vae"] if name == "VAE" else option
    words += [*option_words(form), "-o", goal]
    return command_line("merge", *words, *(["--save-recipe", saved] if saved is not None else []))


def _text(value: float) -> str:
    return repr(value).removesuffix(".0")


def _number(said: str, name: str) -> float:
    try:
        return float(said)
    except ValueError:
        raise UsageError(Problem(f"`{name}` has to be a number, not `{said}`")) from None


def _preview(site: Site, query: Form, usual: str) -> Markup:
    try:
        goal = site.folders.new(_home(site, query), query.get("name", usual), replace=True)
        command = _composed(site, query)
        plan = plan_of(site, command, goal)
        saved = save(site, query)
        line = _command(site, query, _models(site, query), goal, saved)
    except CkptError as error:
        return join(map(problem, error.problems))
    return join(preview(plan), the_same(line, recipe_text(command, goal)))
