"""Recipes: written with their errors in sight, planned, saved and built."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from builder.base.disk import write_bytes
from builder.base.errors import CkptError, OutputError, Place, Problem, UsageError
from builder.base.files import read_text
from builder.base.recipe_address import FORMS, is_address
from builder.base.words import command_line, counted
from builder.build import build_recipe
from builder.build.many import Several, check_all, read_recipes
from builder.plan import Plan, explain
from builder.recipe.read import MAX_SIZE
from builder.toolkit.command_recipe import check_is_recipe, place_of
from builder.toolkit.made import note_left_out, note_steps, several_to_json, to_json
from builder.web.forms import button, field, folder, hidden, recipe_named, text, the_same, tick
from builder.web.html import Content, Markup, join, problem, tag, verbatim
from builder.web.jobs import Job, Outcome
from builder.web.pages import page
from builder.web.site import Form, Json, Response, Site, go_to
from builder.web.views.jobs import follow
from builder.web.views.library import address, link
from builder.web.views.made import outputs
from builder.web.views.planned import preview
from builder.workspace import find_lock

EMPTY = 'format = 1\nname = "model"\nbase = "NEW SDv1"\n\n[sources]\n\n[components]\n'


def show(site: Site, query: Form) -> Markup:
    """The recipes of the folders; or one of them, to be changed."""
    reference = query.get("file")
    if not reference and not query.ticked("new"):
        return _list(site)
    said, seen = (_read(site, reference), True) if reference else (EMPTY, False)
    return _editor(site, reference, said, _digest(said) if seen else "", query)


def _list(site: Site) -> Markup:
    recipes = site.folders.listed().recipes
    boxes = {r: tag("input", type="checkbox", name="file", value=r, aria_label=r) for r in recipes}
    rows = (tag("li", box, " ", link("recipe", r, file=r)) for r, box in boxes.items())
    several = tag(
        "form",
        tag("ul", rows, class_="list"),
        tick("offline", "Use no network"),
        tick("keep_going", "Build all that can be built, where one fails"),
        button("Build those ticked as one"),
        method="post",
        action="build",
    )
    there = text("address", required=True, placeholder="https://…/x.toml, hf://… or git+https://…")
    far = tag(
        "form",
        tag(
            "fieldset",
            tag("legend", "Build a recipe from elsewhere"),
            field("Address", there),
            field("Folder", folder(site, "folder"), "Its outputs go there; nothing there is replaced."),
            button("Build it"),
        ),
        method="post",
        action="build",
    )
    none = tag("p", "No recipe lies in these folders.")
    new = tag("p", tag("a", "Write a new one", href="recipe?new=1", class_="button"))
    return page("Recipes", several if recipes else none, new, far, current="recipes")


def _editor(site: Site, reference: str, said: str, seen: str, query: Form) -> Markup:
    name = reference.rpartition("/")[2]
    path = site.path(reference) if reference else None
    where: list[Content] = (
        [hidden(file=reference)]
        if reference
        else [
            field("Folder", folder(site, "folder", query.get("folder"))),
            field("Name", text("name", query.get("name"), placeholder="model.toml", required=True)),
        ]
    )
    area = tag(
        "textarea",
        Markup("\n"),
        verbatim(said),
        name="text",
        id="recipe",
        spellcheck="false",
        autocapitalize="off",
        autocomplete="off",
        wrap="off",
        rows=22,
        data_check="check",
        aria_describedby="problems",
    )
    saved = tag("p", "Saved.", role="status", class_="good") if query.ticked("saved") else None
    return page(
        name or "New recipe",
        saved,
        tag(
            "form",
            where,
            hidden(seen=seen),
            tag("p", tag("label", "Recipe", for_="recipe")),
            area,
            tag(
                "p",
                button("Save"),
                " ",
                button(
                    "Check", formaction="check", class_="quiet", name="whole", value="1", formnovalidate=True
                ),
                class_="actions",
            ),
            method="post",
            action="save",
        ),
        tag("section", _checked(site, path, said), id="problems", aria_live="polite"),
        _building(reference) if reference else None,
        the_same(command_line("build", path), data=address("api/plan", recipe=reference))
        if path is not None
        else None,
        current="recipes",
    )


def _building(reference: str) -> Markup:
    return tag(
        "form",
        tag(
            "fieldset",
            tag("legend", "Build what is saved"),
            hidden(file=reference),
            tick("offline", "Use no network"),
            tick("locked", "Fail if the lock would change"),
            tick("check", "Build it a second time, and compare"),
            button("Build it"),
        ),
        method="post",
        action="build",
    )


def check(site: Site, form: Form) -> Markup:
    """What is wrong with a text, or else its plan; nothing is written."""
    reference = form.get("file")
    path = site.path(reference) if reference else None
    said = _text(form)
    if not form.ticked("whole"):
        return _checked(site, path, said)
    return _editor(site, reference, said, form.get("seen"), form)


def save(site: Site, form: Form) -> Response:
    """Write a recipe, right or wrong; one that somebody changed meanwhile stays."""
    said, reference, seen = _text(form), form.get("file"), form.get("seen")
    if reference:
        path = _recipe(site, reference)
    else:
        path = site.folders.new(form.get("folder"), recipe_named(form.get("name")))
        reference = site.folders.reference(path)
    if path.exists() and (not seen or _digest(_read(site, reference)) != seen):
        fact = f"`{path.name}` was changed since it was opened here"
        raise OutputError(Problem(fact, Place(str(path)), hint="copy your text, and open the recipe anew"))
    write_bytes(path, said.encode())
    return go_to(address("recipe", saved="1", file=reference))


def build(site: Site, form: Form) -> Response:
    """Build a recipe that is saved or has an address, or several that are saved."""
    if len(form.all("file")) > 1:
        return _build_several(site, form)
    path, into = _named(site, form)
    offline, locked, again = (form.ticked(n) for n in ("offline", "locked", "check"))

    def work(job: Job) -> Outcome:
        with site.workspace(job, offline=offline) as workspace, workspace.sources() as sources:

            def before(plan: Plan) -> None:
                note_left_out(plan, job)
                note_steps(plan, job)

            read = workspace.recipe(path)
            how: dict[str, Any] = {"place": place_of(read, into), "locked": locked, "check": again}
            made = build_recipe(workspace, read, sources, before=before, **how)
        return Outcome(outputs(site, made), to_json(made))

    words = ["-o", into] if into is not None else []
    words += ["--offline"] * offline + ["--locked"] * locked + ["--check"] * again
    title = f"Build {str(path).rpartition('/')[2]}"
    return follow(site.jobs.add(title, work, command=command_line("build", path, *words)))


def _named(site: Site, form: Form) -> tuple[Path | str, str | None]:
    """The recipe that is meant, and of one that has an address the folder that its outputs go into."""
    if not (there := form.get("address").strip()):
        return _recipe(site, form.get("file")), None
    if not is_address(there):
        raise UsageError(Problem(f"`{there}` is no address of a recipe", hint=f"it is {FORMS}"))
    return there, f"{site.path(form.get('folder'))}/"


def _build_several(site: Site, form: Form) -> Response:
    """Build recipes that are saved as one."""
    paths = [_recipe(site, reference) for reference in form.all("file")]
    offline, keep_going = form.ticked("offline"), form.ticked("keep_going")

    def work(job: Job) -> Outcome:
        with site.workspace(job, offline=offline) as workspace, workspace.sources() as sources:
            found = read_recipes(workspace, paths)
            Several(workspace, found, sources, keep_going=keep_going).build()
            if not keep_going:
                check_all(found)
        made = (outputs(site, o.made) for o in found if o.made is not None)
        failed = (problem(p) for o in found if o.error is not None for p in o.error.problems)
        return Outcome(join(*failed, *made), several_to_json(found))

    words = ["--offline"] * offline + ["--keep-going"] * keep_going
    title = f"Build {counted(len(paths), 'recipe')}"
    return follow(site.jobs.add(title, work, command=command_line("build", *paths, *words)))


def data(site: Site, query: Form) -> Json:
    """The object of `ckpt plan --json`."""
    path = _recipe(site, query.get("recipe"))
    return explain.to_json(_plan(site, path, _read(site, query.get("recipe"))))


def _checked(site: Site, path: Path | None, said: str) -> Markup:
    """Problems with their lines, or the plan."""
    try:
        plan = _plan(site, path, said)
        notes = [problem(note, "note") for note in plan.recipe.notes]
        return join(tag("p", "Nothing is wrong with it.", class_="good"), notes, preview(plan))
    except CkptError as error:
        count = len(error.problems)
        head = "What is wrong" if count == 1 else f"{count} things are wrong"
        return join(tag("h2", head), map(_problem, error.problems))


def _problem(found: Problem) -> Markup:
    """A problem, with a way to its line."""
    place = found.place
    if place is None or place.line is None:
        return problem(found)
    to = button(
        f"Go to line {place.line}",
        type="button",
        class_="quiet",
        data_line=place.line,
        data_column=place.column or 1,
    )
    return tag("div", problem(found), to, class_="wrong")


def _plan(site: Site, path: Path | None, said: str) -> Plan:
    """The plan of a text, as if it were the recipe at `path`; without network. Raises CkptError."""
    at = path if path is not None else next(iter(site.folders.roots.values())) / "recipe.toml"
    with site.workspace() as workspace, workspace.sources() as sources:
        recipe = workspace.recipe(at, text=said)
        return workspace.plan(recipe, sources, find_lock(recipe, anew=True))


def _text(form: Form) -> str:
    said = form.get("text").replace("\r\n", "\n")
    if len(said.encode()) > MAX_SIZE:
        raise UsageError(Problem(f"a recipe has at most {MAX_SIZE:,} bytes"))
    return said


def _recipe(site: Site, reference: str) -> Path:
    path = site.path(reference)
    if path.suffix != ".toml":
        raise UsageError(Problem(f"`{reference}` is no recipe", hint="a recipe's name ends in `.toml`"))
    return path


def _read(site: Site, reference: str) -> str:
    """The text of a recipe; of what is none, nothing is shown. Raises CkptError."""
    path = _recipe(site, reference)
    said = read_text(path, MAX_SIZE, OutputError)
    if "format" not in said:  # one with errors in it is a recipe all the same
        check_is_recipe(path)
    return said


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()
