"""From a recipe to its plan: names become nodes, nodes get keys, keys are looked up in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from builder.base.errors import Problem, RecipeError, SourceError, did_you_mean
from builder.base.files import read_bounded
from builder.base.inside import is_inside, leads_out
from builder.formats.write_sharded import SHARD_SIZE, SUFFIX
from builder.models.catalog import PLAIN, Architecture, Names
from builder.models.cut import choose, cut, foreign, usual
from builder.models.identify import EMA, Identity, Match, as_class
from builder.models.parts import kind, words_for
from builder.models.prediction import Prediction, prediction, read_markers
from builder.operations import OPERATIONS
from builder.operations.registry import Operation
from builder.operations.weights import Weights, blocks_of, is_given, of_class, patterns
from builder.plan.folders import VOCABULARY, find_layout, find_prediction, read_vocabulary
from builder.plan.graph import (
    CHECKPOINT,
    Applied,
    Beside,
    ComponentJob,
    Container,
    Finished,
    Job,
    Key,
    LeftOut,
    Node,
    Origin,
    OutputJob,
    Plan,
    State,
    StepJob,
    Take,
    Whole,
    component_specs,
)
from builder.plan.keys import action_key, assembly_key, recall_beside, recall_prediction, tables
from builder.plan.metadata import carried_metadata, stated_metadata
from builder.recipe import FromBase, NewBase, Output, Pick, Recipe, Step, slot_problems
from builder.recipe.check import MAX_STEPS
from builder.recipe.names import SINGLE, Form, form_of
from builder.recipe.profiles import MAX_SIDECAR, sidecar, warnings, with_profile
from builder.recipe.read import outside
from builder.sources.find import recall_files
from builder.sources.job import SourceJob, entry_name
from builder.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.recipe.lock import Lock
    from builder.sources.opened import Sources
    from builder.store import Store


def make_plan(
    recipe: Recipe,
    sources: Sources,
    *,
    lock: Lock | None = None,
    operations: Mapping[str, Operation] = OPERATIONS,
    place: Callable[[Output], str | Path] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Resolve a recipe. Reads tables of contents only, and fetches nothing but those.

    `place` says where an output goes, and in which form, if not as the recipe says. Of `environment`,
    SOURCE_DATE_EPOCH is the date that metadata say.

    Raises RecipeError for what does not fit what the sources hold, SourceError for sources that are
    refused, FetchError for those that are needed and nowhere to be found.
    """
    plan = Plan(recipe, lock)
    resolver = _Resolver(plan, recipe, (), sources, operations)
    for output in recipe.outputs:
        resolver.output(output, place, environment)
    _check_sidecars(plan)
    _check_patterns(plan, sources.catalog)
    _settle(plan, sources)
    return plan


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
    if operation.many is not None:
        found[operation.many] = {n: of_class(w, cls, blocks) for n, w in step.params[operation.many].items()}
    return found


def _leader(step: Step, operation: Operation) -> str:
    """The input whose model a step's is: the first; of a table, whose order is none, that of most weight."""
    if operation.inputs:
        return operation.inputs[0]
    assert operation.many is not None
    shares = {n: w["base"] if isinstance(w, Mapping) else w for n, w in step.params[operation.many].items()}
    return f"{operation.many}.{max(shares, key=shares.__getitem__)}"


class _Told(NamedTuple):
    """What a denoiser predicts; `by` is the source that it comes from, and what that says."""

    prediction: Prediction
    by: tuple[Key, Prediction] | None = None


@dataclass(frozen=True)
class _Model:
    """A source, step or sub-recipe as a set of components, each of which becomes a node when it is taken.

    `told` says what its denoiser predicts.
    """

    name: str
    classes: Callable[[], tuple[str, ...]]
    architecture: Callable[[], Architecture | None]
    origin: Callable[[Pick], Origin]
    told: Callable[[], _Told]
    first: _Model | None = None  # of a step, the one whose classes it changes


class _Resolver:
    """One recipe's part of a plan; `scope` are the names of the sources that lead to it."""

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
        self._models: dict[str, _Model] = {}

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
            said = {n.label for n in self.plan}
            number, unlike = 1, label
            while unlike in said:
                number += 1
                unlike = f"{label} #{number}"
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
            state, why = "fetch", "not on this machine" + (f", but at {where[0]}" if where else "")
        elif found.sha256 is None:
            state, why = "hash", "seen for the first time"
        else:
            state, why = "known", "its digest is known"
        reads = (self.sources.size(job) or 0) if state != "known" else 0
        self.add(job, f"source {name}", action=self.sources.sha256(job), state=state, why=why, reads=reads)
        self.plan.entries[entry] = job
        return job

    # -- models

    def model(self, name: str) -> _Model:
        if name not in self._models:
            if name in self.recipe.steps:
                self._models[name] = self._step(name)
            elif self.recipe.sources[name].recipe is not None:
                self._models[name] = self._sub_recipe(name)
            else:
                self._models[name] = self._source(name)
        return self._models[name]

    def _source(self, name: str) -> _Model:
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

        return _Model(name, classes, architecture, origin, lambda: self._told_by(self.source(name)))

    def _told_by(self, job: SourceJob) -> _Told:
        """What a source says of what its denoiser predicts; it is looked at where that is not remembered."""
        found = recall_prediction(self.store, self.sources.sha256(job), self.catalog)
        if found is None and self._is_seen(job):
            checkpoint = self.sources.open(job).checkpoint
            found = read_markers(prediction(checkpoint, checkpoint.metadata, self.catalog), checkpoint)
        found = found or Prediction()
        return _Told(found, (job.key, found))

    def _is_seen(self, job: SourceJob) -> bool:
        """Whether a source's contents are seen without fetching anything; what is not is noted."""
        seen = self.sources.find(job) is not None or self.sources.is_open(job)
        if not seen and job.key not in self.plan.unseen:
            self.plan.unseen.append(job.key)
        return seen

    def _sub_recipe(self, name: str) -> _Model:
        recipe = self.recipe.included[name]
        inner = _Resolver(self.plan, recipe, (*self.scope, name), self.sources, self.operations)
        output = recipe.output(self.recipe.sources[name].output)
        assert output is not None, "the reader of recipes has seen to it"
        architecture, picks = inner.filled(output)

        def origin(pick: Pick) -> Origin:
            wanted = self.catalog.component(pick.component) if pick.component is not None else None
            cls = wanted.cls if wanted is not None else pick.cls
            if cls not in picks:
                raise self._absent(pick, picks)
            key = inner.component(output, picks[cls])
            promote = None if cls == pick.cls or wanted is None else wanted.name
            finished = Finished(key, promote)
            self._check_component(pick, Finished(key), picks)
            return finished

        return _Model(
            name, lambda: tuple(picks), lambda: architecture, origin, lambda: inner.told(output, picks, {})
        )

    def _step(self, name: str) -> _Model:
        step = self.recipe.steps[name]
        operation = self.operations[step.op]
        files = [p for p in step.inputs if operation.files and p.partition(".")[0] == operation.many]
        models = {p: self.model(n) for p, n in step.inputs.items() if p not in files}
        leader = _leader(step, operation)
        first = models[leader]

        def origin(pick: Pick) -> Origin:
            plain = replace(pick, component=None)
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
                | {p: Whole(self.source(step.inputs[p]).key) for p in files},
                _params(step, operation, pick.cls, self.catalog)
                | ({"classes": list(first.classes())} if files else {}),
                step.arithmetic,  # type: ignore[arg-type]
                step.precision,  # type: ignore[arg-type]
                leader,
            )
            applied = Applied(
                self.add(
                    job,
                    f"step {name} {pick.cls}",
                    action=self.action(job),
                    state="stream",
                    why="computed as it is needed",
                )
            )
            if not step.store:
                return applied
            # Kept as it is, every bit of it, for whoever finishes it.
            kept = ComponentJob(pick.cls, name, applied, (), "keep", False, "keep", "keep", store=True)
            return Finished(self._component(kept, f"{pick.cls} of step {name}", pick))

        return _Model(name, first.classes, first.architecture, origin, first.told, first)

    def _inputs(
        self, step: Step, operation: Operation, pick: Pick, models: Mapping[str, _Model], leader: str
    ) -> dict[str, Origin]:
        """What an operation gets: the class of each input, and where it looks at whole models the others."""
        inputs = {p: self._part_of(m, pick) for p, m in models.items()}
        if operation.whole_models:
            for cls in (c for c in models[leader].classes() if c != pick.cls):
                if self._takes_part(step, operation, cls, models, leader):
                    other = replace(pick, cls=cls)
                    inputs |= {f"{p}@{cls}": self._part_of(m, other) for p, m in models.items()}
        return inputs

    def _part_of(self, model: _Model, pick: Pick) -> Origin:
        """What a model has of a class, or of the one that this widens."""
        return model.origin(replace(pick, cls=self._held(model, pick.cls) or pick.cls))

    def _held(self, model: _Model, cls: str) -> str | None:
        """The class of a model that goes with `cls` in a merge: the same, or the one that this widens."""
        traits = self.catalog.traits.get(cls)
        ways = (cls, traits.widens if traits is not None else None)
        return next((c for c in ways if c in model.classes()), None)

    def _takes_part(
        self, step: Step, operation: Operation, cls: str, models: Mapping[str, _Model], leader: str
    ) -> bool:
        """Whether a step changes a class of its first input; where one may expect it to, why not is said."""
        if step.components and cls not in step.components:
            return False
        traits = self.catalog.traits.get(cls)
        if operation.files:
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
            if given:
                place = self.recipe.place("steps", step.name)
                raise RecipeError(Problem(f"`{absent[0]}` has no {cls} to be merged", place))
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

    def _check_alike(self, step: Step, operation: Operation, models: Mapping[str, _Model]) -> None:
        """Raise RecipeError when a step's inputs have nothing in common that it would change."""
        held = {step.inputs[p]: m.classes() for p, m in models.items()}
        first = models[_leader(step, operation)]
        common = {c for c in first.classes() if all(self._held(m, c) for m in models.values())}
        merged = {c for c in common if kind(c) != "VAE" or step.vae or _given(step, operation, c)}
        if merged & set(step.components or merged):
            return
        place = self.recipe.place("steps", step.name)
        fact = f"the step `{step.name}` has nothing to work on: its inputs are not of one kind"
        raise RecipeError(
            Problem(fact, place, tuple(f"`{n}` holds {_words(classes)}" for n, classes in held.items()))
        )

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
                (f"it holds {_words(sorted(held)) or 'nothing that the catalog knows'}",),
            )
        )

    # -- components

    def component(self, output: Output, pick: Pick) -> Key:
        """The node of what fills a slot."""
        origin = self.model(pick.source).origin(pick)
        job = ComponentJob(
            pick.cls,
            pick.source,
            origin,
            tuple(n for n in output.fixes if self.catalog.applies(n, pick.cls)),
            output.precision,  # type: ignore[arg-type]
            output.narrow,  # type: ignore[arg-type]
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
        )
        if isinstance(origin, Finished) and origin.promote is None:
            inner = self.plan.nodes[origin.node].job
            assert isinstance(inner, ComponentJob)
            if inner.params() == job.params():
                return origin.node  # finished in the same way already: it is the component
        named = f" ({pick.component})" if pick.component else ""
        return self._component(job, f"{pick.cls} of {pick.source}{named}", pick)

    def _whole(
        self, output: Output, base: SourceJob | None, container: Container, architecture: Architecture
    ) -> Key:
        """The node of all that a base holds."""
        assert base is not None
        exempt = () if output.precision == "keep" else tuple(sorted(self.catalog.optional))
        spelt = architecture.slots
        if not container.layout:
            spelt = foreign(self.sources.open(base).identity, self.catalog) if self.sources.seen(base) else ()
        digests = tuple(t for cls in spelt for t in tables(self.catalog, cls, None))
        origin = Whole(base.key, exempt, spelt, digests)
        job = ComponentJob(
            CHECKPOINT,
            base.name,
            origin,
            (),
            output.precision,  # type: ignore[arg-type]
            output.narrow,  # type: ignore[arg-type]
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
        )
        return self._component(job, f"{CHECKPOINT} {base.name}", Pick(CHECKPOINT, base.name))

    def _component(self, job: ComponentJob, label: str, pick: Pick) -> Key:
        key = job.key
        if key in self.plan.nodes:
            return key
        action = self.action(job)
        made = self.store.lookup(action, job.cls) if action is not None else None
        # What is to be fetched is seen when it is here, and what is known need not be looked at.
        unseen = made is not None or self._elsewhere(job)
        specs = {} if unseen else to_read(self.plan, self.sources, job.origin)
        made_of = {} if unseen else to_read(self.plan, self.sources, self._shaped_as(job.origin))
        sizes = component_specs(made_of, job.precision, job.narrow).values()
        return self.add(
            job,
            label,
            action=action,
            state="make" if made is None else "stored",
            why=self._why(pick, action) if made is None else "made before from the same inputs",
            reads=sum(t.nbytes for t in specs.values()),
            writes=made.bytes if made is not None else sum(d.bits * prod(s) // 8 for d, s in sizes),
            made=made,
        )

    def _shaped_as(self, origin: Origin) -> Origin:
        """What has the names and shapes of an origin: of a step, its first input."""
        job = self.plan.nodes[origin.node].job
        return self._shaped_as(job.inputs_by_name[job.first]) if isinstance(job, StepJob) else origin

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

    # -- outputs

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
            rejected = self.sources.open(self.source(base.name)).identity.rejected
            evidence = tuple(r.describe() for r in rejected[:3])
        raise RecipeError(
            Problem(
                f"`{base.name}` is no architecture that the catalog knows",
                self.recipe.place(*base.at, value=True),
                evidence,
                "`ckpt inspect --full` says what is in it",
            )
        )

    def output(
        self, output: Output, place: Callable[[Output], str | Path] | None, environment: Mapping[str, str]
    ) -> None:
        """Plan an output and all that it needs."""
        output = replace(output, fixes=with_profile(output.fixes, output.profile))
        name = str(place(output)) if place is not None else output.file
        target, form = (Path(name) if place is not None else self._target(output)), form_of(name)
        base = self.source(output.base.name) if self._is_file(output.base) else None
        carried = self._carried(base)
        picks: dict[str, Pick] = {}
        sidecar_: bytes | None = None
        if output.verbatim and isinstance(output.base, FromBase):
            architecture, beside = self._base_architecture(output.base, any_=True), Beside()
            told = _Told(Prediction())
            metadata = {**carried, **output.metadata}
            container = self._container(output, target, form, architecture, base, told.prediction)
            nodes = {CHECKPOINT: self._whole(output, base, container, architecture)}
        else:
            architecture, picks = self.filled(output)
            nodes = {cls: self.component(output, pick) for cls, pick in picks.items()}
            told = self.told(output, picks, carried)
            denoiser = self._denoiser(picks)
            called = self._name(nodes[denoiser], told) if denoiser is not None else None
            spec = (self.catalog.components[called].modelspec if called else None) or architecture.modelspec
            beside = self._beside(output, architecture, base, told.prediction, denoiser is not None)
            stated = told.prediction.stated(spec, self.catalog)
            metadata = stated_metadata(self.recipe, output, spec, stated, carried, environment)
            container = self._container(output, target, form, architecture, base, told.prediction)
            if form in SINGLE:
                usual_ = self._is_usual(called, architecture)
                sidecar_ = self._sidecar(output, architecture, told.prediction, usual_)
        job = OutputJob(
            self.recipe,
            output,
            target,
            architecture,
            {cls: (self._written(cls, architecture), node) for cls, node in nodes.items()},
            base.key if base is not None else None,
            beside,
            metadata,
            sidecar_,
            container,
            told.by,
        )
        denoiser = self._denoiser(picks)
        if denoiser is not None and (signs := told.prediction.contradiction):
            self.plan.warnings.append(
                Problem(
                    f"what is said of the {denoiser} of `{picks[denoiser].source}` contradicts itself",
                    self.recipe.place(*picks[denoiser].at),
                    signs,
                    f"it is taken as {told.prediction.kind}; a recipe says otherwise by `markers` and "
                    "`modelspec.prediction_type` of an output",
                )
            )
        self.plan.warnings += warnings(output.profile, architecture, told.prediction, job.sidecar, target)
        parts = [self.plan.nodes[n] for n in nodes.values()]
        size = sum(p.writes for p in parts)
        key = self.add(
            job, f"output {output.file}", action=None, state="make", why="", reads=size, writes=size
        )
        node = self._state(self.plan.nodes[key], job, parts, base)
        self.plan.nodes[key] = node

    def told(self, output: Output, picks: Mapping[str, Pick], carried: Mapping[str, str]) -> _Told:
        """What an output predicts: as its denoiser's source, or else its base, says it, and the recipe."""
        cls = self._denoiser(picks)
        if cls is not None:
            found = self.model(picks[cls].source).told()
        else:
            found = _Told(prediction({}, carried, self.catalog))
        own = found.prediction.with_own(output.markers, output.metadata, self.catalog)
        return found._replace(prediction=own)

    def _denoiser(self, picks: Mapping[str, Pick]) -> str | None:
        return next((cls for cls in picks if cls in self.catalog.denoisers), None)

    def _name(self, key: Key, told: _Told) -> str | None:
        """The catalog's name of a denoiser; None where what it comes from cannot be seen from here."""
        node = self.plan.nodes[key]
        if node.made is not None:
            return node.made.component
        job = self.plan.nodes[told.by[0]].job if told.by is not None else None
        assert isinstance(node.job, ComponentJob) and isinstance(job, SourceJob)
        return component_name(self.plan, self.sources, node.job.origin) if self._is_seen(job) else None

    def _state(self, node: Node, job: OutputJob, parts: list[Node], base: SourceJob | None) -> Node:
        waiting = [p.label for p in parts if p.made is None]
        if base is not None and not self.sources.seen(base):
            self.plan.unseen.append(base.key)
            return replace(node, why=f"what else is in `{base.name}` is seen when it is here")
        if waiting:
            all_ = "all" if len(waiting) == len(parts) else _words(waiting)
            return replace(node, why=f"of {len(parts)} components, {all_} to be made")
        known = self.sources.sha256(base) if base is not None else None
        if (beside := recall_beside(self.store, known, job.beside)) is None:
            why = f"what lies beside the components of `{base and base.name}` was not read"
            return replace(node, why=why)
        digests = {cls: self.plan.nodes[n].made for cls, (_, n) in job.slots.items()}
        action = assembly_key(job, {cls: m.digest for cls, m in digests.items() if m is not None}, beside)
        state, why = output_state(self.store, action, job)
        if state == "unchanged":
            return replace(node, action=action, state=state, why=why, reads=0, writes=0)
        return replace(node, action=action, state=state, why=why)

    def _sidecar(
        self, output: Output, architecture: Architecture, told: Prediction, usual: bool
    ) -> bytes | None:
        """What is to lie beside the output as its `.yaml`; raises RecipeError when it cannot be read.

        The catalog's own are for the `usual` denoiser.
        """
        if output.config is None:
            return sidecar(output.profile, architecture, told) if usual else None
        folder = self.recipe.path.parent if self.recipe.path else Path()
        place = self.recipe.place(*output.at, "config", value=True)
        if (why := leads_out(folder, output.config)) is not None:
            raise RecipeError(outside(output.config, why, place))
        try:
            return read_bounded(folder / output.config, MAX_SIDECAR, follow=False)
        except OSError as error:
            evidence = (str(error.strerror),)
            raise RecipeError(Problem(f"cannot read `{output.config}`", place, evidence)) from None

    def _is_usual(self, name: str | None, architecture: Architecture) -> bool:
        """Whether a denoiser is the standard one of its class, or an average of that."""
        component = self.catalog.components[name] if name is not None else None
        members = self.catalog.classes[architecture.slots[0]] if architecture.slots else ()
        return component is not None and members[0].name in (component.name, component.base)

    def _target(self, output: Output) -> Path:
        """Where an output goes, by the recipe; raises RecipeError when a link leads out of its folder."""
        folder = self.recipe.path.parent if self.recipe.path else Path()
        path = folder / output.file
        if self.recipe.path is not None and not is_inside(path.parent, folder):
            place = self.recipe.place(*output.at, "file", value=True)
            raise RecipeError(outside(output.file, "a link leads out of it", place))
        return path

    def _container(
        self,
        output: Output,
        target: Path,
        form: Form,
        architecture: Architecture,
        base: SourceJob | None,
        told: Prediction,
    ) -> Container:
        """How an output is written; raises RecipeError, or SourceError for a base that cannot be so."""
        if form == "sharded":
            stem = target.name[: -len(SUFFIX)]
            return Container(form, stem=stem, shard_size=output.shard_size or SHARD_SIZE)
        if form != "diffusers":
            return Container(form, nesting="state_dict" if form == "torch" and not output.verbatim else "")
        opened = self.sources.open(base) if base is not None and self.sources.seen(base) else None
        name = output.name
        if output.verbatim and opened is not None:
            name = opened.checkpoint.name
            told = prediction(opened.checkpoint, opened.checkpoint.metadata, self.catalog)
            if not opened.identity.intact:
                architecture = Architecture(opened.identity.architecture or "unknown", ())
        layout = find_layout(name, architecture, told, self.catalog)
        if isinstance(layout, Problem):
            place = self.recipe.place(*output.at, "file", value=True)
            raise (SourceError if output.verbatim else RecipeError)(replace(layout, place=place))
        found = output.prediction or find_prediction(name, told, layout)
        if isinstance(found, Problem) and (base is None or opened is not None):
            raise RecipeError(replace(found, place=self.recipe.place(*output.at, "file", value=True)))
        return Container(
            form,
            shard_size=output.shard_size,
            layout=layout.name,
            prediction="v" if found == "v" else "epsilon",
            zero_snr=told.zero_snr,
            vocabulary=self._vocabulary(output),
        )

    def _vocabulary(self, output: Output) -> dict[str, bytes]:
        """The files of an output's tokenizer; raises RecipeError when they cannot be read."""
        if output.tokenizer is None:
            return {}
        folder = self.recipe.path.parent if self.recipe.path else Path()
        place = self.recipe.place(*output.at, "tokenizer", value=True)
        for name in VOCABULARY if self.recipe.path else ():
            if (why := leads_out(folder, f"{output.tokenizer}/{name}")) is not None:
                raise RecipeError(outside(output.tokenizer, why, place))
        try:
            return read_vocabulary(folder / output.tokenizer)
        except OSError as error:
            fact = f"cannot read `{Path(error.filename).name}` of `{output.tokenizer}`"
            raise RecipeError(Problem(fact, place, (str(error.strerror),))) from None

    def _written(self, cls: str, architecture: Architecture) -> Names:
        if cls == CHECKPOINT:
            return PLAIN
        if architecture.bare:
            return self.catalog.classes[cls][0].alone
        if cls in architecture.slots:
            return Names(self.catalog.component_for(cls, architecture).prefix)
        return Names(self.catalog.classes[cls][0].prefix)

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

    def _beside(
        self,
        output: Output,
        architecture: Architecture,
        base: SourceJob | None,
        told: Prediction,
        denoiser: bool,
    ) -> Beside:
        """What of the base the output keeps beside its components, and markers; never cast.

        The markers of the base go with its `denoiser`, where the output has one: they are not the base's.
        """
        if base is None or not self.sources.seen(base):
            return Beside(markers=told.markers)
        opened = self.sources.open(base)
        identity, held = opened.identity, opened.checkpoint
        parts = [m for m in identity.matches if m.component.cls in architecture.slots]
        taken = {full for m in parts for full in m.full}
        optional = self._optional(base, output)
        if denoiser and output.keep is None:
            markers = prediction(held, {}, self.catalog).names
            optional = [n for n in optional if n not in markers]
        astray = {full for m in identity.astray for full in m.full}
        kept = {*optional, *_named(output.keep or (), identity)}
        if output.unknown == "keep":
            kept |= held.keys() - {*identity.ema, *identity.junk, *identity.optional, *astray}
        own = told.names if denoiser else ()
        names = tuple(n for n in held if n in kept and n not in taken and n not in own)
        self._account(base, output, {*taken, *names, *own})
        return Beside(names, tuple(m for m in told.markers if m.name not in names))

    def _optional(self, base: SourceJob, output: Output) -> list[str]:
        """The optional tensors of a base that are kept; raises RecipeError for a name that it has not."""
        opened = self.sources.open(base)
        if output.keep is None:
            averaged = any(map(self.catalog.is_average, output.components))
            return [n for n in opened.identity.optional if averaged or not n.startswith(EMA)]
        there = {*opened.checkpoint, *(w for m in opened.identity.astray for w in words_for(m))}
        absent = [n for n in output.keep if n not in there and n not in self.catalog.optional]
        if absent:
            place = self.recipe.place(*output.at, "keep", output.keep.index(absent[0]), value=True)
            hint = did_you_mean(absent[0], there)
            raise RecipeError(Problem(f"`{base.name}` has no tensor `{absent[0]}`", place, hint=hint))
        return [n for n in opened.identity.optional if n in output.keep]

    def _account(self, base: SourceJob, output: Output, kept: Set[str]) -> None:
        """Note what of a base is left out; raises SourceError when that is most of it."""
        opened = self.sources.open(base)
        identity = opened.identity
        sorted_out = {*identity.ema, *identity.junk, *identity.optional}
        astray = {m.component.name: m.full for m in identity.astray}
        sorted_out.update(*astray.values())
        rest = [n for n in opened.checkpoint if n not in sorted_out]
        state = [n for n in identity.optional if n.startswith(EMA)]
        reasons = {
            "EMA": (*identity.ema, *state),
            "junk": identity.junk,
            "extra": [n for n in identity.optional if n not in state],
            "unknown": rest,
            **astray,
        }
        names = {r: tuple(n for n in found if n not in kept) for r, found in reasons.items()}
        if any(map(self.catalog.is_average, output.components)):
            names.pop("EMA")
        sizes = {k: sum(opened.checkpoint[n].nbytes for n in v) for k, v in names.items()}
        left = {k: v for k, v in names.items() if v}
        self.plan.left_out.append(LeftOut(base.name, output.file, left, sizes))
        total = sum(t.nbytes for t in opened.checkpoint.values())
        lost = sum(size for reason, size in sizes.items() if reason not in ("EMA", "extra"))
        if output.unknown == "drop" and 2 * lost > total:
            raise SourceError(
                Problem(
                    f"most of `{base.name}` would be left out",
                    self.recipe.place(*output.base.at, value=True),
                    (f"{lost:,} of {total:,} bytes belong to no component that the catalog knows",),
                    "name what you want of it under [components], with a `NEW` base",
                )
            )


def _named(keep: Sequence[str], identity: Identity) -> set[str]:
    """The tensors that words under `keep` mean, which may be components that have no slot."""
    parts = [m for m in identity.astray if not set(words_for(m)).isdisjoint(keep)]
    return {*keep, *(full for m in parts for full in m.full)}


def _check_sidecars(plan: Plan) -> None:
    """Raise RecipeError when two outputs would share a configuration, or one lies on top of a source."""
    taken: dict[Path, str] = {}
    for job in (n.job for n in plan.outputs()):
        assert isinstance(job, OutputJob)
        if job.sidecar is None:
            continue
        beside = job.target.with_suffix(".yaml")
        if beside in taken:
            place = job.recipe.place(*job.output.at)
            evidence = (f"`{taken[beside]}` and `{job.output.file}` both have it beside them",)
            hint = "give one of them another name"
            raise RecipeError(Problem(f"two outputs share `{beside.name}`", place, evidence, hint))
        taken[beside] = job.output.file


def _check_patterns(plan: Plan, catalog: Catalog) -> None:
    """Have it noted which patterns over tensors' names match none, in any class that their step changes."""
    names: dict[tuple[str, str], set[str]] = {}
    for job in (n.job for n in plan):
        if isinstance(job, StepJob):
            for pattern in _patterns(job.params):
                known = {n for c in catalog.classes[job.cls] for n in c.tensors}
                names.setdefault((job.step, pattern), set()).update(known)
    for (step, pattern), known in names.items():
        if not any(fnmatchcase(name, pattern) for name in known):
            plan.say(f"step `{step}`: the pattern `{pattern}` is of no tensor")


def _patterns(params: Mapping[str, Any]) -> list[str]:
    inner = (v for v in params.values() if isinstance(v, Mapping))
    return [*patterns(params), *(p for v in inner for p in _patterns(v))]


def _settle(plan: Plan, sources: Sources) -> None:
    """Say of each component what will be done with it, now that the outputs are known."""
    slots = {n: o for o in plan.outputs() if isinstance(o.job, OutputJob) for _, n in o.job.slots.values()}
    writing = {
        n
        for o in plan.outputs()
        if isinstance(o.job, OutputJob) and o.state != "unchanged"
        for _, n in o.job.slots.values()
    }
    for node in list(plan):
        if not isinstance(node.job, ComponentJob):
            continue
        here = node.made is not None and sources.store.holds(node.made.digest)
        if node.key not in slots and not node.job.store and not here:
            plan.nodes[node.key] = replace(node, state="stream", why="computed as it is needed")
        elif node.key in writing and node.made is not None and not here:
            why = "made before, but its bytes are nowhere any more"
            near = {node.job.origin.node, *plan.ancestors(node.job.origin.node)}
            jobs = [plan.nodes[k].job for k in near]
            seen = all(sources.find(j) is not None for j in jobs if isinstance(j, SourceJob))
            specs = to_read(plan, sources, node.job.origin) if seen else {}
            reads = sum(t.nbytes for t in specs.values())
            plan.nodes[node.key] = replace(node, state="make", why=why, reads=reads)


def output_state(store: Store, action: str, job: OutputJob) -> tuple[State, str]:
    """Whether what is in an output's place is what the assembly of this key makes, and why."""
    written, single = store.recall("output", action), job.container.single
    what = "file" if single else "set" if job.container.form == "sharded" else "folder"
    try:
        stat = job.target.stat()
    except OSError:
        return "make", f"there is no such {what} yet" if written is None else f"the {what} is gone"
    if written is None:
        return "make", "its contents have changed"
    try:
        known = store.remembered_sha256(stat) if single else recall_files(job.target, store)[0]
    except SourceError:  # a part of it is missing, or is none
        return "make", f"the {what} is not what was built"
    if known == written["sha256"]:
        return "unchanged", f"the {what} is what it would become"
    if known is None and (not single or stat.st_size == written["size"]):
        return "hash", f"the {what} may be it already: it is hashed first"
    return "make", f"the {what} is not what was built"


def to_read(plan: Plan, sources: Sources, origin: Origin) -> Mapping[str, LazyTensor]:
    """The tensors to be read for a component; raises RecipeError when a source does not have it."""
    node = plan.nodes[origin.node]
    if isinstance(origin, Take):
        assert isinstance(node.job, SourceJob)
        opened = sources.open(node.job)
        match = match_of(node.job, origin, sources)
        return cut(opened.checkpoint, opened.identity, match, origin.cls).tensors
    if isinstance(origin, Whole):
        assert isinstance(node.job, SourceJob)
        return whole(node.job, origin, sources)
    if isinstance(node.job, StepJob):
        inputs = {p: to_read(plan, sources, o) for p, o in node.job.inputs_by_name.items()}
        return {f"{p}/{n}": t for p, tensors in inputs.items() for n, t in tensors.items()}
    assert isinstance(node.job, ComponentJob)
    return to_read(plan, sources, node.job.origin)


def component_name(plan: Plan, sources: Sources, origin: Origin) -> str | None:
    """The catalog's name of what an origin gives; None where its source cannot be seen from here."""
    node = plan.nodes[origin.node]
    if isinstance(origin, Take):
        assert isinstance(node.job, SourceJob)
        if not sources.seen(node.job):
            return None
        return match_of(node.job, origin, sources).component.name
    if isinstance(origin, Whole):
        return CHECKPOINT
    if isinstance(node.job, StepJob):
        return component_name(plan, sources, node.job.inputs_by_name[node.job.first])
    assert isinstance(node.job, ComponentJob)
    return component_name(plan, sources, node.job.origin)


def whole(job: SourceJob, origin: Whole, sources: Sources) -> dict[str, LazyTensor]:
    """All tensors of a source; raises SourceError where two would have one name."""
    opened = sources.open(job)
    return usual(opened.checkpoint, opened.identity, origin.spelt, sources.catalog)


def match_of(job: SourceJob, take: Take, sources: Sources) -> Match:
    """What of a source is taken; raises RecipeError, where the recipe asks for it, when it is not there."""
    opened = sources.open(job)
    match = choose(opened.checkpoint, opened.identity, take.cls, take.component, sources.catalog)
    if match is not None:
        return match
    wanted = take.component or take.cls
    near = [r for r in opened.identity.rejected if wanted in (r.component.name, r.component.cls)]
    evidence = [r.describe() for r in near[:2]]
    hint = near[0].hint if near else None
    alike = [m for m in opened.identity.matches if as_class(m, take.cls, opened.checkpoint, sources.catalog)]
    if len(alike) > 1:
        several = _words(f"{m.component.name} under {m.prefix}" for m in alike)
        evidence.append(f"it may be either of {several}")
        hint = "`ckpt extract` writes the one that you mean as a file of its own"
    held = sorted({m.component.name for m in opened.identity.matches})
    raise RecipeError(
        Problem(
            f"`{job.name}` has no {wanted}",
            take.place,
            (*evidence, f"it holds {_words(held) or 'nothing that the catalog knows'}"),
            hint,
        )
    )


def _words(names: Any) -> str:
    return ", ".join(f"`{n}`" for n in names)
