"""A sketched recipe as the text that a person goes on with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.base.words import spelling
from builder.recipe.names import numbered
from builder.reports.imports.sketch import Sketch, plain
from builder.reports.new.recipe_text import comment, toml

WIDE = 108  # characters of a line, where a step becomes a table of its own


def write(sketch: Sketch, name: str, origin: str, folder: Path) -> str:
    """The recipe as TOML, to lie in `folder`: `origin` is the file that it was read from."""
    used = sketch.reached()
    steps = {n: dict(s) for n, s in sketch.steps.items() if n in used}
    arithmetic = {s.get("arithmetic") for s in steps.values()}
    shared = arithmetic.pop() if len(arithmetic) == 1 else None
    if shared is not None:
        for step in steps.values():
            del step["arithmetic"]
    sources = {n: s for n, s in sketch.sources.items() if n in used}
    left = [n for n in sketch.sources if n not in used]
    blocks = [
        _head(sketch, origin, left),
        _top(sketch, name, shared),
        *(_source(n, s, sketch) for n, s in sources.items()),
        _steps(steps, sketch),
        _table("components", sketch.components),
        _table("output", _file(sketch, sources, name, folder) | sketch.output),
        _expect(sketch),
    ]
    return "\n\n".join("\n".join(lines) for b in blocks if (lines := list(b))) + "\n"


def _file(sketch: Sketch, sources: Mapping[str, Any], name: str, folder: Path) -> dict[str, str]:
    """Another file than that of the recipe's name, where one is there or is a source."""
    taken = {str(s.get("file", "")).casefold() for s in sources.values()}
    file = f"{name}.safetensors"
    if file.casefold() not in taken and not os.path.lexists(folder / file):
        return {}
    others = (p.name for p in numbered(Path(f"{name}-built.safetensors")))
    return {"file": next(o for o in others if o.casefold() not in taken)}


def _head(sketch: Sketch, origin: str, left: list[str]) -> Iterator[str]:
    yield comment(f"Brought in from {origin}: {sketch.dialect}.")
    if lacking := sketch.lacking():
        yield "#"
        yield comment("What it does not say, or a recipe cannot:")
        yield from (comment(f"- {text}") for text in lacking)
    if left:
        yield comment(f"Not needed for what is here: {', '.join(left)}.")


def _top(sketch: Sketch, name: str, arithmetic: str | None) -> Iterator[str]:
    yield "format = 1"
    yield f"name = {toml(name)}"
    if sketch.description:
        yield f"description = {toml(sketch.description)}"
    yield f"base = {toml(sketch.base)}"
    if arithmetic is not None:
        yield f"arithmetic = {toml(arithmetic)}   # as the program computed: each product and sum rounded"


def _source(name: str, said: Mapping[str, Any], sketch: Sketch) -> Iterator[str]:
    yield f"[sources.{_key(name)}]"
    yield from (comment(text) for text in sketch.told.get(name, ()))
    yield from (f"{k} = {_value(v)}" for k, v in said.items())


def _steps(steps: Mapping[str, Mapping[str, Any]], sketch: Sketch) -> Iterator[str]:
    """Steps on a line each, or where that is too long, as tables behind these."""
    lines = {n: f"{_key(n)} = {_value(s)}" for n, s in steps.items()}
    short = {n: line for n, line in lines.items() if len(line) <= WIDE}
    if short:
        yield "[steps]"
    for name, line in short.items():
        yield from (comment(text) for text in sketch.told.get(name, ()))
        yield line
    for name in (n for n in lines if n not in short):
        if short or name != next(iter(lines)):
            yield ""
        yield f"[steps.{_key(name)}]"
        yield from (comment(text) for text in sketch.told.get(name, ()))
        yield from (f"{k} = {_value(v)}" for k, v in steps[name].items())


def _table(name: str, said: Mapping[str, Any]) -> Iterator[str]:
    if said:
        yield f"[{name}]"
        yield from (f"{_key(k)} = {_value(v)}" for k, v in said.items())


def _expect(sketch: Sketch) -> Iterator[str]:
    if sketch.autov3 is not None:
        digest, why = sketch.autov3
        if why:
            yield comment(f"Not expected, as {why}:")
        mark = "# " if why else ""
        yield f"{mark}[expect]"
        yield f"{mark}autov3 = {toml(digest)}" + ("" if why else "   # the file's own")


def _value(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return plain(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return toml(value)


def _key(key: str) -> str:
    """A key, bare where it may be."""
    bare = key.isascii() and spelling(key).isalnum() and " " not in key
    return key if bare else toml(key)
