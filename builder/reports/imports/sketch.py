"""A recipe in the making: sources and steps by name, as what a stranger says of a merge brings them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from builder.base.errors import Problem, SourceError, clipped
from builder.base.words import listed
from builder.recipe.names import SUFFIXES, portable, recipe_name

MOST = 256  # sources and steps: a recipe that a person can read, and no program has ever written one of more
_LONGEST = 120  # characters of a name
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_INPUTS, _MANY = ("a", "b", "c", "base"), ("of", "loras")  # keys of steps that name what they are made of
_LARGEST = 1e6  # of a weight, by far
_TITLE = re.compile(r"\s*\[[0-9a-fA-F]{6,64}\]\s*$")  # the short hash that WebUIs put behind a name


@dataclass
class Sketch:
    """A recipe as it grows.

    `slots` are the classes of the model that is told of, where that is known. `sources` and `steps` hold
    what the recipe says of them, by name; `told` what is to be said at one of them, and `missing` what the
    recipe lacks for want of words, or of knowledge. `output`, `components` and `base` are the recipe's own.
    `rounds` says that the program's arithmetic is known to the last bit. `autov3` is the digest of the file
    that is told of, and why it cannot be expected, if so.
    """

    dialect: str
    slots: tuple[str, ...] = ()
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)
    components: dict[str, str] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    base: str = ""
    rounds: bool = False
    autov3: tuple[str, str] | None = None
    _known: dict[str, str] = field(default_factory=dict)

    def source(self, said: object = None, sha256: object = None, role: str = "model", named: str = "") -> str:
        """The name of a source that is called so, or has that digest; the same one where both are the same.

        `named` is what it should be called, `role` where nothing is said of it.
        """
        digest = sha256.lower() if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None
        file = file_name(said)
        key = digest or file
        if key in self._known:
            return self._known[key]
        name = self._free(named or file or (f"model-{digest[:8]}" if digest else role))
        held: dict[str, Any] = {"file": file} if file else {}
        if digest is not None:
            held["sha256"] = digest
        if not held:
            held = {"file": f"{name}.safetensors"}
            self.tell(name, "nothing says which file this is")
            self.miss(f"which file `{name}` is")
        elif digest is None:
            self.tell(name, 'sha256 = "…"   not said: the lock of the first build has it')
        if digest is None and isinstance(sha256, str) and sha256:
            self.tell(name, f"called `{clipped(sha256, 80)}`, which is no SHA-256")
        self.sources[name] = held
        if key:
            self._known[key] = name
        return name

    def step(self, name: object, op: str, **said: Any) -> str:
        """The name of a new step, after `name`; what is None of what is said is left out."""
        made = self._free(file_name(name) or "merge")
        self.steps[made] = {"op": op, **{k: v for k, v in said.items() if v is not None}}
        return made

    def fill(self, base: str, word: str, name: str) -> str:
        """`base`, but the classes of a first word are those of `name`."""
        if self.slots:
            self.components |= {c: name for c in self.slots if c.partition("-")[0] == word}
            return base
        return self.step(f"{base}-{word.lower()}", "weighted-sum", a=base, b=name, alpha={word: 1})

    def instead(self, what: str, name: str) -> str:
        """`name`, in the place of what no step can say."""
        self.miss(f"{what}: no step says that, and `{name}` stands in its place")
        return name

    @property
    def exact(self) -> bool:
        """Whether all that is computed is computed as the other program did, to the last bit."""
        return self.rounds and all(s.get("arithmetic") == "file" for s in self.steps.values())

    def reached(self) -> set[str]:
        """The sources and steps that the model is made of, near and far."""
        near, found = [self.base, *self.components.values()], set()
        while near:
            name = near.pop()
            if name not in found:
                found.add(name)
                step = self.steps.get(name, {})
                near += [v for k, v in step.items() if k in _INPUTS]
                near += [n for k in _MANY for n in step.get(k, ())]
        return found

    def lacking(self) -> list[str]:
        """What the recipe lacks, in words."""
        used = self.reached()
        bare = tuple(n for n, s in self.sources.items() if n in used and "sha256" not in s)
        said = [f"the digest of {listed(bare)}, known by name alone"] if bare else []
        return [*self.missing, *said]

    def tell(self, name: str, text: str) -> None:
        """Have something said beside a source or step."""
        self.told.setdefault(name, []).append(text)

    def miss(self, text: str) -> None:
        """Have something said that is not in the recipe."""
        if len(self.missing) < MOST:
            self.missing[clipped(text, 200)] = None

    def weight(self, said: object, what: str, otherwise: float) -> float:
        """A weight as it is said, or what stands for one that is none."""
        found = number(said)
        if found is None:
            self.miss(f"{what}, which is {_shown(said)}: {plain(otherwise)} stands in its place")
        return otherwise if found is None else found

    def _free(self, said: str) -> str:
        if len(self.sources) + len(self.steps) >= MOST:
            raise SourceError(Problem(f"it tells of more than {MOST} models and merges"))
        name = recipe_name(Path(said)).lower()
        name = re.sub(r"[^a-z0-9_-]+", "-", name).strip("-_")[:60].strip("-_") or "model"
        return recipe_name(Path(name), {*self.sources, *self.steps})


def file_name(said: object) -> str:
    """The name of a file as any system can have it, of a path or title; empty where there is none."""
    if not isinstance(said, str):
        return ""
    last = _TITLE.sub("", said[-1000:]).replace("\\", "/").rstrip("/ ").rpartition("/")[2]
    name = portable(last.strip())[-_LONGEST:]
    return name if name.strip(". -") else ""


def with_suffix(name: str) -> str:
    """A model's file, where a name may have been given without its suffix."""
    return name if not name or name.lower().endswith((*SUFFIXES, ".sft")) else f"{name}.safetensors"


def number(said: object) -> float | None:
    """A finite number of reasonable size, which may be written as a string; None for all else."""
    if isinstance(said, str) and len(said) <= 40:
        try:
            said = float(said)
        except ValueError:
            return None
    if isinstance(said, bool) or not isinstance(said, int | float):
        return None
    return float(said) if abs(said) <= _LARGEST and isfinite(said) else None


def numbers(said: object) -> list[float] | None:
    """A list of numbers, or their string with commas; None for all else."""
    if isinstance(said, str):
        said = said[:4000].split(",")
    if not isinstance(said, list) or not 1 < len(said) <= MOST:
        return None
    found = [number(item) for item in said]
    return [n for n in found if n is not None] if None not in found else None


def plain(weight: float) -> str:
    """A weight in the fewest characters."""
    return str(int(weight)) if weight == int(weight) else repr(weight)


def joined(weights: list[float]) -> str:
    """Weights of blocks as a recipe writes them in one string."""
    return ", ".join(map(plain, weights))


def text_of(said: Mapping[str, Any], key: str) -> str:
    """A string that is there, or the empty one."""
    value = said.get(key)
    return value if isinstance(value, str) else ""


def _shown(said: object) -> str:
    return "not said" if said is None else f"`{clipped(str(said)[:200], 40)}`"
