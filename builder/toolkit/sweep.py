"""Variants of a recipe, one for each combination of values: each a recipe of its own."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from builder.base.errors import Problem, UsageError, did_you_mean
from builder.base.toml import escaped
from builder.base.words import listed
from builder.models.catalog import Catalog
from builder.recipe import Recipe, parse_recipe
from builder.recipe.lock import Lock
from builder.recipe.names import portable

MOST = 1000  # variants
SUFFIX = re.compile(r"(/|\.safetensors\.index\.json|\.[A-Za-z0-9]+)?$")
_HEADING = "# A variant of `{recipe}`: {said}. Made by `ckpt sweep`.\n\n"


@dataclass(frozen=True)
class Axis:
    """A key of a recipe, as its names from the top, and the values that it is to have, each once."""

    keys: tuple[str, ...]
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(set(map(repr, self.values))) < len(self.values):
            said = ", ".join(map(_word, self.values))
            raise UsageError(Problem(f"`{'.'.join(self.keys)}` has a value twice", evidence=(said,)))

    @property
    def label(self) -> str:
        """What tells the key, without the table that all such keys are in."""
        return "-".join(self.keys[1:] if len(self.keys) > 1 else self.keys)


@dataclass(frozen=True)
class Variant:
    """A recipe in the making: where it goes, and its text."""

    path: Path
    text: str


def parse_axis(said: str) -> Axis:
    """The axis that `KEY=VALUES` means; raises UsageError.

    VALUES are `FIRST:LAST:STEP`, both ends included, or values with commas between them.
    """
    name, sign, values = said.partition("=")
    keys = parse_key(name) if sign else ()
    if not keys or not values:
        hint = "as in `steps.half.alpha=0.1:0.9:0.1`, or `output.precision=fp16,bf16`"
        raise UsageError(Problem(f"`{said}` is no key with its values", hint=hint))
    return Axis(keys, _range(values) if ":" in values else tuple(map(_value, values.split(","))))


def axis_of(key: str, values: Iterable[Any]) -> Axis:
    """The axis of a key as TOML spells it; raises UsageError for what is none, or has no values."""
    keys, found = parse_key(key), tuple(values)
    if not keys or not found:
        fact = f"`{key}` has no values" if keys else f"`{key}` is no key"
        raise UsageError(Problem(fact, hint='as in `{"steps.half.alpha": [0.25, 0.5]}`'))
    return Axis(keys, found)


def parse_key(name: str) -> tuple[str, ...]:
    """The names from the top that a key such as `steps."my step".alpha` has; none where it is no key."""
    keys: list[str] = []
    try:
        table: Any = tomli.loads(f"{name} = 0") if "\n" not in name else {}
    except tomli.TOMLDecodeError:
        return ()
    while isinstance(table, dict) and table:
        (key,) = table
        keys.append(key)
        table = table[key]
    return tuple(keys)


def _range(said: str) -> tuple[int | float, ...]:
    """The numbers of `FIRST:LAST:STEP`, each the nearest to its decimal digits."""
    try:
        first, last, step = map(Decimal, said.split(":"))
        count = (last - first) / step
        if not 0 <= count < MOST:
            raise ValueError
    except (ValueError, InvalidOperation, ArithmeticError):
        hint = f"`FIRST:LAST:STEP`, which are less than {MOST:,} numbers, as `0.1:0.9:0.1`"
        raise UsageError(Problem(f"`{said}` is no range", hint=hint)) from None
    whole = "." not in said and "e" not in said.lower()
    found = (first + step * n for n in range(int(count) + 1))
    return tuple(int(n) if whole else float(n) for n in found)


def _value(said: str) -> Any:
    """A number, a truth value, or a word."""
    try:
        found = tomli.loads(f"value = {said}")["value"] if "\n" not in said else said
    except tomli.TOMLDecodeError:
        return said
    return found if isinstance(found, (int, float, str)) else said


def variants(
    path: Path, recipe: Recipe, axes: Sequence[Axis], catalog: Catalog, lock: Lock | None = None
) -> list[Variant]:
    """The variants of a recipe, which go beside it; sources that have an address are pinned as the lock says.

    What the recipe expects of its products is left out: theirs are others. Raises UsageError for a key that
    the recipe has no place for, RecipeError for a value that it cannot have.
    """
    said = dict(recipe.document.data)
    for number, axis in enumerate(axes):
        _check(said, axis)
        _check_meant(said, axis)
        if axis.keys in (other.keys for other in axes[:number]):
            hint = "name all of its values at once"
            raise UsageError(Problem(f"`{'.'.join(axis.keys)}` is given twice", hint=hint))
    total = 1
    for axis in axes:
        total *= len(axis.values)
    if total > MOST:
        raise UsageError(Problem(f"these are {total:,} variants, and {MOST:,} are the most"))
    found: dict[Path, Variant] = {}
    for values in itertools.product(*(a.values for a in axes)):
        pairs = list(zip(axes, values, strict=True))
        mark = "-".join(portable(f"{a.label}-{_word(v)}").replace(" ", "_") for a, v in pairs)
        to = path.with_name(f"{path.stem}-{mark}.toml")
        if to in found:
            raise UsageError(Problem(f"two variants would be called `{to.name}`"))
        data = _variant(said, recipe, pairs, mark, lock)
        words = ", ".join(f"{'.'.join(a.keys)} = {_word(v)}" for a, v in pairs)
        text = escaped(_HEADING.format(recipe=path.name, said=words) + tomli_w.dumps(data))
        parse_recipe(text, to, catalog)
        found[to] = Variant(to, text)
    return list(found.values())


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(said: dict[str, Any], axis: Axis) -> None:
    """Raise UsageError where a recipe has no table that a key could be in."""
    table: Any = said
    for depth, key in enumerate(axis.keys[:-1]):
        if isinstance(table, dict) and depth == 0 and key == "output" and key not in table:
            return
        if not isinstance(table, dict) or key not in table:
            known = [k for k, v in table.items() if isinstance(v, dict)] if isinstance(table, dict) else []
            where = ".".join(axis.keys[: depth + 1])
            near = did_you_mean(key, known)
            hint: str | None = near or "vary what it has, or as in `output.precision=fp16,bf16`"
            evidence = (f"it has {listed(tuple(known))}" if known else "it has no tables there",)
            raise UsageError(Problem(f"the recipe has no `{where}`", evidence=evidence, hint=hint))
        table = table[key]
    if not isinstance(table, dict):
        name = ".".join(axis.keys[:-1])
        hint = "an output of several has no name on the command line" * isinstance(table, list) or None
        raise UsageError(Problem(f"`{name}` of the recipe is no table", hint=hint))


def _check_meant(said: dict[str, Any], axis: Axis) -> None:
    """Raise UsageError for the key of a step that is named without it."""
    key, *more = axis.keys
    if more or key in said:
        return
    steps = said.get("steps", {})
    if (name := next((n for n, step in steps.items() if key in step), None)) is not None:
        hint = f"as in `steps.{name}.{key}`"
        raise UsageError(Problem(f"`{key}` is a key of a step, not of the recipe", hint=hint))


def _variant(
    said: dict[str, Any], recipe: Recipe, pairs: Sequence[tuple[Axis, Any]], mark: str, lock: Lock | None
) -> dict[str, Any]:
    data = copy.deepcopy(said)
    data.pop("expect", None)
    data["name"] = f"{recipe.name}-{mark}"
    for axis, value in pairs:
        table = data
        for key in axis.keys[:-1]:
            table = table.setdefault(key, {})
        table[axis.keys[-1]] = value
    for output in _outputs(data):
        output.pop("expect", None)
        if "file" in output:
            output["file"] = SUFFIX.sub(lambda end: f"-{mark}{end[0]}", output["file"], count=1)
    for name, source in recipe.sources.items():
        locked = lock.sources.get(name) if lock is not None else None
        if locked is not None and source.urls and source.sha256 is None:
            data["sources"][name]["sha256"] = locked.sha256
    return data


def _outputs(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    written = data.get("output", {})
    yield from [written] if isinstance(written, dict) else written
