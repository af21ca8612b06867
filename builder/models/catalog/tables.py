"""What the catalog says: components, classes, architectures and well-known weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from builder.base.errors import Problem, UsageError, did_you_mean
from builder.base.words import fits_pattern, spelling
from builder.formats.layouts.rules import OtherName

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
    from builder.formats.layouts.rules import Rules

V = TypeVar("V")

RANK = -1  # as a dimension: the rank of a LoRA, or any number in an optional tensor

PARTS = ("unet", "vae", "clip")  # of a metric, in their order

# How a component may name the tensors of another.
NAMINGS: dict[str, Callable[[str], str]] = {"without-dots": lambda name: name.replace(".", "")}


class TensorRule(NamedTuple):
    """What a component demands of one tensor.

    `shape` may hold RANK; `dtype` is a safetensors code, or None for whichever; a tensor that is
    `optional` may be absent from a whole component.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    optional: bool = False


def elements(rules: Iterable[TensorRule]) -> int | None:
    """How many elements tensors have, optional ones of any size aside; None where a rank leaves it open."""
    shapes = [r.shape for r in rules if not (r.optional and RANK in r.shape)]
    return None if any(RANK in shape for shape in shapes) else sum(map(prod, shapes))


class Scale(NamedTuple):
    """How a class's weights become digits: `n = int(abs(sum / base - 1) * k)`.

    `part` is the place of the digits in a metric, one of `PARTS`. A tensor counts when its unprefixed name
    holds one of `having` (any name, if empty) and none of `lacking`.
    """

    part: str
    base: float
    k: int
    having: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def counts(self, name: str) -> bool:
        """Whether the tensor of this unprefixed name counts."""
        held = not self.having or any(part in name for part in self.having)
        return held and not any(part in name for part in self.lacking)


class ModelSpec(NamedTuple):
    """What ModelSpec metadata calls a model, and the pixels that it was trained on, high and wide.

    `v` and `resolution_v` are those of a model that predicts v, where they are others.
    """

    architecture: str
    v: str | None = None
    resolution: int | None = None
    resolution_v: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its names, whatever the model predicts."""
        return (self.architecture, self.v) if self.v else (self.architecture,)

    def name(self, v: bool) -> str:
        """The name of a model that predicts v, or of one that does not."""
        return (self.v if v else None) or self.architecture

    def pixels(self, v: bool) -> int | None:
        """The resolution of a model that predicts v, or of one that does not."""
        return (self.resolution_v if v else None) or self.resolution


class Adapters(NamedTuple):
    """How adapters such as LoRAs name the modules of a class.

    After one of the `prefixes`, which stand for a name with `_` in place of its dots where they end in `_`,
    comes the name in the catalog's table, after `within`, or the one that the diffusers `rules` lead to, or
    one of `names`: those of others by module.
    """

    prefixes: tuple[str, ...]
    rules: str | None = None
    within: str = ""
    names: Mapping[str, tuple[OtherName, ...]] = MappingProxyType({})
    extracted: Extracted | None = None


class Gguf(NamedTuple):
    """How programs know a class's components as GGUF: by the name of an `architecture`.

    Patterns over names: tensors that are in `full` precision, and those that are in no blocks but `whole`.
    With `reshaped`, programs expect what has short rows in others.
    """

    architecture: str
    reshaped: bool = False
    full: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


class Extracted(NamedTuple):
    """What of a class a LoRA is extracted for, by patterns over the names of weights; None: of nothing.

    `convolutions` are taken too where their rank is given. Their names are the diffusers ones, where there
    are rules for those, or the class's `own_names`. `metadata` are what the file says of its family, with
    `metadata_v` where v is predicted.
    """

    modules: tuple[str, ...]
    convolutions: tuple[str, ...] = ()
    own_names: bool = False
    metadata: Mapping[str, str] = MappingProxyType({})
    metadata_v: Mapping[str, str] = MappingProxyType({})


class Patterns:
    """Names that are spelt in one of several ways, `*` standing for anything."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.all = tuple(patterns)
        starred = [(p, p.partition("*")) for p in self.all if "*" in p]
        self._exact = frozenset(p for p in self.all if "*" not in p)
        self._starts = tuple(before for _, (before, _, after) in starred if not after)
        self._ends = tuple(after for _, (before, _, after) in starred if not before and "*" not in after)
        self._others = [p for p, (before, _, after) in starred if after and (before or "*" in after)]

    def fit(self, name: str) -> bool:
        """Whether a name is spelt so; in time that is linear in its length."""
        alike = name in self._exact or name.startswith(self._starts) or name.endswith(self._ends)
        return alike or any(fits_pattern(p, name) for p in self._others)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.fit(name)

    def any(self, names: Iterable[str]) -> bool:
        """Whether one of the names is."""
        return any(map(self.fit, names))

    def __len__(self) -> int:
        return len(self.all)


NONE = Patterns(())


class Traits(NamedTuple):
    """What holds of all components of a class: its metric, the fixes that speak of it, its blocks.

    `block_of` leads from the prefix of tensors' names to their block. `constants` are tensors that are part
    of the architecture, not of what was learnt: no merge touches them. Without `adapters` there are none.
    `lists` is what the first numbers are of in lists that weigh it, before those of the blocks, if there are
    such lists. One that `widens` another has its tensors, with further input channels in the first layer.

    `precision` is what its components are published in, where their tables do not say otherwise. Patterns
    over unprefixed names: tensors that are `kept` in their source's type whatever the precision, those that
    make a model in FP16 overflow when it runs (`overflows`), and layers that stay `unquantized`.
    """

    scale: Scale | None = None
    fixes: tuple[str, ...] = ()
    block_of: Mapping[str, str] = MappingProxyType({})
    lists: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    adapters: Adapters | None = None
    gguf: Gguf | None = None
    widens: str | None = None
    precision: str | None = None
    kept: Patterns = NONE
    overflows: Patterns = NONE
    unquantized: Patterns = NONE
    path: str = ""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of its blocks, from the first to the last."""
        return tuple(dict.fromkeys(self.block_of.values()))

    def block(self, name: str) -> str | None:
        """The block of a tensor, by its unprefixed name; None: it is in none."""
        return next((b for prefix, b in self.block_of.items() if name.startswith(prefix)), None)


class Names(NamedTuple):
    """How a component's names are written in a file: `prefix` before them, and `without` gone from them."""

    prefix: str = ""
    without: str = ""

    def name(self, bare: str) -> str:
        """What a tensor of the table is called there."""
        return self.prefix + bare.removeprefix(self.without)


PLAIN = Names()


class Renaming(NamedTuple):
    """Components that diffusers names by its own rules; their names there come after `within`."""

    rules: Rules
    within: str
    components: tuple[Component, ...]


class Later(Mapping[str, V]):
    """A mapping, in its maker's order, that is made when it is first looked into."""

    def __init__(self, make: Callable[[], dict[str, V]]) -> None:
        self._make = make

    @cached_property
    def whole(self) -> dict[str, V]:
        """The same as a plain dict. Raises CatalogError when what it is made from is wrong."""
        return self._make()

    def __getitem__(self, name: str) -> V:
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


@dataclass(frozen=True, eq=False)
class Component:
    """One exact table of tensor names and shapes.

    `prefix` stands before the names in a full checkpoint, `alone` is how they are written in a file of the
    component's own. `parameters` is the number of elements of all tensors, the optional ones too unless they
    may be of any size, or None where a rank leaves it open. With a `naming`, the tensors are those of the
    component `base` under other names, and `promote` leads from each name to that one. Those
    that are an average, kept for training beside the model, say of which class: `average_of`. `mislabelled`
    names differ from those that loaders expect in nothing but the prefix. `models` are the published models
    that have this very table, `marks` tensors that show which it is, and `precision` is what such a component
    is published in. `traits` are its class's.
    """

    name: str
    cls: str
    prefix: str
    tensors: Later[TensorRule]
    keys: int
    parameters: int | None = None
    note: str | None = None
    naming: str | None = None
    base: str | None = None
    extends: str | None = None
    average_of: str | None = None
    mislabelled: bool = False
    models: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    precision: str = "keep"
    traits: Traits = field(default=Traits(), repr=False)
    modelspec: ModelSpec | None = None
    alone: Names = PLAIN
    path: str = ""
    plain: Mapping[str, TensorRule] = field(default_factory=dict, repr=False)
    beginnings: Callable[[str], frozenset[str]] = field(default=lambda _: frozenset(), repr=False)

    def may_be(self, alone: Names, words: Set[str]) -> bool:
        """Whether names whose words before their first dots are these may be some of its own, written as in
        `alone`: what tells most tables from a file without their being expanded."""
        if self.naming:
            begin = tuple(self.beginnings(""))
            return any(word.startswith(begin) for word in words)
        first, dot, _ = alone.prefix.partition(".")
        return first in words if dot else any(first + b in words for b in self.beginnings(alone.without))

    @cached_property
    def elements(self) -> int:
        """The number of elements of the tensors that are never absent; of a LoRA, nothing that means much."""
        return sum(prod(rule.shape) for rule in self.tensors.whole.values() if not rule.optional)

    @cached_property
    def promote(self) -> dict[str, str]:
        """From each name to the name in `base`; empty without a naming."""
        return {NAMINGS[self.naming](name): name for name in self.plain} if self.naming else {}


@dataclass(frozen=True)
class Architecture:
    """The classes that a full checkpoint consists of, in a description's order: its denoiser first.

    Of the `slots` some may be open in a whole model: `may_lack`.
    `only` names components whose prefix is the one that their class has here, where it has others elsewhere.
    `diffusers` names its layout there. `sidecars_v` are the files, by program, that lie beside a checkpoint
    that predicts v, for programs that would take it for an ordinary one. `reads_markers` are the programs
    that look for markers such as `v_pred` in one, `tells_v` those that tell by the weights whether it
    predicts v. A `bare` architecture has no prefixes.
    """

    name: str
    slots: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    may_lack: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    modelspec: ModelSpec | None = None
    diffusers: str | None = None
    sidecars_v: Mapping[str, Path] = field(default_factory=dict, hash=False)
    reads_markers: tuple[str, ...] = ()
    tells_v: tuple[str, ...] = ()
    note: str | None = None
    path: str = ""
    bare: bool = False

    @property
    def due(self) -> tuple[str, ...]:
        """The slots that no whole model has open."""
        return tuple(s for s in self.slots if s not in self.may_lack)


@dataclass(frozen=True)
class KindRule:
    """What tells a kind of file; all that is given must hold.

    `any`: some tensor's name fits; `all`: some tensor's fits each; `only`: every one's fits. There are no
    more than `most` tensors; the last dimension of each is in `last`, and those before it make `rows` or
    fewer. `says` are patterns of metadata by key, one of which fits. The first dimension of tensors that
    fit `rank` is one.
    """

    kind: str
    called: str
    any: Patterns
    all: tuple[Patterns, ...]
    only: Patterns
    rank: Patterns
    says: Mapping[str, Patterns]
    most: int | None = None
    last: tuple[int, ...] = ()
    rows: int | None = None

    @property
    def patterns(self) -> int:
        """How many patterns a file's names and metadata may have to be compared with."""
        return sum(map(len, (self.any, *self.all, self.only, self.rank, *self.says.values())))


@dataclass(frozen=True)
class ModelRule:
    """What tells the model that a file goes with, if it is of one of the kinds `of`.

    Its metadata's word for the model begins as one of `said`; or a tensor's name fits `any`, or some tensor's
    each of `all`, or one fits one of `sizes` and its last dimension is that.
    """

    name: str
    of: tuple[str, ...]
    said: tuple[str, ...]
    any: Patterns
    all: tuple[Patterns, ...]
    sizes: tuple[tuple[Patterns, int], ...]

    @property
    def patterns(self) -> int:
        """How many patterns a file's names may have to be compared with."""
        return sum(map(len, (self.any, *self.all, *(pattern for pattern, _ in self.sizes))))


@dataclass(frozen=True)
class KnownMetric:
    """A published label: the four digits of one class's weights, within 1, or of a whole model."""

    name: str
    cls: str | None
    value: str


@dataclass(frozen=True)
class KnownFile:
    """A public file; `sha256` is of the whole file, `hf` is org/name/path on Hugging Face.

    `architecture` is that of a full checkpoint.
    """

    name: str
    sha256: str
    hf: str | None = None
    civitai_version: int | None = None
    note: str | None = None
    fix: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class KnownPart:
    """Published weights of one component, by a digest of their content."""

    name: str
    cls: str
    blake3: str
    note: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Known:
    """Well-known weights: names for labels, for files and for contents."""

    metrics: tuple[KnownMetric, ...] = ()
    files: tuple[KnownFile, ...] = ()
    parts: tuple[KnownPart, ...] = ()

    def label(self, cls: str, value: int) -> str | None:
        """The name of the weights of a class whose metric is `value`, within 1."""
        near = [(abs(int(m.value) - value), m.name) for m in self.metrics if m.cls == cls]
        return min((n for n in near if n[0] <= 1), default=(0, None))[1]

    def model(self, metric: str) -> str | None:
        """The name of the model with a whole metric such as `2020/2982/0130`, each part within 1."""
        for known in self.metrics:
            if known.cls is None and _near(known.value, metric):
                return known.name
        return None

    def file(self, sha256: str) -> KnownFile | None:
        """The public file with this SHA-256."""
        return next((f for f in self.files if f.sha256 == sha256.casefold()), None)

    def part(self, digest: str) -> KnownPart | None:
        """The published weights with this content digest, BLAKE3-256, in hex."""
        return next((p for p in self.parts if digest.casefold() == p.blake3), None)


def _near(known: str, metric: str) -> bool:
    pairs = list(zip(known.split("/"), metric.split("/"), strict=False))
    return len(pairs) == 3 and all(
        a.isdigit() and b.isdigit() and abs(int(a) - int(b)) <= 1 for a, b in pairs
    )


@dataclass(frozen=True, eq=False)
class Catalog:
    """All that is known about checkpoints before one is read.

    `classes` holds the components of each class, the standard one first; `traits` what is said of a class
    as a whole; `optional` the keys that a full checkpoint may also hold, with their shapes (None for any),
    which are kept and never required; `prefixes` what may stand before a component's names besides its own
    prefix, `wrappers` what may follow that, and `respelt` what names may then begin with in place of what the
    tables have; `spellings` the architectures by each of their names, as
    `spelling` makes it; `layouts` those of diffusers' folders by name, and `rules` those for its names, read
    when they are first asked for; `programs` where each keeps its models: by the kind of what a file is (the
    first word of a class, or `checkpoint`) a folder, that of `other` for the rest; `sites` what those that
    publish call our models and kinds; `kinds` what tells files
    that are of no class, in their order, and `models` what such a file goes with.
    """

    components: Mapping[str, Component]
    classes: Mapping[str, tuple[Component, ...]]
    traits: Mapping[str, Traits]
    architectures: Mapping[str, Architecture]
    spellings: Mapping[str, Architecture]
    optional: Mapping[str, tuple[int, ...] | None]
    prefixes: tuple[str, ...]
    wrappers: tuple[str, ...]
    respelt: Mapping[str, str]
    known: Known
    layouts: Mapping[str, Layout]
    rules: Mapping[str, Rules]
    programs: Mapping[str, Mapping[str, str]]
    sites: Mapping[str, Mapping[str, Mapping[str, str]]]
    kinds: tuple[KindRule, ...]
    models: tuple[ModelRule, ...]

    @cached_property
    def scales(self) -> Mapping[str, Scale]:
        """By class, how its weights become the digits of a metric."""
        return {cls: t.scale for cls, t in self.traits.items() if t.scale is not None}

    @cached_property
    def lists(self) -> Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]]:
        """By their length, the longest first, the lists of numbers that weigh models: what those at their
        beginning are of, and the blocks of the others."""
        found = {len(t.lists) + len(t.blocks): (t.lists, t.blocks) for t in self.traits.values() if t.lists}
        return dict(sorted(found.items(), reverse=True))

    @cached_property
    def denoisers(self) -> frozenset[str]:
        """The classes that predict what is noise: the first slots of whole models."""
        return frozenset(a.slots[0] for a in self.architectures.values() if len(a.slots) > 1)

    @cached_property
    def modelspecs(self) -> tuple[ModelSpec, ...]:
        """All that is said of ModelSpec metadata, of whole models and of components."""
        said = [a.modelspec for a in self.architectures.values()]
        said += [c.modelspec for c in self.components.values()]
        return tuple(spec for spec in said if spec is not None)

    @cached_property
    def averages(self) -> Mapping[str, Component]:
        """By class, the component that is the average of its weights."""
        return {c.average_of: c for c in self.components.values() if c.average_of is not None}

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """Every prefix that a component may be under, none of them empty."""
        own = (c.prefix for c in self.components.values() if not c.average_of)
        found = dict.fromkeys(p for p in (*own, *self.prefixes) if p)
        return (*found, *(p + wrapper for p in found for wrapper in self.wrappers))

    @cached_property
    def renamings(self) -> tuple[Renaming, ...]:
        """How diffusers names components, by the layouts of their architectures."""
        found: dict[tuple[int, str], tuple[Rules, dict[str, Component]]] = {}
        for home in self.architectures.values():
            parts = self.layouts[home.diffusers].parts if home.diffusers is not None else ()
            for part in parts:
                for component in (c for slot in home.slots for c in self.candidates(slot, home)):
                    if component.prefix.startswith(part.prefix) and not component.mislabelled:
                        key = id(part.rules), component.prefix[len(part.prefix) :]
                        found.setdefault(key, (part.rules, {}))[1][component.name] = component
        return tuple(Renaming(r, key[1], tuple(c.values())) for key, (r, c) in found.items())

    def is_average(self, cls: str) -> bool:
        """Whether a class is one of averages."""
        return any(c.average_of is not None for c in self.classes.get(cls, ()))

    def applies(self, fix: str, cls: str) -> bool:
        """Whether a fix speaks of the components of a class; others pass it untouched."""
        return cls in self.traits and fix in self.traits[cls].fixes

    def component(self, name: str) -> Component:
        """The component of this name. Raises UsageError."""
        if name in self.components:
            return self.components[name]
        hint = did_you_mean(name, self.components) or "`ckpt components` lists what there is"
        raise UsageError(Problem(f"no component `{name}`", hint=hint))

    def architecture(self, name: str) -> Architecture:
        """The architecture of this name or alias, whatever the case and the dashes.

        A class alone, under bare names, is one too, of the class's own name. Raises UsageError.
        """
        found = self.spellings.get(spelling(name)) or self._alone(name)
        if found is None:
            names = {n for a in self.architectures.values() for n in (a.name, *a.aliases)}
            hint = did_you_mean(name, names) or f"there are {', '.join(self.architectures)}"
            raise UsageError(Problem(f"no architecture `{name}`", hint=hint))
        return found

    def _alone(self, name: str) -> Architecture | None:
        for cls, components in self.classes.items():
            if spelling(cls) == spelling(name):
                return Architecture(cls, (cls,), modelspec=components[0].modelspec, bare=True)
        return None

    def candidates(self, cls: str, architecture: str | Architecture) -> tuple[Component, ...]:
        """The components that may fill the slot `cls` of an architecture, the one to write first."""
        if isinstance(architecture, str):
            architecture = self.architecture(architecture)
        if cls not in architecture.slots:
            hint = did_you_mean(cls, architecture.slots) or f"its slots are {', '.join(architecture.slots)}"
            raise UsageError(Problem(f"{architecture.name} has no slot `{cls}`", hint=hint))
        found = self.classes[cls]
        prefixes = {c.prefix for c in found if c.name in architecture.only}
        return tuple(c for c in found if c.prefix in prefixes) if prefixes else found

    def component_for(self, cls: str, architecture: str | Architecture) -> Component:
        """The component whose prefix and names a class is written with in an architecture.

        Raises UsageError when the architecture has no such slot.
        """
        return self.candidates(cls, architecture)[0]
