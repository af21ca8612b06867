"""Sizes as people write them on the command line."""

from __future__ import annotations

import click

from builder.base import words


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes that an option such as `10GB` (decimal) or `2GiB` (binary) means."""
    size = words.parse_size(value.strip()) if value is not None else None
    if value is not None and size is None:
        raise click.BadParameter(f"`{value}` is no size; write it as `10GB`, `500MB` or `0`", ctx, param)
    return size
