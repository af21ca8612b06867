"""What pruning takes away and what became of it, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from builder.base.errors import ExitCode, printable, problem_data
from builder.base.page import cells, columns, pad
from builder.base.progress import human_bytes
from builder.base.words import CONTAINERS, TYPES
from builder.toolkit.prune import Pruning, Result, Share

EXAMPLES = 3

Row = tuple[str, int | None, str]  # what, bytes, and words for it


def describe(pruning: Pruning, names: bool = False) -> Iterator[str]:
    """What goes and what stays of a file, the largest first."""
    report = pruning.report
    what = (report.kind and report.kind.text) or report.identity.architecture or "unknown"
    sizes = f"{human_bytes(report.size)}, {human_bytes(pruning.left)} of tensors stay"
    yield printable(f"{report.path}: {what}, {sizes}")
    goes: list[Row] = [(s.reason, s.bytes, _gone(s, pruning)) for s in pruning.goes]
    if not goes and pruning.repacked:
        goes.append(("container", None, f"{CONTAINERS[report.container]}, which becomes safetensors"))
    repairs: list[Row] = [(name, None, change) for name, change in pruning.repairs]
    stays: list[Row] = [(s.reason, s.bytes, _counted(s)) for s in pruning.parts]
    called = {"unknown": "tensors"} if report.kind is not None and report.kind.called else {}
    stays += [
        (called.get(s.reason, s.reason), s.bytes, f"{_counted(s)}: {_grouped(s, pruning)}")
        for s in pruning.rest
    ]
    groups = {"goes": goes or [("nothing", None, "")], "fixed": repairs, "stays": stays}
    wide = max(cells(reason) for rows in groups.values() for reason, *_ in rows)
    for label, rows in groups.items():
        for index, (reason, size, text) in enumerate(rows):
            share = f"{human_bytes(max(size, 0)):>7}" if size is not None else ""
            head = label if index == 0 else ""
            yield f"  {head:<6} {pad(reason, wide)}  {share}  {printable(text)}".rstrip()
    for gone in pruning.goes if names else ():
        yield from (printable(f"  {gone.reason}: {n}") for n in gone.names)


def _gone(share: Share, pruning: Pruning) -> str:
    astray = next((m for m in pruning.identity.astray if m.component.name == share.reason), None)
    if astray is not None:
        slots = f"{pruning.identity.architecture} has no slot for it"
        return f"{_counted(share)}: {slots}; `--keep {astray.component.cls}` keeps it"
    types = " and ".join(sorted({pruning.report.tensors[n].dtype.code for n in share.names}))
    if share.reason == "precision":
        return f"{_counted(share)} of {types} rounded to {rounded_to(pruning)}"
    if share.reason == "positions":
        return f"{_counted(share)} of {types} made int64"
    return f"{_counted(share)}: {_grouped(share, pruning)}"


def rounded_to(pruning: Pruning) -> str:
    """The number types that components are rounded to."""
    return " and ".join(TYPES[code].upper() for code in pruning.rounded)


def _counted(share: Share) -> str:
    return f"{len(share.names):,} tensor" + "s" * (len(share.names) != 1)


def _grouped(share: Share, pruning: Pruning) -> str:
    """The names of a share by their first part, the largest first."""
    groups: dict[str, list[str]] = {}
    for name in share.names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    size = {head: sum(pruning.report.tensors[n].nbytes for n in held) for head, held in groups.items()}
    told = [
        _clipped(held[0]) if len(held) == 1 else f"{_clipped(head)}.… ({len(held):,})"
        for head, held in sorted(groups.items(), key=lambda g: -size[g[0]])[:EXAMPLES]
    ]
    more = len(groups) - len(told)
    return ", ".join(told) + (f" and {more:,} more" if more else "")


def _clipped(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def line(result: Result) -> str:
    """What became of one file, where there is more to say than what goes and what stays."""
    built = result.built
    if built is None:
        said = f"{result.state:<9}  {printable(str(result.copy or result.path))}"
        return said if result.state in ("tidy", "copied") else ""
    metric = f"  ({built.metric})" if built.metric else ""
    where = printable(str(built.path))
    return f"{built.state:<9}  {where}  {human_bytes(built.size)}{metric}\n  sha256 {built.sha256}"


def table(results: list[Result]) -> str:
    """What became of several files, a line each, and the sum."""
    rows = [("FILE", "STATE", "BEFORE", "AFTER"), *map(_row, results)]
    lines = columns(rows, {2, 3})
    done = [r for r in results if r.pruning is not None and r.code == ExitCode.DONE]
    before = sum(r.pruning.report.size for r in done if r.pruning is not None)
    after = sum(map(_after, done))
    failed = len(results) - len(done)
    total = f"{len(done):,} of {len(results):,} files, {human_bytes(before)} → {human_bytes(after)}"
    return "\n".join([*lines, total + (f", {failed:,} not pruned" if failed else "")])


def _row(result: Result) -> tuple[str, str, str, str]:
    before = human_bytes(result.pruning.report.size) if result.pruning is not None else ""
    after = human_bytes(_after(result)) if result.code == ExitCode.DONE else ""
    return printable(str(result.path)), result.state, before, after


def _after(result: Result) -> int:
    assert result.pruning is not None
    if result.built is not None:
        return result.built.size
    return result.pruning.left if result.state == "to do" else result.pruning.report.size


def to_json(result: Result) -> dict[str, Any]:
    pruning, built = result.pruning, result.built
    said: dict[str, Any] = {"path": str(result.path), "state": result.state}
    if pruning is not None:
        said |= {
            "architecture": pruning.identity.architecture,
            "size": pruning.report.size,
            "left": pruning.left,
            "described": (pruning.report.kind and pruning.report.kind.text) or None,
            "precision": pruning.output["precision"],
            "rounded_to": list(pruning.rounded),
            "fixed": [{"what": name, "change": change} for name, change in pruning.repairs],
            "goes": [_share_json(s) for s in pruning.goes],
            "stays": [_share_json(s) for s in (*pruning.parts, *pruning.rest)],
        }
    if built is not None:
        said["output"] = {
            "path": str(built.path),
            "size": built.size,
            "sha256": built.sha256,
            "metric": built.metric or None,
        }
    if result.copy is not None:
        said["output"] = {"path": str(result.copy), "size": result.copy.stat().st_size}
    if result.problems:
        said["error"] = [problem_data(p) for p in result.problems]
    return said


def _share_json(share: Share) -> dict[str, Any]:
    return {"what": share.reason, "bytes": share.bytes, "tensors": list(share.names)}
