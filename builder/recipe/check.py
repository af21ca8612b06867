"""What is wrong with a recipe beyond the form of its values: names, cycles, slots, files."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from builder.errors import Place, Problem, UsageError, did_you_mean, nearest
from builder.recipe.kinds import listed
from builder.recipe.language import NEW, Vocabulary
from builder.recipe.model import FromBase, NewBase, Output, Pick, Recipe
from builder.toml import Keys

if TYPE_CHECKING:
    from builder.catalog import Architecture, Catalog

MAX_CYCLES = 10  # that are shown: steps may be woven into more than anyone reads


def problems_of(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    """Every problem of a recipe whose values were read; those that could not be are passed over."""
    seen: set[Problem] = set()  # what outputs share is looked at once for each of them
    for check in _CHECKS:
        for problem in check(recipe, words):
            if problem not in seen:
                seen.add(problem)
                yield problem


def slot_problems(
    recipe: Recipe, output: Output, architecture: Architecture, catalog: Catalog, held: Collection[str] = ()
) -> Iterator[Problem]:
    """What is wrong with the filling of an architecture's slots; `held` are the classes of its base."""
    slots = (*architecture.slots, *twins(architecture, catalog))
    wrong = [c for c in output.components if c not in slots]
    for cls in wrong:
        place = recipe.place(*output.components[cls].at)
        hint = did_you_mean(cls, slots) or f"its slots: {listed(architecture.slots)}"
        yield Problem(f"`{architecture.name}` has no slot `{cls}`", place, hint=hint)
    meant = {nearest(c, slots) for c in (*wrong, *_unread(recipe, output))}
    if left := [s for s in architecture.slots if s not in {*output.components, *held, *meant}]:
        place = recipe.place(*output.base.at, value=True)
        some = "slot" if len(left) == 1 else "slots"
        yield Problem(
            f"nothing fills the {some} {listed(left)} of `{architecture.name}`",
            place,
            hint=f'add `{left[0]} = "…"` under `[components]`, or name a source as base',
        )


def twins(architecture: Architecture, catalog: Catalog) -> list[str]:
    """The classes that go beside an architecture's slots: the same tensors under other names, as EMA."""
    plain = {c.name: c.cls for c in catalog.components.values()}
    found = (c.cls for c in catalog.components.values() if c.base and plain[c.base] in architecture.slots)
    return list(dict.fromkeys(found))


def _unread(recipe: Recipe, output: Output) -> list[str]:
    """Classes as written, for they may be what a slot was meant to be filled with."""
    data = recipe.document.data
    if len(output.at) == 2:
        own = data["output"][output.at[1]]
    else:
        own = data.get("output")
    tables = [t.get("components") for t in (data, own) if isinstance(t, dict)]
    return [c for t in tables if isinstance(t, dict) for c in t]


def _names(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for name in recipe.steps:
        if name in _written(recipe, "sources"):
            place = recipe.place("steps", name)
            yield Problem(f"`{name}` is a source already", place, hint="give the step another name")
    known = [*_written(recipe, "sources"), *_written(recipe, "steps")]
    for name, keys in _references(recipe):
        if name and name not in known:
            hint = did_you_mean(name, known)
            base = next((o.base for o in recipe.outputs if o.base.at == keys), None)
            if hint is None and base is not None and (found := _new(name, words)):
                hint = f'write `base = "{NEW} {found}"`'
            elif hint is None:
                hint = f"known: {listed(known)}" if known else "add it under `[sources]`"
            place = recipe.place(*keys, value=True)
            yield Problem(f"no source or step is called `{name}`", place, hint=hint)


def _new(name: str, words: Vocabulary) -> str | None:
    """The architecture that a base means but for the word before it."""
    bare = name[len(NEW) :] if name.casefold().startswith(NEW.casefold()) else name
    try:
        return words.catalog.architecture(bare).name
    except UsageError:
        return None


def _written(recipe: Recipe, table: str) -> list[str]:
    """The names under a heading, of values that could not be read too."""
    said = recipe.document.data.get(table)
    return list(said) if isinstance(said, dict) else []


def _references(recipe: Recipe) -> Iterator[tuple[str, Keys]]:
    """Every use of a source or step, with its place."""
    for output in recipe.outputs:
        if isinstance(output.base, FromBase):
            yield output.base.name, output.base.at
        for pick in output.components.values():
            yield pick.source, _named_at(recipe, pick)
    for step in recipe.steps.values():
        for param, name in step.inputs.items():
            yield name, ("steps", step.name, param)


def _named_at(recipe: Recipe, pick: Pick) -> Keys:
    said: object = recipe.document.data
    for key in pick.at:
        said = said[key]  # type: ignore[index]
    return (*pick.at, "from") if isinstance(said, dict) else pick.at


def _architectures(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in recipe.outputs:
        base = output.base
        if not isinstance(base, NewBase):
            continue
        name = base.architecture
        if name in words.catalog.architectures:
            architecture = words.catalog.architectures[name]
            yield from slot_problems(recipe, output, architecture, words.catalog)
        else:
            known = words.catalog.architectures
            hint = did_you_mean(name, known) or f"known: {listed(known)}"
            fact = f"unknown architecture `{name}`" if name else f"`{NEW}` names no architecture"
            yield Problem(fact, recipe.place(*base.at, value=True), hint=hint)


def _components(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for pick in (p for o in recipe.outputs for p in o.components.values()):
        if pick.component is None or fits(pick.component, pick.cls, words):
            continue
        place = recipe.place(*pick.at, "component", value=True)
        known = [c.name for c in words.catalog.components.values() if fits(c.name, pick.cls, words)]
        cls = words.catalog.components[pick.component].cls
        fact = f"`{pick.component}` cannot fill the slot `{pick.cls}`"
        yield Problem(fact, place, (f"its class is `{cls}`",), f"those that can: {listed(known)}")


def fits(component: str, cls: str, words: Vocabulary) -> bool:
    """Whether a component can fill a slot: one of the class, a twin of one, or one of the same tensors."""
    components = words.catalog.components
    found = components[component]
    if found.cls == cls or (found.base is not None and components[found.base].cls == cls):
        return True
    shapes = {n: r.shape for n, r in found.tensors.items()}
    own = words.catalog.classes.get(cls, ())
    return any({n: r.shape for n, r in c.tensors.items()} == shapes for c in own)


def _cycles(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    steps = set(recipe.steps)
    left = {n: steps.intersection(s.inputs.values()) for n, s in recipe.steps.items()}
    for _ in range(MAX_CYCLES):
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            chain: list[str] = error.args[1]  # each one is an input of the next
        else:
            return
        step = recipe.steps[chain[1]]
        param = next(p for p, n in step.inputs.items() if n == chain[0])
        fact = "a step is made from itself" if len(chain) == 2 else "steps are made from each other"
        place = recipe.place("steps", step.name, param, value=True)
        yield Problem(fact, place, (" → ".join(chain),), "take one of them from a source")
        left[chain[1]].discard(chain[0])


def _unused(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    known = [*_written(recipe, "sources"), *_written(recipe, "steps")]
    # What could not be read is not held against what it names.
    named = {name for name, _ in _references(recipe)} | set(_unread_names(recipe))
    used = {name if name in known else nearest(name, known) for name in named}
    for table, what in (("sources", "source"), ("steps", "step")):
        for name in _written(recipe, table):
            if name not in used:
                hint = "use it in `[components]` or as a base, or remove it"
                yield Problem(f"the {what} `{name}` is not used", recipe.place(table, name), hint=hint)


def _unread_names(recipe: Recipe) -> Iterator[str]:
    data = recipe.document.data
    said_output = data.get("output")
    outputs = said_output if isinstance(said_output, list) else [said_output]
    for said in (data, *outputs):
        picks = said.get("components") if isinstance(said, dict) else None
        for pick in picks.values() if isinstance(picks, dict) else ():
            name = pick.get("from") if isinstance(pick, dict) else pick
            if isinstance(name, str):
                yield name
    for name in _written(recipe, "steps"):
        step = data["steps"][name]
        if name not in recipe.steps and isinstance(step, dict):
            yield from (v for v in step.values() if isinstance(v, str))


def _fixes(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    data = recipe.document.data
    for output in recipe.outputs:
        own = (*output.at, "fixes")
        keys = own if _is_written(data, own) else ("fixes",)
        for index, name in enumerate(output.fixes):
            for other in output.fixes[index + 1 :]:
                if other in words.fixes[name].excludes or name in words.fixes[other].excludes:
                    place = recipe.place(*keys, value=True)
                    fact = f"the fixes `{name}` and `{other}` contradict each other"
                    yield Problem(fact, place, hint="remove one of the two")


def _is_written(data: object, keys: Keys) -> bool:
    for key in keys:
        if not ((isinstance(data, dict) and key in data) or isinstance(data, list)):
            return False
        data = data[key]  # type: ignore[index]
    return True


def _outputs(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    data = recipe.document.data
    several = type(data.get("output")) is list
    if several and "expect" in data:
        yield Problem(
            "`expect` does not say which output it is about",
            recipe.place("expect"),
            hint="put it into an `[[output]]`, as `[output.expect]`",
        )
    elif _is_written(data, ("output", "expect")) and "expect" in data:
        yield Problem(
            "`expect` is given twice",
            recipe.place("expect"),
            hint="remove either `[expect]` or `[output.expect]`",
        )
    sources = {posixpath.normpath(s.file): s.name for s in recipe.sources.values() if s.file}
    files: dict[str, Place] = {}
    names: dict[str, Place] = {}
    for output in recipe.outputs:
        place = recipe.place(*output.at, "file", value=True)
        path = posixpath.normpath(output.file)
        if several and not output.name and not _is_written(data, (*output.at, "name")):
            yield Problem(
                "`name` is missing",
                recipe.place(*output.at),
                hint='of several outputs each needs a `name = "…"`',
            )
        elif output.name in names:
            where = recipe.place(*output.at, "name", value=True)
            evidence = f"line {names[output.name].line} has it"
            yield Problem(
                f"two outputs are called `{output.name}`", where, (evidence,), "rename one of the two"
            )
        elif path.casefold() in files:  # as file systems are that take both for one
            evidence = f"line {files[path.casefold()].line} writes it"
            yield Problem(f"two outputs write `{output.file}`", place, (evidence,), "give one another `file`")
        if path in sources:
            hint = "write to another `file`"
            yield Problem(f"the output would replace the source `{sources[path]}`", place, (path,), hint)
        names.setdefault(output.name, recipe.place(*output.at, "name", value=True))
        files.setdefault(path.casefold(), place)
        if isinstance(output.base, NewBase) and output.keep:
            yield Problem(
                "`keep` has no base to carry tensors over from",
                recipe.place(*output.at, "keep"),
                hint="name a source as `base`, or remove it",
            )


_CHECKS: tuple[Callable[[Recipe, Vocabulary], Iterator[Problem]], ...] = (
    _names,
    _architectures,
    _components,
    _cycles,
    _unused,
    _fixes,
    _outputs,
)
