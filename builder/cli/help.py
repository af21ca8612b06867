"""`ckpt help`: how a command is used."""

from __future__ import annotations

import click

from builder.cli.command import Command
from builder.cli.options import json_option
from builder.cli.terminal import out


def _commands(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """The commands, or those of the one before, that begin so."""
    found: click.Command | None = context.find_root().command
    for word in context.params.get("words") or ():
        found = found.get_command(context, word) if isinstance(found, click.Group) else None
    names = found.list_commands(context) if isinstance(found, click.Group) else []
    return [name for name in names if name.startswith(begun)]


@click.command("help", cls=Command)
@click.argument("words", nargs=-1, metavar="[COMMAND…]", shell_complete=_commands)
@json_option
@click.pass_context
def command(context: click.Context, words: tuple[str, ...]) -> None:
    """Say how COMMAND is used, as `ckpt COMMAND --help` does; without one, what there is."""
    from builder.cli import no_command

    found, at = context.find_root().command, context.find_root()
    for word in words:
        inner = found.get_command(at, word) if isinstance(found, click.Group) else None
        if inner is None:
            raise no_command(" ".join(words))
        found, at = inner, click.Context(inner, parent=at, info_name=word)
    text = found.get_help(at)
    out().raw({"text": text}, text)
