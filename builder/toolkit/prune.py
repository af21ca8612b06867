"""What pruning takes out of a checkpoint and what it leaves, said before anything is done."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.base.disk import write_bytes
from builder.base.errors import ExitCode, Place, Problem, SourceError, UsageError, did_you_mean
from builder.base.files import parse_json, read_bounded
from builder.base.progress import Reporter
from builder.build import Build, Built
from builder.formats.open import is_model
from builder.models.cut import cut
from builder.models.identity import EMA, Identity, Match
from builder.models.parts import home, words_for
from builder.operations.fixes import FIXES, match_types
from builder.recipe import Pick
from builder.recipe.names import PRUNED, SHARD, free_name, named, recipe_name
from builder.recipe.profiles import MAX_SIDECAR, with_profile
from builder.recipe.values import PUBLISHED
from builder.reports.inspect import Report, examine
from builder.sources.opened import Sources
from builder.tensors.cast import Narrow
from builder.tensors.lazy import DType, LazyTensor
from builder.toolkit.command_recipe import CommandRecipe, run
from builder.toolkit.whole_files import copy_file, same_file
from builder.workspace import Workspace

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

ORIGIN = "pruned_from"  # the metadata that says which file this was

# Of the original's metadata, what a build would leave out or say anew, and stays true of a pruned file.
# `sshs_` are the hashes that programs look a LoRA's page up by: they have always been the original's.
_TRUE = ("modelspec.title", "modelspec.resolution", "modelspec.date", "modelspec.thumbnail", "sshs_")


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Options:
    """How to prune. `precision`: None is that in which each component is published, for what is wider; any
    other is what becomes of all that takes no fewer bits. `keep` are names of tensors, or patterns of them as
    a shell has, or classes, that stay whatever they are. `force`: what is broken or unknown, too. `fixes`,
    `profile`, `overflow` and `non_finite` are as in a recipe.
    """

    precision: str | None = None
    keep_ema: bool = False
    keep: tuple[str, ...] = ()
    force: bool = False
    fixes: tuple[str, ...] = ()
    profile: str | None = None
    overflow: str = "error"
    non_finite: str = "error"

    @property
    def keys(self) -> dict[str, str]:
        """What of this a recipe says under [output], where it is not the usual."""
        said = {"profile": self.profile, "overflow": self.overflow, "non_finite": self.non_finite}
        return {key: value for key, value in said.items() if value not in (None, "error")}


@dataclass(frozen=True)
class Share:
    """Tensors of a file that have one fate for one reason: full names, the largest first, and bytes.

    For `precision` the bytes are those that rounding saves, and for `positions`, which become int64, those
    that this saves: fewer than none where they were FP16.
    """

    reason: str
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Pruning:
    """What is to become of a file, and why not. Sizes are in bytes, `left` is of the tensors that stay.

    `parts` are the components that stay, at their size after rounding, and `rest` what stays beside them;
    `averages` are classes of averages that are components of the pruned file; `repairs` what fixes change, in
    words, by component. `rounded` are the types, as safetensors writes them, that what is rounded gets.
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
    repairs: tuple[tuple[str, str], ...]
    fixes: tuple[str, ...]
    output: dict[str, Any]
    rounded: tuple[str, ...]
    refusal: Problem | None
    unmatched: tuple[str, ...]

    @property
    def identity(self) -> Identity:
        """What the file is."""
        return self.report.identity

    @property
    def repacked(self) -> bool:
        """Whether it becomes a safetensors file that was none: models do, and what has no table stays."""
        return self.identity.intact and self.report.container.startswith("torch")

    @property
    def tidy(self) -> bool:
        """Whether there is nothing to do to it, and its names are the usual ones."""
        named = all(m.usual or m.ema for m in self.identity.matches)
        return named and not (self.goes or self.repairs or self.repacked)

    @property
    def broken(self) -> bool:
        """Whether it is a model that lacks parts, or nothing at all; what is unknown may be whole."""
        return not self.report.tensors or (not self.identity.intact and bool(self.identity.architecture))

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
    precision = options.precision or PUBLISHED
    asked = {p: _asked(p, tensors, identity) for p in options.keep}
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
    astray = {m.component: m.full for m in identity.astray}
    gone |= {c.name: [n for n in names if n not in kept] for c, names in astray.items()}
    whole = [c for c, names in astray.items() if kept.issuperset(names)]
    left = tensors.keys() - {n for names in gone.values() for n in names}
    slots = at.slots if at is not None else (identity.architecture,)
    parts = [m for m in identity.matches if m.component.cls in (*slots, *wanted)]
    narrow: Narrow = "fewer" if options.precision else True
    types: dict[str, DType] = {}
    for match in parts:
        types |= match_types(match, tensors, options.precision, narrow)  # type: ignore[arg-type]
    saved = {full: tensors[full].stored[1] - tensors[full].numel * d.bits // 8 for full, d in types.items()}
    changed = {full: d for full, d in types.items() if d is not tensors[full].dtype}
    rounded = [full for full, d in changed.items() if d.floating]
    positions = [full for full, d in changed.items() if not d.floating]
    of_parts = set(types)
    rest = {
        "extra": [n for n in identity.optional if n in left],
        "scales": [n for n in identity.scales if n in left and n not in of_parts],
        "kept": [n for n in tensors if n in kept and n not in of_parts],
    }
    rest["unknown"] = [n for n in tensors if n in left - of_parts.union(*rest.values())]
    single = kept - of_parts.union(*(astray[c] for c in whole))
    output = {
        "precision": precision,
        "narrow": narrow,
        "unknown": "keep",
        **({"keep": [*rest["extra"], *sorted(single), *(c.cls for c in whole)]} if single or whole else {}),
        **options.keys,
        **({"partial": True} if not identity.intact else {}),
    }
    goes = _shares(gone, tensors)
    if rounded:
        goes.append(replace(_share("precision", rounded, tensors), bytes=sum(saved[n] for n in rounded)))
    if positions:
        goes.append(replace(_share("positions", positions, tensors), bytes=sum(saved[n] for n in positions)))
    return Pruning(
        path,
        report,
        tuple(sorted(goes, key=lambda s: -s.bytes)),
        tuple(_part(m, tensors, saved) for m in parts),
        tuple(_shares(rest, tensors)),
        sum(tensors[n].stored[1] for n in left) - sum(saved.values()),
        tuple(wanted),
        tuple(_repairs(parts, report, options, catalog)),
        options.fixes,
        output,
        tuple(sorted({changed[n].code for n in rounded})),
        None if options.force and tensors else _refusal(path, report),
        tuple(p for p, names in asked.items() if not names),
    )


def _asked(word: str, tensors: Tensors, identity: Identity) -> list[str]:
    """The tensors that a word under `keep` means: one, those of a pattern, or those of a component."""
    part = next((m for m in identity.matches if word in words_for(m)), None)
    if part is not None:
        return list(part.full)
    return [n for n in tensors if n == word or fnmatchcase(n, word)]


def unmatched(pruning: Pruning) -> UsageError:
    """That the first pattern of `keep` which matches nothing does so."""
    word = pruning.unmatched[0]
    fact = f"there is no tensor or component `{word}` to keep"
    parts = [w for m in pruning.identity.matches for w in words_for(m)]
    hint = did_you_mean(word, (*parts, *pruning.report.tensors))
    return UsageError(Problem(fact, Place(str(pruning.path)), hint=hint))


def _repairs(
    parts: Iterable[Match], report: Report, options: Options, catalog: Catalog
) -> Iterator[tuple[str, str]]:
    """What the fixes that are asked for would change, by component; reads a few hundred bytes."""
    fixes = with_profile(options.fixes, options.profile)
    for match in parts if fixes else ():
        made = cut(report.tensors, report.identity, match, match.component.cls)
        changes = [c for c in made.changes if c.partition(":")[0] in fixes]
        held: Tensors = made.tensors
        for name in (n for n in fixes if catalog.applies(n, match.component.cls)):
            held, words = FIXES[name].apply(held)
            changes += [f"{name}: {word}" for word in words]
        yield from ((match.component.name, change) for change in changes)


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
        recipe_of(pruning.checked), target, workspace, sources, naming=naming, save=save, threads=threads
    )
    _configuration_too(pruning.path, made.outputs[0].path, workspace.reporter)
    return made


def copy(path: Path, folder: Path, reporter: Reporter) -> Path | None:
    """Copy a file that needs no pruning, and its `.yaml`, into a folder, and compare the copy with it.

    One that is there and the same serves; a name that is taken gets a number. Gives the copy, or None
    where the file lies in the folder itself. Raises OutputError.
    """
    if path.resolve().parent == folder.resolve():
        return None
    target = same_file(path, folder, path.suffix)
    if target is None:
        target = free_name(folder / path.name)
        copy_file(path, target)
    _configuration_too(path, target, reporter)
    return target


def _configuration_too(path: Path, target: Path, reporter: Reporter) -> None:
    """Copy the `.yaml` of a file beside what was made of it, unless there is one."""
    config, beside = named(path).with_suffix(".yaml"), target.with_suffix(".yaml")
    if not os.path.lexists(config):
        return
    try:
        held = read_bounded(config, MAX_SIDECAR, follow=False)  # a link could lead to any file of the user's
        if not os.path.lexists(beside):
            write_bytes(beside, held)
            reporter.note(f"`{config.name}` goes with it, as `{beside.name}`")
        elif read_bounded(beside, MAX_SIDECAR) != held:
            reporter.note(left_behind(config, f"there is another `{beside.name}`"))
    except OSError as error:
        reporter.note(left_behind(config, error.strerror or str(error)))


def left_behind(config: Path, why: str) -> str:
    """That the `.yaml` of a file did not go with it."""
    return f"`{config.name}` does not go with it: {why}"


def recipe_of(pruning: Pruning) -> CommandRecipe:
    """The recipe of the pruned file, with the original's metadata and its name."""
    path, said = pruning.path, pruning.report.metadata
    origin: dict[str, Any] = {"file": named(path).name, "size": pruning.report.size}
    if ORIGIN in said:
        origin[ORIGIN] = _parsed(said[ORIGIN])
    kept = {k: v for k, v in said.items() if k.startswith(_TRUE)}
    kept[ORIGIN] = json.dumps(origin, sort_keys=True, ensure_ascii=True)
    name = recipe_name(path)
    components = {cls: Pick(cls, name) for cls in pruning.averages}
    output = {**pruning.output, "metadata": kept}
    return CommandRecipe(name, {name: path}, name, components=components, fixes=pruning.fixes, output=output)


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _refusal(path: Path, report: Report) -> Problem | None:
    """Why a file should not be pruned."""
    place, identity = Place(str(path)), report.identity
    if report.kind is None:
        fault = report.faults[0]
        what = f"broken: {fault.fact}" if identity.architecture else fault.fact
        hint = "`--force` drops EMA and junk all the same, and keeps the rest" if report.tensors else None
        return Problem(f"not pruned: {what}", place, fault.evidence, hint)
    lost = report.junk.bytes + report.astray.bytes
    if report.blocks:
        hint = "`ckpt convert` or `ckpt extract` writes it in a precision; `--force` prunes it all the same"
        return Problem(
            "not pruned: its weights are in blocks, and would take more room as 16 bits", place, hint=hint
        )
    if 2 * lost > sum(t.stored[1] for t in report.tensors.values()):
        what = "for junk, or have no slot" if report.astray.names else "for junk"
        evidence = (f"{lost:,} of {report.size:,} bytes are taken {what}",)
        hint = "`--dry-run` says which tensors; `--keep` keeps some, `--force` drops them all the same"
        return Problem("not pruned: most of it would go", place, evidence, hint)
    return None


def _share(reason: str, names: Iterable[str], tensors: Tensors) -> Share:
    by_size = sorted(names, key=lambda n: (-tensors[n].nbytes, n))
    return Share(reason, tuple(by_size), sum(tensors[n].stored[1] for n in by_size))


def _part(match: Match, tensors: Tensors, saved: Mapping[str, int]) -> Share:
    share = _share(match.component.name, match.full, tensors)
    return replace(share, bytes=share.bytes - sum(saved[n] for n in share.names))


def _shares(groups: Mapping[str, list[str]], tensors: Tensors) -> list[Share]:
    return [_share(reason, names, tensors) for reason, names in groups.items() if names]


@dataclass(frozen=True)
class Result:
    """What became of a file: `written`, `unchanged`, `tidy`, `copied`, `to do`, `refused` or `failed`.

    `copy` is where what is tidy was copied to.
    """

    path: Path
    state: str
    pruning: Pruning | None = None
    built: Built | None = None
    copy: Path | None = None
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
            model = path.suffix.lower() in PRUNED and not SHARD.fullmatch(path.name)
            if model and not hidden and _regular(path):
                yield path


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
