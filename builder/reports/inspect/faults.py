"""What is wrong with a checkpoint, in words: a fact, its evidence and one thing to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from builder.base.errors import Problem
from builder.base.words import EXAMPLES, counted, listed
from builder.formats.lost import problem_of
from builder.models.identity import Match, Rejection
from builder.reports.inspect.positions import Position
from builder.tensors.packed.decode import why_not

if TYPE_CHECKING:
    from builder.reports.inspect.examine import Report

FP16_MAX = 65504


def find_faults(report: Report) -> Iterator[Problem]:
    """The faults of a report, worst first."""
    yield from _structure(report)
    yield from _numbers(report)
    yield from _lost(report)
    yield from _positions(report)
    yield from _prediction(report)
    yield from _spelling(report)
    yield from _duplicates(report)
    yield from _astray(report)
    yield from _scales(report)
    yield from _integers(report)
    yield from _published(report)


def describe(rejection: Rejection) -> str:
    """A rejected component in a line: how much of it is there, and what is not."""
    r = rejection
    at = f" under `{r.prefix}`" if r.prefix else ""
    line = f"`{r.component.name}`{at}: {r.present:,} of {r.total:,} tensors"
    if r.outdone_by:
        return f"{line}, all part of `{r.outdone_by}`"
    if r.missing:
        line += f"; missing {listed(r.missing, 1)}"
    if r.misshapen:
        name, expected, found = r.misshapen[0]
        more = f" and {len(r.misshapen) - 1:,} more" if len(r.misshapen) > 1 else ""
        line += f"; `{name}` is {list(found)}, not {list(expected)}{more}"
    return line


def _structure(report: Report) -> Iterator[Problem]:
    identity = report.identity
    if report.kind is not None:
        return
    if not report.tensors:
        yield Problem("there are no tensors in this file")
    elif not identity.matches:
        near = identity.runner_up
        yield Problem(
            "nothing in the catalog matches these tensors",
            evidence=(f"nearest: {describe(near)}",) if near else (),
            hint="`ckpt components learn FILE` writes a table of them for a catalog of your own",
        )
    elif identity.architecture is None:
        names = ", ".join(m.component.cls for m in identity.matches)
        yield Problem(f"components without prefixes that make no architecture together: {names}")
    elif identity.incomplete is None:
        yield Problem("the component is prefixed as in a full checkpoint, but no architecture has it")
    else:
        near = next((r for r in identity.rejected if r.component.cls in identity.absent), None)
        # What is there in another shape is not missing.
        lacking = "not as it should be" if near is not None and near.hint else "missing"
        averages = {m.component.average_of: m for m in identity.matches}
        spare = next((cls for cls in identity.absent if cls in averages), None)
        yield Problem(
            f"not a whole {identity.incomplete}: {' and '.join(identity.absent)} {lacking}",
            evidence=(f"nearest: {describe(near)}",) if near else (),
            hint=f"a recipe can promote `{averages[spare].component.name}` to be the {spare}"
            if spare
            else near.hint
            if near is not None and near.hint
            else "what is whole can be extracted, or completed by a recipe from other files",
        )


def _numbers(report: Report) -> Iterator[Problem]:
    bad = report.non_finite
    if bad:
        nan, infinite = (sum(getattr(s, kind) for s in bad.values()) for kind in ("nan", "infinite"))
        yield Problem(
            f"not numbers in {counted(len(bad), 'tensor')}: {nan:,} NaN, {infinite:,} infinite",
            evidence=(listed(tuple(bad)),),
            hint="the file is damaged, or came out of a broken merge: get another copy",
        )
    over = {n: s for n, s in report.scans.items() if s.overflow}
    if over:
        largest = max(s.largest for s in over.values())
        yield Problem(
            f"beyond FP16: {counted(sum(s.overflow for s in over.values()), 'value')} "
            f"in {counted(len(over), 'tensor')}",
            evidence=(f"the largest is {largest:g}, FP16 ends at {FP16_MAX:,}", listed(tuple(over))),
            hint="keep them in another precision, or give `--overflow clamp`; in a recipe "
            '`overflow = "clamp"` under [output]',
        )


def _lost(report: Report) -> Iterator[Problem]:
    if (problem := problem_of(report.lost)) is not None:
        yield problem


def _positions(report: Report) -> Iterator[Problem]:
    ids = report.positions
    owner = {full: m.component.name for m in report.identity.matches for full in m.full}
    for name, tensor in ids.tensors.items():
        of = f"`position_ids` of `{owner[name]}`" if name in owner else f"`{name}`"
        harmful = [p for p in ids.wrong if p.tensor == name and p.harmful]
        if harmful:
            listed = ", ".join(map(_position, harmful[:EXAMPLES]))
            more = f" and {len(harmful) - EXAMPLES:,} more" if len(harmful) > EXAMPLES else ""
            yield Problem(
                f"{of}: {len(harmful):,} of 77 {'is' if len(harmful) == 1 else 'are'} wrong",
                evidence=(f"as {tensor.dtype.code}: position {listed}{more}",),
                hint="the fix `clip-position-ids` makes them exact: int64 0..76",
            )
        elif name in ids.odd:
            yield Problem(
                f"{of} are {tensor.dtype.code} {list(tensor.shape)}, not I64 [1, 77]",
                hint="the fix `clip-position-ids` makes them exact",
            )


def _position(p: Position) -> str:
    held = f"{p.value:.7g}" if isinstance(p.value, float) else str(p.value)
    loaded = "" if p.loaded is None or p.loaded == p.value else f" (loads as {p.loaded})"
    return f"{p.position} holds {held}{loaded}"


def _prediction(report: Report) -> Iterator[Problem]:
    if signs := report.prediction.contradiction:
        yield Problem(
            "the file contradicts itself on what it predicts",
            evidence=signs,
            hint="programs heed the one or the other; a recipe settles it by `markers` and "
            "`modelspec.prediction_type` of its output",
        )


def _spelling(report: Report) -> Iterator[Problem]:
    for match in report.identity.matches:
        if match.diffusers_attention and not match.diffusers:
            example = next(iter(match.renamed.values()), next(iter(match.reshaped), ""))
            yield Problem(
                f"the attention of `{match.component.name}` is laid out as diffusers does it",
                evidence=(
                    f"{len(match.renamed)} other names, {len(match.reshaped)} other shapes: `{example}`…",
                ),
                hint="the fix `vae-attention-shape` gives it the names and shapes that loaders expect",
            )
        if match.usual_prefix is not None or (match.diffusers and not match.under):
            as_diffusers = "they are those of diffusers" if match.diffusers else ""
            begin = f"they begin with `{match.prefix}`, not `{match.usual_prefix}`" if match.under else ""
            yield Problem(
                f"the names of `{match.component.name}` are not those that loaders expect",
                evidence=tuple(filter(None, (begin, as_diffusers))),
                hint="a build gives them the usual names by itself",
            )


def _duplicates(report: Report) -> Iterator[Problem]:
    for match in report.identity.duplicates:
        cls = match.component.cls
        first = report.identity.find(cls)
        assert first is not None
        yield Problem(
            f"there is a second {cls} under {_where(match)}",
            evidence=(f"the one under {_where(first)} is taken, the second is junk",),
        )


def _astray(report: Report) -> Iterator[Problem]:
    for match in report.identity.astray:
        yield Problem(
            f"{report.identity.architecture} has no slot for `{match.component.name}`",
            evidence=(f"it lies under {_where(match)}; programs may take the model for another by it",),
            hint="pruning leaves it out",
        )


def _where(match: Match) -> str:
    return f"`{match.prefix}`" if match.prefix else "bare names"


def _scales(report: Report) -> Iterator[Problem]:
    """Weights, or companions without any, that nothing can decode."""
    packed = report.packed
    for scheme in packed.schemes if packed else ():
        weights = packed.by_scheme.get(scheme, ())
        if weights and (why := why_not(scheme)) is not None:
            yield Problem(
                f"{scheme} weights: {counted(len(weights), 'tensor')} that nothing here decodes",
                evidence=(f"`{weights[0]}` ({report.tensors[weights[0]].dtype.code}): {why}",),
                hint="keep their precision, or take the source they were made from",
            )
        elif not weights:
            beside = counted(len(packed.companions), "companion")
            yield Problem(f"{scheme} weights: 0 tensors with {beside}", evidence=(packed.evidence,))


def _integers(report: Report) -> Iterator[Problem]:
    """Weights that are no real numbers: a loader would take quantized ones for what they are not.

    A single integer, such as a `logit_scale`, is just a number.
    """
    for match in report.identity.matches:
        rules = match.component.tensors
        odd = [
            f
            for n, f in match.names.items()
            if not (rules[n].dtype or report.tensors[f].dtype.floating or f in report.packed.weights)
            and report.tensors[f].numel > 1
        ]
        if odd:
            kinds = sorted({report.tensors[name].dtype.code for name in odd})
            yield Problem(
                f"integers where `{match.component.name}` has weights: {counted(len(odd), 'tensor')}",
                evidence=(f"{' and '.join(kinds)}: {listed(tuple(odd))}",),
                hint="they are quantized: take the source they were made from",
            )


def _published(report: Report) -> Iterator[Problem]:
    """What is told of weights that are known."""
    for entry in (report.published, *(p.published for p in report.parts)):
        if entry is not None and entry.fix:
            yield Problem(
                f"these are the weights of `{entry.name}`",
                evidence=(entry.note,) if entry.note else (),
                hint=f"`{entry.fix}` takes their place",
            )
