"""Layouts: how a model's tensors are named and shaped, in original files and in diffusers' folders."""

from __future__ import annotations

from collections.abc import Mapping

from builder.formats.layouts.tables import PARTS
from builder.tensors.lazy import LazyTensor

Tensors = Mapping[str, LazyTensor]


def to_diffusers(
    family: str, tensors: Tensors
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """A full checkpoint's tensors by diffusers' folder and name; and those that have no place there.

    `family` is one of `PARTS`, `tensors` have their full original names. Nothing is read.
    """
    made: dict[str, dict[str, LazyTensor]] = {part.folder: {} for part in PARTS[family]}
    rest: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        part = next((p for p in PARTS[family] if name.startswith(p.prefix)), None)
        new = part.rules.to_diffusers(name[len(part.prefix) :], tensor) if part else None
        if part is None or new is None:
            rest[name] = tensor
        else:
            made[part.folder].update(new)
    return made, rest


def family_of(folders: Mapping[str, Tensors]) -> str | None:
    """The family of a model in diffusers' layout, by the parts it has and its UNET; None: it is another."""
    unet = folders.get("unet")
    if unet is None:
        return None
    deep = any(name.startswith("down_blocks.3.") for name in unet)
    encoders = folders.keys() & {"text_encoder", "text_encoder_2"}
    if not deep:
        return "SD-XL"
    if encoders == {"text_encoder_2"}:
        return "SD-XL-Refiner"
    projection = unet.get("down_blocks.0.attentions.0.proj_in.weight")
    if len(encoders) == 2 or projection is None:
        return None
    return "SD-v2" if len(projection.shape) == 2 else "SD-v1"


def to_original(
    family: str, folders: Mapping[str, Tensors]
) -> tuple[dict[str, LazyTensor], dict[str, list[str]]]:
    """A full checkpoint's tensors from those of diffusers' folders; and names without a place, by folder.

    Nothing is read. Raises ValueError with a name that two tensors would have.
    """
    made: dict[str, LazyTensor] = {}
    strange: dict[str, list[str]] = {}
    for part in PARTS[family]:
        found = folders.get(part.folder, {})
        if part.folder.startswith("text_encoder"):
            found = {_text_model(n): t for n, t in found.items()}
        original, left = part.rules.to_original(found)
        made |= {part.prefix + n: t for n, t in original.items()}
        if left:
            strange[part.folder] = left
    return made, strange


def _text_model(name: str) -> str:
    """A text encoder's name as transformers before version 5 writes it."""
    known = name.startswith(("text_model.", "text_projection"))
    return name if known else f"text_model.{name}"
