"""A formula that is tried with one set of weights after the other, until it makes a sample anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from glob import escape
from itertools import islice, product
from math import isfinite
from typing import Any

from builder.operations import OPERATIONS
from builder.operations.registry import Setting
from builder.reports.new.unmerge.formulas import Formula
from builder.reports.new.unmerge.groups import Group
from builder.reports.new.unmerge.least_squares import Fit
from builder.reports.new.unmerge.numbers import numbers_near
from builder.reports.new.unmerge.origin import BASE, Arithmetic
from builder.reports.new.unmerge.parents import Tensors
from builder.tensors.cast import Faults, Precision, cast_all

MOST_TRIES = 48  # combinations of weights for a block
REFINED = 2, 3, 4  # decimals
MOST_STEPS = 8  # of each

Params = tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """What attempts at a component have in common.

    `setting` is the operation's, `precision` that of the output, `step` that of a step in exact arithmetic
    where the output keeps types (else None). There are `size` parents, of which `missing` says that one holds
    zeros.
    """

    setting: Setting
    precision: Precision
    step: Precision | None
    size: int
    missing: bool


class Attempt:
    """A formula in an arithmetic, with the parameters that explain each group, in the order they are tried.

    `options` are None where it cannot explain a group; `equal` is how many tensors of all it makes anew, once
    that was found out.
    """

    def __init__(self, formula: Formula, arithmetic: Arithmetic, groups: Sequence[Group], kind: Kind) -> None:
        self.formula, self.arithmetic, self.groups, self.kind = formula, arithmetic, groups, kind
        self.precision = kind.step if arithmetic == "exact" else None
        self.options = self._options()
        self.used = [0] * len(groups)
        self.right = [-1] * len(groups)  # elements of a sample, with the options that are used
        self.equal: int | None = None

    def _options(self) -> list[list[Params]] | None:
        """Parameters for each group; None where the formula cannot explain one."""
        fits = [self.formula.fit(g.products) for g in self.groups]
        known = [all(map(isfinite, f.errors)) for f in fits]
        found = [_combined(f) if sure else [] for f, sure in zip(fits, known, strict=True)]
        votes: Counter[Params] = Counter()
        for group, some in zip(self.groups, found, strict=True):
            if some:
                votes[some[0]] += group.products.count
        # Where weights hang on little, or on nothing, they are likely those of the others.
        unknown = tuple(0.0 for _ in self.formula.directions)
        common = max(votes, key=lambda p: (votes[p], p), default=unknown)
        for i, (group, f) in enumerate(zip(self.groups, fits, strict=True)):
            ways = dict.fromkeys([common, *found[i], tuple(f.factors)])
            found[i] = [p for p in ways if self._explains(group, p)][:MOST_TRIES]
        return found if all(found) else None

    def _explains(self, group: Group, params: Params) -> bool:
        return group.fits(self.formula.weights(params, self.kind.size))

    def weights(self, group: int) -> tuple[float, ...]:
        """How much of each parent is in a group."""
        assert self.options is not None
        return self.formula.weights(self.options[group][self.used[group]], self.kind.size)

    def ordered(self, formula: Formula, target: Tensors, samples: Mapping[int, Tensors]) -> Attempt:
        """The same sum in another order of its inputs, with the weights that are used, tried."""
        other = copy(self)
        other.formula, other.used, other.equal = formula, [*self.used], None
        other.right = [-1] * len(self.groups)
        other._turn(dict(enumerate(self.used)), target, samples)
        return other

    @property
    def score(self) -> int:
        """How many elements of the sample are right, with the weights that are used."""
        return sum(self.right)

    def run(self, target: Tensors, samples: Mapping[int, Tensors]) -> int:
        """Try the weights of each group until a sample is right; how many of its elements are at last."""
        assert self.options is not None
        for turn in range(max(map(len, self.options))):
            self._turn({i: turn for i, some in enumerate(self.options) if turn < len(some)}, target, samples)
        return self.score

    def refine(self, target: Tensors, samples: Mapping[int, Tensors]) -> int:
        """Go on from the best weights to better ones near by, of a decimal more each time."""
        assert self.options is not None
        for digits in REFINED:
            for _ in range(MOST_STEPS):
                before = sum(self.right)
                for at, step in product(range(len(self.formula.directions)), (0, 1, -1)):
                    ways = {}
                    for i, some in enumerate(self.options):
                        moved = [*some[self.used[i]]]
                        moved[at] = round(moved[at] + step * 10.0**-digits, digits) + 0.0
                        if tuple(moved) not in some and self._explains(self.groups[i], tuple(moved)):
                            ways[i] = len(some)
                            some.append(tuple(moved))
                    self._turn(ways, target, samples)
                if sum(self.right) == before:
                    break
        # What a sample does not tell from the others' weights is likely theirs.
        votes: Counter[Params] = Counter()
        for group, some, at in zip(self.groups, self.options, self.used, strict=True):
            votes[some[at]] += group.products.count
        common = max(votes, key=lambda p: (votes[p], p))
        ways = {i: len(self.options[i]) for i, g in enumerate(self.groups) if self._explains(g, common)}
        for i in ways:
            self.options[i].append(common)
        self._turn(ways, target, samples, ties=True)
        return self.score

    def _turn(
        self,
        ways: Mapping[int, int],
        target: Tensors,
        samples: Mapping[int, Tensors],
        *,
        ties: bool = False,
    ) -> None:
        """Try one of its options for each of some groups, and keep what is better than all before.

        With `ties`, what is as good is kept too.
        """
        held = {i: [n for n in self.groups[i].names if n in target] for i in ways}
        full = {i: sum(target[n].numel for n in names) for i, names in held.items()}
        held = {i: names for i, names in held.items() if ties or self.right[i] < full[i]}
        if not held:
            return
        best = [*self.used]
        for i in held:
            self.used[i] = ways[i]
        few = {p: {n: t[n] for names in held.values() for n in names} for p, t in samples.items()}
        made = self.made(few, self.params())
        self.used = best
        for i, names in held.items():
            equal = sum(_equal(made[n], target[n]) for n in names)
            if equal >= self.right[i] + (not ties):
                self.right[i], self.used[i] = equal, ways[i]

    def params(self) -> dict[str, Any]:
        """The parameters of the operation for the class; those of many inputs by the place of each."""
        assert self.options is not None
        values = [some[j] for some, j in zip(self.options, self.used, strict=True)]
        if self.formula.op != "linear":
            keys = ("alpha", "beta")[: len(self.formula.directions)]
            return {key: self._table([v[j] for v in values]) for j, key in enumerate(keys)}
        shares = [self.formula.weights(v, self.kind.size) for v in values]
        of = {str(i): self._table([s[i] for s in shares]) for i in self.formula.inputs}
        return {"of": of, "normalize": not self.kind.missing}

    def _table(self, values: Sequence[float]) -> Any:
        """The weights of a class in their canonical form."""
        blocks = {g.block: v for g, v in zip(self.groups, values, strict=True) if not g.alone}
        alone = [[escape(g.names[0]), v] for g, v in zip(self.groups, values, strict=True) if g.alone]
        votes: Counter[float] = Counter()
        for group, value in zip(self.groups, values, strict=True):
            votes[value] += group.products.count
        base = blocks.pop(BASE) if BASE in blocks else max(votes, key=lambda v: (votes[v], v))
        held = {b: v for b, v in blocks.items() if v != base}
        if not held and not alone:
            return base
        return {BASE: base} | ({"blocks": held} if held else {}) | ({"tensors": alone} if alone else {})

    def made(self, tensors: Mapping[int, Tensors], params: Mapping[str, Any]) -> Tensors:
        """What the formula makes of parents, in the type that it is built in."""
        operation = OPERATIONS[self.formula.op]
        keys = operation.inputs or [f"of.{n}" for n in params["of"]]
        inputs = {k: tensors[i] for k, i in zip(keys, self.formula.inputs, strict=True)}
        setting = replace(self.kind.setting, arithmetic=self.arithmetic)
        found = operation.apply(inputs, params, setting).tensors
        for precision in (self.precision, self.kind.precision):
            if precision is not None:
                found = cast_all(found, precision, faults=Faults(), overflow="keep", non_finite="keep")
        return found


def _combined(found: Fit) -> list[Params]:
    """What the parameters may have been, together: the simplest first."""
    most = MOST_TRIES if len(found.factors) <= 2 else 4
    each = [[*islice(numbers_near(v, e), most)] for v, e in zip(found.factors, found.errors, strict=True)]
    ways = sorted(product(*(range(len(some)) for some in each)), key=lambda at: (sum(at), at))
    return [tuple(some[i] for some, i in zip(each, at, strict=True)) for at in ways[: 2 * MOST_TRIES]]


def _equal(a: Any, b: Any) -> int:
    """How many elements have the same bits; 0 where the types differ."""
    import numpy as np

    if a.dtype is not b.dtype:
        return 0
    kind = f"<u{a.dtype.itemsize}"
    return int((np.frombuffer(a.tobytes(), kind) == np.frombuffer(b.tobytes(), kind)).sum())
