"""What a recipe says of a model besides its components: extras, markers, base, fixes, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from builder.base.progress import human_bytes
from builder.base.words import counted as number
from builder.models.catalog import Architecture, Catalog
from builder.models.identity import EMA
from builder.models.prediction import EMPTY, MARKERS
from builder.operations.fixes import FIXES, POSITION_IDS, exact_position_ids
from builder.reports.new.described import File, Taken, rounded
from builder.tensors.cast import Precision
from builder.tensors.digests import Row, tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import Scan


def extras_of(file: File) -> dict[str, LazyTensor]:
    """What a file may hold besides, and is of no component."""
    held = file.opened.checkpoint
    own = (n for n in file.opened.identity.optional if n not in MARKERS and not n.startswith(EMA))
    return {n: held[n] for n in own}


def markers_of(file: File) -> dict[str, LazyTensor]:
    """What marks a file for loaders, as predicting v or for another schedule."""
    held = file.opened.checkpoint
    return {n: held[n] for n in MARKERS if n in held}


def told_markers(
    model: File, taken: Mapping[str, Taken], catalog: Catalog
) -> tuple[tuple[str, ...] | None, dict[str, LazyTensor]]:
    """The markers that a recipe must name, None where the denoiser brings them; and those of its product."""
    wanted = markers_of(model)
    denoiser = next((t for cls, t in taken.items() if cls in catalog.denoisers), None)
    brought = markers_of(denoiser.file) if denoiser is not None else {}
    if wanted.keys() == brought.keys() or not {*EMPTY, *brought} >= wanted.keys():
        return None, brought
    empty = MemoryTensor(DType.F32, (0,), b"")
    return tuple(wanted), {n: brought.get(n, empty) for n in wanted}


def base_of(
    architecture: Architecture,
    taken: Mapping[str, Taken],
    extras: Mapping[str, LazyTensor],
    catalog: Catalog,
) -> tuple[File | None, tuple[str, ...] | None, Mapping[str, LazyTensor]]:
    """The source to start from, when one has all or brings the extras; what to keep of its extras; those."""
    if not taken.keys() >= {*architecture.due}:  # a base would fill the slots that are to stay open
        return None, None, {}
    files = list(dict.fromkeys(t.file for t in taken.values()))
    whole = [f for f in files if f.opened.identity.intact and _is(f, architecture, catalog)]
    if len(files) != 1 or any(t.promoted or t.merged for t in taken.values()):
        whole = [f for f in whole if extras]
    for file in whole:
        held = extras_of(file)
        if all(n in held and _same(held[n], t) for n, t in extras.items()):
            return file, tuple(sorted(extras)) if held.keys() - extras.keys() else None, extras
    return (files[0], (), {}) if len(files) == 1 and files[0] in whole else (None, None, {})


def _is(file: File, architecture: Architecture, catalog: Catalog) -> bool:
    name = file.opened.identity.architecture
    return name is not None and catalog.architecture(name).name == architecture.name


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def fixes_of(parts: Mapping[str, Taken], taken: Mapping[str, Taken]) -> dict[str, str]:
    """The fixes that the recipe needs, each with why, in the order of the registry."""
    needed: dict[str, str] = {}
    for cls, part in parts.items():
        source = taken[cls]
        mine, theirs = part.file.positions(part.match, cls), source.file.positions(source.match, cls)
        if mine is not None and not _same(mine, exact_position_ids()):
            needed["clip-position-ids"] = f"the position ids of {cls} are damaged, or no integers"
        elif mine is not None and theirs is None:
            needed["position-ids-present"] = f"{cls} has position ids, `{source.file.path.name}` has none"
        elif mine is not None and theirs is not None and not _same(mine, theirs):
            needed["clip-position-ids"] = f"those of `{source.file.path.name}` are damaged"
        elif mine is None and theirs is not None:
            needed.setdefault("position-ids-absent", f"{cls} has no position ids")
        if any(p.match.diffusers_attention for p in (part, source)):
            needed["vae-attention-shape"] = f"the attention of {cls} is laid out as diffusers does it"
    if "position-ids-present" in needed:
        needed.pop("position-ids-absent", None)
    return {name: needed[name] for name in FIXES if name in needed}


def left_of(model: File, extras: Sequence[str]) -> tuple[str, ...]:
    """What the file holds and the recipe does not bring back."""
    identity = model.opened.identity
    kinds = {
        "EMA, which only training needs": identity.ema,
        "junk that no program reads": identity.junk,
        "tensors that nothing explains": identity.unknown,
        "extras that no source has": extras,
    }
    checkpoint = model.opened.checkpoint
    return tuple(
        f"{reason}: {human_bytes(sum(checkpoint[n].nbytes for n in names))} in {number(len(names), 'tensor')}"
        for reason, names in kinds.items()
        if names
    )


def is_faithful(rows: Mapping[str, Row], model: File) -> bool:
    """Whether a product is the file's tensors; position ids, which may be mended, are looked at."""
    checkpoint = model.opened.checkpoint
    same = {n: (r.dtype, r.shape) for n, r in rows.items()} == {
        n: (t.dtype, t.shape) for n, t in checkpoint.items()
    }
    ids = [n for n in rows if n.endswith(POSITION_IDS)]
    return same and all(tensor_digest(checkpoint[n]) == rows[n].digest for n in ids)


def rows_of(
    parts: Mapping[str, Taken],
    taken: Mapping[str, Taken],
    architecture: Architecture,
    precision: Precision,
    scanned: Scan,
    catalog: Catalog,
    added: Mapping[str, LazyTensor],
) -> dict[str, Row]:
    """What the product's tensors will be."""
    rows: dict[str, Row] = {}
    for cls, part in parts.items():
        prefix = "" if architecture.bare else catalog.component_for(cls, architecture).prefix
        for bare, tensor in rounded(part.file.plain(part.match, cls), precision).items():
            found = scanned.tensors[f"{cls}/{bare}"].digest
            assert found is not None
            rows[prefix + bare] = Row(tensor.dtype, tensor.shape, found)
        if part.file.positions(part.match, cls) is not None:
            exact = exact_position_ids()
            rows[prefix + POSITION_IDS] = Row(exact.dtype, exact.shape, tensor_digest(exact))
    return rows | {n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in added.items()}
