"""What a recipe says, once it is read: frozen values without a trace of how they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from builder.base.errors import Place, Problem
from builder.base.toml import Document, Keys
from builder.recipe.names import Form, form_of

FORMAT = 1


@dataclass(frozen=True)
class NewBase:
    """An empty architecture, by its name in the catalog: every slot is to be filled."""

    architecture: str
    at: Keys = field(default=("base",), compare=False)


@dataclass(frozen=True)
class FromBase:
    """A source or step whose components fill every slot that is left open."""

    name: str
    at: Keys = field(default=("base",), compare=False)


@dataclass(frozen=True)
class Source:
    """A checkpoint to take things from: a file, pinned by SHA-256 (lower-case hex), or another recipe.

    `file` and `recipe` are as written: relative to the recipe's folder, with `/`. `size` is in bytes.
    `output` picks one output of a recipe that has several.
    """

    name: str
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    urls: tuple[str, ...] = ()
    recipe: str | None = None
    output: str | None = None

    def meaning(self) -> dict[str, Any]:
        """What identifies the checkpoint, as far as the recipe says: where it lies is no part of that.

        An unpinned file may be any: which one it was, the lock says.
        """
        said = {"sha256": self.sha256, "recipe": self.recipe, "output": self.output}
        return {k: v for k, v in said.items() if v is not None}


@dataclass(frozen=True)
class Pick:
    """What fills a slot: a component of a source or step, by name or the one it has of the class."""

    cls: str
    source: str
    component: str | None = None
    at: Keys = field(default=(), compare=False)

    def meaning(self) -> dict[str, Any]:
        """The choice as data."""
        return {"from": self.source, **({"component": self.component} if self.component else {})}


@dataclass(frozen=True)
class Step:
    """A named intermediate model that an operation makes.

    `inputs` names a source or step by parameter, by `KEY.NAME` where a table holds several; `params` holds
    every parameter in canonical form, defaults included, and of a table the weights by name. `components`
    limits it to these classes (none: the whole model). With `vae`, the VAE takes part by default too.
    `precision` rounds what is made; None: it is not rounded.
    """

    name: str
    op: str
    inputs: Mapping[str, str]
    params: Mapping[str, Any]
    components: tuple[str, ...] = ()
    store: bool = False
    vae: bool = False
    arithmetic: str = "exact"
    precision: str | None = None

    def meaning(self) -> dict[str, Any]:
        """What the step makes, but not whether that is stored."""
        said = {
            "op": self.op,
            "inputs": dict(self.inputs),
            "params": dict(self.params),
            "components": sorted(self.components),
        }
        plain = Step.__dataclass_fields__
        more = {k: getattr(self, k) for k in ("vae", "arithmetic", "precision")}
        return said | {k: v for k, v in more.items() if v != plain[k].default}

    def at(self, param: str) -> Keys:
        """Where a recipe names an input."""
        return ("steps", self.name, *param.split(".", 1))


@dataclass(frozen=True)
class Expect:
    """Assertions about an output; None: nothing is asserted."""

    metric: str | None = None
    sha256: str | None = None
    tensor_digest: str | None = None
    autov3: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Output:
    """A file to write, with everything that holds for it: the recipe's own words or the output's.

    `file` is relative to the recipe's folder and stays inside it. `fixes` are in the order of the registry,
    in which they are applied. `precision` is one for all, or `published`: for each component the catalog's,
    and nothing made wider. With `narrow`, only what is wider than `precision` is rounded. `quantize` says
    how the denoiser's weights are packed; None: they are not. `keep` names tensors that are carried over
    from the base beside its components; None: all optional ones it has. With
    `unknown` as `keep`, all else is carried over too but averages and junk. `markers` are tensors that tell
    programs what the model predicts; None: those that its UNET comes with. `config` is a file beside the
    recipe to copy beside the output, under the output's stem. A `partial` one may leave slots of its
    architecture open. A `verbatim` one has every tensor of its base, under the name it has there.
    `shard_size` is in bytes of tensors; `prediction` (`epsilon` or `v`) and `tokenizer`, a folder with CLIP's
    vocabulary, are for diffusers' layout.
    """

    name: str
    file: str
    base: NewBase | FromBase
    components: Mapping[str, Pick]
    fixes: tuple[str, ...] = ()
    precision: str = "published"
    narrow: bool | str = False
    quantize: str | None = None
    overflow: str = "error"
    non_finite: str = "error"
    metadata: Mapping[str, str] = field(default_factory=dict)
    profile: str | None = None
    keep: tuple[str, ...] | None = None
    unknown: str = "drop"
    markers: tuple[str, ...] | None = None
    config: str | None = None
    partial: bool = False
    verbatim: bool = False
    shard_size: int | None = None
    prediction: str | None = None
    tokenizer: str | None = None
    expect: Expect = Expect()
    at: Keys = field(default=("output",), compare=False)

    @property
    def form(self) -> Form:
        """What `file` says is written."""
        return form_of(self.file)

    def meaning(self) -> dict[str, Any]:
        """What decides the file's content: not its name, nor what is expected of it.

        What is as it is by default is left out: a key that the language gains later changes no digest.
        """
        base = {"new": self.base.architecture} if isinstance(self.base, NewBase) else {"from": self.base.name}
        said = {
            "base": base,
            "components": {c: p.meaning() for c, p in sorted(self.components.items())},
            "fixes": sorted(self.fixes),
            "metadata": dict(sorted(self.metadata.items())),
        }
        said = {key: value for key, value in said.items() if value}
        for name in SETTINGS:
            value = getattr(self, name)
            if value != Output.__dataclass_fields__[name].default:
                said[name] = sorted(value) if isinstance(value, tuple) else value
        return said


# What an output says by a key of the same name, as it stands.
SETTINGS = tuple(
    name
    for name in Output.__dataclass_fields__
    if name not in ("name", "file", "base", "components", "fixes", "metadata", "expect", "at")
)


@dataclass(frozen=True)
class Recipe:
    """A valid recipe.

    `included` holds the recipes that sources name, by source. `notes` are remarks that are no errors. `lock`
    is where its lock lies, None where it has none. One that is the user's `own`, composed by a program, may
    name files anywhere. `address` is where it was fetched from: then `path` is in a folder of its own, which
    no outputs go to.
    """

    name: str
    description: str
    base: NewBase | FromBase
    fixes: tuple[str, ...]
    sources: Mapping[str, Source]
    components: Mapping[str, Pick]
    steps: Mapping[str, Step]
    outputs: tuple[Output, ...]
    path: Path | None = field(default=None, compare=False)
    lock: Path | None = field(default=None, compare=False)
    document: Document = field(default=Document("", "", {}), compare=False, repr=False)
    included: Mapping[str, Recipe] = field(default_factory=dict, repr=False)
    notes: tuple[Problem, ...] = field(default=(), compare=False)
    own: bool = field(default=False, compare=False)
    address: str | None = field(default=None, compare=False)

    def place(self, *keys: str | int, value: bool = False) -> Place:
        """Where the recipe says something, for messages: as `builder.base.toml.Document.place`."""
        return self.document.place(*keys, value=value)

    def output(self, name: str | None = None) -> Output | None:
        """The output of that name, or the only one; None where there is none."""
        if name is None:
            return self.outputs[0] if len(self.outputs) == 1 else None
        return next((o for o in self.outputs if o.name == name), None)

    def target(self, output: Output) -> Path:
        """Where an output goes: below the recipe's folder, of one that was fetched into the current one."""
        if self.address is not None:
            return Path(PurePosixPath(output.file).name)
        return (self.path.parent if self.path is not None else Path()) / output.file

    def meaning(self) -> dict[str, Any]:
        """Everything that decides the products' content, as canonical JSON-able data.

        Comments, order, spelling, the file names and addresses of pinned sources, the file names of
        outputs and what is expected of them are no part of it. An included recipe is known by its digest.
        """
        return {
            "format": FORMAT,
            "name": self.name,
            "description": self.description,
            "sources": {n: self._source(n) for n in sorted(self.sources)},
            "steps": {n: s.meaning() for n, s in sorted(self.steps.items())},
            "outputs": {o.name: o.meaning() for o in sorted(self.outputs, key=lambda o: o.name)},
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the meaning as compact JSON with sorted keys."""
        return meaning_digest(self.meaning())

    def reached(self, output: Output) -> tuple[set[str], set[str]]:
        """The sources and the steps that an output is made of, near and far."""
        base = [output.base.name] if isinstance(output.base, FromBase) else []
        near = [*base, *(p.source for p in output.components.values())]
        found: set[str] = set()
        while near:
            name = near.pop()
            if name not in found:
                found.add(name)
                near += self.steps[name].inputs.values() if name in self.steps else ()
        return found & self.sources.keys(), found & self.steps.keys()

    def merged(self, output: Output) -> list[str]:
        """The sources that steps of an output are made of at first hand, in the order of the recipe."""
        sources, steps = self.reached(output)
        near = {n for step in steps for n in self.steps[step].inputs.values()}
        return [n for n in self.sources if n in near & sources]

    def meaning_of(self, output: Output) -> dict[str, Any]:
        """What the recipe says of one output and of all that it is made of, as `meaning`.

        Another output of the same recipe is no part of it, nor is a source that this one does not need.
        """
        sources, steps = self.reached(output)
        return {
            "format": FORMAT,
            "name": self.name,
            "description": self.description,
            "sources": {n: self._source(n) for n in sorted(sources)},
            "steps": {n: self.steps[n].meaning() for n in sorted(steps)},
            "output": output.meaning(),
        }

    def absolute(self) -> Recipe:
        """The same with whole paths, for work in other folders."""
        return replace(
            self,
            path=self.path and self.path.absolute(),
            lock=self.lock and self.lock.absolute(),
            included={name: inner.absolute() for name, inner in self.included.items()},
        )

    def closure(self, output: Output) -> str:
        """The digest of what the recipe means for one output."""
        return meaning_digest(self.meaning_of(output))

    def _source(self, name: str) -> dict[str, Any]:
        """What a source means; of a recipe, the output that is taken."""
        source, said = self.sources[name], self.sources[name].meaning()
        if (inner := self.included.get(name)) is not None:
            output = inner.output(source.output)
            said["recipe"] = inner.closure(output) if output is not None else inner.digest
            said.pop("output", None)
        return said


def meaning_digest(data: Any) -> str:
    """SHA-256, in hex, of a meaning as compact JSON with sorted keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
