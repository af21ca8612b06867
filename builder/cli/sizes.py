"""Sizes as people write them on the command line."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1} | {f"{p}{b}": 1000**i for i, p in enumerate("KMGT", 1) for b in ("", "B")}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)} | {"B": 1}


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes that an option such as `10GB` (decimal) or `2GiB` (binary) means."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise click.BadParameter(f"`{value}` is no size; write it as `10GB`, `500MB` or `0`", ctx, param)
    return int(float(match[1]) * _UNITS[match[2].upper()])
