"""Writing an output in the container that its name asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.base.disk import new_folder, new_set
from builder.base.progress import Reporter, human_bytes
from builder.formats.hashes import sha256_file
from builder.formats.open import files_of
from builder.formats.write_safetensors import Accept, Written, writing
from builder.formats.write_torch import writing_torch
from builder.plan.graph import Container
from builder.sources.find import set_digest
from builder.tensors.lazy import LazyTensor
from builder.tensors.packed import packing
from builder.tensors.scan import Passing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from builder.models.catalog import Architecture, Catalog

Tensors = Mapping[str, LazyTensor]
Filled = tuple["list[Written]", Mapping[str, str]]  # the files of a folder, and digests by tensor


class _Discarded(Exception):
    """What was written is not to be kept."""


def write_output(
    container: Container,
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str],
    architecture: Architecture,
    catalog: Catalog,
    *,
    task: str,
    accept: Accept,
    autov3: bool = False,
    **options: Any,
) -> Passing[Written]:
    """The work of writing tensors to `path` in a container; options are those of `writing`.

    `architecture` says which tensors a folder has a place for; `autov3` is of a safetensors file alone. Of
    several files, `accept` sees all of them before the first has its name. Raises what reading, writing or
    `accept` raises; then `path` is as it was.
    """
    options |= {"digests": True, "sha256": True}
    if container.form == "safetensors":
        how = {"task": task, "accept": accept, "autov3": autov3, **options}
        return (yield from writing(path, tensors, metadata, **how))
    if container.encoding is not None:
        from builder.formats.write_gguf import writing_gguf

        how = {"task": task, "accept": accept, **options}
        return (yield from writing_gguf(path, tensors, container.encoding, metadata, **how))
    if container.form == "torch":
        how = {"nesting": container.nesting, "task": task, "accept": accept, **options}
        return (yield from writing_torch(path, dict(sorted(tensors.items())), **how))

    makes = new_set if container.form == "sharded" else new_folder
    written: Written | None = None
    try:
        with makes(path, anew=False) as folder:
            if container.form == "sharded":
                made, digests = yield from _writing_set(folder, container, tensors, metadata, options)
            else:
                made, digests = yield from _writing_folder(
                    folder, container, tensors, metadata, architecture, catalog, options
                )
            opened = folder / path.name if container.form == "sharded" else folder
            written = _together(path, folder, files_of(opened), made, digests, tensors)
            if accept(written) is None:
                raise _Discarded
    except _Discarded:
        assert written is not None
        return written._replace(path=None)
    return written


def _writing_set(
    folder: Path,
    container: Container,
    tensors: Tensors,
    metadata: Mapping[str, str],
    options: Mapping[str, Any],
) -> Passing[Filled]:
    from builder.formats.write_sharded import writing_shards

    how = {"shard_size": container.shard_size or 0, **options}
    made = yield from writing_shards(folder, container.stem, tensors, metadata, **how)
    return made, {n: digest for w in made for n, digest in w.digests.items()}


def _writing_folder(
    folder: Path,
    container: Container,
    tensors: Tensors,
    metadata: Mapping[str, str],
    architecture: Architecture,
    catalog: Catalog,
    options: Mapping[str, Any],
) -> Passing[Filled]:
    from builder.formats.diffusers import REMAINDER
    from builder.formats.write_diffusers import writing_folder

    names = {
        catalog.component_for(cls, architecture).prefix + name
        for cls in architecture.slots
        for component in catalog.candidates(cls, architecture)
        for name in component.tensors
    }
    if packed := packing(tensors):
        raise packed.refused("have no place in diffusers' layout", "name a file to write them")
    made = yield from writing_folder(
        folder,
        catalog.layouts[container.layout],
        {n: t for n, t in tensors.items() if n in names},
        metadata,
        others={n: t for n, t in tensors.items() if n not in names},
        prediction=container.prediction,
        zero_snr=container.zero_snr,
        vocabulary=container.vocabulary,
        shard_size=container.shard_size,
        **options,
    )
    if made.rest:
        reporter: Reporter = options["reporter"]
        count = f"{len(made.rest):,} tensor{'s' * (len(made.rest) > 1)}"
        total = human_bytes(sum(t.nbytes for t in made.rest.values()))
        reporter.note(f"what the layout has no place for is in `{REMAINDER}`: {count}, {total}")
    return made.files, made.digests


def _together(
    path: Path,
    folder: Path,
    read: list[Path],
    made: list[Written],
    digests: Mapping[str, str],
    names: Collection[str],
) -> Written:
    """Several files in a folder as one thing, which is `read` from some of them.

    Of their zeros, those of tensors are told that have the `names` of the checkpoint there.
    """
    known = {str(w.path): str(w.sha256) for w in made}
    all_ = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p): known.get(str(p)) or sha256_file(p).sha256 for p in all_}
    histograms: dict[str, NDArray[np.int64]] = {}
    for written in made:
        for group, counts in written.histograms.items():
            histograms[group] = histograms[group] + counts if group in histograms else counts
    stats = {p: p.stat() for p in all_}
    return Written(
        path,
        sum(s.st_size for s in stats.values()),
        set_digest({str(p): sums[str(p)] for p in read}),
        digests,
        histograms,
        {n: found for w in made for n, found in w.zeros.items() if n in names},
        {},
        folder.stat(),
        {p.relative_to(folder).as_posix(): (sums[str(p)], stats[p]) for p in all_},
    )
