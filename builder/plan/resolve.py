"""From a recipe to its plan: names become nodes, nodes get keys, keys are looked up in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from builder.base.errors import Problem, RecipeError, SourceError, did_you_mean
from builder.base.files import read_bounded
from builder.base.inside import is_inside, leads_out
from builder.base.words import listed
from builder.formats.write_gguf import Encoding
from builder.formats.write_sharded import SHARD_SIZE, SUFFIX
from builder.models.catalog import PLAIN, Architecture, Names
from builder.models.identity import EMA, Identity
from builder.models.parts import words_for
from builder.models.prediction import WORDS, Prediction, prediction
from builder.operations import OPERATIONS
from builder.operations.registry import Operation
from builder.operations.weights import patterns
from builder.plan.components import Components
from builder.plan.folders import (
    find_layout,
    find_prediction,
    lacking,
    no_tokenizer,
    read_vocabulary,
    vocabulary_files,
)
from builder.plan.graph import (
    CHECKPOINT,
    Beside,
    ComponentJob,
    Container,
    Key,
    LeftOut,
    Node,
    OutputJob,
    Plan,
    State,
    StepJob,
    total,
)
from builder.plan.keys import assembly_key, recall_beside, recall_output
from builder.plan.metadata import stated_metadata
from builder.plan.models import Told
from builder.plan.taken import component_name, published_in, quoted, sizes_of
from builder.recipe import FromBase, Output, Pick, Recipe
from builder.recipe.check import form_problem
from builder.recipe.names import SINGLE, Form, form_of
from builder.recipe.profiles import MAX_SIDECAR, sidecar, warnings, with_profile
from builder.recipe.read import outside
from builder.recipe.values import PUBLISHED, QUANTIZE
from builder.sources.find import recall_files
from builder.sources.job import SourceJob

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
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
    resolver = _Resolver(Components(plan, recipe, (), sources, operations))
    for output in recipe.outputs:
        resolver.output(output, place, environment)
    _check_sidecars(plan)
    _check_patterns(plan, sources.catalog)
    _settle(plan, sources)
    return plan


class _Resolver:
    """The outputs of one recipe, which `components` fill."""

    def __init__(self, components: Components) -> None:
        self.components, self.nodes = components, components.nodes
        self.plan, self.recipe, self.sources = components.plan, components.recipe, components.sources
        self.catalog, self.store = self.nodes.catalog, self.nodes.store

    def output(
        self, output: Output, place: Callable[[Output], str | Path] | None, environment: Mapping[str, str]
    ) -> None:
        """Plan an output and all that it needs."""
        output = replace(self.components.spelt(output), fixes=with_profile(output.fixes, output.profile))
        name = str(place(output)) if place is not None else output.file
        target, form = (Path(name) if place is not None else self._target(output)), form_of(name)
        self._check_quantize(output, target, form)
        base = self.nodes.source(output.base.name) if self.nodes.is_file(output.base) else None
        adapter = self.components.adapter(output)
        carried = self.nodes.carried(base)
        picks: dict[str, Pick] = {}
        sidecar_: bytes | None = None
        if output.verbatim and isinstance(output.base, FromBase):
            architecture, beside = self.components.base_architecture(output.base, any_=True), Beside()
            told = Told(Prediction())
            metadata = {**carried, **output.metadata}
            container = self._container(output, target, form, architecture, base, told.prediction)
            nodes = {CHECKPOINT: self.components.whole(output, base, container, architecture)}
        elif adapter is not None and adapter.metadata is not None:
            architecture, beside = Architecture("adapter", ()), Beside()
            told = Told(Prediction())
            said = adapter.metadata()
            metadata = stated_metadata(self.recipe, output, None, _model_spec(said), said, environment, {})
            container = self._container(output, target, form, architecture, None, told.prediction)
            pick = Pick(CHECKPOINT, adapter.name, None, output.base.at)
            nodes = {CHECKPOINT: self.components.component(output, pick)}
        else:
            architecture, picks = self.components.filled(output)
            finished = self._before_encoding(output, form)
            nodes = {cls: self.components.component(finished, pick) for cls, pick in picks.items()}
            told = self.components.told(output, picks, carried)
            denoiser = self.components.denoiser(picks)
            called = self._name(nodes[denoiser], told) if denoiser is not None else None
            spec = (self.catalog.components[called].modelspec if called else None) or architecture.modelspec
            beside = self._beside(output, architecture, base, told.prediction, denoiser is not None)
            if form == "gguf":
                beside = self._beside_nothing(output, beside)
            stated = told.prediction.stated(spec, self.catalog)
            told_of = {
                n: self.nodes.carried(self.nodes.source(n))
                for n in self.recipe.merged(output)
                if self.recipe.sources[n].recipe is None
            }
            metadata = stated_metadata(self.recipe, output, spec, stated, carried, environment, told_of)
            container = self._container(
                output, target, form, architecture, base, told.prediction, tuple(picks)
            )
            if form in SINGLE:
                usual_ = self._is_usual(called, architecture)
                sidecar_ = self._sidecar(output, architecture, told.prediction, usual_)
        if form != "gguf" and output.quantize and not any(map(self._quantizes, nodes.values())):
            at, evidence = self.recipe.place(*output.at, "quantize"), f"it has {quoted(nodes) or 'nothing'}"
            hint = "remove `quantize`: it is for the weights of what predicts the noise"
            raise RecipeError(Problem("there is nothing to quantize", at, (evidence,), hint))
        job = OutputJob(
            self.recipe,
            output,
            target,
            architecture,
            {
                cls: (self._written(cls, architecture) if container.encoding is None else PLAIN, node)
                for cls, node in nodes.items()
            },
            base.key if base is not None else None,
            beside,
            metadata,
            sidecar_,
            container,
            told.by,
        )
        denoiser = self.components.denoiser(picks)
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
        size = total(p.writes for p in parts)
        key = self.nodes.add(
            job, f"output {output.file}", action=None, state="make", why="", reads=size, writes=size
        )
        node = self._state(self.plan.nodes[key], job, parts, base)
        self.plan.nodes[key] = node

    def _quantizes(self, key: Key) -> bool:
        job = self.plan.nodes[key].job
        return isinstance(job, ComponentJob) and job.quantize is not None

    def _name(self, key: Key, told: Told) -> str | None:
        """The catalog's name of a denoiser; None where what it comes from cannot be seen from here."""
        node = self.plan.nodes[key]
        if node.made is not None:
            return node.made.component
        job = self.plan.nodes[told.by[0]].job if told.by is not None else None
        assert isinstance(node.job, ComponentJob) and isinstance(job, SourceJob)
        return component_name(self.plan, self.sources, node.job.origin) if self.nodes.is_seen(job) else None

    def _state(self, node: Node, job: OutputJob, parts: list[Node], base: SourceJob | None) -> Node:
        waiting = [p.label for p in parts if p.made is None]
        if base is not None and not self.sources.seen(base):
            self.plan.unseen.append(base.key)
            return replace(node, why=f"what else is in `{base.name}` is seen when it is here")
        if waiting:
            all_ = "all" if len(waiting) == len(parts) else quoted(waiting)
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
        path, recipe = self.recipe.target(output), self.recipe.path
        if recipe is not None and self.recipe.address is None and not is_inside(path.parent, recipe.parent):
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
        classes: tuple[str, ...] = (),
    ) -> Container:
        """How an output is written; raises RecipeError, or SourceError for a base that cannot be so."""
        if form == "gguf":
            return Container(form, encoding=self._encoding(output, target, classes))
        if form == "sharded":
            stem = target.name[: -len(SUFFIX)]
            return Container(form, stem=stem, shard_size=output.shard_size or SHARD_SIZE)
        if form != "diffusers":
            model = not output.verbatim and self.components.adapter(output) is None
            return Container(form, nesting="state_dict" if form == "torch" and model else "")
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
        if output.prediction is not None and told.markers and told.v is not (output.prediction == "v"):
            markers = quoted(told.names)
            self.plan.warnings.append(
                Problem(
                    f"the folder `{target.name}` says two things of what it predicts",
                    self.recipe.place(*output.at, "prediction", value=True),
                    (f"its scheduler says {output.prediction}, the model's {markers} {told.kind}",),
                    "programs that read the scheduler heed the first; read back here, it is the second",
                )
            )
        vocabulary = self._vocabulary(output, layout)
        return Container(
            form,
            shard_size=output.shard_size,
            layout=layout.name,
            prediction="v" if found == "v" else "epsilon",
            zero_snr=told.zero_snr,
            vocabulary=vocabulary,
            lacking=lacking(layout, vocabulary),
        )

    def _check_quantize(self, output: Output, target: Path, form: Form) -> None:
        """Raise RecipeError for weights packed in a way that the form does not hold, or of no precision."""
        if output.quantize is None:
            return
        place = self.recipe.place(*output.at, "quantize", value=True)
        if form not in (forms := QUANTIZE[output.quantize].forms):
            raise RecipeError(
                form_problem(f'quantize = "{output.quantize}"', forms, target.name, form, place)
            )
        if form == "gguf" and output.precision == "keep":
            hint = "give the precision of what is not packed: `fp16`, `bf16` or `fp32`"
            raise RecipeError(Problem("nothing is packed where all is kept as it is", place, hint=hint))

    def _encoding(self, output: Output, target: Path, classes: tuple[str, ...]) -> Encoding:
        """How an output of these classes is written as GGUF; raises RecipeError for all but one."""
        traits = self.catalog.traits.get(classes[0]) if len(classes) == 1 else None
        if traits is None or traits.gguf is None:
            known = [c for c, t in self.catalog.traits.items() if t.gguf is not None]
            held = quoted(classes) if classes else "a whole file, or a LoRA"
            raise RecipeError(
                Problem(
                    "a GGUF file holds a diffusion model by itself",
                    self.recipe.place(*output.at, "file", value=True),
                    (f"`{target.name}` would hold {held}", f"it can hold one of {listed(tuple(known))}"),
                    'make an output of it alone: `base = "NEW CLASS"`, or `ckpt extract FILE CLASS`',
                )
            )
        said = traits.gguf
        precision = output.precision
        if precision == PUBLISHED:
            precision = published_in(self.plan, self.sources, classes[0])
        return Encoding(
            said.architecture,
            precision,  # type: ignore[arg-type]
            output.narrow,  # type: ignore[arg-type]
            output.quantize,  # type: ignore[arg-type]
            said.reshaped,
            (*said.full, *traits.kept.all),
            (*said.whole, *traits.unquantized.all),
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
        )

    def _before_encoding(self, output: Output, form: Form) -> Output:
        """The output as its components are finished: for GGUF in FP32, as each tensor is rounded once."""
        if form != "gguf" or output.precision == "keep":
            return output  # of which nothing is rounded or packed
        return replace(output, precision="fp32", quantize=None)

    def _beside_nothing(self, output: Output, beside: Beside) -> Beside:
        """What a GGUF file has beside its model; where there is something, that it is left out is said."""
        markers = [m.name for m in beside.markers]
        if markers:
            self.plan.warnings.append(
                Problem(
                    f"a GGUF file has no place for {quoted(markers)}",
                    self.recipe.place(*output.at, "file", value=True),
                    hint="programs that read it are to be told what the model predicts",
                )
            )
        if beside.names:
            self.plan.say(f"`{output.file}` has no place for {listed(beside.names)}")
        return Beside()

    def _vocabulary(self, output: Output, layout: Layout) -> dict[str, bytes]:
        """The files of an output's tokenizers; raises RecipeError when they cannot be read."""
        if output.tokenizer is None:
            return {}
        folder = self.recipe.path.parent if self.recipe.path else Path()
        place = self.recipe.place(*output.at, "tokenizer", value=True)
        files = vocabulary_files(folder / output.tokenizer, layout).values()
        if not files:
            raise RecipeError(replace(no_tokenizer(layout), place=place, hint="leave `tokenizer` out"))
        for name in ("", *(f"/{file}" for file in files)) if self.recipe.path else ():
            if (why := leads_out(folder, f"{output.tokenizer}{name}")) is not None:
                raise RecipeError(outside(output.tokenizer, why, place))
        try:
            return read_vocabulary(folder / output.tokenizer, layout)
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


def _model_spec(said: Mapping[str, str]) -> dict[str, str]:
    """What metadata say of what predicts."""
    return {k: v for k, v in said.items() if k in WORDS}


def _named(keep: Sequence[str], identity: Identity) -> set[str]:
    """The tensors that words under `keep` mean, which may be components that have no slot."""
    parts = [m for m in identity.astray if not set(words_for(m)).isdisjoint(keep)]
    return {*keep, *(full for m in parts for full in m.full)}


def _check_sidecars(plan: Plan) -> None:
    """Raise RecipeError when two outputs would share a configuration."""
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
            takes = sizes_of(plan, sources, node.job.origin) if seen else {}
            reads = sum(takes.values())
            plan.nodes[node.key] = replace(node, state="make", why=why, reads=reads, takes=takes)


def output_state(store: Store, action: str, job: OutputJob) -> tuple[State, str]:
    """Whether what is in an output's place is what the assembly of this key makes, and why."""
    written, single = recall_output(store, action), job.container.single
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
    if known == written.sha256:
        return "unchanged", f"the {what} is what it would become"
    if known is None and (not single or stat.st_size == written.size):
        return "hash", f"the {what} may be it already: it is hashed first"
    return "make", f"the {what} is not what was built"
