"""What a build made."""

from __future__ import annotations

from pathlib import Path

from builder.base.errors import CkptError
from builder.build import Build
from builder.web.html import Content, Markup, code, facts, join, size, tag
from builder.web.site import Site
from builder.web.views.library import link


def outputs(site: Site, made: Build, saved: Path | None = None) -> Markup:
    """The files that were written, and what fixes changed."""
    shown = [
        tag(
            "section",
            tag("h2", _linked(site, built.path, "report", "file")),
            facts(
                [
                    ("state", tag("strong", built.state, class_="good")),
                    ("size", size(built.size)),
                    ("metric", f"({built.metric})" if built.metric else None),
                    ("sha256", code(built.sha256)),
                ]
            ),
        )
        for built in made.outputs
    ]
    changes = [tag("li", f"{label}: {c}") for label, found in made.changes.items() for c in found]
    recipe = tag("p", "The recipe: ", _linked(site, saved, "recipe", "file")) if saved is not None else None
    return join(
        shown,
        recipe,
        tag("h3", "What fixes changed") if changes else None,
        tag("ul", changes) if changes else None,
    )


def _linked(site: Site, path: Path, view: str, name: str) -> Content:
    try:
        reference = site.folders.reference(path)
    except CkptError:
        return code(str(path))
    return link(view, reference, **{name: reference})
