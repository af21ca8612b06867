"""From a recipe to its plan: names become nodes, nodes get keys, keys are looked up in the store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from builder.base.errors import Problem, RecipeError, SourceError, did_you_mean
from builder.base.progress import SILENT, Reporter
from builder.models.catalog import Architecture
from builder.models.identify import EMA, Match
from builder.operations.registry import OPERATIONS, Operation
from builder.plan.graph import (
    Applied,
    ComponentJob,
    Finished,
    LeftOut,
    Node,
    Origin,
    OutputJob,
    Plan,
    SourceJob,
    State,
    StepJob,
    Take,
    component_specs,
)
from builder.plan.keys import assembly_key, component_key, known_extras, step_key
from builder.plan.metadata import stated_metadata
from builder.recipe import FromBase, NewBase, Output, Pick, Recipe, slot_problems
from builder.recipe.profiles import sidecar, warnings, with_profile
from builder.sources.find import model_folders
from builder.sources.opened import Sources
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.recipe.lock import Lock
    from builder.sources.net.client import Session
    from builder.store import Store


def make_plan(
    recipe: Recipe,
    *,
    catalog: Catalog,
    store: Store,
    folders: Sequence[Path] | None = None,
    lock: Lock | None = None,
    operations: Mapping[str, Operation] = OPERATIONS,
    place: Callable[[Output], Path] | None = None,
    network: Callable[[], Session] | None = None,
    download: bool = False,
    reporter: Reporter = SILENT,
) -> Plan:
    """Resolve a recipe. Reads tables of contents only.

    `place` says where an output goes, if not where the recipe says. Over `network` tables of contents are
    read on their hosts, and with `download` a source is fetched where that cannot be.

    Raises RecipeError for what does not fit what the sources hold, SourceError for sources that are
    refused, FetchError for those that are needed and nowhere to be found.
    """
    plan = Plan(recipe, lock)
    folders = folders if folders is not None else model_folders()
    around = _Surroundings(catalog, store, operations)
    try:
        sources = Sources(recipe, catalog, store, folders, reporter, lock, network, download)
        _Resolver(plan, recipe, sources, around, place).outputs()
    except BaseException:
        plan.close()
        raise
    return plan


@dataclass
class _Model:
    """A source, step or sub-recipe as a set of components."""

    classes: tuple[str, ...]
    origin: Callable[[Pick], Origin]


@dataclass(frozen=True)
class _Surroundings:
    """What a recipe and those that it includes have in common."""

    catalog: Catalog
    store: Store
    operations: Mapping[str, Operation]


class _Resolver:
    """One recipe's part of a plan; the scope of its sources stands before the ids of its nodes."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        sources: Sources,
        around: _Surroundings,
        place: Callable[[Output], Path] | None,
    ) -> None:
        self.plan = plan
        self.recipe = recipe
        self.scope = sources.scope
        self.around = around
        self.catalog = around.catalog
        self.store = around.store
        self.place = place
        self.sources = sources
        plan.sources.append(sources)
        self._models: dict[str, _Model] = {}

    # -- nodes

    def source_node(self, name: str) -> str:
        id_ = f"{self.scope}source {name}"
        if id_ in self.plan.nodes:
            return id_
        sha256 = self.sources.sha256(name)
        found = self.sources.find(name)
        state: State
        if found is None:
            where = self.sources.addresses(name)
            state, why = "fetch", "not on this machine" + (f", but at {where[0]}" if where else "")
        elif found.sha256 is None:
            state, why = "hash", "seen for the first time"
        else:
            state, why = "known", "its digest is known"
        reads = (self.sources.size(name) or 0) if state != "known" else 0
        return self.plan.add(Node(id_, SourceJob(self.sources, name), sha256, state, why, reads), ())

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
        def origin(pick: Pick) -> Origin:
            return Take(self.source_node(name), self.sources, name, pick.cls, pick.component, pick.at)

        # A source that is not here may not be needed: its classes are asked for only when it is a base.
        return _Model((), origin)

    def _sub_recipe(self, name: str) -> _Model:
        recipe = self.recipe.included[name]
        inner = _Resolver(self.plan, recipe, self.sources.inner(name), self.around, None)
        output = recipe.output(self.recipe.sources[name].output)
        assert output is not None, "the reader of recipes has seen to it"
        _, slots = inner.slots(output)
        return _Model(tuple(slots), lambda pick: Finished(slots[pick.cls]))

    def _step(self, name: str) -> _Model:
        step = self.recipe.steps[name]
        operation = self.around.operations[step.op]
        models = {p: self.model(n) for p, n in step.inputs.items()}
        first = step.inputs[operation.inputs[0]]
        classes = self.classes(first)

        def origin(pick: Pick) -> Origin:
            if step.components and pick.cls not in step.components:
                return models[operation.inputs[0]].origin(pick)
            inputs = {p: m.origin(replace(pick, component=None)) for p, m in models.items()}
            job = StepJob(name, pick.cls, operation, inputs, step.params, step.store)
            node = Node(
                f"{self.scope}step {name} {pick.cls}",
                job,
                step_key(self.plan, job),
                "stream",
                "computed as it is needed",
            )
            applied = Applied(self.plan.add(node, [o.node for o in inputs.values()]))
            return Finished(self._stored_step(name, pick.cls, applied)) if step.store else applied

        return _Model(classes, origin)

    def _stored_step(self, name: str, cls: str, origin: Applied) -> str:
        """The node of a step's component as it is kept: every bit of it, for whoever finishes it."""
        job = ComponentJob(cls, name, origin, (), "keep", False, "keep", "keep")
        id_ = f"{self.scope}{cls} of step {name}"
        return id_ if id_ in self.plan.nodes else self._component(id_, job, Pick(cls, name))

    def classes(self, name: str) -> tuple[str, ...]:
        """The classes that a model has components of."""
        model = self.model(name)
        if model.classes or name in self.recipe.steps:
            return model.classes
        if (known := self.sources.known_architecture(name)) is not None:
            return self.catalog.architecture(known).slots
        identity = self.sources.open(name).identity
        return tuple(dict.fromkeys(m.component.cls for m in identity.matches if not m.ema))

    # -- components

    def component_node(self, output: Output, pick: Pick) -> str:
        model = self.model(pick.source)
        origin = model.origin(pick)
        job = ComponentJob(
            pick.cls,
            pick.source,
            origin,
            tuple(n for n in output.fixes if self.catalog.applies(n, pick.cls)),
            output.precision,  # type: ignore[arg-type]
            output.narrow,
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
        )
        if isinstance(origin, Finished):
            inner = self.plan.node(origin.node)
            assert isinstance(inner.job, ComponentJob)
            if inner.job.params() == job.params():
                return str(inner.id)  # finished in the same way already: it is the component
        id_ = self._component_id(job, pick)
        return id_ if id_ in self.plan.nodes else self._component(id_, job, pick)

    def _component(self, id_: str, job: ComponentJob, pick: Pick) -> str:
        origin = job.origin
        key = component_key(self.plan, job)
        made = self.store.lookup(key) if key is not None else None
        node = Node(id_, job, key, "stored", "made before from the same inputs", made=made)
        if made is None:
            node.state, node.why = "make", self._why(pick, node)
            # What is to be fetched is seen when it is here.
            specs = {} if self._elsewhere(origin) else to_read(self.plan, origin)
            node.reads = sum(t.nbytes for t in specs.values())
            node.writes = sum(
                d.bits * prod(s) // 8 for d, s in component_specs(specs, job.precision, job.narrow).values()
            )
        return self.plan.add(node, [origin.node])

    def _component_id(self, job: ComponentJob, pick: Pick) -> str:
        base = f"{self.scope}{pick.cls} of {pick.source}" + (f" ({pick.component})" if pick.component else "")
        # Outputs that want the same share it; those that want it otherwise get a node of their own.
        same = [n for n in self.plan.nodes if n == base or n.startswith(f"{base} #")]
        for name in same:
            other = self.plan.node(name)
            if isinstance(other.job, ComponentJob) and other.job.params() == job.params():
                return name
        return f"{base} #{len(same) + 1}" if same else base

    def _why(self, pick: Pick, node: Node) -> str:
        if node.key is None:
            return f"waits for the digest of `{pick.source}`"
        locked = self.sources.locked(pick.source)
        now = self.sources.sha256(pick.source) if pick.source in self.recipe.sources else None
        if locked is not None and now is not None and locked.sha256 != now:
            return f"`{pick.source}` is another file than before: {locked.sha256[:12]} became {now[:12]}"
        return "not in the store"

    def _elsewhere(self, origin: Origin) -> bool:
        jobs = (self.plan.node(n).job for n in {origin.node, *self.plan.ancestors(origin.node)})
        return any(isinstance(j, SourceJob) and j.sources.remote(j.source) for j in jobs)

    # -- outputs

    def slots(self, output: Output) -> tuple[Architecture, dict[str, str]]:
        """The architecture of an output, and the node that fills each of its classes."""
        picks = dict(output.components)
        base = output.base
        if isinstance(base, NewBase):
            architecture = self.catalog.architecture(base.architecture)
        else:
            architecture = self._base_architecture(base, output.partial and output.unknown == "keep")
            for cls in self.classes(base.name):
                if cls in architecture.slots:
                    picks.setdefault(cls, Pick(cls, base.name, None, base.at))
        held = () if isinstance(base, NewBase) else self.classes(base.name)
        if problems := tuple(slot_problems(self.recipe, output, architecture, self.catalog, held)):
            raise RecipeError(*problems)
        order = [
            *(s for s in architecture.slots if s in picks),
            *sorted(c for c in picks if c not in architecture.slots),
        ]
        return architecture, {cls: self.component_node(output, picks[cls]) for cls in order}

    def _base_architecture(self, base: FromBase, any_: bool = False) -> Architecture:
        """What a base is; with `any_`, one that is nothing known has no slots."""
        if base.name in self.recipe.steps:
            step = self.recipe.steps[base.name]
            first = step.inputs[self.around.operations[step.op].inputs[0]]
            return self._base_architecture(FromBase(first, base.at))
        if self.recipe.sources[base.name].recipe is not None:
            classes = set(self.model(base.name).classes)
            for architecture in self.catalog.architectures.values():
                if set(architecture.slots) == classes:
                    return architecture
        if (known := self.sources.known_architecture(base.name)) is not None:
            return self.catalog.architecture(known)
        identity = self.sources.open(base.name).identity
        name = identity.architecture if identity.intact else identity.incomplete
        if name is None and any_:
            return Architecture("unknown", ())
        if name is None:
            raise RecipeError(
                Problem(
                    f"`{base.name}` is no architecture that the catalog knows",
                    self.recipe.place(*base.at, value=True),
                    tuple(
                        f"{r.component.name}: {r.total - r.present:,} of {r.total:,} tensors are missing"
                        for r in identity.rejected[:3]
                    ),
                    "`ckpt inspect --full` says what is in it",
                )
            )
        return self.catalog.architecture(name)

    def outputs(self) -> None:
        for output in self.recipe.outputs:
            self._output(output)

    def _output(self, output: Output) -> None:
        output = replace(output, fixes=with_profile(output.fixes, output.profile))
        architecture, nodes = self.slots(output)
        slots = {cls: (self._prefix(cls, architecture), node) for cls, node in nodes.items()}
        stated = stated_metadata(self.recipe, output, architecture, self._carried(output), os.environ)
        base = self.source_node(output.base.name) if self._is_file(output.base) else None
        extras, config = self._extras(output, architecture), self._sidecar(output, architecture)
        job = OutputJob(
            self.recipe, output, self.target(output), architecture, slots, base, extras, stated, config
        )
        self.plan.warnings += warnings(output.profile, output.markers, job.target)
        parts = [self.plan.node(n) for n in nodes.values()]
        size = sum(p.made.bytes if p.made is not None else p.writes for p in parts)
        node = Node(f"output {output.file}", job, None, "make", "", size, size)
        waiting = [p.id for p in parts if p.made is None]
        if base is not None and not self._is_seen(output.base):
            self.plan.unseen.append(base)
            node.why = f"what else is in `{base}` is seen when it is here"
        elif waiting:
            all_ = "all" if len(waiting) == len(parts) else _words(waiting)
            node.why = f"of {len(parts)} components, {all_} to be made"
        elif (found := known_extras(self.plan, job, self.store)) is None:
            node.why = f"what lies beside the components of `{base}` was not read yet"
        else:
            digests = {p.id: p.made.digest.xxh3 for p in parts if p.made is not None}
            node.key = assembly_key(job, digests, found)
            node.state, node.why = output_state(self.store, node.key, job.target)
            if node.state == "unchanged":
                node.reads = node.writes = 0
        self.plan.add(node, list(dict.fromkeys([*nodes.values(), *([base] if base is not None else [])])))

    def _sidecar(self, output: Output, architecture: Architecture) -> bytes | None:
        """What is to lie beside the output as its `.yaml`; raises RecipeError when it cannot be read."""
        if output.config is None:
            return sidecar(output.profile, architecture, output.markers)
        folder = self.recipe.path.parent if self.recipe.path else Path()
        try:
            return (folder / output.config).read_bytes()
        except OSError as error:
            place = self.recipe.place(*output.at, "config", value=True)
            evidence = (str(error.strerror),)
            raise RecipeError(Problem(f"cannot read `{output.config}`", place, evidence)) from None

    def _prefix(self, cls: str, architecture: Architecture) -> str:
        if architecture.bare:
            return ""
        if cls in architecture.slots:
            return self.catalog.component_for(cls, architecture).prefix
        return self.catalog.classes[cls][0].prefix

    def target(self, output: Output) -> Path:
        """Where an output is written."""
        if self.place is not None:
            return self.place(output)
        folder = self.recipe.path.parent if self.recipe.path else Path()
        return folder / output.file

    def _carried(self, output: Output) -> Mapping[str, str]:
        """Metadata of the base's own, which outlives a rebuild."""
        base = output.base
        return self.sources.metadata(base.name) if self._is_seen(base) else {}

    def _is_file(self, base: NewBase | FromBase) -> TypeGuard[FromBase]:
        return (
            isinstance(base, FromBase)
            and base.name in self.recipe.sources
            and self.recipe.sources[base.name].recipe is None
        )

    def _is_seen(self, base: NewBase | FromBase) -> TypeGuard[FromBase]:
        """Whether a base is a file whose contents can be seen from here."""
        return self._is_file(base) and self.sources.known_architecture(base.name) is None

    def _extras(self, output: Output, architecture: Architecture) -> dict[str, LazyTensor]:
        """What of the base the output keeps beside its components, and markers; never cast."""
        extras: dict[str, LazyTensor] = {}
        base = output.base
        if self._is_seen(base):
            opened = self.sources.open(base.name)
            parts = [m for m in opened.identity.matches if m.component.cls in architecture.slots]
            taken = {full for m in parts for full in opened.names(m).values()}
            kept = {*self._optional(base, output), *(output.keep or ())}
            if output.unknown == "keep":
                identity = opened.identity
                kept |= opened.checkpoint.keys() - {*identity.ema, *identity.junk, *identity.optional}
            extras = {n: t for n, t in opened.checkpoint.items() if n in kept and n not in taken}
            self._account(base, output, taken | extras.keys())
        for marker in output.markers:
            extras.setdefault(marker, MemoryTensor(DType.F32, (0,), b""))
        return extras

    def _optional(self, base: FromBase, output: Output) -> list[str]:
        """The optional tensors of a base that are kept; raises RecipeError for a name that it has not."""
        opened = self.sources.open(base.name)
        if output.keep is None:
            averaged = any(map(self.catalog.is_average, output.components))
            return [n for n in opened.identity.optional if averaged or not n.startswith(EMA)]
        absent = [n for n in output.keep if n not in opened.checkpoint and n not in self.catalog.optional]
        if absent:
            place = self.recipe.place(*output.at, "keep", output.keep.index(absent[0]), value=True)
            hint = did_you_mean(absent[0], opened.checkpoint)
            raise RecipeError(Problem(f"`{base.name}` has no tensor `{absent[0]}`", place, hint=hint))
        return [n for n in opened.identity.optional if n in output.keep]

    def _account(self, base: FromBase, output: Output, kept: Set[str]) -> None:
        """Note what of a base is left out; raises SourceError when that is most of it."""
        opened = self.sources.open(base.name)
        identity = opened.identity
        sorted_out = {*identity.ema, *identity.junk, *identity.optional}
        rest = [n for n in opened.checkpoint if n not in sorted_out]
        state = [n for n in identity.optional if n.startswith(EMA)]
        reasons = {
            "EMA": (*identity.ema, *state),
            "junk": identity.junk,
            "extra": [n for n in identity.optional if n not in state],
            "unknown": rest,
        }
        names = {r: tuple(n for n in found if n not in kept) for r, found in reasons.items()}
        if any(map(self.catalog.is_average, output.components)):
            names.pop("EMA")
        sizes = {k: sum(opened.checkpoint[n].nbytes for n in v) for k, v in names.items()}
        self.plan.left_out[base.name] = LeftOut({k: v for k, v in names.items() if v}, sizes)
        total = sum(t.nbytes for t in opened.checkpoint.values())
        lost = sizes["junk"] + sizes["unknown"]
        if output.unknown == "drop" and 2 * lost > total:
            raise SourceError(
                Problem(
                    f"most of `{base.name}` would be left out",
                    self.recipe.place(*base.at, value=True),
                    (f"{lost:,} of {total:,} bytes belong to no component that the catalog knows",),
                    "name what you want of it under [components], with a `NEW` base",
                )
            )


def output_state(store: Store, key: str, target: Path) -> tuple[State, str]:
    """Whether the file at `target` is what the assembly of this key makes, and why."""
    written = store.recall("output", key)
    try:
        stat = target.stat()
    except OSError:
        return "make", "there is no such file yet" if written is None else "the file is gone"
    if written is None:
        return "make", "its contents have changed"
    known = store.remembered_sha256(stat)
    if known == written["sha256"]:
        return "unchanged", "the file is what it would become"
    if known is None and stat.st_size == written["size"]:
        return "hash", "the file may be it already: it is hashed first"
    return "make", "the file is not what was built"


def to_read(plan: Plan, origin: Origin) -> Mapping[str, LazyTensor]:
    """The tensors to be read for a component; raises RecipeError when a source does not have it."""
    if isinstance(origin, Finished):
        return {}
    if isinstance(origin, Applied):
        job = plan.node(origin.node).job
        assert isinstance(job, StepJob)
        inputs = {p: to_read(plan, o) for p, o in job.inputs.items()}
        return {f"{p}/{n}": t for p, tensors in inputs.items() for n, t in tensors.items()}
    return taken(origin)[0]


def taken(origin: Take) -> tuple[dict[str, LazyTensor], str]:
    """A source's tensors for a slot under unprefixed names, and the name of the component they are.

    Raises RecipeError, where the recipe asks for it, when the source has no such component.
    """
    match = _match(origin)
    return origin.sources.open(origin.source).component(match, origin.cls), match.component.name


def full_names(origin: Take) -> list[str]:
    """The names, in the source's file, of the tensors that are taken; raises as `taken`."""
    return list(origin.sources.open(origin.source).names(_match(origin)).values())


def _match(origin: Take) -> Match:
    opened = origin.sources.open(origin.source)
    match = choose(opened.identity.matches, origin.cls, origin.component, origin.sources.catalog)
    if match is not None:
        return match
    wanted = origin.component or origin.cls
    near = [r for r in opened.identity.rejected if wanted in (r.component.name, r.component.cls)]
    evidence = [
        f"{r.component.name}: {r.total - r.present:,} of {r.total:,} tensors are missing" for r in near[:2]
    ]
    held = sorted({m.component.name for m in opened.identity.matches})
    raise RecipeError(
        Problem(
            f"`{origin.source}` has no {wanted}",
            origin.sources.recipe.place(*origin.at, value=True),
            (*evidence, f"it holds {_words(held) or 'nothing that the catalog knows'}"),
        )
    )


def choose(matches: Sequence[Match], cls: str, component: str | None, catalog: Catalog) -> Match | None:
    """The match that fills a slot: the component named, else the one of the class.

    A component under other names, as EMA, fills the slot of the one whose names it can be given.
    """
    if component is None:
        return next((m for m in matches if m.component.cls == cls), None)
    for match in matches:
        found = match.component
        if found.name == component and (
            found.cls == cls or (found.base is not None and catalog.component(found.base).cls == cls)
        ):
            return match
    return None


def _words(names: Sequence[Any]) -> str:
    return ", ".join(f"`{n}`" for n in names)
