"""What a folder in the diffusers layout needs to be known of a model: its layout, and what it predicts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from builder.base.errors import Problem
from builder.base.files import read_bounded
from builder.recipe.profiles import MAX_VOCABULARY

if TYPE_CHECKING:
    from builder.formats.layouts import Layout
    from builder.formats.layouts.configs import Prediction
    from builder.models.catalog import Architecture, Catalog
    from builder.models.prediction import Prediction as Told

_CLIP = ("vocab.json", "merges.txt")  # the words of CLIP's tokenizer, which are in no checkpoint
_TOKENIZER = (  # the files of any other, as they are
    "tokenizer.json",
    *_CLIP,
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
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


def vocabulary_files(folder: Path, layout: Layout) -> dict[str, str]:
    """The files of a layout's tokenizers, by their path in a model's folder: their path below `folder`.

    That is a model's folder, which has its tokenizers in their own, or one that holds CLIP's vocabulary or
    the model's only tokenizer itself. Of CLIP's, both files are named where one is there; where there is no
    tokenizer at all, a file that is looked for.
    """
    found: dict[str, str] = {}
    looked: list[tuple[str, str]] = []
    parts = [(p.tokenizer, bool(p.padding)) for p in layout.parts if p.tokenizer is not None]
    for own, clip in parts:
        names = _CLIP if clip else _TOKENIZER
        homes = (f"{own}/", "") if clip or len(parts) == 1 else (f"{own}/",)
        for home in homes:
            here = [name for name in names if os.path.isfile(folder / home / name)]  # noqa: PTH113 - raises nothing
            if here:
                found |= {f"{own}/{name}": home + name for name in (names if clip else here)}
                break
        looked.append((f"{own}/{names[0]}", homes[-1] + names[0]))
    return found or dict(looked[:1])


def vocabulary_names(layouts: Iterable[Layout]) -> tuple[str, ...]:
    """Every path, from the folder that a recipe calls its tokenizer, that a file of one may have."""
    own = {f"{p.tokenizer}/" for layout in layouts for p in layout.parts if p.tokenizer is not None}
    return tuple(home + name for home in ("", *sorted(own)) for name in _TOKENIZER)


def lacking(layout: Layout, vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The tokenizers of a layout of which there are no files, of those of these paths."""
    held = {path.partition("/")[0] for path in vocabulary}
    return tuple(p.tokenizer for p in layout.parts if p.tokenizer is not None and p.tokenizer not in held)


def no_tokenizer(layout: Layout) -> Problem:
    """That a layout has no place for a tokenizer."""
    return Problem(f"a folder of {layout.name} is written without its tokenizer")


def read_vocabulary(folder: Path, layout: Layout) -> dict[str, bytes]:
    """The files of a layout's tokenizers, by their path in a model's folder; raises OSError, with words to
    show and the file's name."""
    found = {}
    for path, file in vocabulary_files(folder, layout).items():
        try:
            found[path] = read_bounded(folder / file, MAX_VOCABULARY)
        except OSError as error:
            error.filename = os.fspath(folder / file)
            raise
    return found
