"""Statements of provenance: written beside outputs, and files held to them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from builder.base.disk import write_bytes
from builder.base.dsse import Envelope, PrivateKey, PublicKey, seal
from builder.base.errors import CkptError, LockError, OutputError, Problem, SourceError, clipped
from builder.base.files import read_bounded
from builder.base.inside import leads_out
from builder.base.words import command_line, counted, listed
from builder.build.expect import Built
from builder.build.verify import ONLY_HEADER, examine
from builder.formats.hashes import sha256_file
from builder.formats.open import files_of
from builder.formats.write_sharded import SUFFIX
from builder.plan.metadata import moment_of
from builder.recipe import Recipe
from builder.recipe.lock import MAX_SIZE as MAX_LOCK
from builder.recipe.lock import Lock, differences, read_lock
from builder.recipe.names import SINGLE, SUFFIXES, form_of, named
from builder.recipe.profiles import CONFIG
from builder.recipe.provenance import (
    MAX_SIZE,
    PAYLOAD,
    Statement,
    parse_object,
    read_statement,
    statement_path,
)
from builder.recipe.recipe import meaning_digest
from builder.workspace import Workspace, find_lock


def _now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Statements:
    """How a build writes statements: signed with a `key`, or by nobody.

    `moment` is the time that it is, if not that of the clock.
    """

    key: PrivateKey | None = None
    moment: datetime | None = None
    began: datetime = field(default_factory=_now)

    @classmethod
    def of(cls, workspace: Workspace, key: PrivateKey | None) -> Statements:
        """Those of a build that begins now; raises UsageError where SOURCE_DATE_EPOCH is no time."""
        return cls(key, moment_of(workspace.settings.environment))

    def check(self, outputs: Iterable[Path]) -> None:
        """Raise OutputError where the statement of an output would take the place of something else."""
        for path in filter(os.path.lexists, map(statement_path, outputs)):
            try:
                _open(path, follow=False)
            except FileNotFoundError:
                continue
            except SourceError as error:
                fact, why = f"`{path}` is there, and is no statement", error.problems[0].evidence
                raise OutputError(Problem(fact, None, why, "remove it, or give it another name")) from None

    def write(self, recipe: Recipe, lock: Lock, made: Iterable[Built], workspace: Workspace) -> list[Built]:
        """What was made, each output with its statement written beside it; `lock` is what a lock says of it.

        A statement that is there and says the same stays as it is, with its times. Raises OutputError.
        """
        locked = _lock_file(recipe, lock)
        found = []
        for built in made:
            statement = _statement(recipe, lock, locked, built, workspace)
            path = statement_path(built.path)
            if not self._says(path, statement):
                self._put(path, replace(statement, times=self._times(built)))
            found.append(built._replace(statement=path))
        return found

    def _says(self, path: Path, statement: Statement) -> bool:
        """Whether just this is there already, but for its times, and signed if it is to be."""
        try:
            there = _open(path, self.key.public if self.key is not None else None, follow=False)
        except (FileNotFoundError, SourceError):
            return False
        return replace(statement, times=there.statement.times).to_text().encode() == there.text

    def _put(self, path: Path, statement: Statement) -> None:
        data = statement.to_text().encode()
        write_bytes(path, seal(PAYLOAD, data, self.key) if self.key is not None else data)

    def _times(self, built: Built) -> tuple[str, str] | None:
        """When an output was made, if it was now."""
        if built.state != "written":
            return None
        began, ended = self.moment or self.began, self.moment or _now()
        return began.strftime("%Y-%m-%dT%H:%M:%SZ"), ended.strftime("%Y-%m-%dT%H:%M:%SZ")


def _statement(
    recipe: Recipe, lock: Lock, locked: tuple[str, str] | None, built: Built, workspace: Workspace
) -> Statement:
    output = recipe.output(built.name)
    assert output is not None
    near, _ = recipe.reached(output)
    said = lock.without({o.name for o in recipe.outputs} - {built.name})
    sources = {n: s for n, s in said.sources.items() if n.partition("/")[0] in near}
    form = form_of(f"{built.path}/" if built.path.is_dir() else str(built.path))
    subjects = {built.path.name: built.sha256}
    if form not in SINGLE:
        found = {file: workspace.store.sha256(file, workspace.reporter) for file in files_of(built.path)}
        digests = found | {built.path / name: sha256 for name, sha256 in built.files.items()}
        subjects = {file.relative_to(built.path.parent).as_posix(): d for file, d in digests.items()}
    subjects |= dict(built.beside)
    return Statement(
        subjects, recipe.meaning_of(output), built.name, form, replace(said, sources=sources), locked
    )


def _lock_file(recipe: Recipe, lock: Lock) -> tuple[str, str] | None:
    """The name and the SHA-256 of the lock that lies beside a recipe, where it says what `lock` does."""
    try:
        there = read_lock(recipe.lock) if recipe.lock is not None else None
        if recipe.lock is None or there is None or dict(there.facts()) != dict(lock.facts()):
            return None
        return recipe.lock.name, hashlib.sha256(read_bounded(recipe.lock, MAX_LOCK)).hexdigest()
    except (LockError, OSError):
        return None


class _Opened(NamedTuple):
    """A statement, the bytes that say it, and whether these came in an envelope with signatures."""

    statement: Statement
    text: bytes
    signed: bool


class Verified(NamedTuple):
    """The SHA-256 of each verified file, by path; whether the statement has signatures, looked at or not."""

    files: dict[Path, str]
    signed: bool


def verify_statement(
    path: Path,
    workspace: Workspace,
    *,
    key: PublicKey | None = None,
    recipe: Recipe | None = None,
    file: Path | None = None,
) -> Verified:
    """Hold an output's files to a statement of it, and that to a recipe and its lock; uses no network.

    With a `key` it must be signed by that, or nothing of it is looked at. The files are those beside it, if
    not `file`; each is read whole. Raises SourceError for a statement that is none or is not signed so, and
    for files that are not there; OutputError for what is not as it says, naming what differs.
    """
    try:
        statement, _, signed = _open(path, key)
    except FileNotFoundError:
        raise SourceError(Problem(f"there is no `{path}`")) from None
    problems = [*_other_recipe(statement, recipe)] if recipe is not None else []
    places = _places(statement, path, file, workspace)
    found = {}
    for name, place in places.items():
        if not os.path.lexists(place):
            hint = f"`{command_line('verify', '--statement', path)} FILE` names it" if file is None else None
            raise SourceError(Problem(f"there is no `{place}`, which the statement is of", hint=hint))
        found[name] = sha256_file(place, reporter=workspace.reporter).sha256
    if found != {name: statement.subjects[name] for name in places}:
        problems.append(_other_files(statement, found, _main(statement, places), workspace))
    elif statement.container == "diffusers":
        _note_more(_main(statement, places), places.values(), workspace)
    if problems:
        raise OutputError(*problems)
    return Verified({places[n]: sha256 for n, sha256 in found.items()}, signed)


def _open(path: Path, key: PublicKey | None = None, *, follow: bool = True) -> _Opened:
    """The statement of a file; with a key, nothing is looked at that is not signed by it.

    Raises SourceError, which quotes nothing of the file; FileNotFoundError.
    """
    try:
        text = read_bounded(path, MAX_SIZE, follow=follow)
        data = parse_object(text)
        envelope = Envelope.parse(data) if "payloadType" in data else None
        if envelope is not None and envelope.type != PAYLOAD:
            raise ValueError(f"its `payloadType` is not `{PAYLOAD}`")
        if key is not None:
            _check_signed(path, envelope, key)
        if envelope is not None:
            text, data = envelope.payload, parse_object(envelope.payload)
        return _Opened(read_statement(data), text, envelope is not None)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        why = (error.strerror or "it cannot be read") if isinstance(error, OSError) else str(error)
        raise SourceError(Problem(f"`{path}` is no statement of provenance", None, (why,))) from None


def _check_signed(path: Path, envelope: Envelope | None, key: PublicKey) -> None:
    if envelope is None:
        hint = "`ckpt build RECIPE --sign KEY` signs it; without `--key` it is taken at its word"
        raise SourceError(Problem(f"`{path}` is not signed", hint=hint))
    if not envelope.signed_by(key):
        has = counted(len(envelope.signatures), "signature")
        why = f"it has {has}, and none of that key is right: the SHA-256 of the key is {key.id}"
        raise SourceError(Problem(f"`{path}` is not signed with the key that was given", None, (why,)))


def _places(statement: Statement, path: Path, file: Path | None, workspace: Workspace) -> dict[str, Path]:
    """Where each file of an output lies; raises SourceError where a link leads out of their folder.

    A configuration that is not beside the `file` is told of, and left out.
    """
    places = {}
    own = statement.file if file is not None else None
    if file is not None and own is not None:
        places[own] = file  # which may have any name, and be a link
    file = named(file) if file is not None else None
    folder = path.parent if file is None else file.parent
    for name in (n for n in statement.subjects if n not in places):
        _, slash, rest = name.partition("/")
        there = f"{file.name}/{rest}" if file is not None and slash else name
        if file is not None and own is not None:
            there = file.with_suffix(CONFIG).name
            if not os.path.lexists(folder / there):
                workspace.reporter.note(f"`{name}`, which the statement is of too, is not beside `{file}`")
                continue
        if (why := leads_out(folder, there, workspace.settings.models)) is not None:
            command = command_line("verify", "--statement", path)
            hint = f"name the file: `{command} FILE`" if file is None else None
            fact = f"`{folder / there}` lies outside the folder of the statement"
            raise SourceError(Problem(fact, None, (why,), hint))
        places[name] = folder / there
    return places


def _main(statement: Statement, places: dict[str, Path]) -> Path:
    """The path that an output is known by."""
    name = statement.file or next((n for n in places if n.endswith(SUFFIX)), min(places))
    levels = name.count("/") if statement.container == "diffusers" else 0
    return places[name].parents[levels - 1] if levels else places[name]


def _other_files(statement: Statement, found: dict[str, str], main: Path, workspace: Workspace) -> Problem:
    """What of an output is not as it is said to be, and which components."""
    wrong = {n: (statement.subjects[n], f) for n, f in found.items() if f != statement.subjects[n]}
    if len(found) == 1:
        evidence = [line for w, f in wrong.values() for line in (f"expected {w}", f"found    {f}")]
    else:
        evidence = [
            f"{n}: expected SHA-256 {w[:12]}…, found {f[:12]}…" for n, (w, f) in sorted(wrong.items())
        ]
    if not any(name.endswith(SUFFIXES) for name in wrong):
        return Problem(f"`{main}` is not what the statement is of", evidence=tuple(evidence))
    try:
        said = (statement.output, main, "", statement.lock, workspace.catalog, workspace.reporter)
        made, differ = examine(*said)
    except CkptError as error:
        evidence += [p.fact for p in error.problems]
    else:
        same = made.tensor_digest == statement.lock.outputs[statement.output].tensor_digest
        evidence += [*differ, *[ONLY_HEADER] * same]
    return Problem(f"`{main}` is not what the statement is of", evidence=tuple(evidence))


def _note_more(folder: Path, known: Iterable[Path], workspace: Workspace) -> None:
    """Say which files of a folder the statement says nothing of."""
    paths = set(known)
    more = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() and p not in paths
    )
    if more:
        workspace.reporter.note(f"the statement says nothing of {listed(tuple(more))}, in `{folder}`")


def _other_recipe(statement: Statement, recipe: Recipe) -> Iterator[Problem]:
    """How a statement differs from a recipe as it is now, and from its lock."""
    output = recipe.output(statement.output) or recipe.output()
    if output is None:
        there = listed(tuple(o.name for o in recipe.outputs))
        fact = f"the recipe has no output `{clipped(statement.output, 100)}`, which the statement is of"
        yield Problem(fact, recipe.place(), (f"there are {there}",))
        return
    meaning = recipe.meaning_of(output)
    if meaning_digest(meaning) != meaning_digest(statement.recipe):
        plain = json.loads(json.dumps(meaning))
        differ = tuple(_differ(statement.recipe, plain, ""))
        yield Problem("the statement is of another recipe", recipe.place(), differ)
    lock = find_lock(recipe)
    if lock is not None and (changes := differences(_bare(statement.lock), _bare(lock), partial=True)):
        yield Problem("the lock is of another build than the statement", None, tuple(changes))


def _bare(lock: Lock) -> Lock:
    """A lock less what makes no difference to what was built."""
    sources = {n: replace(s, resolved="", requested="") for n, s in lock.sources.items()}
    outputs = {n: replace(o, file="") for n, o in lock.outputs.items()}
    return replace(lock, recipe="", sources=sources, outputs=outputs)


def _differ(said: Any, now: Any, at: str) -> Iterator[str]:
    """Where two values of JSON differ, a line each."""
    if isinstance(said, dict) and isinstance(now, dict):
        for key in sorted({*said, *now}):
            yield from _differ(said.get(key), now.get(key), f"{at}.{clipped(key, 100)}" if at else key)
    elif json.dumps(said) != json.dumps(now):
        yield f"{at}: {_brief(said)} in the statement, {_brief(now)} in the recipe"


def _brief(value: Any) -> str:
    return "nothing" if value is None else f"`{clipped(json.dumps(value, ensure_ascii=False), 100)}`"
