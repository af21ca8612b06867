"""One table of a catalog file, checked against the fields that it may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from builder.base.braces import BraceError, expand
from builder.base.errors import CatalogError, Place, Problem, did_you_mean
from builder.base.toml import Document, Keys
from builder.models.catalog.tables import ModelSpec

MAX_PATTERNS = 500  # of a list, and of all that tell kinds of files; those built in are about 180
PRECISIONS = ("fp16", "bf16", "fp32", "keep")
_MODELSPEC = {"architecture": str, "v": str, "resolution": int, "resolution_v": int}
_NUMBERS = ("shape", "last")  # fields that are lists of them
_WORDS = {
    str: "a string",
    int: "a number",
    float: "a number with a point",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


class Fields:
    """One table of a catalog file, checked against the fields that it may have."""

    def __init__(self, document: Document, keys: Keys, allowed: Mapping[str, type], *needed: str) -> None:
        table: Any = document.data
        for key in keys:
            table = table[key]
        self.document = document
        self.keys = keys
        if not isinstance(table, dict):
            self.fail("a table is due here")
        self.table: dict[str, Any] = table
        for name, value in table.items():
            if name not in allowed:
                self.fail(f"unknown field `{name}`", name, hint=did_you_mean(name, allowed))
            if type(value) is not allowed[name]:
                self.fail(f"`{name}` is not {_WORDS[allowed[name]]}", name, value=True)
            if type(value) is int and not 0 <= value < 1 << 63:
                self.fail(f"`{name}` is not a number that can be right", name, value=True)
            if type(value) is list and name not in _NUMBERS and not all(isinstance(v, str) for v in value):
                self.fail(f"`{name}` is not a list of strings", name, value=True)
            if name in ("name", "class", "kind", "called") and not is_name(value):
                self.fail(f"`{name}` is not a word that can be shown", name, value=True)
        for name in needed:
            if name not in table:
                self.fail(f"`{name}` is missing")

    def get(self, name: str) -> Any:
        """The field's value, or None."""
        return self.table.get(name)

    def strings(self, name: str) -> tuple[str, ...]:
        """The field's strings, none if it is not given."""
        return tuple(self.table.get(name, ()))

    def inner(self, name: str, allowed: Mapping[str, type], *needed: str) -> Fields | None:
        """A table inside, or None."""
        return Fields(self.document, (*self.keys, name), allowed, *needed) if name in self.table else None

    def texts(self, name: str) -> dict[str, str]:
        """A table inside that has nothing but strings, empty if it is not given."""
        for key, value in self.table.get(name, {}).items():
            if not isinstance(value, str):
                self.fail(f"`{key}` is not a string", name, key, value=True)
        return dict(self.table.get(name, {}))

    def expand(self, pattern: str, *keys: str | int) -> tuple[list[str], int]:
        """What a pattern of this table, at these keys, stands for, as `braces.expand` gives it."""
        try:
            return expand(pattern)
        except BraceError as wrong:
            self.fail(str(wrong), *keys)

    def patterns(self, name: str) -> tuple[str, ...]:
        """What the field's strings stand for, their braces expanded."""
        return tuple(p for n, word in enumerate(self.strings(name)) for p in self.expand(word, name, n)[0])

    def precision(self) -> str | None:
        """The field `precision`, or None."""
        said: str | None = self.get("precision")
        if said not in (None, *PRECISIONS):
            hint = f"there are {', '.join(PRECISIONS)}"
            self.fail(f"unknown precision `{said}`", "precision", value=True, hint=hint)
        return said

    def place(self, *keys: str | int, value: bool = False) -> Place:
        """Where a field of this table stands."""
        return self.document.place(*self.keys, *keys, value=value)

    def fail(self, fact: str, *keys: str | int, value: bool = False, **more: Any) -> NoReturn:
        """Raise CatalogError about a field, or about the table as a whole."""
        raise CatalogError(Problem(fact, self.place(*keys, value=value), **more))


def is_name(text: object) -> bool:
    """Whether it is a word that can be shown."""
    return isinstance(text, str) and text.strip() != "" and text.isprintable()


_PLAIN = re.compile(r"""[^\s./\\:*?"<>|~-][^/\\:*?"<>|]{0,99}""")


def is_plain(text: object) -> bool:
    """Whether a name of a component, a class or an architecture may become part of a file's."""
    return is_name(text) and isinstance(text, str) and _PLAIN.fullmatch(text) is not None


def modelspec(fields: Fields) -> ModelSpec | None:
    """What a table says of ModelSpec metadata."""
    said = fields.inner("modelspec", _MODELSPEC, "architecture")
    return ModelSpec(**said.table) if said is not None else None
