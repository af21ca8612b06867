"""Sources, steps and included recipes as models: what is taken of one becomes a node of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from builder.base.errors import Problem, RecipeError
from builder.base.words import counted
from builder.models.catalog import Architecture
from builder.models.catalog.tables import Patterns, Traits
from builder.models.cut import foreign, numbers, packed_anew
from builder.models.parts import kind
from builder.models.prediction import ARCHITECTURE, Prediction, prediction, read_markers
from builder.operations.registry import Operation
from builder.operations.weights import Weights, blocks_of, is_given, of_class
from builder.plan.graph import (
    CHECKPOINT,
    Applied,
    ComponentJob,
    Container,
    Finished,
    Job,
    Key,
    Node,
    Origin,
    Plan,
    State,
    StepJob,
    Take,
    Whole,
    component_specs,
)
from builder.plan.keys import action_key, recall_prediction, tables
from builder.plan.metadata import carried_metadata
from builder.plan.taken import component_name, place_of, quoted, sizes_of, taken
from builder.recipe import FromBase, NewBase, Output, Pick, Recipe, Step, slot_problems
from builder.recipe.check import MAX_STEPS, with_classes
from builder.recipe.values import EMA, PUBLISHED
from builder.sources.job import SourceJob, entry_name
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.packed.decode import WIDER
from builder.tensors.packed.encode import Quantize

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.sources.opened import Sources
    from builder.tensors.lazy import LazyTensor


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


class Told(NamedTuple):
    """What a denoiser predicts; `by` is the source that it comes from, and what that says."""

    prediction: Prediction
    by: tuple[Key, Prediction] | None = None


@dataclass(frozen=True)
class Model:
    """A source, step or sub-recipe as a set of components, each of which becomes a node when it is taken.

    `told` says what its denoiser predicts. One with `metadata`, which a file of it says of itself, is no
    model but an adapter: all of it is one component, and `published` is the precision of such a file.
    """

    name: str
    classes: Callable[[], tuple[str, ...]]
    architecture: Callable[[], Architecture | None]
    origin: Callable[[Pick], Origin]
    told: Callable[[], Told]
    first: Model | None = None  # of a step, the one whose classes it changes
    metadata: Callable[[], Mapping[str, str]] | None = None
    published: Callable[[], str] = lambda: "fp16"


class Components:
    """What is taken of the models of one recipe, as nodes of a plan.

    `scope` are the names of the sources that lead to the recipe.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        scope: tuple[str, ...],
        sources: Sources,
        operations: Mapping[str, Operation],
    ) -> None:
        self.plan, self.recipe, self.scope = plan, recipe, scope
        self.sources, self.operations = sources, operations
        self.catalog, self.store = sources.catalog, sources.store
        self._models: dict[str, Model] = {}

    # -- nodes

    def add(self, job: Job, label: str, **facts: Any) -> Key:
        """Add a node, all of whose inputs are there already, unless it is known; its key."""
        key = job.key
        if key not in self.plan.nodes:
            near = [self.plan.depths.get(i, 0) for i in job.inputs]
            self.plan.depths[key] = max(near, default=0) + isinstance(job, StepJob)
            if self.plan.depths[key] > MAX_STEPS:
                fact = f"more than {MAX_STEPS} steps are made of each other, through all recipes"
                raise RecipeError(Problem(fact, hint="build one of them first, and name its file"))
            said = self.plan.labels
            number, unlike = 1, label
            while unlike in said:
                number += 1
                unlike = f"{label} #{number}"
            said.add(unlike)
            self.plan.nodes[key] = Node(job, key, unlike, **facts)
        return key

    def action(self, job: Job) -> str | None:
        """The key of what a job makes, with its sources known by content."""
        return action_key(job, lambda key: self.plan.nodes[key].action)

    def source(self, name: str) -> SourceJob:
        """A source of this recipe, which gets a node."""
        entry = entry_name((*self.scope, name))
        locked = self.plan.lock.sources.get(entry) if self.plan.lock is not None else None
        job = self.sources.job(self.recipe, name, entry, locked, self.plan.recipe.path)
        found = self.sources.find(job)
        state: State
        if found is None:
            where = self.sources.addresses(job)
            state, why = "missing", "nowhere to be found, and without an address"
            if where:
                state, why = "fetch", f"not on this machine, but at {where[0]}"
        elif found.sha256 is None:
            state, why = "hash", "seen for the first time"
        else:
            state, why = "known", "its digest is known"
        reads = self.sources.size(job) if state != "known" else 0
        self.add(job, f"source {name}", action=self.sources.sha256(job), state=state, why=why, reads=reads)
        self.plan.entries[entry] = job
        return job

    # -- models

    def model(self, name: str) -> Model:
        if name not in self._models:
            if name in self.recipe.steps:
                self._models[name] = self._step(name)
            elif self.recipe.sources[name].recipe is not None:
                self._models[name] = self._sub_recipe(name)
            else:
                self._models[name] = self._source(name)
        return self._models[name]

    def _source(self, name: str) -> Model:
        def classes() -> tuple[str, ...]:
            job = self.source(name)
            if (known := self.sources.known_architecture(job)) is not None:
                return self.catalog.architecture(known).slots
            identity = self.sources.open(job).identity
            return tuple(dict.fromkeys(m.component.cls for m in identity.matches if not m.ema))

        def architecture() -> Architecture | None:
            job = self.source(name)
            if (known := self.sources.known_architecture(job)) is not None:
                return self.catalog.architecture(known)
            identity = self.sources.open(job).identity
            found = identity.architecture if identity.intact else identity.incomplete
            return self.catalog.architecture(found) if found is not None else None

        def origin(pick: Pick) -> Origin:
            return Take(
                self.source(name).key,
                pick.cls,
                pick.component,
                tables(self.catalog, pick.cls, pick.component),
                self.recipe.place(*pick.at, value=True),
            )

        return Model(name, classes, architecture, cache(origin), lambda: self._told_by(self.source(name)))

    def _told_by(self, job: SourceJob) -> Told:
        """What a source says of what its denoiser predicts; it is looked at where that is not remembered."""
        found = recall_prediction(self.store, self.sources.sha256(job), self.catalog)
        if found is None and self._is_seen(job):
            checkpoint = self.sources.open(job).checkpoint
            found = read_markers(prediction(checkpoint, checkpoint.metadata, self.catalog), checkpoint)
        found = found or Prediction()
        return Told(found, (job.key, found))

    def _is_seen(self, job: SourceJob) -> bool:
        """Whether a source's contents are seen without fetching anything; what is not is noted."""
        seen = self.sources.find(job) is not None or self.sources.is_open(job)
        if not seen and job.key not in self.plan.unseen:
            self.plan.unseen.append(job.key)
        return seen

    def _sub_recipe(self, name: str) -> Model:
        recipe = self.recipe.included[name]
        inner = type(self)(self.plan, recipe, (*self.scope, name), self.sources, self.operations)
        output = recipe.output(self.recipe.sources[name].output)
        assert output is not None, "the reader of recipes has seen to it"
        if (adapter := inner.adapter(output)) is not None:
            pick = Pick(CHECKPOINT, adapter.name, None, output.base.at)
            return replace(adapter, name=name, origin=lambda _: Finished(inner.component(output, pick)))
        made = inner.spelt(output)
        architecture, picks = inner.filled(made)

        def origin(pick: Pick) -> Origin:
            wanted = self.catalog.component(pick.component) if pick.component is not None else None
            cls = wanted.cls if wanted is not None else pick.cls
            if cls not in picks:
                raise self._absent(pick, picks)
            key = inner.component(made, picks[cls])
            promote = None if cls == pick.cls or wanted is None else wanted.name
            finished = Finished(key, promote)
            self._check_component(pick, Finished(key), picks)
            return finished

        return Model(
            name,
            lambda: tuple(picks),
            lambda: architecture,
            cache(origin),
            lambda: inner.told(made, picks, {}),
        )

    def _step(self, name: str) -> Model:
        step = self.recipe.steps[name]
        operation = self.operations[step.op]
        if operation.makes_file:
            return self._adapter_step(step, operation)
        files = [p for p in step.inputs if p.partition(".")[0] in operation.files]
        models = {p: self.model(n) for p, n in step.inputs.items() if p not in files}
        leader = _leader(step, operation)
        first = models[leader]

        def origin(pick: Pick) -> Origin:
            plain = replace(pick, component=None)
            if (problem := operation.check(step.params, tuple(step.inputs))) is not None:
                raise RecipeError(replace(problem, place=self.recipe.place("steps", step.name)))
            self._check_alike(step, operation, models)
            if not self._takes_part(step, operation, pick.cls, models, leader):
                return first.origin(pick)
            if pick.component is not None:
                self._check_component(pick, first.origin(plain), first.classes())
            self._note_blocks(step, operation, pick.cls)
            job = StepJob(
                name,
                pick.cls,
                operation.name,
                operation.version,
                self._inputs(step, operation, plain, models, leader)
                | {p: self._file(step, p) for p in files},
                _params(step, operation, pick.cls, self.catalog)
                | ({"classes": list(first.classes())} if files else {}),
                step.arithmetic,  # type: ignore[arg-type]
                step.precision,  # type: ignore[arg-type]
                self._kept(pick.cls, step.precision),
                leader,
            )
            return self._applied(step, job, pick, f"step {name} {pick.cls}", "computed as it is needed")

        return Model(name, first.classes, first.architecture, cache(origin), first.told, first)

    def _applied(self, step: Step, job: StepJob, pick: Pick, label: str, why: str) -> Origin:
        """What a step makes of a class: computed, or from where it is kept."""
        applied = Applied(self.add(job, label, action=self.action(job), state="stream", why=why))
        if not step.store:
            return applied
        # Kept as it is, every bit of it, for whoever finishes it.
        kept = ComponentJob(pick.cls, step.name, applied, (), "keep", False, "keep", "keep", store=True)
        return Finished(self._component(kept, f"{pick.cls} of step {step.name}", pick))

    # -- adapters

    def adapter(self, output: Output) -> Model | None:
        """The adapter that an output is the file of; None where it is a model's."""
        model = self.model(output.base.name) if isinstance(output.base, FromBase) else None
        return model if model is not None and model.metadata is not None else None

    def _adapter_step(self, step: Step, operation: Operation) -> Model:
        """A step that makes an adapter, of which tensors there are is known once it reads its inputs."""
        files = [p for p in step.inputs if p in operation.files]
        models = {p: self.model(n) for p, n in step.inputs.items() if p not in files}

        def classes() -> list[str]:
            held = [set(m.classes()) for m in models.values()]
            first = next(iter(models.values())).classes() if models else ()
            return [c for c in first if all(c in h for h in held) and self._is_extracted(step, c)]

        def origin(pick: Pick) -> Origin:
            inputs: dict[str, Origin] = {p: self._file(step, p) for p in files}
            picks = [replace(pick, cls=cls, component=None) for cls in classes()]
            inputs |= {f"{p}@{k.cls}": m.origin(k) for k in picks for p, m in models.items()}
            if not inputs:
                held = tuple(f"`{m.name}` holds {quoted(m.classes())}" for m in models.values())
                fact = f"the step `{step.name}` has nothing to work on"
                hint = "LoRAs are extracted of UNETs and text encoders of SD v1, v2 and XL, which both have"
                raise RecipeError(Problem(fact, self.recipe.place("steps", step.name), held, hint))
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
            return self._applied(step, job, replace(pick, cls=CHECKPOINT), f"step {step.name}", why)

        def metadata() -> Mapping[str, str]:
            if files:
                said = self._file_metadata(step.inputs[files[0]])
            else:
                first = next(iter(models.values()))
                said = self._family(first)
            return operation.metadata(step.params, said)

        def published() -> str:
            found = [c for c in classes() if c in self.catalog.denoisers]
            precision = self._published(found[0]) if found else "fp16"
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

    def _is_extracted(self, step: Step, cls: str) -> bool:
        traits = self.catalog.traits.get(cls)
        asked = _is_asked(step, cls)
        return (
            asked and traits is not None and traits.adapters is not None and bool(traits.adapters.extracted)
        )

    def _file(self, step: Step, param: str) -> Origin:
        """All that an adapter holds which is an input of a step."""
        name = step.inputs[param]
        source = self.recipe.sources.get(name)
        if source is not None and source.recipe is None:
            return Whole(self.source(name).key)
        model = self.model(name)
        place = self.recipe.place(*step.at(param), value=True)
        if model.metadata is None:
            raise RecipeError(Problem(f"`{name}` is a model, and no LoRA", place))
        return model.origin(Pick(CHECKPOINT, name, None, step.at(param)))

    def _file_metadata(self, name: str) -> Mapping[str, str]:
        """What an adapter says of itself."""
        source = self.recipe.sources.get(name)
        if source is not None and source.recipe is None:
            return self._carried(self.source(name))
        said = self.model(name).metadata
        return said() if said is not None else {}

    def _family(self, model: Model) -> dict[str, str]:
        """What the file of a LoRA says of the family of the models that it was extracted of."""
        told = model.told().prediction
        architecture = model.architecture()
        said = told.stated(architecture.modelspec if architecture is not None else None, self.catalog)
        if ARCHITECTURE in said:
            said[ARCHITECTURE] += "/lora"
        for traits in (self.catalog.traits[c] for c in model.classes() if c in self.catalog.traits):
            if traits.adapters is not None and (extracted := traits.adapters.extracted) is not None:
                said |= extracted.metadata_v if told.v else extracted.metadata
        return said

    def _inputs(
        self, step: Step, operation: Operation, pick: Pick, models: Mapping[str, Model], leader: str
    ) -> dict[str, Origin]:
        """What an operation gets: the class of each input, and where it looks at whole models the others."""
        inputs = {p: self._part_of(m, pick) for p, m in models.items()}
        if operation.whole_models:
            for cls in (c for c in models[leader].classes() if c != pick.cls):
                if self._takes_part(step, operation, cls, models, leader):
                    other = replace(pick, cls=cls)
                    inputs |= {f"{p}@{cls}": self._part_of(m, other) for p, m in models.items()}
        return inputs

    def _part_of(self, model: Model, pick: Pick) -> Origin:
        """What a model has of a class, or of the one that this widens."""
        return model.origin(replace(pick, cls=self._held(model, pick.cls) or pick.cls))

    def _held(self, model: Model, cls: str) -> str | None:
        """The class of a model that goes with `cls` in a merge: the same, or the one that this widens."""
        traits = self.catalog.traits.get(cls)
        ways = (cls, traits.widens if traits is not None else None)
        return next((c for c in ways if c in model.classes()), None)

    def _takes_part(
        self, step: Step, operation: Operation, cls: str, models: Mapping[str, Model], leader: str
    ) -> bool:
        """Whether a step changes a class of its first input; where one may expect it to, why not is said."""
        if not _is_asked(step, cls):
            return False
        traits = self.catalog.traits.get(cls)
        if operation.many in operation.files:
            return traits is not None and traits.adapters is not None
        given = _given(step, operation, cls)
        whose = models[leader]
        while whose.first is not None:
            whose = whose.first
        if kind(cls) == "VAE" and not step.vae and not given:
            hint = "`VAE = true` merges it"
            self.plan.say(f"the VAE is that of `{whose.name}`, as merged ones break colours; {hint}")
            return False
        if absent := [step.inputs[p] for p in models if self._held(models[p], cls) is None]:
            why = self._undecoded(absent[0])
            if given or why:
                place = self.recipe.place("steps", step.name)
                fact = f"`{absent[0]}` has no {cls} to be merged"
                raise RecipeError(Problem(fact, place, why, WIDER if why else None))
            self.plan.say(f"{cls} of `{step.name}` is that of `{whose.name}`, as `{absent[0]}` has none")
            return False
        return True

    def _note_blocks(self, step: Step, operation: Operation, cls: str) -> None:
        """Say which blocks that a step weighs a class does not have, as a shorter UNET has fewer."""
        traits = self.catalog.traits.get(cls)
        if traits is None or not traits.block_of:
            return
        said = (b for w in _weights(step, operation) for b in blocks_of(w, cls))
        if absent := [b for b in dict.fromkeys(said) if b not in traits.blocks]:
            more = f"{absent[0]} to {absent[-1]}" if len(absent) > 1 else absent[0]
            count = f"{len(absent)} weights" if len(absent) > 1 else "a weight"
            self.plan.say(f"step `{step.name}`: {cls} has no {more}: {count} of blocks are not used")

    def _check_alike(self, step: Step, operation: Operation, models: Mapping[str, Model]) -> None:
        """Raise RecipeError when a step's inputs have nothing in common that it would change."""
        held = {step.inputs[p]: m.classes() for p, m in models.items()}
        first = models[_leader(step, operation)]
        common = {c for c in first.classes() if all(self._held(m, c) for m in models.values())}
        merged = {c for c in common if kind(c) != "VAE" or step.vae or _given(step, operation, c)}
        if any(_is_asked(step, cls) for cls in merged):
            return
        place = self.recipe.place("steps", step.name)
        fact = f"the step `{step.name}` has nothing to work on: its inputs are not of one kind"
        nothing = "nothing that the catalog knows"
        evidence = [f"`{n}` holds {quoted(classes) or nothing}" for n, classes in held.items()]
        why = [word for name in held for word in self._undecoded(name)]
        raise RecipeError(Problem(fact, place, (*evidence, *why), WIDER if why else None))

    def _undecoded(self, name: str) -> tuple[str, ...]:
        """What a source has of packed weights that nothing decodes; nothing of what is not seen here."""
        if not self._is_file(FromBase(name)) or not self.sources.seen(job := self.source(name)):
            return ()
        return self.sources.open(job).identity.undecoded

    def _check_component(self, pick: Pick, origin: Origin, held: Any) -> None:
        """Raise RecipeError when what another model makes is not the component that is asked for."""
        if pick.component is None:
            return
        found = component_name(self.plan, self.sources, origin)
        if found is not None and found != pick.component:
            raise self._absent(pick, [found, *(c for c in held if c != pick.cls)])

    def _absent(self, pick: Pick, held: Any) -> RecipeError:
        return RecipeError(
            Problem(
                f"`{pick.source}` has no {pick.component or pick.cls}",
                self.recipe.place(*pick.at, value=True),
                (f"it holds {quoted(sorted(held)) or 'nothing that the catalog knows'}",),
            )
        )

    # -- components

    def component(self, output: Output, pick: Pick) -> Key:
        """The node of what fills a slot."""
        model = self.model(pick.source)
        origin = model.origin(pick)
        precision, narrow = output.precision, output.narrow
        if precision == PUBLISHED:
            of_class = model.published() if pick.cls == CHECKPOINT else self._published(pick.cls, origin)
            precision, narrow = of_class, narrow or "fewer"
        job = ComponentJob(
            pick.cls,
            pick.source,
            origin,
            tuple(n for n in output.fixes if self.catalog.applies(n, pick.cls)),
            precision,  # type: ignore[arg-type]
            narrow,  # type: ignore[arg-type]
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
            kept=self._kept(pick.cls, precision),
            quantize=self._quantize(output, pick.cls),
        )
        if isinstance(origin, Finished) and origin.promote is None:
            inner = self.plan.nodes[origin.node].job
            assert isinstance(inner, ComponentJob)
            if inner.params() == job.params():
                return origin.node  # finished in the same way already: it is the component
        if output.precision == "fp16" and pick.cls != CHECKPOINT:
            seen = not self._elsewhere(job)
            held = self._made_of(job) if seen else None
            self._warn_of_fp16(output, self.catalog.classes[pick.cls][0].traits, pick, held)
        named = f" ({pick.component})" if pick.component else ""
        return self._component(job, f"{pick.cls} of {pick.source}{named}", pick)

    def _published(self, cls: str, origin: Origin | None = None) -> str:
        """What the components of a class are published in; `origin` decides where that is not the same."""
        members = self.catalog.classes[cls]
        several = origin is not None and len({c.precision for c in members}) > 1
        name = component_name(self.plan, self.sources, origin) if origin is not None and several else None
        return (self.catalog.components[name] if name is not None else members[0]).precision

    def _kept(self, cls: str, precision: str | None) -> tuple[str, ...]:
        """Patterns of the tensors of a class that a precision is not for."""
        if precision in (None, "keep") or cls == CHECKPOINT:
            return ()
        return self.catalog.classes[cls][0].traits.kept.all

    def _warn_of_fp16(
        self, output: Output, traits: Traits, pick: Pick, held: Mapping[str, LazyTensor] | None
    ) -> None:
        """Warn where programs cannot run in FP16 what is cast to it; `held` is what is cast, where seen."""
        names = self.catalog.classes[pick.cls][0].tensors if held is None else held
        found = [
            n
            for n in names
            if n in traits.overflows
            and n not in traits.kept
            and (held is None or (held[n].dtype.floating and held[n].dtype is not DType.F16))
        ]
        if not found:
            return
        whole = "*" in traits.overflows.all
        evidence = () if whole else (f"{counted(len(found), 'tensor')}, as `{found[0]}`, make it overflow",)
        self.plan.warnings.append(
            Problem(
                f"{pick.cls} of `{pick.source}` is cast to FP16, in which programs "
                + ("do not run it" if whole else "get infinities of it"),
                self.recipe.place(*output.at, "precision", value=True),
                evidence,
                "BF16 has the range for it",
            )
        )

    def _whole(
        self, output: Output, base: SourceJob | None, container: Container, architecture: Architecture
    ) -> Key:
        """The node of all that a base holds."""
        assert base is not None
        precision = "keep" if output.precision == PUBLISHED else output.precision
        exempt = () if precision == "keep" else tuple(sorted({*self.catalog.optional, *self._kept_of(base)}))
        spelt = architecture.slots
        if not container.layout:
            spelt = foreign(self.sources.open(base).identity, self.catalog) if self.sources.seen(base) else ()
        digests = tuple(t for cls in spelt for t in tables(self.catalog, cls, None))
        origin = Whole(base.key, exempt, spelt, digests)
        if precision == "fp16" and self.sources.seen(base):
            opened = self.sources.open(base)
            for match in opened.identity.matches:
                pick = Pick(match.component.cls, base.name)
                held = {bare: opened.checkpoint[full] for bare, full in match.whole.items()}
                self._warn_of_fp16(output, match.component.traits, pick, held)
        job = ComponentJob(
            CHECKPOINT,
            base.name,
            origin,
            (),
            precision,  # type: ignore[arg-type]
            output.narrow,  # type: ignore[arg-type]
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
            quantize=self._quantize(output, *self.catalog.denoisers),
        )
        return self._component(job, f"{CHECKPOINT} {base.name}", Pick(CHECKPOINT, base.name))

    def _kept_of(self, base: SourceJob) -> Iterator[str]:
        """The full names of tensors of a source that no cast touches."""
        matches = self.sources.open(base).identity.matches if self.sources.seen(base) else ()
        for match in matches:
            kept = match.component.traits.kept
            yield from (full for bare, full in match.whole.items() if bare in kept)

    def _quantize(self, output: Output, *classes: str) -> Quantize | None:
        """How an output packs the weights of those of these classes that denoise.

        None of a class of which the catalog says nothing, nor of adapters.
        """
        if output.quantize is None:
            return None
        traits, denoisers = self.catalog.traits, self.catalog.denoisers
        near = {c: traits[c].unquantized.all for c in sorted(classes) if c in denoisers and c in traits}
        return Quantize(output.quantize, near) if near else None

    def _component(self, job: ComponentJob, label: str, pick: Pick) -> Key:
        key = job.key
        if key in self.plan.nodes:
            return key
        action = self.action(job)
        made = self.store.lookup(action, job.cls) if action is not None else None
        # What is to be fetched is seen when it is here, and what is known need not be looked at.
        takes, writes = ({}, made.bytes) if made is not None else self._sizes(job)
        return self.add(
            job,
            label,
            action=action,
            state="make" if made is None else "stored",
            why=self._why(pick, action) if made is None else self._before(action),
            reads=None if takes is None else sum(takes.values()),
            writes=writes,
            made=made,
            takes=takes or {},
        )

    def _before(self, action: str | None) -> str:
        if action is not None and self.store.is_claimed(action):
            return "the shared store says that it was made before"
        return "made before from the same inputs"

    def _sizes(self, job: ComponentJob) -> tuple[Mapping[str, int] | None, int | None]:
        """The bytes that are read for a component, by what is taken of sources, and those that it has.

        None for what is not known yet.
        """
        if self._elsewhere(job):
            return None, None
        reads = sizes_of(self.plan, self.sources, job.origin)
        if job.cls == CHECKPOINT and not isinstance(job.origin, Whole):
            return reads, None  # which tensors an adapter has is known when it is begun
        made_of = self._made_of(job)
        if job.precision == "keep" and (blocks := {b for t in made_of.values() if (b := _blocks(t))}):
            held = " and ".join(sorted(blocks))
            self.plan.say(
                f"`{job.source}` is in blocks of {held}: they become the FP32 numbers that they are"
            )
        packed = packed_anew(made_of, None if job.cls == CHECKPOINT else job.cls, job.quantize, self.catalog)
        specs = component_specs(made_of, job.precision, job.narrow, Patterns(job.kept), packed)
        return reads, sum(d.bits * prod(s) // 8 for d, s in specs.values())

    def _made_of(self, job: ComponentJob) -> Mapping[str, LazyTensor]:
        """What of a source has the names and shapes of a component: of a step, its first input's.

        What is packed is as numbers, where these are wanted.
        """
        origin, decoded, hint = job.origin, job.decodes, job.hint
        while not isinstance(origin, Take | Whole):
            near = self.plan.nodes[origin.node].job
            assert isinstance(near, StepJob | ComponentJob)
            decoded, hint = (True, WIDER) if isinstance(near, StepJob) else (decoded or near.decodes, hint)
            origin = near.inputs_by_name[near.first] if isinstance(near, StepJob) else near.origin
        held = taken(self.plan, self.sources, origin)
        if not decoded:
            return held
        named = component_name(self.plan, self.sources, origin)
        whole_ = None if named == CHECKPOINT else named
        return numbers(held, whole_, self.catalog, hint, place_of(self.plan, self.sources, origin)).tensors

    def _why(self, pick: Pick, action: str | None) -> str:
        if pick.source not in self.recipe.sources or self.recipe.sources[pick.source].recipe is not None:
            return "not made before"
        job = self.source(pick.source)
        if action is None:
            return f"`{pick.source}` is not known yet: it is read and hashed at once"
        now = self.sources.sha256(job)
        if job.locked is not None and now is not None and job.locked.sha256 != now:
            return f"`{pick.source}` is another file than before: {job.locked.sha256[:12]} became {now[:12]}"
        return "not made before"

    def _elsewhere(self, job: ComponentJob) -> bool:
        keys = {job.origin.node, *self.plan.ancestors(job.origin.node)}
        jobs = (self.plan.nodes[k].job for k in keys)
        return any(isinstance(j, SourceJob) and self.sources.find(j) is None for j in jobs)

    # -- what fills an output

    def spelt(self, output: Output) -> Output:
        """An output with the classes and components that its words (`VAE`, `EMA`) mean."""
        picks = output.components
        if all(cls in self.catalog.classes and p.component != EMA for cls, p in picks.items()):
            return output
        base = output.base
        if isinstance(base, NewBase):
            architecture = self.catalog.architecture(base.architecture)
        else:
            architecture = self._base_architecture(base, any_=True)
        found = with_classes(output, architecture, self.catalog)
        return replace(found, components={c: self._average(p) for c, p in found.components.items()})

    def _average(self, pick: Pick) -> Pick:
        """A pick with the component that `EMA` means: the average of its class that the source has."""
        if pick.component != EMA:
            return pick
        known = self.catalog.components
        can = [n for n, c in known.items() if c.average_of and c.base and known[c.base].cls == pick.cls]
        source = self.recipe.sources.get(pick.source)
        if source is not None and source.recipe is None:
            held = {m.component.name for m in self.sources.open(self.source(pick.source)).identity.matches}
            can = [n for n in can if n in held]
        if len(can) == 1:
            return replace(pick, component=can[0])
        fact = f"`{pick.source}` has {'several averages' if can else 'no average'} of `{pick.cls}`"
        hint = f"name the component: {quoted(can)}" if can else None
        raise RecipeError(Problem(fact, self.recipe.place(*pick.at, "component", value=True), hint=hint))

    def filled(self, output: Output) -> tuple[Architecture, dict[str, Pick]]:
        """The architecture of an output, and what fills each of its classes."""
        picks = dict(output.components)
        base = output.base
        held: tuple[str, ...] = ()
        if isinstance(base, NewBase):
            architecture = self.catalog.architecture(base.architecture)
        else:
            architecture = self._base_architecture(base, output.partial and output.unknown == "keep")
            held = self.model(base.name).classes()
            for cls in held:
                if cls in architecture.slots:
                    picks.setdefault(cls, Pick(cls, base.name, None, base.at))
        if problems := tuple(slot_problems(self.recipe, output, architecture, self.catalog, held)):
            raise RecipeError(*problems)
        order = [
            *(s for s in architecture.slots if s in picks),
            *sorted(c for c in picks if c not in architecture.slots),
        ]
        return architecture, {cls: picks[cls] for cls in order}

    def _base_architecture(self, base: FromBase, any_: bool = False) -> Architecture:
        """What a base is; with `any_`, one that is nothing known has no slots."""
        found = self.model(base.name).architecture()
        if found is not None:
            return found
        if any_:
            return Architecture("unknown", ())
        evidence: tuple[str, ...] = ()
        if self._is_file(base):
            identity = self.sources.open(self.source(base.name)).identity
            evidence = (*(r.describe() for r in identity.rejected[:3]), *identity.undecoded)
        raise RecipeError(
            Problem(
                f"`{base.name}` is no architecture that the catalog knows",
                self.recipe.place(*base.at, value=True),
                evidence,
                "`ckpt inspect --full` says what is in it",
            )
        )

    def told(self, output: Output, picks: Mapping[str, Pick], carried: Mapping[str, str]) -> Told:
        """What an output predicts: as its denoiser's source, or else its base, says it, and the recipe."""
        cls = self._denoiser(picks)
        if cls is not None:
            found = self.model(picks[cls].source).told()
        else:
            found = Told(prediction({}, carried, self.catalog))
        own = found.prediction.with_own(output.markers, output.metadata, self.catalog)
        return found._replace(prediction=own)

    def _denoiser(self, picks: Mapping[str, Pick]) -> str | None:
        return next((cls for cls in picks if cls in self.catalog.denoisers), None)

    def _carried(self, base: SourceJob | None) -> Mapping[str, str]:
        """Metadata of the base's own, which outlives a rebuild."""
        if base is None or not self.sources.seen(base):
            return {}
        return carried_metadata(self.sources.open(base).checkpoint)

    def _is_file(self, base: NewBase | FromBase) -> TypeGuard[FromBase]:
        return (
            isinstance(base, FromBase)
            and base.name in self.recipe.sources
            and self.recipe.sources[base.name].recipe is None
        )


def _blocks(tensor: LazyTensor) -> str:
    """The type of the blocks that a tensor lies in; empty where it is as it is read."""
    stored = tensor.stored[0]
    return stored if stored != tensor.dtype.code else ""
