"""The frame of every page, and the pages that say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus

from builder.base.errors import Problem
from builder.web.html import Content, Markup, join, problem, tag
from builder.web.site import Response

NAVIGATION = {
    "library": "./",
    "slots": "replace",
    "merge": "merge",
    "diff": "diff",
    "recipes": "recipe",
    "inbox": "inbox",
    "store": "store",
    "work": "jobs",
}


def page(title: str, *content: Content, current: str = "", refresh: int = 0) -> Markup:
    """A whole page. With `refresh`, it is loaded again after so many seconds where no script runs."""
    again = tag("noscript", tag("meta", http_equiv="refresh", content=refresh)) if refresh else None
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – ckpt"),
        tag("link", rel="stylesheet", href="static/page.css"),
        tag("link", rel="icon", href="static/icon.svg", type="image/svg+xml"),
        tag("script", src="static/page.js", defer=True),
        again,
    )
    links = (
        tag("li", tag("a", name.capitalize(), href=href, aria_current="page" if name == current else None))
        for name, href in NAVIGATION.items()
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("a", "ckpt", href="./", class_="name"),
            tag("nav", tag("ul", links), aria_label="Views"),
        ),
        tag("main", tag("h1", title), *content, id="content", tabindex=-1),
    )
    return Markup("<!doctype html>") + tag("html", head, body, lang="en")  # type: ignore[return-value]


def refusal(title: str, why: str) -> Markup:
    """A page for whoever may see no other."""
    said = tag("body", tag("main", tag("h1", title), tag("p", why)))
    return join(Markup("<!doctype html>"), tag("html", tag("head", tag("title", title)), said, lang="en"))


def failure(
    problems: Iterable[Problem], status: int = 422, code: int = 2, *, in_json: bool = False
) -> Response:
    """That something cannot be done, and why; `code` is what the command would exit with."""
    found = list(problems)
    if in_json:
        rows = [{"fact": p.fact, "evidence": list(p.evidence), "hint": p.hint} for p in found]
        text = json.dumps({"schema": 1, "code": code, "error": rows}, indent=2)
        return Response(text, status, "application/json")
    title = {404: HTTPStatus.NOT_FOUND.phrase}.get(status, "This cannot be done")
    return Response(page(title, map(problem, found)), status)
