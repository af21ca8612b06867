"""Recipes of other programs: what comes of each dialect, and of what is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.base.errors import CkptError
from builder.base.toml import escaped
from builder.formats.write_safetensors import write as write_tensors
from builder.recipe import parse_recipe
from builder.reports import imports
from builder.reports.imports import plain_yaml
from builder.reports.imports.block_weights import LISTS
from builder.reports.imports.read import DIALECTS, of_metadata, of_text
from builder.reports.imports.sketch import Sketch
from builder.tensors.cast import Faults, cast_all
from builder.tensors.lazy import DType, MemoryTensor
from tests.help.building import Folder, catalog, content, model, save
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden" / "imports"
A, B, C, D = (letter * 64 for letter in "abcd")

WEBUI = {
    "type": "webui",
    "primary_model_hash": A,
    "secondary_model_hash": B,
    "tertiary_model_hash": None,
    "interp_method": "Weighted sum",
    "multiplier": 0.3,
    "save_as_half": True,
    "custom_name": "",
    "config_source": 0,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
DIFFERENCE = WEBUI | {"interp_method": "Add difference", "multiplier": 1, "secondary_model_hash": C}
DIFFERENCE |= {"tertiary_model_hash": D}
NAMES = {A: "any/Anything-V3.0.ckpt", B: "r34_e4.ckpt", C: "f222.ckpt", D: "sd-v1-4.ckpt"}
MODELS = {h: {"name": n, "legacy_hash": "0", "sd_merge_recipe": None} for h, n in NAMES.items()}
SUPERMERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": None,
    "weights_beta": None,
    "weights_alpha_orig": None,
    "weights_beta_orig": None,
    "model_a": A,
    "model_b": B,
    "model_c": A,
    "base_alpha": 0.3,
    "base_beta": 0,
    "mode": "Weight sum:A*(1-alpha)+B*alpha",
    "mbw": False,
    "elemental_merge": [],
    "calcmode": "normal",
    "Off": [""],
}
BLOCKS = {"mbw": True, "weights_alpha": [round(n / 25, 2) for n in range(25)]}
BLOCKS |= {"weights_alpha_orig": [0.3, *BLOCKS["weights_alpha"]]}  # type: ignore[misc]
ADD, TWICE = "Add difference:A+(B-C)*alpha", "sum Twice:(A*(1-alpha)+B*alpha)*(1-beta)+C*beta"
CHATTIORI = {
    "type": "merge-models-chattiori",
    "primary_model_hash": A,
    "secondary_model_hash": B,
    "tertiary_model_hash": None,
    "merge_method": "Weighted Sum",
    "block_weights": True,
    "alpha_info": "0.3,preset(GRAD_V)",
    "beta_info": "",
    "calculation": "",
    "fp": "fp16",
    "output_name": "x",
    "bake_in_vae": False,
    "pruned": True,
}
MIXER = {
    "type": "sd-webui-model-mixer",
    "mbw": False,
    "weights_alpha": [[0.3] * 26, [0, *[0.5] * 12, 1, *[0.25] * 12], [0.1] * 26],
    "alpha": [0.3, 0.5, 0.1],
    "use_mbws": [False, True, False],
    "model_a": "any/Anything-V3.0.ckpt [67a115286b]",
    "model_b": "r34_e4",
    "model_c": "f222",
    "model_d": "other",
    "base_model": "sd-v1-4.ckpt [fe4efff1e1]",
    "mode": ["Sum", "Add-Diff", "Ties-Fixed"],
    "calcmode": ["Normal", "Cosine", "Normal"],
    "elemental": ["", "", ""],
    "use_elemental": [False, False, False],
    "adjust": "0,0,0,0,1",
}


def told(recipe: Mapping[str, Any], **models: Any) -> dict[str, str]:
    """Metadata with a recipe, and the models that it names, some of them merges themselves."""
    known = {h: {**m, "sd_merge_recipe": models.get(h[0])} for h, m in MODELS.items()}
    return {"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(known)}


def graph(**nodes: tuple[str, dict[str, Any]]) -> str:
    """A graph of ComfyUI: each node with its class and inputs, links as `NODE.OUTPUT`."""
    return json.dumps(
        {
            name: {
                "class_type": kind,
                "inputs": {
                    k: [v[1:-2], int(v[-1])] if isinstance(v, str) and v[0] == "&" else v
                    for k, v in said.items()
                },
            }
            for name, (kind, said) in nodes.items()
        }
    )


def loads(name: str) -> tuple[str, dict[str, Any]]:
    return "CheckpointLoaderSimple", {"ckpt_name": f"sd/{name}.safetensors"}


SAVE = {"filename_prefix": "m"}
GRAPH = graph(
    a=loads("a"),
    b=loads("b"),
    m=("ModelMergeSimple", {"model1": "&a.0", "model2": "&b.0", "ratio": 0.7}),
    s=("CheckpointSave", {"model": "&m.0", "clip": "&a.1", "vae": "&a.2", **SAVE}),
)
MECHA = """\
version 0.1.0
model "/p/a.safetensors" model_config="sd1-ldm" merge_space="weight"
model "/p/b.safetensors" model_config="sd1-ldm" merge_space="weight"
"""
YAML = """\
# a merge of three
merge_method: {}
base_model: /models/base.safetensors
models:
  - model: /models/x.safetensors   # the first
    parameters: {{weight: 0.5, density: 0.6}}
  - model: "/models/y.safetensors"
    parameters:
      weight:
      - filter: attn
        value: 0.7
      - value: 0.2
      density: 0.6
parameters:
  normalize: true
dtype: float16
"""

# By name: the end of the file's name and its text; or the metadata of a model.
CASES: dict[str, tuple[str, str] | dict[str, str]] = {
    "webui": told(WEBUI),
    "webui-tree": told(WEBUI | {"primary_model_hash": "e" * 64})
    | {
        "sd_merge_models": json.dumps(
            MODELS
            | {
                "e" * 64: {"name": "half.safetensors", "sd_merge_recipe": json.dumps(DIFFERENCE)},
                A: {
                    "name": "baked.safetensors",
                    "sd_merge_recipe": WEBUI
                    | {"primary_model_hash": "f" * 64, "bake_in_vae": "kl-f8.vae.pt", "save_as_half": False},
                },
            }
        )
    },
    "webui-lost": told(
        WEBUI
        | {
            "multiplier": "x",
            "bake_in_vae": "sub/kl-f8-anime2.ckpt",
            "discard_weights": "^model_ema",
            "secondary_model_hash": "1234567890",
        }
    ),
    "webui-none": told(WEBUI | {"interp_method": "No interpolation", "save_as_half": False}),
    "webui-twice-encoded": {"sd_merge_recipe": json.dumps(json.dumps(json.dumps(WEBUI)))},
    "supermerger": told(SUPERMERGER),
    "supermerger-blocks": told(
        SUPERMERGER | BLOCKS | {"mode": ADD, "model_c": D, "calcmode": "trainDifference"}
    ),
    "supermerger-elements": told(
        SUPERMERGER
        | BLOCKS
        | {
            "elemental_merge": [
                "IN04:attn:0.2",
                "OUT05 OUT07-OUT06:NOT attn:0.3",
                "NOT BASE-OUT10:norm:0",
                "M00:emb:R",
            ]
        }
    ),
    "supermerger-excluded": told(
        SUPERMERGER
        | BLOCKS
        | {"Exclude": ["IN00", "M00", "VAE", "attn2", "print", ""], "calcmode": "cosineA"}
    ),
    "supermerger-included": told(SUPERMERGER | {"Include": ["BASE", "OUT03", "attn", ""]}),
    "supermerger-twice": told(
        SUPERMERGER | BLOCKS | {"mode": TWICE, "model_c": C, "weights_beta": [0.25] * 25, "base_beta": 0.1}
    ),
    "supermerger-unknown": told(SUPERMERGER | {"calcmode": "self"}),
    "supermerger-xl": told(SUPERMERGER | BLOCKS | {"weights_alpha": [0.5] * 19 + [0]}),
    "supermerger-sub-blocks": told(SUPERMERGER | BLOCKS | {"weights_alpha": [0.5] * 109}),
    "supermerger-flux": told(SUPERMERGER | BLOCKS | {"weights_alpha": [0.5] * 60}),
    "chattiori": told(CHATTIORI),
    "chattiori-list": told(
        CHATTIORI
        | {
            "alpha_info": f"0.3,[{[0.123] * 25},[[]]]",
            "merge_method": "Sum Twice",
            "beta_info": "0.25",
            "tertiary_model_hash": C,
            "bake_in_vae": "kl.vae.safetensors",
            "calculation": "fine[1]",
        }
    ),
    "model-mixer": told(MIXER),
    "mecha": (
        ".mecha",
        MECHA
        + """\
dict key=0.3
literal &2 model_config="singleton-mecha" merge_space="param"
merge "convert_singleton" &3
merge "weighted_sum" &0 &1 &4
""",
    ),
    "mecha-in-metadata": {
        "mecha_recipe": MECHA + 'merge "slerp" &0 &1 alpha=0.25\nmerge "n_average" &0 &1 &2\n'
    },
    "mecha-blocks": (
        ".mecha",
        MECHA
        + """\
model "/p/c.safetensors" model_config="sd1-ldm" merge_space="weight"
merge "subtract" &1 &2   # what b learnt
dict BASE=0.5 IN00=0.1 OUT11=1 VAE=0 WHAT=1
literal &4 model_config="sd1-supermerger_blocks" merge_space="param"
merge "convert_sd1_blocks_to_ldm" &5
merge "add_difference" &0 &3 &6
merge "fallback" &7 &0
""",
    ),
    "mecha-old": (
        ".mecha",
        """\
model "a.safetensors" "sdxl" "base"
model "b.safetensors" "sdxl" "base"
merge "subtract" &1 &0
merge "add_difference" &0 &2 alpha=2.0
merge "ties_sum_with_dropout" &2 probability=0.9 seed=3
merge "add_difference" &0 &4 alpha=1.0
merge "pick_component" &5 "unet"
merge "fallback" &6 &3
merge "my_own_method" &7 &0
""",
    ),
    "mecha-lora": (
        ".mecha",
        MECHA + 'model "c.safetensors" model_config="sd1-kohya_lora"\nmerge "add_difference" &0 &2 0.5\n',
    ),
    "mergekit-ties": (".yaml", YAML.format("ties")),
    "mergekit-task": (".yml", YAML.format("task_arithmetic")),
    "mergekit-dare": (".yaml", YAML.format("dare_ties").replace("density: 0.6}", "density: 0.5}")),
    "mergekit-stock": (".yaml", YAML.format("model_stock")),
    "mergekit-unknown": (".yaml", YAML.format("sce")),
    "mergekit-linear": (
        ".yaml",
        "merge_method: linear\nmodels: [{model: a.bin, parameters: {weight: 0.3}}, "
        "{model: org/b, parameters: {weight: [0, 0.5, 1]}}]\nparameters: {normalize: false}\n",
    ),
    "mergekit-slerp": (
        ".yaml",
        "merge_method: slerp\nbase_model: a.safetensors\nmodels:\n- model: a.safetensors\n"
        "- model: b.safetensors\nparameters:\n  t: 0.25\ndtype: bfloat16\n",
    ),
    "comfyui": (".json", GRAPH),
    "comfyui-in-metadata": {"prompt": GRAPH},
    "comfyui-loras": (
        ".json",
        graph(
            a=loads("a"),
            b=loads("b"),
            m=(
                "ModelMergeBlocks",
                {"model1": "&a.0", "model2": "&b.0", "input": 1, "middle": 0.5, "out": 0.9},
            ),
            l=(
                "LoraLoader",
                {
                    "model": "&m.0",
                    "clip": "&a.1",
                    "lora_name": "x.safetensors",
                    "strength_model": 0.5,
                    "strength_clip": 0.25,
                },
            ),
            k=("LoraLoaderModelOnly", {"model": "&l.0", "lora_name": "y", "strength_model": 1}),
            s=("CheckpointSave", {"model": "&k.0", "clip": "&l.1", "vae": "&b.2", **SAVE}),
        ),
    ),
    "comfyui-apart": (
        ".json",
        graph(
            a=loads("a"),
            b=loads("b"),
            c=loads("c"),
            d=("ModelMergeSubtract", {"model1": "&b.0", "model2": "&c.0", "multiplier": 0.5}),
            m=("ModelMergeAdd", {"model1": "&a.0", "model2": "&d.0"}),
            n=(
                "ModelMergeSD1",
                {"model1": "&m.0", "model2": "&b.0", "time_embed.": 1.0, "input_blocks.4.": 0.25},
            ),
            t=("CLIPMergeSimple", {"clip1": "&b.1", "clip2": "&c.1", "ratio": 0.9}),
            q=("ModelSamplingDiscrete", {"model": "&n.0", "sampling": "v_prediction", "zsnr": False}),
            v=("VAELoader", {"vae_name": "kl.vae.pt"}),
            s=("CheckpointSave", {"model": "&q.0", "clip": "&t.0", "vae": "&v.0", **SAVE}),
        ),
    ),
}
OTHER_FAMILIES = {"supermerger-xl", "supermerger-flux"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def merged(folder: Folder, case: str) -> Path:
    """The file of a case."""
    told_ = CASES[case]
    if isinstance(told_, tuple):
        return folder.write(f"mine{told_[0]}", told_[1])
    write_tensors(folder / "mine.safetensors", model("SD-mini"), told_)
    return folder / "mine.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_of_each_dialect(case: str, folder: Folder) -> None:
    """It reads as it should, what it lacks is said, and it can be planned with sources of these names."""
    path = merged(folder, case)
    said = folder("new", "--from-metadata", path.name, "-o", "mine.toml")
    assert said.code == 0, said.err
    text = (folder / "mine.toml").read_text(encoding="utf-8")
    assert text == golden(GOLDEN / f"{case}.toml", text)
    lacks = [line.removeprefix("# - ") for line in text.splitlines() if line.startswith("# - ")]
    assert said.err == "".join(f"note: not in the recipe: {lack}\n" for lack in lacks)
    recipe = parse_recipe(text, "mine.toml", catalog())
    if case in OTHER_FAMILIES:
        return
    data = tomli.loads(text)
    for name in recipe.sources:
        adapter = any(f"loras.{name}" in s.inputs for s in recipe.steps.values())
        data["sources"][name] = {"file": f"{name}.safetensors"}
        save(folder / f"{name}.safetensors", LORA if adapter else model("SD-mini"))
    data.pop("expect", None)
    folder.write("mine.toml", tomli_w.dumps(data))
    assert folder("plan", "--offline", "mine.toml").code == 0


LORA = {
    f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.{n}.weight": MemoryTensor(
        DType.F32, shape, bytes(4 * shape[0] * shape[1])
    )
    for n, shape in (("lora_down", (1, 32)), ("lora_up", (32, 1)))
}


Values = dict[str, torch.Tensor]


def read(path: Path) -> Values:
    """The tensors of a file, flat."""
    dtypes = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
    return {n: torch.frombuffer(bytearray(d), dtype=dtypes[t]) for n, (t, _, d) in content(path).items()}


def a1111(folder: Folder, name: str, recipe: Mapping[str, Any], **models: Any) -> str:
    """Write a file as A1111's merger does, and give its SHA-256: all that is named a model, the VAE too."""
    files = {h[0]: read(folder / f"{h[0]}.safetensors") for h in NAMES} | models.pop("files", {})
    keys = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
    a, b, c = (files.get((recipe[k] or "-")[:64]) or files.get((recipe[k] or "-")[0]) for k in keys)
    alpha, made = recipe["multiplier"], {}
    for key, tensor in model().items():
        value = a[key]
        if value.is_floating_point() and recipe["interp_method"] == "Weighted sum":
            value = (1 - alpha) * value + alpha * b[key]
        elif value.is_floating_point():
            value = value + alpha * (b[key] - c[key])
        if recipe["save_as_half"] and value.dtype is torch.float32:
            value = value.half()
        dtype = next(d for d in (DType.F16, DType.F32, DType.I64) if d.torch is value.dtype)
        made[key] = MemoryTensor(dtype, tensor.shape, value.numpy().tobytes())
    write_tensors(folder / name, made, models or told(recipe))
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def again(folder: Folder, file: str) -> dict[str, Any]:
    """What `ckpt new` makes of a file, with sources that are here."""
    said = folder("new", "-q", "--from-metadata", file)
    data = tomli.loads(said.out)
    for source in data["sources"].values():
        source["file"] = f"{source.pop('sha256')[0]}.safetensors"
    folder.write("again.toml", tomli_w.dumps(data))
    return data


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_published_merge_is_proved(precision: Any, folder: Folder) -> None:
    """The same tensors come of the recipe in the metadata, and of no other."""
    for seed, name in enumerate("abcd"):
        tensors = cast_all(model(seed=seed), precision, faults=Faults())
        save(folder / f"{name}.safetensors", tensors)
    half = {"save_as_half": precision == "fp16"}
    one = DIFFERENCE | half | {"multiplier": 0.7, "save_as_half": True}
    digest = a1111(folder, "half.safetensors", one)
    two = WEBUI | half | {"primary_model_hash": digest, "multiplier": 1 / 3}
    known = MODELS | {digest: {"name": "half.safetensors", "sd_merge_recipe": json.dumps(one)}}
    metadata = {"sd_merge_recipe": json.dumps(two), "sd_merge_models": json.dumps(known)}
    a1111(folder, "whole.safetensors", two, files={digest: read(folder / "half.safetensors")}, **metadata)
    for published in ("half.safetensors", "whole.safetensors"):
        data = again(folder, published)
        assert len(data["expect"]["autov3"]) == 64 and data["arithmetic"] == "file"
        said = folder("build", "-q", "again.toml")
        assert said.code == 0, said.err
        made = data["output"]["file"]
        assert content(folder / made) == content(folder / published)
        assert folder("verify", "again.toml").code == 0
        (folder / made).unlink()
        if precision == "fp16":
            folder.write("again.toml", tomli_w.dumps(data | {"arithmetic": "exact"}))
            said = folder("build", "again.toml")
            assert said.code == 7 and "the AutoV3 of" in said.err


@pytest.mark.parametrize("extra", ["model_ema.decay", "betas"])
def test_what_a_build_cannot_bring_back_is_not_expected(extra: str, folder: Folder) -> None:
    tensors = {**model(), extra: MemoryTensor(DType.F16, (1000,), bytes(2000))}
    write_tensors(folder / "mine.safetensors", tensors, told(WEBUI))
    said = folder("new", "-q", "--from-metadata", "mine.safetensors")
    assert "# Not expected, as " in said.out and "\n# autov3 = " in said.out


def test_the_recipe_of_a_build_comes_back(folder: Folder) -> None:
    text = """\
format = 1
name = "mix"
base = "mix"
arithmetic = "file"

[sources]
one = { file = "1.safetensors", sha256 = "SHA" }
two = { file = "2.safetensors" }
three = { file = "3.safetensors" }

[steps]
half = { op = "weighted-sum", a = "one", b = "two", alpha = 0.05, VAE = true, precision = "bf16" }
some = { op = "add-difference", a = "half", b = "three", c = "two", alpha = WEIGHTS }
most = { op = "linear", of = { some = 0.75, one = { UNET = 0.25 } }, normalize = false }
mix = { op = "dare", base = "one", of = { most = 1, two = 0.5 }, seed = 7, components = ["UNET-tiny"] }

[components]
VAE-tiny = "three"

[output]
precision = "fp32"
"""
    weights = '{ UNET = { base = 0.5, M00 = 0.25 }, tensors = { "*.bias" = 1 } }'
    for seed in (1, 2, 3):
        save(folder / f"{seed}.safetensors", model(seed=seed))
    digest = hashlib.sha256((folder / "1.safetensors").read_bytes()).hexdigest()
    folder.write("mix.toml", text.replace("SHA", digest).replace("WEIGHTS", weights))
    folder.build("mix.toml")
    said = folder("new", "--from-metadata", "mix.safetensors", "--name", "mix", "-o", "again.toml")
    assert said.code == 0
    assert said.err == "note: not in the recipe: the digest of `two`, `three`, known by name alone\n"
    text = (folder / "again.toml").read_text()
    assert text == golden(GOLDEN / "own.toml", text)
    first, again = (parse_recipe((folder / f).read_text(), f, catalog()) for f in ("mix.toml", "again.toml"))
    assert first.steps == again.steps
    assert [o.meaning() for o in first.outputs] == [o.meaning() for o in again.outputs]
    digests = {folder.build(f)["outputs"][0]["tensor_digest"] for f in ("mix.toml", "again.toml")}
    assert len(digests) == 1


# -- strangers


REFUSED: dict[str, tuple[str, str, str]] = {
    "no-json": (".json", "{", "is no JSON"),
    "editor": (".json", '{"nodes": [], "links": []}', "export the graph in ComfyUI as `API` format"),
    "no-save": (".json", graph(a=loads("a")), "no node of the graph saves a model"),
    "circle": (
        ".json",
        graph(
            m=("ModelMergeSimple", {"model1": "&m.0", "model2": "&m.0", "ratio": 1}),
            s=("CheckpointSave", {"model": "&m.0"}),
        ),
        "are made of each other",
    ),
    "nothing": (".json", '{"a": 1}', "tells of no merge"),
    "deep-json": (".json", '{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
    "names": (".json", '{"modelspec.merged_from": "a, b"}', "which models it was made of, and not how: a, b"),
    "kind": (".json", '{"sd_merge_recipe": {"type": "\\u202ex"}}', "of a kind that is not known, `\\u202ex`"),
    "mecha-word": (".mecha", "model a\nboil &0\n", "--> mine.mecha:2"),
    "mecha-below": (".mecha", 'merge "weighted_sum" &0 &1\n', "&0 is no node above"),
    "mecha-empty": (".mecha", "version 0.1.0\n", "holds no sd-mecha recipe"),
    "yaml-tag": (".yaml", "a: 1\nb: !!python/object x\n", "--> mine.yaml:2"),
    "yaml-anchor": (".yaml", "a: &x 1\n", "`&` is beyond plain YAML"),
    "yaml-twice": (".yaml", "a: 1\na: 2\n", "`a` is there twice"),
    "yaml-deep": (".yaml", "[" * 5000, "nested too deeply"),
    "yaml-dashes": (".yaml", "- " * 5000 + "x", "nested too deeply"),
    "yaml-other": (".yaml", "a: 1\n", "no mergekit configuration"),
    "yaml-slices": (".yaml", "merge_method: x\nslices: []\n", "layers of language models"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_recipe(case: str, folder: Folder) -> None:
    suffix, text, says = REFUSED[case]
    folder.write(f"mine{suffix}", text)
    said = folder("new", "--from-metadata", f"mine{suffix}", "-o", "r.toml")
    assert said.code == 6 and says in said.err, said.err
    assert not (folder / "r.toml").exists()


def test_one_file_without_a_library(folder: Folder) -> None:
    for more in (["b.json"], ["--library", "x"]):
        said = folder("new", "--from-metadata", "a.json", *more)
        assert said.code == 2 and "is of one FILE" in said.err
    assert folder("new", "--from-metadata", "a.json").code == 6
    save(folder / "m.safetensors", model())
    said = folder("new", "--from-metadata", "m.safetensors")
    assert said.code == 6 and "`m.safetensors` tells of no merge" in said.err


def text_of(sketch: Sketch) -> str:
    text = escaped(imports.write(sketch, "x", "file", Path("/nonexistent")))
    recipe = parse_recipe(text, "x.toml", catalog())
    for source in recipe.sources.values():
        assert source.file is None or ("/" not in source.file and "\\" not in source.file)
    return text


ODD = ["\n[x]", '"', "\u202e", "../../etc/passwd", "NEW", "NEW SD-v1", "a" * 5000, "C:\\x\\y.ckpt", "", "."]
ODD += [" ", "\x00", "\U0001f600", "{}", "model"]
METHODS = ["Weighted sum", "Add difference", ADD, TWICE, "normal", "extract"]
WORDS = ["IN04:attn:0.2", "NOT IN01-IN03:NOT a:1", "::1", "IN00", "attn"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([*ODD, A, B, A.upper(), *METHODS]),
    st.text(max_size=20),
    st.lists(st.one_of(st.floats(0, 1), st.sampled_from(WORDS)), max_size=5),
    st.sampled_from(sorted(LISTS)).flatmap(lambda n: st.lists(st.floats(0, 1), min_size=n - 1, max_size=n)),
)
KNOWN = {"webui": WEBUI, "sd-webui-supermerger": SUPERMERGER | BLOCKS, "merge-models-chattiori": CHATTIORI}
KNOWN |= {"sd-webui-model-mixer": MIXER}
KNOWN["ckpt-build"] = {
    "type": "ckpt-build",
    "models": {"a": {"name": "a.ckpt", "sha256": A}},
    "steps": {"x": {"op": "weighted-sum", "inputs": {"a": "a", "b": "b"}, "params": {"alpha": 0.5}}},
    "base": "x",
}
FAST = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", sorted(DIALECTS))
@FAST
@given(st.data())
def test_whatever_metadata_say_a_recipe_or_an_error_comes_of_it(kind: str, data: st.DataObject) -> None:
    recipe = dict(KNOWN[kind])
    for key in data.draw(st.sets(st.sampled_from(sorted(set(recipe) - {"type"})), max_size=4)):
        recipe[key] = data.draw(VALUES)
    models = {data.draw(st.sampled_from([A, B, C, "x"])): data.draw(VALUES)}
    models |= {
        A: {"name": data.draw(VALUES), "sd_merge_recipe": data.draw(st.one_of(VALUES, st.just(recipe)))}
    }
    try:
        sketch = of_metadata(
            {"sd_merge_recipe": recipe, "sd_merge_models": models},
            data.draw(st.sampled_from(["x.safetensors", *ODD])),
        )
    except CkptError:
        return
    text_of(sketch)


TEXTS = [v[1] for v in CASES.values() if isinstance(v, tuple)]
LINES = st.lists(
    st.one_of(
        *(st.sampled_from([s.rstrip() for s in text.splitlines()]) for text in TEXTS),
        st.text("ab&0123\"'{}[]:-, #=.\t", max_size=20),
    ),
    max_size=12,
)


@pytest.mark.parametrize("suffix", [".mecha", ".yaml", ".json"])
@FAST
@given(LINES)
def test_whatever_a_text_says_a_recipe_or_an_error_comes_of_it(suffix: str, lines: list[str]) -> None:
    try:
        sketch = of_text("\n".join(lines), f"mine{suffix}")
    except CkptError:
        return
    text_of(sketch)


LARGE = {
    "mecha-line": (".mecha", "dict " + "a=1 " * 900_000),
    "mecha-lines": (".mecha", "dict a=1\n" * 400_000),
    "mecha-sums": (".mecha", MECHA + ("merge " + '"weighted_sum" &0 &1 0.5\n') * 4000),
    "yaml-line": (".yaml", "[" + "1," * 2_000_000),
    "yaml-lines": (".yaml", "- a\n" * 1_000_000),
    "yaml-items": (".yaml", "[" + "1," * 32_000),
    "json-nodes": (".json", json.dumps({str(n): {"class_type": "x", "inputs": {}} for n in range(40_000)})),
    "elements": (
        ".json",
        json.dumps(
            {"sd_merge_recipe": SUPERMERGER | {"elemental_merge": [f"NOT M00:{'a ' * 450}:1"] * 3000}}
        ),
    ),
    "models": (
        ".json",
        json.dumps(
            {"sd_merge_recipe": MIXER, "sd_merge_models": {str(n): {"name": "x"} for n in range(40_000)}}
        ),
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", LARGE)
def test_large_ones_take_no_longer_than_they_are(case: str) -> None:
    suffix, text = LARGE[case]
    try:
        text_of(of_text(text, f"mine{suffix}"))
    except CkptError as error:
        assert error.problems


def test_ancestors_without_end(folder: Folder) -> None:
    """Merges that are their own ancestors, or more than anyone rebuilds, end in sources."""
    hashes = [f"{n:064x}" for n in range(300)]
    chain = {
        h: {"name": f"{n}", "sd_merge_recipe": WEBUI | {"primary_model_hash": hashes[(n + 1) % 300]}}
        for n, h in enumerate(hashes)
    }
    said = {"sd_merge_recipe": WEBUI | {"primary_model_hash": hashes[0]}, "sd_merge_models": chain}
    sketch = of_metadata(said, "m.safetensors")
    text_of(sketch)
    assert 10 < len(sketch.steps) < 30
    own = {"sd_merge_recipe": WEBUI, "sd_merge_models": {A: {"name": "a", "sd_merge_recipe": WEBUI}}}
    assert len(of_metadata(own, "m.safetensors").steps) == 2


def test_every_combination_of_ancestors_is_drawn_once() -> None:
    """Two parents each, twenty deep: a tree of a million that has twenty-one models."""
    hashes = [f"{n:064x}" for n in range(21)]
    both = [WEBUI | {"primary_model_hash": h, "secondary_model_hash": h} for h in hashes]
    models = {
        h: {"name": f"m{n}", "sd_merge_recipe": both[n + 1] if n < 20 else None} for n, h in enumerate(hashes)
    }
    sketch = of_metadata({"sd_merge_recipe": both[0], "sd_merge_models": models}, "m.safetensors")
    assert len(sketch.steps) <= 21
    text_of(sketch)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", {"a": 1}),
        ("- 1\n- 2.5\n- x y\n- ~\n-", [1, 2.5, "x y", None, None]),
        ("a:\n- b: c\n  d: e\n-\n  f: 1", {"a": [{"b": "c", "d": "e"}, {"f": 1}]}),
        ("- - 1\n  - 2\n- 3", [[1, 2], 3]),
        ("a: [1, {b: c, 'd': \"e\\n\"}, [x]] # no", {"a": [1, {"b": "c", "d": "e\n"}, ["x"]]}),
        ("---\n'it''s': \"x # y\"\nurl: http://a/b#c", {"it's": "x # y", "url": "http://a/b#c"}),
        ("1: true\nyes: no", {"1": True, "yes": "no"}),
        ("a: b: c", None),
        ("a:\n  b: 1\n c: 2", None),
        ("a: [1", None),
        ('a: "x', None),
        ("a: |\n  text", None),
        ("\ta: 1", None),
    ],
)
def test_plain_yaml(text: str, value: Any) -> None:
    if value is None:
        with pytest.raises(CkptError):
            plain_yaml.parse(text, "x.yaml")
    else:
        assert plain_yaml.parse(text, "x.yaml") == value
