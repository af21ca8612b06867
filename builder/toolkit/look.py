"""What a file is, seen once."""

from __future__ import annotations

from pathlib import Path

from builder.formats import open_checkpoint
from builder.models.catalog import Catalog
from builder.models.identify import Identity, identify


def look(path: Path, catalog: Catalog) -> Identity:
    """What a file is, from its table of contents; raises SourceError."""
    with open_checkpoint(path, catalog.layouts) as checkpoint:
        return identify(checkpoint, catalog)
