"""What a command line may not say twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from builder.base.errors import Problem, UsageError


class Command(click.Command):
    """A command that takes each option's value once, where click would take the last without a word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)  # which click empties
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            values, _, order = self.make_parser(ctx).parse_args(words)
            _refuse(values, order, ctx)
        return rest


class Group(click.Group):
    """A command of several, each such a one."""

    command_class = Command


def _refuse(values: dict[str, Any], order: list[click.Parameter], ctx: click.Context) -> None:
    """Raise UsageError for a value that is given twice, and for two options of which one can be."""
    given: dict[str | None, click.Parameter] = {}
    for param, count in Counter(p for p in order if isinstance(p, click.Option)).items():
        if count > 1 and not (param.is_flag or param.multiple):
            raise click.UsageError(f"Option {param.get_error_hint(ctx)} is given {count} times.", ctx)
        if (other := given.setdefault(param.name, param)) is not param:
            raise _excluding(other, param)
    if "json" in given and values.get("output_format") not in (None, "json", "github"):  # which go together
        raise _excluding(given["json"], given["output_format"])


def _excluding(*options: click.Parameter) -> UsageError:
    return UsageError(Problem(f"{' and '.join(f'`{o.opts[0]}`' for o in options)} exclude each other"))
