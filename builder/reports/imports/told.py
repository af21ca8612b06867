"""What a WebUI's merger wrote into a file, and the models that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from builder.base.files import decoded
from builder.reports.imports.sketch import Sketch, file_name, with_suffix

DEEPEST = 20  # merges within each other that are rebuilt; of what is below, the file is the source


class Drawn(NamedTuple):
    """A source or step by its name, and the precision that it was saved in; None where that is not said."""

    name: str
    precision: str | None = None


@dataclass
class Told:
    """One recipe of metadata: `said`, for the model `name`; `outer` where that is the one to be made.

    `ancestors` are all the models that a file tells of.
    """

    sketch: Sketch
    said: Mapping[str, Any]
    ancestors: Ancestors
    name: str
    outer: bool

    def model(self, key: str, role: str) -> str:
        """The source or step of a model whose SHA-256 is said there."""
        return self.ancestors.model(self.said.get(key), role)

    def step(self, op: str, **said: Any) -> str:
        """The step that makes this model."""
        return self.sketch.step(self.name, op, **said)

    def bake(self, base: str, said: object) -> str:
        """`base` with the VAE of a file that is known by its name alone."""
        if not isinstance(said, str) or said in ("", "None"):
            return base
        vae = self.sketch.source(with_suffix(file_name(said)), role="vae")
        self.sketch.miss(f"which file the baked VAE `{vae}` is: it is known by its name alone")
        if self.outer:
            return self.sketch.fill(base, "VAE", vae)
        return self.sketch.step(
            f"{base}-vae", "weighted-sum", a=base, b=vae, alpha={"VAE": 1}, arithmetic="file"
        )


Draw = Callable[[Told], Drawn]


@dataclass
class Ancestors:
    """The models of `sd_merge_models`, by SHA-256: each is rebuilt, or is a source, when it is asked for."""

    sketch: Sketch
    models: Mapping[str, Mapping[str, Any]]
    dialects: Mapping[str, Draw]
    _open: list[str] = field(default_factory=list)
    _done: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sketch: Sketch, said: object, dialects: Mapping[str, Draw]) -> Ancestors:
        """Of a value of the metadata."""
        models = {str(k).lower(): decoded(v) for k, v in decoded(said).items()}
        return cls(sketch, models, dialects)

    def model(self, said: object, role: str) -> str:
        """The source or step of a model that is known by its digest."""
        digest = said.lower() if isinstance(said, str) else ""
        if digest in self._done:
            return self._done[digest]
        model = self.models.get(digest, {})
        name = with_suffix(file_name(model.get("name")))
        recipe = decoded(model.get("sd_merge_recipe"))
        draw = self.dialects.get(str(recipe.get("type")))
        if draw is None or digest in self._open or len(self._open) >= DEEPEST:
            made = self.sketch.source(name, digest, role)
        else:
            self._open.append(digest)
            drawn = draw(Told(self.sketch, recipe, self, name or role, outer=False))
            self._open.pop()
            made = drawn.name
            step = self.sketch.steps.get(made)
            if step is not None and drawn.precision not in (None, "keep"):
                step.setdefault("precision", drawn.precision)
            self.sketch.tell(made, f"published as {name or 'a file'}, sha256 {digest}")
        if digest:
            self._done[digest] = made
        return made

    def by_name(self, said: object, role: str) -> str:
        """The source or step of a model that is known by its name or title."""
        name = with_suffix(file_name(said)).casefold()
        for digest, model in self.models.items():
            if name and with_suffix(file_name(model.get("name"))).casefold() == name:
                return self.model(digest, role)
        return self.sketch.source(with_suffix(file_name(said)), role=role)
