"""The merge that made a component: its parents, their weights by block, and whether that is all there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

from builder.base.parallel import run_windows
from builder.base.progress import SILENT, Reporter
from builder.operations.merging import takes_part
from builder.operations.registry import Setting
from builder.recipe.weights import MAX_PATTERNS
from builder.reports.new.unmerge.attempt import Attempt
from builder.reports.new.unmerge.formulas import Formula, formulas
from builder.reports.new.unmerge.groups import Group, blocks_of, groups_of
from builder.reports.new.unmerge.least_squares import Products, products_of, total
from builder.reports.new.unmerge.origin import Origin, Share
from builder.reports.new.unmerge.parents import (
    MOST_CANDIDATES,
    NOTHING,
    Tensors,
    choose,
    gram_of,
    sampled,
    spread,
)
from builder.tensors.cast import Precision
from builder.tensors.digests import Row
from builder.tensors.lazy import DType
from builder.tensors.scan import exact_torch, lone_torch, scan

_NAMES: Mapping[DType, Precision] = {DType.F16: "fp16", DType.BF16: "bf16", DType.F32: "fp32"}
SEARCHED = 4, 1 << 12  # tensors and elements of a block by which parents are chosen
PROVED = 16, 1 << 14  # and by which formulas and weights are tried
FAR = 0.5  # of the squares: what is left of more is near to nothing
MOST_REFINED = 4  # formulas
MOST_PROOFS = 6  # formulas tried on all elements, where the sample is right for each


def find(
    target: Tensors,
    candidates: Sequence[Tensors],
    rows: Mapping[str, Row],
    setting: Setting,
    precision: Precision,
    *,
    names: Sequence[str],
    preferred: Sequence[int] = (),
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "comparing",
) -> Origin | None:
    """The sum of candidates that a component is, or is nearest to; None where it is near to none.

    All have tensors of the same names and, but for the input channels of a wider target, shapes. `rows` are
    those of the target in the `precision` that it is built in. `names` are what a recipe calls the
    candidates; `preferred` ones are rather the first input. The answer does not depend on `threads`. Raises
    SourceError when bytes cannot be had.
    """
    took = [n for n, t in target.items() if takes_part(n, t, setting)]
    types = {target[n].dtype for n in took}
    if len(types) != 1 or not types <= _NAMES.keys():
        return None
    search = _Search(target, rows, setting, precision, names, types.pop(), threads, reporter, task)
    with lone_torch():
        import torch

        torch.set_num_threads(1)
        return search.run(candidates, took, preferred)


def _same_shapes(name: str, target: Tensors, candidates: Sequence[Tensors]) -> bool:
    return all(c[name].shape == target[name].shape for c in candidates)


@dataclass
class _Search:
    target: Tensors
    rows: Mapping[str, Row]
    setting: Setting
    precision: Precision
    names: Sequence[str]
    dtype: DType
    threads: int
    reporter: Reporter
    task: str

    def run(
        self, candidates: Sequence[Tensors], took: Sequence[str], preferred: Sequence[int]
    ) -> Origin | None:
        """As `find`, of the tensors that take part in merges."""
        same = [n for n in took if _same_shapes(n, self.target, candidates)]
        parents = self.parents(candidates, same)
        real = [p for p in parents if p != NOTHING]
        if not real:
            return None
        same = [n for n in took if _same_shapes(n, self.target, [candidates[p] for p in real])]
        products = self.products(same, [None if p == NOTHING else candidates[p] for p in parents])
        finite = {n: p for n, p in products.items() if p.finite}
        return (
            self.origin([*groups_of(finite, self.setting)], parents, candidates, preferred)
            if finite
            else None
        )

    # -- parents

    def parents(self, candidates: Sequence[Tensors], names: Sequence[str]) -> tuple[int, ...]:
        """The candidates that matter, NOTHING last where it is one."""
        chosen = {b: spread(sorted(held), SEARCHED[0]) for b, held in blocks_of(names, self.setting).items()}

        def sample(tensors: Tensors) -> dict[str, dict[str, Any]]:
            return {
                b: {n: sampled(tensors[n], SEARCHED[1] // len(held)) for n in held}
                for b, held in chosen.items()
            }

        mine = sample(self.target)
        known: dict[tuple[bytes, ...], tuple[float, int, dict[str, dict[str, Any]]]] = {}
        for number, candidate in enumerate(candidates):
            theirs = sample(candidate)
            far = sum(float(gram_of(mine[b], [theirs[b]])[0, 0]) for b in mine)
            if isfinite(far):
                seen = tuple(bytes(t.tobytes()) for held in theirs.values() for t in held.values())
                known.setdefault(seen, (far, number, theirs))
        near = sorted(known.values(), key=lambda found: found[:2])
        if len(near) > MOST_CANDIDATES:
            more = len(near) - MOST_CANDIDATES
            self.reporter.note(
                f"{self.setting.cls} is compared with the {MOST_CANDIDATES} nearest, not with {more:,} more"
            )
        near = sorted(near[:MOST_CANDIDATES], key=lambda found: found[1])
        if not near:
            return ()
        import numpy as np

        grams = np.stack([gram_of(mine[b], [held[b] for *_, held in near]) for b in mine])
        noise = total(products_of(t, [None]) for held in mine.values() for t in held.values()).noise
        return tuple(p if p == NOTHING else near[p][1] for p in choose(grams, noise))

    # -- weights

    def products(self, names: Sequence[str], parents: Sequence[Tensors | None]) -> dict[str, Products]:
        """The products of every tensor with those of parents."""
        found: list[Products | None] = [None] * len(names)
        size = sum(self.target[n].nbytes for n in names)
        self.reporter.start(self.task, size)

        def produce(index: int, buffer: memoryview) -> int:
            name = names[index]
            theirs = [p[name] if p is not None else None for p in parents]
            found[index] = products_of(self.target[name], theirs)
            self.reporter.advance(self.task, self.target[name].nbytes)
            return 0

        try:
            run_windows(len(names), produce, size=1, threads=self.threads, around=exact_torch)
        finally:
            self.reporter.finish(self.task)
        return {n: p for n, p in zip(names, found, strict=True) if p is not None}

    # -- formulas

    def origin(
        self,
        groups: Sequence[Group],
        parents: tuple[int, ...],
        candidates: Sequence[Tensors],
        preferred: Sequence[int],
    ) -> Origin | None:
        """The formula and weights that make the target anew, or what is nearest."""
        size = len(parents)
        every = Formula("", (), 0, tuple((i, 0) for i in range(1, size)))
        mass = total(g.products for g in groups)
        plain = {i: every.weights(every.fit(g.products).factors, size) for i, g in enumerate(groups)}
        left = sum(g.products.residual(plain[i]) for i, g in enumerate(groups))
        if left > FAR * mass.energy:
            return None
        real = [i for i, p in enumerate(parents) if p != NOTHING]
        shares = _shares(groups, plain, len(real))
        part = Origin(tuple(parents[i] for i in real), "part", shares, 0, len(self.target))
        alone = sum(g.alone for g in groups)
        explained = alone <= MAX_PATTERNS and all(g.fits(plain[i]) for i, g in enumerate(groups))
        if not explained or (size == 1 and self.precision != "keep"):  # but for types, it would be that
            return part
        pooled = every.weights(every.fit(mass).factors, size)
        order = sorted(real, key=lambda i: (parents[i] not in preferred, -pooled[i], i))
        tensors = {i: candidates[parents[i]] for i in real}
        chosen = _chosen(groups)
        mine = _sample(self.target, chosen)
        samples = {i: _sample(t, chosen) for i, t in tensors.items()}
        tries: list[tuple[int, Attempt]] = []
        for form in formulas(order, parents, self.names):
            if any(tensors[form.inputs[0]][n].shape != t.shape for n, t in self.target.items()):
                continue
            for arithmetic in ("exact", "file"):
                attempt = Attempt(
                    form,
                    arithmetic,
                    self._rounds(arithmetic),
                    groups,
                    size,
                    parents,
                    self.setting,
                    self.names,
                    self.precision,
                )
                if attempt.options is None:
                    break
                tries.append((attempt.run(mine, samples), attempt))
        if not tries:
            return part
        # Of formulas that do as well, the first.
        tries.sort(key=lambda found: -found[0])
        full = sum(t.numel for t in mine.values())
        if tries[0][0] < full:
            tries = [(attempt.refine(mine, samples), attempt) for _, attempt in tries[:MOST_REFINED]]
            tries.sort(key=lambda found: -found[0])
        best: tuple[int, Attempt] | None = None
        for right, attempt in tries[:MOST_PROOFS]:
            if best is not None and right < full:
                break
            equal = self._proved(attempt, tensors)
            if best is None or equal > best[0]:
                best = equal, attempt
            if equal == len(self.target):
                break
        assert best is not None
        equal, done = best
        if size == 1 and equal < len(self.target):
            return part
        return replace(
            part,
            found="exact" if equal == len(self.target) else "rounding",
            shares=_shares(groups, {i: done.weights(i) for i in range(len(groups))}, len(real)),
            equal=equal,
            op=done.form.op,
            inputs=done.form.inputs,
            params=done.params(),
            arithmetic=done.arithmetic,
            precision=done.precision,
        )

    def _rounds(self, arithmetic: str) -> Precision | None:
        """The precision of a step, where an output that keeps types would have that of the arithmetic."""
        if self.precision != "keep" or arithmetic == "file":
            return None
        return _NAMES[self.dtype]

    def _proved(self, attempt: Attempt, tensors: Mapping[int, Tensors]) -> int:
        """How many of the target's tensors a formula makes anew, to the last bit."""
        made = attempt.made(tensors, attempt.params())
        found = scan(
            made,
            digests=True,
            numbers=False,
            threads=self.threads,
            reporter=self.reporter,
            task=self.task.replace("comparing", "proving"),
        ).tensors
        return sum(
            (r.dtype, r.shape, r.digest) == (made[n].dtype, made[n].shape, found[n].digest)
            for n, r in self.rows.items()
            if n in made
        )


def _chosen(groups: Sequence[Group]) -> dict[str, int]:
    """How many elements are tried of which tensors."""
    few = [spread(sorted(g.names), PROVED[0]) for g in groups]
    return {n: PROVED[1] // len(held) for held in few for n in held}


def _sample(tensors: Tensors, chosen: Mapping[str, int]) -> dict[str, Any]:
    return {n: sampled(tensors[n], count) for n, count in chosen.items()}


def _shares(
    groups: Sequence[Group], weights: Mapping[int, tuple[float, ...]], size: int
) -> tuple[Share, ...]:
    """What is said of each block, of so many parents; a tensor with weights of its own goes by its name."""
    found = []
    for i, group in enumerate(groups):
        p = group.products
        norm = p.energy or 1.0
        left = sqrt(p.residual(weights[i]) / norm)
        name = group.names[0] if group.alone else group.block
        found.append(Share(name, len(group.names), p.count, weights[i][:size], left, sqrt(p.rounding / norm)))
    return tuple(found)
