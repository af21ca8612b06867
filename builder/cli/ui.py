"""`ckpt ui`: a page for the browser, until it is interrupted."""

from __future__ import annotations

import threading
import traceback
import webbrowser
from pathlib import Path

import click

from builder.base.errors import ExitCode, OutputError, Problem
from builder.cli.command import Command
from builder.cli.options import FILE, json_option
from builder.cli.terminal import out
from builder.web.folders import Folders
from builder.web.server import Server
from builder.web.site import Site
from builder.workspace import Settings


@click.command("ui", cls=Command)
@click.argument("folders", nargs=-1, type=FILE, metavar="[FOLDER…]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: any that is free.")
@click.option("--no-browser", is_flag=True, help="Print the address, and open nothing.")
@json_option
def command(folders: tuple[Path, ...], port: int, no_browser: bool) -> int:
    """Show a page for the models in each FOLDER (default: the one you are in), until Ctrl-C.

    It is served to this machine alone, and to those who have the address that is printed. The page reads and
    writes in the folders given, and nowhere else.
    """
    said = out()
    site = Site(Folders(folders or (Path(),)), Settings.from_environment(), _fault)
    try:
        server = _server(site, port)
        try:
            said.raw({"address": server.address}, server.address)
            said.now()
            said.message("Ctrl-C ends it.")
            if not no_browser:
                threading.Thread(target=webbrowser.open, args=(server.address_once,), daemon=True).start()
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            said.message("stopped")
        finally:
            server.server_close()
    finally:
        site.close()
    return ExitCode.DONE


def _server(site: Site, port: int) -> Server:
    try:
        return Server(site, port, _fault)
    except OSError as error:
        evidence = ((error.strerror or str(error)).lower(),)
        hint = "leave `--port` out: any that is free will do"
        raise OutputError(Problem(f"cannot listen on port {port}", evidence=evidence, hint=hint)) from None


def _fault(error: BaseException) -> None:
    click.echo("".join(traceback.format_exception(error)), err=True)
