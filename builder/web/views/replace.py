"""Components of several files put together: into a file's slots, or into those of a new model."""

from __future__ import annotations

from pathlib import Path

from builder.base.errors import CkptError, Problem, UsageError
from builder.base.words import command_line, counted
from builder.models.catalog import Architecture
from builder.recipe.names import free_name, portable, stem
from builder.toolkit.command_recipe import CommandRecipe, output_path
from builder.toolkit.command_recipe import run as build
from builder.toolkit.made import to_json
from builder.toolkit.replace import architecture_of, replacement
from builder.web.forms import (
    anew,
    button,
    field,
    fixes_of,
    made_options,
    making,
    option_words,
    output,
    save,
    select,
    target,
    the_same,
)
from builder.web.html import Content, Markup, join, problem, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.library import lines
from builder.web.views.made import outputs
from builder.web.views.planned import plan_of, preview, recipe_text

NEW = "NEW "


def show(site: Site, query: Form) -> Markup:
    """Choose a base, then what fills its slots; then see the plan."""
    base = query.get("base")
    new = [NEW + name for name, a in site.catalog.architectures.items() if len(a.slots) > 1]
    choices = {"": "choose", **{n: f"{n} (every slot empty)" for n in new}}
    choices |= {reference: reference for reference in site.folders.listed().files}
    first = tag(
        "form",
        field("Begin with", select("base", choices, base, required=True)),
        button("Show its slots", class_="quiet" if base else None),
        class_="inline",
    )
    if not base:
        about = tag(
            "p",
            "Components of several files become one: begin with a file whose components some "
            "others replace, or with a new model every slot of which is to be filled.",
        )
        return page("Slots", about, first, current="slots")
    architecture = _architecture(site, base)
    found, left = lines(site)
    slots: list[Content] = []
    for cls in architecture.slots:
        average = site.catalog.averages.get(cls)
        options = {"": "nothing" if _new(site, base) else "as it is"}
        for reference, line in found.items():
            for part in line.parts:
                if part.cls == cls or (average is not None and part.cls == average.cls):
                    words = f"{reference} · {part.name} {part.precision}"
                    value = f"{'' if part.cls == cls else part.name}|{reference}"
                    options[value] = words + (f" ({part.known})" if part.known else "")
        chosen = select(f"slot.{cls}", options, query.get(f"slot.{cls}"))
        slots.append(field(cls, chosen))
    more = tag("p", f"{counted(len(left), 'file')} not looked at yet: load the page again.") if left else None
    home_folder = "" if _new(site, base) else base.rpartition("/")[0]
    usual = _usual(site, base, query.get("folder", home_folder))
    parts = query.starting("slot.")
    seen = _preview(site, query, usual) if parts else None
    return page(
        "Slots",
        first,
        tag(
            "form",
            tag("input", type="hidden", name="base", value=base),
            tag("fieldset", tag("legend", f"Slots of {architecture.name}"), slots, more),
            making(query),
            output(site, query, usual, home_folder or folder_of(site)),
            anew("Preview", "replace"),
            " ",
            button("Write it"),
            method="post",
            action="replace",
        ),
        seen,
        current="slots",
    )


def folder_of(site: Site) -> str:
    """The first of the folders."""
    return next(iter(site.folders.roots))


def _preview(site: Site, query: Form, usual: str) -> Markup:
    try:
        command = _composed(site, query)
        folder = query.get("folder") or folder_of(site)
        goal = site.folders.new(folder, query.get("name", usual), replace=True)
        plan = plan_of(site, command, goal)
    except CkptError as error:
        return join(map(problem, error.problems))
    return join(preview(plan), the_same(_command(site, query, goal), recipe_text(command, goal)))


def run(site: Site, form: Form) -> Response:
    """Write the file."""
    goal, saved = target(site, form), save(site, form)
    command = _composed(site, form)
    output_path(goal, command.sources.values())

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace, workspace.sources() as sources:
            made = build(command, goal, workspace, sources, save=saved)
        return Outcome(outputs(site, made, saved), to_json(made))

    line = _command(site, form, goal, saved)
    return follow(site.jobs.add(f"Write {goal.name}", work, command=line, recipe=recipe_text(command, goal)))


def _composed(site: Site, form: Form) -> CommandRecipe:
    """The recipe that the form says; raises CkptError."""
    base = form.get("base")
    parts = list(_parts(site, form))
    if not parts:
        raise UsageError(Problem("no slot is filled from another file", hint="choose a file for one"))
    file = _file(site, base)
    with site.workspace() as workspace, workspace.sources() as sources:
        return replacement(file, parts, sources, fixes_of(form), **made_options(form))


def _parts(site: Site, form: Form) -> list[tuple[str, Path, str | None]]:
    found = []
    for cls, said in form.starting("slot.").items():
        component, _, reference = said.partition("|")
        found.append((cls, site.path(reference), component or None))
    return found


def _new(site: Site, base: str) -> Architecture | None:
    """The architecture to fill from nothing; None: a file is meant. Raises UsageError."""
    if not base.startswith(NEW) or base.partition("/")[0] in site.folders.roots:
        return None
    return site.catalog.architecture(base.removeprefix(NEW))


def _file(site: Site, base: str) -> str | Path:
    """`NEW ARCHITECTURE`, or the path of a file in the folders; raises CkptError."""
    new = _new(site, base)
    return f"{NEW}{new.name}" if new is not None else site.path(base)


def _architecture(site: Site, base: str) -> Architecture:
    if (new := _new(site, base)) is not None:
        return new
    path = site.path(base)
    with site.workspace() as workspace, workspace.sources() as sources:
        return architecture_of(path, sources.open(sources.file(path)).identity, site.catalog)


def _usual(site: Site, base: str, inside: str) -> str:
    name = "new-model" if _new(site, base) else portable(f"{stem(site.path(base))}-new")
    return free_name(site.path(inside or folder_of(site)) / f"{name}.safetensors").name


def _command(site: Site, form: Form, goal: Path, saved: Path | None = None) -> str:
    words: list[str | Path] = ["replace", _file(site, form.get("base"))]
    words += [f"{cls}={path}" + (f":{part}" if part else "") for cls, path, part in _parts(site, form)]
    words += [*option_words(form), "-o", goal]
    return command_line(*words, *(["--save-recipe", saved] if saved is not None else []))
