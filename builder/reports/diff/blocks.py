"""How much of each block of a model two checkpoints differ by."""

from __future__ import annotations

from dataclasses import dataclass

from builder.models.catalog import Catalog
from builder.reports.diff.compare import Diff, TensorDiff, add_up


@dataclass(frozen=True)
class BlockChange:
    """The tensors of one block of a class that both files have; `block` is None for all in none.

    `elements` are values, of which `differing` are others, by more than rounding. `bits` is how many of a
    value's last bits change on average: 0 where all are the same, about 10 where FP16 values have nothing in
    common but their size.
    """

    cls: str
    block: str | None
    elements: int
    differing: int
    bits: float


def by_block(diff: Diff, catalog: Catalog) -> list[BlockChange]:
    """The change in each block, by class, in the order that the catalog has them; what is in none last."""
    return [
        _change(part.cls, block, held)
        for part in diff.parts
        for block, held in _blocks(part.cls, part.tensors, catalog).items()
        if held
    ]


def _blocks(
    cls: str, tensors: tuple[TensorDiff, ...], catalog: Catalog
) -> dict[str | None, list[TensorDiff]]:
    traits = catalog.traits.get(cls)
    found: dict[str | None, list[TensorDiff]] = {b: [] for b in (*(traits.blocks if traits else ()), None)}
    for tensor in tensors:
        found[traits.block(tensor.pair.bare) if traits else None].append(tensor)
    return found


def _change(cls: str, block: str | None, tensors: list[TensorDiff]) -> BlockChange:
    total = add_up(tensors)
    bits = sum(length * count for length, count in enumerate(total.distances))
    return BlockChange(cls, block, total.elements, total.differing, bits / max(1, total.elements))
