"""What there is to know of files, plans and builds: plain values, to be kept, compared and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from builder.base.errors import Problem

if TYPE_CHECKING:
    import networkx as nx

Json = dict[str, Any]


class Progress(NamedTuple):
    """How far a task is: `done` of `total` bytes. A `total` of 0 is unknown."""

    task: str
    done: int
    total: int


@dataclass(frozen=True)
class Component:
    """A component of a checkpoint, such as its VAE.

    `name` is the catalog's for the exact table (`VAE-v1-SD`), `cls` the slot that it fills (`VAE-v1`),
    `prefix` what stands before its tensors' names. `tensors` and `parameters` (elements) are counts, and
    `bytes` is the size of their data. `dtypes` counts its tensors by type code, as `{"F16": 248}`. `digest`
    is the BLAKE3-256 of its contents, in hex, the same in any container; None where they were not read.
    `known` is the name of published weights that these are.
    """

    name: str
    cls: str
    prefix: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    digest: str | None
    known: str | None


@dataclass(frozen=True)
class Share:
    """Some of a file's tensors: how many, and the bytes that they take."""

    keys: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint, and what is wrong with it; `str()` is the page that `ckpt inspect` shows.

    `size` is in bytes, of all of its files. `architecture` is a name of the catalog, or None: unknown.
    `intact` says whether the catalog has its tables and it is whole, `sound` whether it is something known
    and has no NaN or infinity, as far as it was read. `kind` is what it is to programs (`checkpoint`, `VAE`,
    `LoRA`, …), or None. `metric` is such as `2020/2982/0130`, None where no data was read. `pruned` is the
    size of the tensors, in bytes, that pruning to 16 bits leaves. `prediction` is `epsilon`, `v`, `edm`,
    `edm-v`, or None where nothing says. `hashes` are by kind, where they were asked for. `json` is the
    object that `ckpt inspect --json` prints of the file (docs/inspect.md).
    """

    path: Path
    container: str
    size: int
    architecture: str | None
    intact: bool
    sound: bool
    kind: str | None
    components: tuple[Component, ...]
    metric: str | None
    ema: Share
    junk: Share
    unknown: Share
    pruned: int
    prediction: str | None
    faults: tuple[Problem, ...]
    metadata: Mapping[str, str]
    hashes: Mapping[str, str | None]
    json: Json = field(repr=False)
    text: str = field(repr=False)

    def component(self, name: str) -> Component | None:
        """The component of this name or class; None where there is none."""
        return next((c for c in self.components if name in (c.name, c.cls)), None)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Difference:
    """What tells two checkpoints apart; `str()` is the page that `ckpt diff` shows.

    `same`: the tensors are the same, by name, dtype, shape and every bit. `causes` are likely ones, in
    words, the most specific first. `only_a` and `only_b` are names of tensors that one side has alone,
    `changed` those (by their name in A) whose numbers differ by more than a rounding. `json` is the object
    that `ckpt diff --json` prints (docs/commands.md).
    """

    same: bool
    causes: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[str, ...]
    json: Json = field(repr=False)
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Node:
    """A step of a plan.

    `key` is its identity: the digest, in hex, of what it is made of and how. `label` is for people. `state`
    says what happens (`fetch`, `hash`, `make`, or nothing: `known`, `stored`, `stream`, `unchanged`), `why`
    is the reason in words. `inputs` are the keys of what it is made of. `reads` and `writes` are bytes of
    tensor data, None where a source that is not here has them. `path` is where a source lies, None while it
    is elsewhere, or where an output goes. `sha256` is that of a source, None while it is not known.
    """

    key: str
    label: str
    kind: Literal["source", "step", "component", "output"]
    state: str
    why: str
    inputs: tuple[str, ...]
    reads: int | None
    writes: int | None
    path: Path | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a build would do, and why; `str()` is the page that `ckpt plan` shows.

    `nodes` are in an order in which they can be done. `reads` and `writes` are bytes, of the whole build,
    None where they are not known. `notes` are what steps leave alone, `warnings` what a person should know.
    `json` is the object that `ckpt plan --json` prints.
    """

    recipe: str
    nodes: tuple[Node, ...]
    reads: int | None
    writes: int | None
    notes: tuple[str, ...]
    warnings: tuple[Problem, ...]
    json: Json = field(repr=False)
    text: str = field(repr=False)

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Pairs of keys: what is made of what, the input first."""
        return tuple((i, n.key) for n in self.nodes for i in n.inputs)

    @property
    def done(self) -> bool:
        """Whether a build would find everything made."""
        return not any(n.state in ("fetch", "hash", "make") for n in self.nodes)

    @property
    def graph(self) -> nx.DiGraph:
        """A networkx graph of the keys; each has its `Node` as the attribute `node`, and its `label`."""
        import networkx as nx

        graph = nx.DiGraph(name=self.recipe)
        graph.add_nodes_from((n.key, {"node": n, "label": n.label}) for n in self.nodes)
        graph.add_edges_from(self.edges)
        return graph

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Output:
    """A file that was built: `state` is `written`, or `unchanged` where it was there already.

    `size` is in bytes, of all files of a set or a folder. `sha256` is that of the file, in hex, or the one
    over the files of a set; `tensor_digest` the BLAKE3-256 over names, dtypes, shapes and contents of its
    tensors. `metric` is None where there is none, as is `statement`, where its provenance was written.
    """

    name: str
    path: Path
    state: str
    size: int
    sha256: str
    tensor_digest: str
    metric: str | None
    statement: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a build did.

    `made` are the components that were made, by their labels, and `changes` what fixes changed in each, in
    words, also where it was made before. `sources` are the SHA-256 of the recipe's, by name, as far as they
    are known. `notes` and `warnings` are what the command line would have shown meanwhile. `json` is the
    object that `ckpt build --json` prints (docs/commands.md), `str()` what it shows.
    """

    outputs: tuple[Output, ...]
    made: tuple[str, ...]
    changes: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[Problem, ...]
    json: Json = field(repr=False)
    text: str = field(repr=False)

    @property
    def output(self) -> Output:
        """The only output; raises ValueError where there are several."""
        (only,) = self.outputs
        return only

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Outcome:
    """What became of one of several recipes: `built`, with its `result`, `failed` by `problems`, `not begun`.

    `recipe` is its file or its address, or its name where it has none. Notes and warnings are of all recipes
    together, and not in the result.
    """

    recipe: str
    state: Literal["built", "failed", "not begun"]
    result: Result | None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Results:
    """What became of several recipes that were built as one; `str()` is what `ckpt build` shows of them.

    `outcomes` are in the order of the recipes. `json` is the object that `ckpt build --json` prints of
    several (docs/commands.md).
    """

    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]
    warnings: tuple[Problem, ...]
    json: Json = field(repr=False)
    text: str = field(repr=False)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those that failed."""
        return tuple(o for o in self.outcomes if o.state == "failed")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Item:
    """Something that the store keeps.

    `kind` is `component`, `download`, `partial` (an unfinished download) or `fact` (a few bytes that save
    work). `digest` is of its content, in hex, or of what a fact is about. `size` is in bytes, of what the
    store itself has; `used` is in nanoseconds since the epoch. Of a component, `source` says what it was
    made of, and `places` are the files of yours that its bytes lie in.
    """

    kind: str
    digest: str
    size: int
    used: int
    component: str
    cls: str
    source: str
    places: tuple[Path, ...]


@dataclass(frozen=True)
class Collected:
    """What a collection removed from the store, and what it kept; `freed` is in bytes, litter included."""

    removed: tuple[Item, ...]
    kept: tuple[Item, ...]
    freed: int
