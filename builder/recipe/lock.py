"""The lock: what a recipe resolved to, every source, component and output by digest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from builder import __version__
from builder.base.addresses import check_address
from builder.base.disk import write_text
from builder.base.errors import LockError, Problem, clipped
from builder.base.files import read_text
from builder.base.recipe_address import LOCK as LOCK
from builder.base.toml import parse
from builder.recipe.values import URL
from builder.tensors.digests import PROFILE

VERSION = 1
MAX_SIZE = 4 << 20  # bytes; a source or a component takes some hundreds
ANEW = "`ckpt lock` writes it anew"
_HEADING = "# What the recipe resolved to. Made by `ckpt`; to be kept beside the recipe, not edited.\n\n"


@dataclass(frozen=True)
class LockedSource:
    """A source: as the recipe asks for it, where it was had from, and what it is."""

    requested: str
    sha256: str
    size: int
    resolved: str = ""


@dataclass(frozen=True)
class LockedComponent:
    """A finished component of an output: `source` is the recipe's name of what it was taken from."""

    output: str
    cls: str
    component: str
    source: str
    blake3: str
    tensors: int


@dataclass(frozen=True)
class LockedOutput:
    """A written file; `metric` is empty where there is none.

    `date` is the day that SOURCE_DATE_EPOCH gave it, empty where it had no part in the bytes.
    """

    file: str
    sha256: str
    tensor_digest: str
    size: int
    metric: str = ""
    date: str = ""


@dataclass(frozen=True)
class Lock:
    """The resolution of a recipe. `recipe` is the digest of its meaning, `profile` the numeric profile."""

    recipe: str
    sources: Mapping[str, LockedSource] = field(default_factory=dict)
    components: tuple[LockedComponent, ...] = ()
    outputs: Mapping[str, LockedOutput] = field(default_factory=dict)
    profile: int = PROFILE

    def pins(self) -> dict[str, str]:
        """SHA-256 of every source, by name."""
        return {n: s.sha256 for n, s in self.sources.items()}

    def component(self, output: str, cls: str) -> LockedComponent | None:
        """What fills a class of an output."""
        return next((c for c in self.components if (c.output, c.cls) == (output, cls)), None)

    def without(self, outputs: Collection[str]) -> Lock:
        """What this says of all but some outputs, and of all sources."""
        return replace(
            self,
            components=tuple(c for c in self.components if c.output not in outputs),
            outputs={n: o for n, o in self.outputs.items() if n not in outputs},
        )

    def had_as(self, other: Lock) -> Lock:
        """This, with sources of the same digest had from where another lock says: that changes nothing."""
        known = {n: s for n, s in self.sources.items() if n in other.sources}
        same = {n: s for n, s in known.items() if s.sha256 == other.sources[n].sha256}
        had = {n: replace(s, resolved=other.sources[n].resolved) for n, s in same.items()}
        return replace(self, sources={**self.sources, **had})

    def facts(self) -> Iterator[tuple[str, str]]:
        """Everything that the lock means, as (what, value) pairs in a fixed order."""
        yield "recipe", self.recipe
        yield "numeric profile", str(self.profile)
        for name, source in sorted(self.sources.items()):
            for key, value in asdict(source).items():
                yield f"source `{name}`: {key}", str(value or "")  # a size may not be known yet
        said = Counter((c.output, c.cls) for c in self.components)
        for (of, cls), count in sorted(said.items()):
            if count > 1:
                yield f"{cls} of `{of}`: times it is said", str(count)
        for c in sorted(self.components, key=lambda c: (c.output, c.cls)):
            for key in ("component", "source", "blake3", "tensors"):
                yield f"{c.cls} of `{c.output}`: {key}", str(getattr(c, key))
        for name, output in sorted(self.outputs.items()):
            for key, value in asdict(output).items():
                yield f"output `{name}`: {key}", str(value)


def differences(old: Lock, new: Lock, *, partial: bool = False) -> list[str]:
    """What changed from one lock to another, a line each; `partial`: only of what both speak of."""
    before, after = dict(old.facts()), dict(new.facts())
    if partial:
        both = {what for what in before if before[what] and after.get(what)}
        before, after = ({what: facts[what] for what in facts if what in both} for facts in (before, after))
    return changed(before, after)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is not said alike before and after, a line each; the empty word says nothing."""
    lines = []
    for what in dict.fromkeys([*before, *after]):
        a, b = before.get(what, ""), after.get(what, "")
        if a != b:
            lines.append(f"{what}: {_short(a)} became {_short(b)}" if a and b else _one_sided(what, a, b))
    return lines


def _one_sided(what: str, before: str, after: str) -> str:
    return f"{what}: {_short(after)} is new" if after else f"{what}: {_short(before)} is gone"


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) in (32, 64) and " " not in value else f"`{value}`"


def lock_path(recipe: Path) -> Path:
    """Where a recipe's lock lies: NAME.lock.toml beside it."""
    return recipe.with_name(f"{recipe.stem}{LOCK}")


def read_lock(path: Path) -> Lock | None:
    """The lock at `path`, or None when there is none; raises LockError when it cannot be read.

    A link is refused: what it leads to may be any file of the user's, and a message would quote it.
    """
    try:
        document = parse(read_text(path, MAX_SIZE, LockError, follow=False), str(path), LockError)
    except FileNotFoundError:
        return None
    except LockError as error:
        regular = path.is_symlink() or path.is_file()  # a link is replaced, a folder or a pipe is not
        hint = ANEW if regular else "remove it, and `ckpt lock` writes a lock"
        raise LockError(*(replace(p, hint=p.hint or hint) for p in error.problems)) from None
    data = document.data
    if not data:
        raise LockError(Problem("the lock is empty", document.place(), hint=ANEW))
    if data.get("version") != VERSION:
        raise LockError(
            Problem(
                f"the lock is of version `{_brief(data.get('version'))}`, this tool reads version {VERSION}",
                document.place("version", value=True),
                hint=ANEW,
            )
        )
    try:
        return Lock(
            recipe=_value(data, "recipe", str),
            sources={n: _made(LockedSource, s) for n, s in _value(data, "sources", dict, {}).items()},
            components=tuple(_made(LockedComponent, c) for c in _value(data, "components", list, [])),
            outputs={n: _made(LockedOutput, o) for n, o in _value(data, "outputs", dict, {}).items()},
            profile=_value(data, "profile", int),
        )
    except ValueError as error:
        raise LockError(
            Problem("the lock is not as this tool writes it", document.place(), (str(error),), ANEW)
        ) from None


# What becomes part of paths and is looked for, and so must be nothing but a digest.
_DIGESTS = ("sha256", "blake3", "tensor_digest")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_WORDS = {str: "a string", int: "an integer", dict: "a table", list: "an array"}


def _value(table: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """What a table holds under a key; raises ValueError, in words."""
    found = table.get(key, default)
    if found is None:
        raise ValueError(f"`{key}` is missing")
    if type(found) is not kind:
        raise ValueError(f"`{key}` is not {_WORDS[kind]}")
    return found


def _brief(value: object) -> str:
    return clipped(str(value), 100)


def _made(kind: Any, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"`{_brief(table)}` is not a table")
    said = {("cls" if k == "class" else k): v for k, v in table.items()}
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(said.keys() - known.keys()):
        raise ValueError(f"unknown key `{unknown[0]}`")
    for name, field_ in known.items():
        default = None if field_.default is MISSING else field_.default
        said[name] = _value(said, name, int if field_.type == "int" else str, default)
        if name in _DIGESTS and _DIGEST.fullmatch(said[name]) is None:
            raise ValueError(f"`{name}` is no digest of 64 hex digits")
    if said.get("resolved"):
        _check_address(said["resolved"])
    return kind(**said)


def _check_address(text: str) -> None:
    """Raise ValueError for what no recipe may name: a lock's address is asked first."""
    for rule in URL.rules:
        if rule.broken_by(text):
            raise ValueError(rule.fact.format(key="`resolved`", count=len(text)))
    if (fault := check_address(text)) is not None:
        raise ValueError(fault.fact)


def write_lock(path: Path, lock: Lock) -> bool:
    """Write a lock unless the one that is there means the same; says whether it was written."""
    try:
        old = read_lock(path)
        if old is not None and dict(old.facts()) == dict(lock.facts()):
            return False
    except LockError:
        pass  # to be replaced: it says nothing
    components = [
        {("class" if k == "cls" else k): v for k, v in asdict(c).items()}
        for c in sorted(lock.components, key=lambda c: (c.output, c.cls))
    ]
    data = {
        "version": VERSION,
        "profile": lock.profile,
        "recipe": lock.recipe,
        "tool": {"ckpt-build": __version__},
        "sources": {n: _less_empty(asdict(s)) for n, s in sorted(lock.sources.items())},
        "components": components,
        "outputs": {n: _less_empty(asdict(o)) for n, o in sorted(lock.outputs.items())},
    }
    write_text(path, _HEADING + tomli_w.dumps(data))
    return True


def _less_empty(table: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if v != ""}
