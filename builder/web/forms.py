"""The pieces that forms are made of, and what they stand for on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.base.errors import Problem, UsageError
from builder.operations.fixes import FIXES
from builder.recipe.lock import LOCK
from builder.recipe.profiles import PROFILES
from builder.tensors.cast import PRECISIONS
from builder.web.html import Content, Markup, join, tag, verbatim
from builder.web.site import Form, Site


def field(label: str, control: Content, hint: Content = None) -> Markup:
    """A control inside its label, and a line about it."""
    return tag(
        "p", tag("label", tag("span", label), control), tag("small", hint) if hint else None, class_="field"
    )


def text(name: str, value: str = "", kind: str = "text", **more: Any) -> Markup:
    """A line of text."""
    return tag("input", type=kind, name=name, value=value, autocomplete="off", spellcheck="false", **more)


def select(name: str, choices: Mapping[str, str] | Iterable[str], chosen: str = "", **more: Any) -> Markup:
    """One of several; `choices` are words by value."""
    found = choices if isinstance(choices, Mapping) else {c: c for c in choices}
    options = (tag("option", words, value=value, selected=value == chosen) for value, words in found.items())
    return tag("select", options, name=name, **more)


def tick(name: str, label: str, ticked: bool = False, hint: Content = None) -> Markup:
    """A box to tick."""
    box = tag("input", type="checkbox", name=name, value="1", checked=ticked)
    return tag("p", tag("label", box, " ", label), tag("small", hint) if hint else None, class_="tick")


def hidden(**fields: str) -> Markup:
    """Fields that are sent along."""
    return join(*(tag("input", type="hidden", name=name, value=value) for name, value in fields.items()))


def button(label: str, **more: Any) -> Markup:
    """A button that sends the form."""
    return tag("button", label, **more)


def anew(label: str, view: str, said: str = "") -> Markup:
    """A button that shows a view anew with what its form says, and does nothing; `said` is its own name."""
    named = {"name": said, "value": "1"} if said else {}
    return button(label, formmethod="get", formaction=view, **named, class_="quiet", formnovalidate=True)


def files(site: Site, name: str, chosen: str = "", *, optional: bool = False, **more: Any) -> Markup:
    """One of the checkpoints of the folders."""
    found = {"": "–" if optional else "choose a file"}
    found |= {reference: reference for reference in site.folders.listed().files}
    return select(name, found, chosen, required=not optional, **more)


def folder(site: Site, name: str, chosen: str = "", **more: Any) -> Markup:
    """One of the folders, or of those in them."""
    return select(name, site.folders.listed().folders, chosen, **more)


def output(site: Site, form: Form, usual: str, home: str) -> Markup:
    """Where a file goes: folder, name, and whether to replace what is there; and the recipe beside it."""
    return tag(
        "fieldset",
        tag("legend", "Write"),
        field("Folder", folder(site, "folder", form.get("folder", home))),
        field("Name", text("name", form.get("name", usual), required=True)),
        tick("replace", "Replace a file of this name", form.ticked("replace")),
        field(
            "Save the recipe as",
            text("save", form.get("save"), placeholder="NAME.toml"),
            "Leave it empty to save none.",
        ),
        class_="write",
    )


def target(site: Site, form: Form) -> Path:
    """The path that `output` asks for; raises CkptError."""
    return site.folders.new(form.get("folder"), form.get("name"), replace=form.ticked("replace"))


def save(site: Site, form: Form) -> Path | None:
    """Where the recipe is to be saved, None: nowhere; raises CkptError for what is no recipe's name."""
    name = form.get("save")
    if not name:
        return None
    name = recipe_named(name)
    # What is there already is looked at when it is written: the same recipe serves.
    return site.folders.new(form.get("folder"), name, replace=True)


def recipe_named(name: str) -> str:
    """The name of a recipe's file; raises UsageError for that of a lock."""
    name = name if not name or name.endswith(".toml") else f"{name}.toml"
    if name.endswith(LOCK):
        fact = f"`{name}` is the name of a recipe's lock"
        raise UsageError(Problem(fact, hint="give the recipe a name that ends in `.toml` alone"))
    return name


def making(form: Form) -> Markup:
    """How components are written: precision, fixes, and numbers that do not fit."""
    usual = {"": "as it is published"}
    fixes = (tick(f"fix.{name}", name, form.ticked(f"fix.{name}"), fix.doc) for name, fix in FIXES.items())
    return tag(
        "details",
        tag("summary", "Precision, repairs and numbers that do not fit"),
        field("Precision", select("precision", usual | {p: p for p in PRECISIONS}, form.get("precision"))),
        field(
            "For the program", select("profile", {"": "any", **{p: p for p in PROFILES}}, form.get("profile"))
        ),
        field(
            "Values beyond the precision",
            select("overflow", ("error", "clamp", "keep"), form.get("overflow", "error")),
        ),
        field("NaN and infinity", select("non_finite", ("error", "keep"), form.get("non_finite", "error"))),
        tag("fieldset", tag("legend", "Repairs"), fixes),
        open=any(made_options(form).values()) or bool(fixes_of(form)),
    )


def made_options(form: Form) -> dict[str, str | None]:
    """What `making` says, as the toolkit takes it."""
    said = {name: form.get(name) or None for name in ("precision", "profile", "overflow", "non_finite")}
    return {name: None if value == "error" else value for name, value in said.items()}


def fixes_of(form: Form) -> tuple[str, ...]:
    """The fixes that `making` says."""
    return tuple(name for name in FIXES if form.ticked(f"fix.{name}"))


def option_words(form: Form) -> list[str]:
    """What `making` says, as options of a command."""
    words = [
        w
        for name, value in made_options(form).items()
        if value
        for w in (f"--{name.replace('_', '-')}", value)
    ]
    return [*words, *(w for name in fixes_of(form) for w in ("--fix", name))]


def the_same(command: str, recipe: str = "", data: str = "") -> Markup:
    """How to do the same in a terminal, the recipe that it stands for, and the address of its `--json`."""
    return tag(
        "section",
        tag("h2", "The same elsewhere"),
        tag("p", "On the command line:") if command else None,
        tag("pre", verbatim(command), tabindex=0, class_="command") if command else None,
        tag("details", tag("summary", "As a recipe"), tag("pre", verbatim(recipe), tabindex=0))
        if recipe
        else None,
        tag("p", tag("a", "As JSON", href=data)) if data else None,
        class_="same",
    )
