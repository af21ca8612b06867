"""Outputs: written in one pass from what they are made of, held to what is expected, put in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from builder.base.disk import check_free, write_bytes
from builder.base.errors import CkptError, LockError, OutputError, Place, Problem, SourceError
from builder.base.parallel import Cancelled
from builder.build.context import Context
from builder.build.evaluate import Composer
from builder.build.expect import Built, missed
from builder.build.in_parts import Parts
from builder.build.measure import known_digits, measured, metric_text
from builder.build.write import write_output
from builder.formats.blob import FileBlob
from builder.formats.hashes import data_sha256
from builder.formats.lost import find_lost, problem_of
from builder.formats.open import open_checkpoint
from builder.formats.write_safetensors import Written
from builder.models.catalog import Catalog, Names
from builder.models.metric import counted
from builder.plan.graph import Key, Node, OutputJob
from builder.plan.keys import (
    EMPTY,
    KnownOutput,
    assembly_key,
    note_beside,
    note_output,
    note_prediction,
    recall_beside,
    recall_output,
)
from builder.plan.metadata import DATE
from builder.plan.resolve import output_state
from builder.recipe.lock import Lock, LockedComponent, LockedOutput, differences
from builder.recipe.profiles import CONFIG, MAX_SIDECAR, MAX_VOCABULARY
from builder.recipe.recipe import Recipe
from builder.sources.find import hash_files
from builder.sources.have import locked_sources
from builder.sources.job import SourceJob
from builder.store import DamagedEntry, Made
from builder.store.entries import At, Entry, VerifiedTensor, identity
from builder.tensors.digests import Row, component_digest, expression_key
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import Passing, carry_out


@dataclass
class Part:
    """A component of an output in the making.

    `stored` is what is known of it where its bytes are those of a place.
    """

    cls: str
    key: Key
    names: Names
    component: str
    tensors: Mapping[str, LazyTensor]
    changes: tuple[str, ...]
    stored: Made | None = None

    @property
    def computed(self) -> bool:
        """Whether it is made of sources now, rather than taken from where it lay."""
        return self.stored is None


@dataclass
class Product:
    """An output as it came to be: `parts` by class, `fresh` those that were computed.

    `known` is what is remembered of it, under the key of its assembly.
    """

    built: Built
    parts: dict[str, Made]
    fresh: tuple[Key, ...] = ()
    known: tuple[str, KnownOutput] | None = None


Naming = Callable[[Built], Path]


@dataclass
class Assembly:
    """One output in the making; `locked` and `naming` as `build` has them.

    `prepare` has what it hangs on, and is told whether an attempt has failed.
    """

    context: Context
    node: Node
    parts_of: Parts
    prepare: Callable[[Node, bool], object] = lambda node, again: None
    locked: Lock | None = None
    naming: Naming | None = None
    _product: Product | None = None
    _rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    _digits: dict[str, str] = field(default_factory=dict)  # known before, whatever becomes of the store

    @cached_property
    def job(self) -> OutputJob:
        """What is to be done."""
        assert isinstance(self.node.job, OutputJob)
        return self.node.job

    @property
    def _catalog(self) -> Catalog:
        return self.context.sources.catalog

    @property
    def base(self) -> tuple[Key, SourceJob] | None:
        """The source whose tensors lie beside the components, where some do."""
        key = self.job.base if self.job.beside.names else None
        job = self.context.node(key).job if key is not None else None
        return (key, job) if key is not None and isinstance(job, SourceJob) else None

    def make(self) -> Product:
        """Do the work of `making` alone."""
        return carry_out(self.making(), threads=self.context.threads, stop=self.context.stop)

    def making(self, composer: Composer | None = None) -> Passing[Product]:
        """The work of having the output in its place, written unless it is there.

        Others that are made at the same time have the same `composer`. Raises OutputError when what is made
        is not what the recipe expects, LockError when it is not what `locked` says; then the place is as it
        was. Places whose bytes turn out to be other than they were are taken out of use, and what lay there
        is made again; so is all that is the shared store's, where no output comes of it that is right.
        """
        for attempt in range(2 * len(self.job.slots) + 2):
            try:
                self.prepare(self.node, attempt > 0)  # again, should it be what was damaged
                return self._unchanged() or (yield from self._written(composer))
            except DamagedEntry as damage:
                self.context.store.set_aside(damage)
                composer = None  # which knows what was damaged
            except CkptError as error:
                doubted = self.context.claimed(*self.job.inputs)
                if not doubted or isinstance(error, Cancelled):
                    raise
                for action in doubted:
                    self.context.store.doubt(action, error.problems[0].fact)
                composer = None
        raise OutputError(
            Problem(f"`{self.job.output.file}` cannot be made: what it is made of keeps changing")
        )

    # -- what is there already

    def _unchanged(self) -> Product | None:
        """The output, if it is in its place as this would make it."""
        if self.naming is not None:
            return None
        context, job, store = self.context, self.job, self.context.store
        made = {cls: context.made(key) for cls, (_, key) in job.slots.items()}
        known = {cls: m for cls, m in made.items() if m is not None}
        beside = recall_beside(store, self._base_sha256(), job.beside)
        if len(known) < len(made) or beside is None:
            return None
        action = assembly_key(job, {cls: m.digest for cls, m in known.items()}, beside)
        fact = recall_output(store, action)
        if fact is None:
            return None
        state, _ = output_state(store, action, job)
        if state == "hash" and self._is(job.target, fact.sha256):
            state = "unchanged"
        if state != "unchanged" or not self._has_all(fact.files):
            return None
        known_as = (fact.sha256, fact.size, fact.tensor_digest, fact.metric)
        built = Built(job.output.name, job.target, *known_as, "unchanged", self._autov3(fact), fact.files)
        for key, source in context.source_nodes(job.inputs):
            if context.sources.is_open(source):
                context.settle(key, source)
        self._hold(built, known)
        return Product(self._with_sidecar(built), known)

    def _is(self, path: Path, sha256: str) -> bool:
        """Whether what lies at a path is known by a digest; it is hashed, unless that is remembered."""
        store, reporter = self.context.store, self.context.reporter
        try:
            if self.job.container.single:
                return store.sha256(path, reporter) == sha256
            return hash_files(path, store, reporter) == sha256
        except SourceError:
            return False

    def _autov3(self, fact: KnownOutput) -> str:
        """The AutoV3 of the output in its place, where one is expected."""
        if self.job.output.expect.autov3 is None:
            return ""
        return fact.autov3 or data_sha256(self.job.target, reporter=self.context.reporter) or ""

    def _has_all(self, files: Mapping[str, str]) -> bool:
        """Whether files of a folder are what they were (SHA-256 by path)."""
        folder = self.job.target
        return all(_sha256_of(folder / p, MAX_VOCABULARY) == sha256 for p, sha256 in files.items())

    def _base_sha256(self) -> str | None:
        return self.context.sources.sha256(self.base[1]) if self.base is not None else None

    # -- making it

    def _written(self, composer: Composer | None) -> Passing[Product]:
        context, job = self.context, self.job
        with ExitStack() as opened:
            composer = composer or Composer(context, opened)
            missing = [key for _, key in job.slots.values() if not self._is_held(key)]
            near = (job.base, job.told[0] if job.told is not None else None)
            read = context.source_nodes([*missing, *(key for key in near if key is not None)])
            for key, source in read:  # begun before all else: importing torch takes as long as hashing 1 GB
                context.begin_hashing(key, source)
            parts = [self._part(cls, names, key, composer) for cls, (names, key) in job.slots.items()]
            computed = context.source_nodes([p.key for p in parts if p.computed])
            read += [found for found in computed if found not in read]
            beside = self._beside()
            tensors = dict(beside)
            for part in parts:
                for name, tensor in part.tensors.items():
                    # Digested as it is written, and compared before it is put in place.
                    plain = tensor.unchecked if isinstance(tensor, VerifiedTensor) else tensor
                    tensors[part.names.name(name)] = composer.common(part.key, name, plain)
            if not job.container.single and not self._may_be(tensors):
                check_free(job.target)
            made_by = composer
            written = yield from write_output(
                job.container,
                job.target,
                tensors,
                job.metadata,
                job.architecture,
                self._catalog,
                autov3=job.output.expect.autov3 is not None,
                groups=self._groups(parts),
                inputs=self._inputs(),
                reporter=context.reporter,
                task=job.output.file,
                accept=lambda w: self._accept(w, parts, beside, made_by, read),
            )
            assert self._product is not None
            path = str(self._product.built.path)
            place = (lambda name: (path, written.offsets[name])) if written.offsets else None
            lost = find_lost(tensors, written.zeros, place)
            if (problem := problem_of(lost)) is not None:
                context.reporter.warn(problem)
        self._remember(written, parts, beside)
        self._product.built = self._with_sidecar(self._product.built)
        return self._product

    def _may_be(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether what is in its place has the table of contents of this, and so may turn out to be it."""
        if self.job.recipe.path is None:  # a command's, of which it may be the input
            return False
        try:
            with open_checkpoint(self.job.target, self._catalog.layouts) as held:
                return _specs(held) == _specs(tensors)
        except CkptError:
            return False

    def _is_held(self, key: Key) -> bool:
        made = self.context.made(key)
        return made is not None and self.context.store.holds(made.digest)

    def _part(self, cls: str, names: Names, key: Key, composer: Composer) -> Part:
        """A component from where it lies, else composed of what it is made of."""
        context = self.context
        made = context.made(key)
        if made is not None and (stored := context.store.open(made.digest)) is not None:
            composer.opened.callback(stored.close)
            return Part(cls, key, names, made.component, stored.tensors, made.changes, made)
        self.parts_of.bring(key)
        return Part(cls, key, names, *composer.finish(key))

    def _beside(self) -> dict[str, LazyTensor]:
        """What lies beside the components, by full name."""
        markers = self.job.beside.markers
        made: dict[str, LazyTensor] = {m.name: MemoryTensor(m.dtype, m.shape, m.data) for m in markers}
        if self.base is None:
            return made
        held = self.context.sources.open(self.base[1]).checkpoint
        return {**{n: held[n] for n in self.job.beside.names}, **made}

    def _groups(self, parts: list[Part]) -> dict[str, str]:
        """The tensors to be counted for the metric, each with its class: of those not measured before."""
        store = self.context.store
        stored = {p.cls: known_digits(store, p.cls, p.stored.digest) for p in parts if p.stored is not None}
        self._digits = {cls: digits for cls, digits in stored.items() if digits is not None}
        new = (p for p in parts if p.cls not in self._digits)
        return counted({p.cls: {n: p.names.name(n) for n in p.tensors} for p in new}, self._catalog)

    # -- what was made

    def _accept(
        self,
        written: Written,
        parts: list[Part],
        beside: Mapping[str, LazyTensor],
        composer: Composer,
        read: list[tuple[Key, SourceJob]],
    ) -> Path | None:
        """Where the file goes, if all is right with it; None: it is there already."""
        context, store = self.context, self.context.store
        self._compare(parts, written)
        if (error := composer.error(*(p.key for p in parts))) is not None:
            raise error
        for key, source in read:
            context.settle(key, source)
        made = {p.cls: self._made(p, written) for p in parts}
        all_rows = dict.fromkeys(self._markers(), EMPTY)
        all_rows |= {n: Row(t.dtype, t.shape, written.digests[n]) for n, t in beside.items()}
        for part in parts:
            all_rows |= {part.names.name(n): row for n, row in self._rows[part.cls].items()}
        digits = {}
        for cls, m in made.items():
            if (scale := self._catalog.scales.get(cls)) is not None:
                known = self._digits.get(cls) or known_digits(store, cls, m.digest)
                counts = written.histograms.get(cls)
                if known is None and counts is not None:
                    known = measured(store, cls, m.digest, counts, scale)
                if known is not None:
                    digits[cls] = known
        tensors = component_digest(all_rows)
        built = Built(
            self.job.output.name,
            self.job.target,
            str(written.sha256),
            written.size,
            tensors,
            metric_text(digits, self._catalog.scales),
            "written",
            written.autov3 or "",
            self._configs(written),
        )
        self.parts_of.check(self.node, made)
        self._hold(built, made)
        if self.naming is not None:
            built = built._replace(path=self.naming(built))
        if self._is_there(built) and self._has_all(built.files):
            built = built._replace(state="unchanged")
        self._product = Product(built, made, tuple(p.key for p in parts if p.computed))
        return built.path if built.state == "written" else None

    def _markers(self) -> list[str]:
        """The markers that a folder's scheduler stands for."""
        container = self.job.container
        return ["v_pred"] * (container.prediction == "v") + ["ztsnr"] * container.zero_snr

    def _compare(self, parts: list[Part], written: Written) -> None:
        """Raise DamagedEntry when what was read from a place is not what lay there."""
        for part in parts:
            for name, tensor in part.tensors.items():
                if isinstance(tensor, VerifiedTensor):
                    found = written.digests[part.names.name(name)]
                    if found != tensor.digest:
                        raise tensor.damaged(f"tensor `{name}` is not the one that was stored")

    def _made(self, part: Part, written: Written) -> Made:
        rows = {
            n: Row(t.dtype, t.shape, written.digests[part.names.name(n)]) for n, t in part.tensors.items()
        }
        self._rows[part.cls] = rows
        size = sum(t.nbytes for t in part.tensors.values())
        return Made(part.component, part.cls, component_digest(rows), len(rows), size, part.changes)

    def _is_there(self, built: Built) -> bool:
        """Whether the file that would be replaced is the same."""
        try:
            stat = built.path.lstat()
        except OSError:
            return False
        same = stat.st_size == built.size or not self.job.container.single
        return same and not built.path.is_symlink() and self._is(built.path, built.sha256)

    def _configs(self, written: Written) -> dict[str, str]:
        """The SHA-256 of a folder's configurations and vocabularies, which its own is not over all of."""
        files = written.files if self.job.container.form == "diffusers" else {}
        return {p: sha256 for p, (sha256, _) in files.items() if not p.endswith(".safetensors")}

    def _hold(self, built: Built, made: Mapping[str, Made]) -> None:
        """Raise unless it is what the recipe expects, and what the lock that must not change says."""
        if problems := missed(self.job.recipe, self.job.output, built):
            raise OutputError(*problems)
        if self.locked is None:
            return
        now = lock_of(self.context, {self.node.key: Product(built, dict(made))})
        others = {o.name for o in self.context.plan.recipe.outputs} - {self.job.output.name}
        if changes := differences(self.locked.without(others), now.had_as(self.locked)):
            hint = "`ckpt build` without `--locked` accepts the change"
            recipe = self.job.recipe
            place = Place(str(recipe.path)) if recipe.path is not None and recipe.address is None else None
            raise LockError(Problem("the lock is stale", place, tuple(changes), hint))

    def _remember(self, written: Written, parts: list[Part], beside: Mapping[str, LazyTensor]) -> None:
        """Have known what was made, and that its bytes lie in the file, as this is now."""
        context, store, product, job = self.context, self.context.store, self._product, self.job
        assert product is not None
        built = product.built
        files = {built.path: (built.sha256, written.stat)}
        if written.files:
            folder = built.path if self.job.container.form == "diffusers" else built.path.parent
            files = {folder / p: found for p, found in written.files.items()}
        try:
            now = {path: path.stat() for path in files}
        except OSError:
            return
        for path, (digest, then) in files.items() if built.state == "written" else ():
            if not os.path.samestat(now[path], then) or now[path].st_mtime_ns != then.st_mtime_ns:
                return  # another build has put its own there since
            store.memory.remember(now[path], digest, seen=None)
        names = {p.cls: sorted(self._rows[p.cls]) for p in parts}
        for part in parts:
            made, action = product.parts[part.cls], context.action(part.key)
            if action is None:
                continue  # of sources that were not to be hashed
            source = self._source_of(part.key)
            entry = Entry(made.digest, made.component, made.cls, source, self._rows[part.cls])
            at = None
            if written.offsets:
                offsets = tuple(written.offsets[part.names.name(n)] for n in names[part.cls])
                at = At(str(built.path.absolute()), identity(now[built.path]), offsets)
            store.place(entry, at)
            kept = store.blob_path(made.digest).exists()
            sharing = store.shared is not None and store.shared.writing and at is None
            keep = (store.keep_all or sharing) and not kept
            wanted = keep or (part.computed and self.parts_of.fetched(part.key))
            if wanted and job.container.encoding is None:  # in blocks, other numbers are in the file
                self._keep(made, source, part.names)
            if self.parts_of.trusted(part.key):
                context.remember(part.key, made, computed=part.computed)
        sha256 = self._base_sha256()
        rows = {n: Row(t.dtype, t.shape, written.digests[n]) for n, t in beside.items()}
        if sha256 is not None and job.beside.names:
            note_beside(store, sha256, job.beside, rows)
        if job.told is not None:
            key, found = job.told
            teller, known = context.node(key).job, context.action(key)
            assert isinstance(teller, SourceJob)
            if known is not None and context.sources.find(teller) is not None:
                note_prediction(store, known, found)
        if all(context.action(p.key) for p in parts) and (sha256 is not None or self.base is None):
            key = assembly_key(job, {c: m.digest for c, m in product.parts.items()}, rows)
            known_as = (built.sha256, built.size, built.tensor_digest, built.metric)
            product.known = key, KnownOutput(*known_as, built.files, built.autov3)
            note_output(store, *product.known)

    def _keep(self, made: Made, source: str, names: Names) -> None:
        """Have the bytes of a component kept by the store, from what was written."""
        store, rows = self.context.store, self._rows[made.cls]
        assert self._product is not None
        with suppress(SourceError), open_checkpoint(self._product.built.path, self._catalog.layouts) as held:
            tensors = {n: held[names.name(n)] for n in rows}
            store.save(made.component, made.cls, tensors, source=source, stop=self.context.stop)

    def _source_of(self, key: Key) -> str:
        """What a component was made of, in words."""
        jobs = [job for _, job in self.context.source_nodes([key])]
        return ", ".join(dict.fromkeys(Path(j.file).name if j.file else j.name for j in jobs))

    def _with_sidecar(self, built: Built) -> Built:
        """The output, with its configuration put beside it; one that is there and is none of ours stays."""
        if self.job.sidecar is None:
            return built
        path, store = built.path.with_suffix(CONFIG), self.context.store
        key = expression_key("sidecar", 1, path=str(path.absolute()))
        wanted = hashlib.sha256(self.job.sidecar).hexdigest()
        with_it = built._replace(beside=((path.name, wanted),))
        if os.path.lexists(path):
            held = _sha256_of(path)
            if held == wanted:
                return with_it
            ours = store.recall("sidecar", key, lambda fact: fact["sha256"])
            if held is None or ours != held:
                fact = f"`{path.name}` is there already and stays as it is"
                hint = "remove it, and build again to have the one that the recipe asks for"
                self.context.reporter.warn(Problem(fact, Place(str(path)), hint=hint))
                return built
        write_bytes(path, self.job.sidecar, inputs=self._inputs())
        store.note("sidecar", key, {"sha256": wanted})
        return with_it

    def _inputs(self) -> list[Path]:
        """Every file that this build reads: none of them may be overwritten."""
        plan, sources = self.context.plan, self.context.sources
        recipes = [r.path for r in _recipes(self.job) if r.path is not None]
        inputs = [*recipes, *(r.lock for r in _recipes(self.job) if r.lock is not None)]
        for job in (n.job for n in plan if isinstance(n.job, SourceJob)):
            if (found := sources.find(job)) is not None:
                inputs.append(found.path)
                with suppress(SourceError):
                    inputs += [Path(b.name) for b in sources.open(job).files]
        return inputs


def _sha256_of(path: Path, limit: int = MAX_SIDECAR) -> str | None:
    """The SHA-256 of a regular file of at most `limit` bytes; None for what is none."""
    try:
        if path.is_symlink():
            return None
        with closing(FileBlob(path)) as blob:
            return hashlib.sha256(blob.read(0, min(blob.size, limit + 1))).hexdigest()
    except (SourceError, OSError, ValueError):  # or no path at all
        return None


def _recipes(job: OutputJob) -> list[Recipe]:
    found = [job.recipe]
    for recipe in found:
        found += recipe.included.values()
    return found


def lock_of(context: Context, products: Mapping[Key, Product]) -> Lock:
    """The lock of outputs that were built, by node."""
    components, outputs = [], {}
    for key, product in products.items():
        job, built = context.node(key).job, product.built
        assert isinstance(job, OutputJob)
        for cls, (_, node) in job.slots.items():
            part = product.parts[cls]
            source = context.component(node).source
            components.append(
                LockedComponent(job.output.name, cls, part.component, source, part.digest, part.tensors)
            )
        outputs[job.output.name] = LockedOutput(
            job.output.file,
            built.sha256,
            built.tensor_digest,
            built.size,
            built.metric,
            "" if DATE in job.output.metadata else job.metadata.get(DATE, ""),
        )
    sources = locked_sources(context.plan.entries, context.sources)
    return Lock(context.plan.recipe.digest, sources, tuple(components), outputs)


def _specs(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[DType, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
