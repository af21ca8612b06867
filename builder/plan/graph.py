"""The plan: a graph whose nodes say what is made, from what, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from builder.base.errors import Problem
from builder.base.toml import Keys
from builder.operations.fixes import FIXES
from builder.operations.registry import Operation
from builder.tensors.cast import NonFinite, Overflow, Precision, cast_type
from builder.tensors.lazy import DType, LazyTensor

if TYPE_CHECKING:
    import networkx as nx

    from builder.models.catalog import Architecture
    from builder.recipe import Output, Recipe
    from builder.recipe.lock import Lock
    from builder.sources.opened import Sources
    from builder.store import Made

State = Literal["make", "stored", "unchanged", "stream", "known", "hash", "fetch"]


@dataclass(frozen=True)
class Take:
    """A component as a source holds it; `cls` is the slot it is for, `component` a name asked for.

    `at` is where the recipe says so.
    """

    node: str
    sources: Sources
    source: str
    cls: str
    component: str | None
    at: Keys


@dataclass(frozen=True)
class Finished:
    """A component that another part of the plan finishes, as a recipe used as a source does."""

    node: str


@dataclass(frozen=True)
class Applied:
    """A component of a step's model."""

    node: str


Origin = Take | Finished | Applied


@dataclass(frozen=True)
class SourceJob:
    """A source to be had, and to be hashed where its digest is not known."""

    sources: Sources
    source: str


@dataclass(frozen=True)
class StepJob:
    """One class of a step's model: an operation over one component of each input."""

    step: str
    cls: str
    operation: Operation
    inputs: Mapping[str, Origin]
    params: Mapping[str, Any]
    store: bool


@dataclass(frozen=True)
class ComponentJob:
    """A finished component: where it comes from, how it is repaired and rounded.

    `source` is what the recipe calls the source or step, `fixes` are those that speak of the class.
    """

    cls: str
    source: str
    origin: Origin
    fixes: tuple[str, ...]
    precision: Precision
    narrow: bool
    overflow: Overflow
    non_finite: NonFinite

    def params(self) -> dict[str, Any]:
        """What of this, beside the origin, decides the bytes."""
        return {
            "fixes": [[n, FIXES[n].version] for n in self.fixes],
            "precision": self.precision,
            "overflow": self.overflow,
            "non_finite": self.non_finite,
            **({"narrow": True} if self.narrow else {}),
        }


@dataclass(frozen=True)
class OutputJob:
    """A file to be assembled: each slot's prefix and the node that fills it, and what lies beside them.

    `base` is the node of the source that gives what lies beside, if there is one.
    """

    recipe: Recipe
    output: Output
    target: Path
    architecture: Architecture
    slots: Mapping[str, tuple[str, str]]  # class → (prefix, node)
    base: str | None
    extras: Mapping[str, LazyTensor]  # full name → optional tensors of the base, and markers
    metadata: Mapping[str, str]  # all but what the components' digests will add
    sidecar: bytes | None  # what is to lie beside the output as its `.yaml`


Job = SourceJob | StepJob | ComponentJob | OutputJob


@dataclass
class Node:
    """A step of the plan.

    `key` is None while it hangs on a digest that only the build will know. `reads` and `writes` are bytes
    of tensor data; `why` is the reason for `state` in words.
    """

    id: str
    job: Job
    key: str | None
    state: State
    why: str
    reads: int = 0
    writes: int = 0
    made: Made | None = None

    @property
    def kind(self) -> str:
        """`source`, `step`, `component` or `output`."""
        return type(self.job).__name__.removesuffix("Job").lower()


@dataclass(frozen=True)
class LeftOut:
    """What of a base will not be in the product, by reason: names, and bytes of them."""

    names: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]


@dataclass
class Plan:
    """A resolved recipe: nodes by id, inputs before what is made of them, and what each is made of.

    `unseen` are bases known by their digest alone: enough to show, too little to build.
    """

    recipe: Recipe
    lock: Lock | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: list[Sources] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    warnings: list[Problem] = field(default_factory=list)

    def node(self, name: str) -> Node:
        """The node of this id."""
        return self.nodes[name]

    def add(self, node: Node, inputs: Sequence[str]) -> str:
        """Add a node, all of whose inputs are there already, unless it is known; its id."""
        if node.id not in self.nodes:
            assert all(i in self.nodes for i in inputs)
            self.nodes[node.id] = node
            self.edges[node.id] = tuple(dict.fromkeys(inputs))
        return node.id

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The plan as a networkx graph of ids, once it is complete.

        Made when it is asked for: a build with nothing to do is over before networkx is loaded.
        """
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((i, n) for n, inputs in self.edges.items() for i in inputs)
        return graph

    def by_kind(self) -> list[Node]:
        """All nodes in an order in which they can be made, like beside like where that may be."""
        import networkx as nx

        kinds = ("source", "step", "component", "output")
        rank = {n.id: (kinds.index(n.kind), i) for i, n in enumerate(self)}
        return [self.node(n) for n in nx.lexicographical_topological_sort(self.graph, key=rank.__getitem__)]

    def inputs(self, name: str) -> list[Node]:
        """The nodes that this one is made of."""
        return [self.node(i) for i in self.edges[name]]

    def ancestors(self, name: str) -> set[str]:
        """The ids of all that this node hangs on, near and far."""
        found, near = set(self.edges[name]), list(self.edges[name])
        while near:
            new = set(self.edges[near.pop()]) - found
            found |= new
            near += new
        return found

    def outputs(self) -> list[Node]:
        """The files to be written, in the recipe's order."""
        return [n for n in self if isinstance(n.job, OutputJob)]

    def close(self) -> None:
        """Close every source."""
        for sources in self.sources:
            sources.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def component_specs(
    tensors: Mapping[str, LazyTensor], precision: Precision, narrow: bool = False
) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Names, dtypes and shapes that tensors will have in a precision; integers stay as they are."""
    return {n: (cast_type(n, t.dtype, precision, narrow), t.shape) for n, t in tensors.items()}
