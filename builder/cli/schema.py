"""`ckpt schema`: the JSON Schema of recipes."""

from __future__ import annotations

import json

import click

from builder.cli.command import Command
from builder.cli.options import json_option
from builder.cli.terminal import out


@click.command("schema", cls=Command)
@json_option
def command() -> None:
    """Print the JSON Schema of recipes, with the classes of your own catalog.

    Editors that know TOML use it to complete and check: save it as `recipe.schema.json` and begin a
    recipe with `#:schema recipe.schema.json`.
    """
    from builder.models.catalog import load_catalog
    from builder.recipe.schema import schema_text

    text = schema_text(load_catalog())
    out().raw({"recipe_schema": json.loads(text)}, text)
