"""What a denoiser predicts, by markers and metadata, and what a recipe makes of it."""

from __future__ import annotations

import pickle

import pytest

from builder.models.prediction import MAX_MARKER, Kind, Prediction, prediction, read_markers
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import catalog

CATALOG = catalog()
TYPE, KEY, ARCHITECTURE = "modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture"
V2, V2_V = "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"
EMPTY = MemoryTensor(DType.F32, (0,), b"")
ONE = MemoryTensor(DType.F16, (1,), b"\0\x3c")
SCALAR = MemoryTensor(DType.F32, (), bytes(4))


def of(words: dict[str, str] | None = None, **markers: LazyTensor) -> Prediction:
    named = {name.replace("edm_vpred_", "edm_vpred."): tensor for name, tensor in markers.items()}
    return prediction(named, words or {}, CATALOG)


@pytest.mark.parametrize("marker", [EMPTY, ONE, SCALAR], ids=["[0]", "[1]", "[]"])
def test_a_marker_says_it_whatever_its_shape(marker: LazyTensor) -> None:
    found = of(v_pred=marker, ztsnr=marker)
    assert (found.kind, found.v, found.zero_snr, found.names) == ("v", True, True, ("v_pred", "ztsnr"))
    read = read_markers(found, {"v_pred": marker, "ztsnr": marker})
    assert [(m.dtype, m.shape, m.data) for m in read.markers] == 2 * [
        (marker.dtype, marker.shape, bytes(marker.tobytes()))
    ]
    assert pickle.loads(pickle.dumps(read)) == read


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (of(), None),
        (of(ztsnr=EMPTY), None),
        (of(edm_mean=ONE), None),  # ComfyUI looks for both
        (of(edm_mean=ONE, edm_std=ONE), "edm"),
        (of(edm_vpred_sigma_max=ONE, edm_vpred_sigma_min=ONE), "edm-v"),
        (of(edm_vpred_sigma_min=ONE), None),
        (of({TYPE: "v"}), "v"),
        (of({TYPE: "v_prediction"}), "v"),
        (of({TYPE: "epsilon"}), "epsilon"),
        (of({KEY: "v"}), "v"),
        (of({ARCHITECTURE: V2_V}), "v"),
        (of({ARCHITECTURE: V2}), "epsilon"),
        (of({ARCHITECTURE: "stable-diffusion-v1"}), None),
        (of({ARCHITECTURE: "stable-diffusion-xl-v1-base"}), None),
    ],
)
def test_what_says_it(found: Prediction, kind: Kind | None) -> None:
    assert found.kind == kind
    assert not found.contradiction


def test_what_is_too_large_is_no_marker() -> None:
    large = MemoryTensor(DType.U8, (MAX_MARKER + 1,), bytes(MAX_MARKER + 1))
    assert of(v_pred=large) == Prediction()


def test_markers_and_words_that_contradict_each_other() -> None:
    found = of({TYPE: "epsilon", ARCHITECTURE: V2}, v_pred=EMPTY)
    assert found.kind == "v"
    assert found.contradiction == (
        "the marker `v_pred` says v",
        f"`{TYPE}` says epsilon",
        f"`{ARCHITECTURE}` `{V2}` says epsilon",
    )
    assert not of({TYPE: "v"}, edm_vpred_sigma_max=ONE).contradiction, "words have no more for it than v"
    stated = found.stated(CATALOG.architectures["SD-v2"].modelspec, CATALOG)
    assert (stated[TYPE], stated[ARCHITECTURE]) == ("v", V2_V)


def test_the_architecture_that_is_stated() -> None:
    def stated(name: str, found: Prediction) -> tuple[str | None, str | None]:
        spec = (CATALOG.architectures.get(name) or CATALOG.components[name]).modelspec
        said = found.stated(spec, CATALOG)
        return said.get(ARCHITECTURE), said.get("modelspec.resolution")

    assert stated("SD-v2", of()) == (None, None), "nothing says which of the two it is"
    assert stated("SD-v2", of({TYPE: "v"})) == (V2_V, "768x768")
    assert stated("SD-v2", of({TYPE: "epsilon"})) == (V2, "512x512")
    assert stated("SD-v2", of({ARCHITECTURE: V2_V, "modelspec.resolution": "704x704"})) == (V2_V, "704x704")
    assert stated("SD-v1", of(v_pred=EMPTY)) == ("stable-diffusion-v1", "512x512")
    assert stated("SD-v1", of({ARCHITECTURE: "my-own-v1"})) == ("my-own-v1", None)
    inpainting = "stable-diffusion-v1-inpainting"
    assert stated("UNET-v1-Inpainting", of({ARCHITECTURE: "stable-diffusion-v1"}))[0] == inpainting
    assert stated("SD-v1", of({ARCHITECTURE: inpainting}))[0] == "stable-diffusion-v1"


def test_what_a_recipe_says_comes_first() -> None:
    v = of({TYPE: "v", KEY: "v", ARCHITECTURE: V2_V}, v_pred=ONE)
    assert v.with_own(None, {"author": "me"}, CATALOG) == v
    assert v.with_own((), {}, CATALOG) == of({TYPE: "v", KEY: "v", ARCHITECTURE: V2_V})
    assert v.with_own((), {TYPE: "epsilon"}, CATALOG) == of({TYPE: "epsilon"})
    both = v.with_own(("v_pred", "ztsnr"), {}, CATALOG)
    assert [(m.name, m.shape) for m in both.markers] == [("v_pred", (1,)), ("ztsnr", (0,))]
    plain = of({TYPE: "epsilon", ARCHITECTURE: V2}).with_own(("v_pred",), {}, CATALOG)
    assert (plain.kind, plain.words, plain.contradiction) == ("v", {}, ())
    assert v.with_own(None, {TYPE: "epsilon"}, CATALOG).contradiction
