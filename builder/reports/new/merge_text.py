"""Merges that were found, as the steps and comments of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from builder.base.errors import printable
from builder.base.words import counted
from builder.models.catalog import Catalog
from builder.reports.new.describe import Draft
from builder.reports.new.described import File
from builder.reports.new.merged import Merged
from builder.reports.new.unmerge import BASE, MOST_PARENTS

MOST_ROWS = 30
FEW = 4  # blocks of their own that are named; of more a list has all


class Steps:
    """The steps that make the merged classes of a draft: one for all that are made alike."""

    def __init__(self, draft: Draft, names: Mapping[File, str], catalog: Catalog) -> None:
        self.draft, self.sources, self.catalog = draft, names, catalog
        alike: dict[tuple[object, ...], list[str]] = {}
        for cls, taken in draft.taken.items():
            if taken.merged:
                alike.setdefault(self._kind(cls), []).append(cls)
        self.classes = {self._free(number): held for number, held in enumerate(alike.values(), 1)}

    def _kind(self, cls: str) -> tuple[object, ...]:
        """What classes of one step have in common; patterns over tensors' names are for one class."""
        merged = self.draft.merges[cls]
        o = merged.origin
        own = cls if "tensors" in json.dumps(o.params) else ""
        files = tuple(self.sources[t.file] for t in merged.inputs)
        return o.op, files, o.arithmetic, o.precision, (o.params or {}).get("normalize"), own

    def _free(self, number: int) -> str:
        taken = {*self.sources.values()}
        wanted = "mix" if number == 1 else f"mix-{number}"
        while wanted in taken:
            wanted += "-step"
        return wanted

    def name(self, cls: str) -> str:
        """The step that makes a class."""
        return next(name for name, held in self.classes.items() if cls in held)

    def lines(self) -> Iterator[str]:
        """The table of each, with what is to say of its classes."""
        for number, (name, held) in enumerate(self.classes.items()):
            if number:
                yield ""
            for cls in held:
                yield from told(cls, self.draft.merges[cls])
            yield f"[steps.{name}]"
            merged = self.draft.merges[held[0]]
            o = merged.origin
            yield f"op = {json.dumps(o.op)}"
            keys = ("a", "b", "c") if o.op != "linear" else ()
            for key, taken in zip(keys, merged.inputs, strict=False):
                yield f"{key} = {json.dumps(self.sources[taken.file])}"
            params = {c: self.draft.merges[c].origin.params or {} for c in held}
            for key in params[held[0]]:
                each = {c: p[key] for c, p in params.items()}
                if key == "normalize":
                    yield from ["normalize = false"] * (not each[held[0]])
                elif key == "of":
                    inputs = [self.sources[t.file] for t in merged.inputs]
                    shares = [list(v.values()) for v in each.values()]
                    rows = (
                        self.weights({c: s[i] for c, s in zip(held, shares, strict=True)})
                        for i in range(len(inputs))
                    )
                    yield f"of = {{ {', '.join(f'{n} = {w}' for n, w in zip(inputs, rows, strict=True))} }}"
                else:
                    yield f"{key} = {self.weights(each)}"
            if o.arithmetic != "exact":
                yield f"arithmetic = {json.dumps(o.arithmetic)}"
            if o.precision is not None:
                yield f"precision = {json.dumps(o.precision)}"

    def weights(self, by_class: Mapping[str, Any]) -> str:
        """Weights of classes as a recipe says them: a number, where it is that of all but the VAE."""
        values = [*by_class.values()]
        due = {c for c in self.draft.architecture.slots if not c.startswith("VAE")}
        if {*by_class} == due and all(v == values[0] for v in values) and not isinstance(values[0], dict):
            return _number(values[0])
        tensors = [pair for v in values if isinstance(v, dict) for pair in v.get("tensors", [])]
        said = [f"{cls} = {self._of_class(cls, value)}" for cls, value in by_class.items()]
        if tensors:
            said.append(f"tensors = {{ {', '.join(f'{json.dumps(p)} = {_number(w)}' for p, w in tensors)} }}")
        return f"{{ {', '.join(said)} }}"

    def _of_class(self, cls: str, value: Any) -> str:
        if not isinstance(value, dict):
            return _number(value)
        base, blocks = value[BASE], value.get("blocks", {})
        every = self.catalog.traits[cls].blocks if cls in self.catalog.traits else ()
        if len(blocks) > FEW:
            return f"[{', '.join(_number(n) for n in (base, *(blocks.get(b, base) for b in every)))}]"
        return f"{{ {', '.join(f'{b} = {_number(n)}' for b, n in {BASE: base, **blocks}.items())} }}"


def told(cls: str, merged: Merged) -> Iterator[str]:
    """What is to say of a class that was merged, as comments: how well that is known, and what is not."""
    o = merged.origin
    if o.found == "exact":
        yield f"# {cls}: made anew and compared, the same to the last bit."
        return
    if o.found == "rounding":
        same = f"{o.equal:,} of {counted(o.tensors, 'tensor')}"
        yield f"# {cls}: the same but for rounding. To the last bit are {same}."
    else:
        files = "the" if len(o.parents) < MOST_PARENTS else f"{MOST_PARENTS} of the"
        yield f"# {cls}: no sum of {files} library's files was found. The nearest, by block:"
    for number, taken in enumerate(merged.parents, 1):
        yield f"#   [{number}] {printable(taken.file.path.name)}"
    yield "#"
    wide = max(len(s.block) for s in o.shares)
    heads = "".join(f"[{n}]".rjust(8) for n in range(1, len(merged.parents) + 1))
    yield f"#   {''.ljust(wide)}{heads}  left over  rounding"
    for s in o.shares[:MOST_ROWS]:
        weights = "".join(f"{w:8.4f}" for w in s.weights)
        more = "" if s.explained else "  unexplained"
        left = f"{_percent(s.residual):>9}  {_percent(s.rounding):>8}{more}"
        yield f"#   {printable(s.block.ljust(wide))}{weights}  {left}"
    if len(o.shares) > MOST_ROWS:
        yield f"#   and {len(o.shares) - MOST_ROWS:,} more"
    if o.uncompared:
        yield f"# {cls}: of {counted(o.uncompared, 'tensor')} a parent holds NaN or infinity."


def summed(merged: Merged) -> str:
    """The parents, with how much of each there is, as a sum: of blocks that differ, the least to the most."""
    said = []
    for i, taken in enumerate(merged.parents):
        least, most = (f"{f(s.weights[i] for s in merged.origin.shares):.4g}" for f in (min, max))
        minus = least.startswith("-") and least == most
        size = least.removeprefix("-" * minus) if least == most else f"({least} to {most})"
        if size != "0":
            said.append(f"{'-' if minus else '+'} {size} `{taken.file.path}`")
    return " ".join(said).removeprefix("+ ") or "nothing"


def left_over(merged: Merged) -> str:
    """What the sum leaves of the block that it explains least, and what rounding alone would leave."""
    worst = max(merged.origin.shares, key=lambda s: s.residual)
    return (
        f"leaves {_percent(worst.residual)} of {printable(worst.block)}, rounding {_percent(worst.rounding)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _number(value: float) -> str:
    return repr(float(value))
