"""An existing file against what its recipe's lock and expectations say of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import LockError, OutputError, Place, Problem, SourceError, UsageError
from builder.base.progress import Reporter
from builder.base.words import command_line
from builder.build.expect import Built, missed
from builder.formats import open_checkpoint
from builder.formats.hashes import data_sha256, sha256_file
from builder.formats.open import files_of
from builder.formats.write_sharded import SUFFIX
from builder.models.identify import identify
from builder.models.metric import Metric, counted, label
from builder.recipe import Output, Recipe
from builder.recipe.lock import Lock, LockedOutput
from builder.sources.find import set_digest
from builder.tensors.digests import Row, component_digest
from builder.tensors.scan import scan
from builder.workspace import Workspace

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

ONLY_HEADER = "every tensor is as it should be: only the header differs"


def verify(recipe: Recipe, lock: Lock | None, file: Path | None, workspace: Workspace) -> dict[Path, str]:
    """The SHA-256 of every verified file, by path; reads each of them whole, whatever is remembered.

    Raises OutputError when one is not what the lock or the recipe says, naming the components that
    differ; LockError when neither says anything.
    """
    verified, problems = {}, []
    for output in _chosen(recipe, file):
        locked = lock.outputs.get(output.name) if lock is not None else None
        if locked is None and output.expect == type(output.expect)():
            raise LockError(
                Problem(
                    f"nothing says what `{output.file}` should be",
                    Place(str(recipe.path)),
                    ("the lock has no such output, and there is no [expect]",),
                    "`ckpt build` makes the lock",
                )
            )
        path = file or recipe.target(output)
        if not os.path.lexists(path):
            command = command_line("build", recipe.address or recipe.path)
            hint = f"`{command}` makes it" if file is None and recipe.path else None
            raise SourceError(Problem(f"there is no `{path}`", hint=hint))
        several = path.is_dir() or path.name.endswith(SUFFIX)
        digests = {
            str(f): sha256_file(f, reporter=workspace.reporter).sha256
            for f in (files_of(path) if several else [path])
        }
        sha256 = set_digest(digests)
        if locked is not None and sha256 == locked.sha256 and not output.expect.metric:
            made = Built(output.name, path, sha256, locked.size, locked.tensor_digest, "", "unchanged")
        else:
            made, differ = examine(output.name, path, sha256, lock, workspace.catalog, workspace.reporter)
            if locked is not None and sha256 != locked.sha256:
                problems.append(_other(path, locked, made, differ))
        if output.expect.autov3 is not None and not several:
            made = made._replace(autov3=data_sha256(path, reporter=workspace.reporter) or "")
        problems += missed(recipe, output, made)
        verified[path] = sha256
    if problems:
        raise OutputError(*problems)
    return verified


def _chosen(recipe: Recipe, file: Path | None) -> list[Output]:
    if file is None or len(recipe.outputs) == 1:
        return list(recipe.outputs)
    named = [o for o in recipe.outputs if Path(o.file).name == file.name]
    if not named:
        files = ", ".join(f"`{o.file}`" for o in recipe.outputs)
        raise UsageError(
            Problem(f"`{file}` is none of the recipe's outputs", evidence=(f"they are {files}",))
        )
    return named


def examine(
    output: str, path: Path, sha256: str, lock: Lock | None, catalog: Catalog, reporter: Reporter
) -> tuple[Built, list[str]]:
    """What a file is, and its components that are not those of the lock, in words; raises SourceError."""
    with open_checkpoint(path, catalog.layouts) as checkpoint:
        identity = identify(checkpoint, catalog)
        groups = counted({m.component.cls: m.whole for m in identity.matches}, catalog)
        found = scan(
            checkpoint,
            groups=groups,
            digests=True,
            reporter=reporter,
            task=f"reading {path.name}",
        )
        rows = {n: Row(t.dtype, t.shape, str(found.tensors[n].digest)) for n, t in checkpoint.items()}
        metric = label(found.histograms, catalog.scales)
        differ = []
        for match in identity.matches:
            locked = lock.component(output, match.component.cls) if lock is not None else None
            bare = component_digest({b: rows[full] for b, full in match.whole.items()})
            if locked is not None and bare != locked.blake3:
                differ.append(f"{locked.cls}: expected {locked.blake3[:12]}…, found {bare[:12]}…")
        there = {match.component.cls for match in identity.matches}
        gone = [c for c in (lock.components if lock else ()) if c.output == output and c.cls not in there]
        differ += [f"{c.cls}: expected {c.blake3[:12]}…, found none" for c in gone]
        digest = component_digest(rows)
        text = metric.text if metric != Metric() else ""
        return Built(output, path, sha256, checkpoint.size, digest, text, "unchanged"), differ


def _other(path: Path, locked: LockedOutput, made: Built, differ: list[str]) -> Problem:
    evidence = [f"expected {locked.sha256}", f"found    {made.sha256}", *differ]
    if made.tensor_digest == locked.tensor_digest:
        evidence.append(ONLY_HEADER)
    return Problem(f"`{path}` is not the file that the lock names", evidence=tuple(evidence))
