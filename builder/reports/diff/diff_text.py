"""A comparison as a person reads it: short, or the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from builder.base.errors import printable
from builder.base.page import LABEL, Style, columns, fold
from builder.base.progress import human_bytes
from builder.base.words import CONTAINERS, TYPES, counted
from builder.reports.diff.causes import causes, is_positions, type_name
from builder.reports.diff.compare import Diff, Part, Side, TensorDiff, type_counts
from builder.reports.diff.diff_json import mapping_changes, unravel
from builder.reports.diff.values import Spot
from builder.tensors.lazy import LazyTensor

LIMIT = 8  # of a list's lines in the short form
BAR = 24  # columns of the longest bar

Row = Sequence[str]


def render(diff: Diff, *, full: bool = False, width: int | None = None, color: bool = False) -> str:
    """The comparison as text of at most `width` columns (None: lines as long as they come).

    Names out of the files are escaped. The short form cuts long lists; the `full` one leaves nothing out.
    """
    page = _Page(diff, full, Style(color))
    blocks = [page.head(), page.verdict(), page.table(), page.facts(), page.distances(), page.tensors()]
    if full:
        blocks += [page.alone("A", diff.a, diff.only_a), page.alone("B", diff.b, diff.only_b)]
    return fold("\n\n".join("\n".join(block) for b in blocks if (block := list(b))), width)


class _Page:
    def __init__(self, diff: Diff, full: bool, style: Style) -> None:
        self.diff, self.full, self.style = diff, full, style

    def head(self) -> Iterator[str]:
        """The two files, a line each."""
        for letter, side in (("A", self.diff.a), ("B", self.diff.b)):
            c = side.checkpoint
            what = " · ".join(
                [
                    side.identity.architecture or "unknown",
                    CONTAINERS.get(c.container, c.container),
                    human_bytes(c.size),
                    counted(len(c), "tensor"),
                ]
            )
            yield f"{self.style.strong(letter)}  {self.style.strong(printable(side.path))}"
            yield f"   {self.style.dim(what)}"

    def verdict(self) -> Iterator[str]:
        """The likely causes, a line each."""
        mark = self.style.good("=") if self.diff.same else self.style.bad("≠")
        for cause in causes(self.diff):
            yield f"{mark} {printable(cause)}"

    def table(self) -> Iterator[str]:
        """The components, a line each."""
        if not self.diff.parts:
            return
        rows = [("component", "A", "B", "tensors", "values"), *map(self.row, self.diff.parts)]
        head, *lines = columns(rows, {3}, indent=2)
        yield self.style.dim(head)
        yield from lines

    def row(self, part: Part) -> Row:
        """A component's cells."""
        a, b = self.diff.a.checkpoint, self.diff.b.checkpoint
        in_a = (*(t.pair.a for t in part.tensors), *part.only_a)
        in_b = (*(t.pair.b for t in part.tensors), *part.only_b)
        count = len(part.tensors) or len(in_a) or len(in_b)
        name = " / ".join(part.names) or "(no component)"
        return name, _types(in_a, a), _types(in_b, b), f"{count:,}", self.state(part)

    def state(self, part: Part) -> str:
        """How the values of a component differ, in few words."""
        if not part.tensors:
            said = []
            for letter, side, names in (("A", self.diff.a, part.only_a), ("B", self.diff.b, part.only_b)):
                if names:
                    count = f"{len(names):,} " * bool(part.only_a and part.only_b)
                    said.append(f"{count}only in {letter}, {human_bytes(side.size(names))}")
            return "; ".join(said)
        said = []
        total = part.total
        misshapen = sum(t.values is None for t in part.tensors)
        changed = len(part.changed) - misshapen
        if misshapen:
            said.append(f"{misshapen:,} of other shape")
        if changed:
            what = "position_ids differ" if all(map(is_positions, part.changed)) else f"{changed:,} differ"
            said.append(f"{what}: {_share(total.differing, total.elements)} of values")
            if total.steps:
                said[-1] += f", up to {_count(total.steps)} ULP"
        if rounded := self.rounded(part):
            said.append(f"the rest {rounded}" if part.changed else rounded)
        elif not part.changed:
            said.append("identical")
        if any(t.renamed for t in part.tensors):
            said.append("other names")
        for letter, names in (("A", part.only_a), ("B", part.only_b)):
            if names:
                said.append(f"{len(names):,} only in {letter}")
        return "; ".join(said)

    def rounded(self, part: Part) -> str:
        """What types explain, in few words."""
        turned = [t for t in part.tensors if t.values and t.values.rounding]
        kinds = {_to(t) for t in turned if not t.exact}
        if kinds:
            return f"same after rounding to {' and '.join(sorted(kinds))}"
        return "same in another type" if turned else ""

    def facts(self) -> Iterator[str]:
        """What else there is to say, a labelled line each."""
        d, a, b = self.diff, self.diff.a.checkpoint, self.diff.b.checkpoint
        if a.container != b.container:
            yield from self.fact(
                "container", f"{CONTAINERS[a.container]} in A, {CONTAINERS[b.container]} in B"
            )
        yield from self.fact("metadata", self.changes(a.metadata, b.metadata))
        yield from self.fact("entries", self.changes(a.others, b.others))
        if not self.full:
            for letter, side, names in (("A", d.a, d.only_a), ("B", d.b, d.only_b)):
                if names:
                    listed = f"{human_bytes(side.size(names))} in {len(names):,}: {_examples(sorted(names))}"
                    yield from self.fact(f"only in {letter}", listed)
        shapes = [t for t in d.tensors if t.shapes[0] != t.shapes[1]]
        if shapes:
            first = shapes[0]
            more = f" and {len(shapes) - 1:,} more" if len(shapes) > 1 else ""
            yield from self.fact(
                "shapes", f"{first.pair.a} {list(first.shapes[0])} in A, {list(first.shapes[1])} in B{more}"
            )
        renamed = [t for t in d.tensors if t.renamed]
        if renamed:
            first = renamed[0]
            more = f" and {len(renamed) - 1:,} more" if len(renamed) > 1 else ""
            yield from self.fact("names", f"{first.pair.a} in A, {first.pair.b} in B{more}")
        total = d.total
        if total.differing:
            share = _share(total.differing, total.elements)
            yield from self.fact("values", f"{total.differing:,} of {total.elements:,} differ ({share})")
            for label, found in (("first", total.first), ("largest", total.largest)):
                if found:
                    yield from self.fact(label, _where(*found))
            if total.farthest:
                yield from self.fact("farthest", f"{_count(total.steps)} ULP, {_where(*total.farthest)}")
            if total.not_numbers:
                yield from self.fact("NaN", f"{total.not_numbers:,} of them, on one side or another")

    def changes(self, a: Mapping[str, str], b: Mapping[str, str]) -> str:
        """What differs between two mappings, by keys."""
        found = mapping_changes(a, b)
        limit = None if self.full else 4
        words = (("only in A: ", "only_a"), ("only in B: ", "only_b"), ("other: ", "differ"))
        return "; ".join(f"{word}{_examples(found[key], limit)}" for word, key in words if found[key])

    def distances(self) -> Iterator[str]:
        """The histogram of distances."""
        total = self.diff.total
        if not total.distances:
            return
        unit = f" of {type_name(total.unit)}" if total.unit else ""
        yield self.style.strong(f"How far apart, in units in the last place{unit}")
        rows = self.bins(total.distances)
        most, table = max(n for _, n in rows), []
        for label, n in rows:
            bar = "█" * round(BAR * n / most) or ("▏" if n else "")
            table.append((label, f"{n:,}", _share(n, sum(total.distances)).rjust(6), self.style.dim(bar)))
        yield from columns(table, {0, 1}, indent=2)

    def bins(self, distances: Sequence[int]) -> list[tuple[str, int]]:
        """The histogram's rows; in the short form the thin ends are taken together."""
        low = next(k for k, n in enumerate(distances) if n)
        high = len(distances) - 1
        thin = 0 if self.full else sum(distances) / 100
        first, last = low, high
        while first < high and sum(distances[: first + 1]) < thin:
            first += 1
        while last > first and sum(distances[last:]) < thin:
            last -= 1
        rows = [(_bin(k, k), distances[k]) for k in range(first, last + 1)]
        if first > low:
            rows.insert(0, (_bin(low, first - 1), sum(distances[:first])))
        if last < high:
            rows.append((_bin(last + 1, high), sum(distances[last + 1 :])))
        return rows

    def tensors(self) -> Iterator[str]:
        """The tensors whose values differ, a line each."""
        changed = [t for t in self.diff.tensors if not t.alike]
        if not changed:
            return
        yield self.style.strong("Tensors that differ")
        shown = changed if self.full else sorted(changed, key=_weight)[:LIMIT]
        rows = [("differ", "ULP", "largest", "tensor"), *map(_tensor_row, shown)]
        head, *lines = columns(rows, {0, 1, 2}, indent=2)
        yield self.style.dim(head)
        yield from lines
        if len(changed) > len(shown):
            yield self.style.dim(f"  and {len(changed) - len(shown):,} more; `--full` lists them all")

    def alone(self, letter: str, side: Side, names: Iterable[str]) -> Iterator[str]:
        """What one side has alone, tensor by tensor."""
        listed = sorted(names)
        if listed:
            yield self.style.strong(f"Only in {letter}")
        for name in listed:
            tensor = side.checkpoint[name]
            yield f"  {printable(name)}  {tensor.dtype.code} {list(tensor.shape)}"

    def fact(self, label: str, text: str) -> Iterator[str]:
        """A labelled line, the rest of it below itself; nothing for no text."""
        if not text:
            return
        yield f"  {self.style.dim(label.ljust(LABEL))}{printable(text)}"


def _types(names: Iterable[str], tensors: Mapping[str, LazyTensor]) -> str:
    """The number types of some tensors, without the integers of a component's tables."""
    counts = type_counts(names, tensors)
    floating = [TYPES.get(code, code.lower()) for code in counts if code[0] in "FB" and code != "BOOL"]
    return "+".join(floating or [c.lower() for c in counts]) or "–"


def _to(tensor: TensorDiff) -> str:
    """The type that rounded the values of a tensor."""
    assert tensor.values is not None
    rounding = tensor.values.rounding[0]
    return type_name(rounding.via or tensor.dtypes[1 if rounding.of == "a" else 0])


def _weight(tensor: TensorDiff) -> tuple[int, float, str]:
    """Sorts the tensor that differs most to the front: what has no values, then by the largest difference."""
    values = tensor.values
    if values is None or not values.comparable:
        return 0, 0.0, tensor.pair.a
    largest = values.largest.difference if values.largest else 0.0
    return (0 if values.not_numbers else 1), -largest, tensor.pair.a


def _tensor_row(tensor: TensorDiff) -> Row:
    name = printable(tensor.pair.a) + (f" → {printable(tensor.pair.b)}" if tensor.renamed else "")
    values = tensor.values
    if values is None:
        return "shape", "", "", f"{name} {list(tensor.shapes[0])} → {list(tensor.shapes[1])}"
    if not values.comparable:
        return "type", "", "", f"{name} {tensor.dtypes[0].code} → {tensor.dtypes[1].code}"
    steps = _count(values.steps) if values.steps else "NaN" if values.not_numbers else "–"
    largest = f"{values.largest.difference:.3g}" if values.largest else "–"
    return _share(values.differing, values.elements), steps, largest, name


def _bin(low: int, high: int) -> str:
    """The distances of `low` to `high` bits."""
    ends = 1 << low - 1, (1 << high) - 1
    return "–".join(_count(n) for n in dict.fromkeys(ends))


def _where(tensor: TensorDiff, spot: Spot) -> str:
    index = list(unravel(spot.at, tensor.shapes[0]))
    a, b = next(p for d in (6, 9, 17) if (p := (f"{spot.a:.{d}g}", f"{spot.b:.{d}g}"))[0] != p[1] or d == 17)
    return f"{a} in A, {b} in B, at {tensor.pair.a} {index}"


def _share(part: int, whole: int) -> str:
    """A share in percent; what is not all of it never reads 100 %, what is not nothing never 0 %."""
    if part in (0, whole):
        return f"{100 * (part > 0)}%"
    share = 100 * part / whole
    return (
        "<0.01%"
        if share < 0.01
        else ">99.9%"
        if share > 99.9
        else f"{share:.2f}%"
        if share < 1
        else f"{share:.1f}%"
    )


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**6 else f"{number:.1e}".replace("e+0", "e")


def _examples(names: Sequence[str], limit: int | None = 3) -> str:
    shown = names if limit is None else names[:limit]
    more = len(names) - len(shown)
    return ", ".join(n if len(n) <= 80 else f"{n[:79]}…" for n in shown) + (
        f" and {more:,} more" if more else ""
    )
