"""A family that the catalog does not have is a folder of tables, and every command works on it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builder.models.catalog import load_catalog
from builder.models.samples import make
from builder.tensors.lazy import DType, LazyTensor
from tests.help.building import Folder, content, save, values

# What a table of a real family has, in a few dozen tensors.
FAMILY = {
    "DIT-Nova.toml": """\
name = "DIT-Nova"
class = "DIT-Nova"
prefix = "model.diffusion_model."
models = ["Nova", "Nova Edit", "Nova Turbo"]
marks = { __nova_edit__ = "Nova Edit" }
keys = 21
parameters = 1_356

[tensors]
"img_in.{weight,bias}" = [[8, 4], [8]]
"final_layer.linear.{weight,bias}" = [[4, 8], [4]]
"pos_embed" = [1, 20, 8]

[tensors."blocks.{0..3}"]
"attn.qkv.weight" = [24, 8]
"proj.weight" = [8, 8]
"scale_shift_table" = [2, 8]
"norm.weight" = [8]
""",
    "VAE-Nova.toml": """\
name = "VAE-Nova"
class = "VAE-Nova"
prefix = "vae."
keys = 5
parameters = 224

[tensors]
"encoder.conv_in.{weight,bias}" = [[4, 3, 3, 3], [4]]
"decoder.conv_out.weight" = [3, 4, 3, 3]
"bn.running_{mean,var}" = [2]
""",
    "TE-Nova.toml": """\
name = "TE-Nova"
class = "TE-Nova"
prefix = "text_encoders.nova.transformer."
keys = 5
parameters = 400

[tensors]
"embed_tokens.weight" = [16, 8]
"layers.{0,1}.{wi,wo}.weight" = [[8, 8], [9, 8]]
""",
    "classes.toml": """\
[DIT-Nova]
precision = "bf16"
kept = ["*.scale_shift_table"]
overflows = ["*"]
unquantized = ["img_in", "final_layer*"]
constants = ["pos_embed"]

[DIT-Nova.blocks]
"img_in." = "IN"
"blocks.{0..3}." = "B0{0..3}"
"final_layer." = "OUT"

[DIT-Nova.adapters]
prefixes = ["lora_unet_", "diffusion_model.", ""]

[DIT-Nova.adapters.names]
"blocks.{0..3}.attn.qkv" = [
  "0+1/3 layers.{0..3}.to_q",
  "1+1/3 layers.{0..3}.to_k",
  "2+1/3 layers.{0..3}.to_v",
]
"blocks.{0..3}.proj" = "layers.{0..3}.to_out"

[VAE-Nova]
kept = ["bn.*"]

[TE-Nova]
precision = "bf16"
overflows = ["*.wo.weight"]
""",
    "architectures.toml": """\
[Nova]
slots = ["DIT-Nova", "VAE-Nova", "TE-Nova"]
may_lack = ["VAE-Nova", "TE-Nova"]
modelspec = { architecture = "nova", resolution = 1024 }
""",
    "kinds.toml": """\
[[kind]]
kind = "LoRA"
called = "a Nova booster"
any = ["*.nova_up"]
""",
}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "Nova"
    folder.mkdir()
    for name, text in FAMILY.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder.parent


@pytest.fixture
def folder(tmp_path: Path, tables: Path) -> Folder:
    made = replace(Folder.below(tmp_path), environment={"CKPT_COMPONENTS": str(tables)})
    save(made / "a.safetensors", nova(tables, 1))
    save(made / "b.safetensors", nova(tables, 2))
    return made


def nova(tables: Path, seed: int, name: str = "Nova") -> Mapping[str, LazyTensor]:
    return make(name, precision=DType.F32, seed=seed, catalog=load_catalog([tables])).tensors


def split(path: Path) -> dict[str, str]:
    return {n: t for n, (t, _, _) in content(path).items()}


TYPES = {
    UNET: "BF16",
    "vae.": "F32",
    "text_encoders.nova.transformer.": "BF16",
}


def as_published(types: Mapping[str, str]) -> bool:
    """Whether each tensor has its component's precision, but for those that no cast touches."""
    expected = {
        n: "F32" if n.endswith("scale_shift_table") else next(t for p, t in TYPES.items() if n.startswith(p))
        for n in types
    }
    return types == expected


def test_it_is_known_whole_and_in_files_of_its_own(folder: Folder, tables: Path) -> None:
    said = folder("inspect", "a.safetensors", "--json").json["files"][0]
    assert (said["architecture"], said["intact"], said["kind"]) == ("Nova", True, "checkpoint")
    whole = nova(tables, 1)
    for cls, prefix in (("DIT-Nova", UNET), ("VAE-Nova", "vae.")):
        alone = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
        for under in ("", "net.", "model.model."):
            save(folder / "part.safetensors", {under + n: t for n, t in alone.items()})
            said = folder("inspect", "part.safetensors", "--json").json["files"][0]
            assert (said["architecture"], said["intact"]) == (cls, True), under
    save(folder / "no-text.safetensors", {n: t for n, t in whole.items() if not n.startswith("text_")})
    said = folder("inspect", "no-text.safetensors", "--json").json["files"][0]
    assert (said["architecture"], said["intact"], said["absent"]) == ("Nova", True, ["TE-Nova"])
    text = folder("inspect", "no-text.safetensors").out
    assert "without    TE-Nova" in text


def test_which_of_its_models_it_is_weights_markers_and_metadata_show(folder: Folder, tables: Path) -> None:
    def lineage(name: str) -> object:
        return folder("inspect", name, "--json").json["files"][0]["lineage"]

    models = ["Nova", "Nova Edit", "Nova Turbo"]
    plain = {"component": "DIT-Nova", "models": models, "model": None, "by": None}
    assert lineage("a.safetensors") == plain
    assert "could be Nova, Nova Edit or Nova Turbo" in folder("inspect", "a.safetensors").out
    marked = {**nova(tables, 3), f"{UNET}__nova_edit__": values([])}
    save(folder / "marked.safetensors", marked)
    assert lineage("marked.safetensors") == {
        **plain,
        "model": "Nova Edit",
        "by": "the marker `__nova_edit__`",
    }
    for title, model in ("nova_turbo", "Nova Turbo"), ("other", None):
        _titled(folder / "a.safetensors", folder / "titled.safetensors", {"modelspec.title": title})
        by = "`modelspec.title`" if model else None
        assert lineage("titled.safetensors") == {**plain, "model": model, "by": by}
    # The family's name for its architecture is no model's.
    _titled(folder / "a.safetensors", folder / "titled.safetensors", {"modelspec.architecture": "nova"})
    assert lineage("titled.safetensors") == plain
    own = tables.parent / "own"
    learned = folder("components", "learn", "--weights", "a.safetensors", "--name", "My Nova", "-o", own)
    assert learned.code == 0 and str(own) in learned.out
    known = replace(folder, environment={"CKPT_COMPONENTS": f"{tables}:{own}"})
    said = known("inspect", "a.safetensors", "--json").json["files"][0]
    assert said["lineage"] == {**plain, "model": "My Nova", "by": "the digest of its weights"}
    assert said["known"]["components"].keys() == {"DIT-Nova", "VAE-Nova", "TE-Nova"}
    assert "model      My Nova, by the digest of its weights" in known("inspect", "a.safetensors").out
    again = known("components", "learn", "--weights", "a.safetensors", "--name", "Other")
    assert again.code == 0 and again.out == "" and again.err.count("are known as `My Nova`") == 3
    refused = known("components", "learn", "--weights", "a.safetensors", "--prefix", "x")
    assert refused.code == 2 and "`--prefix` cannot go with `--weights`" in refused.err


def _titled(path: Path, target: Path, said: Mapping[str, str]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = {**json.loads(data[8 : 8 + size]), "__metadata__": said}
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_prune_keeps_each_component_as_it_is_published(folder: Folder, tables: Path) -> None:
    marker = f"{UNET}__nova_edit__"
    save(folder / "d.safetensors", {**nova(tables, 1), marker: values([]), "loss.logvar": values([1.0])})
    assert folder("prune", "d.safetensors").code == 0
    made = split(folder / "d-pruned.safetensors")
    assert made.pop(marker) == "F32" and as_published(made)


def test_extract_takes_the_markers_and_the_precision_along(folder: Folder, tables: Path) -> None:
    save(folder / "m.safetensors", {**nova(tables, 1), f"{UNET}__nova_edit__": values([])})
    assert folder("extract", "m.safetensors", "DIT", "-o", "dit.safetensors").code == 0
    held = split(folder / "dit.safetensors")
    assert held.pop("__nova_edit__") == "F32" and held["img_in.weight"] == "BF16"
    assert held["blocks.0.scale_shift_table"] == "F32"
    said = folder("inspect", "dit.safetensors", "--json").json["files"][0]
    assert (said["architecture"], said["lineage"]["model"]) == ("DIT-Nova", "Nova Edit")


def test_replace_and_build_of_parts(folder: Folder, tables: Path) -> None:
    save(folder / "vae.safetensors", nova(tables, 7, "VAE-Nova"))
    assert folder("replace", "a.safetensors", "VAE=vae.safetensors", "-o", "r.safetensors").code == 0
    made, vae = content(folder / "r.safetensors"), content(folder / "vae.safetensors")
    assert {n: made[f"vae.{n}"] for n in vae} == vae and as_published(split(folder / "r.safetensors"))
    save(folder / "dit.safetensors", nova(tables, 1, "DIT-Nova"))
    head = 'format = 1\nname = "n"\nbase = "NEW nova"\n'
    sources = 'sources.d.file = "dit.safetensors"\nsources.v.file = "vae.safetensors"\n'
    parts = 'components = { DIT-Nova = "d", VAE-Nova = "v" }\n'
    folder.write("n.toml", head + sources + parts)
    plan = folder.plan("n.toml")
    precisions = {s["class"]: s["precision"] for s in plan["steps"] if s["kind"] == "component"}
    assert precisions == {"DIT-Nova": "bf16", "VAE-Nova": "keep"}
    folder.build("n.toml")
    assert as_published(split(folder / "n.safetensors"))
    folder.write("n.toml", head.replace('"n"', '"f"') + sources + parts + '[output]\nprecision = "fp16"\n')
    said = folder("build", "n.toml")
    assert said.code == 0
    assert "DIT-Nova of `d` is cast to FP16, in which programs do not run it" in said.err
    types = split(folder / "f.safetensors")
    assert types[f"{UNET}blocks.1.scale_shift_table"] == types["vae.bn.running_var"] == "F32"
    assert types[f"{UNET}img_in.weight"] == types["vae.encoder.conv_in.weight"] == "F16"


def test_fp16_is_warned_of_where_it_is_asked_for(folder: Folder, tables: Path) -> None:
    whole = nova(tables, 1)
    text = {n.rpartition("transformer.")[2]: t for n, t in whole.items() if "nova" in n}
    save(folder / "te.safetensors", text)
    for line in (
        ("extract", "a.safetensors", "TE", "-o", "out.safetensors"),
        ("convert", "te.safetensors", "-o", "out.safetensors"),
    ):
        assert "FP16" not in folder(*line).err
        said = folder(*line, "--precision", "fp16")
        assert said.code == 0
        assert "2 tensors, as `layers.0.wo.weight`, make it overflow" in said.err


@pytest.mark.parametrize("value", [1e5, -3e38])
@pytest.mark.parametrize("command", ["extract", "convert", "prune", "build", "step"])
def test_what_a_cast_cannot_hold_is_named(folder: Folder, tables: Path, command: str, value: float) -> None:
    whole = dict(nova(tables, 1))
    name = f"{UNET}final_layer.linear.bias"
    whole[name] = values([value, 0, 0, 0])
    save(folder / "big.safetensors", whole)
    recipe = 'format = 1\nname = "r"\nbase = "{}"\nsources.a.file = "big.safetensors"\n'
    step = '[steps.m]\nop = "weighted-sum"\na = "a"\nb = "a"\nalpha = 0.5\nprecision = "fp16"\n'
    folder.write("build.toml", recipe.format("a") + 'output.precision = "fp16"\n')
    folder.write("step.toml", recipe.format("m") + step)
    lines = {
        "extract": ("extract", "big.safetensors", "DIT", "--precision", "fp16", "-o", "o.safetensors"),
        "convert": ("convert", "big.safetensors", "--precision", "fp16", "-o", "o.safetensors"),
        "prune": ("prune", "big.safetensors", "--precision", "fp16"),
        "build": ("build", "build.toml"),
        "step": ("build", "step.toml"),
    }
    said = folder(*lines[command])
    assert said.code == 7 and "final_layer.linear.bias" in said.err and "beyond F16" in said.err


def test_merging_weighs_its_blocks_and_leaves_its_constants(folder: Folder) -> None:
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "mix"\nsources.a.file = "a.safetensors"\n'
        'sources.b.file = "b.safetensors"\n[steps.mix]\nop = "weighted-sum"\na = "a"\nb = "b"\n'
        "alpha = { base = 0.0, B02 = 1.0 }\n[output]\nprecision = 'keep'\n",
    )
    folder.build("m.toml")
    a, b, made = (content(folder / f"{n}.safetensors") for n in "abm")
    for name in made:
        other = b if ".blocks.2." in name else a
        assert made[name] == other[name], name


def test_a_lora_is_baked_into_rows_of_its_layers(folder: Folder) -> None:
    lora = {
        "diffusion_model.blocks.0.proj.lora_B.weight": values([[1.0]] * 8),
        "diffusion_model.blocks.0.proj.lora_A.weight": values([[1.0] * 8]),
        "layers.1.to_k.lora_B.weight": values([[2.0]] * 8),
        "layers.1.to_k.lora_A.weight": values([[1.0] * 8]),
    }
    save(folder / "l.safetensors", lora)
    folder.write(
        "l.toml",
        'format = 1\nname = "baked"\nbase = "made"\nsources.a.file = "a.safetensors"\n'
        'sources.l.file = "l.safetensors"\n[steps.made]\nop = "apply-lora"\na = "a"\nloras = { l = 1.0 }\n'
        "[output]\nprecision = 'keep'\n",
    )
    folder.build("l.toml")
    before, after = (content(folder / f"{n}.safetensors") for n in ("a", "baked"))
    changed = {n for n in before if before[n] != after[n]}
    proj, qkv = f"{UNET}blocks.0.proj.weight", f"{UNET}blocks.1.attn.qkv.weight"
    assert changed == {proj, qkv}
    difference = {n: numbers(after[n]) - numbers(before[n]) for n in changed}
    assert np.allclose(difference[proj], 1.0)
    assert np.allclose(difference[qkv].reshape(24, 8), np.repeat([0.0, 2.0, 0.0], 8)[:, None])


def numbers(tensor: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    return np.frombuffer(tensor[2], "<f4")


def test_nothing_of_it_is_known_without_its_folder(folder: Folder) -> None:
    plain = replace(folder, environment={"CKPT_COMPONENTS": ""})
    said = plain("inspect", "a.safetensors", "--json")
    assert json.loads(said.out)["files"][0]["architecture"] is None
