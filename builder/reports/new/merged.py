"""Components that are equal to no file, and the merges that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from itertools import pairwise

from builder.base.progress import Reporter
from builder.models.catalog import Catalog
from builder.operations.merging import fits, takes_part
from builder.operations.registry import Setting
from builder.reports.new.described import File, Taken, lone_name, rounded
from builder.reports.new.unmerge import BASE, Origin, find
from builder.tensors.cast import Precision
from builder.tensors.digests import Row
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed import packing
from builder.tensors.scan import Scan, TensorScan


@dataclass(frozen=True)
class Merged:
    """What is known of how a component was merged, and the components that are its parents."""

    origin: Origin
    parents: tuple[Taken, ...]

    @property
    def inputs(self) -> tuple[Taken, ...]:
        """Those that the step takes, in the order of its inputs."""
        return tuple(self.parents[i] for i in self.origin.inputs)

    @property
    def summed(self) -> list[File]:
        """The files whose names have to be in this order, as the step sums its inputs by name."""
        return [t.file for t in self.inputs] if self.origin.op == "linear" else []


def joined(first: Sequence[File], second: Sequence[File]) -> list[File]:
    """One order that two have, which do not contradict each other."""
    graph: TopologicalSorter[File] = TopologicalSorter()
    for some in (first, second):
        for file in some:
            graph.add(file)
        for before, file in pairwise(some):
            graph.add(file, before)
    return [*graph.static_order()]


def unmerge(
    taken: Mapping[str, Taken],
    precision: Precision,
    shelf: Sequence[File],
    scanned: Scan,
    catalog: Catalog,
    threads: int,
    reporter: Reporter,
) -> tuple[dict[str, Merged], dict[str, str]]:
    """How the components were merged that are equal to nothing, and why for some it is not looked for.

    Sums of several classes have their parents in one order: a recipe sums by the names of its sources.
    """
    known = {t.file for t in taken.values() if t.how}
    found: dict[str, Merged] = {}
    unsought: dict[str, str] = {}
    order: list[File] = []
    for cls, part in ((c, t) for c, t in taken.items() if not t.how):
        target = part.file.plain(part.match, cls)
        counts = {n: scanned.tensors[f"{cls}/{n}"] for n in target}
        traits = catalog.traits.get(cls)
        blocks = traits.blocks if traits is not None else ()
        setting = Setting(cls)
        if traits is not None:
            setting = Setting(cls, block=traits.block, constants=traits.constants)
        if why := _why_not(target, counts, setting):
            unsought[cls] = why
            continue
        built = rounded(target, precision)
        near = _candidates(cls, target, shelf)
        origin = find(
            built,
            [t.file.plain(t.match, cls) for t in near],
            {n: Row(t.dtype, t.shape, d) for n, t in built.items() if (d := counts[n].digest) is not None},
            setting,
            precision,
            preferred=[i for i, t in enumerate(near) if t.file in known],
            settled=[i for f in order for i, t in enumerate(near) if t.file is f],
            threads=threads,
            reporter=reporter,
            task=f"comparing {cls}",
        )
        if origin is not None:
            places = {s: _place(s.block, setting, blocks) for s in origin.shares}
            origin = replace(origin, shares=tuple(sorted(places, key=places.__getitem__)))
            found[cls] = Merged(origin, tuple(near[i] for i in origin.parents))
            order = joined(order, found[cls].summed)
    return found, unsought


def _why_not(target: Mapping[str, LazyTensor], counts: Mapping[str, TensorScan], setting: Setting) -> str:
    """Why no merge is looked for that made a component; empty where one is."""
    if packing(target).weights:
        return "its weights are packed"
    if any(c.nan or c.infinite for c in counts.values()):
        return "it holds NaN or infinity"
    if len({t.dtype for n, t in target.items() if takes_part(n, t, setting)}) > 1:
        return "its tensors have several types"
    return ""


def _candidates(cls: str, target: Mapping[str, LazyTensor], shelf: Sequence[File]) -> list[Taken]:
    """What may be a parent of a component, in the order that a sum has if each file has its own name."""
    found = [
        Taken(cls, file, match, "part")
        for file in shelf
        for match in file.opened.identity.matches
        if match.component.cls == cls and not packing(theirs := file.plain(match, cls)).weights
        if theirs.keys() == target.keys() and all(fits(t, theirs[n]) for n, t in target.items())
    ]
    return sorted(found, key=lambda t: lone_name(t.file))


def _place(block: str, setting: Setting, blocks: Sequence[str]) -> tuple[int, str]:
    """Where a block, or a tensor by its name, stands among those of a class: first what is in none."""
    known = block if block in blocks else setting.block(block)
    return blocks.index(known) + 1 if known in blocks else 0, "" if block in (known, BASE) else block
