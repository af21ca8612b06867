"""`ckpt schema`: the JSON Schema of recipes."""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """Print the JSON Schema of recipes, with the classes of your own catalog.

    Editors that know TOML use it to complete and check: save it as `recipe.schema.json` and begin a
    recipe with `#:schema recipe.schema.json`.
    """
    from builder.models.catalog import load_catalog
    from builder.recipe.schema import schema_text

    click.echo(schema_text(load_catalog()), nl=False)
