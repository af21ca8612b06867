"""The recipe that a file holds of how it was made, in whichever dialect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.base.errors import Problem, SourceError, clipped
from builder.base.files import decoded, parse_json, read_text
from builder.base.progress import SILENT, Reporter
from builder.formats.hashes import data_sha256
from builder.reports.imports import (
    chattiori,
    comfyui,
    mecha,
    mergekit,
    model_mixer,
    own,
    plain_yaml,
    supermerger,
    webui,
)
from builder.reports.imports.sketch import Sketch, text_of
from builder.reports.imports.told import Ancestors, Draw, Told
from builder.sources.opened import OpenSource, Sources
from builder.tensors.lazy import DType

MAX_TEXT = 4 << 20  # bytes of a file that is a recipe itself
_TEXTS = (".mecha", ".yaml", ".yml", ".json")
DIALECTS: dict[str, tuple[str, Draw]] = {
    "webui": ("A1111's merger", webui.draw),
    "sd-webui-supermerger": ("supermerger", supermerger.draw),
    "merge-models-chattiori": ("Chattiori-Model-Merger", chattiori.draw),
    "sd-webui-model-mixer": ("model-mixer", model_mixer.draw),
    "ckpt-build": ("ckpt-build", own.draw),
}
RECIPE, MODELS, MECHA, GRAPH, NAMES = (
    *("sd_merge_recipe", "sd_merge_models", "mecha_recipe", "prompt"),
    "modelspec.merged_from",
)


def is_text(path: Path) -> bool:
    """Whether a file is a recipe itself, by its name, rather than a model that tells of one."""
    return path.suffix.lower() in _TEXTS and not path.name.lower().endswith(".index.json")


def read_recipe(path: Path, sources: Sources, reporter: Reporter = SILENT) -> Sketch:
    """The recipe in a file's metadata, or that is the file itself: `.mecha`, `.yaml`, `.json`.

    Raises SourceError for files that are refused, and for those that tell of no recipe.
    """
    if is_text(path):
        return of_text(_text(path), path.name)
    opened = sources.open(sources.file(path))
    sketch = of_metadata(opened.checkpoint.metadata, path.name, _slots(opened, sources))
    if sketch.exact and (digest := data_sha256(path, reporter=reporter)) is not None:
        sketch.autov3 = (digest, _unlike(opened, sketch))
    return sketch


def of_text(text: str, name: str) -> Sketch:
    """The recipe that a text is, by the end of its file's name."""
    if name.lower().endswith(".mecha"):
        sketch = Sketch("sd-mecha")
        mecha.draw(sketch, text, name)
        return sketch
    if name.lower().endswith(".json"):
        try:
            said = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(Problem(f"`{name}` is no JSON", evidence=(clipped(str(error), 100),))) from None
        graph = said.get(GRAPH, said) if isinstance(said, dict) else said
        if isinstance(graph, dict) and comfyui.is_graph(graph):
            return _drawn_graph(graph)
        if isinstance(said, dict) and "nodes" in said:
            hint = "export the graph in ComfyUI as `API` format"
            raise SourceError(Problem(f"`{name}` is a workflow as ComfyUI's editor has it", hint=hint))
        return of_metadata(said if isinstance(said, dict) else {}, name)
    said = plain_yaml.parse(text, name)
    sketch = Sketch("mergekit")
    mergekit.draw(sketch, said if isinstance(said, dict) else {})
    return sketch


def of_metadata(metadata: Mapping[str, Any], name: str, slots: tuple[str, ...] = ()) -> Sketch:
    """The recipe in metadata, of a file `name` with such slots."""
    said = decoded(metadata.get(RECIPE))
    if said:
        kind = text_of(said, "type")
        if kind not in DIALECTS:
            hint = f"known: {', '.join(DIALECTS)}"
            fact = f"the recipe in `{name}` is of a kind that is not known, `{clipped(kind, 60)}`"
            raise SourceError(Problem(fact, hint=hint))
        words, draw = DIALECTS[kind]
        sketch = Sketch(words, slots)
        draws = {k: d for k, (_, d) in DIALECTS.items()}
        ancestors = Ancestors.of(sketch, metadata.get(MODELS), draws)
        drawn = draw(Told(sketch, said, ancestors, name, outer=True))
        sketch.base = drawn.name
        if drawn.precision is not None:
            sketch.output["precision"] = drawn.precision
        return sketch
    if text := text_of(metadata, MECHA):
        sketch = Sketch("sd-mecha", slots)
        mecha.draw(sketch, text[:MAX_TEXT], name)
        return sketch
    graph = decoded(metadata.get(GRAPH))
    if comfyui.is_graph(graph):
        return _drawn_graph(graph, slots)
    evidence: tuple[str, ...] = (f"looked for {RECIPE}, {MECHA} and {GRAPH}",)
    if names := text_of(metadata, NAMES):
        evidence = (f"it says which models it was made of, and not how: {clipped(names, 300)}",)
    hint = "`ckpt new FILE… --library FOLDER` finds out which known files it is equal to"
    raise SourceError(Problem(f"`{name}` tells of no merge", evidence=evidence, hint=hint))


def _drawn_graph(graph: Mapping[str, Any], slots: tuple[str, ...] = ()) -> Sketch:
    sketch = Sketch("a graph of ComfyUI", slots)
    comfyui.draw(sketch, graph)
    return sketch


def _text(path: Path) -> str:
    try:
        return read_text(path, MAX_TEXT, SourceError)
    except FileNotFoundError:
        raise SourceError(Problem(f"there is no file `{path}`")) from None


def _slots(opened: OpenSource, sources: Sources) -> tuple[str, ...]:
    identity = opened.identity
    name = identity.incomplete or identity.architecture
    if name is None or name not in sources.catalog.architectures:
        return ()
    return tuple(sources.catalog.architectures[name].slots)


def _unlike(opened: OpenSource, sketch: Sketch) -> str:
    """Why what a build makes cannot have every tensor of the file; empty where it can."""
    identity, checkpoint = opened.identity, opened.checkpoint
    if sketch.missing:
        return "not everything is known of how it was made"
    for what, names in (
        ("averages (EMA)", identity.ema),
        ("junk", identity.junk),
        ("unknown", identity.unknown),
    ):
        if names:
            return f"the file has {len(names):,} tensors beside its components, {what}"
    others = [n for n in identity.optional if checkpoint[n].dtype is DType.F16]
    if others:
        return f"`{others[0]}` is FP16 in the file, and a build leaves it its type in the base"
    return ""
