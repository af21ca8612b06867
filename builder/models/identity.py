"""What a set of named tensors was found to be: components that are whole, that are not, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from builder.formats.layouts.rules import Source
from builder.models.catalog import PLAIN, Component, Names
from builder.tensors.packed.schemes import Shape

EMA = "model_ema."  # what stands before averaged weights


@dataclass(frozen=True)
class Match:
    """A component found whole.

    It lies `under` a prefix: the component's own inside a full checkpoint, another that programs write, or
    none. There it has the names of the catalog's table, or those of a file of its own (`alone`), or those
    that diffusers gives it (`diffusers`). `names` gives, for each tensor of the table that is present, its
    full name in the file, but for those of `made`: those that are not one tensor there with its elements in
    that order, whose sources have full names. `companions` are tensors that belong to it beyond the
    table, such as scales: they lie under its prefix, and are known by the table's name for their layer.
    `renamed` holds the few tables' names that the file spells otherwise, with the file's spelling less the
    prefix; `reshaped` those whose shape differs in dimensions of 1, as a linear layer's does from a 1x1
    convolution's. `rank` is the least and the greatest rank of a LoRA. `usual_prefix` is set where loaders
    expect the same tensors under another prefix. `broken`: prefixed, in a checkpoint that misses other parts.
    """

    component: Component
    under: str
    names: Mapping[str, str]
    missing_optional: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    rank: tuple[int, int] | None = None
    usual_prefix: str | None = None
    broken: bool = False
    made: Mapping[str, Source] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    alone: Names = PLAIN
    diffusers: bool = False

    @property
    def prefix(self) -> str:
        """What stands before every name of it."""
        return self.under + self.alone.prefix

    @cached_property
    def full(self) -> tuple[str, ...]:
        """The full names of all its tensors in the file, its companions' too."""
        made = (full for whole in self.made.values() for full in whole.names)
        return (*self.names.values(), *made, *self.companions.values())

    @property
    def whole(self) -> dict[str, str]:
        """The full name of every tensor of the component, but for those of `made`, by its unprefixed one."""
        return {**self.names, **self.companions}

    @property
    def required(self) -> int:
        """How many of the table's tensors are there that must be."""
        rules = self.component.tensors
        return sum(not rules[n].optional for n in (*self.names, *self.made))

    @property
    def usual(self) -> bool:
        """Whether it is named as the catalog has it, inside a full checkpoint or in a file of its own."""
        at_home = self.under == self.component.prefix and not self.alone.prefix
        return not self.diffusers and (at_home or (not self.under and self.alone == self.component.alone))

    @property
    def ema(self) -> bool:
        """Whether this is an average kept for training rather than the model itself."""
        return self.component.average_of is not None

    @property
    def diffusers_attention(self) -> bool:
        """Whether an autoencoder's attention is named or shaped as diffusers does it."""
        return bool(self.renamed or self.reshaped)


class Misshapen(NamedTuple):
    """A tensor that is there in another shape; -1 in `expected` is the rank, any size."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class Rejection:
    """A component that is not there, though some of it is (less than a twentieth counts as nothing).

    `present` counts required tensors of the right name and shape, `total` all required ones; `missing`
    are names of the table. `outdone_by` names the component that was chosen for the same tensors when
    this one is whole too.
    """

    component: Component
    prefix: str
    present: int
    total: int
    missing: tuple[str, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()
    outdone_by: str | None = None

    def describe(self) -> str:
        """What of it is not there, and what is there in another shape: in words, after its name."""
        said = []
        if self.missing:
            said.append(f"{len(self.missing):,} of {self.total:,} tensors are missing")
        if self.misshapen:
            name, expected, found = self.misshapen[0]
            more = f" and {len(self.misshapen) - 1:,} more" if len(self.misshapen) > 1 else ""
            said.append(f"`{name}` is {list(found)}, not {list(expected)}{more}")
        return f"{self.component.name}: {'; '.join(said)}"

    @property
    def hint(self) -> str | None:
        """What can be done where nothing but shapes is other."""
        if self.missing or not self.misshapen:
            return None
        return "if it is a model of another kind, `ckpt components learn FILE` makes it known"


@dataclass(frozen=True)
class Identity:
    """What the tensors are.

    `architecture` is an architecture's name; a class's name for one bare component; a class's name and
    `-BROKEN` for the largest part of a checkpoint that misses others, `incomplete` then being the
    architecture it is nearest to; None: unknown. `absent` are the classes it misses, in a whole model those
    that such often go without. `rejected` comes
    nearest first. `optional`, `ema`, `scales`, `junk` and `unknown` are full names of tensors, in the
    file's order: keys that a full checkpoint may also hold; every averaged weight, known component or
    not; companions of packed weights, of a component or none; what no loader reads; what nothing explains.
    `duplicates` are second matches of a class, which are junk. `astray` are the matches in a whole
    checkpoint, averages aside, that its architecture has no slot for. `notes` say how ambiguities were
    resolved. `undecoded` says of weights of no component by which schemes they are packed that nothing here
    decodes.
    """

    architecture: str | None
    intact: bool
    matches: tuple[Match, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]
    optional: tuple[str, ...]
    ema: tuple[str, ...]
    scales: tuple[str, ...]
    junk: tuple[str, ...]
    unknown: tuple[str, ...]
    duplicates: tuple[Match, ...] = ()
    incomplete: str | None = None
    absent: tuple[str, ...] = ()
    astray: tuple[Match, ...] = ()
    undecoded: tuple[str, ...] = ()

    @property
    def companions(self) -> tuple[str, ...]:
        """Full names of the tensors that components of the model have beyond their tables."""
        return tuple(full for m in self.matches if not m.ema for full in m.companions.values())

    @property
    def runner_up(self) -> Rejection | None:
        """The component that came nearest without being chosen."""
        return self.rejected[0] if self.rejected else None

    def find(self, cls: str) -> Match | None:
        """The match of a class, or None."""
        return next((m for m in self.matches if m.component.cls == cls), None)
