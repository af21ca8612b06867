"""What is wrong with a recipe beyond the form of its values: names, cycles, slots, files."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from builder.base.errors import Place, Problem, UsageError, did_you_mean, nearest
from builder.base.kinds import listed
from builder.base.toml import Keys
from builder.models.parts import kind, meant
from builder.recipe.language import Vocabulary
from builder.recipe.names import SUFFIXES, Form, is_device
from builder.recipe.recipe import FromBase, NewBase, Output, Pick, Recipe
from builder.recipe.values import EMA, NEW

if TYPE_CHECKING:
    from builder.models.catalog import Architecture, Catalog

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
MAX_CYCLES = 10  # that are shown: steps may be woven into more than anyone reads
MAX_STEPS = 64  # that are made of each other: each is a level deeper in what computes a window


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
        found = meant(cls, slots)
        if len(found) > 1:
            fact, hint = f"`{cls}` may be {' or '.join(f'`{f}`' for f in found)}", "name the one you mean"
        elif found:
            fact, hint = f"`{found[0]}` is filled twice", f"remove it, or `{cls}`"
        else:
            fact = f"`{architecture.name}` has no slot `{cls}`"
            hint = did_you_mean(cls, slots) or f"its slots: {listed(architecture.slots)}"
        yield Problem(fact, place, hint=hint)
    unclear = (*wrong, *_unread(recipe, output))
    likely = {nearest(c, slots) for c in unclear} | {cls for c in unclear for cls in meant(kind(c), slots)}
    if output.partial:
        return
    if left := [s for s in architecture.due if s not in {*output.components, *held, *likely}]:
        place = recipe.place(*output.base.at, value=True)
        some = "slot" if len(left) == 1 else "slots"
        yield Problem(
            f"nothing fills the {some} {listed(left)} of `{architecture.name}`",
            place,
            hint=f'add `{left[0]} = "…"` under `[components]`, or name a source as base',
        )


def with_classes(output: Output, architecture: Architecture, catalog: Catalog) -> Output:
    """An output with the classes that words as `VAE` mean in its architecture; what is not clear stays."""
    slots = (*architecture.slots, *twins(architecture, catalog))
    picks: dict[str, Pick] = {}
    for word, pick in output.components.items():
        found = meant(word, slots) if word not in catalog.classes else ()
        cls = found[0] if len(found) == 1 and found[0] not in {*output.components, *picks} else word
        picks[cls] = replace(pick, cls=cls)
    return replace(output, components=picks)


def twins(architecture: Architecture, catalog: Catalog) -> list[str]:
    """The classes that go beside an architecture's slots: the same tensors under other names, as EMA."""
    plain = {c.name: c.cls for c in catalog.components.values()}
    found = (c.cls for c in catalog.components.values() if c.base and plain[c.base] in architecture.slots)
    return list(dict.fromkeys(found))


def _said(recipe: Recipe, *keys: str | int) -> Any:
    """What is written there, whether it could be read or not; None: nothing."""
    found: Any = recipe.document.data
    for key in keys:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def _table(recipe: Recipe, *keys: str | int) -> dict[str, Any]:
    """The table that is written there; empty where there is none."""
    found = _said(recipe, *keys)
    return found if isinstance(found, dict) else {}


def _unread(recipe: Recipe, output: Output) -> list[str]:
    """Classes as written, for they may be what a slot was meant to be filled with."""
    return [*_table(recipe, "components"), *_table(recipe, *output.at, "components")]


def _names(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for name in recipe.steps:
        if name in _table(recipe, "sources"):
            place = recipe.place("steps", name)
            yield Problem(f"`{name}` is a source already", place, hint="give the step another name")
    known = {**_table(recipe, "sources"), **_table(recipe, "steps")}
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


def _references(recipe: Recipe) -> Iterator[tuple[str, Keys]]:
    """Every use of a source or step, with its place."""
    for output in recipe.outputs:
        if isinstance(output.base, FromBase):
            yield output.base.name, output.base.at
        for pick in output.components.values():
            yield pick.source, _named_at(recipe, pick)
    for step in recipe.steps.values():
        for param, name in step.inputs.items():
            yield name, step.at(param)


def _named_at(recipe: Recipe, pick: Pick) -> Keys:
    return (*pick.at, "from") if _table(recipe, *pick.at) else pick.at


def _architectures(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in recipe.outputs:
        base = output.base
        if not isinstance(base, NewBase):
            continue
        name = base.architecture
        try:
            architecture = words.catalog.architecture(name)
        except UsageError:
            known = [*words.catalog.architectures, *words.catalog.classes]
            hint = did_you_mean(name, known) or "`ckpt components` lists what there is"
            fact = f"unknown architecture `{name}`" if name else f"`{NEW}` names no architecture"
            yield Problem(fact, recipe.place(*base.at, value=True), hint=hint)
        else:
            yield from slot_problems(recipe, output, architecture, words.catalog)


def _components(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    picks = {p.at: p for o in recipe.outputs for p in o.components.values()}  # outputs share the recipe's
    good = cache(lambda component, cls: fits(component, cls, words))
    for pick in picks.values():
        if pick.component in (None, EMA) or good(pick.component, pick.cls):
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
            yield from _too_deep(recipe, left)
            return
        step = recipe.steps[chain[1]]
        param = next(p for p, n in step.inputs.items() if n == chain[0])
        fact = "a step is made from itself" if len(chain) == 2 else "steps are made from each other"
        place = recipe.place(*step.at(param), value=True)
        yield Problem(fact, place, (" → ".join(chain),), "take one of them from a source")
        left[chain[1]].discard(chain[0])


def _too_deep(recipe: Recipe, left: Mapping[str, Collection[str]]) -> Iterator[Problem]:
    depths: dict[str, int] = {}
    for name in TopologicalSorter(left).static_order():
        depths[name] = 1 + max((depths[n] for n in left[name]), default=0)
        if depths[name] > MAX_STEPS:
            fact = "steps are made of each other too deeply"
            hint = f"at most {MAX_STEPS} in a row: make a recipe of its own for some, and build that first"
            yield Problem(fact, recipe.place("steps", name), hint=hint)
            return


def _unused(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    if not isinstance(_said(recipe, "base"), str) or type(_said(recipe, "components")) not in (
        dict,
        type(None),
    ):
        return  # where most names would be used
    known = {**_table(recipe, "sources"), **_table(recipe, "steps")}
    # What could not be read is not held against what it names.
    named = {name for name, _ in _references(recipe)} | set(_unread_names(recipe, words))
    used = {name if name in known else nearest(name, known) for name in named}
    for table, what in (("sources", "source"), ("steps", "step")):
        for name in _table(recipe, table):
            if name not in used:
                hint = "use it in `[components]` or as a base, or remove it"
                yield Problem(f"the {what} `{name}` is not used", recipe.place(table, name), hint=hint)


def _unread_names(recipe: Recipe, words: Vocabulary) -> Iterator[str]:
    for keys in ((), *(o.at for o in recipe.outputs)):
        for cls, pick in _table(recipe, *keys, "components").items():
            name = _table(recipe, *keys, "components", cls).get("from", pick)
            if isinstance(name, str):
                yield name
    for name in _table(recipe, "steps"):
        said, step = _table(recipe, "steps", name), recipe.steps.get(name)
        for value in said.values() if step is None else [said.get(words.operations[step.op].many or "")]:
            named = value if isinstance(value, dict | list) else [value]
            yield from (word for word in named if isinstance(word, str))


def _fixes(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in recipe.outputs:
        own = (*output.at, "fixes")
        keys = ("fixes",) if _said(recipe, *own) is None else own
        for index, name in enumerate(output.fixes):
            for other in output.fixes[index + 1 :]:
                if other in words.fixes[name].excludes or name in words.fixes[other].excludes:
                    place = recipe.place(*keys, value=True)
                    fact = f"the fixes `{name}` and `{other}` contradict each other"
                    yield Problem(fact, place, hint="remove one of the two")


def _expectations(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    if _said(recipe, "expect") is None:
        return
    place = recipe.place("expect")
    if len(recipe.outputs) > 1:
        hint = "put it into an `[[output]]`, as `[output.expect]`"
        yield Problem("`expect` does not say which output it is about", place, hint=hint)
    elif _said(recipe, *recipe.outputs[0].at, "expect") is not None:
        hint = "remove either `[expect]` or `[output.expect]`"
        yield Problem("`expect` is given twice", place, hint=hint)


def _autov3(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in (o for o in recipe.outputs if o.expect.autov3 is not None):
        if output.form != "safetensors":
            own = _said(recipe, *output.at, "expect") is not None
            place = recipe.place(*(output.at if own else ()), "expect", "autov3")
            fact = f"`autov3` is of a safetensors file, which `{output.file}` is not"
            yield Problem(fact, place, hint="expect its `tensor_digest`, which is the same in every form")


def _output_names(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    first: dict[str, Place] = {}
    if isinstance(name := _said(recipe, "output", "name"), str):
        file = name if name.endswith(SUFFIXES) else f"{name}.safetensors"
        hint = f'write `file = "{file}"`, or `[[output]]` for the first of several'
        place = recipe.place("output", "name")
        yield Problem("`name` is for one of several outputs, and this is the only one", place, hint=hint)
    for output in recipe.outputs if len(recipe.outputs) > 1 else ():
        place = recipe.place(*output.at, "name", value=True)
        if _said(recipe, *output.at, "name") is None:
            hint = 'each of several outputs needs a `name = "…"`'
            yield Problem("`name` is missing", place, hint=hint)
        elif output.name and output.name in first:
            evidence = f"the first is in line {first[output.name].line}"
            yield Problem(
                f"two outputs are called `{output.name}`", place, (evidence,), "rename one of the two"
            )
        first.setdefault(output.name, place)


def _files(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    sources = {_path(s.file): s.name for s in recipe.sources.values() if s.file}
    first: dict[str, Output] = {}
    for output in recipe.outputs:
        path = _path(output.file)
        place = recipe.place(*output.at, "file", value=True)
        if odd := next((p for p in output.file.rstrip("/").split("/") if not _is_everywhere(p)), None):
            fact = f"no file can be called `{odd}` everywhere"
            evidence = "names of devices, and what ends in a dot or a space, are none on Windows"
            at = place if place.line is not None else recipe.place("name", value=True)
            yield Problem(fact, at, (evidence,), "give another `file`")
        if path in sources:
            fact = f"the output would replace the source `{sources[path]}`"
            yield Problem(fact, place, (f"both are `{output.file}`",), "write to another `file`")
        elif path in first and first[path].name != output.name:
            evidence = f"`{first[path].name}` and `{output.name}`"
            yield Problem(f"two outputs write `{output.file}`", place, (evidence,), "give one another `file`")
        first.setdefault(path, output)
    paths = sorted({*sources, *first})
    shards = {m[1]: m[0] for m in map(_SHARD.fullmatch, paths) if m is not None}
    for path, output in first.items():
        if output.form == "sharded":
            held = shards.get(path.removesuffix(".safetensors.index.json"))
        elif output.form == "diffusers":
            held = next((p for p in paths[bisect(paths, f"{path}/") :][:1] if p.startswith(f"{path}/")), None)
        else:
            continue
        if held is not None:
            place = recipe.place(*output.at, "file", value=True)
            fact = f"`{output.file}` would hold another file of the recipe, `{held}`"
            yield Problem(fact, place, hint="write to another `file`")


def _path(written: str) -> str:
    # As file systems see it that take `A` and `a`, or both ways to write `ä`, for one: a recipe is to work on
    # all of them.
    return unicodedata.normalize("NFC", posixpath.normpath(written).casefold())


def _is_everywhere(part: str) -> bool:
    """Whether Windows too can have a file or a folder of that name; `.` is none."""
    return part == "." or not (part.endswith((".", " ")) or is_device(part))


_WORDS: dict[Form, str] = {
    "safetensors": "one file",
    "torch": "one file",
    "gguf": "a GGUF file",
    "sharded": "a sharded set",
    "diffusers": "a diffusers folder",
}
_FOR: dict[str, tuple[Form, ...]] = {  # keys that make sense for some forms of an output alone
    "shard_size": ("sharded", "diffusers"),
    "prediction": ("diffusers",),
    "tokenizer": ("diffusers",),
    "verbatim": ("safetensors", "torch", "sharded", "diffusers"),
    "config": ("safetensors", "torch"),
    "profile": ("safetensors", "torch"),
    "partial": ("safetensors", "torch", "sharded"),
}


def _forms(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in recipe.outputs:
        for key, forms in _FOR.items():
            if not getattr(output, key) or output.form in forms:
                continue
            yield form_problem(key, forms, output.file, output.form, recipe.place(*output.at, key))


def form_problem(word: str, forms: Iterable[Form], file: str, form: Form, place: Place | None) -> Problem:
    """That a word of an output is for some forms, and its file has another."""
    meant = " or ".join(dict.fromkeys(_WORDS[form] for form in forms))
    hint = "remove it, or give the output another `file`: its ending says what is written"
    return Problem(f"`{word}` is for {meant}, and `{file}` is {_WORDS[form]}", place, hint=hint)


def _adapters(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    """Whatever takes a model for a LoRA or the other way round, as far as steps are concerned."""
    makes = {n: words.operations[s.op].makes_file for n, s in recipe.steps.items()}
    bases = {o.base.at for o in recipe.outputs if isinstance(o.base, FromBase)}
    files = {
        step.at(param)
        for step in recipe.steps.values()
        for param in step.inputs
        if param.partition(".")[0] in words.operations[step.op].files
    }
    for name, keys in dict.fromkeys(_references(recipe)):
        if name not in makes or keys in bases or makes[name] == (keys in files):
            continue
        place = recipe.place(*keys, value=True)
        if makes[name]:
            hint = "it is the `base` of an output, or one of the `loras` of a step"
            yield Problem(f"`{name}` is a LoRA, and no model", place, hint=hint)
        else:
            yield Problem(f"`{name}` is a model, and no LoRA", place, hint="name a LoRA's file")
    for output in recipe.outputs:
        if isinstance(output.base, FromBase) and makes.get(output.base.name):
            evidence = f"the output is a LoRA, `{output.base.name}`"
            yield from _alone(recipe, output, ("verbatim", *_NOT_VERBATIM), evidence)


_NOT_VERBATIM = ("components", "fixes", "markers", "profile", "keep", "unknown", "partial")


def _verbatim(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in (o for o in recipe.outputs if o.verbatim):
        base = output.base
        source = recipe.sources.get(base.name) if isinstance(base, FromBase) else None
        named = isinstance(base, NewBase) or base.name in {**recipe.sources, **recipe.steps}
        if named and (source is None or source.recipe is not None):
            place, hint = recipe.place(*base.at, value=True), "name a source that is a file"
            yield Problem("only a file has tensors to be carried over verbatim", place, hint=hint)
        evidence = "every tensor of the base is carried over under its name, whatever it is part of"
        yield from _alone(recipe, output, _NOT_VERBATIM, evidence)


def _alone(recipe: Recipe, output: Output, words: tuple[str, ...], evidence: str) -> Iterator[Problem]:
    """The keys of an output that say what becomes of a model's parts, where there are none."""
    said = [k for k in words if getattr(output, k) not in (None, False, (), {}, "drop")]
    for keys in [(k,) for k in said] + [("expect", "metric")] * (output.expect.metric is not None):
        own = _said(recipe, *output.at, *keys) is not None
        place = recipe.place(*(output.at if own else ()), *keys)
        what = "`verbatim`" if output.verbatim and keys != ("verbatim",) else "a LoRA"
        fact = f"`{keys[-1]}` cannot go with {what}"
        yield Problem(fact, place, (evidence,), "remove one of the two")


def _kept(recipe: Recipe, words: Vocabulary) -> Iterator[Problem]:
    for output in recipe.outputs:
        if output.keep and isinstance(output.base, NewBase):
            place = recipe.place(*output.at, "keep")
            hint = "name a source as `base`, or remove it"
            yield Problem("`keep` has no base to carry tensors over from", place, hint=hint)


_CHECKS: tuple[Callable[[Recipe, Vocabulary], Iterator[Problem]], ...] = (
    _names,
    _architectures,
    _components,
    _cycles,
    _unused,
    _fixes,
    _expectations,
    _autov3,
    _output_names,
    _files,
    _kept,
    _forms,
    _verbatim,
    _adapters,
)
