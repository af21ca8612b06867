"""What a folder in the diffusers layout needs to be known of a model: its layout, and what it predicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import Problem
from builder.base.files import read_bounded

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
    from builder.formats.layouts.configs import Prediction
    from builder.models.catalog import Architecture, Catalog
    from builder.models.prediction import Prediction as Told

VOCABULARY = ("vocab.json", "merges.txt")  # of CLIP's tokenizer, which no checkpoint holds
MAX_VOCABULARY = 64 << 20  # bytes; that of CLIP is 1.4 MB
_OTHER_SCHEDULER = "edm_"  # begins the markers of models that diffusers' usual schedulers are not for


def find_layout(name: str, architecture: Architecture, told: Told, catalog: Catalog) -> Layout | Problem:
    """The layout of a model called `name`, of which `told` says what it predicts; or why it has none."""
    hint = "name a file to write it in another container"
    if architecture.diffusers is None:
        known = ", ".join(a.name for a in catalog.architectures.values() if a.diffusers is not None)
        evidence = (f"it is {architecture.name}", f"there are {known}")
        fact = f"`{name}` is no model that diffusers' layout is known for"
        return Problem(fact, evidence=evidence, hint=hint)
    foreign = next((n for n in told.names if n.startswith(_OTHER_SCHEDULER)), None)
    if foreign is not None:
        fact, marker = f"`{name}` is made for another kind of scheduler", f"it has the marker `{foreign}`"
        return Problem(fact, evidence=(marker,), hint=hint)
    return catalog.layouts[architecture.diffusers]


def find_prediction(name: str, told: Told, layout: Layout) -> Prediction | Problem:
    """What a folder's scheduler is to be told of a model; or that nothing says it."""
    if told.kind is None and layout.pixels_v is not None:
        both = f"of {layout.pixels} pixels epsilon, of {layout.pixels_v} pixels v"
        return Problem(
            f"nothing in `{name}` says what it predicts",
            evidence=(f"{layout.name} comes in both kinds: {both}",),
            hint='say `prediction = "epsilon"` or `"v"` under [output]',
        )
    return "v" if told.v else "epsilon"


def read_vocabulary(folder: Path) -> dict[str, bytes]:
    """The files of CLIP's tokenizer in a folder; raises OSError, with words to show and the file's name."""
    found = {}
    for name in VOCABULARY:
        try:
            found[name] = read_bounded(folder / name, MAX_VOCABULARY)
        except OSError as error:
            error.filename = os.fspath(folder / name)
            raise
    return found
