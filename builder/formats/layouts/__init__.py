"""Layouts: how a model's tensors are named and shaped, in original files and in diffusers' folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from builder.formats.layouts.rules import Rules
from builder.tensors.lazy import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Part:
    """A part of a model: its folder in diffusers' layout, and its prefix in an original file.

    `model` is the class that loads it, of `library`; `config` what shapes do not say of it, `sizes` how they
    say the rest. `tokenizer` is the folder of the one that the part needs, of the class `tokenizer_model`:
    CLIP's, which fills up with the token `padding`, or another.
    """

    folder: str
    prefix: str
    rules: Rules
    model: str
    library: str = "diffusers"
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    tokenizer_model: str = "CLIPTokenizer"
    padding: str = ""


@dataclass(frozen=True)
class Layout:
    """A model as diffusers has it.

    It is told by `FOLDER/NAME` of its tensors: some begin with each of `has`, none with any of `lacks`, and
    those of `ranks` have as many dimensions. `pipelines` are pipelines by the channels that the first part
    takes, `pipeline` is any other. `pixels` are those it was trained on, `pixels_v` where it predicts v.
    `index` and `absent` are entries of the model's index; `scheduler` is a configuration, to which
    `plain` adds where the noise schedule leaves some of the picture, `zero_snr` where it does not, and each
    of `unless` where no `FOLDER/NAME` begins as its key.
    """

    name: str
    parts: tuple[Part, ...]
    has: tuple[str, ...]
    lacks: tuple[str, ...]
    ranks: Mapping[str, int]
    pipeline: str
    pipelines: Mapping[str, str]
    pixels: int | None
    pixels_v: int | None
    index: Mapping[str, Any]
    absent: tuple[str, ...]
    scheduler: Mapping[str, Any]
    plain: Mapping[str, Any]
    zero_snr: Mapping[str, Any]
    unless: Mapping[str, Mapping[str, Any]]

    def fits(self, ranks: Mapping[str, int]) -> bool:
        """Whether tensors, of so many dimensions by `FOLDER/NAME`, are a model in this layout."""
        return (
            all(any(name.startswith(start) for name in ranks) for start in self.has)
            and not any(name.startswith(self.lacks) for name in ranks)
            and all(ranks.get(name) == rank for name, rank in self.ranks.items())
        )

    def to_diffusers(
        self, tensors: Tensors
    ) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
        """A full checkpoint's tensors by diffusers' folder and name; and those that have no place there.

        `tensors` have their full original names. Nothing is read.
        """
        made: dict[str, dict[str, LazyTensor]] = {part.folder: {} for part in self.parts}
        rest: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            part = next((p for p in self.parts if name.startswith(p.prefix)), None)
            new = part.rules.to_diffusers(name[len(part.prefix) :], tensor) if part else None
            if part is None or new is None:
                rest[name] = tensor
            else:
                made[part.folder].update(new)
        return made, rest

    def to_original(
        self, folders: Mapping[str, Tensors]
    ) -> tuple[dict[str, LazyTensor], dict[str, list[str]]]:
        """A full checkpoint's tensors from those of diffusers' folders; and names without a place, by folder.

        Nothing is read. Raises ValueError with a name that two tensors would have.
        """
        made: dict[str, LazyTensor] = {}
        strange: dict[str, list[str]] = {}
        for part in self.parts:
            original, left = part.rules.to_original(folders.get(part.folder, {}))
            made |= {part.prefix + n: t for n, t in original.items()}
            if left:
                strange[part.folder] = left
        return made, strange


def layout_of(folders: Mapping[str, Tensors], layouts: Iterable[Layout]) -> Layout | None:
    """The layout of a model in diffusers' folders; None: it is another."""
    ranks = {f"{folder}/{name}": len(t.shape) for folder, held in folders.items() for name, t in held.items()}
    return next((layout for layout in layouts if layout.fits(ranks)), None)
