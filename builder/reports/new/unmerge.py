"""The merge that made a component: its parents, their weights by block, and whether that is all there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import islice, permutations, product
from math import isfinite, sqrt
from typing import Any, Literal, NamedTuple

from builder.base.parallel import run_windows
from builder.base.progress import SILENT, Reporter
from builder.operations import OPERATIONS
from builder.operations.merging import takes_part
from builder.operations.registry import Setting
from builder.recipe.weights import MAX_PATTERNS
from builder.reports.new.least_squares import Fit, Products, fit, numbers_near, products_of, total
from builder.reports.new.parents import (
    MOST_CANDIDATES,
    NOTHING,
    WITHIN,
    Tensors,
    choose,
    gram_of,
    sampled,
    spread,
)
from builder.tensors.cast import Faults, Precision, cast_all
from builder.tensors.digests import Row
from builder.tensors.lazy import DType
from builder.tensors.scan import exact_torch, lone_torch, scan

_NAMES: Mapping[DType, Precision] = {DType.F16: "fp16", DType.BF16: "bf16", DType.F32: "fp32"}
BASE = "base"  # what is in no block
SEARCHED = 4, 1 << 12  # tensors and elements of a block by which parents are chosen
PROVED = 16, 1 << 14  # and by which formulas and weights are tried
FAR = 0.5  # of the squares: what is left of more is near to nothing
LEAST = 16  # elements that tell a weight of their own
MOST_TRIES = 48  # combinations of weights for a block
REFINED = 2, 3, 4  # decimals
MOST_STEPS = 8  # of each
MOST_REFINED = 4  # formulas
MOST_PROOFS = 6  # formulas tried on all elements, where the sample is right for each

Found = Literal["exact", "rounding", "part"]


@dataclass(frozen=True)
class Share:
    """A block: how much of each parent is in it, and what that does not explain.

    `residual` is the root mean square of what is left, `rounding` that of rounding once to the type of the
    tensors; both as shares of the tensors' own.
    """

    block: str
    tensors: int
    elements: int
    weights: tuple[float, ...]
    residual: float
    rounding: float


@dataclass(frozen=True)
class Origin:
    """What is known of how a component was merged.

    `parents` are candidates by their number, and `shares` have a weight for each. `found` says how well:
    `exact` where the step made all tensors anew, to the last bit; `rounding` where the sums are right but for
    rounding; `part` where something else is in it, and there is no step. `equal` of the `tensors` were made
    anew. The step is `op` of `inputs` (parents by their place in `parents`) with its parameters as an
    operation takes them, those that weigh as of the class alone.
    """

    parents: tuple[int, ...]
    found: Found
    shares: tuple[Share, ...]
    equal: int
    tensors: int
    op: str = ""
    inputs: tuple[int, ...] = ()
    params: Mapping[str, Any] | None = None
    arithmetic: Literal["exact", "file"] = "exact"
    precision: Precision | None = None


class _Group(NamedTuple):
    """Tensors of one weight: those of a block, or `alone` one that its block's is not for."""

    block: str
    alone: bool
    names: tuple[str, ...]
    products: Products

    def fits(self, weights: Sequence[float]) -> bool:
        """Whether weights explain all but rounding."""
        return _fits(self.products, weights)


class _Form(NamedTuple):
    """A formula: an operation of inputs, which are parents by their place.

    Without the last rounding it is C_base + Σ pⱼ·(C_a − C_b) for the directions (a, b), and `twice` says
    that its parameters are not pⱼ but the shares of one sum after the other.
    """

    op: str
    inputs: tuple[int, ...]
    base: int
    directions: tuple[tuple[int, int], ...]
    twice: bool = False

    def fit(self, products: Products) -> Fit:
        """The parameters, and their standard errors."""
        found = fit(products, self.base, self.directions)
        if not self.twice:
            return found
        (b, c), (error, other) = found
        if abs(1 - c) < 1e-3:
            return Fit([0.0, c], [float("inf"), other])
        alpha = b / (1 - c)
        return Fit([alpha, c], [sqrt(error**2 + (alpha * other) ** 2) / abs(1 - c), other])

    def weights(self, params: Sequence[float], size: int) -> tuple[float, ...]:
        """How much of each parent there is."""
        factors = (params[0] * (1 - params[1]), params[1]) if self.twice else params
        found = [0.0] * size
        found[self.base] = 1.0
        for factor, (a, b) in zip(factors, self.directions, strict=True):
            found[a] += factor
            found[b] -= factor
        return tuple(round(w, 12) + 0.0 for w in found)


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
        return self.origin([*self.groups(finite)], parents, candidates, preferred) if finite else None

    def blocks(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Tensors by block."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.setting.block(name) or BASE, []).append(name)
        return found

    # -- parents

    def parents(self, candidates: Sequence[Tensors], names: Sequence[str]) -> tuple[int, ...]:
        """The candidates that matter, NOTHING last where it is one."""
        chosen = {b: spread(sorted(held), SEARCHED[0]) for b, held in self.blocks(names).items()}

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

    def groups(self, products: Mapping[str, Products]) -> Iterator[_Group]:
        """Tensors of one weight each: blocks, and single tensors where most of a block has another."""
        size = len(next(iter(products.values())).gram)
        form = _Form("", (), 0, tuple((i, 0) for i in range(1, size)))
        for block, names in self.blocks([*products]).items():

            def weights(of: Products) -> tuple[float, ...]:
                return form.weights(form.fit(of).factors, size)

            pooled = weights(total(products[n] for n in names))
            large = sorted(names, key=lambda n: (-products[n].count, n))[:8]
            ways = [pooled, *(weights(products[n]) for n in large)]
            held = max(
                ([n for n in names if products[n].count < LEAST or _fits(products[n], w)] for w in ways),
                key=len,
            )
            apart = [n for n in names if n not in held]
            if 2 * len(held) < len(names) or not all(_fits(products[n], weights(products[n])) for n in apart):
                held, apart = names, []
            yield _Group(block, False, tuple(held), total(products[n] for n in held))
            yield from (_Group(block, True, (n,), products[n]) for n in apart)

    # -- formulas

    def origin(
        self,
        groups: Sequence[_Group],
        parents: tuple[int, ...],
        candidates: Sequence[Tensors],
        preferred: Sequence[int],
    ) -> Origin | None:
        """The formula and weights that make the target anew, or what is nearest."""
        size = len(parents)
        every = _Form("", (), 0, tuple((i, 0) for i in range(1, size)))
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
        tries: list[tuple[int, _Try]] = []
        for form in self._forms(order, parents):
            if any(tensors[form.inputs[0]][n].shape != t.shape for n, t in self.target.items()):
                continue
            for arithmetic in ("exact", "file"):
                attempt = _Try(form, arithmetic, self._rounds(arithmetic), groups, size, parents, self)
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
        best: tuple[int, _Try] | None = None
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

    def _forms(self, order: Sequence[int], parents: Sequence[int]) -> Iterator[_Form]:
        """The formulas of so many parents, the simplest first."""
        if NOTHING in parents or len(order) not in (2, 3):
            called = {i: self.names[parents[i]] for i in order}
            if len({*called.values()}) < len(order):
                return
            named = tuple(sorted(order, key=called.__getitem__))
            base = parents.index(NOTHING) if NOTHING in parents else named[0]
            yield _Form("linear", named, base, tuple((i, base) for i in named if i != base))
        elif len(order) == 2:
            a, b = order
            yield _Form("weighted-sum", (a, b), a, ((b, a),))
            yield _Form("add-difference", (a, b, a), a, ((b, a),))
            yield _Form("add-difference", (b, a, b), b, ((a, b),))
        else:
            for a, b, c in permutations(order):
                yield _Form("add-difference", (a, b, c), a, ((b, c),))
            for c in reversed(order):
                a, b = (i for i in order if i != c)
                yield _Form("triple-sum", (a, b, c), a, ((b, a), (c, a)))
                yield _Form("sum-twice", (a, b, c), a, ((b, a), (c, a)), twice=True)

    def _proved(self, attempt: _Try, tensors: Mapping[int, Tensors]) -> int:
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


def _fits(products: Products, weights: Sequence[float]) -> bool:
    return products.residual(weights) <= WITHIN * products.noise


def _chosen(groups: Sequence[_Group]) -> dict[str, int]:
    """How many elements are tried of which tensors."""
    few = [spread(sorted(g.names), PROVED[0]) for g in groups]
    return {n: PROVED[1] // len(held) for held in few for n in held}


def _sample(tensors: Tensors, chosen: Mapping[str, int]) -> dict[str, Any]:
    return {n: sampled(tensors[n], count) for n, count in chosen.items()}


def _shares(
    groups: Sequence[_Group], weights: Mapping[int, tuple[float, ...]], size: int
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


class _Try:
    """A formula in an arithmetic, with the weights that explain each group, in the order they are tried."""

    def __init__(
        self,
        form: _Form,
        arithmetic: Literal["exact", "file"] | Any,
        precision: Precision | None,
        groups: Sequence[_Group],
        size: int,
        parents: Sequence[int],
        search: _Search,
    ) -> None:
        self.form, self.arithmetic, self.precision = form, arithmetic, precision
        self.groups, self.size, self.parents, self.search = groups, size, parents, search
        self.options = self._options()
        self.used = [0] * len(groups)
        self.right = [-1] * len(groups)  # elements of a sample, with the options that are used

    def _options(self) -> list[list[tuple[float, ...]]] | None:
        """Parameters for each group; None where the formula cannot explain one."""
        fits = [self.form.fit(g.products) for g in self.groups]
        known = [all(map(isfinite, f.errors)) for f in fits]
        found = [_combined(f) if sure else [] for f, sure in zip(fits, known, strict=True)]
        votes: Counter[tuple[float, ...]] = Counter()
        for group, some in zip(self.groups, found, strict=True):
            if some:
                votes[some[0]] += group.products.count
        # Where weights hang on little, or on nothing, they are likely those of the others.
        unknown = tuple(0.0 for _ in self.form.directions)
        common = max(votes, key=lambda p: (votes[p], p), default=unknown)
        for i, (group, f) in enumerate(zip(self.groups, fits, strict=True)):
            ways = dict.fromkeys([common, *found[i], tuple(f.factors)])
            found[i] = [p for p in ways if group.fits(self.form.weights(p, self.size))][:MOST_TRIES]
        return found if all(found) else None

    def weights(self, group: int) -> tuple[float, ...]:
        """How much of each parent is in a group."""
        assert self.options is not None
        return self.form.weights(self.options[group][self.used[group]], self.size)

    def run(self, target: Tensors, samples: Mapping[int, Tensors]) -> int:
        """Try the weights of each group until a sample is right; how many of its elements are at last."""
        assert self.options is not None
        for turn in range(max(map(len, self.options))):
            self._turn({i: turn for i, some in enumerate(self.options) if turn < len(some)}, target, samples)
        return sum(self.right)

    def refine(self, target: Tensors, samples: Mapping[int, Tensors]) -> int:
        """Go on from the best weights to better ones near by, of a decimal more each time."""
        assert self.options is not None
        for digits in REFINED:
            for _ in range(MOST_STEPS):
                before = sum(self.right)
                for at, sign in product(range(len(self.form.directions)), (1, -1)):
                    ways = {}
                    for i, some in enumerate(self.options):
                        moved = [*some[self.used[i]]]
                        moved[at] = round(moved[at] + sign * 10.0**-digits, digits) + 0.0
                        if tuple(moved) not in some:
                            ways[i] = len(some)
                            some.append(tuple(moved))
                    self._turn(ways, target, samples)
                if sum(self.right) == before:
                    break
        # What a sample does not tell from the others' weights is likely theirs.
        votes: Counter[tuple[float, ...]] = Counter()
        for group, some, at in zip(self.groups, self.options, self.used, strict=True):
            votes[some[at]] += group.products.count
        common = max(votes, key=lambda p: (votes[p], p))
        for some in self.options:
            some.append(common)
        self._turn({i: len(some) - 1 for i, some in enumerate(self.options)}, target, samples, ties=True)
        return sum(self.right)

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
        """The parameters of the operation for the class."""
        assert self.options is not None
        values = [some[j] for some, j in zip(self.options, self.used, strict=True)]
        if self.form.op != "linear":
            keys = ("alpha", "beta")[: len(self.form.directions)]
            return {key: self._table([v[j] for v in values]) for j, key in enumerate(keys)}
        shares = [self.form.weights(v, self.size) for v in values]
        names = self.search.names
        of = {names[self.parents[i]]: self._table([s[i] for s in shares]) for i in self.form.inputs}
        return {"of": of, "normalize": NOTHING not in self.parents}

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
        operation = OPERATIONS[self.form.op]
        keys = operation.inputs or [f"of.{n}" for n in params["of"]]
        inputs = {k: tensors[i] for k, i in zip(keys, self.form.inputs, strict=True)}
        setting = replace(self.search.setting, arithmetic=self.arithmetic)
        found = operation.apply(inputs, params, setting).tensors
        for precision in (self.precision, self.search.precision):
            if precision is not None:
                found = cast_all(found, precision, faults=Faults(), overflow="keep", non_finite="keep")
        return found


def _combined(found: Fit) -> list[tuple[float, ...]]:
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
