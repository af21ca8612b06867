"""The command line: the only place that prints and exits."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from builder import __version__
from builder.base.errors import CkptError, ExitCode, Place, Problem, printable, render
from builder.base.signals import WORDS, came, catch, code_of, leave

# A command's module is imported when it is asked for: starting stays fast whatever the others need.
COMMANDS: dict[str, str] = {
    "build": "Build a recipe into files that are the same bytes everywhere.",
    "lock": "Pin what a recipe resolves to, without building it.",
    "plan": "Say what a build would do, and why.",
    "components": "The catalog: list its components, show one, learn a new one.",
    "demo": "Build a miniature model step by step, and show how.",
    "convert": "Write a checkpoint in another container, precision or layout.",
    "extract": "Write a component of a checkpoint as a file of its own.",
    "diff": "Say what tells two checkpoints apart, and why.",
    "lora": "Bake LoRAs into a checkpoint.",
    "merge": "Merge checkpoints into one.",
    "hook": "Check what is about to be committed, as pre-commit does.",
    "inspect": "Say what is in a checkpoint, without running or loading it.",
    "prune": "Write checkpoints without EMA, junk and wasted precision.",
    "replace": "Write a checkpoint with components of other files.",
    "new": "Write a recipe for files that exist, and find what they are made of.",
    "schema": "Print the JSON Schema of recipes, for editors.",
    "ui": "A page for the browser: see, click, prune, merge, build.",
    "store": "The cache of made components: list it, make room, check it.",
    "verify": "Compare a file with its recipe's lock and expectations.",
}

READER_GONE = 141  # as a shell says of a process that SIGPIPE ended

BROKEN = 70  # as sysexits.h calls an internal software error


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"builder.cli.{name}").command
        assert isinstance(command, click.Command)
        _restore_help(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from builder.base.errors import did_you_mean

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS)
            ctx.fail(f"no command `{args[0]}`" + (f"\nhint: {hint}" if hint else ""))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would exit with 1 for it, which says "no"
            _drop_output()
            return READER_GONE


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="ckpt")
def cli() -> None:
    """Build model checkpoints from recipes: the same recipe gives the same bytes everywhere."""


def _restore_help(command: click.Command) -> None:
    """Give a command, and those below it, their help: `python -OO` leaves it in the source alone."""
    if sys.flags.optimize > 1 and command.help is None and command.callback is not None:
        function: Any = getattr(command.callback, "__wrapped__", command.callback)
        with suppress(OSError):
            import ast

            tree = ast.parse(Path(function.__code__.co_filename).read_text(encoding="utf-8"))
            found = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
            command.help = next(ast.get_docstring(n) for n in found if n.name == function.__name__)
        for inner in getattr(command, "commands", {}).values():
            _restore_help(inner)


def _speak_unicode() -> None:
    """Begin anew in UTF-8 mode where names of files are ASCII by the locale: recipes name any others."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code (see `builder.base.errors.ExitCode`)."""
    if args is None:
        _speak_unicode()
    _restore_help(cli)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # not every terminal has every character
    catch()
    try:
        code = run(args)
    except Exception as error:
        if came():
            code = code_of(error)
            click.echo(f"error: {WORDS[code]}", err=True)
            sys.exit(leave(code))
        # Every error that a person can cause has a message; what is left is ours, and 1 would say "no".
        traceback.print_exc()
        click.echo("error: this is a mistake in ckpt itself\nhint: report it with the lines above", err=True)
        code = BROKEN
    done = leave(code)
    if done != code:
        click.echo(f"error: {WORDS[done]}", err=True)
    sys.exit(done)


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become messages on stderr."""
    try:
        result: Any = cli.main(args, prog_name="ckpt", standalone_mode=False)
    except CkptError as error:
        click.echo("\n\n".join(render(p) for p in error.problems), err=True)
        return int(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return int(ExitCode.USAGE)
    except click.UsageError as error:
        lines = map(printable, error.format_message().split("\n"))
        click.echo("error: " + "\n".join(lines), err=True)
        if error.ctx is not None:
            click.echo(f"hint: `{error.ctx.command_path} --help` lists what there is", err=True)
        return int(ExitCode.USAGE)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        code = code_of(error.__cause__ or error)
        click.echo(f"error: {WORDS[code]}", err=True)
        return code
    except OSError as error:  # what no other message was made of, such as a full disk below stdout
        _drop_output()
        place = Place(str(error.filename)) if error.filename else None
        click.echo(render(Problem((error.strerror or str(error)).lower(), place)), err=True)
        return int(ExitCode.MISMATCH)
    return int(result) if isinstance(result, int) else int(ExitCode.DONE)


def _drop_output() -> None:
    """Let what is left to print vanish: flushing it at the end would fail once more."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
