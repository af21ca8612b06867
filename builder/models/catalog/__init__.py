"""The catalog: which components and architectures there are, by name and shape of every tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import components_db
from builder.base.errors import CatalogError, Problem, did_you_mean
from builder.base.words import spelling
from builder.models.catalog.files import (
    Fields,
    Table,
    read_architectures,
    read_known,
    read_optional,
    read_table,
)
from builder.models.catalog.tables import (
    RANK,
    Architecture,
    Catalog,
    Component,
    Known,
    KnownFile,
    KnownMetric,
    KnownPart,
    TensorRule,
    Tensors,
)

__all__ = [
    "RANK",
    "Architecture",
    "Catalog",
    "Component",
    "Known",
    "KnownFile",
    "KnownMetric",
    "KnownPart",
    "TensorRule",
    "load_catalog",
]

BUILT_IN = Path(components_db.__file__).parent


def load_catalog(extra: Sequence[Path] | None = None) -> Catalog:
    """The built-in catalog, and the folders of `extra` (default: those that CKPT_COMPONENTS names).

    The tables of a user's own folders are checked at once; a built-in one is expanded when its tensors are
    asked for. Called again with the same folders, it gives the same object. Raises CatalogError.
    """
    if extra is None:
        extra = [Path(p) for p in os.environ.get("CKPT_COMPONENTS", "").split(os.pathsep) if p]
    return _load(tuple(map(Path, extra)))


@lru_cache(maxsize=8)
def _load(extra: tuple[Path, ...]) -> Catalog:
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
    for name in reader.tables.keys() - built_in:
        len(catalog.components[name].tensors)  # expands it
    return catalog


class _Reader:
    """Reads folder after folder; what refers to something else is joined when all are read."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.components: dict[str, Component] = {}
        self.architectures: dict[str, Architecture] = {}
        self.fields: dict[str, Fields] = {}  # of each architecture
        self.spellings: dict[str, Architecture] = {}
        self.optional: dict[str, tuple[int, ...] | None] = {}
        self.known: list[KnownMetric | KnownFile | KnownPart] = []

    def folder(self, root: Path, called: str) -> None:
        """Read every TOML file below a folder; its subfolders `architectures` and `known` are special."""
        for path in sorted(root.rglob("*.toml")):
            inner = path.relative_to(root)
            name = f"{called}/{inner.as_posix()}"
            if inner.parts[0] == "architectures":
                self._architectures(path, name)
            elif inner.parts[0] == "known":
                self.known += read_known(path, name)
            elif inner.parts == ("optional.toml",):
                self.optional |= read_optional(path, name)
            else:
                self._table(read_table(path, name))

    def _table(self, table: Table) -> None:
        if table.name in self.tables:
            other = self.tables[table.name].fields.document.path
            built_in = other.startswith(f"{BUILT_IN.name}/")
            fact = f"component `{table.name}` is {'built in' if built_in else 'declared'} already"
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
        for name, fields in self.fields.items():
            architecture = self.architectures[name]
            for field, known in (("slots", classes), ("only", self.components)):
                for index, word in enumerate(getattr(architecture, field)):
                    if word not in known:
                        what = "class" if field == "slots" else "component"
                        fields.fail(f"unknown {what} `{word}`", field, index, hint=did_you_mean(word, known))
        return Catalog(
            components=self.components,
            classes={cls: tuple(members) for cls, members in classes.items()},
            architectures=self.architectures,
            spellings=self.spellings,
            optional=self.optional,
            known=Known(
                tuple(k for k in self.known if isinstance(k, KnownMetric)),
                tuple(k for k in self.known if isinstance(k, KnownFile)),
                tuple(k for k in self.known if isinstance(k, KnownPart)),
            ),
        )

    def _component(self, name: str, below: tuple[str, ...]) -> Component:
        if name in self.components:
            return self.components[name]
        table = self.tables[name]
        fields = table.fields
        cls, prefix, plain = fields.get("class"), fields.get("prefix"), Tensors(dict)
        if table.extends is not None:
            chain = (*below, name)
            if table.extends in chain:
                loop = " → ".join((*chain[chain.index(table.extends) :], table.extends))
                fields.fail(f"`{name}` extends itself", "extends", value=True, evidence=(loop,))
            if table.extends not in self.tables:
                hint = did_you_mean(table.extends, self.tables)
                fields.fail(f"unknown component `{table.extends}`", "extends", value=True, hint=hint)
            base = self._component(table.extends, chain)
            plain = base.tensors
            cls = base.cls if cls is None else cls
            prefix = base.prefix if prefix is None else prefix
        component = Component(
            name=name,
            cls=cls,
            prefix=prefix or "",
            tensors=Tensors(partial(table.expand, plain)),
            keys=fields.get("keys"),
            parameters=fields.get("parameters"),
            note=fields.get("note"),
            naming=table.naming,
            base=table.extends if table.naming else None,
            extends=table.extends,
            modelspec=fields.get("modelspec"),
            path=fields.document.path,
            plain=plain,
        )
        self.components[name] = component
        return component
