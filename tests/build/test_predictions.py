"""What a model predicts is its UNET's, and goes wherever that goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from builder.formats.open import open_checkpoint
from builder.formats.write_safetensors import write
from builder.models.catalog import load_catalog
from builder.models.samples import make
from builder.plan import OutputJob
from builder.recipe import load_recipe
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import Folder, content

FAMILY = {
    "UNET-duo-A.toml": """\
name = "UNET-duo-A"
class = "UNET-duo"
prefix = "net."
keys = 1
parameters = 40
[tensors]
"block.weight" = [8, 5]
""",
    "UNET-duo-Inpainting.toml": """\
name = "UNET-duo-Inpainting"
extends = "UNET-duo-A"
modelspec = { architecture = "duo-inpainting", resolution = 64 }
keys = 1
parameters = 72
[tensors]
"block.weight" = [8, 9]
""",
    "UNET-duo-EMA.toml": """\
name = "UNET-duo-EMA"
class = "EMA-UNET-duo"
extends = "UNET-duo-A"
prefix = "model_ema.net"
naming = "without-dots"
average = true
keys = 1
parameters = 40
""",
    "VAE-duo-A.toml": """\
name = "VAE-duo-A"
class = "VAE-duo"
prefix = "vae."
keys = 1
parameters = 21
[tensors]
"conv.weight" = [3, 7]
""",
    "architectures.toml": """\
[Duo]
slots = ["UNET-duo", "VAE-duo"]
modelspec = { architecture = "duo-512", resolution = 512, v = "duo-768-v", resolution_v = 768 }
sidecars_v = { a1111 = "duo-v.yaml" }
reads_markers = ["comfyui"]
""",
    "duo-v.yaml": "parameterization: v\n",
}
TYPE, KEY, ARCHITECTURE = "modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture"
RESOLUTION = "modelspec.resolution"
EMPTY = MemoryTensor(DType.F32, (0,), b"")
ONE = MemoryTensor(DType.F16, (1,), b"\0\x3c")
SIGMA = MemoryTensor(DType.F32, (), b"\0\0\xf0\x42")  # 120
V = {ARCHITECTURE: "duo-768-v"}
WORDS = {TYPE, KEY, ARCHITECTURE, RESOLUTION}
HEAD = 'format = 1\nname = "m"\nsources.a.file = "a.safetensors"\nsources.b.file = "b.safetensors"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    family = tmp_path / "duo"
    family.mkdir()
    for name, text in FAMILY.items():
        (family / name).write_text(text)
    (tmp_path / "work").mkdir()
    return Folder(tmp_path / "work", tmp_path / "store", {"CKPT_COMPONENTS": str(family)})


def duo(
    folder: Folder, name: str, words: Mapping[str, str], *, unet: str = "A", **markers: LazyTensor
) -> Path:
    """A whole model, with metadata and with markers beside it."""
    catalog = load_catalog([Path(folder.environment["CKPT_COMPONENTS"])])
    tensors = {
        f"net.{n}": t for n, t in make(f"UNET-duo-{unet}", seed=len(name), catalog=catalog).tensors.items()
    }
    tensors |= {f"vae.{n}": t for n, t in make("VAE-duo", seed=ord(name[0]), catalog=catalog).tensors.items()}
    named = {marker.replace("edm_vpred_", "edm_vpred."): tensor for marker, tensor in markers.items()}
    write(folder / name, {**tensors, **named}, {"format": "pt", **words}, durable=False)
    return folder / name


def words(path: Path) -> dict[str, str]:
    """What a file's metadata says of what it predicts."""
    with open_checkpoint(path, {}) as checkpoint:
        return {k: v for k, v in checkpoint.metadata.items() if k in WORDS}


def beside(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of a file that are of no component."""
    return {n: t for n, t in content(path).items() if not n.startswith(("net.", "vae.", "block."))}


def built(
    folder: Folder, recipe: str
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    folder.write("m.toml", HEAD + recipe)
    said = folder("build", "m.toml")
    assert said.code == 0, said.err
    return words(folder / "m.safetensors"), beside(folder / "m.safetensors")


def test_another_vae_makes_no_other_model_of_it(folder: Folder) -> None:
    """A model whose only word is its architecture keeps it, and what that says."""
    duo(folder, "a.safetensors", V)
    duo(folder, "b.safetensors", {})
    assert folder("replace", "a.safetensors", "VAE=b.safetensors", "-o", "m.safetensors").code == 0
    expected = {ARCHITECTURE: "duo-768-v", RESOLUTION: "768x768", TYPE: "v"}
    assert words(folder / "m.safetensors") == expected
    assert built(folder, 'base = "a"\ncomponents.VAE-duo = "b"\n') == (expected, {})
    assert folder("prune", "a.safetensors", "-o", "p.safetensors").code == 0
    assert words(folder / "p.safetensors") == expected


def test_an_inpainting_model_stays_one_in_words(folder: Folder) -> None:
    duo(folder, "a.safetensors", {}, unet="Inpainting")
    duo(folder, "b.safetensors", {ARCHITECTURE: "duo-512"})
    for recipe in (
        'base = "a"\ncomponents.VAE-duo = "b"\n',
        'base = "b"\ncomponents.UNET-duo = "a"\n',
        'base = "NEW Duo"\ncomponents = { UNET-duo = "a", VAE-duo = "b" }\n',
    ):
        assert built(folder, recipe)[0][ARCHITECTURE] == "duo-inpainting"
    assert built(folder, 'base = "a"\ncomponents.UNET-duo = "b"\n')[0][ARCHITECTURE] == "duo-512"


@pytest.mark.parametrize("marker", [EMPTY, ONE], ids=["[0]", "[1]"])
@pytest.mark.parametrize(
    "recipe",
    [
        'base = "b"\ncomponents.UNET-duo = "a"\n',
        'base = "NEW Duo"\ncomponents = { UNET-duo = "a", VAE-duo = "b" }\n',
        'base = "a"\ncomponents.VAE-duo = "b"\noutput.keep = []\n',
    ],
    ids=["other base", "new", "own base"],
)
def test_markers_and_words_go_with_the_unet(folder: Folder, recipe: str, marker: LazyTensor) -> None:
    duo(folder, "a.safetensors", {KEY: "v"}, v_pred=marker, ztsnr=EMPTY)
    duo(folder, "b.safetensors", {TYPE: "epsilon"})
    said, held = built(folder, recipe)
    assert said == {TYPE: "v", KEY: "v", ARCHITECTURE: "duo-768-v", RESOLUTION: "768x768"}
    own = (marker.dtype.code, marker.shape, bytes(marker.tobytes()))
    assert held == {"v_pred": own, "ztsnr": ("F32", (0,), b"")}


def test_values_of_markers_are_carried_and_not_rounded(folder: Folder) -> None:
    duo(folder, "a.safetensors", {}, edm_vpred_sigma_max=SIGMA, edm_vpred_sigma_min=ONE)
    duo(folder, "b.safetensors", {})
    said, held = built(folder, 'base = "b"\ncomponents.UNET-duo = "a"\n')
    assert held["edm_vpred.sigma_max"] == ("F32", (), b"\0\0\xf0\x42") and len(held) == 2
    assert TYPE not in said and said[ARCHITECTURE] == "duo-768-v"


def test_a_marker_of_the_base_stays_behind_with_its_unet(folder: Folder) -> None:
    duo(folder, "a.safetensors", V, v_pred=EMPTY, edm_mean=ONE, edm_std=ONE, betas=_schedule())
    duo(folder, "b.safetensors", {TYPE: "epsilon"})
    said, held = built(folder, 'base = "a"\ncomponents.UNET-duo = "b"\n')
    assert said == {TYPE: "epsilon", ARCHITECTURE: "duo-512", RESOLUTION: "512x512"}
    assert held.keys() == {"betas"}, "the rest of what the base holds besides does not"


def test_what_is_called_as_a_marker_and_is_none_stays_with_the_base(folder: Folder) -> None:
    large = MemoryTensor(DType.U8, (5000,), bytes(5000))
    duo(folder, "a.safetensors", {}, v_pred=large)
    duo(folder, "b.safetensors", {})
    assert built(folder, 'base = "a"\ncomponents.VAE-duo = "b"\n')[1] == {
        "v_pred": ("U8", (5000,), bytes(5000))
    }


def _schedule() -> LazyTensor:
    return MemoryTensor(DType.F32, (1000,), bytes(4000))


def test_a_unet_alone_and_a_vae_alone(folder: Folder) -> None:
    duo(folder, "a.safetensors", V, v_pred=ONE)
    assert folder("extract", "a.safetensors", "UNET", "-o", "unet.safetensors").code == 0
    assert beside(folder / "unet.safetensors") == {"v_pred": ("F16", (1,), b"\0\x3c")}
    assert words(folder / "unet.safetensors") == {TYPE: "v", ARCHITECTURE: "duo-768-v", RESOLUTION: "768x768"}
    assert folder("extract", "a.safetensors", "VAE", "-o", "vae.safetensors").code == 0
    assert (
        words(folder / "vae.safetensors")
        == {}
        == {n: t for n, t in content(folder / "vae.safetensors").items() if n != "conv.weight"}
    )
    # and back into a model that is none of the kind
    duo(folder, "b.safetensors", {TYPE: "epsilon"})
    assert folder("replace", "b.safetensors", "UNET=unet.safetensors", "-o", "m.safetensors").code == 0
    assert words(folder / "m.safetensors")[TYPE] == "v"
    assert beside(folder / "m.safetensors").keys() == {"v_pred"}


def test_a_recipe_in_a_recipe_and_an_average(folder: Folder) -> None:
    duo(folder, "a.safetensors", {})
    duo(folder, "b.safetensors", {TYPE: "epsilon"})
    folder.write(
        "inner.toml",
        'format = 1\nname = "inner"\nbase = "a"\nsources.a.file = "a.safetensors"\n'
        'output.markers = ["v_pred", "ztsnr"]\n',
    )
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "b"\nsources.b.file = "b.safetensors"\n'
        'sources.i.recipe = "inner.toml"\ncomponents.UNET-duo = "i"\n',
    )
    assert folder("build", "m.toml").code == 0
    assert words(folder / "m.safetensors")[TYPE] == "v"
    assert beside(folder / "m.safetensors").keys() == {"v_pred", "ztsnr"}
    assert folder("build", "inner.toml").code == 0
    assert words(folder / "inner.safetensors")[ARCHITECTURE] == "duo-768-v"


def test_a_recipe_says_otherwise(folder: Folder) -> None:
    duo(folder, "a.safetensors", V, v_pred=ONE)
    duo(folder, "b.safetensors", {})
    both = 'base = "b"\ncomponents.UNET-duo = "a"\n'
    said, held = built(folder, both + f'output = {{ markers = [], metadata = {{ {TYPE} = "epsilon" }} }}\n')
    assert (said, held) == ({TYPE: "epsilon", ARCHITECTURE: "duo-512", RESOLUTION: "512x512"}, {})
    said, held = built(folder, both + 'output.markers = ["ztsnr", "v_pred"]\n')
    assert held == {"v_pred": ("F16", (1,), b"\0\x3c"), "ztsnr": ("F32", (0,), b"")}
    assert built(folder, 'base = "b"\ncomponents.VAE-duo = "a"\n')[0] == {}, "nothing says which it is"


def test_what_contradicts_is_said(folder: Folder) -> None:
    duo(folder, "a.safetensors", {TYPE: "epsilon"}, v_pred=EMPTY)
    duo(folder, "b.safetensors", {})
    folder.write("m.toml", HEAD + 'base = "a"\ncomponents.VAE-duo = "b"\n')
    said = folder("build", "m.toml")
    assert "what is said of the UNET-duo of `a` contradicts itself" in said.err
    assert "the marker `v_pred` says v" in said.err and f"`{TYPE}` says epsilon" in said.err
    assert words(folder / "m.safetensors")[TYPE] == "v", "as programs take it that look for markers"
    found = folder("inspect", "a.safetensors")
    assert "the file contradicts itself on what it predicts" in found.out
    assert "predicts   v, says the marker `v_pred`" in found.out
    told = folder("inspect", "m.safetensors", "--json").json["files"][0]
    assert (told["prediction"]["kind"], told["prediction"]["markers"]) == ("v", ["v_pred"])
    assert not any("contradicts" in f["fact"] for f in told["faults"])


def test_it_follows_from_the_plan(folder: Folder) -> None:
    duo(folder, "a.safetensors", V, edm_vpred_sigma_max=SIGMA)
    duo(folder, "b.safetensors", {})
    path = folder.write("m.toml", HEAD + 'base = "b"\ncomponents.UNET-duo = "a"\n')
    with folder.workspace() as workspace, workspace.sources() as sources:
        plan = workspace.plan(load_recipe(path, workspace.catalog), sources, None)
    (job,) = (n.job for n in plan.outputs())
    assert isinstance(job, OutputJob)
    assert [(m.name, m.shape, m.data) for m in job.beside.markers] == [
        ("edm_vpred.sigma_max", (), b"\0\0\xf0\x42")
    ]
    assert job.metadata[ARCHITECTURE] == "duo-768-v"


def test_what_was_built_once_needs_no_second_look(folder: Folder) -> None:
    """The store remembers it with the components: what they came from may be gone."""
    import hashlib

    duo(folder, "a.safetensors", V, v_pred=ONE)
    duo(folder, "b.safetensors", {})
    pin = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    folder.write("m.toml", HEAD + f'sources.a.sha256 = "{pin}"\nbase = "b"\ncomponents.UNET-duo = "a"\n')
    assert folder("build", "m.toml").code == 0
    before = (folder / "m.safetensors").read_bytes()
    (folder / "a.safetensors").unlink()
    assert folder("build", "m.toml", "--json", "-o", "n.safetensors").code == 0
    assert (folder / "n.safetensors").read_bytes() == before


def test_the_sidecar_follows_from_words_too(folder: Folder) -> None:
    duo(folder, "a.safetensors", V)
    duo(folder, "b.safetensors", {}, unet="Inpainting", v_pred=EMPTY)
    recipe = 'output.profile = "a1111"\n'
    built(folder, 'base = "a"\ncomponents.VAE-duo = "b"\n' + recipe)
    assert (folder / "m.yaml").read_text() == "parameterization: v\n"
    (folder / "m.yaml").unlink()
    built(folder, 'base = "b"\ncomponents.VAE-duo = "a"\n' + recipe)
    assert not (folder / "m.yaml").exists(), "it is that of the ordinary model"
