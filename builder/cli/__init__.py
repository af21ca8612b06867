"""The command line: the only place that prints and exits."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from builder import __version__
from builder.base.descriptors import open_more
from builder.base.errors import CkptError, ExitCode, Place, Problem, UsageError, did_you_mean
from builder.base.signals import WORDS, came, catch, code_of, leave
from builder.cli.forms import FORMS
from builder.cli.terminal import Output

# A command's module is imported when it is asked for: starting stays fast whatever the others need.
TOPICS: dict[str, dict[str, str]] = {
    "Recipes": {
        "build": "Build recipes into files that are the same bytes everywhere.",
        "sweep": "Build variants of a recipe, each with a recipe of its own.",
        "plan": "Say what a build would do, and why.",
        "lock": "Pin what a recipe resolves to, without building it.",
        "verify": "Compare a file with its recipe's lock and expectations.",
        "new": "Write a recipe for files that exist, and find what they are made of.",
        "share": "Write what a page about a model needs: card, hashes, lineage.",
        "schema": "Print the JSON Schema of recipes, for editors.",
        "hook": "Check what is about to be committed, as pre-commit does.",
    },
    "Files, to look at": {
        "inspect": "Say what is in a checkpoint, without running or loading it.",
        "diff": "Say what tells two checkpoints apart, and why.",
    },
    "Files, to make in one line": {
        "prune": "Write checkpoints without EMA, junk and wasted precision.",
        "extract": "Write a component of a checkpoint as a file of its own.",
        "replace": "Write a checkpoint with components of other files.",
        "merge": "Merge checkpoints into one.",
        "lora": "Bake LoRAs into a checkpoint.",
        "convert": "Write a checkpoint in another container, precision or layout.",
    },
    "All else": {
        "components": "The catalog: list its components, show one, learn a new one.",
        "ui": "A page for the browser: see, click, prune, merge, build.",
        "store": "The cache of made components: list it, make room, check it.",
        "demo": "Build a miniature model step by step, and show how.",
        "help": "Say how a command is used.",
    },
}
COMMANDS: dict[str, str] = {name: said for topic in TOPICS.values() for name, said in topic.items()}

READER_GONE = 141  # as a shell says of a process that SIGPIPE ended

BROKEN = 70  # as sysexits.h calls an internal software error
UNAVAILABLE = 69  # as it calls a library that is not there
PACKAGES = ("torch", "numpy", "safetensors", "networkx", "blake3", "xxhash", "tomli", "tomli_w")


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
        wide = max(map(len, COMMANDS))
        for topic, commands in TOPICS.items():
            with formatter.section(topic):
                formatter.write_dl([(name.ljust(wide), said) for name, said in commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise no_command(args[0])
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
@click.version_option(__version__, "-V", "--version", prog_name="ckpt")
def cli() -> None:
    """Build model checkpoints from recipes: the same recipe gives the same bytes everywhere."""


def no_command(name: str) -> UsageError:
    """That there is no such command."""
    hint = did_you_mean(name, COMMANDS) or "`ckpt --help` lists what there is"
    return UsageError(Problem(f"no command `{name}`", hint=hint))


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
    open_more()
    words = sys.argv[1:] if args is None else args
    output = output_of(words)
    try:
        code = execute(words, output)
    except Exception as error:
        if came():
            code = code_of(error)
            output.fail(Problem(WORDS[code]))
        else:  # every error that a person can cause has a message; what is left is ours, and 1 would say "no"
            traceback.print_exc()
            hint = "report it with the lines above"
            output.fail(Problem("this is a mistake in ckpt itself", hint=hint))
            code = BROKEN
    done = leave(code)
    if done != code:
        output.fail(Problem(WORDS[done]))
    sys.exit(_close(output, done))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become messages on stderr, or data."""
    words = sys.argv[1:] if args is None else args
    output = output_of(words)
    return _close(output, execute(words, output))


def output_of(words: list[str]) -> Output:
    """The form that a command line wants its answer in, also where it cannot be read as a whole."""
    words = words[: words.index("--") if "--" in words else None]
    found = "json" if "--json" in words else "text"
    for word, following in pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name == "--output-format":
            found = value or following
    marked = found == "github"
    form = "json" if marked and "--json" in words else found if found in FORMS else "text"
    return Output(form, command_of(words), marked)


def command_of(words: list[str]) -> str:
    """What a report calls the command of a command line."""
    return f"ckpt {words[0]}" if words and words[0] in COMMANDS else "ckpt"


def execute(words: list[str], output: Output) -> int:
    """Carry a command line out, and return its exit code; what it says goes to `output`."""
    try:
        result: Any = cli.main(list(words), prog_name="ckpt", standalone_mode=False, obj=output)
    except CkptError as error:
        if (package := _not_loaded(error)) is not None:
            return _unavailable(*package, output)
        output.fail(*error.problems)
        return int(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return int(ExitCode.USAGE)
    except click.UsageError as error:
        fact, *more = error.format_message().split("\n")
        hint = f"`{error.ctx.command_path} --help` lists what there is" if error.ctx is not None else None
        output.fail(Problem(fact, evidence=tuple(filter(None, map(str.strip, more))), hint=hint))
        return int(ExitCode.USAGE)
    except click.exceptions.Exit as error:  # of `--help` and `--version`, which are no answers
        output.as_json = False
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        code = code_of(error.__cause__ or error)
        output.fail(Problem(WORDS[code]))
        return code
    except (OSError, ImportError) as error:
        if (package := _not_loaded(error)) is not None:
            return _unavailable(*package, output)
        if isinstance(error, ImportError):
            raise
        return _trouble(error, output)
    return int(result) if isinstance(result, int) else int(ExitCode.DONE)


def _not_loaded(error: BaseException | None) -> tuple[str, str] | None:
    """The package of others that could not be loaded, and why, where that is behind an error."""
    while error is not None:
        if isinstance(error, OSError | ImportError):
            frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code.co_name == "<module>"]
            names = [str(f.f_globals.get("__name__")) for f in frames]
            if isinstance(error, ModuleNotFoundError):
                names.append(error.name or "")
            tops = (name.partition(".")[0] for name in names)
            if (found := next((top for top in tops if top in PACKAGES), None)) is not None:
                return found, str(error)
        error = error.__context__
    return None


def _unavailable(package: str, why: str, output: Output) -> int:
    """Tell of a package that cannot be loaded."""
    hint = f"install it anew: `python -m pip install --force-reinstall {package}`"
    output.fail(Problem(f"`{package}`, which ckpt needs, cannot be loaded", None, (why,), hint))
    return UNAVAILABLE


def _close(output: Output, code: int) -> int:
    """Print what is left to say, and return the exit code."""
    try:
        output.close(code)
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except OSError as error:
        return _trouble(error, Output())
    return code


def _trouble(error: OSError, output: Output) -> int:
    """Tell of what no other message was made of, such as a full disk below stdout."""
    if not output.as_json:
        _drop_output()
    place = Place(str(error.filename)) if error.filename else None
    output.fail(Problem((error.strerror or str(error)).lower(), place))
    return int(ExitCode.MISMATCH)


def _drop_output() -> None:
    """Let what is left to print vanish: flushing it at the end would fail once more."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
