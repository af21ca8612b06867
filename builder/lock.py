"""The lock: what a recipe resolved to, every source, component and output by digest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from builder import __version__
from builder.errors import LockError, Problem
from builder.formats.atomic import write_text
from builder.numeric import PROFILE
from builder.toml import Document, parse

VERSION = 1
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
    xxh3: str
    sha256: str
    tensors: int


@dataclass(frozen=True)
class LockedOutput:
    """A written file; `metric` is empty where there is none."""

    file: str
    sha256: str
    tensor_digest: str
    size: int
    metric: str = ""


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

    def facts(self) -> Iterator[tuple[str, str]]:
        """Everything that the lock means, as (what, value) pairs in a fixed order."""
        yield "recipe", self.recipe
        yield "numeric profile", str(self.profile)
        for name, source in sorted(self.sources.items()):
            for key, value in asdict(source).items():
                yield f"source `{name}`: {key}", str(value or "")  # a size may not be known yet
        for c in sorted(self.components, key=lambda c: (c.output, c.cls)):
            for key in ("component", "source", "sha256", "xxh3", "tensors"):
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
    return recipe.with_name(f"{recipe.stem}.lock.toml")


def read_lock(path: Path) -> Lock | None:
    """The lock at `path`, or None when there is none; raises LockError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise LockError(Problem(f"cannot read the lock `{path}`", evidence=(str(error),))) from None
    document = parse(text, str(path), LockError)
    data = document.data
    if data.get("version") != VERSION:
        raise LockError(
            Problem(
                f"the lock is of version `{data.get('version')}`, this tool reads version {VERSION}",
                document.place("version", value=True),
                hint="`ckpt lock` writes it anew",
            )
        )
    try:
        return Lock(
            recipe=_text(data["recipe"]),
            sources={n: _made(LockedSource, s) for n, s in data.get("sources", {}).items()},
            components=tuple(_made(LockedComponent, c) for c in data.get("components", ())),
            outputs={n: _made(LockedOutput, o) for n, o in data.get("outputs", {}).items()},
            profile=int(data["profile"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(document, error) from None


def _made(kind: Any, table: Mapping[str, Any]) -> Any:
    said = {("cls" if k == "class" else k): v for k, v in table.items()}
    made = kind(**said)
    for name, wanted in kind.__annotations__.items():
        if not isinstance(getattr(made, name), int if wanted == "int" else str):
            raise TypeError(name)
    return made


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _malformed(document: Document, error: Exception) -> LockError:
    return LockError(
        Problem(
            "the lock is not as this tool writes it",
            document.place(),
            (str(error),),
            "`ckpt lock` writes it anew",
        )
    )


def write_lock(path: Path, lock: Lock) -> bool:
    """Write a lock unless the one that is there means the same; says whether it was written."""
    try:
        if read_lock(path) == lock:
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
