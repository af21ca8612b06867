"""The JSON Schema of recipes, as the language states it: for editors, and for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from builder.base.kinds import Schema
from builder.operations import OPERATIONS
from builder.operations.fixes import FIXES, Fix
from builder.operations.registry import Operation
from builder.recipe.language import Vocabulary

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(
    catalog: Catalog,
    *,
    operations: Mapping[str, Operation] = OPERATIONS,
    fixes: Mapping[str, Fix] = FIXES,
) -> Schema:
    """The JSON Schema (draft 2020-12) of the form of recipes.

    What holds only between values, such as that a name is that of a source, is left to the reader.
    """
    defs: Schema = {}
    Vocabulary(catalog, operations, fixes).language.schema(defs)
    body = defs.pop("recipe")
    described = {"title": "recipe of a model checkpoint", "description": "What `ckpt build` builds from."}
    return {"$schema": DIALECT, **described, **body, "$defs": dict(sorted(defs.items()))}


def schema_text(catalog: Catalog) -> str:
    """The schema as it is checked in: indented JSON and a newline."""
    return json.dumps(recipe_schema(catalog), indent=2, ensure_ascii=False) + "\n"
