"""What pruning takes out of a checkpoint and what it leaves, said before anything is done."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from builder.base.disk import write_bytes
from builder.base.errors import ExitCode, Place, Problem, SourceError
from builder.base.files import read_bounded
from builder.build import Build, Built
from builder.formats.open import is_model
from builder.models.identify import EMA, Identity, Match
from builder.models.parts import home, usual_precision
from builder.recipe import Pick
from builder.recipe.names import SHARD, SUFFIXES, recipe_name
from builder.recipe.profiles import MAX_SIDECAR
from builder.reports.inspect import Report, examine
from builder.sources.opened import Sources
from builder.tensors.cast import cast_type
from builder.tensors.lazy import LazyTensor
from builder.toolkit.command_recipe import CommandRecipe, run
from builder.workspace import Workspace

ORIGIN = "pruned_from"  # the metadata that says which file this was

# Of the original's metadata, what a build would leave out or say anew, and stays true of a pruned file.
# `sshs_` are the hashes that programs look a LoRA's page up by: they have always been the original's.
_TRUE = ("modelspec.title", "modelspec.resolution", "modelspec.date", "modelspec.thumbnail", "sshs_")


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Options:
    """How to prune. `precision`: None is 16 bits, as such models are published. `keep` are names of tensors,
    or patterns of them as a shell has, that stay whatever they are. `force`: what is broken or unknown, too.
    """

    precision: str | None = None
    keep_ema: bool = False
    keep: tuple[str, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class Share:
    """Tensors of a file that have one fate for one reason: full names, the largest first, and bytes.

    For `precision` the bytes are those that rounding saves.
    """

    reason: str
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Pruning:
    """What is to become of a file, and why not. Sizes are in bytes, `left` is of the tensors that stay.

    `parts` are the components that stay, at their size after rounding, and `rest` what stays beside them;
    `averages` are classes of averages that are components of the pruned file.
    `refusal` says why nothing should be done, `unmatched` which patterns of `keep` match nothing.
    `output` is the recipe's table.
    """

    path: Path
    report: Report
    goes: tuple[Share, ...]
    parts: tuple[Share, ...]
    rest: tuple[Share, ...]
    left: int
    averages: tuple[str, ...]
    output: dict[str, Any]
    refusal: Problem | None
    unmatched: tuple[str, ...]

    @property
    def identity(self) -> Identity:
        """What the file is."""
        return self.report.identity

    @property
    def tidy(self) -> bool:
        """Whether there is nothing to take out of it, and its names are the usual ones."""
        return not self.goes and all(m.usual or m.ema for m in self.identity.matches)

    @property
    def checked(self) -> Pruning:
        """This, unless it should not be done: raises SourceError."""
        if self.refusal is not None:
            raise SourceError(self.refusal)
        return self


def plan_pruning(path: Path, sources: Sources, options: Options) -> Pruning:
    """What pruning would do to a file, from its table of contents; raises SourceError for no checkpoint."""
    catalog = sources.catalog
    opened = sources.open(sources.file(path))
    report = examine(opened.checkpoint, catalog, metric=False, identity=opened.identity)
    report = replace(report, path=str(path))
    identity, tensors = report.identity, report.tensors
    at = home(identity, catalog)
    precision = options.precision or usual_precision(identity.architecture or "", identity, catalog)
    asked = {p: [n for n in tensors if n == p or fnmatchcase(n, p)] for p in options.keep}
    kept = {n for names in asked.values() for n in names}
    averages = {m.component.cls: m for m in identity.matches if m.ema}
    # An average alone is the model, and is not listed among what training keeps beside one.
    wanted = averages if options.keep_ema or not identity.ema else {}
    stays = {n for m in wanted.values() for n in m.full}
    state = [n for n in identity.optional if n.startswith(EMA) and not wanted]  # of the running average
    if options.keep_ema:
        kept |= {*identity.ema, *state} - stays
    gone = {
        "EMA": [n for n in (*identity.ema, *state) if n not in kept | stays],
        "junk": [n for n in identity.junk if n not in kept],
    }
    left = {n: t for n, t in tensors.items() if n not in {*gone["EMA"], *gone["junk"]}}
    slots = at.slots if at is not None else (identity.architecture,)
    parts = [m for m in identity.matches if m.component.cls in (*slots, *wanted)]
    rounded = {
        full: saved for m in parts for full in m.full if (saved := _saved(full, tensors[full], precision))
    }
    of_parts = {full for m in parts for full in m.full}
    rest = {
        "extra": [n for n in identity.optional if n in left],
        "scales": list(identity.scales),
        "kept": [n for n in left if n in kept and n not in of_parts],
    }
    rest["unknown"] = [n for n in left if n not in of_parts.union(*rest.values())]
    output = {
        "precision": precision,
        "narrow": True,
        "unknown": "keep",
        **({"keep": [*rest["extra"], *sorted(kept - of_parts)]} if kept - of_parts else {}),
        **({"partial": True} if not identity.intact else {}),
    }
    goes = _shares(gone, tensors)
    if rounded:
        goes.append(replace(_share("precision", rounded, tensors), bytes=sum(rounded.values())))
    return Pruning(
        path,
        report,
        tuple(sorted(goes, key=lambda s: -s.bytes)),
        tuple(_part(m, tensors, rounded) for m in parts),
        tuple(_shares(rest, tensors)),
        sum(t.nbytes for t in left.values()) - sum(rounded.values()),
        tuple(wanted),
        output,
        None if options.force and tensors else _refusal(path, report),
        tuple(p for p, names in asked.items() if not names),
    )


def prune(
    pruning: Pruning,
    target: Path,
    workspace: Workspace,
    sources: Sources,
    *,
    naming: Callable[[Built], Path] | None = None,
    save: Path | None = None,
    threads: int | None = None,
) -> Build:
    """Write the pruned file to `target`, or where in its folder `naming` says once it is known.

    Metadata are the original's, with its name and size under `pruned_from`. A `.yaml` of its name is copied
    beside it, unless there is one. With `save`, the recipe is written there. Raises CkptError.
    """
    made = run(
        _recipe(pruning.checked), target, workspace, sources, naming=naming, save=save, threads=threads
    )
    built = made.outputs[0].path
    config, beside = pruning.path.with_suffix(".yaml"), built.with_suffix(".yaml")
    with suppress(OSError):
        # A link could lead to any file of the user's.
        if not os.path.lexists(beside) and not config.is_symlink():
            write_bytes(beside, read_bounded(config, MAX_SIDECAR))
            workspace.reporter.note(f"`{config.name}` goes with it, as `{beside.name}`")
    return made


def _recipe(pruning: Pruning) -> CommandRecipe:
    """The recipe, with the original's metadata and its name."""
    path, said = pruning.path, pruning.report.metadata
    origin: dict[str, Any] = {"file": path.name or path.resolve().name, "size": pruning.report.size}
    if ORIGIN in said:
        origin[ORIGIN] = _parsed(said[ORIGIN])
    kept = {k: v for k, v in said.items() if k.startswith(_TRUE)}
    kept[ORIGIN] = json.dumps(origin, sort_keys=True, ensure_ascii=True)
    name = recipe_name(path)
    components = {cls: Pick(cls, name) for cls in pruning.averages}
    return CommandRecipe(
        name, {name: path}, name, components=components, output={**pruning.output, "metadata": kept}
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refusal(path: Path, report: Report) -> Problem | None:
    """Why a file should not be pruned."""
    place, identity = Place(str(path)), report.identity
    if not identity.intact:
        fault = report.faults[0]
        what = f"broken: {fault.fact}" if identity.architecture else fault.fact
        hint = "`--force` drops EMA and junk all the same, and keeps the rest" if report.tensors else None
        return Problem(f"not pruned: {what}", place, fault.evidence, hint)
    if 2 * report.junk.bytes > sum(t.nbytes for t in report.tensors.values()):
        evidence = (f"{report.junk.bytes:,} of {report.size:,} bytes are taken for junk",)
        hint = "`--dry-run` says which tensors; `--keep` keeps some, `--force` drops them all the same"
        return Problem("not pruned: most of it would go", place, evidence, hint)
    return None


def _saved(name: str, tensor: LazyTensor, precision: str) -> int:
    """Bytes that rounding a tensor to a precision saves."""
    new = cast_type(name, tensor.dtype, precision, narrow=True)  # type: ignore[arg-type]
    return tensor.nbytes - tensor.numel * new.bits // 8


def _share(reason: str, names: Iterable[str], tensors: Tensors) -> Share:
    by_size = sorted(names, key=lambda n: (-tensors[n].nbytes, n))
    return Share(reason, tuple(by_size), sum(tensors[n].nbytes for n in by_size))


def _part(match: Match, tensors: Tensors, rounded: Mapping[str, int]) -> Share:
    share = _share(match.component.name, match.full, tensors)
    return replace(share, bytes=share.bytes - sum(rounded.get(n, 0) for n in share.names))


def _shares(groups: Mapping[str, list[str]], tensors: Tensors) -> list[Share]:
    return [_share(reason, names, tensors) for reason, names in groups.items() if names]


@dataclass(frozen=True)
class Result:
    """What became of a file: `written`, `unchanged`, `tidy`, `to do`, `refused` or `failed`."""

    path: Path
    state: str
    pruning: Pruning | None = None
    built: Built | None = None
    problems: tuple[Problem, ...] = ()
    code: ExitCode = ExitCode.DONE


def checkpoints(files: Iterable[Path], recursive: bool) -> Iterator[Path]:
    """The files named, and the checkpoints in the folders named that are none themselves."""
    for file in files:
        if not file.is_dir() or is_model(file):
            yield file
            continue
        below = sorted(file.rglob("*") if recursive else file.iterdir())
        for path in below:
            hidden = any(p.startswith(".") for p in path.relative_to(file).parts)
            model = path.suffix.lower() in SUFFIXES and not SHARD.fullmatch(path.name)
            if model and not hidden and _regular(path):
                yield path


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
