"""A folder whose checkpoints are pruned and put where they belong, now and as they arrive."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from builder.base.disk import being_written, replacing, sync_folder, try_lock, write_all
from builder.base.errors import (
    CkptError,
    OutputError,
    Place,
    Problem,
    SourceError,
    UsageError,
    did_you_mean,
    render,
)
from builder.base.files import read_bounded
from builder.base.inside import is_inside
from builder.base.parallel import Cancelled
from builder.formats import open_checkpoint
from builder.models.identify import identify
from builder.models.identity import Identity
from builder.recipe.names import PRUNED, SHARD, free_name, numbered, stem
from builder.recipe.profiles import MAX_SIDECAR
from builder.sources.opened import Sources
from builder.tensors.cast import BeyondError, UnfitError
from builder.toolkit.command_recipe import vacant
from builder.toolkit.prune import Options, Pruning, left_behind, plan_pruning, prune
from builder.toolkit.whole_files import (
    file_identity,
    move,
    on_disk,
    remove,
    same_content,
    same_file,
    same_inode,
    unchanged,
)
from builder.workspace import Workspace

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

FAILED = "Failed"
SETTLE = 3.0  # seconds without a change after which a file counts as whole, if it opens
PATIENCE = 20  # times as long, if it does not open: a slow copy may stall
RETRY = 60.0  # seconds after which something is tried again that the system prevented

_MODEL_FOLDER = re.compile(r"model_index\.json|.+\.index\.json")
_UNFINISHED = (".part", ".crdownload", ".tmp", ".aria2", ".partial", ".!qB")  # what downloads lie beside

State = Literal["pruned", "moved", "known", "stays", "failed", "kept"]


class Event(NamedTuple):
    """What became of a file: `pruned` or `moved` to `target`; `known`: the same was there already; `failed`:
    moved to `target` with the reason beside it; `stays`: it is nothing that could be put anywhere; `kept`: it
    stays and is tried again. `problems` say why, `what` what the file is.
    """

    path: Path
    state: State
    target: Path | None = None
    problems: tuple[Problem, ...] = ()
    what: str = ""


@dataclass
class _Seen:
    """A file as it was found last, and since when it is so (on the monotonic clock)."""

    identity: tuple[int, ...]
    since: float
    not_before: float = 0.0


def layout_of(models: Path, catalog: Catalog) -> str:
    """The program whose folder of whole models a folder of models has; else the first that there is."""
    programs = catalog.programs
    return next((p for p in programs if (models / programs[p]["checkpoint"]).is_dir()), next(iter(programs)))


def _is_model(name: str, beside: Iterable[str]) -> bool:
    """Whether a file is called as checkpoints are, and its download is not on the way."""
    called = Path(name).suffix.lower() in PRUNED and not SHARD.fullmatch(name)
    return called and not any(f"{name}{end}" in beside for end in _UNFINISHED)


class Watch:
    """A watched folder.

    `into` is the folder of all models, whose subfolders are those of the program `layout`. A file is touched
    once it has not changed for `settle` seconds, nobody has it open for writing, and it opens as a
    checkpoint; what does not open is given up after `PATIENCE` times as long. Hidden files and links are left
    alone, and so are folders unless `recursive`, and those that are models or that files are put in always.
    Raises UsageError for a program that the catalog does not know.
    """

    def __init__(
        self,
        folder: Path,
        into: Path,
        layout: str,
        options: Options,
        workspace: Workspace,
        *,
        recursive: bool = False,
        settle: float = SETTLE,
        threads: int | None = None,
    ) -> None:
        self.folder = folder
        self.into = into
        catalog = workspace.catalog
        if layout not in catalog.programs:
            hint = did_you_mean(layout, catalog.programs) or f"there are {', '.join(catalog.programs)}"
            raise UsageError(Problem(f"the folders of `{layout}` are not known", hint=hint))
        self.layout = catalog.programs[layout]
        self.options = options
        self.workspace = workspace
        self.recursive = recursive
        self.settle = settle
        self.threads = threads
        self.waiting: list[Path] = []  # files that the last look found unready
        self._seen: dict[Path, _Seen] = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the folder to oneself; raises UsageError when it is no folder or somebody watches it."""
        if self.folder.resolve() in self._places:
            fact = f"`{self.folder}` is where pruned files are put"
            raise UsageError(Problem(fact, hint="watch another folder, or give another one with `--into`"))
        if not self.folder.is_dir():
            raise UsageError(Problem(f"cannot watch `{self.folder}`", evidence=("it is no folder",)))
        self._check_failed()
        fd = None
        with suppress(OSError):  # not everywhere can a folder be opened, and so be held
            fd = os.open(self.folder, os.O_RDONLY)
        try:
            if fd is not None and try_lock(fd) is False:
                raise UsageError(Problem(f"`{self.folder}` is being watched already"))
            yield
        finally:
            if fd is not None:
                os.close(fd)

    def poll(self) -> Iterator[Event]:
        """Do what there is to do; `waiting` then lists what is not ready. Raises OutputError, Cancelled."""
        self.waiting = []
        found = dict(self._files())
        self._seen = {p: s for p, s in self._seen.items() if p in found}
        for path, status in found.items():
            age = self._unchanged_for(path, status)
            if age is None:
                continue  # it is not time to try again
            if age < self.settle or being_written(path):
                self.waiting.append(path)
                continue
            event = self._handle(path, status, age)
            if event is None:
                self.waiting.append(path)
                continue
            if event.state in ("kept", "stays"):  # the latter until the file is another
                wait = RETRY if event.state == "kept" else float("inf")
                self._seen[path].not_before = time.monotonic() + wait
            yield event

    @property
    def _places(self) -> set[Path]:
        """Where files are put."""
        return {self._place_for(kind).resolve() for kind in self.layout}

    def _place_for(self, kind: str) -> Path:
        """The folder for a kind of file; one that lies beside that of all models must be there already."""
        folder = self.layout.get(kind, self.layout["other"])
        inside = folder.removeprefix("../")
        beside = Path(os.path.abspath(self.into)).parent / inside  # noqa: PTH100 - links are not followed
        return beside if inside != folder and beside.is_dir() else self.into / inside

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files that look like checkpoints, by name; links are not followed."""
        folders = [self.folder]
        left_alone = {*self._places, (self.folder / FAILED).resolve(), self.into.resolve()}
        for folder in folders:
            try:
                names = sorted(p.name for p in folder.iterdir())
            except OSError as error:
                if folder is not self.folder:
                    continue
                fact = f"cannot read `{self.folder}`"
                raise OutputError(Problem(fact, evidence=(str(error.strerror),))) from None
            if folder is not self.folder and any(map(_MODEL_FOLDER.fullmatch, names)):
                continue
            for name in names:
                path = folder / name
                if name.startswith("."):
                    continue
                with suppress(OSError):
                    status = path.lstat()
                    if stat.S_ISDIR(status.st_mode) and self.recursive and path.resolve() not in left_alone:
                        folders.append(path)
                    if stat.S_ISREG(status.st_mode) and _is_model(name, names):
                        yield path, status

    def _unchanged_for(self, path: Path, status: os.stat_result) -> float | None:
        """Seconds since a file changed, as far as is known; None while it is not to be tried again."""
        now, identity = time.monotonic(), file_identity(status)
        seen = self._seen.get(path)
        if seen is None or seen.identity != identity:
            seen = self._seen[path] = _Seen(identity, now)
        if now < seen.not_before:
            return None
        by_clock = time.time() - max(status.st_mtime, status.st_ctime)
        return max(now - seen.since, by_clock)

    # -- one file

    def _handle(self, path: Path, status: os.stat_result, age: float) -> Event | None:
        """What becomes of a file; None when it turns out to be unready."""
        if not os.access(path, os.R_OK):
            return Event(path, "kept", problems=(Problem("it may not be read", Place(str(path))),))
        try:
            return self._sort(path, status, age)
        except OutputError as error:
            return Event(path, "kept", problems=error.problems) if unchanged(path, status) else None
        except OSError as error:
            return Event(path, "kept", problems=(_system(path, error),))

    def _sort(self, path: Path, status: os.stat_result, age: float) -> Event | None:
        """Put a file where it belongs; raises OutputError, OSError for what the system prevents."""
        try:
            with self.workspace.sources() as sources:
                try:
                    pruning = plan_pruning(path, sources, self.options)
                except SourceError:
                    if age < PATIENCE * self.settle:
                        return None
                    raise
                if pruning.refusal is not None and not pruning.broken:
                    return Event(path, "stays", problems=(pruning.refusal,))
                return self._place(pruning.checked, status, sources)
        except Cancelled:
            raise  # which says nothing of the file
        except CkptError as error:
            if not unchanged(path, status):
                return None  # gone, or still being written after all
            if isinstance(error, BeyondError):
                fact = "values beyond the precision: prune it with `--overflow clamp` or `--precision keep`"
                return Event(path, "stays", problems=(Problem(fact, Place(str(path))),))
            if isinstance(error, OutputError) and not isinstance(error, UnfitError):
                raise
            return self._fail(path, status, error.problems)

    def _place(self, pruning: Pruning, status: os.stat_result, sources: Sources) -> Event | None:
        path, catalog, store = pruning.path, self.workspace.catalog, self.workspace.store
        kind = pruning.report.kind
        folder = self._place_for(kind.kind if kind is not None else "other")
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{stem(path)}.safetensors"
        state: State = "moved"
        if pruning.tidy:
            sources.close()  # an open file cannot be renamed or removed everywhere
            if pruning.report.container != "safetensors":
                place = folder / path.name
            target = same_file(path, folder, place.suffix)
            if target is not None:
                state = "known"
                remove(path, status)
            else:
                target = move(path, place, status)
        else:
            made = prune(
                pruning,
                free_name(place),
                self.workspace,
                sources,
                naming=lambda built: vacant(place, built, store),
                threads=self.threads,
            )
            sources.close()
            built = made.outputs[0]
            target, state = built.path, "known" if built.state == "unchanged" else "pruned"
            verify_on_disk(target, built.sha256, pruning.identity, catalog)
            if not unchanged(path, status):
                return None
            config = target.with_suffix(".yaml")
            twins: Iterable[Path] = same_content(target, folder) if state == "pruned" else ()
            if os.path.lexists(config):
                twins = (t for t in twins if _same_text(config, t.with_suffix(".yaml")))
            if (twin := next(iter(twins), None)) is not None:
                target.unlink()  # what was pruned before from a file like this, under another name
                config.unlink(missing_ok=True)
                target, state = twin, "known"
            remove(path, status)
        sync_folder(path.parent)
        self._take_along(path, target)
        return Event(path, state, target, what=kind.text if kind is not None else "")

    def _take_along(self, path: Path, target: Path) -> None:
        """Move the `.yaml` of a file that is gone to where that is now, unless there is another one."""
        config, beside = path.with_suffix(".yaml"), target.with_suffix(".yaml")
        try:
            status = config.lstat()
        except OSError:
            return  # there is none
        try:
            held = read_bounded(config, MAX_SIDECAR, follow=False)
            if not os.path.lexists(beside):
                move(config, beside, status)
            elif held == read_bounded(beside, MAX_SIDECAR):
                remove(config, status)
            else:
                self.workspace.reporter.note(left_behind(config, f"there is another `{beside.name}`"))
        except OSError as error:
            self.workspace.reporter.note(left_behind(config, error.strerror or str(error)))
        except OutputError as error:
            self.workspace.reporter.note(left_behind(config, error.problems[0].fact))

    def _check_failed(self) -> None:
        """Raise UsageError where what is broken would go elsewhere."""
        folder = self.folder / FAILED
        if os.path.lexists(folder) and not is_inside(folder, self.folder):
            fact = f"`{folder}` is a link to elsewhere, and what is broken is to go there"
            raise UsageError(Problem(fact, hint="remove the link: a folder is made when it is needed"))

    def _fail(self, path: Path, status: os.stat_result, problems: tuple[Problem, ...]) -> Event:
        """Move a file out of the way, and write down why."""
        folder = self.folder / FAILED
        self._check_failed()
        folder.mkdir(exist_ok=True)
        free = (
            p
            for p in numbered(folder / path.name)
            if not os.path.lexists(p.with_suffix(".txt")) and (not os.path.lexists(p) or same_inode(p, path))
        )
        target = move(path, next(free), status)
        text = "\n\n".join(render(p) for p in problems) + "\n"
        with replacing(target.with_suffix(".txt")) as fd:
            write_all(fd, memoryview(text.encode("utf-8", "backslashreplace")), 0)
        sync_folder(path.parent)
        return Event(path, "failed", target, problems)


def verify_on_disk(path: Path, sha256: str, identity: Identity, catalog: Catalog) -> None:
    """Read a file back from the disk; raises OutputError unless it is what was written, and what it was."""
    found = on_disk(path)
    with open_checkpoint(path, catalog.layouts) as checkpoint:
        now = identify(checkpoint, catalog)
    if found != sha256 or now.architecture != identity.architecture:
        evidence = (f"written: SHA-256 {sha256}", f"read:    SHA-256 {found}")
        hint = "the original stays; look to the disk"
        raise OutputError(
            Problem("what is on the disk is not what was written", Place(str(path)), evidence, hint)
        )


def _same_text(config: Path, other: Path) -> bool:
    """Whether two small files are alike, and `config`, which may be removed then, is no link."""
    with suppress(OSError):
        return read_bounded(config, MAX_SIDECAR, follow=False) == read_bounded(other, MAX_SIDECAR)
    return False


def _system(path: Path, error: OSError) -> Problem:
    return Problem(f"cannot put `{path.name}` in its place", Place(str(path)), (str(error.strerror),))
