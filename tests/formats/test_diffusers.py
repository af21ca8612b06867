"""Diffusers' layout: named and shaped as diffusers itself does it, and back to the very same tensors."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.generate import make
from benchmarks.generate import write as write_generated
from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.formats.layouts import layout_of
from builder.formats.layouts.configs import configs
from builder.formats.write_diffusers import WrittenFolder, writing_folder
from builder.formats.write_safetensors import write
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import carry_out
from tests.help.building import (
    CLIP,
    IDS,
    VAE,
    Folder,
    catalog,
    content,
    files,
    model,
    save,
    save_dirty,
    values,
)

pytest.importorskip("diffusers")
import diffusers
import transformers
from diffusers.loaders import single_file_utils as theirs

LAYOUTS = catalog().layouts
FAMILIES = {a.name: a.diffusers for a in catalog().architectures.values() if a.diffusers is not None}
FAMILY_NAMES = sorted(name for name in LAYOUTS if LAYOUTS[name].parts[0].folder == "unet")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Prints the peak of the process's own memory, in kB, when it ends.
PEAK = """\
import atexit, sys
from pathlib import Path
status = Path("/proc/self/status")
peak = lambda: next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
atexit.register(lambda: print(peak(), file=sys.stderr))
"""


def write_folder(folder: Path, *what: Any, **how: Any) -> WrittenFolder:
    return carry_out(writing_folder(folder, *what, **how))


class Spec(LazyTensor):
    """A tensor that has no data."""

    def read_into(self, start: int, out: memoryview) -> None:
        raise NotImplementedError


@cache
def specs(architecture: str) -> dict[str, LazyTensor]:
    """The tensors of an architecture in full size."""
    made: dict[str, LazyTensor] = {}
    for cls in catalog().architectures[architecture].slots:
        component = catalog().component_for(cls, architecture)
        for name, rule in component.tensors.items():
            dtype = DType.I64 if rule.dtype == "I64" else DType.F16
            made[component.prefix + name] = Spec(dtype, rule.shape)
    return made


def less(extent: int) -> int:
    """A fortieth or a thirty-second, so that everything still fits together."""
    odd = {49408: 64, 2048: 56, 2816: 1568, 2560: 64}  # words, two texts' widths, sizes and pooled text
    if extent in odd:
        return odd[extent]
    if extent >= 320 and extent % 40 == 0:
        return extent // 40
    return extent // 32 if extent >= 128 else extent


@cache
def small(architecture: str) -> dict[str, LazyTensor]:
    """The same names with shapes a thousandth as large, and random values."""
    random = np.random.default_rng(5)
    made: dict[str, LazyTensor] = {}
    for name, spec in specs(architecture).items():
        shape = tuple(map(less, spec.shape))
        if spec.dtype is DType.I64:
            made[name] = values(np.arange(77).reshape(1, 77), "<i8")
        else:
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            made[name] = values(near + 0.02 * random.standard_normal(shape))
    return made


def raw(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (t.dtype.code, t.shape, bytes(t.tobytes())) for n, t in tensors.items()}


def as_torch(tensors: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    return {
        n: torch.frombuffer(t.tobytes(), dtype=t.dtype.torch).reshape(t.shape)
        if t.numel
        else torch.empty(t.shape, dtype=t.dtype.torch)
        for n, t in tensors.items()
    }


def same(ours: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.shape == others[name].shape and tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def vocabulary(folder: Path) -> dict[str, bytes]:
    """A tokenizer of single letters, which fits the few words of a small model."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", "!", *letters, *(f"{c}</w>" for c in letters)]
    made = {
        "vocab.json": json.dumps({w: i for i, w in enumerate(words)}).encode(),
        "merges.txt": b"#version: 0.2\n",
    }
    folder.mkdir()
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return {
        f"{tokenizer}/{n}": data for tokenizer in ("tokenizer", "tokenizer_2") for n, data in made.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


# ── names and shapes ──

# What diffusers has no place for, of a tidy checkpoint.
WITHOUT = {
    "SD-v1": {IDS},
    "SD-v2": {
        n for n in specs("SD-v2") if n.endswith((".text_projection", ".logit_scale")) or ".resblocks.23." in n
    },
    "SD-XL": {
        "conditioner.embedders.1.model.logit_scale",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    },
    "SD-XL-Refiner": {"conditioner.embedders.0.model.logit_scale"},
}


# The same of newer families; Qwen-Image's text encoder is a class that has the last.
UNUSED = (
    "logit_scale",
    "spiece_model",
    "norm_final.weight",
    "umt5xxl.transformer.encoder.embed_tokens.weight",
    "2b.transformer.lm_head.weight",
    "4b.transformer.lm_head.weight",
)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_name_leads_there_and_back(architecture: str) -> None:
    family, before = FAMILIES[architecture], specs(architecture)
    parts, rest = LAYOUTS[family].to_diffusers(before)
    assert rest.keys() == WITHOUT.get(family, {n for n in before if n.endswith(UNUSED)})
    assert layout_of(parts, LAYOUTS.values()) is LAYOUTS[family]
    after, strange = LAYOUTS[family].to_original(parts)
    assert not strange
    assert {n: (t.dtype, t.shape) for n, t in (after | rest).items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_diffusers_own_models_have_these_names_and_shapes(architecture: str) -> None:
    family = FAMILIES[architecture]
    parts, _ = LAYOUTS[family].to_diffusers(specs(architecture))
    said = configs(LAYOUTS[family], parts, prediction="epsilon", tokenizers=["tokenizer"])
    index = said["model_index.json"]
    assert issubclass(getattr(diffusers, index["_class_name"]), diffusers.DiffusionPipeline)
    for part, tensors in parts.items():
        if not tensors:  # a text encoder that the architecture goes without
            assert index[part] == [None, None]
            continue
        config = said[f"{part}/config.json"]
        library, name = index[part]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        with torch.device("meta"):
            if library == "diffusers":
                known = inspect.signature(kind.__init__).parameters
                assert {k for k in config if not k.startswith("_")} <= known.keys()
                made = kind.from_config(config)
            else:
                made = kind(kind.config_class(**config))
        shapes: dict[str, tuple[int, ...]] = {}
        seen: set[int] = set()  # a tensor that has two names is saved once
        for n, t in made.state_dict(keep_vars=True).items():
            shapes |= {n: tuple(t.shape)} if id(t) not in seen else {}
            seen.add(id(t))
        rules = next(p.rules for p in LAYOUTS[family].parts if p.folder == part)
        if rules.within and not any(n.startswith(rules.within) for n in shapes):  # as transformers calls them
            tensors = {n.removeprefix(rules.within): t for n, t in tensors.items()}
        if name == "Qwen2_5_VLForConditionalGeneration":  # which is published under other names
            original, strange = rules.to_original({n: Spec(DType.F16, shape) for n, shape in shapes.items()})
            assert not strange
            shapes = {n: t.shape for n, t in original.items()}
            tensors, _ = rules.to_original(tensors)
        assert {n: t.shape for n, t in tensors.items()} == shapes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_diffusers_own_conversion_gives_the_same_values(family: str) -> None:
    before = as_torch(small(family))
    parts, _ = LAYOUTS[family].to_diffusers(small(family))
    said = configs(LAYOUTS[family], parts, prediction="epsilon")
    unet = theirs.convert_ldm_unet_checkpoint(dict(before), said["unet/config.json"])
    same(as_torch(parts["unet"]), unet)
    vae = theirs.convert_ldm_vae_checkpoint(dict(before), said["vae/config.json"])
    same(as_torch(parts["vae"]), vae)
    for part in LAYOUTS[family].parts:
        if not part.prefix.endswith(".model."):
            continue
        config = transformers.CLIPTextConfig(**said[f"{part.folder}/config.json"])
        found = theirs.convert_open_clip_checkpoint(
            transformers.CLIPTextModelWithProjection(config), dict(before), prefix=part.prefix
        )
        same(as_torch(parts[part.folder]), found)


@pytest.mark.parametrize(
    ("channels", "pipeline"),
    [(4, ""), (9, "Inpaint"), (8, "InstructPix2Pix")],
)
def test_the_pipeline_follows_from_what_the_unet_takes(channels: int, pipeline: str) -> None:
    for family in ("SD-v1", "SD-XL"):
        parts, _ = LAYOUTS[family].to_diffusers(specs(family))
        conv = parts["unet"]["conv_in.weight"]
        parts["unet"]["conv_in.weight"] = Spec(conv.dtype, (conv.shape[0], channels, 3, 3))
        said = configs(LAYOUTS[family], parts, prediction="epsilon")
        name = "StableDiffusionXL" if family == "SD-XL" else "StableDiffusion"
        assert said["model_index.json"]["_class_name"] == f"{name}{pipeline}Pipeline"
        assert hasattr(diffusers, f"{name}{pipeline}Pipeline")
        assert said["unet/config.json"]["in_channels"] == channels


# ── folders ──


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("shard_size", [None, 200_000])
def test_a_folder_holds_the_very_same_tensors(tmp_path: Path, family: str, shard_size: int | None) -> None:
    before = {**small(family), "alphas_cumprod": values(np.ones(1000)), "what.is.this": values([1.0])}
    metadata = {"format": "pt", "modelspec.title": "Ünïcode"}
    options: dict[str, Any] = {"shard_size": shard_size, "durable": False, "prediction": "epsilon"}
    rest = write_folder(tmp_path, LAYOUTS[family], before, metadata, **options).rest
    assert rest.keys() == WITHOUT[family] | {"alphas_cumprod", "what.is.this"}
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists() == (shard_size is None)
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert found.container == "diffusers"
        assert raw(found) == raw(before)
        assert found.metadata == metadata
        assert not found.others


def test_a_vocabulary_elsewhere_is_not_copied(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini"))
    vocabulary(folder / "words")
    assert folder("convert", "mini.safetensors", "-o", "model", "--tokenizer", "words").code == 0
    own = folder.write("../own.json", "the user's own")
    (folder / "model/tokenizer/merges.txt").unlink()
    (folder / "model/tokenizer/merges.txt").symlink_to(own)
    said = folder("convert", "model", "-o", "again")
    assert (
        said.code == 0
        and "`model/tokenizer/merges.txt` is not copied: a link leads out of `model`" in said.err
    )
    assert not (folder / "again/tokenizer/merges.txt").exists()
    assert folder("convert", "model", "-o", "asked", "--tokenizer", "model/tokenizer").code == 0


def test_diffusers_loads_a_converted_checkpoint(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini", precision=DType.F32))
    vocabulary(folder / "words")
    said = folder("convert", "mini.safetensors", "-o", "model", "--tokenizer", "words", "--json")
    assert said.json["form"] == "diffusers" and said.json["lost"] == []
    before = content(folder / "mini.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    parts, _ = LAYOUTS["SD-v1"].to_diffusers(model("SD-mini", precision=DType.F32))
    for name, tensors in parts.items():
        loaded = getattr(pipe, name).state_dict()
        expected = as_torch(tensors)
        if not any(n.startswith("text_model.") for n in loaded):
            expected = {n.removeprefix("text_model."): t for n, t in expected.items()}
        same(loaded, expected)
    image = pipe("a cat", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()

    assert folder("convert", "model", "-o", "back.safetensors").code == 0
    assert content(folder / "back.safetensors") == before
    assert folder("convert", "model", "-o", "again").code == 0
    assert (folder / "again/tokenizer/vocab.json").exists()
    assert {str(p.relative_to(folder / "again")) for p in (folder / "again").rglob("*")} == {
        str(p.relative_to(folder / "model")) for p in (folder / "model").rglob("*")
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_runs_a_small_xl(tmp_path: Path) -> None:
    words = vocabulary(tmp_path / "words")
    out = tmp_path / "xl"
    out.mkdir()
    write_folder(
        out, LAYOUTS["SD-XL"], small("SD-XL"), {}, prediction="epsilon", vocabulary=words, durable=False
    )
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer.pad_token == "<|endoftext|>" and pipe.tokenizer_2.pad_token == "!"
    assert pipe.scheduler.config.prediction_type == "epsilon"
    found = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="latent").images
    assert found.shape == (1, 4, 8, 8) and bool(found.isfinite().all())


def test_without_a_vocabulary_diffusers_asks_for_a_tokenizer(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini"))
    said = folder("convert", "mini.safetensors", "-o", "model")
    assert said.code == 0 and "`--tokenizer FOLDER` adds it" in said.err
    with pytest.raises(ValueError, match="tokenizer"):
        diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", local_files_only=True)


def test_folders_that_diffusers_writes(tmp_path: Path) -> None:
    """In each of its forms: safetensors, PyTorch files, variants, shards, with transformers' own names."""
    words = vocabulary(tmp_path / "words")
    first = tmp_path / "first"
    first.mkdir()
    tensors = {n: t for n, t in small("SD-XL").items() if n not in WITHOUT["SD-XL"]}
    write_folder(first, LAYOUTS["SD-XL"], tensors, {}, prediction="epsilon", vocabulary=words, durable=False)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(first, local_files_only=True)
    for name, options in (
        ("plain", {}),
        ("variant", {"variant": "fp16"}),
        ("sharded", {"max_shard_size": "1MB"}),
    ):
        pipe.save_pretrained(tmp_path / name, **options)
        with open_checkpoint(tmp_path / name, LAYOUTS) as found:
            assert raw(found) == raw(tensors), name
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "plain", pickled)
    for path in pickled.glob("*/*.safetensors"):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(safetensors_of(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    with open_checkpoint(pickled, LAYOUTS) as found:
        assert raw(found) == raw(tensors)


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(path)
    return found


def test_the_plain_file_is_preferred(tmp_path: Path) -> None:
    tensors = small("SD-v1")
    write_folder(tmp_path, LAYOUTS["SD-v1"], tensors, {}, prediction="epsilon", durable=False)
    unet = tmp_path / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    for other in ("fp16.safetensors", "non_ema.safetensors", "bin"):
        unet.joinpath(f"diffusion_pytorch_model.{other}").write_bytes(b"not to be read")
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(tensors)
    plain.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    (unet / "diffusion_pytorch_model.bin").unlink()
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(tensors)
    (unet / "diffusion_pytorch_model.fp16.safetensors").rename(
        unet / "diffusion_pytorch_model.ema.safetensors"
    )
    with pytest.raises(SourceError, match="which file holds the part's weights is not clear"):
        open_checkpoint(tmp_path, LAYOUTS)
    (unet / "diffusion_pytorch_model.non_ema.safetensors").unlink()
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(tensors)


def test_old_names_of_the_autoencoders_attention(tmp_path: Path) -> None:
    write_folder(tmp_path, LAYOUTS["SD-v1"], small("SD-v1"), {}, prediction="epsilon", durable=False)
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    with open_checkpoint(path, LAYOUTS) as found:
        renamed: dict[str, LazyTensor] = {}
        for name, tensor in found.items():
            for new, before in old.items():
                name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
            renamed[name] = MemoryTensor(tensor.dtype, tensor.shape, bytes(tensor.tobytes()))
    assert any("proj_attn" in n for n in renamed)
    write(path, renamed, durable=False)
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(small("SD-v1"))


# ── what a model predicts ──


def test_v_prediction_is_carried_both_ways(folder: Folder) -> None:
    marker = MemoryTensor(DType.F32, (0,), b"")
    for markers, expected in (
        (("v_pred",), ("PNDMScheduler", "v_prediction", None)),
        (("v_pred", "ztsnr"), ("DDIMScheduler", "v_prediction", True)),
        ((), ("PNDMScheduler", "epsilon", None)),
    ):
        tensors = {**model("SD-mini"), **dict.fromkeys(markers, marker)}
        save(folder / "m.safetensors", tensors)
        assert folder("convert", "m.safetensors", "-o", "model").code == 0
        config = json.loads((folder / "model/scheduler/scheduler_config.json").read_text())
        said = config["_class_name"], config["prediction_type"], config.get("rescale_betas_zero_snr")
        assert said == expected
        scheduler = getattr(diffusers, said[0]).from_pretrained(folder / "model", subfolder="scheduler")
        assert scheduler.config.prediction_type == said[1]
        (folder / "model/remainder.safetensors").unlink(missing_ok=True)  # as from elsewhere
        with open_checkpoint(folder / "model", LAYOUTS) as found:
            assert {n for n in found if "." not in n} == set(markers)
        shutil.rmtree(folder / "model")


def test_the_metadata_and_the_user_may_say_it_too(folder: Folder) -> None:
    for metadata, options, expected in (
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction"),
        ({"modelspec.predict_key": "v"}, (), "v_prediction"),
        ({"modelspec.prediction_type": "v"}, ("--prediction", "epsilon"), "epsilon"),
        ({}, ("--prediction", "v"), "v_prediction"),
    ):
        write(folder / "m.safetensors", model("SD-mini"), metadata, durable=False)
        assert folder("convert", "m.safetensors", "-o", "model", *options).code == 0
        config = json.loads((folder / "model/scheduler/scheduler_config.json").read_text())
        assert config["prediction_type"] == expected
        shutil.rmtree(folder / "model")


def test_sd_v2_is_not_guessed(folder: Folder) -> None:
    write_generated(make("SD-v2", content="sparse"), folder / "v2.safetensors", "safetensors")
    said = folder("convert", "v2.safetensors", "-o", "model")
    assert said.code == 2 and "nothing in `v2.safetensors` says what it predicts" in said.err
    assert "--prediction v" in said.err
    assert files(folder.path) == {"v2.safetensors"}


# ── commands and mistakes ──


def test_nothing_of_a_dirty_checkpoint_is_dropped(folder: Folder) -> None:
    tensors = {
        **model("SD-mini"),
        "model_ema.decay": values(0.9999),
        "loss.logvar": values(0.0),
        "first_stage_model.loss.logvar": values(0.0),
        "model.diffusion_model.input_blocks.1.1.strange": values([1.0]),
    }
    save(folder / "m.safetensors", tensors)
    said = folder("convert", "m.safetensors", "-o", "model")
    assert said.code == 0 and "5 tensors" in said.err
    assert folder("convert", "model", "-o", "back.ckpt").code == 0
    assert content(folder / "back.ckpt") == content(folder / "m.safetensors")


def test_names_and_shapes_that_differ_become_the_usual_ones(folder: Folder) -> None:
    tensors = {
        (n.replace(CLIP, "cond_stage_model.transformer.") if n.startswith(CLIP) else n): t
        for n, t in model("SD-mini").items()
    }
    query = f"{VAE}encoder.mid.attn_1.q.weight"
    linear = tensors.pop(query)
    tensors[query.replace(".q.", ".to_q.")] = MemoryTensor(
        linear.dtype, linear.shape[:2], bytes(linear.tobytes())
    )
    save(folder / "m.safetensors", tensors)
    assert folder("convert", "m.safetensors", "-o", "model").code == 0
    with open_checkpoint(folder / "model", LAYOUTS) as found:
        assert raw(found) == raw(model("SD-mini"))


def test_a_folder_is_a_checkpoint_for_every_command(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini", precision=DType.F32))
    assert folder("convert", "mini.safetensors", "-o", "model", "--precision", "fp16").code == 0
    assert "SD-mini · diffusers folder" in folder("inspect", "model").out
    assert folder("inspect", "model", "--hashes", "--json").code == 0
    folder.write(
        "r.toml",
        'format = 1\nname = "r"\nbase = "m"\nsources.m.file = "model"\noutput.file = "r.safetensors"\n',
    )
    said = folder("build", "r.toml", "--json")
    assert said.code == 0, said.err
    assert content(folder / "r.safetensors") == content(folder / "model")


def test_mistakes(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini"))
    save(folder / "vae.safetensors", model("VAE-mini"))
    save(folder / "edm.safetensors", {**model("SD-mini"), "edm_mean": values([0.0])})
    (folder / "empty").mkdir()
    assert folder("convert", "mini.safetensors", "-o", "model").code == 0
    before = files(folder.path)
    for args, code, text in (
        (("vae.safetensors", "-o", "x"), 6, "no model that diffusers' layout is known for"),
        (("edm.safetensors", "-o", "x"), 6, "it has the marker `edm_mean`"),
        (("mini.safetensors", "-o", "x", "--tokenizer", "empty"), 2, "holds no `vocab.json`"),
        (("mini.safetensors", "-o", "x", "--prediction", "x0"), 2, "x0"),
        (("mini.safetensors", "-o", "model"), 7, "exists already"),
        (("model", "-o", "model"), 7, "exists already"),
        (("empty", "-o", "x.pt"), 6, "does not hold one sharded set"),
    ):
        said = folder("convert", *args)
        assert (said.code, text in said.err) == (code, True), said.err
    assert files(folder.path) == before
    assert folder("convert", "mini.safetensors", "-o", "empty").code == 0  # an empty folder may be filled


def test_overflow_leaves_no_folder(folder: Folder) -> None:
    tensors = {**model("SD-mini", precision=DType.F32)}
    name = next(n for n, t in tensors.items() if t.shape == (8,))
    tensors[name] = values([1e6, *[0.0] * 7])
    save(folder / "m.safetensors", tensors)
    said = folder("convert", "m.safetensors", "-o", "model", "--precision", "fp16")
    assert said.code == 7 and name in said.err and "--overflow" in said.err
    assert files(folder.path) == {"m.safetensors"}


def test_a_saved_recipe_builds_the_same(folder: Folder) -> None:
    save(folder / "mini.safetensors", model("SD-mini"))
    assert folder("convert", "mini.safetensors", "-o", "model").code == 0
    options = ("--precision", "fp16", "--save-recipe", "r.toml")
    for source in ("mini.safetensors", "model"):
        (folder / "r.toml").unlink(missing_ok=True)
        assert folder("convert", source, "-o", "out.pt", *options).code == 0
        before = content(folder / "out.pt")
        (folder / "out.pt").unlink()
        assert folder("build", "r.toml").code == 0
        assert content(folder / "out.pt") == before
    scheduler = folder / "model/scheduler/scheduler_config.json"
    assert folder("convert", "model", "-o", "out.pt", *options).code == 0
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    said = folder("build", "r.toml")  # the markers follow from it, so it is pinned too
    assert said.code == 6 and "is not what was pinned" in said.err


def test_every_conversion_is_a_recipe(folder: Folder) -> None:
    """What `--save-recipe` writes makes the very same bytes, whatever the source holds and the form is."""
    save_dirty(folder / "dirty.ckpt", "mini")
    save(folder / "unknown.safetensors", {"w": values([1.0]), "embeddings.position_ids": values([0.5])})
    save(folder / "tidy.safetensors", model("SD-mini"))
    vocabulary(folder / "words")
    for source, target, options in (
        ("dirty.ckpt", "dirty.pth", ()),
        ("dirty.ckpt", "half.sft", ("--precision", "fp16", "--overflow", "clamp")),
        ("unknown.safetensors", "set.safetensors.index.json", ("--shard-size", "4")),
        ("dirty.ckpt", "folder/", ("--prediction", "v", "--shard-size", "1MB")),
        ("tidy.safetensors", "model", ("--tokenizer", "words")),
        ("model", "again/", ()),
    ):
        kept = files(folder.path)
        (folder / "r.toml").unlink(missing_ok=True)
        said = folder("convert", source, "-o", target, *options, "--save-recipe", "r.toml")
        assert said.code == 0, said.err
        made = {n: (folder / n).read_bytes() for n in files(folder.path) - kept if (folder / n).is_file()}
        built = folder.beside(f"built-{target.strip('/')}", store=f"store-{target.strip('/')}")
        for name in sorted(files(folder.path) - kept - {"r.toml"}, reverse=True):
            path = built / name
            path.rmdir() if path.is_dir() else path.unlink()
        assert [o["state"] for o in built.build("r.toml")["outputs"]] == ["written"]
        assert {n: (built / n).read_bytes() for n in made} == made
        assert [o["state"] for o in built.build("r.toml")["outputs"]] == ["unchanged"]
        assert built("verify", "r.toml").code == 0


@pytest.mark.slow
def test_full_size_takes_little_memory(folder: Folder) -> None:
    write_generated(make("SD-v2", content="sparse"), folder / "v2.safetensors", "safetensors")
    for source, target, options in (
        ("v2.safetensors", "model", ("--prediction", "v", "--shard-size", "1GB")),
        ("model", "back.safetensors", ("--precision", "bf16")),
    ):
        said = folder.process("convert", source, "-o", target, *options, "-q", before=PEAK)
        assert said.code == 0, said.err
        assert int(said.err.split()[-1]) < 500_000  # kB
    with open_checkpoint(folder / "back.safetensors", LAYOUTS) as found:
        shapes = {n: t.shape for n, t in found.items()}
    shutil.rmtree(folder.path)  # several GB
    assert shapes == {n: t.shape for n, t in specs("SD-v2").items()} | {"v_pred": (0,)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "model_index.json").write_text("[]"), "not readable as a JSON object"),
        (lambda f: (f / "model_index.json").write_text("[" * 100_000), "not readable as a JSON object"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "not readable as a JSON object"),
        (lambda f: shutil.rmtree(f / "unet"), "of a kind that has no original layout here"),
        (lambda f: (f / f"vae/{WEIGHTS}").unlink(), "the part has no weights"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"<html>"),
            "no checkpoint but",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, change: Any, text: str) -> None:
    write_folder(tmp_path, LAYOUTS["SD-v1"], model("SD-mini"), {}, prediction="epsilon", durable=False)
    change(tmp_path)
    with pytest.raises(SourceError, match=text):
        open_checkpoint(tmp_path, LAYOUTS)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    write_folder(tmp_path, LAYOUTS["SD-v1"], model("SD-mini"), {}, prediction="epsilon", durable=False)
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    with open_checkpoint(path, LAYOUTS) as found:
        doubled: dict[str, LazyTensor] = {
            n: MemoryTensor(t.dtype, t.shape, bytes(t.tobytes())) for n, t in found.items()
        }
    name = "encoder.mid_block.attentions.0.to_q.bias"
    write(path, doubled | {name.replace("to_q", "query"): doubled[name]}, durable=False)
    with pytest.raises(SourceError, match=r"two tensors would be `encoder\.mid\.attn_1\.q\.bias`"):
        open_checkpoint(tmp_path, LAYOUTS)
    write(path, doubled, durable=False)
    write(tmp_path / "remainder.safetensors", {IDS: values([0.0]), f"{VAE}quant_conv.bias": values([0.0])})
    with pytest.raises(SourceError, match="comes twice"):
        open_checkpoint(tmp_path, LAYOUTS)


def test_what_the_original_lacks_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, LAYOUTS["SD-XL"], small("SD-XL"), {}, prediction="epsilon", durable=False)
    path = tmp_path / "text_encoder_2/model.safetensors"
    with open_checkpoint(path, LAYOUTS) as found:
        more = {n: MemoryTensor(t.dtype, t.shape, bytes(t.tobytes())) for n, t in found.items()}
    lost = "text_model.encoder.layers.3.self_attn.k_proj.bias"
    del more[lost]
    write(path, {**more, "text_model.embeddings.position_ids": values([0, 1], "<i8")}, durable=False)
    (tmp_path / "safety_checker").mkdir()
    shutil.copytree(tmp_path / "vae", tmp_path / "vae_2")
    index = json.loads((tmp_path / "model_index.json").read_text())
    known = ["diffusers", "AutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae_2": known, "..": known, ".": known}))
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert set(found.others) == {
            "text_encoder_2/text_model.embeddings.position_ids",
            "text_encoder_2/text_model.encoder.layers.3.self_attn.q_proj.bias",
            "text_encoder_2/text_model.encoder.layers.3.self_attn.v_proj.bias",
            "safety_checker",
            "vae_2",
        }
        assert "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias" not in found
