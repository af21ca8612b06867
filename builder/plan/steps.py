"""A step as a model: which classes it changes and of what inputs, or the adapter that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from builder.base.errors import Problem, RecipeError
from builder.models.parts import kind
from builder.models.prediction import ARCHITECTURE, Prediction
from builder.operations.registry import Operation
from builder.operations.weights import Weights, blocks_of, is_given, of_class
from builder.plan.graph import CHECKPOINT, Applied, ComponentJob, Finished, Origin, StepJob, Whole
from builder.plan.models import Model, Told, check_component
from builder.plan.nodes import Nodes
from builder.plan.taken import kept, published_in, quoted
from builder.recipe import Pick, Step
from builder.tensors.packed.decode import WIDER

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

Lookup = Callable[[str], Model]


def step_model(nodes: Nodes, name: str, operations: Mapping[str, Operation], model: Lookup) -> Model:
    """A step of a recipe as a model; `model` gives those of its inputs, by their names."""
    step = nodes.recipe.steps[name]
    operation = operations[step.op]
    if operation.makes_file:
        return _adapter_model(nodes, step, operation, model)
    changed = _Changed(nodes, step, operation, model)
    first = changed.first
    return Model(name, first.classes, first.architecture, cache(changed.origin), first.told, first)


class _Changed:
    """A model as a step changes it, with the models of the step's other inputs."""

    def __init__(self, nodes: Nodes, step: Step, operation: Operation, model: Lookup) -> None:
        self.nodes, self.step, self.operation, self.model = nodes, step, operation, model
        self.files = [p for p in step.inputs if p.partition(".")[0] in operation.files]
        self.models = {p: model(n) for p, n in step.inputs.items() if p not in self.files}
        self.leader = _leader(step, operation)
        self.first = self.models[self.leader]

    def origin(self, pick: Pick) -> Origin:
        """What is taken: of the step where it changes the class, otherwise of its first input."""
        step, operation, first = self.step, self.operation, self.first
        plain = replace(pick, component=None)
        if (problem := operation.check(step.params, tuple(step.inputs))) is not None:
            raise RecipeError(replace(problem, place=self.nodes.recipe.place("steps", step.name)))
        self._check_alike()
        if not self._takes_part(pick.cls):
            return first.origin(pick)
        if pick.component is not None:
            check_component(self.nodes, pick, first.origin(plain), first.classes())
        self._note_blocks(pick.cls)
        job = StepJob(
            step.name,
            pick.cls,
            operation.name,
            operation.version,
            self._inputs(plain) | {p: _file(self.nodes, self.model, step, p) for p in self.files},
            _params(step, operation, pick.cls, self.nodes.catalog)
            | ({"classes": list(first.classes())} if self.files else {}),
            step.arithmetic,  # type: ignore[arg-type]
            step.precision,  # type: ignore[arg-type]
            kept(self.nodes.catalog, pick.cls, step.precision),
            self.leader,
        )
        label = f"step {step.name} {pick.cls}"
        return _applied(self.nodes, step, job, pick, label, "computed as it is needed")

    def _inputs(self, pick: Pick) -> dict[str, Origin]:
        """What an operation gets: the class of each input, and where it looks at whole models the others."""
        inputs = {p: self._part_of(m, pick) for p, m in self.models.items()}
        if self.operation.whole_models:
            for cls in (c for c in self.first.classes() if c != pick.cls):
                if self._takes_part(cls):
                    other = replace(pick, cls=cls)
                    inputs |= {f"{p}@{cls}": self._part_of(m, other) for p, m in self.models.items()}
        return inputs

    def _part_of(self, model: Model, pick: Pick) -> Origin:
        """What a model has of a class, or of the one that this widens."""
        return model.origin(replace(pick, cls=self._held(model, pick.cls) or pick.cls))

    def _held(self, model: Model, cls: str) -> str | None:
        """The class of a model that goes with `cls` in a merge: the same, or the one that this widens."""
        traits = self.nodes.catalog.traits.get(cls)
        ways = (cls, traits.widens if traits is not None else None)
        return next((c for c in ways if c in model.classes()), None)

    def _takes_part(self, cls: str) -> bool:
        """Whether a step changes a class of its first input; where one may expect it to, why not is said."""
        step, operation, say = self.step, self.operation, self.nodes.plan.say
        if not _is_asked(step, cls):
            return False
        traits = self.nodes.catalog.traits.get(cls)
        if operation.many in operation.files:
            return traits is not None and traits.adapters is not None
        given = _given(step, operation, cls)
        whose = self.first
        while whose.first is not None:
            whose = whose.first
        if kind(cls) == "VAE" and not step.vae and not given:
            hint = "`VAE = true` merges it"
            say(f"the VAE is that of `{whose.name}`, as merged ones break colours; {hint}")
            return False
        if absent := [step.inputs[p] for p, m in self.models.items() if self._held(m, cls) is None]:
            why = self.nodes.undecoded(absent[0])
            if given or why:
                place = self.nodes.recipe.place("steps", step.name)
                fact = f"`{absent[0]}` has no {cls} to be merged"
                raise RecipeError(Problem(fact, place, why, WIDER if why else None))
            say(f"{cls} of `{step.name}` is that of `{whose.name}`, as `{absent[0]}` has none")
            return False
        return True

    def _note_blocks(self, cls: str) -> None:
        """Say which blocks that a step weighs a class does not have, as a shorter UNET has fewer."""
        traits = self.nodes.catalog.traits.get(cls)
        if traits is None or not traits.block_of:
            return
        given = (b for w in _weights(self.step, self.operation) for b in blocks_of(w, cls))
        if absent := [b for b in dict.fromkeys(given) if b not in traits.blocks]:
            more = f"{absent[0]} to {absent[-1]}" if len(absent) > 1 else absent[0]
            count = f"{len(absent)} weights" if len(absent) > 1 else "a weight"
            said = f"step `{self.step.name}`: {cls} has no {more}: {count} of blocks are not used"
            self.nodes.plan.say(said)

    def _check_alike(self) -> None:
        """Raise RecipeError when a step's inputs have nothing in common that it would change."""
        step = self.step
        held = {step.inputs[p]: m.classes() for p, m in self.models.items()}
        common = {c for c in self.first.classes() if all(self._held(m, c) for m in self.models.values())}
        merged = {c for c in common if kind(c) != "VAE" or step.vae or _given(step, self.operation, c)}
        if any(_is_asked(step, cls) for cls in merged):
            return
        place = self.nodes.recipe.place("steps", step.name)
        fact = f"the step `{step.name}` has nothing to work on: its inputs are not of one kind"
        nothing = "nothing that the catalog knows"
        evidence = [f"`{n}` holds {quoted(classes) or nothing}" for n, classes in held.items()]
        why = [word for name in held for word in self.nodes.undecoded(name)]
        raise RecipeError(Problem(fact, place, (*evidence, *why), WIDER if why else None))


def _adapter_model(nodes: Nodes, step: Step, operation: Operation, model: Lookup) -> Model:
    """A step that makes an adapter, of which tensors there are is known once it reads its inputs."""
    files = [p for p in step.inputs if p in operation.files]
    models = {p: model(n) for p, n in step.inputs.items() if p not in files}

    def classes() -> list[str]:
        held = [set(m.classes()) for m in models.values()]
        first = next(iter(models.values())).classes() if models else ()
        return [c for c in first if all(c in h for h in held) and _is_extracted(nodes.catalog, step, c)]

    def origin(pick: Pick) -> Origin:
        inputs: dict[str, Origin] = {p: _file(nodes, model, step, p) for p in files}
        picks = [replace(pick, cls=cls, component=None) for cls in classes()]
        inputs |= {f"{p}@{k.cls}": m.origin(k) for k in picks for p, m in models.items()}
        if not inputs:
            held = tuple(f"`{m.name}` holds {quoted(m.classes())}" for m in models.values())
            fact = f"the step `{step.name}` has nothing to work on"
            hint = "LoRAs are extracted of UNETs and text encoders of SD v1, v2 and XL, which both have"
            raise RecipeError(Problem(fact, nodes.recipe.place("steps", step.name), held, hint))
        job = StepJob(
            step.name,
            CHECKPOINT,
            operation.name,
            operation.version,
            inputs,
            step.params,
            precision=step.precision,  # type: ignore[arg-type]
            first=next(iter(inputs)),
        )
        why = "its inputs are read when an output that needs it is begun"
        return _applied(nodes, step, job, replace(pick, cls=CHECKPOINT), f"step {step.name}", why)

    def metadata() -> Mapping[str, str]:
        if files:
            said = _file_metadata(nodes, model, step.inputs[files[0]])
        else:
            first = next(iter(models.values()))
            said = _family(nodes.catalog, first)
        return operation.metadata(step.params, said)

    def published() -> str:
        found = [c for c in classes() if c in nodes.catalog.denoisers]
        precision = published_in(nodes.plan, nodes.sources, found[0]) if found else "fp16"
        return "fp16" if precision == "keep" else precision

    return Model(
        step.name,
        lambda: (CHECKPOINT,),
        lambda: None,
        origin,
        lambda: Told(Prediction()),
        metadata=metadata,
        published=published,
    )


def _applied(nodes: Nodes, step: Step, job: StepJob, pick: Pick, label: str, why: str) -> Origin:
    """What a step makes of a class: computed, or from where it is kept."""
    applied = Applied(nodes.add(job, label, action=nodes.action(job), state="stream", why=why))
    if not step.store:
        return applied
    # Kept as it is, every bit of it, for whoever finishes it.
    whole = ComponentJob(pick.cls, step.name, applied, (), "keep", False, "keep", "keep", store=True)
    return Finished(nodes.component(whole, f"{pick.cls} of step {step.name}", pick))


def _is_extracted(catalog: Catalog, step: Step, cls: str) -> bool:
    traits = catalog.traits.get(cls)
    asked = _is_asked(step, cls)
    return asked and traits is not None and traits.adapters is not None and bool(traits.adapters.extracted)


def _file(nodes: Nodes, model: Lookup, step: Step, param: str) -> Origin:
    """All that an adapter holds which is an input of a step."""
    name = step.inputs[param]
    source = nodes.recipe.sources.get(name)
    if source is not None and source.recipe is None:
        return Whole(nodes.source(name).key)
    found = model(name)
    place = nodes.recipe.place(*step.at(param), value=True)
    if found.metadata is None:
        raise RecipeError(Problem(f"`{name}` is a model, and no LoRA", place))
    return found.origin(Pick(CHECKPOINT, name, None, step.at(param)))


def _file_metadata(nodes: Nodes, model: Lookup, name: str) -> Mapping[str, str]:
    """What an adapter says of itself."""
    source = nodes.recipe.sources.get(name)
    if source is not None and source.recipe is None:
        return nodes.carried(nodes.source(name))
    said = model(name).metadata
    return said() if said is not None else {}


def _family(catalog: Catalog, model: Model) -> dict[str, str]:
    """What the file of a LoRA says of the family of the models that it was extracted of."""
    told = model.told().prediction
    architecture = model.architecture()
    said = told.stated(architecture.modelspec if architecture is not None else None, catalog)
    if ARCHITECTURE in said:
        said[ARCHITECTURE] += "/lora"
    for traits in (catalog.traits[c] for c in model.classes() if c in catalog.traits):
        if traits.adapters is not None and (extracted := traits.adapters.extracted) is not None:
            said |= extracted.metadata_v if told.v else extracted.metadata
    return said


def _weights(step: Step, operation: Operation) -> list[Weights]:
    """All weights that a step gives."""
    many = step.params.get(operation.many, {}) if operation.many is not None else {}
    return [*(step.params[n] for n, p in operation.params.items() if p.kind == "weights"), *many.values()]


def _given(step: Step, operation: Operation, cls: str) -> bool:
    """Whether a step gives weights for a class by its name."""
    return any(is_given(w, cls) for w in _weights(step, operation))


def _params(step: Step, operation: Operation, cls: str, catalog: Catalog) -> dict[str, Any]:
    """The parameters of a step as far as they concern a class."""
    traits = catalog.traits.get(cls)
    blocks = traits.blocks if traits is not None else ()
    found = dict(step.params)
    for name, param in operation.params.items():
        if param.kind == "weights":
            found[name] = of_class(step.params[name], cls, blocks)
    if operation.many is not None and operation.many in step.params:
        found[operation.many] = {n: of_class(w, cls, blocks) for n, w in step.params[operation.many].items()}
    return found


def _is_asked(step: Step, cls: str) -> bool:
    """Whether a step is to change a class, as far as it says which."""
    return not step.components or cls in step.components or kind(cls) in step.components


def _leader(step: Step, operation: Operation) -> str:
    """The input whose model a step's is: the first; of a table, whose order is none, that of most weight."""
    if operation.inputs:
        return operation.inputs[0]
    assert operation.many is not None
    shares = {n: w["base"] if isinstance(w, Mapping) else w for n, w in step.params[operation.many].items()}
    return f"{operation.many}.{max(shares, key=shares.__getitem__)}"
