"""What recipes make: bases, components, outputs, metadata and expectations, end to end on small files."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.generate import DIRTY, Dirt
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import IDS, RECIPE, UNET, VAE, Folder, content, model, save, values

HEAD = 'format = 1\nname = "m"\n'
WHOLE = HEAD + 'base = "a"\nsources.a.file = "a.safetensors"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


@pytest.fixture
def whole(folder: Folder) -> Folder:
    save(folder / "a.safetensors", model(seed=1))
    folder.write("m.toml", WHOLE)
    return folder


def halves(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What half precision makes of tensors."""
    import numpy as np

    return {
        n: (
            ("F16", t.shape, np.frombuffer(t.tobytes(), "<f4").astype("<f2").tobytes())
            if t.dtype is DType.F32
            else (t.dtype.code, t.shape, bytes(t.tobytes()))
        )
        for n, t in tensors.items()
    }


def part(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        found: dict[str, str] = file.metadata()
        return found


# -- bases and components


def test_a_dirty_checkpoint_made_tidy(folder: Folder) -> None:
    folder.tiny()
    said = folder("build", "tiny.toml")
    assert said.code == 0
    made = content(folder / "tiny.safetensors")
    tidy = model(dirt=Dirt(junk=True))
    expected = halves(model()) | halves({VAE + n: t for n, t in model("VAE-tiny", seed=2).items()})
    assert {n: made[n] for n in expected} == expected
    # And the noise schedule, which is part of a full checkpoint, as it was.
    beside = {n: t for n, t in tidy.items() if n in made and n not in expected}
    assert made.keys() == {*expected, *beside} and len(beside) >= 10
    assert {n: made[n][0] for n in beside} == dict.fromkeys(beside, "F32")
    assert re.search(r"left out of `dirty`: EMA, 6 tensors, 1\.3 MB", said.err)
    assert re.search(r"left out of `dirty`: junk, \d+ tensors", said.err)
    assert "clip-position-ids: made exact: int64 0..76" in said.err
    loaded = load_file(folder / "tiny.safetensors")
    assert loaded.keys() == made.keys()


def test_a_new_base(folder: Folder) -> None:
    tensors = model(seed=1)
    save(folder / "unet.safetensors", part(tensors, UNET))
    save(
        folder / "rest.ckpt",
        {n: t for n, t in tensors.items() if not n.startswith(UNET)},
        nesting="state_dict",
    )
    folder.write(
        "m.toml",
        HEAD + 'base = "NEW SDtiny"\n[sources]\nu.file = "unet.safetensors"\nr.file = "rest.ckpt"\n'
        '[components]\nUNET-tiny = "u"\nCLIP-tiny = "r"\nVAE-tiny = "r"\n',
    )
    folder.build("m.toml")
    assert content(folder / "m.safetensors") == halves(tensors)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_component_prefixed_or_bare(whole: Folder, prefixed: bool) -> None:
    vae = model("VAE-tiny", seed=2)
    save(whole / "v.pt", {VAE * prefixed + n: t for n, t in vae.items()})
    whole.write("m.toml", WHOLE + 'sources.v.file = "v.pt"\ncomponents.VAE-tiny = "v"\n')
    whole.build("m.toml")
    made = content(whole / "m.safetensors")
    assert made == halves({**model(seed=1), **{VAE + n: t for n, t in vae.items()}})


def test_the_average_promoted(folder: Folder) -> None:
    dirty = model(dirt=Dirt(ema=True))
    save(folder / "a.safetensors", dirty)
    folder.write("m.toml", WHOLE + 'components.UNET-tiny = { from = "a", component = "UNET-tiny-EMA" }\n')
    folder.build("m.toml")
    made = content(folder / "m.safetensors")
    flat = {("model_ema." + n.removeprefix("model.").replace(".", "")): n for n in made if n.startswith(UNET)}
    flat = {
        k.replace("model_ema.diffusion_model", "model_ema.diffusion_model", 1): v for k, v in flat.items()
    }
    expected = halves(dirty)
    found = {
        flat["model_ema." + "diffusion_model" + n.split("diffusion_model", 1)[1]] for n in dirty if "ema" in n
    }
    assert len(found) == 4
    for name, full in flat.items():
        assert made[full] == expected[name]
    assert not any("model_ema" in n for n in made)


def test_the_average_kept_beside(folder: Folder) -> None:
    dirty = model(dirt=Dirt(ema=True))
    save(folder / "a.safetensors", dirty)
    folder.write("m.toml", WHOLE + 'components.EMA-UNET-tiny = "a"\n')
    folder.build("m.toml")
    assert content(folder / "m.safetensors") == halves(dirty)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_class_alone(whole: Folder, suffix: str) -> None:
    whole.write("m.toml", WHOLE.replace('base = "a"', 'base = "NEW VAE-tiny"\ncomponents.VAE-tiny = "a"'))
    said = whole("build", "m.toml", "-o", f"vae.{suffix}")
    assert said.code == 0, said.err
    assert content(whole / f"vae.{suffix}") == halves(part(model(seed=1), VAE))


def test_a_component_that_the_source_lacks(whole: Folder) -> None:
    save(whole / "v.safetensors", {n: t for n, t in model("VAE-tiny", seed=2).items() if "conv_in" not in n})
    whole.write("m.toml", WHOLE + 'sources.v.file = "v.safetensors"\ncomponents.VAE-tiny = "v"\n')
    said = whole("build", "m.toml")
    assert said.code == 3
    assert "`v` has no VAE-tiny" in said.err and "m.toml:6:23" in said.err
    assert "VAE-tiny-SD: 1 of 4 tensors are missing" in said.err
    assert not (whole / "m.safetensors").exists()


def test_a_base_without_some_component(folder: Folder) -> None:
    save(folder / "a.safetensors", {n: t for n, t in model().items() if not n.startswith(VAE)})
    folder.write("m.toml", WHOLE)
    said = folder("build", "m.toml")
    assert said.code == 3
    assert "nothing fills the slot `VAE-tiny` of `SD-tiny`" in said.err


def test_a_base_that_is_mostly_something_else(folder: Folder) -> None:
    strange = {f"strange.{i}": values([[0.0] * 1000] * 1000) for i in range(2)}
    save(folder / "a.safetensors", {**model(), **strange})
    folder.write("m.toml", WHOLE)
    said = folder("build", "m.toml")
    assert said.code == 6
    assert "most of `a` would be left out" in said.err and "8,000,000 of " in said.err
    assert not (folder / "m.safetensors").exists()
    # What is named is taken.
    folder.write(
        "m.toml",
        WHOLE.replace('base = "a"', 'base = "NEW SD-tiny"')
        + 'components = { UNET-tiny = "a", VAE-tiny = "a", CLIP-tiny = "a" }\n',
    )
    folder.build("m.toml")
    assert content(folder / "m.safetensors") == halves(model())


def test_unknown_tensors_are_named(folder: Folder) -> None:
    save(folder / "a.safetensors", {**model(), "strange": values([1.0, 2.0])})
    folder.write("m.toml", WHOLE)
    said = folder("build", "m.toml")
    assert "left out of `a`: unknown, 1 tensor, 8 B" in said.err
    assert folder.plan("m.toml")["left_out"] == [
        {"base": "a", "output": "m.safetensors", "reasons": {"unknown": {"keys": 1, "bytes": 8}}}
    ]


# -- recipes as sources


def test_a_recipe_as_base(whole: Folder) -> None:
    vae = model("VAE-tiny", seed=2)
    save(whole / "sub" / "v.safetensors", vae)
    whole.write(
        "sub/inner.toml",
        'format = 1\nname = "inner"\nbase = "a"\nsources.a.file = "../a.safetensors"\n'
        'sources.v.file = "v.safetensors"\ncomponents.VAE-tiny = "v"\n',
    )
    whole.write("m.toml", HEAD + 'base = "i"\nsources.i.recipe = "sub/inner.toml"\n')
    whole.know("a.safetensors", "sub/v.safetensors")
    made = whole.build("m.toml")
    assert content(whole / "m.safetensors") == halves(
        {**model(seed=1), **{VAE + n: t for n, t in vae.items()}}
    )
    assert sorted(made["made"]) == ["CLIP-tiny of a", "UNET-tiny of a", "VAE-tiny of v"]
    assert not (whole / "sub" / "inner.safetensors").exists(), "it is no output of this recipe"
    # The other way round everything is there already.
    assert whole.build("sub/inner.toml", "--allow-outside")["made"] == []


def test_a_recipe_as_source_of_one_component(whole: Folder) -> None:
    save(whole / "b.safetensors", model(seed=2))
    whole.write("inner.toml", 'format = 1\nname = "inner"\nbase = "b"\nsources.b.file = "b.safetensors"\n')
    whole.write("m.toml", WHOLE + 'sources.i.recipe = "inner.toml"\ncomponents.VAE-tiny = "i"\n')
    whole.build("m.toml")
    made = content(whole / "m.safetensors")
    assert made[UNET + "out.2.bias"] == halves(model(seed=1))[UNET + "out.2.bias"]
    assert made[VAE + "quant_conv.bias"] == halves(model(seed=2))[VAE + "quant_conv.bias"]


def test_a_recipe_as_source_in_another_precision(whole: Folder) -> None:
    """It is the product of the other that is taken, with its rounding."""
    whole.write("inner.toml", WHOLE.replace('"m"', '"inner"') + 'output.precision = "bf16"\n')
    whole.write("m.toml", HEAD + 'base = "i"\nsources.i.recipe = "inner.toml"\noutput.precision = "fp32"\n')
    whole.build("m.toml")
    name = UNET + "out.2.weight"
    data = content(whole / "m.safetensors")[name][2]
    assert all(struct.unpack("<I", data[i : i + 4])[0] & 0xFFFF == 0 for i in range(0, len(data), 4))
    whole.build("inner.toml")
    short = content(whole / "inner.safetensors")[name][2]
    assert data[2::4] == short[::2] and data[3::4] == short[1::2]


def test_one_of_the_outputs_of_a_recipe(whole: Folder) -> None:
    whole.write(
        "inner.toml",
        WHOLE.replace('"m"', '"inner"')
        + '[[output]]\nname = "x"\n[[output]]\nname = "y"\nprecision = "bf16"\n',
    )
    whole.write(
        "m.toml",
        HEAD + 'base = "i"\nsources.i = { recipe = "inner.toml", output = "y" }\noutput.precision = "keep"\n',
    )
    whole.build("m.toml")
    assert content(whole / "m.safetensors")[UNET + "out.2.weight"][0] == "BF16"


@pytest.mark.parametrize("kept", [False, True], ids=["in a file", "in the store"])
def test_a_damaged_component_of_an_inner_recipe_is_made_again(whole: Folder, kept: bool) -> None:
    whole = replace(whole, environment={"CKPT_STORE_KEEP": "all" if kept else ""})
    whole.know("a.safetensors")
    whole.write("inner.toml", WHOLE.replace('"m"', '"inner"'))
    whole.build("inner.toml")
    if kept:
        (whole / "inner.safetensors").unlink()
        damaged = max(whole.blobs().values(), key=lambda p: p.stat().st_size)
    else:
        damaged = whole / "inner.safetensors"
    data = damaged.read_bytes()
    damaged.chmod(0o644)
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    whole.write("m.toml", HEAD + 'base = "i"\nsources.i.recipe = "inner.toml"\noutput.precision = "fp32"\n')
    said = whole("build", "m.toml")
    assert said.code == 0, said.err
    # A file that was changed is nobody's place any more; what the store keeps is, and cannot change.
    assert ("is damaged" in said.err) == kept
    assert damaged.exists() != kept
    first = whole.beside("again", store="other")
    (first / "m.safetensors").unlink()
    first.build("m.toml")
    assert content(first / "m.safetensors") == content(whole / "m.safetensors")


# -- outputs


def test_several_outputs_with_words_of_their_own(whole: Folder) -> None:
    broken = {**model(seed=1), IDS: values([[float(i) for i in range(77)]])}
    save(whole / "a.safetensors", broken)
    save(whole / "v.safetensors", model("VAE-tiny", seed=2))
    whole.write(
        "m.toml",
        WHOLE
        + """
fixes = ["clip-position-ids"]
sources.v.file = "v.safetensors"
[[output]]
name = "plain"
[[output]]
name = "other"
file = "deep/other.safetensors"
precision = "bf16"
fixes = ["position-ids-absent"]
markers = ["v_pred", "ztsnr"]
components.VAE-tiny = "v"
metadata = { author = "someone" }
""",
    )
    (whole / "deep").mkdir()
    made = whole.build("m.toml")
    assert [o["name"] for o in made["outputs"]] == ["plain", "other"]
    plain, other = content(whole / "m-plain.safetensors"), content(whole / "deep" / "other.safetensors")
    assert plain == halves(model(seed=1))
    assert other.keys() == {*plain, "v_pred", "ztsnr"} - {IDS}
    assert other["v_pred"] == ("F32", (0,), b"")
    assert {t[0] for n, t in other.items() if n not in ("v_pred", "ztsnr")} == {"BF16"}
    assert metadata(whole / "deep" / "other.safetensors")["author"] == "someone"
    assert "author" not in metadata(whole / "m-plain.safetensors")


def test_what_all_outputs_say_is_said_once(whole: Folder) -> None:
    whole.write(
        "m.toml",
        WHOLE
        + """
metadata = { author = "someone", license = "MIT" }
[[output]]
name = "x"
[[output]]
name = "y"
metadata.license = "other"
""",
    )
    whole.build("m.toml")
    said = [metadata(whole / f"m-{name}.safetensors") for name in "xy"]
    assert [(m["author"], m["license"]) for m in said] == [("someone", "MIT"), ("someone", "other")]


def test_the_name_of_one_output_of_an_array_is_in_its_files(whole: Folder) -> None:
    """As it is once another follows."""
    whole.write("m.toml", WHOLE + '[[output]]\nname = "x"\n')
    assert [Path(o["path"]).name for o in whole.build("m.toml")["outputs"]] == ["m-x.safetensors"]


def test_a_lock_makes_no_other_bytes(whole: Folder) -> None:
    """What only the lock knows of a source is in the lock: the first build could not have said it."""
    whole.build("m.toml")
    first = (whole / "m.safetensors").read_bytes()
    assert "ckpt.sources" not in metadata(whole / "m.safetensors")
    (whole / "m.safetensors").unlink()
    assert (whole / "m.lock.toml").exists()
    whole.build("m.toml")
    assert (whole / "m.safetensors").read_bytes() == first


def test_what_lies_beside_is_kept_or_not(folder: Folder) -> None:
    tensors = model(dirt=Dirt(junk=True))
    save(folder / "a.safetensors", tensors)
    folder.write("m.toml", WHOLE + 'output.keep = ["betas", "logvar"]\n')
    folder.build("m.toml")
    made = content(folder / "m.safetensors")
    assert made.keys() - model().keys() == {"betas"} | ({"logvar"} & tensors.keys())
    assert made["betas"] == ("F32", (1000,), bytes(tensors["betas"].tobytes()))
    folder.write("m.toml", WHOLE + "output.keep = []\n")
    folder.build("m.toml")
    assert content(folder / "m.safetensors").keys() == model().keys()


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_elsewhere_and_in_another_container(whole: Folder, suffix: str) -> None:
    whole.build("m.toml")
    target = whole.path.parent / f"out.{suffix}"
    said = whole("build", "m.toml", "-o", target)
    assert said.code == 0, said.err
    assert content(target) == content(whole / "m.safetensors")
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert digest in said.out
    assert whole("build", "m.toml", "-o", target, "--json").json["outputs"][0]["state"] == "unchanged"


def test_elsewhere_is_for_one_output(whole: Folder) -> None:
    whole.write("m.toml", WHOLE + '[[output]]\nname = "x"\n[[output]]\nname = "y"\n')
    said = whole("build", "m.toml", "-o", "z.safetensors")
    assert said.code == 2 and "`z.safetensors` is no folder, and there are several outputs" in said.err
    assert "`-o z.safetensors/` is one" in said.err
    assert whole("build", "m.toml", "-o", "new/").code == 0
    assert {p.name for p in (whole / "new").iterdir()} == {"m-x.safetensors", "m-y.safetensors"}


def test_a_folder_that_is_not_there(whole: Folder) -> None:
    """It is made before anything is read, and gone again where nothing comes of it."""
    whole.write("expect.toml", (whole / "m.toml").read_text() + '[expect]\nmetric = "0000/0000/0000"\n')
    assert whole("build", "expect.toml", "-o", "no/where/m.safetensors").code == 7
    assert not (whole / "no").exists()
    assert whole("build", "m.toml", "-o", "no/where/m.safetensors").code == 0
    assert whole("build", "m.toml", "-o", "no").code == 0 and (whole / "no" / "m.safetensors").exists()
    assert whole("build", "m.toml", "-o", "not/yet/").code == 0 and (whole / "not/yet/m.safetensors").exists()
    whole.write("file", "")
    said = whole("build", "m.toml", "-o", "file/m.safetensors")
    assert said.code == 7 and "cannot write" in said.err


# -- metadata


def test_metadata(folder: Folder) -> None:
    folder.tiny()
    digest = hashlib.sha256((folder / "dirty.ckpt").read_bytes()).hexdigest()
    folder.write(
        "tiny.toml",
        RECIPE.replace('base = "dirty"', 'description = "A small one"\nbase = "dirty"')
        + f'sources.dirty.sha256 = "{digest}"\n[output.metadata]\nauthor = "someone"\nlicense = "MIT"\n',
    )
    folder.build()
    made = metadata(folder / "tiny.safetensors")
    assert made["format"] == "pt"
    assert (made["author"], made["license"]) == ("someone", "MIT")
    assert made["ckpt.recipe"] == "tiny" and re.fullmatch(r"[0-9a-f]{64}", made["ckpt.recipe_sha256"])
    assert json.loads(made["ckpt.sources"]) == {"dirty": {"file": "dirty.ckpt", "sha256": digest}}
    own = {"ckpt.recipe", "ckpt.recipe_sha256", "ckpt.sources"}
    assert {k for k in made if k.startswith("ckpt.")} == own, "no digest of what is beside it in the file"
    text = json.dumps(made)
    assert str(folder.path) not in text and "202" not in re.sub(r"[0-9a-f]{64}", "", text), "no path, no time"


def test_the_header_is_of_its_output_alone(whole: Folder) -> None:
    """Neither another output, nor an unpinned source's digest, nor where the file goes is any part of it."""
    one = '[[output]]\nname = "x"\nfile = "m-x.safetensors"\n'
    whole.write("m.toml", WHOLE + one)
    whole.build("m.toml")
    alone = (whole / "m-x.safetensors").read_bytes()
    whole.build("m.toml", "-o", "elsewhere.safetensors")
    assert (whole / "elsewhere.safetensors").read_bytes() == alone
    (whole / "m-x.safetensors").unlink()
    whole.write("m.toml", WHOLE + one + '[[output]]\nname = "y"\nprecision = "fp32"\nmarkers = ["v_pred"]\n')
    whole.build("m.toml")
    assert (whole / "m-x.safetensors").read_bytes() == alone
    assert (
        metadata(whole / "m-y.safetensors")["ckpt.recipe_sha256"]
        != (metadata(whole / "m-x.safetensors")["ckpt.recipe_sha256"])
    )
    save(whole / "a.ckpt", model(seed=1))
    (whole / "a.ckpt").replace(whole / "a.safetensors")
    (whole / "m-x.safetensors").unlink()
    whole.build("m.toml")
    assert (whole / "m-x.safetensors").read_bytes() == alone


def test_model_spec(tmp_path: Path) -> None:
    """The keys that ModelSpec demands, for an architecture that it knows."""
    from builder.models.prediction import Prediction
    from builder.plan.metadata import stated_metadata
    from builder.recipe import load_recipe
    from tests.help.building import catalog

    path = tmp_path / "m.toml"
    path.write_text(
        HEAD + 'description = "Words"\nbase = "a"\nsources.a.file = "a.ckpt"\n'
        'output.markers = ["v_pred"]\noutput.metadata = { author = "someone", modelspec.title = "Mine" }\n'
    )
    recipe = load_recipe(path, catalog())
    architecture = (
        catalog().architecture("SD-XL")
        if "SD-XL" in catalog().architectures
        else catalog().architecture("SD-v1")
    )
    (output,) = recipe.outputs

    def said(**environment: str) -> dict[str, str]:
        carried = {
            "modelspec.date": "2020-01-01",
            "modelspec.hash_sha256": "0x0",
            "mine": "yes",
            "sshs_x": "no",
        }
        told = Prediction().with_own(output.markers, output.metadata, catalog())
        words = told.stated(architecture.modelspec, catalog())
        return stated_metadata(recipe, output, architecture.modelspec, words, carried, environment, {})

    made = said()
    assert made["modelspec.sai_model_spec"] == "1.0.1"
    assert architecture.modelspec is not None
    assert made["modelspec.architecture"] == architecture.modelspec.architecture
    assert made["modelspec.implementation"].startswith("https://")
    assert made["modelspec.title"] == "Mine"
    assert made["modelspec.description"] == "Words"
    assert made["modelspec.author"] == "someone"
    assert made["modelspec.prediction_type"] == "v"
    assert re.fullmatch(r"\d+x\d+", made["modelspec.resolution"])
    assert made["mine"] == "yes", "what a base says of itself outlives a rebuild"
    assert not {"modelspec.date", "modelspec.hash_sha256", "sshs_x"} & made.keys(), (
        "but for what is untrue now"
    )
    assert said(SOURCE_DATE_EPOCH="1700000000")["modelspec.date"] == "2023-11-14"
    assert "modelspec.date" not in said(SOURCE_DATE_EPOCH="")
    assert said(SOURCE_DATE_EPOCH="253402300799")["modelspec.date"] == "9999-12-31"


@pytest.fixture
def dated(folder: Folder) -> Folder:
    """With a recipe whose output says a day, where there is one."""
    own = folder.path.parent / "own" / "dated"
    own.mkdir(parents=True)
    spec = 'modelspec = { architecture = "dated", resolution = 64 }'
    (own / "architectures.toml").write_text(f'[Dated]\nslots = ["VAE-mini"]\n{spec}\n')
    save(folder / "vae.safetensors", model("VAE-mini"))
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "NEW Dated"\nsources.a.file = "vae.safetensors"\n'
        'components.VAE-mini = "a"\n',
    )
    return replace(folder, environment={"CKPT_COMPONENTS": str(own.parent)})


def at(folder: Folder, epoch: str) -> Folder:
    return replace(folder, environment={**folder.environment, "SOURCE_DATE_EPOCH": epoch})


@pytest.mark.parametrize("epoch", ["253402300800", "1700000000000", "9" * 20, "9" * 5000])
def test_a_date_that_is_none_is_refused(dated: Folder, epoch: str) -> None:
    """As one in milliseconds is."""
    said = at(dated, epoch)("build", "m.toml")
    assert said.code == 2 and "which is beyond the year 9999" in said.err
    assert "one in milliseconds is a thousand times too large" in said.err
    assert not (dated / "m.safetensors").exists()


@pytest.mark.parametrize("epoch", ["-1", "1.7e9", "yesterday", " ", "١٧"])
def test_a_date_that_is_no_number_is_refused(dated: Folder, epoch: str) -> None:
    said = at(dated, epoch)("build", "m.toml")
    assert said.code == 2 and f"`{epoch}`, which is no time in whole seconds since 1970" in said.err
    assert not (dated / "m.safetensors").exists()


def test_the_lock_says_which_day_decided_the_bytes(dated: Folder) -> None:
    then = at(dated, "1700000000")
    then.build("m.toml")
    lock = dated / "m.lock.toml"
    assert 'date = "2023-11-14"' in lock.read_text()
    assert then("build", "m.toml", "--locked").code == 0
    said = dated("build", "m.toml", "--locked")
    assert said.code == 4 and "date: `2023-11-14` is gone" in said.err
    dated.build("m.toml")
    assert "date =" not in lock.read_text()
    dated.write(
        "m.toml", (dated / "m.toml").read_text() + '[output.metadata]\nmodelspec.date = "2020-02-02"\n'
    )
    then.build("m.toml")
    assert "date =" not in lock.read_text(), "the recipe's own decided"


def test_metadata_of_a_base_is_carried(whole: Folder) -> None:
    data = (whole / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= {"ss_network": "x", "modelspec.hash_sha256": "0xdead"}
    text = json.dumps(header).encode()
    (whole / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    whole.build("m.toml")
    made = metadata(whole / "m.safetensors")
    assert made["ss_network"] == "x" and "modelspec.hash_sha256" not in made


# -- expectations


def test_expectations_that_hold(whole: Folder) -> None:
    made = whole.build("m.toml")["outputs"][0]
    whole.write(
        "m.toml",
        WHOLE + f'[expect]\nsha256 = "{made["sha256"]}"\nsize = {made["size"]}\n'
        f'tensor_digest = "{made["tensor_digest"]}"\nmetric = "{made["metric"]}"\n',
    )
    assert whole.build("m.toml")["outputs"][0]["state"] == "unchanged", "what is expected is no part of it"
    (whole / "m.safetensors").unlink()
    assert whole.build("m.toml")["outputs"][0]["state"] == "written"
    # The published label of weights may be off by one.
    first, *rest = made["metric"].split("/")
    near = "/".join([f"{int(first) + 1:04}", *rest])
    whole.write("m.toml", WHOLE + f'expect.metric = "{near}"\n')
    assert whole("build", "m.toml").code == 0
    far = "/".join([f"{int(first) + 2:04}", *rest])
    whole.write("m.toml", WHOLE + f'expect.metric = "{far}"\n')
    assert whole("build", "m.toml").code == 7


WRONG = {
    "sha256": f'"{"0" * 64}"',
    "tensor_digest": f'"{"0" * 64}"',
    "size": "1234",
    "metric": '"0000/1111/2222"',
}


@pytest.mark.parametrize("built", [False, True], ids=["new", "built"])
@pytest.mark.parametrize("key", sorted(WRONG))
def test_an_expectation_that_is_missed(whole: Folder, key: str, built: bool) -> None:
    made = whole.build("m.toml")["outputs"][0]
    if not built:
        (whole / "m.safetensors").write_bytes(b"old")
    before, lock = (whole / "m.safetensors").read_bytes(), (whole / "m.lock.toml").read_bytes()
    whole.write("m.toml", WHOLE + f"[expect]\n{key} = {WRONG[key]}\n")
    said = whole("build", "m.toml")
    assert said.code == 7
    assert f"the {key.replace('_', ' ')} of `m.safetensors` is not what the recipe expects" in said.err
    assert f"expected {WRONG[key].strip(chr(34))}" in said.err and f"made     {made[key]}" in said.err
    assert "m.toml:6:" in said.err
    assert (whole / "m.safetensors").read_bytes() == before
    assert (whole / "m.lock.toml").read_bytes() == lock
    assert {p.name for p in whole.path.iterdir()} == {
        "a.safetensors",
        "m.toml",
        "m.safetensors",
        "m.lock.toml",
    }


def behind_the_header(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("digits", [12, 64])
def test_the_autov3_of_what_is_made(whole: Folder, digits: int) -> None:
    whole.build("m.toml")
    autov3 = behind_the_header(whole / "m.safetensors")[:digits]
    expect = f'expect.autov3 = "{autov3.upper()}"\n'
    whole.write("m.toml", WHOLE + expect)
    assert whole.build("m.toml")["outputs"][0]["state"] == "unchanged", "read from what is there"
    whole.write("m.toml", WHOLE + 'metadata.author = "x"\n' + expect)
    assert whole.build("m.toml")["outputs"][0]["state"] == "written", "other metadata, the same digest"
    assert whole.build("m.toml")["outputs"][0]["state"] == "unchanged"
    assert whole("verify", "m.toml").code == 0
    whole.write("m.toml", WHOLE + f'metadata.author = "x"\nexpect.autov3 = "{"0" * digits}"\n')
    for command in ("build", "verify"):
        said = whole(command, "m.toml")
        assert said.code == 7
        assert "the AutoV3 of `m.safetensors` is not what the recipe expects" in said.err
        assert f"expected {'0' * digits}\n" in said.err and f"made     {autov3}\n" in said.err


def test_the_autov3_of_other_files(whole: Folder) -> None:
    text = WHOLE + 'output.file = "m.ckpt"\nexpect.autov3 = "0123456789ab"\n'
    whole.write("m.toml", text)
    said = whole("build", "m.toml")
    assert said.code == 3 and "`autov3` is of a safetensors file, which `m.ckpt` is not" in said.err
    whole.write("m.toml", text.replace("ab", "a").replace("m.ckpt", "m.safetensors"))
    said = whole("build", "m.toml")
    assert said.code == 3 and "12 hexadecimal digits, or all 64" in said.err


def test_every_missed_expectation_is_told_at_once(whole: Folder) -> None:
    whole.write("m.toml", WHOLE + "[expect]\n" + "".join(f"{k} = {v}\n" for k, v in WRONG.items()))
    said = whole("build", "m.toml")
    assert said.code == 7 and said.err.count("is not what the recipe expects") == 4


def test_pins(whole: Folder) -> None:
    digest = hashlib.sha256((whole / "a.safetensors").read_bytes()).hexdigest()
    whole.write("m.toml", WHOLE + f'sources.a.sha256 = "{digest}"\n')
    whole.build("m.toml")
    before = (whole / "m.safetensors").read_bytes()
    save(whole / "a.safetensors", model(seed=5))
    (whole / "m.safetensors").write_bytes(b"old")
    said = whole("build", "m.toml")
    assert said.code in (0, 6)
    if said.code:
        assert "is not what was pinned" in said.err and digest in said.err
        assert (whole / "m.safetensors").read_bytes() == b"old"
    else:  # everything that the pin stands for was in the store
        assert (whole / "m.safetensors").read_bytes() == before
    other = Folder(whole.path, whole.path.parent / "cold")
    (whole / "m.safetensors").write_bytes(b"old")
    said = other("build", "m.toml")
    assert said.code == 6 and "is not what was pinned" in said.err
    assert (
        digest in said.err and hashlib.sha256((whole / "a.safetensors").read_bytes()).hexdigest() in said.err
    )
    assert (whole / "m.safetensors").read_bytes() == b"old"


def test_json(whole: Folder) -> None:
    made = whole.build("m.toml")
    assert made.keys() >= {"schema", "outputs", "made", "changes"} and made["schema"] == 1
    (output,) = made["outputs"]
    data = (whole / "m.safetensors").read_bytes()
    assert output["sha256"] == hashlib.sha256(data).hexdigest() and output["size"] == len(data)
    assert output["path"] == "m.safetensors" and output["state"] == "written" and output["name"] == "m"
    rows = "".join(
        json.dumps([n, d, list(s), blake3(b).hexdigest()], separators=(",", ":")) + "\n"
        for n, (d, s, b) in sorted(content(whole / "m.safetensors").items())
    )
    assert output["tensor_digest"] == blake3(rows.encode()).hexdigest()


def test_quiet(whole: Folder) -> None:
    assert whole("build", "m.toml", "-q").err == ""
    assert whole("build", "m.toml").err == "", "nothing to do, nothing to say"


def test_a_sharded_source_is_an_input_in_all_its_parts(whole: Folder) -> None:
    tensors = model(seed=1)
    half = len(tensors) // 2
    shards = {
        "x-1.safetensors": dict(list(tensors.items())[:half]),
        "x-2.safetensors": dict(list(tensors.items())[half:]),
    }
    for name, held in shards.items():
        save(whole / "set" / name, held)
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    whole.write("set/x.safetensors.index.json", json.dumps(index))
    whole.write("m.toml", WHOLE.replace("a.safetensors", "set/x.safetensors.index.json"))
    whole.build("m.toml")
    assert content(whole / "m.safetensors") == halves(tensors)
    for _ in range(2):
        said = whole("build", "m.toml", "-o", "set/x-1.safetensors")
        assert said.code == 7 and "is one of the inputs" in said.err


def test_damage_in_a_dirty_base_is_no_matter_where_it_is_left_out(folder: Folder) -> None:
    """NaN in junk and EMA hinders nobody."""
    nan = {
        n: MemoryTensor(t.dtype, t.shape, b"\xff" * t.nbytes)
        for n, t in model(dirt=DIRTY).items()
        if "ema" in n
    }
    save(folder / "a.safetensors", {**model(), **nan})
    folder.write("m.toml", WHOLE)
    assert folder("build", "m.toml").code == 0
    assert content(folder / "m.safetensors") == halves(model())


@pytest.mark.parametrize("name", ["out.txt", "out.onnx"])
def test_a_file_that_no_format_is_known_by_is_not_written(whole: Folder, name: str) -> None:
    said = whole("build", "m.toml", "-o", name)
    assert said.code == 2 and f"`{name}` has the suffix of no container" in said.err
    assert not (whole / name).exists()
