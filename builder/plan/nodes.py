"""The nodes that a recipe adds to a plan, each with what is known of it: state, reason and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from builder.base.errors import Problem, RecipeError
from builder.plan.graph import ComponentJob, Job, Key, Node, Plan, State, StepJob
from builder.plan.keys import action_key
from builder.plan.metadata import carried_metadata
from builder.plan.taken import component_sizes
from builder.recipe import FromBase, NewBase, Pick, Recipe
from builder.recipe.check import MAX_STEPS
from builder.sources.job import SourceJob, entry_name

if TYPE_CHECKING:
    from builder.sources.opened import Sources


class Nodes:
    """Adds to a plan what a recipe needs: its sources, and what is made of them.

    `scope` are the names of the sources that lead to the recipe.
    """

    def __init__(self, plan: Plan, recipe: Recipe, scope: tuple[str, ...], sources: Sources) -> None:
        self.plan, self.recipe, self.scope, self.sources = plan, recipe, scope, sources
        self.catalog, self.store = sources.catalog, sources.store

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

    def is_seen(self, job: SourceJob) -> bool:
        """Whether a source's contents are seen without fetching anything; what is not is noted."""
        seen = self.sources.find(job) is not None or self.sources.is_open(job)
        if not seen and job.key not in self.plan.unseen:
            self.plan.unseen.append(job.key)
        return seen

    def component(self, job: ComponentJob, label: str, pick: Pick) -> Key:
        """The node of a component, with what the store knows of it; `pick` is what it is made for."""
        key = job.key
        if key in self.plan.nodes:
            return key
        action = self.action(job)
        made = self.store.lookup(action, job.cls) if action is not None else None
        # What is to be fetched is seen when it is here, and what is known need not be looked at.
        takes, writes = component_sizes(self.plan, self.sources, job) if made is None else ({}, made.bytes)
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

    def undecoded(self, name: str) -> tuple[str, ...]:
        """What a source has of packed weights that nothing decodes; nothing of what is not seen here."""
        if not self.is_file(FromBase(name)) or not self.sources.seen(job := self.source(name)):
            return ()
        return self.sources.open(job).identity.undecoded

    def carried(self, base: SourceJob | None) -> Mapping[str, str]:
        """Metadata of the base's own, which outlives a rebuild."""
        if base is None or not self.sources.seen(base):
            return {}
        return carried_metadata(self.sources.open(base).checkpoint)

    def is_file(self, base: NewBase | FromBase) -> TypeGuard[FromBase]:
        """Whether a base is a source of the recipe that is a file."""
        return (
            isinstance(base, FromBase)
            and base.name in self.recipe.sources
            and self.recipe.sources[base.name].recipe is None
        )
