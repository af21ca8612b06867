"""Components that are equal to no file, and the merges that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.base.progress import Reporter
from builder.models.catalog import Catalog
from builder.operations.merging import fits
from builder.operations.registry import Setting
from builder.reports.new.described import File, Taken, lone_name, rounded
from builder.reports.new.unmerge import Origin, find
from builder.tensors.cast import Precision
from builder.tensors.digests import Row
from builder.tensors.packed import packing
from builder.tensors.scan import Scan


@dataclass(frozen=True)
class Merged:
    """What is known of how a component was merged, and the components that are its parents."""

    origin: Origin
    parents: tuple[Taken, ...]

    @property
    def inputs(self) -> tuple[Taken, ...]:
        """Those that the step takes, in the order of its inputs."""
        return tuple(self.parents[i] for i in self.origin.inputs)


def unmerge(
    taken: Mapping[str, Taken],
    precision: Precision,
    shelf: Sequence[File],
    scanned: Scan,
    catalog: Catalog,
    threads: int,
    reporter: Reporter,
) -> dict[str, Merged]:
    """What is known of how the components were merged that are equal to nothing."""
    known = {t.file for t in taken.values() if t.how}
    found = {}
    for cls, part in ((c, t) for c, t in taken.items() if not t.how):
        target = part.file.plain(part.match, cls)
        counts = {n: scanned.tensors[f"{cls}/{n}"] for n in target}
        if packing(target).weights or any(c.nan or c.infinite for c in counts.values()):
            continue
        built = rounded(target, precision)
        rows = {n: Row(t.dtype, t.shape, d) for n, t in built.items() if (d := counts[n].digest) is not None}
        near = [
            Taken(cls, file, match, "part")
            for file in shelf
            for match in file.opened.identity.matches
            if match.component.cls == cls and not packing(theirs := file.plain(match, cls)).weights
            if theirs.keys() == target.keys() and all(fits(t, theirs[n]) for n, t in target.items())
        ]
        traits = catalog.traits.get(cls)
        setting = Setting(cls)
        if traits is not None:
            setting = Setting(cls, block=traits.block, constants=traits.constants)
        origin = find(
            built,
            [t.file.plain(t.match, cls) for t in near],
            rows,
            setting,
            precision,
            names=[lone_name(t.file) for t in near],
            preferred=[i for i, t in enumerate(near) if t.file in known],
            threads=threads,
            reporter=reporter,
            task=f"comparing {cls}",
        )
        if origin is not None:
            found[cls] = Merged(origin, tuple(near[i] for i in origin.parents))
    return found
