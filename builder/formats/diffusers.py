"""Folders in diffusers' layout: read as one checkpoint under the original names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from builder.base.errors import Place, Problem, SourceError
from builder.base.files import parse_json
from builder.base.inside import is_name
from builder.formats.blob import FileBlob
from builder.formats.checkpoint import Checkpoint
from builder.formats.layouts import Layout, layout_of
from builder.formats.layouts.configs import MODEL_INDEX, SCHEDULER
from builder.tensors.lazy import DType, MemoryTensor
from builder.tensors.packed import packing

# What the layout has no place for, such as noise schedules; diffusers does not look at it.
REMAINDER = "remainder.safetensors"

_SAFETY = ("safety_checker", "image_encoder")  # parts of a pipeline that are none of the model
_WITHOUT = (*_SAFETY, "scheduler", "tokenizer", "feature_extractor")  # folders without weights of the model
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<indexed>[\w-]+))?\.json)?"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANTS = ("", "fp16", "bf16")  # in the order of preference; others only where they are alone
_MAX_CONFIG = 1 << 20  # bytes


def open_folder(
    folder: Path, name: str, layouts: Collection[Layout], open_file: Callable[[Path, str], Checkpoint]
) -> Checkpoint:
    """The checkpoint of a model's folder in one of diffusers' layouts, under the names of the original.

    Of each part, safetensors are preferred to PyTorch files and the plain file to variants such as fp16.
    Markers tell what the scheduler's configuration says of v-prediction and zero terminal SNR. Parts and
    tensors that an original file has no place for are listed as `others`. `open_file` opens a file.
    Raises SourceError for a model of another kind, a part without weights, and what `open_file` raises.
    """
    with ExitStack() as stack:
        checkpoint = _join(folder, name, layouts, *_open_parts(folder, open_file, stack))
        stack.pop_all()
    return checkpoint


def files_in(folder: Path, open_file: Callable[[Path, str], Checkpoint]) -> list[Path]:
    """The files that a model's folder in diffusers' layout is read from; raises as `open_folder`."""
    with ExitStack() as stack:
        _, opened, configs = _open_parts(folder, open_file, stack)
        return sorted(Path(b.name) for b in (*configs, *(b for c in opened.values() for b in c.blobs)))


def _open_parts(
    folder: Path, open_file: Callable[[Path, str], Checkpoint], stack: ExitStack
) -> tuple[dict[str, Any], dict[str, Checkpoint], list[FileBlob]]:
    """The index of a folder, its parts by name (the remainder as ""), and the configurations that are read:
    the index itself, and the scheduler's."""
    configs = [stack.enter_context(closing(FileBlob(folder / MODEL_INDEX)))]
    index = _read_config(configs[0])
    opened: dict[str, Checkpoint] = {}
    for part, said in index.items():
        held = isinstance(said, list) and any(said) and not part.startswith(_WITHOUT)
        if held and is_name(part) and (folder / part).is_dir():
            path = weights_in(folder / part)
            opened[part] = stack.enter_context(open_file(path, str(path)))
    if (folder / REMAINDER).is_file():
        opened[""] = stack.enter_context(open_file(folder / REMAINDER, str(folder / REMAINDER)))
    if (folder / SCHEDULER).is_file():
        configs.append(stack.enter_context(closing(FileBlob(folder / SCHEDULER))))
    return index, opened, configs


def _join(
    folder: Path,
    name: str,
    layouts: Collection[Layout],
    index: Mapping[str, Any],
    opened: Mapping[str, Checkpoint],
    configs: list[FileBlob],
) -> Checkpoint:
    layout = layout_of(opened, layouts)
    if layout is None:
        raise SourceError(
            Problem(
                f"`{folder}` is a model in diffusers' layout, but of a kind that has no original layout here",
                evidence=(f"`{MODEL_INDEX}` calls it {str(index.get('_class_name'))[:80]}",),
                hint="give one of the safetensors files in its subfolders",
            )
        )
    held = {f"{part}/{n}": t for part in opened if part for n, t in opened[part].items()}
    if packed := packing(held):  # of what is joined or turned, no scale would be the right one
        hint = "give the file that it was made from"
        raise packed.refused("are not read from a folder in diffusers' layout", hint)
    try:
        tensors, strange = layout.to_original(opened)
    except ValueError as error:
        raise SourceError(Problem(f"two tensors would be `{error}`", Place(str(folder)))) from None
    remainder = opened.get("")
    for tensor in remainder or ():
        if tensor in tensors:
            raise SourceError(
                Problem(f"tensor `{tensor}` comes twice", Place(remainder.name if remainder else ""))
            )
    tensors |= remainder.tensors if remainder is not None else {}
    for marker in _markers(configs[1] if len(configs) > 1 else None):
        tensors.setdefault(marker, MemoryTensor(DType.F32, (0,), b""))
    others = {
        f"{part}/{n}": "a tensor that the original layout lacks" for part in strange for n in strange[part]
    }
    known = {"", *(part.folder for part in layout.parts)}
    besides = [part for part in opened if part not in known]
    besides += [part for part in _SAFETY if (folder / part).is_dir()]
    others |= dict.fromkeys(besides, "a part of the pipeline, not of the model")
    return Checkpoint(
        name,
        "diffusers",
        sum(c.size for c in opened.values()),
        tensors,
        remainder.metadata if remainder is not None else dict(opened[layout.parts[0].folder].metadata),
        globals=tuple(sorted({g for c in opened.values() for g in c.globals})),
        others=others,
        blobs=(*configs, *(blob for c in opened.values() for blob in c.blobs)),
        mended=tuple(f"{folder}: {m}" for folder, c in opened.items() for m in c.mended),
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a file whose name is usual for a part's weights."""
    try:
        return any(_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    except OSError:
        return False


def weights_in(folder: Path) -> Path:
    """The file, or the index of a sharded set, that holds a part's weights; raises SourceError."""
    found: dict[tuple[bool, str], list[Path]] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(Problem(f"cannot read `{folder}`", evidence=(str(error.strerror),))) from None
    for path in paths:
        match = None if _SHARD.search(path.name) else _WEIGHTS.fullmatch(path.name)
        if match is not None:
            variant = match["variant"] or match["indexed"] or ""
            found.setdefault((match["kind"] == "bin", variant), []).append(path)
    known = [key for key in found if key[1] in _VARIANTS]
    if known:
        best = min(known, key=lambda key: (_VARIANTS.index(key[1]) > 0, key[0], _VARIANTS.index(key[1])))
        return min(found[best], key=lambda path: len(path.name))
    if len(found) == 1:
        return next(iter(found.values()))[0]
    names = ", ".join(f"`{p.name}`" for paths in found.values() for p in paths[:1])
    raise SourceError(
        Problem(
            "which file holds the part's weights is not clear" if found else "the part has no weights",
            Place(str(folder)),
            (names or "no `.safetensors` and no `.bin` of the usual names",),
            "keep one of them there" if found else "download it again, with its weights",
        )
    )


def _markers(scheduler: FileBlob | None) -> list[str]:
    """The markers that say in an original file what the scheduler's configuration says here."""
    config = _read_config(scheduler) if scheduler is not None else {}
    found = ["v_pred"] if config.get("prediction_type") == "v_prediction" else []
    return [*found, "ztsnr"] if config.get("rescale_betas_zero_snr") is True else found


def _read_config(blob: FileBlob) -> dict[str, Any]:
    try:
        config = parse_json(blob.read(0, min(blob.size, _MAX_CONFIG)))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise SourceError(Problem("the configuration is not readable as a JSON object", Place(blob.name)))
    return config
