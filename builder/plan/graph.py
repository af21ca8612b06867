"""The plan: plain values that say what is made, from what, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from builder.base.errors import Place, Problem
from builder.formats.layouts.configs import Prediction as Predicted
from builder.formats.write_gguf import Encoding
from builder.models.catalog.tables import NONE, Patterns
from builder.models.prediction import Marker, Prediction
from builder.operations.fixes import FIXES, finished_types
from builder.recipe.names import SINGLE, Form
from builder.sources.job import SourceJob
from builder.tensors.cast import Narrow, NonFinite, Overflow, Precision
from builder.tensors.digests import expression_key
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.packed.encode import Quantize

if TYPE_CHECKING:
    import networkx as nx

    from builder.models.catalog import Architecture, Names
    from builder.recipe.lock import Lock
    from builder.recipe.recipe import Output, Recipe
    from builder.store import Made

Key = str
State = Literal["make", "stored", "unchanged", "stream", "known", "hash", "fetch", "missing"]
TO_DO: tuple[State, ...] = ("make", "hash", "fetch", "missing")

# A change of what is made from the same inputs must change its version here.
VERSIONS = {"take": 3, "finish": 3, "assemble": 2}

CHECKPOINT = "checkpoint"  # in the place of a class: all of a source


@dataclass(frozen=True)
class Take:
    """A component as a source holds it: `cls` is the slot it is for, `component` a name asked for.

    `tables` are digests of what the catalog says of the components that could be meant: with another table,
    another choice. `place` is where the recipe asks for it.
    """

    node: Key
    cls: str
    component: str | None
    tables: tuple[str, ...]
    place: Place | None = field(compare=False, repr=False)


@dataclass(frozen=True)
class Finished:
    """A component that another part of the plan finishes, as a recipe used as a source does.

    With `promote`, an average under the names of what it averages.
    """

    node: Key
    promote: str | None = None


@dataclass(frozen=True)
class Applied:
    """A component of a step's model."""

    node: Key


@dataclass(frozen=True)
class Whole:
    """All tensors of a source, under the names that they have there.

    `exempt` are names that no precision is for. Components of the classes `spelt`, of whose tables `tables`
    are digests as `Take` has them, get their usual names and shapes.
    """

    node: Key
    exempt: tuple[str, ...] = ()
    spelt: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


Origin = Take | Finished | Applied | Whole


@dataclass(frozen=True)
class StepJob:
    """One class of a step's model: an operation over one component of each input.

    `params` are what the recipe says as far as it concerns the class. With a `precision` what is made is
    rounded, but for tensors that fit patterns of `kept`. `first` is the input whose component this is one of.
    """

    step: str = field(compare=False)
    cls: str
    op: str
    version: int
    inputs_by_name: Mapping[str, Origin]
    params: Mapping[str, Any]
    arithmetic: Literal["exact", "file"] = "exact"
    precision: Precision | None = None
    kept: tuple[str, ...] = ()
    first: str = field(default="", compare=False)

    def expression(self, names: Mapping[Key, str] | None = None) -> str:
        """The key of what is made, with the inputs known by their keys or by `names`."""
        inputs = {p: origin_data(o, names) for p, o in self.inputs_by_name.items()}
        said = {"arithmetic": self.arithmetic, "precision": self.precision, "kept": list(self.kept)}
        how = {k: v for k, v in said.items() if v not in (None, "exact", [])}
        return expression_key(
            self.op, self.version, cls=self.cls, params=dict(self.params), inputs=inputs, **how
        )

    @property
    def key(self) -> Key:
        """The key of this node."""
        return self.expression()

    @property
    def inputs(self) -> tuple[Key, ...]:
        """The keys of what this is made of."""
        return tuple(dict.fromkeys(o.node for o in self.inputs_by_name.values()))


@dataclass(frozen=True)
class ComponentJob:
    """A finished component: where it comes from, how it is repaired and rounded.

    `source` is what the recipe calls the source or step. `fixes` are those that apply to the class, and
    `kept` patterns of tensors that no precision is for. With `store`, its bytes are kept. With `quantize`,
    weights are packed anew.
    """

    cls: str
    source: str = field(compare=False)
    origin: Origin
    fixes: tuple[str, ...]
    precision: Precision
    narrow: Narrow
    overflow: Overflow
    non_finite: NonFinite
    kept: tuple[str, ...] = ()
    store: bool = False
    quantize: Quantize | None = None

    @property
    def decodes(self) -> bool:
        """Whether packed weights become numbers: all get a precision, or are packed anew."""
        return self.quantize is not None or (self.precision != "keep" and not self.narrow)

    @property
    def hint(self) -> str:
        """What to do with packed weights that cannot be decoded."""
        return "leave `quantize` out: " * bool(self.quantize) + "the precision `keep` leaves them as they are"

    def params(self) -> dict[str, Any]:
        """What of this, beside the origin, decides the bytes."""
        return {
            "fixes": [[n, FIXES[n].version] for n in self.fixes],
            "precision": self.precision,
            "overflow": self.overflow,
            "non_finite": self.non_finite,
            **({"narrow": self.narrow} if self.narrow else {}),
            **({"kept": list(self.kept)} if self.kept else {}),
            **({"quantize": list(self.quantize)} if self.quantize else {}),
        }

    @property
    def key(self) -> Key:
        """The key of this node."""
        return expression_key(
            "finish", VERSIONS["finish"], cls=self.cls, origin=origin_data(self.origin), **self.params()
        )

    @property
    def inputs(self) -> tuple[Key, ...]:
        """The keys of what this is made of."""
        return (self.origin.node,)


@dataclass(frozen=True)
class Beside:
    """What lies beside an output's components: tensors of its base under their own names, and markers.

    `names` are those of the base's tensors, in the base's order; `markers` are whole, with their few bytes.
    """

    names: tuple[str, ...] = ()
    markers: tuple[Marker, ...] = ()


@dataclass(frozen=True)
class Container:
    """What an output is written as.

    `nesting` is where in a PyTorch file the tensors lie. `stem` begins the names of a set's files, of at most
    `shard_size` bytes of tensors. All else is for a folder in the diffusers layout of this name: what its
    scheduler is told, the files of its tokenizers by their path, and which tokenizers are `lacking`.
    `encoding` is of a GGUF file.
    """

    form: Form = "safetensors"
    nesting: str = ""
    stem: str = ""
    shard_size: int | None = None
    layout: str = ""
    prediction: Predicted = "epsilon"
    zero_snr: bool = False
    vocabulary: Mapping[str, bytes] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    encoding: Encoding | None = None

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.form in SINGLE

    def params(self) -> dict[str, Any]:
        """What decides the bytes, as data of a key."""
        words = {n: hashlib.sha256(data).hexdigest() for n, data in self.vocabulary.items()}
        said = {
            k: v for k, v in asdict(self).items() if k != "lacking" and (k != "encoding" or v is not None)
        }
        return {**said, "vocabulary": words}


@dataclass(frozen=True)
class OutputJob:
    """What is to be assembled: each slot's names and the node that fills it, and what lies beside them.

    `base` is the source that is its base, if one is. `told` is the one that its denoiser comes from, and what
    that says of what it predicts. `sidecar` is what is to lie beside the output as its `.yaml`.
    """

    recipe: Recipe
    output: Output
    target: Path
    architecture: Architecture
    slots: Mapping[str, tuple[Names, Key]]  # class → (names, node)
    base: Key | None
    beside: Beside
    metadata: Mapping[str, str]
    sidecar: bytes | None
    container: Container
    told: tuple[Key, Prediction] | None = None

    @property
    def key(self) -> Key:
        """The key of this node: of what is in the file and where it goes."""
        return expression_key(
            "assemble",
            VERSIONS["assemble"],
            target=str(self.target),
            slots={cls: [*written, node] for cls, (written, node) in self.slots.items()},
            base=self.base,
            beside=[self.beside.names, [marker_data(m) for m in self.beside.markers]],
            metadata=dict(self.metadata),
            container=self.container.params(),
        )

    @property
    def inputs(self) -> tuple[Key, ...]:
        """The keys of what this is made of."""
        base = (self.base,) if self.base is not None else ()
        return tuple(dict.fromkeys([*(node for _, node in self.slots.values()), *base]))


Job = SourceJob | StepJob | ComponentJob | OutputJob


def marker_data(marker: Marker) -> list[Any]:
    """A marker as data of a key, or of a record."""
    return [marker.name, marker.dtype.code, list(marker.shape), marker.data.hex()]


def origin_data(origin: Origin, names: Mapping[Key, str] | None = None) -> list[Any]:
    """An origin as data of a key; `names` say by what nodes are known, if not by their keys."""
    node = origin.node if names is None else names[origin.node]
    if isinstance(origin, Take):
        return ["take", VERSIONS["take"], node, origin.cls, origin.component, list(origin.tables)]
    if isinstance(origin, Whole):
        return ["whole", VERSIONS["take"], node, list(origin.exempt), list(origin.tables), list(origin.spelt)]
    return ["node", node, origin.promote if isinstance(origin, Finished) else None]


def taken_as(take: Take | Whole) -> str:
    """What is taken of a source as one text: what two components take alike is read once for both."""
    return json.dumps(origin_data(take))


@dataclass(frozen=True)
class Node:
    """A step of the plan: what is to be done, and why.

    `label` is for people, `key` is the node's identity, and `action` is under which the store remembers
    what it makes: as `key`, but with every source known by its SHA-256; None while one of them is not.
    A source's is its SHA-256. `reads` and `writes` are bytes of tensor data, None where
    a source that is not here has them; `why` is the reason for
    `state` in words. `made` is what a component is known to be. `takes` are the bytes of `reads` by what
    is taken of a source, as `taken_as` names it.
    """

    job: Job
    key: Key
    label: str
    action: str | None
    state: State
    why: str
    reads: int | None = 0
    writes: int | None = 0
    made: Made | None = None
    takes: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`source`, `step`, `component` or `output`."""
        return type(self.job).__name__.removesuffix("Job").lower()


def total(sizes: Iterable[int | None]) -> int | None:
    """The sum of sizes; None where one is not known."""
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)


@dataclass(frozen=True)
class LeftOut:
    """What of a base will not be in an output, by reason: names, and bytes of them."""

    base: str
    output: str
    names: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]


@dataclass
class Plan:
    """A resolved recipe: nodes by key, inputs before what is made of them.

    `entries` are the sources by their names in the lock. `unseen` are sources whose tables of contents
    are to be had first: enough is known to show the plan, too little to build. `left_out` is by output.
    `notes` are what steps leave alone, `depths` how many steps each node hangs on in a row,
    `labels` those of all nodes.
    """

    recipe: Recipe
    lock: Lock | None = None
    nodes: dict[Key, Node] = field(default_factory=dict)
    entries: dict[str, SourceJob] = field(default_factory=dict)
    unseen: list[Key] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    depths: dict[Key, int] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)

    def say(self, note: str) -> None:
        """Have something noted, once, that a reader of the recipe may not expect."""
        if note not in self.notes:
            self.notes.append(note)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The plan as a networkx graph of keys, once it is complete.

        Made when it is asked for: a build with nothing to do is over before networkx is loaded.
        """
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((i, n.key) for n in self for i in n.job.inputs)
        return graph

    def by_kind(self) -> list[Node]:
        """All nodes in an order in which they can be made, like beside like where that may be."""
        import networkx as nx

        kinds = ("source", "step", "component", "output")
        rank = {n.key: (kinds.index(n.kind), i) for i, n in enumerate(self)}
        return [self.nodes[k] for k in nx.lexicographical_topological_sort(self.graph, key=rank.__getitem__)]

    def inputs(self, key: Key) -> list[Node]:
        """The nodes that this one is made of."""
        return [self.nodes[i] for i in self.nodes[key].job.inputs]

    def ancestors(self, *keys: Key) -> set[Key]:
        """The keys of all that these nodes hang on, near and far."""
        found: set[Key] = set()
        near = [i for k in keys for i in self.nodes[k].job.inputs]
        while near:
            key = near.pop()
            if key not in found:
                found.add(key)
                near += self.nodes[key].job.inputs
        return found

    def part(self, key: Key) -> Plan:
        """A node and all that it hangs on, as a plan of its own."""
        near = {key, *self.ancestors(key)}
        nodes = {k: n for k, n in self.nodes.items() if k in near}
        entries = {e: j for e, j in self.entries.items() if j.key in near}
        return Plan(self.recipe, self.lock, nodes, entries, [k for k in self.unseen if k in near])

    def takes(self, origin: Origin) -> Iterator[Take | Whole]:
        """What an origin is made of, near and far, as sources hold it: each once, however often used."""
        near, seen = [origin], set()
        while near:
            each = near.pop()
            said = json.dumps(origin_data(each))
            if said in seen:
                continue
            seen.add(said)
            job = self.nodes[each.node].job
            if isinstance(each, Take | Whole):
                yield each
            elif isinstance(job, StepJob):
                near += job.inputs_by_name.values()
            elif isinstance(job, ComponentJob):
                near.append(job.origin)

    def outputs(self) -> list[Node]:
        """The files to be written, in the recipe's order."""
        return [n for n in self if isinstance(n.job, OutputJob)]


def joined(plans: Sequence[Plan]) -> Plan:
    """Several plans as one graph: what more than one of them holds is one node. A single one as it is.

    A component that one of them makes is no longer only computed on the way to another; labels that two
    nodes have say which recipe each is of. The recipe, the lock and the entries are the first plan's.
    """
    if len(plans) == 1:
        return plans[0]
    made = Plan(plans[0].recipe, plans[0].lock)
    for plan in plans:
        for node in plan:
            known = made.nodes.get(node.key)
            if known is None:
                more = (f" of {plan.recipe.name}{f' #{i}' * (i > 1)}" for i in count(1))
                label = next(n for m in chain([""], more) if (n := f"{node.label}{m}") not in made.labels)
                made.labels.add(label)
                made.nodes[node.key] = replace(node, label=label)
            elif known.state == "stream" != node.state:
                made.nodes[node.key] = replace(node, label=known.label)
        made.unseen += [k for k in plan.unseen if k not in made.unseen]
        made.left_out += plan.left_out
        made.warnings += [p for p in plan.warnings if p not in made.warnings]
        made.notes += [n for n in plan.notes if n not in made.notes]
    return made


def component_specs(
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    narrow: Narrow = False,
    kept: Patterns = NONE,
    packed: Mapping[str, LazyTensor] = MappingProxyType({}),
) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Names, dtypes and shapes that tensors will have in a precision; some are `packed` anew."""
    types = finished_types(tensors, precision, narrow, kept)
    made = {n: (types[n], t.shape) for n, t in tensors.items()}
    return made | {n: (t.dtype, t.shape) for n, t in packed.items()}
