"""SIGTERM, which `docker stop` and a cancelled CI job send, as an exception like that of Ctrl-C."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

# As a shell says of a process that SIGINT or SIGTERM ended.
INTERRUPTED, TERMINATED = 130, 143
WORDS = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}

_AGAIN = 0.01  # seconds until what was lost is raised once more

_came = threading.Event()  # whether SIGTERM came
_interrupted = threading.Event()  # whether Ctrl-C came


class Terminated(KeyboardInterrupt):
    """The process is to end, as cleanly as for Ctrl-C."""


def code_of(error: BaseException) -> int:
    """The exit code for what Ctrl-C or SIGTERM raised, also where another error took its place."""
    return TERMINATED if isinstance(error, Terminated) or _came.is_set() else INTERRUPTED


def catch() -> None:
    """Have SIGTERM raise Terminated; it and Ctrl-C are raised again where the exception would be lost.

    Python drops what a handler raises within a finalizer or a callback of a weak reference, such as imports
    have: the work would go on.
    """
    with suppress(ValueError):  # of a thread that is not the first: who embeds us sees to signals
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _again


def go_on() -> None:
    """Raise Terminated where SIGTERM came and its exception was lost: asked before what counts.

    Compiled code that asks for an attribute drops whatever a handler raises meanwhile, and says nothing.
    """
    if _came.is_set() and threading.current_thread() is threading.main_thread():
        raise Terminated


def came() -> bool:
    """Whether Ctrl-C or SIGTERM came: an error since may be theirs, as of an import that they broke off."""
    return _came.is_set() or _interrupted.is_set()


def leave(code: int) -> int:
    """The exit code of a process whose work is over; from here on no signal changes it.

    That of SIGTERM if it came, whatever may have held its exception back.
    """
    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return TERMINATED if _came.is_set() else code


def _terminate(*_: object) -> None:
    if not _came.is_set():  # one is enough: what follows is tidying up
        _came.set()
        raise Terminated


def _interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _again(lost: Any) -> None:
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
    with suppress(RuntimeError):  # the process is about to end
        # Unlike threading's, it is not waited for, so that what it raises cannot come while we are here.
        _thread.start_new_thread(_raise, (number,))


def _raise(number: signal.Signals) -> None:
    time.sleep(_AGAIN)
    if number == signal.SIGTERM:
        _came.clear()
    if hasattr(signal, "pthread_kill"):  # which wakes the first thread where it waits
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
