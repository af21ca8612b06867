"""The merge that made a component: its parents, their weights by block, and whether that is all there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import sqrt
from typing import Any

from builder.base.parallel import run_windows
from builder.base.progress import SILENT, Reporter
from builder.operations.merging import takes_part
from builder.operations.registry import Setting
from builder.recipe.weights import MAX_PATTERNS
from builder.reports.new.unmerge.attempt import Attempt, Kind
from builder.reports.new.unmerge.formulas import formulas, orders
from builder.reports.new.unmerge.groups import Group, groups_of, nearest
from builder.reports.new.unmerge.least_squares import Products, products_of, total
from builder.reports.new.unmerge.origin import Arithmetic, Origin, Share
from builder.reports.new.unmerge.parents import NOTHING, Tensors, parents_of, sampled, spread
from builder.tensors.cast import Precision
from builder.tensors.digests import Row
from builder.tensors.lazy import DType
from builder.tensors.scan import scan
from builder.tensors.torch_threads import exact_torch, lone_torch, single_torch

PROVED = 16, 1 << 14  # tensors and elements of a group by which formulas and weights are tried
FAR = 0.5  # of the squares: what is left of more is near to nothing
MOST_REFINED = 6  # formulas
MOST_PROOFS = 12  # formulas tried on all elements, where the sample is right for each
MOST_ORDERED = 5  # parents whose sum is tried in every order
_NAMES: Mapping[DType, Precision] = {DType.F16: "fp16", DType.BF16: "bf16", DType.F32: "fp32"}
_ARITHMETICS: tuple[Arithmetic, ...] = ("exact", "file")


def find(
    target: Tensors,
    candidates: Sequence[Tensors],
    rows: Mapping[str, Row],
    setting: Setting,
    precision: Precision,
    *,
    preferred: Sequence[int] = (),
    settled: Sequence[int] = (),
    threads: int = 2,
    reporter: Reporter = SILENT,
    task: str = "comparing",
) -> Origin | None:
    """The sum of candidates that a component is, or is nearest to; None where it is near to none.

    All have tensors of the same names and, but for the input channels of a wider target, shapes; those of the
    target are FP16, BF16 or FP32, all that take part in merges alike, and finite. `rows` are those of the
    target in the `precision` that it is built in. `preferred` candidates are rather the first input;
    `settled` ones are summed in the order given. The answer does not depend on `threads`. Raises SourceError
    when bytes cannot be had.
    """
    took = [n for n, t in target.items() if takes_part(n, t, setting)]
    types = {target[n].dtype for n in took}
    if len(types) != 1 or not types <= _NAMES.keys():
        return None
    search = _Search(
        target, candidates, rows, setting, precision, types.pop(), preferred, settled, threads, reporter, task
    )
    with lone_torch(), single_torch():
        return search.run(took)


@dataclass
class _Search:
    """What was asked for; a parent is known by its place among those that `parents_of` gave."""

    target: Tensors
    candidates: Sequence[Tensors]
    rows: Mapping[str, Row]
    setting: Setting
    precision: Precision
    dtype: DType
    preferred: Sequence[int]
    settled: Sequence[int]
    threads: int
    reporter: Reporter
    task: str

    def run(self, took: Sequence[str]) -> Origin | None:
        """As `find`, of the tensors that take part in merges."""
        same = self.same_shapes(took, self.candidates)
        parents = parents_of(self.target, self.candidates, same, self.setting, self.reporter)
        held = {i: self.candidates[p] for i, p in enumerate(parents) if p != NOTHING}
        if not held:
            return None
        products = self.products(self.same_shapes(took, [*held.values()]), parents)
        finite = {n: p for n, p in products.items() if p.finite}
        groups = [*groups_of(finite, self.setting)] if finite else []
        weights = [nearest(g.products) for g in groups]
        energy = sum(g.products.energy for g in groups)
        each = [*zip(groups, weights, strict=True)]
        # Where rounding is as large as the values, as of zeros, nothing can be told.
        if not sum(max(g.products.residual(w), g.products.noise) for g, w in each) < FAR * energy:
            return None
        part = Origin(
            parents=tuple(parents[i] for i in held),
            found="part",
            shares=_shares(groups, weights, len(held)),
            equal=0,
            tensors=len(self.target),
            uncompared=len(products) - len(finite),
        )
        explained = sum(g.alone for g in groups) <= MAX_PATTERNS and all(g.fits(w) for g, w in each)
        if not explained or (len(parents) == 1 and self.precision != "keep"):
            return part  # but for its types, what has one parent would be equal to it
        equal, best = self.made_anew(groups, parents, held)
        exact = equal == len(self.target)
        # Of one parent rounding alone is no merge, and what is no number builds only where it has no weight.
        if best is None or (not exact and (len(parents) == 1 or part.uncompared)):
            return part
        return replace(
            part,
            found="exact" if exact else "rounding",
            shares=_shares(groups, [best.weights(i) for i in range(len(groups))], len(held)),
            equal=equal,
            op=best.formula.op,
            inputs=best.formula.inputs,
            params=best.params(),
            arithmetic=best.arithmetic,
            precision=best.precision,
        )

    def same_shapes(self, names: Iterable[str], others: Sequence[Tensors]) -> list[str]:
        """The tensors whose shape is that of all others': not those of a wider first layer."""
        return [n for n in names if all(o[n].shape == self.target[n].shape for o in others)]

    def products(self, names: Sequence[str], parents: Sequence[int]) -> dict[str, Products]:
        """The products of every tensor with those of parents, in one pass."""
        found: list[Products | None] = [None] * len(names)
        self.reporter.start(self.task, sum(self.target[n].nbytes for n in names))

        def produce(index: int, _: memoryview) -> int:
            name = names[index]
            theirs = [None if p == NOTHING else self.candidates[p][name] for p in parents]
            found[index] = products_of(self.target[name], theirs)
            self.reporter.advance(self.task, self.target[name].nbytes)
            return 0

        try:
            run_windows(len(names), produce, size=1, threads=self.threads, around=exact_torch)
        finally:
            self.reporter.finish(self.task)
        return {n: p for n, p in zip(names, found, strict=True) if p is not None}

    def made_anew(
        self, groups: Sequence[Group], parents: Sequence[int], held: Mapping[int, Tensors]
    ) -> tuple[int, Attempt | None]:
        """The formula and weights that make most of the target's tensors anew, and how many."""
        chosen = (spread(sorted(g.names), PROVED[0]) for g in groups)
        few = {n: PROVED[1] // len(names) for names in chosen for n in names}
        target = _sample(self.target, few)
        samples = {i: _sample(t, few) for i, t in held.items()}
        full = sum(t.numel for t in target.values())
        tries: list[Attempt] = []
        for attempt in self.tried(groups, parents, held, target, samples):
            tries.append(attempt)
            if attempt.score == full and self.equal(attempt, held) == len(self.target):
                return len(self.target), attempt
        if all(attempt.score < full for attempt in tries):
            tries = _ranked(tries)[:MOST_REFINED]
            for attempt in tries:
                attempt.refine(target, samples)
        equal, best = self.proved(_ranked(tries), full, held)
        if best is None or equal == len(self.target) or best.formula.op != "linear":
            return equal, best
        others = orders(best.formula, self.places(parents)) if len(held) <= MOST_ORDERED else ()
        found, other = self.proved(_ranked(best.ordered(f, target, samples) for f in others), full, held)
        return (found, other) if found > equal else (equal, best)

    def places(self, parents: Sequence[int]) -> list[int]:
        """The settled candidates, by their places among parents."""
        return [parents.index(c) for c in self.settled if c in parents]

    def tried(
        self,
        groups: Sequence[Group],
        parents: Sequence[int],
        held: Mapping[int, Tensors],
        target: Tensors,
        samples: Mapping[int, Tensors],
    ) -> Iterable[Attempt]:
        """All formulas, in both arithmetics, with the weights that do best on a sample."""
        pooled = nearest(total(g.products for g in groups))
        order = sorted(held, key=lambda i: (parents[i] not in self.preferred, -round(pooled[i], 2), i))
        missing, settled = NOTHING in parents, self.places(parents)
        step = _NAMES[self.dtype] if self.precision == "keep" else None
        kind = Kind(self.setting, self.precision, step, len(parents), missing)
        for formula in formulas(order, parents.index(NOTHING) if missing else None, settled):
            first = held[formula.inputs[0]]
            if any(first[n].shape != t.shape for n, t in self.target.items()):
                continue
            for arithmetic in _ARITHMETICS:
                attempt = Attempt(formula, arithmetic, groups, kind)
                if attempt.options is None:
                    break
                attempt.run(target, samples)
                yield attempt

    def proved(
        self, tries: Sequence[Attempt], full: int, held: Mapping[int, Tensors]
    ) -> tuple[int, Attempt | None]:
        """The first attempt, or a later one that is right in the whole sample and does better on all."""
        best: tuple[int, Attempt | None] = 0, None
        for attempt in islice(tries, MOST_PROOFS):
            if best[1] is not None and attempt.score < full:
                break
            equal = self.equal(attempt, held)
            if best[1] is None or equal > best[0]:
                best = equal, attempt
            if equal == len(self.target):
                break
        return best

    def equal(self, attempt: Attempt, held: Mapping[int, Tensors]) -> int:
        """How many of the target's tensors an attempt makes anew: digests of all elements are compared."""
        if attempt.equal is None:
            made = attempt.made(held, attempt.params())
            found = scan(
                made,
                digests=True,
                numbers=False,
                threads=self.threads,
                reporter=self.reporter,
                task=self.task.replace("comparing", "proving"),
            ).tensors
            attempt.equal = sum(
                (r.dtype, r.shape, r.digest) == (made[n].dtype, made[n].shape, found[n].digest)
                for n, r in self.rows.items()
                if n in made
            )
        return attempt.equal


def _ranked(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The best of a sample first; of those that do as well, the first."""
    return sorted(attempts, key=lambda a: -a.score)


def _sample(tensors: Tensors, few: Mapping[str, int]) -> dict[str, Any]:
    return {n: sampled(tensors[n], count) for n, count in few.items()}


def _shares(groups: Sequence[Group], sums: Sequence[Sequence[float]], size: int) -> tuple[Share, ...]:
    """What is said of each block, of so many parents; a tensor with weights of its own goes by its name."""
    found = []
    for group, some in zip(groups, sums, strict=True):
        p = group.products
        norm = p.energy or 1.0
        left, rounding = sqrt(p.residual(some) / norm), sqrt(p.rounding / norm)
        name = group.names[0] if group.alone else group.block
        weights = tuple(some[:size])
        found.append(Share(name, len(group.names), p.count, weights, left, rounding, group.fits(some)))
    return tuple(found)
