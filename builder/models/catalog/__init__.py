"""The catalog: which components and architectures there are, by name and shape of every tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import components_db
from builder.base.errors import CatalogError, Problem, did_you_mean
from builder.base.words import spelling
from builder.models.catalog.classes import read_classes
from builder.models.catalog.components import Table, alone, read_table
from builder.models.catalog.fields import Fields, modelspec
from builder.models.catalog.reading import (
    read_architectures,
    read_kinds,
    read_known,
    read_optional,
    read_prefixes,
    read_programs,
    read_sites,
)
from builder.models.catalog.tables import (
    PARTS,
    PLAIN,
    RANK,
    Architecture,
    Catalog,
    Component,
    KindRule,
    Known,
    KnownFile,
    KnownMetric,
    KnownPart,
    Later,
    ModelRule,
    ModelSpec,
    Names,
    Scale,
    TensorRule,
    Traits,
)

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
    from builder.formats.layouts.rules import Rules

__all__ = [
    "PARTS",
    "PLAIN",
    "RANK",
    "Architecture",
    "Catalog",
    "Component",
    "KindRule",
    "Known",
    "KnownFile",
    "KnownMetric",
    "KnownPart",
    "ModelRule",
    "ModelSpec",
    "Names",
    "Scale",
    "TensorRule",
    "Traits",
    "load_catalog",
]

MAX_CHAIN = 8  # tables that extend each other
MAX_BLOCKS_IN_ALL = 100_000  # of all classes
MAX_TENSORS = 1_000_000  # of all tables that are a user's own
BUILT_IN = Path(components_db.__file__).parent


def load_catalog(extra: Sequence[Path] | None = None) -> Catalog:
    """The built-in catalog, and the folders of `extra` (default: those that CKPT_COMPONENTS names).

    What is in a user's own folders is checked at once; a built-in table is expanded when its tensors are
    asked for, as are the names that adapters use, and layouts are read when there is one to convert. Called
    again with the same folders, it gives the same object for as long as nothing in them has changed. Raises
    CatalogError.
    """
    if extra is None:
        extra = [Path(p) for p in os.environ.get("CKPT_COMPONENTS", "").split(os.pathsep) if p]
    folders = tuple(map(Path, extra))
    return _load(folders, tuple(map(_state, folders)))


def _state(folder: Path) -> tuple[object, ...]:
    """What tells whether tables in a folder have changed since they were read."""
    found: list[object] = []
    for path in sorted(folder.rglob("*.toml")):
        with suppress(OSError):  # which whoever reads it tells of
            status = path.lstat()
            found.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


@lru_cache(maxsize=8)
def _load(extra: tuple[Path, ...], _: tuple[object, ...]) -> Catalog:
    reader = _Reader()
    reader.folder(BUILT_IN, BUILT_IN.name)
    built_in = set(reader.tables)
    for folder in extra:
        if not folder.is_dir():
            raise CatalogError(
                Problem(
                    f"`{folder}` is not a folder", hint="CKPT_COMPONENTS names folders of component tables"
                )
            )
        reader.folder(folder, str(folder))
    catalog = reader.catalog()
    total = 0
    for name, table in reader.tables.items():
        if name not in built_in:
            total += len(catalog.components[name].tensors)  # expands it
            if total > MAX_TENSORS:
                table.fields.fail(f"the tables have more than {MAX_TENSORS:,} tensors in all")
    for traits in catalog.traits.values():
        if _own(traits.path) and traits.adapters is not None:
            len(traits.adapters.names)  # expands them
    if any(_own(name) for _, name in reader.layouts) or any(
        a.diffusers for a in catalog.architectures.values() if _own(a.path)
    ):
        len(catalog.layouts)  # reads them
    return catalog


def _beginnings(table: Table, base: Component | None, without: str) -> frozenset[str]:
    """What names of a component have before their first dots, those too that it leaves out of its base."""
    return frozenset(table.beginnings(without)) | (base.beginnings(without) if base else frozenset())


def _own(file: str) -> bool:
    """Whether a file, as it is called in messages, is a user's own."""
    return not file.startswith(f"{BUILT_IN.name}/")


def _order(architecture: Architecture) -> tuple[bool, bool, str]:
    """What is built in first, and of that whole models before parts; then by name."""
    return _own(architecture.path), len(architecture.slots) == 1, architecture.name.casefold()


class _Reader:
    """Reads folder after folder; what refers to something else is joined when all are read."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.components: dict[str, Component] = {}
        self.architectures: dict[str, Architecture] = {}
        self.fields: dict[str, Fields] = {}  # of each architecture
        self.described: dict[str, Fields] = {}  # of each class that has some
        self.spellings: dict[str, Architecture] = {}
        self.optional: dict[str, tuple[int, ...] | None] = {}
        self.prefixes: dict[str, None] = {}
        self.wrappers: dict[str, None] = {}
        self.respelt: dict[str, str] = {}
        self.traits: dict[str, Traits] = {}
        self.blocks_in_all = 0
        self.lists: dict[int, str] = {}  # by their length: the first class that they weigh
        self.layouts: list[tuple[Path, str]] = []  # files, which are read when they are needed
        self.programs: dict[str, dict[str, str]] = {}
        self.sites: dict[str, dict[str, dict[str, str]]] = {}
        self.depths: dict[str, int] = {}  # of each component: how many others it extends
        self.kinds: list[KindRule | ModelRule] = []
        self.known: list[KnownMetric | KnownFile | KnownPart] = []

    def folder(self, root: Path, called: str) -> None:
        """Read every TOML file below a folder; what it holds, its name or a folder's says."""
        for path in sorted(root.rglob("*.toml")):
            inner = path.relative_to(root)
            name = f"{called}/{inner.as_posix()}"
            if root != BUILT_IN and path.is_symlink():  # which may lead to any file, and messages quote it
                raise CatalogError(
                    Problem(f"`{name}` is a link, not a file", hint="put the file itself there")
                )
            kind = next((w for w in inner.with_suffix("").parts if w in self.KINDS), None)
            (self.KINDS[kind] if kind else _Reader._table)(self, path, name)

    def _table(self, path: Path, name: str) -> None:
        table = read_table(path, name)
        if table.name in self.tables:
            other = self.tables[table.name].fields.document.path
            fact = f"component `{table.name}` is {'declared' if _own(other) else 'built in'} already"
            table.fields.fail(
                fact, "name", value=True, evidence=(f"in {other}",), hint="give it a name of its own"
            )
        self.tables[table.name] = table

    def _architectures(self, path: Path, name: str) -> None:
        for architecture, fields in read_architectures(path, name):
            for key, word in ((None, architecture.name), *enumerate(architecture.aliases)):
                holder = self.spellings.setdefault(spelling(word), architecture)
                if holder is not architecture:
                    at = () if key is None else ("aliases", key)
                    fields.fail(f"`{word}` already means {holder.name}", *at, evidence=(f"in {holder.path}",))
            self.architectures[architecture.name] = architecture
            self.fields[architecture.name] = fields

    def _classes(self, path: Path, name: str) -> None:
        for cls, traits, fields in read_classes(path, name):
            if cls in self.traits:
                fields.fail(f"class `{cls}` is described already", evidence=(f"in {self.traits[cls].path}",))
            length = len(traits.lists) + len(traits.blocks)
            other = self.lists.setdefault(length, cls) if traits.lists else cls
            if other != cls and (their := self.traits[other]).blocks != traits.blocks:
                fact = f"lists of as many numbers weigh `{other}`, which has other blocks"
                fields.fail(fact, "lists", value=True, evidence=(f"in {their.path}",))
            self.traits[cls] = traits
            self.described[cls] = fields
            self.blocks_in_all += len(traits.block_of)
            if self.blocks_in_all > MAX_BLOCKS_IN_ALL:
                fields.fail(f"more than {MAX_BLOCKS_IN_ALL:,} blocks in all classes")

    def _kinds(self, path: Path, name: str) -> None:
        self.kinds += read_kinds(path, name, sum(k.patterns for k in self.kinds))

    def _known(self, path: Path, name: str) -> None:
        self.known += read_known(path, name)

    def _optional(self, path: Path, name: str) -> None:
        self.optional |= read_optional(path, name)

    def _prefixes(self, path: Path, name: str) -> None:
        prefixes, wrappers, respelt = read_prefixes(path, name)
        self.respelt |= respelt
        self.prefixes |= dict.fromkeys(prefixes)
        self.wrappers |= dict.fromkeys(wrappers)

    def _layouts(self, path: Path, name: str) -> None:
        self.layouts.append((path, name))

    def _programs(self, path: Path, name: str) -> None:
        for program, folders, fields in read_programs(path, name, not _own(name)):
            known = self.programs.setdefault(program, {})
            for kind in folders:
                if kind in known:
                    fields.fail(f"{program} has a folder for `{kind}` already", program, kind)
            known |= folders
            for kind in ("checkpoint", "other"):
                if kind not in known:
                    fields.fail(f"`{kind}` is missing", program)

    def _sites(self, path: Path, name: str) -> None:
        for site, table, words in read_sites(path, name):
            self.sites.setdefault(site, {}).setdefault(table, {}).update(words)

    KINDS: ClassVar[Mapping[str, Callable[[_Reader, Path, str], None]]] = {
        "architectures": _architectures,
        "classes": _classes,
        "diffusers": _layouts,
        "kinds": _kinds,
        "known": _known,
        "optional": _optional,
        "prefixes": _prefixes,
        "programs": _programs,
        "sites": _sites,
    }

    def catalog(self) -> Catalog:
        """Join what was read. Raises CatalogError for a reference to something that is not there."""
        for name in self.tables:
            self._component(name, ())
        classes: dict[str, list[Component]] = {}
        for component in self.components.values():
            classes.setdefault(component.cls, []).append(component)
        for members in classes.values():
            # The standard one is that which is not a variant of another of its class.
            members.sort(key=lambda c: c.extends in {m.name for m in members})
        for cls, fields in self.described.items():
            if cls not in classes:
                fields.fail(f"unknown class `{cls}`", hint=did_you_mean(cls, classes))
        for name, fields in self.fields.items():
            architecture = self.architectures[name]
            for program in architecture.sidecars_v.keys() - self.programs.keys():
                hint = did_you_mean(program, self.programs)
                fields.fail(f"unknown program `{program}`", "sidecars_v", program, hint=hint)
            for field, what, known in (
                ("slots", "class", classes),
                ("only", "component", self.components),
                ("reads_markers", "program", self.programs),
                ("tells_v", "program", self.programs),
            ):
                for index, word in enumerate(getattr(architecture, field)):
                    if word not in known:
                        fields.fail(f"unknown {what} `{word}`", field, index, hint=did_you_mean(word, known))
        return Catalog(
            components=self.components,
            classes={cls: tuple(members) for cls, members in classes.items()},
            traits=self.traits,
            architectures=dict(sorted(self.architectures.items(), key=lambda named: _order(named[1]))),
            spellings=self.spellings,
            optional=self.optional,
            prefixes=tuple(self.prefixes),
            wrappers=tuple(self.wrappers),
            respelt=self.respelt,
            known=Known(
                tuple(k for k in self.known if isinstance(k, KnownMetric)),
                tuple(k for k in self.known if isinstance(k, KnownFile)),
                tuple(k for k in self.known if isinstance(k, KnownPart)),
            ),
            layouts=Later(lambda: self._read_layouts[1]),
            rules=Later(lambda: self._read_layouts[0]),
            programs=self.programs,
            sites=self.sites,
            kinds=tuple(k for k in self.kinds if isinstance(k, KindRule)),
            models=tuple(k for k in self.kinds if isinstance(k, ModelRule)),
        )

    @cached_property
    def _read_layouts(self) -> tuple[dict[str, Rules], dict[str, Layout]]:
        from builder.models.catalog.layouts import read_layouts

        rules, found = read_layouts(self.layouts)
        for cls, fields in self.described.items():
            adapters = self.traits[cls].adapters
            if adapters is not None and adapters.rules is not None and adapters.rules not in rules:
                hint = did_you_mean(adapters.rules, rules)
                fact = f"unknown rules `{adapters.rules}`"
                fields.fail(fact, "adapters", "rules", value=True, hint=hint)
        for name, fields in self.fields.items():
            layout = self.architectures[name].diffusers
            if layout is not None and layout not in found:
                hint = did_you_mean(layout, found)
                fields.fail(f"unknown layout `{layout}`", "diffusers", value=True, hint=hint)
        return rules, found

    def _component(self, name: str, below: tuple[str, ...]) -> Component:
        if name in self.components:
            return self.components[name]
        table = self.tables[name]
        fields = table.fields
        cls, prefix = fields.get("class"), fields.get("prefix")
        written = alone(fields)
        plain: Mapping[str, TensorRule] = {}
        base: Component | None = None
        average_of = None
        precision = fields.precision()
        if table.extends is not None:
            chain = (*below, name)
            if table.extends in chain:
                loop = " → ".join((*chain[chain.index(table.extends) :], table.extends))
                fields.fail(f"`{name}` extends itself", "extends", value=True, evidence=(loop,))
            if table.extends not in self.tables:
                hint = did_you_mean(table.extends, self.tables)
                fields.fail(f"unknown component `{table.extends}`", "extends", value=True, hint=hint)
            depth = len(chain) if table.extends not in self.components else self.depths[table.extends] + 1
            if depth >= MAX_CHAIN:
                fields.fail(f"more than {MAX_CHAIN} tables extend each other", "extends", value=True)
            base = self._component(table.extends, chain)
            self.depths[name] = self.depths[table.extends] + 1
            plain = base.tensors
            average_of = base.cls if fields.get("average") else None
            cls = base.cls if cls is None else cls
            prefix = base.prefix if prefix is None else prefix
            written = base.alone if written is None and not table.naming else written
            renamed = base.precision if table.naming else None
            precision = precision or self._traits(cls).precision or renamed
        self.depths.setdefault(name, 0)
        component = Component(
            name=name,
            cls=cls,
            prefix=prefix or "",
            tensors=Later(partial(table.expand, plain)),
            keys=fields.get("keys"),
            parameters=fields.get("parameters"),
            note=fields.get("note"),
            naming=table.naming,
            base=table.extends if table.naming else None,
            extends=table.extends,
            average_of=average_of,
            mislabelled=bool(fields.get("mislabelled")),
            models=fields.strings("models"),
            marks=fields.texts("marks"),
            precision=precision or self._traits(cls).precision or "keep",
            traits=self._traits(cls),
            modelspec=modelspec(fields),
            alone=written or PLAIN,
            path=fields.document.path,
            plain=plain,
            beginnings=lru_cache(partial(_beginnings, table, base)),
        )
        self.components[name] = component
        return component

    def _traits(self, cls: str) -> Traits:
        return self.traits.get(cls, Traits())
