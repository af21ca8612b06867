"""`ckpt extract`: components as files of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from builder.formats import open_checkpoint
from builder.tensors.lazy import DType, MemoryTensor
from tests.help.building import UNET, VAE, Folder, catalog, content, model, save, save_dirty
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save_dirty(made / "Anything-V3.0.ckpt")
    return made


def only(folder: Folder, pattern: str) -> Path:
    (found,) = folder.path.glob(pattern)
    return found


@pytest.mark.parametrize("word", ["VAE-tiny", "vae-TINY", "VAE-tiny-SD", "vae_tiny_sd", "vae"])
def test_a_component_by_name_class_or_kind(folder: Folder, word: str) -> None:
    made = folder("extract", "Anything-V3.0.ckpt", word, "-o", "out.safetensors", "--json").json["outputs"][0]
    found, full = content(folder / "out.safetensors"), content(folder / "Anything-V3.0.ckpt")
    assert {VAE + n for n in found} == {n for n in full if n.startswith(VAE) and "loss" not in n}
    assert {dtype for dtype, _, _ in found.values()} == {"F16"}
    assert made["path"] == "out.safetensors" and made["state"] == "written"
    values = full[VAE + "decoder.conv_out.bias"][2]
    expected = torch.frombuffer(bytearray(values), dtype=torch.float32).half().numpy().tobytes()
    assert found["decoder.conv_out.bias"][2] == expected


def test_the_default_name_has_metric_and_class_and_collisions_get_a_number(folder: Folder) -> None:
    first = folder("extract", "Anything-V3.0.ckpt", "VAE-tiny", "--json").json["outputs"][0]
    digits = first["metric"].split("/")[1]
    assert first["path"] == f"Anything-V3.0-{digits}.vae.safetensors"
    # What is there and the same serves; another of that name stays.
    second = folder("extract", "Anything-V3.0.ckpt", "VAE-tiny", "--json").json["outputs"][0]
    assert (second["path"], second["state"]) == (first["path"], "unchanged")
    assert second["sha256"] == first["sha256"]
    (folder / first["path"]).write_bytes(b"another")
    third = folder("extract", "Anything-V3.0.ckpt", "VAE-tiny", "--json").json["outputs"][0]
    assert (third["path"], third["state"]) == (f"Anything-V3.0-{digits}(1).vae.safetensors", "written")
    assert (folder / first["path"]).read_bytes() == b"another"
    average = folder("extract", "Anything-V3.0.ckpt", "UNET-tiny-EMA", "--format", "pt", "--json").json
    digits = average["outputs"][0]["metric"].split("/")[0]
    assert average["outputs"][0]["path"] == f"Anything-V3.0-ema-{digits}.unet.pt"


def test_a_class_without_a_metric_stands_in_the_name(folder: Folder) -> None:
    (folder / "sub").mkdir()
    save(folder / "style.lora.safetensors", model("LoRA-v1-CLIP"))
    made = folder("extract", "style.lora.safetensors", "lora-v1-clip", "-o", "sub", "--json").json["outputs"][
        0
    ]
    assert made["path"] == "sub/style.lora.lora-v1-clip.safetensors"
    assert made["metric"] is None


def test_an_average_comes_out_with_ordinary_names(folder: Folder) -> None:
    for word in ("UNET-tiny-EMA", "ema-unet-tiny", "EMA"):
        args = ("-o", "ema.safetensors", "--precision", "keep")
        assert folder("extract", "Anything-V3.0.ckpt", word, *args).code == 0
        found, full = content(folder / "ema.safetensors"), content(folder / "Anything-V3.0.ckpt")
        assert found.keys() == catalog().components["UNET-tiny-SD"].tensors.keys()
        name = "out.2.weight"
        assert found[name] == full["model_ema.diffusion_model" + name.replace(".", "")]
        assert found[name] != full[UNET + name]
        (folder / "ema.safetensors").unlink()


def test_from_a_component_alone_of_any_container(folder: Folder) -> None:
    save(folder / "a.safetensors", model("VAE-tiny", seed=3))
    save(folder / "b.pt", model("VAE-tiny", seed=3), nesting="state_dict")
    for name in ("a.safetensors", "b.pt"):
        assert folder("extract", name, "vae", "-o", f"{name}.out.safetensors").code == 0
    made = [content(folder / f"{n}.out.safetensors") for n in ("a.safetensors", "b.pt")]
    assert made[0] == made[1]


def test_precision(folder: Folder) -> None:
    """By default nothing is made wider, nor is BF16 made FP16; what is asked for is done."""
    for source in (DType.F32, DType.F16, DType.BF16):
        save(folder / f"{source.code}.safetensors", model("VAE-tiny", source))
    types = {}
    for source in ("F32", "F16", "BF16"):
        for wanted in ("default", "fp16", "bf16", "fp32", "keep"):
            asked = [] if wanted == "default" else ["--precision", wanted]
            said = folder("extract", f"{source}.safetensors", "vae", "-o", "out.safetensors", *asked)
            assert said.code == 0, said.err
            types[source, wanted] = {t for t, _, _ in content(folder / "out.safetensors").values()}
    expected = {(s, "default"): "F16" for s in ("F32", "F16")} | {("BF16", "default"): "BF16"}
    for source in ("F32", "F16", "BF16"):
        expected |= {(source, w): t for w, t in (("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32"))}
        expected[source, "keep"] = source
    assert types == {case: {code} for case, code in expected.items()}


def test_a_vae_outside_sd_keeps_its_type(folder: Folder) -> None:
    save(folder / "flux.safetensors", model("VAE-FLUX", DType.F32))
    assert folder("extract", "flux.safetensors", "vae", "-o", "out.safetensors").code == 0
    assert {t for t, _, _ in content(folder / "out.safetensors").values()} == {"F32"}


def test_pytorch_loads_what_is_written(folder: Folder) -> None:
    for suffix in ("ckpt", "pt"):
        assert folder("extract", "Anything-V3.0.ckpt", "vae", "-o", f"vae.{suffix}").code == 0
        loaded = torch.load(folder / f"vae.{suffix}", weights_only=True)
        assert set(loaded["state_dict"]) == set(content(folder / f"vae.{suffix}"))


def test_the_saved_recipe_makes_the_same_bytes(folder: Folder) -> None:
    (folder / "recipes").mkdir()
    said = folder(
        "extract", "Anything-V3.0.ckpt", "EMA", "-o", "x.safetensors", "--save-recipe", "recipes/x.toml"
    )
    assert said.code == 0, said.err
    text = (folder / "recipes/x.toml").read_text()
    assert 'file = "../Anything-V3.0.ckpt"' in text and "sha256" in text
    elsewhere = Folder(folder.path.parent / "moved", folder.path.parent / "other-store")
    shutil.copytree(folder.path, elsewhere.path)
    assert elsewhere("build", "recipes/x.toml", "--allow-outside").code == 0
    assert (elsewhere / "recipes/x.safetensors").read_bytes() == (folder / "x.safetensors").read_bytes()


def test_the_source_is_not_hashed(folder: Folder) -> None:
    assert folder("extract", "Anything-V3.0.ckpt", "vae", "-o", "a.safetensors").code == 0
    assert not list(folder.store.glob("actions/*/*"))  # of what is unknown nothing can be remembered
    with open_checkpoint(folder / "a.safetensors") as made:
        assert "ckpt.sources" not in made.metadata


def test_refusals(folder: Folder) -> None:
    save(folder / "vae.safetensors", model("VAE-tiny"))
    save(folder / "strange.safetensors", {"x": MemoryTensor(DType.F32, (2,), bytes(8))})
    folder.write("page.safetensors", "<!doctype html><html>401</html>")
    (folder / "dir").mkdir()
    (folder / "link.safetensors").symlink_to("vae.safetensors")
    (folder / "hard.safetensors").hardlink_to(folder / "vae.safetensors")
    before = sorted(p.name for p in folder.path.iterdir())
    told = []
    for args in (
        ["Anything-V3.0.ckpt", "VAE-tny"],
        ["Anything-V3.0.ckpt", "UNET-v1"],
        ["vae.safetensors", "UNET-tiny"],
        ["strange.safetensors", "vae"],
        ["page.safetensors", "vae"],
        ["dir", "vae"],
        ["missing.ckpt", "vae"],
        ["vae.safetensors", "vae", "-o", "vae.safetensors"],
        ["vae.safetensors", "vae", "-o", "link.safetensors"],
        ["vae.safetensors", "vae", "-o", "hard.safetensors"],
        ["vae.safetensors", "vae", "-o", "vae.onnx"],
        ["vae.safetensors", "vae", "-o", "page.safetensors/where.safetensors"],
        ["vae.safetensors", "vae", "-o", "x.ckpt", "--format", "pt"],
        ["vae.safetensors", "vae", "--save-recipe", "vae.safetensors"],
        ["vae.safetensors"],
    ):
        said = folder("extract", *args)
        told.append(f"$ ckpt extract {' '.join(args)}\n{said.err}[{said.code}]\n")
        assert said.code in (2, 6, 7) and "Traceback" not in said.err and not said.out
    assert sorted(p.name for p in folder.path.iterdir()) == before
    text = "\n".join(told).replace(str(folder.path), "…")
    assert text == golden(GOLDEN / "extract.txt", text)


def test_numbers_that_are_none(folder: Folder) -> None:
    tensors = dict(model("VAE-tiny"))
    name = "decoder.conv_out.bias"
    tensors[name] = MemoryTensor(DType.F32, (5,), b"\0\0\xc0\x7f" * 5)
    save(folder / "nan.safetensors", tensors)
    said = folder("extract", "nan.safetensors", "vae", "-o", "out.safetensors")
    assert said.code == 7 and name in said.err and not (folder / "out.safetensors").exists()
    kept = folder("extract", "nan.safetensors", "vae", "--non-finite", "keep")
    assert kept.code == 0
    assert only(folder, "nan.vae.safetensors")
