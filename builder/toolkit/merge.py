"""Merges and LoRAs in one line: the step of a recipe that files and options on the command line stand for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from builder.base.errors import Problem, UsageError, did_you_mean
from builder.base.words import counted, listed
from builder.operations import OPERATIONS
from builder.recipe.names import recipe_name
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import CommandRecipe, output_keys
from builder.toolkit.replace import name_of

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?")


def merging(
    files: Sequence[tuple[Path, Any]],
    op: str | None,
    params: Mapping[str, str],
    sources: Sources,
    fixes: Sequence[str] = (),
    **output: str | None,
) -> CommandRecipe:
    """The recipe of one step over files, as for `merge_step`; `output` as for `output_keys`.

    Raises UsageError, and SourceError for a file that cannot be read.
    """
    sources.check_there(path for path, _ in files)
    for path, _ in files:
        sources.open(sources.file(path))
    named: dict[str, Path] = {}
    step = merge_step(files, op, params, named)
    name, base = recipe_name(Path("-".join(named))), recipe_name(Path("merged"), named)
    steps, keys = {base: step}, output_keys(**output)
    return CommandRecipe(name, named, base, steps=steps, fixes=fixes, output=keys)


def parse_value(text: str) -> Any:
    """What an option says: a TOML value; numbers, or `KEY=VALUE`s, after each other with commas; else a word.

    `0.5`, `GRAD_V`, `0.1,0.2,…`, `UNET=0.3,CLIP=0` and `{ UNET = 0.3 }` are of this kind.
    """
    items = [item.strip() for item in text.split(",")]
    if all(map(_NUMBER.fullmatch, items)):
        numbers = [float(i) if set(i) & set(".eE") else int(i) for i in items]
        return numbers if len(numbers) > 1 else numbers[0]
    try:
        (value,) = tomli.loads(f"value = {text}\n").values()
        return value
    except ValueError:  # no TOML, or more of it than a value
        pairs = [item.partition("=") for item in items]
        if all(key and equals and value for key, equals, value in pairs):
            return {key.strip(): parse_value(value.strip()) for key, _, value in pairs}
        return text


def merge_step(
    files: Sequence[tuple[Path, Any]], op: str | None, params: Mapping[str, str], sources: dict[str, Path]
) -> dict[str, Any]:
    """A step over files, each with its weight or None, as a recipe has it; `sources` gets their names.

    Of an operation's inputs the files are the first, and what is left is its table or list. Without `op` it
    is `linear` where there are weights, else `weighted-sum` of two files. Raises UsageError.
    """
    if op is None:
        op = "linear" if any(w is not None for _, w in files) else "weighted-sum"
    family, colon, _ = op.partition(":")
    operation = OPERATIONS.get(family)
    if operation is None or operation.makes_file or bool(colon) is not operation.of_methods:
        known = did_you_mean(op, merges()) or f"known: {listed(merges())}"
        raise UsageError(Problem(f"no merge is called `{op}`", hint=known))
    names = [name_of(path, sources) for path, _ in files]
    weights = [weight for _, weight in files]
    keys = operation.inputs
    if not any(w is not None for w in weights):
        keys += operation.optional_inputs[: max(0, len(names) - len(keys))]
    single, few = len(keys), len(names)
    needed = operation.many is not None and not operation.of_methods
    if few < single + needed or (operation.many is None and few > single):
        wanted = f"{single + needed} or more" if operation.many is not None else str(single)
        fact = f"`{op}` is of {wanted} files, not of {few}"
        raise UsageError(Problem(fact, hint=_of_as_many(few)))
    if stray := next((path for path, weight in files[:single] if weight is not None), None):
        hint = "`--alpha` says how much" if "alpha" in operation.params else None
        raise UsageError(Problem(f"no weight goes with this input of `{op}`: `{stray}`", hint=hint))
    step: dict[str, Any] = {"op": op, **dict(zip(keys, names, strict=False))}
    if few > single and operation.many is not None:
        rest, shares = names[single:], weights[single:]
        if twice := next((n for n in rest if rest.count(n) > 1), None):
            raise UsageError(Problem(f"`{sources[twice]}` is given twice", hint="add its weights up"))
        weighed = {n: 1 if w is None else w for n, w in zip(rest, shares, strict=True)}
        step[operation.many] = weighed if operation.weighted else rest
    for key, text in params.items():
        if key in step:
            what = counted(len(step[key]), "file") if isinstance(step[key], dict) else f"`{step[key]}`"
            raise UsageError(
                Problem(f"`{key}` is {what} already", hint="the files on the command line say it")
            )
        step[key] = parse_value(text)
    return step


def merges() -> tuple[str, ...]:
    """The operations that make a model of files, but for those of other packages."""
    return tuple(n for n, o in OPERATIONS.items() if not o.makes_file and not o.of_methods)


def _of_as_many(files: int) -> str:
    """The hint that says what merges so many files."""
    some = [f"`--op {n}`" for n in merges() if len((o := OPERATIONS[n]).inputs) == files and not o.many][:2]
    known = f"{', '.join(some)} and others are of {files}; " if some else ""
    return f"{known}`FILE=WEIGHT` for each makes the sum of any number"


def parse_file(model: str) -> tuple[Path, Any]:
    """A file and the weight that is given with it; what is a file as a whole is one."""
    ends = [at for at, letter in enumerate(model) if letter == "="]
    if not ends or os.path.lexists(model):
        return Path(model), None
    end = next((at for at in ends if os.path.lexists(model[:at])), ends[0])
    path, weight = model[:end], model[end + 1 :]
    if not (path and weight):
        raise UsageError(
            Problem(f"`{model}` is neither FILE nor FILE=WEIGHT", hint="as in `a.safetensors=0.4`")
        )
    return Path(path), parse_value(weight)
