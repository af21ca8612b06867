"""What fills the slots of an output: components of models, finished as the output asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from builder.base.errors import Problem, RecipeError
from builder.base.words import counted
from builder.models.catalog import Architecture
from builder.models.catalog.tables import Traits
from builder.models.cut import foreign
from builder.models.prediction import prediction
from builder.operations.registry import Operation
from builder.plan.graph import CHECKPOINT, ComponentJob, Container, Finished, Key, Origin, Plan, Whole
from builder.plan.keys import tables
from builder.plan.models import Model, Told, absent, check_component, source_model
from builder.plan.nodes import Nodes
from builder.plan.steps import step_model
from builder.plan.taken import is_elsewhere, kept, made_of, published_in, quoted
from builder.recipe import FromBase, NewBase, Output, Pick, Recipe, slot_problems
from builder.recipe.check import with_classes
from builder.recipe.values import EMA, PUBLISHED
from builder.sources.job import SourceJob
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.packed.encode import Quantize

if TYPE_CHECKING:
    from builder.sources.opened import Sources


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
        self.nodes, self.operations = Nodes(plan, recipe, scope, sources), operations
        self.plan, self.recipe, self.sources, self.catalog = plan, recipe, sources, sources.catalog
        self._models: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        """A source or step of the recipe as a model."""
        if name not in self._models:
            if name in self.recipe.steps:
                self._models[name] = step_model(self.nodes, name, self.operations, self.model)
            elif self.recipe.sources[name].recipe is not None:
                self._models[name] = self._sub_recipe(name)
            else:
                self._models[name] = source_model(self.nodes, name)
        return self._models[name]

    def _sub_recipe(self, name: str) -> Model:
        recipe = self.recipe.included[name]
        inner = Components(self.plan, recipe, (*self.nodes.scope, name), self.sources, self.operations)
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
                raise absent(self.nodes, pick, picks)
            key = inner.component(made, picks[cls])
            promote = None if cls == pick.cls or wanted is None else wanted.name
            finished = Finished(key, promote)
            check_component(self.nodes, pick, Finished(key), picks)
            return finished

        return Model(
            name,
            lambda: tuple(picks),
            lambda: architecture,
            cache(origin),
            lambda: inner.told(made, picks, {}),
        )

    def adapter(self, output: Output) -> Model | None:
        """The adapter that an output is the file of; None where it is a model's."""
        model = self.model(output.base.name) if isinstance(output.base, FromBase) else None
        return model if model is not None and model.metadata is not None else None

    def component(self, output: Output, pick: Pick) -> Key:
        """The node of what fills a slot."""
        model = self.model(pick.source)
        origin = model.origin(pick)
        precision, narrow = output.precision, output.narrow
        if precision == PUBLISHED:
            narrow = narrow or "fewer"
            if pick.cls == CHECKPOINT:
                precision = model.published()
            else:
                precision = published_in(self.plan, self.sources, pick.cls, origin)
        job = ComponentJob(
            pick.cls,
            pick.source,
            origin,
            tuple(n for n in output.fixes if self.catalog.applies(n, pick.cls)),
            precision,  # type: ignore[arg-type]
            narrow,  # type: ignore[arg-type]
            output.overflow,  # type: ignore[arg-type]
            output.non_finite,  # type: ignore[arg-type]
            kept=kept(self.catalog, pick.cls, precision),
            quantize=self._quantize(output, pick.cls),
        )
        if isinstance(origin, Finished) and origin.promote is None:
            inner = self.plan.nodes[origin.node].job
            assert isinstance(inner, ComponentJob)
            if inner.params() == job.params():
                return origin.node  # finished in the same way already: it is the component
        if output.precision == "fp16" and pick.cls != CHECKPOINT:
            seen = not is_elsewhere(self.plan, self.sources, job)
            held = made_of(self.plan, self.sources, job) if seen else None
            self._warn_of_fp16(output, self.catalog.classes[pick.cls][0].traits, pick, held)
        named = f" ({pick.component})" if pick.component else ""
        return self.nodes.component(job, f"{pick.cls} of {pick.source}{named}", pick)

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

    def whole(
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
        return self.nodes.component(job, f"{CHECKPOINT} {base.name}", Pick(CHECKPOINT, base.name))

    def _kept_of(self, base: SourceJob) -> Iterator[str]:
        """The full names of tensors of a source that no cast touches."""
        matches = self.sources.open(base).identity.matches if self.sources.seen(base) else ()
        for match in matches:
            patterns = match.component.traits.kept
            yield from (full for bare, full in match.whole.items() if bare in patterns)

    def _quantize(self, output: Output, *classes: str) -> Quantize | None:
        """How an output packs the weights of those of these classes that denoise.

        None of a class of which the catalog says nothing, nor of adapters.
        """
        if output.quantize is None:
            return None
        traits, denoisers = self.catalog.traits, self.catalog.denoisers
        near = {c: traits[c].unquantized.all for c in sorted(classes) if c in denoisers and c in traits}
        return Quantize(output.quantize, near) if near else None

    def spelt(self, output: Output) -> Output:
        """An output with the classes and components that its words (`VAE`, `EMA`) mean."""
        picks = output.components
        if all(cls in self.catalog.classes and p.component != EMA for cls, p in picks.items()):
            return output
        base = output.base
        if isinstance(base, NewBase):
            architecture = self.catalog.architecture(base.architecture)
        else:
            architecture = self.base_architecture(base, any_=True)
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
            identity = self.sources.open(self.nodes.source(pick.source)).identity
            held = {m.component.name for m in identity.matches}
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
            architecture = self.base_architecture(base, output.partial and output.unknown == "keep")
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

    def base_architecture(self, base: FromBase, any_: bool = False) -> Architecture:
        """What a base is; with `any_`, one that is nothing known has no slots."""
        found = self.model(base.name).architecture()
        if found is not None:
            return found
        if any_:
            return Architecture("unknown", ())
        evidence: tuple[str, ...] = ()
        if self.nodes.is_file(base):
            identity = self.sources.open(self.nodes.source(base.name)).identity
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
        cls = self.denoiser(picks)
        if cls is not None:
            found = self.model(picks[cls].source).told()
        else:
            found = Told(prediction({}, carried, self.catalog))
        own = found.prediction.with_own(output.markers, output.metadata, self.catalog)
        return found._replace(prediction=own)

    def denoiser(self, picks: Mapping[str, Pick]) -> str | None:
        """The class of these that predicts."""
        return next((cls for cls in picks if cls in self.catalog.denoisers), None)
