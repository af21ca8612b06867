"""A component of the plan as a mapping of lazy tensors, composed from what it is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

from builder.base.errors import CkptError, OutputError, Problem
from builder.base.words import counted
from builder.build.context import Context
from builder.models.catalog.tables import Patterns
from builder.models.cut import Cut, cut, numbers, packed_anew
from builder.operations.fixes import FIXES, truncated_position_ids
from builder.operations.lora.names import Shaped, Target, extracted, targets
from builder.operations.registry import Setting
from builder.plan.graph import (
    CHECKPOINT,
    ComponentJob,
    Finished,
    Key,
    Origin,
    OutputJob,
    StepJob,
    Take,
    Whole,
    origin_data,
)
from builder.plan.taken import match_of, place_of, whole
from builder.sources.job import SourceJob
from builder.tensors.cast import PRECISIONS, Faults, cast_all
from builder.tensors.lazy import LazyTensor
from builder.tensors.merged import Common, Recent, Shared
from builder.tensors.packed.decode import WIDER


@dataclass
class Composer:
    """Composes components; stored ones that they are made of stay open in `opened`.

    `faults` are what the composed tensors will show when they are read, each with a label and a precision.
    With `together`, several outputs are made at once of what it composes.
    """

    context: Context
    opened: ExitStack
    together: bool = False
    faults: list[tuple[Key, str, Faults]] = field(default_factory=list)
    _found: dict[str, Cut] = field(default_factory=dict)
    _operands: dict[str, Cut] = field(default_factory=dict)
    _common: dict[tuple[Key, str], LazyTensor] = field(default_factory=dict)
    _recent: Recent = field(default_factory=Recent)

    def error(self, *keys: Key) -> CkptError | None:
        """The error that names every faulty tensor of these nodes that was read, or None."""
        near = {*keys, *self.context.plan.ancestors(*keys)}
        for key, precision, faults in (found for found in self.faults if found[0] in near):
            error = faults.error(f"`{self.context.node(key).label}`", PRECISIONS[precision])
            if error is not None:
                how = tuple(self._how(key))
                error.problems = tuple(replace(p, evidence=(*p.evidence, *how)) for p in error.problems)
                return error
        return None

    def _how(self, key: Key) -> Iterator[str]:
        """How a component was computed, in words, if it was."""
        job = self.context.node(key).job
        if isinstance(job, ComponentJob):
            job = self.context.node(job.origin.node).job
        if isinstance(job, StepJob):
            inputs = ", ".join(f"`{self.context.node(o.node).label}`" for o in job.inputs_by_name.values())
            yield f"step `{job.step}`: {job.op} of {inputs}"

    def finish(self, key: Key) -> Cut:
        """A component taken or computed, repaired, rounded. Nothing is read but small tensors.

        Reading stored components that it is made of, or this, may raise DamagedEntry.
        """
        job = self.context.component(key)
        component, tensors, changes = (
            self._operand(job.origin, job.hint) if job.decodes else self.origin(job.origin)
        )
        if isinstance(job.origin, Whole):
            kept = job.precision == "keep"  # nothing is looked at
            whole_ = tensors if kept else self._cast(key, tensors, job.origin.exempt)
            return self._packed(key, Cut(component, whole_, changes), tensors)
        done = [*changes]
        fixed = {c.partition(":")[0] for c in changes}
        made: Mapping[str, LazyTensor] = tensors
        for name in (n for n in job.fixes if n not in fixed):
            made, words = FIXES[name].apply(made)
            done += [f"{name}: {word}" for word in words] or [f"{name}: nothing to change"]
        made, words = truncated_position_ids(made, self.context.node(key).label)
        return self._packed(key, Cut(component, self._cast(key, made), (*done, *words)), made)

    def _packed(self, key: Key, cut: Cut, exact: Mapping[str, LazyTensor]) -> Cut:
        """The same, some weights packed anew, of what they were before they were rounded."""
        job = self.context.component(key)
        cls = None if job.cls == CHECKPOINT else job.cls
        packed = packed_anew(exact, cls, job.quantize, self.context.sources.catalog)
        if job.quantize is None:
            return cut
        if not packed:
            fact = f"there is nothing to quantize in `{self.context.node(key).label}`"
            evidence = "no linear layer of a denoiser that the catalog knows is large enough"
            raise OutputError(Problem(fact, evidence=(evidence,), hint="leave `quantize` out"))
        count = sum(name in exact for name in packed)
        word = f"quantized: {counted(count, 'weight')} to {job.quantize.scheme}"
        return cut._replace(tensors={**cut.tensors, **packed}, changes=(*cut.changes, word))

    def _operand(self, origin: Origin, hint: str = WIDER) -> Cut:
        """What an origin gives, packed weights decoded: each once, however many steps use it."""
        said = json.dumps(origin_data(origin))
        if said not in self._operands:
            cut = self.origin(origin)
            named = None if cut.component == CHECKPOINT else cut.component
            sources = self.context.sources
            place = place_of(self.context.plan, sources, origin)
            tensors, words = numbers(cut.tensors, named, sources.catalog, hint, place)
            if words and self._uses[said] > 1:
                tensors = {n: self._shared(t) if t is not cut.tensors[n] else t for n, t in tensors.items()}
            self._operands[said] = cut._replace(tensors=tensors, changes=(*cut.changes, *words))
        return self._operands[said]

    def _cast(
        self, key: Key, tensors: Mapping[str, LazyTensor], exempt: Sequence[str] = ()
    ) -> dict[str, LazyTensor]:
        """Tensors in the precision of a component, but those that are exempt."""
        job, faults = self.context.component(key), Faults()
        self.faults.append((key, job.precision, faults))
        cast = cast_all(
            {n: t for n, t in tensors.items() if n not in exempt},
            job.precision,
            faults=faults,
            overflow=job.overflow,
            non_finite=job.non_finite,
            narrow=job.narrow,
            kept=Patterns(job.kept),
        )
        return {n: cast.get(n, t) for n, t in tensors.items()}

    def origin(self, origin: Origin) -> Cut:
        """What an origin gives, under unprefixed names; what is used more than once is read once."""
        said = json.dumps(origin_data(origin))
        if said not in self._found:
            cut = self._origin(origin)
            if self._uses[said] > 1:
                cut = cut._replace(tensors={n: self._shared(t) for n, t in cut.tensors.items()})
            self._found[said] = cut
        return self._found[said]

    def common(self, key: Key, name: str, tensor: LazyTensor) -> LazyTensor:
        """A tensor of a finished component, read once for all outputs that have it."""
        if not self.together or self._slots[key] < 2:
            return tensor
        return self._common.setdefault((key, name), Common(tensor, self._recent))

    def _shared(self, tensor: LazyTensor) -> LazyTensor:
        return Common(tensor, self._recent) if self.together else Shared(tensor)

    @cached_property
    def _slots(self) -> Counter[Key]:
        """How many outputs have each component."""
        jobs = (n.job for n in self.context.plan)
        return Counter(k for j in jobs if isinstance(j, OutputJob) for _, k in j.slots.values())

    @cached_property
    def _uses(self) -> Counter[str]:
        """How often steps, and of several outputs components, use each origin."""
        jobs = [n.job for n in self.context.plan]
        used = [o for j in jobs if isinstance(j, StepJob) for o in j.inputs_by_name.values()]
        used += [j.origin for j in jobs if self.together and isinstance(j, ComponentJob)]
        return Counter(json.dumps(origin_data(o)) for o in used)

    def _origin(self, origin: Origin) -> Cut:
        job = self.context.node(origin.node).job
        if isinstance(origin, Take):
            assert isinstance(job, SourceJob)
            return self._taken(origin, job)
        if isinstance(origin, Whole):
            assert isinstance(job, SourceJob)
            return Cut(CHECKPOINT, whole(job, origin, self.context.sources), ())
        if isinstance(job, StepJob):
            return self._applied(origin.node, job)
        assert isinstance(job, ComponentJob)
        found = self.stored(origin.node) or self.finish(origin.node)
        if not isinstance(origin, Finished) or origin.promote is None:
            return found
        names = self.context.sources.catalog.component(origin.promote).promote
        return found._replace(tensors={names.get(n, n): t for n, t in found.tensors.items()})

    def stored(self, key: Key) -> Cut | None:
        """A component from where its bytes lie, each tensor verified as it is read; None: nowhere."""
        made = self.context.made(key)
        stored = self.context.store.open(made.digest) if made is not None else None
        if made is None or stored is None:
            return None
        self.opened.callback(stored.close)
        return Cut(made.component, dict(stored.tensors), made.changes)

    def _taken(self, take: Take, job: SourceJob) -> Cut:
        sources = self.context.sources
        opened = sources.open(job)
        return cut(opened.checkpoint, opened.identity, match_of(job, take, sources), take.cls)

    def _applied(self, key: Key, job: StepJob) -> Cut:
        """What a step makes of a class."""
        catalog = self.context.sources.catalog
        operation = self.context.operations[job.op]
        inputs = {p: self._operand(o) for p, o in job.inputs_by_name.items()}
        traits = catalog.traits.get(job.cls)
        setting = Setting(
            job.cls,
            modules=self._modules,
            extracted=self._extracted,
            metadata={p: self._metadata(o) for p, o in job.inputs_by_name.items() if isinstance(o, Whole)},
            arithmetic=job.arithmetic,
        )
        if traits is not None:
            setting = replace(setting, block=traits.block, constants=traits.constants)
        try:
            made, words = operation.apply({p: i.tensors for p, i in inputs.items()}, job.params, setting)
        except CkptError as error:
            error.problems = tuple(
                replace(p, evidence=(*p.evidence, f"step `{job.step}`")) for p in error.problems
            )
            raise
        if job.precision is not None:
            faults = Faults()
            self.faults.append((key, job.precision, faults))
            made = cast_all(made, job.precision, faults=faults, kept=Patterns(job.kept))
        if job.cls == CHECKPOINT:
            return Cut(CHECKPOINT, dict(made), tuple(words))
        first = inputs[job.first or operation.inputs[0]]
        return Cut(first.component, dict(made), (*first.changes, *words))

    def _metadata(self, origin: Whole) -> Mapping[str, str]:
        job = self.context.node(origin.node).job
        assert isinstance(job, SourceJob)
        return self.context.sources.open(job).checkpoint.metadata

    def _modules(
        self, cls: str, tensors: Mapping[str, LazyTensor] | None
    ) -> Mapping[str, Mapping[str, Target]]:
        """What the names that adapters use mean in a class."""
        catalog = self.context.sources.catalog
        adapters = catalog.traits[cls].adapters if cls in catalog.traits else None
        if adapters is None:
            return {}
        if tensors is None:
            rules = catalog.classes[cls][0].tensors
            tensors = {n: Shaped(r.shape) for n, r in rules.items()}
        return targets(tensors, adapters, catalog.rules[adapters.rules] if adapters.rules else None)

    def _extracted(
        self, cls: str, tensors: Mapping[str, LazyTensor], convolutions: bool
    ) -> Mapping[str, Target]:
        """What of a class adapters are extracted for."""
        catalog = self.context.sources.catalog
        adapters = catalog.traits[cls].adapters
        assert adapters is not None, "the plan has seen to it"
        rules = catalog.rules[adapters.rules] if adapters.rules else None
        return extracted(tensors, adapters, rules, convolutions=convolutions)
