"""Which of many candidates a component is a weighted sum of, by a sample of its elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from builder.base.progress import Reporter
from builder.operations.registry import Setting
from builder.operations.sums import fold
from builder.reports.new.unmerge.groups import blocks_of
from builder.reports.new.unmerge.least_squares import products_of, total
from builder.tensors.lazy import LazyTensor, MemoryTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Choice = tuple[float, tuple[int, ...]]  # what is left of the squares, and which are chosen
Tensors = Mapping[str, LazyTensor]

MOST_CANDIDATES = 100
SEARCHED = 8, 1 << 12  # tensors and elements of a block that are compared
MOST_PARENTS = 6
NOTHING = -1  # a candidate that holds zeros: what is missing, where weights are less than 1 together
GAIN = 0.9  # of what was left must be left at most, for a further parent
_DEPENDENT = 1e-9


def parents_of(
    target: Tensors, candidates: Sequence[Tensors], names: Sequence[str], setting: Setting, reporter: Reporter
) -> tuple[int, ...]:
    """The candidates that a target is a sum of by a sample of these tensors, NOTHING last where it is one.

    Of no more than the nearest MOST_CANDIDATES samples are held, twice as many at a time. What has values
    that are no numbers is no candidate, nor is a second one whose sample is the same.
    """
    import numpy as np

    few = {b: spread(sorted(held), SEARCHED[0]) for b, held in blocks_of(names, setting).items()}

    def sample(tensors: Tensors) -> dict[str, dict[str, MemoryTensor]]:
        return {
            b: {n: sampled(tensors[n], SEARCHED[1] // len(held)) for n in held} for b, held in few.items()
        }

    mine = sample(target)
    near: list[_Sampled] = []
    seen: set[bytes] = set()
    more = 0
    for number, candidate in enumerate(candidates):
        theirs = sample(candidate)
        digest = blake3(b"".join(t.tobytes() for held in theirs.values() for t in held.values())).digest()
        far = sum(float(gram_of(mine[b], [theirs[b]])[0, 0]) for b in mine)
        if digest in seen or not isfinite(far):
            continue
        seen.add(digest)
        near.append(_Sampled(far, number, theirs))
        if len(near) == 2 * MOST_CANDIDATES:
            near, more = sorted(near, key=_Sampled.order)[:MOST_CANDIDATES], more + MOST_CANDIDATES
    more += max(0, len(near) - MOST_CANDIDATES)
    if more:
        reporter.note(
            f"{setting.cls} is compared with the {MOST_CANDIDATES} nearest files, not with {more:,} more"
        )
    near = sorted(sorted(near, key=_Sampled.order)[:MOST_CANDIDATES], key=lambda c: c.number)
    if not near:
        return ()
    grams = np.stack([gram_of(mine[b], [c.tensors[b] for c in near]) for b in mine])
    noise = total(products_of(t, [None]) for held in mine.values() for t in held.values()).noise
    return tuple(p if p == NOTHING else near[p].number for p in choose(grams, noise))


class _Sampled(NamedTuple):
    """A candidate's sample by block, and the squares of its differences to the target's."""

    far: float
    number: int
    tensors: Mapping[str, Tensors]

    def order(self) -> tuple[float, int]:
        """The nearest first."""
        return self.far, self.number


def sampled(tensor: LazyTensor, count: int) -> MemoryTensor:
    """The elements in a tensor's middle, at most `count` of them, as a tensor of one dimension."""
    count = min(count, tensor.numel)
    size = tensor.dtype.itemsize
    data = bytearray(count * size)
    tensor.read_into((tensor.numel - count) // 2 * size, memoryview(data))
    return MemoryTensor(tensor.dtype, (count,), bytes(data))


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, from first to last."""
    return [names[len(names) * i // count] for i in range(count)] if len(names) > count else [*names]


def gram_of(target: Mapping[str, LazyTensor], candidates: Sequence[Tensors]) -> Any:
    """The inner products of the candidates' differences to a target: FP64 `[n + 1, n + 1]`, zeros the last.

    All hold tensors of the same names, read as a whole.
    """
    import numpy as np
    import torch

    names = [*target]
    aim = _values(target, names).double()
    apart = torch.stack([*(_values(c, names).double() - aim for c in candidates), -aim])
    found = np.zeros((len(apart), len(apart)))
    for i in range(len(apart)):
        found[i, i:] = found[i:, i] = fold(apart[i] * apart[i:]).numpy()
    return found


def _values(tensors: Tensors, names: Sequence[str]) -> Any:
    import torch

    held = [tensors[n] for n in names]
    return torch.cat([torch.frombuffer(t.tobytes(), dtype=t.dtype.torch).float() for t in held])


def choose(grams: NDArray[np.float64], noise: float) -> tuple[int, ...]:
    """The candidates that a target is best a sum of, weights being 1 together in each block.

    `grams` are those of `gram_of`, `[blocks, n + 1, n + 1]`; `noise` is what rounding leaves of the
    squares of all. A further one must lessen what is left by a share; NOTHING stands for zeros.
    Two and three are the best of all pairs and triples, more are found one by one.
    """
    import numpy as np

    count = grams.shape[1]
    alone = [float(v) for v in _sum(np.einsum("bii->bi", grams))]
    best: Choice = min(((v, (i,)) for i, v in enumerate(alone[:-1])), default=(np.inf, ()))
    while len(best[1]) < min(MOST_PARENTS, count) and (len(best[1]) < 2 or best[0] > 2 * noise):
        more = _best_of(grams, len(best[1]) + 1) if len(best[1]) < 3 else _one_more(grams, best[1])
        if more[0] > GAIN * best[0]:
            if len(best[1]) == 1 and count > 2:  # of three one may add what another takes away
                triple = _best_of(grams, 3)
                if triple[0] <= GAIN * GAIN * best[0]:
                    best = triple
                    continue
            break
        best = more
    return tuple(sorted((i if i < count - 1 else NOTHING for i in best[1]), key=lambda i: (i < 0, i)))


def _sum(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over blocks, in their order."""
    found: NDArray[np.float64] = blocks[0].copy()
    for block in blocks[1:]:
        found += block
    return found


def _best_of(grams: NDArray[np.float64], size: int) -> Choice:
    """The best of all pairs, or of all triples; what is left of the squares, and which."""
    import numpy as np

    found: list[Choice] = []
    for anchor in range(grams.shape[1]):
        rest, aim, left, own = _around(grams, (anchor,))
        alone = np.divide(aim**2, rest_of := _diagonal(rest), out=np.zeros_like(aim), where=rest_of > own)
        if size == 2:
            saved = _sum(alone)
            other = int(saved.argmax())
            found.append((left - float(saved[other]), tuple(sorted((anchor, other)))))
            continue
        a, b = rest_of[:, :, None], rest_of[:, None, :]
        x, y = aim[:, :, None], aim[:, None, :]
        det = a * b - rest**2
        both = np.maximum(alone[:, :, None], alone[:, None, :])
        fine = (det > _DEPENDENT * a * b) & (a > own[:, :, None]) & (b > own[:, None, :])
        np.divide(b * x**2 - 2 * rest * x * y + a * y**2, det, out=both, where=fine)
        saved = _sum(both)
        i, j = divmod(int(saved.argmax()), saved.shape[1])
        found.append((left - float(saved[i, j]), tuple(sorted({anchor, i, j}))))
    return min(found)


def _one_more(grams: NDArray[np.float64], chosen: tuple[int, ...]) -> Choice:
    """One more than those that are chosen; then each is changed for a better one, while there is any."""
    best = _added(grams, chosen)
    while True:
        better = min(_added(grams, tuple(c for c in best[1] if c != gone)) for gone in best[1])
        if not better[0] < (1 - 1e-9) * best[0]:
            return best
        best = better


def _added(grams: NDArray[np.float64], chosen: tuple[int, ...]) -> Choice:
    import numpy as np

    rest, aim, left, own = _around(grams, chosen)
    held = _diagonal(rest)
    saved = _sum(np.divide(aim**2, held, out=np.zeros_like(aim), where=held > own))
    other = int(saved.argmax())
    return left - float(saved[other]), tuple(sorted({*chosen, other}))


def _diagonal(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    found: NDArray[np.float64] = np.einsum("bii->bi", matrices).copy()
    return found


def _around(grams: NDArray[np.float64], chosen: tuple[int, ...]) -> tuple[Any, Any, float, Any]:
    """What those chosen leave of all others' differences to the first of them.

    Their products with each other `[blocks, n, n]`, with what is left of the target `[blocks, n]`, the
    square of that, and of each the square below which nothing of it is left.
    """
    first, *others = chosen
    row = grams[:, first, :]
    corner = grams[:, first, first][:, None]
    rest = grams - row[:, :, None] - row[:, None, :] + corner[:, :, None]
    aim = corner - row
    left = corner[:, 0].copy()
    own = _DEPENDENT * _diagonal(rest)
    for other in others:
        held = rest[:, other, other].copy()
        fine = held > own[:, other]
        held[~fine] = 1.0
        column = rest[:, :, other] * fine[:, None]
        share = aim[:, other] * fine
        left -= share**2 / held
        aim = aim - column * (share / held)[:, None]
        rest = rest - column[:, :, None] * column[:, None, :] / held[:, None, None]
    return rest, aim, float(_sum(left[:, None])[0]), own
