"""HTML that is put together from strings, all of which are escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from builder.base.errors import Problem, clipped
from builder.base.progress import human_bytes

_VOID = {"input", "meta", "link", "br", "hr"}
_SENT = {"value", "href"}  # attributes that are sent back, and are not shown
_LONGEST = 4000  # characters of a text out of a file


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | int | float | None | Iterable[Any]


def tag(name: str, /, *content: Content, **attributes: Any) -> Markup:
    """An element. In names of attributes `_` stands for `-`, and one at the end for nothing.

    An attribute of None or False is left out, one of True has no value. Content is escaped unless it is
    Markup; lists are taken apart.
    """
    said = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{join(*content)}</{name}>")


def join(*content: Content) -> Markup:
    """Pieces of content as one."""
    return Markup("".join(_piece(c) for c in content))


def verbatim(text: str) -> Markup:
    """Text as it is, for what is edited: escaped, but neither cut nor made printable."""
    return Markup(html.escape(text))


def _piece(content: Content) -> str:
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return html.escape(visible(content))
    if content is None:
        return ""
    if isinstance(content, (int, float)):
        return str(content)
    return "".join(_piece(c) for c in content)


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    text = str(value) if name in _SENT else visible(str(value))
    return f" {name}" if value is True else f' {name}="{html.escape(text)}"'


def visible(text: str) -> str:
    """A stranger's text with what does not print, or turns text around, escaped; cut where it has no end."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in clipped(text, _LONGEST)
    )


def size(count: int | None) -> Markup:
    """Bytes, to the byte where one points at it; None is unknown."""
    if count is None:
        return tag("span", "unknown")
    return tag("span", human_bytes(count), title=f"{count:,} bytes", class_="number")


def code(text: str) -> Markup:
    """A name, digest or command."""
    return tag("code", text)


def ticked(text: str) -> Markup:
    """A message, what stands between backticks as code."""
    return (
        join(code(part) if odd % 2 else part for odd, part in enumerate(text.split("`")) if part)
        if text.count("`") % 2 == 0
        else join(text)
    )


def problem(found: Problem, severity: str = "error") -> Markup:
    """A problem as a person reads it: fact, place, evidence and hint."""
    place = found.place
    where: list[Content] = []
    if place is not None:
        line = "" if place.line is None else f":{place.line}"
        column = "" if place.column is None or not line else f":{place.column}"
        where.append(tag("p", code(f"{place.path}{line}{column}"), class_="place"))
        if place.line is not None and place.text is not None:
            before = " " * max(0, (place.column or 1) - 1 - place.cut)
            mark = f"\n{before}{'^' * max(1, place.width)}" if place.column is not None else ""
            text = place.text.replace("\t", " ")
            where.append(tag("pre", f"{text}{mark}", class_="excerpt", tabindex=0))
    evidence = [tag("li", ticked(e)) for e in found.evidence[:50]]
    return tag(
        "div",
        tag("p", tag("strong", f"{severity}: "), ticked(found.fact)),
        where,
        tag("ul", evidence) if evidence else None,
        tag("p", tag("strong", "hint: "), ticked(found.hint)) if found.hint else None,
        class_=f"problem {severity}",
    )


def table(
    head: Iterable[str],
    rows: Iterable[Iterable[Content]],
    *,
    caption: str,
    numbers: Iterable[int] = (),
    kind: str | None = None,
) -> Markup:
    """A table whose rows become cards where it is narrow; `numbers` are columns of numbers, from 0.

    An empty cell has a dash. Roles are said, as what is shown as cards is no table to some browsers.
    """
    names, right = list(head), set(numbers)

    def cell(index: int, content: Content) -> Markup:
        empty = content is None or content == ""
        words = " ".join(["number"] * (index in right) + ["none"] * empty) or None
        shown = "–" if empty else content
        if index == 0:
            return tag("th", shown, scope="row", role="rowheader", class_=words)
        return tag("td", shown, role="cell", data_label=names[index], class_=words)

    heads = (
        tag("th", n, scope="col", role="columnheader", class_="number" if i in right else None)
        for i, n in enumerate(names)
    )
    lines = (tag("tr", (cell(i, c) for i, c in enumerate(row)), role="row") for row in rows)
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", heads, role="row"), role="rowgroup"),
        tag("tbody", lines, role="rowgroup"),
        role="table",
        class_=kind,
    )


def facts(rows: Iterable[tuple[str, Content]]) -> Markup:
    """Labelled facts; those without content are left out."""
    return tag(
        "dl",
        (
            tag("div", tag("dt", label), tag("dd", content))
            for label, content in rows
            if content not in (None, "", [], ())
        ),
    )
