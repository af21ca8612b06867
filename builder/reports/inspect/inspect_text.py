"""A report as a person reads it: short, or the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from builder.base.errors import Problem, clipped, shown
from builder.base.page import LABEL, Style, columns, fold
from builder.base.progress import human_bytes
from builder.base.words import CONTAINERS, TYPES, counted, either, examples, grouped
from builder.models.prediction import KINDS, Prediction
from builder.reports.inspect.examine import Part, Quantized, Report, Share
from builder.reports.inspect.faults import describe

Row = Sequence[str]


def render(report: Report, *, full: bool = False, width: int | None = None, color: bool = False) -> str:
    """The report as text, wrapped at `width` columns (None: lines as long as they come).

    Words are never broken. Names out of the file are escaped, and cut where nobody would read on. The short
    form fits a screen; the `full` one leaves nothing else out.
    """
    page = _Page(report, full, Style(color))
    blocks: list[Iterable[str]] = [page.head(), page.table(), page.facts(), page.hashes(), page.faults()]
    if full:
        blocks += page.appendix()
    return fold("\n\n".join("\n".join(block) for b in blocks if (block := list(b))), width)


class _Page:
    def __init__(self, report: Report, full: bool, style: Style) -> None:
        self.report, self.full, self.style = report, full, style

    def head(self) -> Iterator[str]:
        """The file, and in a line what it is."""
        r, s = self.report, self.style
        yield s.strong(shown(r.path))
        name = (r.kind and r.kind.text) or r.identity.architecture or "unknown"
        verdict = (s.good if r.kind is not None else s.bad)(shown(name))
        container = CONTAINERS.get(r.container, r.container)
        if r.container == "gguf" and (said := r.metadata.get("general.architecture")):
            container += f" for {shown(clipped(said, 40))}"
        yield " · ".join([verdict, container, self.size(r.size)])

    def table(self) -> Iterator[str]:
        """The components, a line each."""
        parts = self.report.parts
        if not parts:
            return
        head, *lines = columns(
            [("class", "component", "type", "tensors", "size", ""), *(self.row(p) for p in parts)],
            {3, 4},
            indent=2,
        )
        yield self.style.dim(head)
        yield from lines

    def row(self, part: Part) -> Row:
        """A component's cells."""
        component = part.match.component
        return (
            component.cls,
            component.name,
            types_of(part),
            f"{part.tensors:,}",
            human_bytes(part.bytes),
            ", ".join(_remarks(part)),
        )

    def facts(self) -> Iterator[str]:
        """What else there is to say of the file, a labelled line each."""
        r = self.report
        if (line := r.lineage) is not None:
            shown_by = f"{line.model}, by {line.by}" if line.model else ""
            alike = f"could be {either(line.models)}" if line.models and not line.model else ""
            yield from self.fact("model", shown_by or alike)
            if self.full and line.model and line.models:
                yield from self.fact("same table", ", ".join(line.models))
        if r.identity.intact and r.identity.absent:
            yield from self.fact("without", ", ".join(r.identity.absent))
        if r.metric is not None and any(c.isdigit() for c in r.metric.text):
            same = f", which is that of {r.model}" if r.model else ""
            yield from self.fact("metric", f"({r.metric.text}){same}")
        for packed in r.quantized:
            yield from self.fact("packed", _packed(packed))
        if r.prediction.signs:
            yield from self.fact("predicts", _predicts(r.prediction))
        if r.container == "gguf":
            held = (f"{t} {counted(n, 'tensor')} ({self.size(size)})" for t, (n, size) in r.types.items())
            yield from self.fact("types", ", ".join(held))
        if r.published:
            yield from self.fact("published", f"as {r.published.name}")
        rest = "tensors" if r.kind is not None and r.kind.called else "unknown"
        for label, share in (("EMA", r.ema), ("junk", r.junk), (rest, r.unknown)):
            if share.names:
                listed = "" if label == "EMA" or self.full else f": {grouped(share.names)}"
                yield from self.fact(
                    label, f"{self.size(share.bytes)} in {counted(share.keys, 'key')}{listed}"
                )
        if r.optional.names:
            by_size = sorted(r.optional.names, key=lambda n: r.tensors[n].nbytes)
            yield from self.fact("extra", examples(by_size, 4))
        if r.parts and not r.blocks and r.precision_waste * 1000 > (0 if self.full else r.pruned):
            wasted = self.size(r.precision_waste)
            yield from self.fact("precision", f"{wasted} wasted: 16 bits a number would do")
        saved = r.ema.bytes + r.junk.bytes + r.astray.bytes + r.precision_waste
        if r.identity.intact and not r.blocks and saved * 100 > r.pruned:
            yield from self.fact("pruned", f"{human_bytes(r.size)} → {self.size(r.pruned)}")
        if r.metadata and not self.full:
            keys = counted(len(r.metadata), "key")
            yield from self.fact("metadata", f"{keys}: {examples(sorted(r.metadata), 4)}")
        if r.globals:
            listed = ", ".join(r.globals) if self.full else examples(r.globals, 2)
            yield from self.fact("pickle", f"{counted(len(r.globals), 'global')}, none run: {listed}")

    def hashes(self) -> Iterator[str]:
        """The file's hashes, where they were asked for."""
        wide = max(map(len, self.report.hashes), default=0)
        for kind, value in self.report.hashes.items():
            yield f"  {self.style.dim(kind.ljust(wide))}  {value or '–'}"

    def faults(self) -> Iterator[str]:
        """What is wrong."""
        for problem in self.report.faults:
            yield from self.problem(problem)

    def problem(self, problem: Problem) -> Iterator[str]:
        """A fault: its fact after a mark, evidence and hint below."""
        s = self.style
        mark = s.bad("✗") if not self.report.sound and problem is self.report.faults[0] else s.caution("!")
        yield f"  {mark} {shown(problem.fact)}"
        yield from (f"    {shown(text)}" for text in problem.evidence)
        if problem.hint:
            yield s.dim(f"    hint: {shown(problem.hint)}")

    def appendix(self) -> Iterator[Iterable[str]]:
        """What the short form leaves out, a titled block each."""
        r = self.report
        for part in r.parts:
            yield self.block(f"{part.match.component.name}", self.details(part))
        yield self.block("Not in this file, though some of it is", map(describe, r.identity.rejected))
        yield self.block("Notes", r.identity.notes)
        yield self.block("Unknown", self.listing(r.unknown))
        yield self.block("Junk", self.listing(r.junk))
        yield self.block("Extra", self.listing(r.optional))
        yield self.block("Scales of packed weights", self.listing(r.share(r.identity.scales)))
        yield self.block(
            "Positions that are wrong",
            (f"`{p.tensor}` {p.position}: {p.value!r}, loads as {p.loaded}" for p in r.positions.wrong),
        )
        yield self.block(
            "Not numbers", (f"`{n}`: {s.nan:,} NaN, {s.infinite:,} infinite" for n, s in r.non_finite.items())
        )
        yield self.block("Entries that are no tensors", (f"{k}: {v}" for k, v in r.others.items()))
        yield self.block("Metadata", (f"{k}: {clipped(v)}" for k, v in sorted(r.metadata.items())))

    def details(self, part: Part) -> Iterator[str]:
        """All about one component."""
        match = part.match
        yield f"{match.component.cls}, {'under `' + match.prefix + '`' if match.prefix else 'bare names'}"
        types = ", ".join(f"{count:,} {code}" for code, count in part.dtypes.items())
        held = f"{counted(part.tensors, 'tensor')} ({types})"
        yield f"{held}, {part.parameters:,} parameters, {part.bytes:,} bytes"
        if part.digest:
            yield f"content blake3:{part.digest}"
        if match.missing_optional:
            yield f"without the optional {examples(match.missing_optional, 4)}"
        if match.companions:
            yield f"and beyond its table {examples(sorted(match.companions), 4)}"
        if match.component.note:
            yield match.component.note

    def listing(self, share: Share) -> Iterator[str]:
        """Tensors by name, with type and shape."""
        for name in share.names:
            tensor = self.report.tensors[name]
            yield f"{name}  {tensor.stored[0]} {list(tensor.shape)}"

    def block(self, title: str, texts: Iterable[str]) -> list[str]:
        """A title and what stands below it, indented; nothing when there is nothing."""
        found = [f"  {shown(text)}" for text in texts]
        return [self.style.strong(title), *found] if found else []

    def fact(self, label: str, text: str) -> Iterator[str]:
        """A labelled line, the rest of it below itself."""
        yield f"  {self.style.dim(label.ljust(LABEL))}{shown(text)}"

    def size(self, count: int) -> str:
        """A size, in the long form to the byte."""
        exact = f" ({count:,} bytes)" if self.full and count >= 1000 else ""
        return human_bytes(count) + exact


def _predicts(told: Prediction) -> str:
    """What is predicted, and what says so."""
    kind = KINDS[told.signs[0].kind] + (", to zero terminal SNR" if told.zero_snr else "")
    return f"{kind}, says {told.signs[0].what}"


def _packed(packed: Quantized) -> str:
    """What of a component is packed, how, and what a number of it takes."""
    schemes = ", ".join(f"{count:,} {scheme}" for scheme, count in packed.schemes.items())
    whose = f" of {packed.weights:,} weights of {packed.component}" if packed.component else ""
    return f"{schemes}{whose}" + (f", {packed.bits:.2f} bits a number" if packed.bits is not None else "")


def types_of(part: Part) -> str:
    """The number types of a component, without the integers of its tables."""
    floating = [TYPES.get(code, code.lower()) for code in part.dtypes if code[0] in "FBQ"]
    return "+".join(floating or [c.lower() for c in part.dtypes])


def _remarks(part: Part) -> Iterator[str]:
    match = part.match
    if part.known:
        yield f"{part.known} {match.component.cls.partition('-')[0]}"
    if match.rank:
        low, high = match.rank
        yield f"rank {low}" if low == high else f"ranks {low} to {high}"
    if match.companions:
        yield f"{len(match.companions):,} beyond its table"
    if match.component.prefix and not match.prefix:
        yield "diffusers' names" if match.diffusers else "bare names"
