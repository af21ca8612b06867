"""Pickles read as data: an interpreter of their opcodes that imports nothing and calls nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builder.base.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.torch.pickles.builders import BUILDERS
from builder.formats.torch.pickles.machine import MAX_OPCODES, Builder, Machine, Persistent
from builder.formats.torch.pickles.opcodes import TABLE, Stop
from builder.formats.torch.pickles.values import Dict, Global, Malformed, Object, Skipped, Stateful

__all__ = [
    "Builder",
    "Dict",
    "Global",
    "Malformed",
    "Object",
    "Persistent",
    "Skipped",
    "Stateful",
    "Unpickled",
    "load",
]


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A pickle's value, the byte after its end, and the names it refers to."""

    value: object
    end: int
    globals: frozenset[str]


def load(
    blob: Blob,
    start: int = 0,
    *,
    file: str,
    part: str,
    builders: Mapping[str, Builder] | None = None,
    persistent: Persistent | None = None,
) -> Unpickled:
    """Interpret the pickle that begins at byte `start` of a blob.

    Values are None, bool, int, float, str, bytes, tuple, list, `Dict`, `Object`, `Global`, `Skipped` and
    whatever `builders` (by the global's name, given the arguments) and `persistent` (given the id) make;
    both raise Malformed when they cannot. `file` and `part` name the place in errors.

    Raises SourceError for a pickle that is malformed, truncated or beyond the machine's limits, or that
    refers to names that only code needs; those are then all named.
    """
    machine = Machine(blob, start, blob.size, {**BUILDERS, **(builders or {})}, persistent)
    try:
        _run(machine)
    except Malformed as error:
        if not machine.code:
            raise SourceError(
                Problem(
                    f"the pickle `{part}` is malformed: {error}",
                    Place(file),
                    (f"at byte {machine.position - start:,} of the pickle",),
                    "the file is damaged or was made to mislead; get it again or elsewhere",
                )
            ) from None
    if machine.code:
        first = min(machine.code.values()) - start
        raise SourceError(
            Problem(
                "the file holds code: its pickle refers to " + ", ".join(f"`{n}`" for n in machine.code),
                Place(file),
                (f"first at byte {first:,} of `{part}`", "nothing was imported or run"),
                "do not open this file with other programs; get the model elsewhere",
            )
        )
    names = frozenset(g.name for g in machine.globals.values())
    return Unpickled(machine.stack[-1], machine.position + 1, names)


def _run(machine: Machine) -> None:
    at = 0
    try:
        for _ in range(MAX_OPCODES):
            if at > machine.safe:
                at = machine.refill(at)
            machine.at = at
            at = TABLE[machine.data[at]](machine, at + 1)
    except Stop:
        return
    except IndexError:
        raise Malformed("it takes more from its stack than is there") from None
    raise Malformed(f"it has more than {MAX_OPCODES:,} opcodes")
