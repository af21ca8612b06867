"""`ckpt demo`: from nothing to a built and verified checkpoint, on screen."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from builder.base.errors import ExitCode
from builder.base.page import Style, columns
from builder.cli.command import Command
from builder.cli.options import json_option
from builder.cli.terminal import Output, out
from builder.toolkit.demo import swap_vaes, write_sources

OTHER = "Another VAE in the place of the good one: it alone is taken anew."
BACK = "The good VAE back again: the same bytes as at first."
SWAPS = (OTHER, BACK)  # before which the two VAEs change places
STEPS = (
    ("What is in the checkpoint? Nothing in it is run to find out.", ("inspect", "dirty.ckpt")),
    ("What would the recipe do?", ("plan", "demo.toml")),
    ("Build it.", ("build", "demo.toml")),
    ("What came out:", ("inspect", "demo.safetensors")),
    ("Build it again: nothing has changed, so nothing is done.", ("build", "demo.toml", "--explain")),
    (OTHER, ("build", "demo.toml", "--explain")),
    (BACK, ("build", "demo.toml")),
    ("Build everything a second time without the store, and compare:", ("build", "demo.toml", "--check")),
    ("Is the file what the lock says?", ("verify", "demo.toml")),
)


@click.command("demo", cls=Command)
@json_option
@click.argument(
    "folder", required=False, type=click.Path(path_type=Path, file_okay=False), metavar="[FOLDER]"
)
def command(folder: Path | None) -> int:
    """Build a miniature model step by step, and show the commands that do it.

    Everything happens in FOLDER, which stays (default: a temporary folder, deleted at the end).
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        here = Path.cwd()
        stack.callback(os.chdir, here)
        os.chdir(folder)
        # A store of its own: the demo shows a first build however often it is run.
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-demo-store-")))
        stack.callback(_restore, "CKPT_STORE", os.environ.get("CKPT_STORE"))
        os.environ["CKPT_STORE"] = str(store)
        return _show()


def _show() -> int:
    _say("Miniature files, made up, but dirty as real ones are:")
    sources = write_sources(Path())
    rows = [(name, f"{Path(name).stat().st_size:,} bytes", what) for name, what in sources.items()]
    out().say("\n".join(columns(rows, {1}, indent=2)))
    out().data |= {"folder": str(Path().absolute()), "sources": sources, "steps": []}
    for words, command in STEPS:
        if words in SWAPS:
            swap_vaes(Path())
        if (code := _run(words, command)) != ExitCode.DONE:
            return code
    return ExitCode.DONE


def _run(words: str, arguments: Sequence[str]) -> int:
    from builder.cli import execute

    _say(words)
    said, inner = out(), Output(out().form)
    said.say(Style(said.color()).strong(f"$ ckpt {' '.join(arguments)}"))
    sys.stdout.flush()
    code = execute(list(arguments), inner)
    sys.stdout.flush()
    sys.stderr.flush()
    if said.as_json:
        said.data["steps"].append({"command": list(arguments), "answer": inner.object(code)})
        said.errors += inner.errors
    return code


def _say(words: str) -> None:
    out().say(f"\n# {words}")


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
