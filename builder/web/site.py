"""What all views share: folders, settings, jobs, and what was found out about files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.base.progress import SILENT, Reporter
from builder.models.catalog import Catalog, load_catalog
from builder.web.folders import Folders
from builder.web.html import Markup
from builder.web.jobs import Jobs
from builder.web.shelf import Shelf
from builder.workspace import Settings, Workspace


@dataclass(frozen=True)
class Form:
    """The fields of a query or of what was sent; several of a name keep their order."""

    fields: Mapping[str, list[str]] = field(default_factory=dict)

    def get(self, name: str, default: str = "") -> str:
        """The last value of a field."""
        return self.fields.get(name, [default])[-1]

    def all(self, name: str) -> list[str]:
        """Every value of a field that is not empty."""
        return [value for value in self.fields.get(name, []) if value]

    def ticked(self, name: str) -> bool:
        """Whether a box was ticked."""
        return bool(self.get(name))

    def starting(self, prefix: str) -> dict[str, str]:
        """The values of fields whose names begin so, by the rest of the name; the empty ones left out."""
        found = ((k[len(prefix) :], self.get(k)) for k in self.fields if k.startswith(prefix))
        return {name: value for name, value in found if value}


@dataclass(frozen=True)
class Response:
    """What a view answers: a body of a type, or another address to go to."""

    body: str | bytes = b""
    status: int = 200
    kind: str = "text/html; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def go_to(address: str) -> Response:
    """Go on there, with GET: what was sent is not sent again when the page is loaded anew."""
    return Response(status=303, headers={"Location": address})


class Site:
    """The state of one run of the page; close it."""

    def __init__(
        self, folders: Folders, settings: Settings, fault: Callable[[BaseException], object]
    ) -> None:
        self.folders = folders
        # The folders of the page are folders of models: recipes find their sources there.
        self.settings = replace(settings, models=(*folders.roots.values(), *settings.models))
        self.jobs = Jobs(fault)
        self.shelf = Shelf()

    def close(self) -> None:
        """Stop what is under way."""
        self.jobs.close()

    @property
    def catalog(self) -> Catalog:
        """The catalog, with the user's own folders."""
        return load_catalog(self.settings.components)

    def workspace(self, reporter: Reporter = SILENT, *, offline: bool = True) -> Workspace:
        """A workspace for one request, or one job."""
        return Workspace(self.settings, offline=offline, reporter=reporter)

    def path(self, reference: str) -> Path:
        """The file of a reference; raises SourceError."""
        return self.folders.path(reference)


View = Callable[[Site, Form], Response | Markup]
Json = dict[str, Any]
