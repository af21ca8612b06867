"""A model that was explained, as a recipe that a person likes to read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tomli_w

from builder.base.errors import printable
from builder.base.files import decoded
from builder.base.progress import human_bytes
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import Catalog
from builder.models.metric import NOT_A_NUMBER
from builder.models.prediction import TYPE, prediction
from builder.recipe.names import named, numbered, recipe_name
from builder.recipe.values import PATH
from builder.reports.new.describe import Draft
from builder.reports.new.described import File, Taken, lone_name
from builder.reports.new.merge_text import Steps, told

# What a file's metadata says for people; all else, a build says anew.
SPOKEN = ("title", "author", "description", "license", "tags", "usage_hint")
LONGEST = 1000  # characters of such a value

TYPES = {"fp16": "FP16", "bf16": "BF16", "fp32": "FP32"}


def write(draft: Draft, *, folder: Path, catalog: Catalog, name: str | None = None) -> str:
    """The recipe as TOML; files are named relative to `folder`, where the recipe is to lie."""
    page = _Page(draft, folder.absolute(), catalog, name or _lower(draft.model.path))
    blocks = [page.head(), page.top(), *page.sources(), page.steps.lines(), page.components()]
    blocks += [page.output(), page.expect()]
    return "\n\n".join("\n".join(lines) for b in blocks if (lines := list(b))) + "\n"


class _Page:
    def __init__(self, draft: Draft, folder: Path, catalog: Catalog, name: str) -> None:
        self.draft, self.folder, self.catalog, self.name = draft, folder, catalog, name
        self.names = source_names(draft.sources, draft.order)
        self.steps = Steps(draft, self.names, catalog)

    def head(self) -> Iterator[str]:
        """What was recognised, as comments."""
        d = self.draft
        c = d.model.opened.checkpoint
        yield comment(
            f"What `{named(d.model.path).name}` is made of: {d.architecture.name}, {human_bytes(c.size)}."
        )
        if d.tensor_digest is not None:
            same = ": a build makes the very same tensors" if d.faithful else ""
            merge = " or a merge of such" * any(t.merged for t in d.taken.values())
            yield comment(f"Every component is that of a known file{merge}{same}.")
        elif d.searched and d.unexplained:
            yield comment(f"Not explained by any known file: {', '.join(d.unexplained)}.")
        model = self.catalog.known.model(d.metric.text)
        if model:
            yield comment(f"Its metric is that of {model}.")
        if published := self.catalog.known.file(d.model.sha256):
            yield comment(f"It is published as {published.name}.")
        yield comment(f"sha256 {d.model.sha256}")
        for line in merged(c.metadata):
            yield comment(line)
        for match in (p.match for p in d.parts.values()):
            if match.usual_prefix is not None:
                yield comment(
                    f"{match.component.cls} has other names than loaders expect: a build mends that."
                )
        if d.left:
            yield "#"
            yield comment("Not brought back:")
            yield from (comment(f"- {line}") for line in d.left)
        absent = [s for s in d.architecture.due if s not in d.taken]
        if absent:
            yield comment(
                f"Not whole: {' and '.join(absent)} missing; what fills them goes under [components]."
            )

    def top(self) -> Iterator[str]:
        """The recipe's own keys."""
        d = self.draft
        yield "format = 1"
        yield f"name = {toml(self.name)}"
        if d.base is None:
            yield f"base = {toml(f'NEW {d.architecture.name}')}"
        else:
            mine = [t for t in d.taken.values() if t.file is d.base and not (t.promoted or t.merged)]
            yield aligned([(f"base = {toml(self.source(d.base))}", self.why(mine))])[0]
        if len(d.fixes) == 1:
            (fix, why), *_ = d.fixes.items()
            yield aligned([(f"fixes = [{toml(fix)}]", why)])[0]
        elif d.fixes:
            yield "fixes = ["
            yield from aligned([(f"    {toml(fix)},", why) for fix, why in d.fixes.items()])
            yield "]"

    def sources(self) -> Iterator[Iterator[str]]:
        """A table for each source."""
        return map(self.table, self.draft.sources)

    def table(self, file: File) -> Iterator[str]:
        """A source: its file, pins and addresses."""
        known = self.catalog.known.file(file.sha256)
        yield f"[sources.{self.source(file)}]"
        path = place(file.path, self.folder)
        note = f"published as {known.name}" if known and known.name != file.path.name else ""
        if path is not None:
            yield aligned([(f"file = {toml(path)}", note)])[0]
        yield aligned([(f"size = {file.size}", human_bytes(file.size))])[0]
        yield f"sha256 = {toml(file.sha256)}"
        urls = [f"hf://{known.hf}"] if known and known.hf else []
        urls += [f"civitai:{known.civitai_version}"] if known and known.civitai_version else []
        if urls:
            yield f"urls = {toml(urls)}"
        else:
            yield '# urls = ["https://…"]   where others can have it from'

    def components(self) -> Iterator[str]:
        """What fills the slots that the base leaves open."""
        d = self.draft
        rows = [
            (f"{cls} = {self.pick(t)}", self.why([t]))
            for cls, t in d.taken.items()
            if t.file is not d.base or t.promoted or t.merged
        ]
        for cls in d.unexplained:
            if cls in d.merges:
                yield from told(cls, d.merges[cls])
            elif cls in d.unsought and d.searched:
                yield comment(f"{cls}: {d.unsought[cls]}, so no merge is looked for.")
        if rows:
            yield "[components]"
            yield from aligned(rows)

    def pick(self, taken: Taken) -> str:
        """What fills a slot."""
        if taken.merged:
            return toml(self.steps.name(taken.cls))
        name = toml(self.source(taken.file))
        component = toml(taken.match.component.name)
        return f"{{ from = {name}, component = {component} }}" if taken.promoted else name

    def why(self, taken: Sequence[Taken]) -> str:
        """Where components come from, in a comment."""
        d = self.draft
        said = []
        rounded = TYPES.get(d.precision, "another type")
        words = {
            "exact": "the same to the last bit",
            "rounded": f"the same after rounding to {rounded}",
            "merged": "the same to the last bit",
            "near": "the same but for rounding",
            "": "",
        }
        for how, word in words.items():
            parts = [t for t in taken if t.how == how]
            names = [f"{known}'s" for t in parts if (known := d.known(t.cls, self.catalog))]
            if not parts:
                continue
            if how == "" and any(t.how for t in d.taken.values()):
                word = "equal to nothing known: taken from the file itself"
            if any(t.promoted for t in parts):
                word = f"its EMA, {word}"
            whose = f"{' and '.join(names)} by the metric" if names else ""
            classes = ", ".join(t.cls for t in parts) if len(taken) > 1 and (word or whose) else ""
            told = ", ".join(w for w in (word, whose) if w)
            said.append(f"{classes}: {told}" if classes else told)
        return "; ".join(s for s in said if s)

    def output(self) -> Iterator[str]:
        """What is to be written, and how."""
        d = self.draft
        yield "[output]"
        file = f"{self.name}.safetensors"
        sources = {(place(f.path, self.folder) or "").casefold() for f in d.sources}
        if file.casefold() in sources or os.path.lexists(self.folder / file):
            others = map(str, numbered(Path(f"{self.name}-built.safetensors")))
            other = next(o for o in others if o.casefold() not in sources)
            yield aligned([(f"file = {toml(other)}", "beside the one that is there")])[0]
        yield aligned([(f"precision = {toml(d.precision)}", self.precision())])[0]
        if d.keep is not None:
            yield aligned([(f"keep = {toml(list(d.keep))}", "of what the base holds besides")])[0]
        if d.markers is not None:
            yield f"markers = {toml(list(d.markers))}"
        if d.strange:
            yield aligned([('non_finite = "keep"', "it holds NaN or infinity")])[0]
            yield 'overflow = "keep"'
        if not d.taken.keys() >= {*d.architecture.due}:
            yield "partial = true"
        metadata = {} if d.base is d.model else spoken(d.model.opened.checkpoint, self.catalog)
        if metadata:
            yield ""
            yield "[output.metadata]"
            yield from (f"{key} = {toml(value)}" for key, value in metadata.items())

    def precision(self) -> str:
        """What is to say of the precision."""
        return {
            "fp32": 'the file\'s own; "fp16" makes it half as large',
            "keep": "the file has several types",
        }.get(self.draft.precision, "")

    def expect(self) -> Iterator[str]:
        """What must hold of the product."""
        d = self.draft
        parts = (d.metric.unet, d.metric.vae, d.metric.clip)
        known = any(p.isdigit() for p in parts) and NOT_A_NUMBER not in parts
        near = any(t.how == "near" for t in d.taken.values())  # whose last digits may be others
        metric = d.metric.text if known and not near else None
        if metric or d.tensor_digest:
            yield "[expect]"
        if metric:
            yield f"metric = {toml(metric)}"
        if d.tensor_digest:
            yield aligned([(f"tensor_digest = {toml(d.tensor_digest)}", "")])[0]

    def source(self, file: File) -> str:
        """What the recipe calls a file."""
        return self.names[file]


def _lower(path: Path) -> str:
    """A recipe's name after a file's; of some letters the small one is two characters."""
    return recipe_name(path).lower()[:80].rstrip("-_.")


def source_names(files: Sequence[File], order: Sequence[File] = ()) -> dict[File, str]:
    """A name for each file after its own, all different.

    Those of `order`, which a step sums by name, are sorted as these are: where their own names are not, by a
    number before each.
    """
    names = _different({f: lone_name(f) for f in files})
    if [names[f] for f in order] == sorted(names[f] for f in order):
        return names
    wide = len(str(len(order)))
    first = {f: f"{number:0{wide}}-{lone_name(f)}" for number, f in enumerate(order, 1)}
    names = _different(first | {f: lone_name(f) for f in files if f not in first})
    return {f: names[f] for f in files}


def _different(wanted: Mapping[File, str]) -> dict[File, str]:
    names: dict[File, str] = {}
    for file, name in wanted.items():
        unique, number = name, 2
        while unique in names.values():
            unique, number = f"{name}-{number}", number + 1
        names[file] = unique
    return names


def place(path: Path, folder: Path) -> str | None:
    """How a recipe names a file: by its way from the recipe, if that is short, else by its name alone.

    A recipe is there to be shared: it tells nobody how this machine's folders are called. None for a name
    that no recipe can say: the pins find it.
    """
    relative = Path(os.path.relpath(path.absolute(), folder))
    found = relative if relative.parts.count("..") <= 1 else Path(path.name)
    said = found.as_posix()
    return said if PATH.holds(said) else None


def spoken(checkpoint: Checkpoint, catalog: Catalog) -> dict[str, str]:
    """What a file's metadata says for people, and of what it predicts, by key as a recipe writes it."""
    metadata = checkpoint.metadata
    keys = [f"modelspec.{key}" for key in SPOKEN]
    said = {key: metadata[key] for key in keys if metadata.get(key) and len(metadata[key]) <= LONGEST}
    told = prediction(checkpoint, metadata, catalog)
    if told.kind in ("v", "epsilon") and not told.markers:
        said[TYPE] = told.kind
    return said


def merged(metadata: Mapping[str, str]) -> Iterator[str]:
    """What a merger left in the metadata of how the file was made."""
    recipe, models = decoded(metadata.get("sd_merge_recipe")), decoded(metadata.get("sd_merge_models"))
    if recipe:
        method = recipe.get("interp_method") or recipe.get("mode") or recipe.get("type")
        weight = recipe.get("multiplier", recipe.get("alpha", recipe.get("weights_alpha")))
        yield f"A merge, its metadata says: {method}" + (f", {weight}" if weight is not None else "")
    for sha256, model in list(models.items())[:8]:
        yield f"- of {decoded(model).get('name') or 'a model'}, sha256 {sha256}"


def comment(text: str) -> str:
    """A comment of one line, whatever the text holds."""
    return f"# {printable(text)}"[:300]


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Statements, each with its comment behind it, one below the other."""
    wide = max(len(said) for said, _ in rows)
    return [f"{said.ljust(wide)}   # {printable(why)}" if why else said for said, why in rows]


def toml(value: str | Sequence[str]) -> str:
    """A value as TOML writes it, on one line."""
    if isinstance(value, str):
        return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
    return f"[{', '.join(map(toml, value))}]"
