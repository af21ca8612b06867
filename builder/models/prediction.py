"""What a denoiser predicts, by which evidence, and what must travel with it so that programs know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from builder.tensors.lazy import DType, LazyTensor

if TYPE_CHECKING:
    from builder.models.catalog import Catalog, ModelSpec

Kind = Literal["epsilon", "v", "edm", "edm-v"]
KINDS: dict[Kind, str] = {
    "epsilon": "epsilon",
    "v": "v",
    "edm": "the denoised latents, in EDM's scaling",
    "edm-v": "v, with EDM's noise levels",
}

# Tensors without a prefix whose presence tells loaders the kind of model, whatever their shapes.
EMPTY = ("v_pred", "ztsnr")  # those that hold no value, so that a recipe can have them made
MARKERS = (*EMPTY, "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MAX_MARKER = 4096  # bytes; what is larger is no marker, whatever it is called

# What the markers say, all of a row together, in the order in which loaders look.
_SAID: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("edm_mean", "edm_std"), "edm"),
    (("edm_vpred.sigma_max",), "edm-v"),
    (("v_pred",), "v"),
)

TYPE, KEY, ARCHITECTURE = "modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture"
IMPLEMENTATION, RESOLUTION = "modelspec.implementation", "modelspec.resolution"
WORDS = (ARCHITECTURE, IMPLEMENTATION, RESOLUTION, TYPE, KEY)  # the metadata that is of the denoiser

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("v", "v_pred", "v-pred", "v_prediction", "v-prediction"), "v"),
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
}


@dataclass(frozen=True)
class Marker:
    """A marker as a tensor of its own; `data` is empty until it is read."""

    name: str
    dtype: DType = DType.F32
    shape: tuple[int, ...] = (0,)
    data: bytes = b""


class Sign(NamedTuple):
    """Something that says what a model predicts, in words."""

    kind: Kind
    what: str

    def agrees(self, kind: Kind) -> bool:
        """Whether it can be said of a model that predicts this: words have no more than `v` for `edm-v`."""
        return self.kind == kind or {self.kind, kind} == {"v", "edm-v"}


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts, as far as its file says: `signs` say it, the one that loaders heed first.

    `markers` and `words`, which are metadata by key, are what travels with the denoiser.
    """

    signs: tuple[Sign, ...] = ()
    markers: tuple[Marker, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind | None:
        """What is predicted; None: nothing says."""
        return self.signs[0].kind if self.signs else None

    @property
    def v(self) -> bool:
        """Whether it is v."""
        return self.kind in ("v", "edm-v")

    @property
    def zero_snr(self) -> bool:
        """Whether the noise schedule ends in nothing but noise."""
        return any(m.name == "ztsnr" for m in self.markers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its markers."""
        return tuple(m.name for m in self.markers)

    @property
    def contradiction(self) -> tuple[str, ...]:
        """What each of the signs says, where they do not say the same."""
        if self.kind is None or all(s.agrees(self.kind) for s in self.signs):
            return ()
        return tuple(f"{s.what} says {s.kind}" for s in self.signs)

    def with_own(
        self, markers: Sequence[str] | None, metadata: Mapping[str, str], catalog: Catalog
    ) -> Prediction:
        """This as a recipe has it: with its words, and its markers in place of these (None: with these).

        What the words said before stays where it does not contradict the recipe.
        """
        mine = {k: v for k, v in metadata.items() if k in WORDS}
        asked = next(_signs(markers or (), mine, catalog), None)
        held = {m.name: m for m in self.markers}
        made = self.markers if markers is None else tuple(held.get(n) or Marker(n) for n in markers)
        words = {k: v for k, v in self.words.items() if asked is None or _agrees(k, v, asked.kind, catalog)}
        return carried(made, words | mine, catalog)

    def stated(self, spec: ModelSpec | None, catalog: Catalog) -> dict[str, str]:
        """The words of a file with this denoiser; `spec` is what the catalog says of such a model.

        Its own architecture stays, unless it is the catalog's name of another kind of model. Where models of
        the kind come with either prediction and nothing says which, none is named.
        """
        said = dict(self.words)
        if self.kind is not None:
            for key in (TYPE, KEY):
                if not _agrees(key, said.get(key, ""), self.kind, catalog):
                    del said[key]
            if self.kind in ("v", "epsilon"):
                said[TYPE] = self.kind
        specs = catalog.modelspecs
        own = said.get(ARCHITECTURE)
        spec = spec or next((s for s in specs if own is not None and own in s.names), None)
        if spec is None or not (own is None or any(own in s.names for s in specs)):
            return said
        name = spec.name(self.v) if spec.v is None or self.kind is not None else None
        if own is not None and name != own:
            for key in (ARCHITECTURE, RESOLUTION):
                said.pop(key, None)
        if name is not None:
            said[ARCHITECTURE] = name
            if pixels := spec.pixels(self.v):
                said.setdefault(RESOLUTION, f"{pixels}x{pixels}")
        return said


def prediction(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], catalog: Catalog
) -> Prediction:
    """What the denoiser of a checkpoint predicts, from names and metadata; no tensor is read."""
    held = (n for n in MARKERS if n in tensors and tensors[n].nbytes <= MAX_MARKER)
    markers = tuple(Marker(n, tensors[n].dtype, tensors[n].shape) for n in held)
    return carried(markers, {k: metadata[k] for k in WORDS if k in metadata}, catalog)


def read_markers(found: Prediction, tensors: Mapping[str, LazyTensor]) -> Prediction:
    """The same with the few bytes of its markers; raises CkptError where they cannot be read."""
    return replace(
        found, markers=tuple(replace(m, data=bytes(tensors[m.name].tobytes())) for m in found.markers)
    )


def carried(markers: Iterable[Marker], words: Mapping[str, str], catalog: Catalog) -> Prediction:
    """A prediction from what travels with its denoiser."""
    made = tuple(markers)
    return Prediction(tuple(_signs([m.name for m in made], words, catalog)), made, words)


def _agrees(key: str, word: str, kind: Kind, catalog: Catalog) -> bool:
    """Whether one piece of metadata can be said of a model that predicts this."""
    return all(s.agrees(kind) for s in _signs((), {key: word}, catalog))


def _signs(markers: Collection[str], words: Mapping[str, str], catalog: Catalog) -> Iterator[Sign]:
    """What says what is predicted, the strongest first."""
    for names, kind in _SAID:
        if all(n in markers for n in names):
            listed = " and ".join(f"`{n}`" for n in names)
            yield Sign(kind, f"the marker{'s' * (len(names) > 1)} {listed}")
            break
    for key in (TYPE, KEY):
        if (said := _KINDS.get(words.get(key, "").lower())) is not None:
            yield Sign(said, f"`{key}`")
    called = words.get(ARCHITECTURE)
    for spec in (s for s in catalog.modelspecs if s.v is not None):
        if called in spec.names:
            yield Sign("v" if called == spec.v else "epsilon", f"`{ARCHITECTURE}` `{called}`")
