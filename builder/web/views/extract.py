"""A component of a file, as a file of its own."""

from __future__ import annotations

from pathlib import Path

from builder.base.words import command_line
from builder.models.identify import Match
from builder.models.parts import find_part, slot_of
from builder.recipe.names import SUFFIXES, Target
from builder.toolkit.command_recipe import CommandRecipe
from builder.toolkit.command_recipe import run as build
from builder.toolkit.extract import extraction, target_of
from builder.toolkit.made import to_json
from builder.web.forms import (
    anew,
    button,
    field,
    files,
    fixes_of,
    folder,
    hidden,
    made_options,
    making,
    option_words,
    save,
    select,
    text,
    the_same,
)
from builder.web.html import Markup, join, size, tag
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Response, Site
from builder.web.views.jobs import follow
from builder.web.views.made import outputs


def show(site: Site, query: Form) -> Markup:
    """Choose a component, and where it goes."""
    reference = query.get("file")
    if not reference:
        chosen = tag("form", field("File", files(site, "file")), button("Show its components"))
        return page("Extract", chosen, current="library")
    path = site.path(reference)
    report = site.shelf.report(path, site.catalog)
    parts = report.parts
    if not parts:
        nothing = tag("p", "The catalog knows no component of this file.")
        return page(f"Extract from {path.name}", nothing, current="library")
    first = query.get("component", parts[0].match.component.name)
    recipe = _composed(site, query, path, first)[-1]
    radios = (
        tag(
            "p",
            tag(
                "label",
                tag(
                    "input",
                    type="radio",
                    name="component",
                    value=p.match.component.name,
                    checked=p.match.component.name == first,
                    required=True,
                ),
                " ",
                p.match.component.name,
                " ",
                tag("small", p.match.component.cls, ", ", size(p.bytes)),
            ),
            class_="tick",
        )
        for p in parts
    )
    return page(
        f"Extract from {path.name}",
        tag(
            "form",
            hidden(file=reference),
            tag("fieldset", tag("legend", "Component"), join(*radios)),
            making(query),
            tag(
                "fieldset",
                tag("legend", "Write"),
                field(
                    "Folder",
                    folder(site, "folder", query.get("folder", reference.rpartition("/")[0])),
                    "The file is named after this one, the metric and the component; what is there stays.",
                ),
                field("Format", select("form", [s[1:] for s in SUFFIXES], query.get("form", "safetensors"))),
                field(
                    "Save the recipe as",
                    text("save", query.get("save"), placeholder="NAME.toml"),
                    "Leave it empty to save none.",
                ),
                class_="write",
            ),
            anew("Preview", "extract"),
            " ",
            button("Extract it"),
            method="post",
            action="extract",
        ),
        the_same(_command(site, query, path, first), recipe.text(path.parent)),
        current="library",
    )


def run(site: Site, form: Form) -> Response:
    """Write the component."""
    path, word = site.path(form.get("file")), form.get("component")
    into, saved = site.path(form.get("folder")), save(site, form)
    match, cls, recipe = _composed(site, form, path, word)

    def work(job: Job) -> Outcome:
        with site.workspace(job) as workspace, workspace.sources() as sources:
            where = Target(into, folder=True)
            goal, naming = target_of(path, match, cls, where, form.get("form") or None, workspace)
            made = build(recipe, goal, workspace, sources, naming=naming, save=saved, hashing=False)
        return Outcome(outputs(site, made, saved), to_json(made))

    command = _command(site, form, path, word, into, saved)
    title = f"Extract {match.component.name} from {path.name}"
    return follow(site.jobs.add(title, work, command=command, recipe=recipe.text(into)))


def _composed(site: Site, form: Form, path: Path, word: str) -> tuple[Match, str, CommandRecipe]:
    """The component of a name, the class that it is written as, and the recipe; raises CkptError."""
    with site.workspace() as workspace, workspace.sources() as sources:
        match = find_part(word, sources.open(sources.file(path)).identity, path, site.catalog)
        cls = slot_of(match, site.catalog)
        return match, cls, extraction(path, match, cls, fixes_of(form), **made_options(form))


def _command(
    site: Site, form: Form, path: Path, word: str, into: Path | None = None, saved: Path | None = None
) -> str:
    words: list[str | Path] = ["extract", path, word, *option_words(form)]
    if form.get("form", "safetensors") != "safetensors":
        words += ["--format", form.get("form")]
    if into is not None and into != path.parent:
        words += ["-o", into]
    return command_line(*words, *(["--save-recipe", saved] if saved is not None else []))
