"""The newer families in diffusers' layout: its own converters' values, and the very same tensors back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from builder.formats import open_checkpoint
from builder.formats.diffusers import weights_in
from builder.formats.layouts import Layout
from builder.formats.write_diffusers import writing_folder
from builder.models.catalog.learn import compress
from builder.models.catalog.tables import TensorRule
from builder.operations.lora.names import Shaped, Target, targets
from builder.tensors.digests import tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import carry_out
from tests.formats.test_diffusers import FAMILIES, LAYOUTS, as_torch, raw, same, specs, vocabulary
from tests.help.building import Folder, catalog, content, files, values

pytest.importorskip("diffusers")
import diffusers
import transformers
from diffusers.loaders import single_file_utils as theirs

CATALOG = catalog()
NEWER = sorted(a for a in FAMILIES if LAYOUTS[FAMILIES[a]].parts[0].folder == "transformer")
DENOISER = "model.diffusion_model."


@cache
def thin(architecture: str) -> dict[str, LazyTensor]:
    """The tensors of an architecture with all their rows, one element each, neighbours unlike."""
    made: dict[str, LazyTensor] = {}
    for name, spec in specs(architecture).items():
        rows = max(1, spec.shape[0] if spec.shape else 1)
        shape = (rows, *(1 for _ in spec.shape[1:])) if spec.shape else ()
        data = ((np.arange(rows) + len(made)) % 0x7C00).astype("<u2").tobytes()  # of finite numbers
        made[name] = MemoryTensor(DType.F16, shape, data)
    return made


# ── values ──

CONVERTERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "SD-v3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "SD-v35-Medium": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "SD-v35-Large": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "FLUX": theirs.convert_flux_transformer_checkpoint_to_diffusers,
    "FLUX2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    "Chroma": theirs.convert_chroma_transformer_checkpoint_to_diffusers,
    "Z-Image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    "Lumina-2": theirs.convert_lumina2_to_diffusers,
    "Wan-14B": theirs.convert_wan_transformer_to_diffusers,
    "Wan-5B": theirs.convert_wan_transformer_to_diffusers,
}


@pytest.mark.parametrize("architecture", sorted(CONVERTERS))
def test_diffusers_own_converter_gives_the_same_denoiser(architecture: str) -> None:
    parts, _ = LAYOUTS[FAMILIES[architecture]].to_diffusers(thin(architecture))
    given = {n.removeprefix(DENOISER): t for n, t in thin(architecture).items() if n.startswith(DENOISER)}
    given.pop("norm_final.weight", None)  # Lumina 2's, which is taken away where it has no prefix
    same(as_torch(parts["transformer"]), CONVERTERS[architecture](as_torch(given)))


def test_diffusers_own_converter_gives_the_same_vae_of_wan() -> None:
    given = {n.removeprefix("vae."): t for n, t in thin("Wan-14B").items() if n.startswith("vae.")}
    for architecture in ("Wan-14B", "Qwen-Image"):
        parts, _ = LAYOUTS[FAMILIES[architecture]].to_diffusers(thin(architecture))
        assert parts["vae"].keys() == theirs.convert_wan_vae_to_diffusers(as_torch(given)).keys()
    parts, _ = LAYOUTS["Wan"].to_diffusers(thin("Wan-14B"))
    same(as_torch(parts["vae"]), theirs.convert_wan_vae_to_diffusers(as_torch(given)))


@pytest.mark.parametrize("architecture", NEWER)
def test_a_folder_holds_the_very_same_tensors(tmp_path: Path, architecture: str) -> None:
    before = {**thin(architecture), "what.is.this": values([1.0])}
    layout = LAYOUTS[FAMILIES[architecture]]
    carry_out(writing_folder(tmp_path, layout, before, {"format": "pt"}, prediction="epsilon", durable=False))
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(before)
        assert not found.others


def test_metadata_have_a_place_where_no_tensor_is_left_over(tmp_path: Path) -> None:
    layout, before = LAYOUTS[FAMILIES["FLUX"]], thin("FLUX")
    said = {"format": "pt", "author": "x"}
    made = carry_out(
        writing_folder(tmp_path, layout, before, said, prediction="epsilon", durable=False, digests=True)
    )
    assert not made.rest and made.digests == {n: tensor_digest(t) for n, t in before.items()}
    with open_checkpoint(tmp_path, LAYOUTS) as found:
        assert raw(found) == raw(before) and found.metadata["author"] == "x"


# ── whole models of diffusers' own classes, in miniature ──


class Mini(NamedTuple):
    """A family in miniature: what it is one of, and by folder a class of that and the model for it."""

    architecture: str
    parts: Mapping[str, tuple[str, Callable[[], Any]]]


def clip(kind: str = "CLIPTextModel") -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, projection_dim=64
    )
    return getattr(transformers, kind)(config)


def t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def vae(channels: int = 16) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def language(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256 if kind == "Gemma2" else 32,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config)


def qwen() -> Any:
    text = {
        "vocab_size": 64, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 16, "out_hidden_size": 256,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def flux(**more: Any) -> Any:
    return diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=64, axes_dims_rope=(4, 6, 6),
        **{"guidance_embeds": True, **more},
    )  # fmt: skip


def sd3(layers: int = 24, **more: Any) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=layers, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=128,
        pos_embed_max_size=4, **more,
    )  # fmt: skip


SD3_PARTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "vae": ("VAE-v3", vae),
    "text_encoder": ("CLIP-L-v3", lambda: clip("CLIPTextModelWithProjection")),
    "text_encoder_2": ("CLIP-G-v3", lambda: clip("CLIPTextModelWithProjection")),
    "text_encoder_3": ("T5-XXL", t5),
}
FLUX_PARTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "vae": ("VAE-v3", vae),
    "text_encoder": ("CLIP-L-FLUX", clip),
    "text_encoder_2": ("T5-XXL-FLUX", t5),
}
MINIS = {
    "SD-v3": Mini("SD-v3", {"transformer": ("MMDIT-v3", sd3), **SD3_PARTS}),
    "SD-v35": Mini(
        "SD-v35-Medium",
        {
            "transformer": (
                "MMDIT-v35-Medium",
                lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
            ),
            **SD3_PARTS,
        },
    ),
    "SD-v35-Large": Mini(
        "SD-v35-Large",
        {"transformer": ("MMDIT-v35-Large", lambda: sd3(38, qk_norm="rms_norm")), **SD3_PARTS},
    ),
    "FLUX": Mini("FLUX", {"transformer": ("DIT-FLUX", flux), **FLUX_PARTS}),
    "FLUX-schnell": Mini(
        "FLUX", {"transformer": ("DIT-FLUX", lambda: flux(guidance_embeds=False)), **FLUX_PARTS}
    ),
    "FLUX2": Mini(
        "FLUX2",
        {
            "transformer": (
                "DIT-FLUX2",
                lambda: diffusers.Flux2Transformer2DModel(
                    in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128,
                    num_attention_heads=1, joint_attention_dim=32, timestep_guidance_channels=16,
                ),
            ),
            "vae": (
                "VAE-FLUX2",
                lambda: diffusers.AutoencoderKLFlux2(
                    block_out_channels=(8, 8, 8, 8), norm_num_groups=8, latent_channels=4
                ),
            ),
        },
    ),
    "Chroma": Mini(
        "Chroma",
        {
            "transformer": (
                "DIT-Chroma",
                lambda: diffusers.ChromaTransformer2DModel(
                    num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=8,
                    approximator_hidden_dim=16, approximator_layers=2,
                ),
            ),
            "vae": ("VAE-v3", vae),
            "text_encoder": ("T5-XXL-FLUX", t5),
        },
    ),
    "Qwen-Image": Mini(
        "Qwen-Image",
        {
            "transformer": (
                "DIT-QwenImage",
                lambda: diffusers.QwenImageTransformer2DModel(
                    in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                    num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(4, 6, 6),
                ),
            ),
            "vae": ("VAE-Wan21", lambda: diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4)),
            "text_encoder": ("LLM-Qwen25VL-7B", qwen),
        },
    ),
    "Z-Image": Mini(
        "Z-Image",
        {
            "transformer": (
                "DIT-ZImage",
                lambda: diffusers.ZImageTransformer2DModel(
                    in_channels=4, dim=256, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
                    cap_feat_dim=64,
                ),
            ),
            "vae": ("VAE-v3", vae),
            "text_encoder": ("LLM-Qwen3-4B", lambda: language("Qwen3")),
        },
    ),
    "Lumina-2": Mini(
        "Lumina-2",
        {
            "transformer": (
                "DIT-Lumina2",
                lambda: diffusers.Lumina2Transformer2DModel(
                    in_channels=4, hidden_size=96, num_layers=2, num_attention_heads=6, num_kv_heads=2,
                    cap_feat_dim=64, axes_dim_rope=(4, 6, 6),
                ),
            ),
            "vae": ("VAE-v3", vae),
            "text_encoder": ("LLM-Gemma2-2B", lambda: language("Gemma2")),
        },
    ),
    "Wan": Mini(
        "Wan-14B",
        {
            "transformer": (
                "DIT-Wan-14B",
                lambda: diffusers.WanTransformer3DModel(
                    num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4,
                    num_layers=2, text_dim=32, freq_dim=16, ffn_dim=48, image_dim=24, added_kv_proj_dim=128,
                ),
            ),
            "vae": ("VAE-Wan21", lambda: diffusers.AutoencoderKLWan(base_dim=8, z_dim=4)),
            "text_encoder": ("T5-UMT5-XXL", lambda: t5("UMT5")),
        },
    ),
    "Wan-5B": Mini(
        "Wan-5B",
        {
            "transformer": (
                "DIT-Wan-5B",
                lambda: diffusers.WanTransformer3DModel(
                    num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4,
                    num_layers=2, text_dim=32, freq_dim=16, ffn_dim=48,
                ),
            ),
            "vae": (
                "VAE-Wan22",
                lambda: diffusers.AutoencoderKLWan(
                    base_dim=8, decoder_base_dim=12, z_dim=4, in_channels=12, out_channels=12, patch_size=2,
                    is_residual=True, scale_factor_spatial=16,
                ),
            ),
            "text_encoder": ("T5-UMT5-XXL", lambda: t5("UMT5")),
        },
    ),
}  # fmt: skip


LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def tokenizer(kind: str) -> Any:
    """A tokenizer of single letters."""
    if kind == "T5TokenizerFast":
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("▁", *LETTERS))]
        return transformers.T5TokenizerFast(vocab=words, extra_ids=0)
    special = (
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] if kind.startswith("Gemma") else ["<|endoftext|>"]
    )
    return getattr(transformers, kind)({word: i for i, word in enumerate((*special, *LETTERS))}, [])


@cache
def models(family: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return {folder: make() for folder, (_, make) in MINIS[family].parts.items()}


def learn(folder: Folder, family: str) -> None:
    """A catalog's folder with the miniature, whose tables are written from diffusers' own models."""
    mini = MINIS[family]
    home = CATALOG.architectures[mini.architecture]
    layout = LAYOUTS[str(home.diffusers)]
    for part in layout.parts:
        cls = mini.parts[part.folder][0]
        prefix = CATALOG.component_for(cls, home).prefix
        with open_checkpoint(weights_in(folder / "model" / part.folder)) as held:
            original, strange = part.rules.to_original(held)
        assert not strange
        table = {(part.prefix + n).removeprefix(prefix): TensorRule(t.shape) for n, t in original.items()}
        said = {"name": f"{cls}-small", "class": f"{cls}-small", "prefix": prefix}
        folder.write(f"catalog/{cls}.toml", compress(table, **said))
    slots = [f"{mini.parts[part.folder][0]}-small" for part in layout.parts]
    text = f'[small]\nslots = {slots}\ndiffusers = "{layout.name}"\n'
    folder.write("catalog/architectures.toml", text.replace("'", '"'))


def published(path: Path, family: str) -> Folder:
    """A folder with a model as diffusers saves it, and a catalog that knows it."""
    folder = Folder.below(path)
    index: dict[str, Any] = {"_class_name": "Any"}
    for name, model in models(family).items():
        model.save_pretrained(folder / "model" / name)
        index[name] = [type(model).__module__.partition(".")[0], type(model).__name__]
    folder.write("model/model_index.json", json.dumps(index))
    learn(folder, family)
    return replace(folder, environment={"CKPT_COMPONENTS": str(folder / "catalog")})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(MINIS))
def test_a_small_model_goes_there_and_back(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    said = folder("convert", "model", "-o", "one.safetensors")
    assert said.code == 0, said.err
    assert folder("inspect", "one.safetensors", "--json").json["files"][0]["architecture"] == "small"
    said = folder("convert", "one.safetensors", "-o", "again")
    assert said.code == 0, said.err
    assert not (folder / "again/remainder.safetensors").exists()
    for part, model in models(family).items():
        loaded, report = type(model).from_pretrained(folder / "again" / part, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        same(model.state_dict(), loaded.state_dict())
    assert folder("convert", "again", "-o", "two.safetensors").code == 0
    assert content(folder / "two.safetensors") == content(folder / "one.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(MINIS))
def test_a_denoiser_alone_is_known_in_diffusers_names(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    assert folder("convert", "model", "-o", "one.safetensors").code == 0
    cls = MINIS[family].parts["transformer"][0]
    whole = {n: t for n, t in content(folder / "one.safetensors").items() if n.startswith(DENOISER)}
    models(family)["transformer"].save_pretrained(folder / "sharded", max_shard_size="200KB")
    one, index = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
    for number, source in enumerate((f"model/transformer/{one}", f"sharded/{index}")):
        told = folder("inspect", source, "--json").json["files"][0]
        assert told["architecture"] == f"{cls}-small", told
        assert folder("convert", source, "-o", f"{number}.safetensors").code == 0
        assert content(folder / f"{number}.safetensors") == {
            n.removeprefix(DENOISER): t for n, t in whole.items()
        }


# ── whole pipelines ──

RECIPE = (
    'format = 1\nname = "x"\nbase = "one"\nsources.one.file = "one.safetensors"\n'
    '[output]\nfile = "x/"\nverbatim = true\nprecision = "keep"\n'
)


def in_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if (folder / name).is_file()}


def tokenizers(folder: Path, layout: Layout) -> dict[str, dict[str, int]]:
    """Tokenizers in a model's folder, as transformers saves them: their words, by their folder."""
    made: dict[str, dict[str, int]] = {}
    for part in layout.parts:
        if part.tokenizer is None:
            continue
        if part.padding:
            vocabulary(folder / part.tokenizer)
            words = transformers.CLIPTokenizer.from_pretrained(folder / part.tokenizer)
        else:
            words = tokenizer(part.tokenizer_model)
            words.save_pretrained(folder / part.tokenizer)
        made[part.tokenizer] = words.get_vocab()
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(MINIS.keys() - {"FLUX2"}))  # whose text encoder has no table
def test_diffusers_loads_the_whole_pipeline(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    layout = LAYOUTS[str(CATALOG.architectures[MINIS[family].architecture].diffusers)]
    words = tokenizers(folder / "model", layout)
    assert folder("convert", "model", "-o", "one.safetensors").code == 0
    said = folder("convert", "one.safetensors", "-o", "again", "--tokenizer", "model")
    assert said.code == 0 and "tokenizer" not in said.err
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "again", local_files_only=True)
    assert type(pipe).__name__ in {layout.pipeline, *layout.pipelines.values()}
    for part, model in models(family).items():
        same(model.state_dict(), getattr(pipe, part).state_dict())
    assert {name: getattr(pipe, name).get_vocab() for name in words} == words
    assert folder("convert", "model", "-o", "direct").code == 0  # its own tokenizers go along
    assert in_files(folder / "direct") == in_files(folder / "again")


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, "FLUX")
    assert folder("convert", "model", "-o", "one.safetensors").code == 0
    said = folder("convert", "one.safetensors", "-o", "none")
    assert "without a tokenizer, whose" in said.err
    vocabulary(folder / "words")
    said = folder("convert", "one.safetensors", "-o", "clip", "--tokenizer", "words")
    assert said.code == 0 and "without `tokenizer_2`, whose" in said.err
    index = json.loads((folder / "clip/model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["tokenizer_2"] == [None, None] and not (folder / "clip/tokenizer_2").exists()
    tokenizers(folder / "words", LAYOUTS["Chroma"])  # T5's, under the name that it has there
    said = folder("convert", "one.safetensors", "-o", "other", "--tokenizer", "words/tokenizer")
    assert said.code == 2 and "`words/tokenizer` holds no `vocab.json`" in said.err, said.err
    folder.write("x.toml", f'{RECIPE}tokenizer = "words"\n')
    said = folder("build", "x.toml")
    assert said.code == 0 and "without `tokenizer_2`, whose" in said.err, said.err
    assert in_files(folder / "x") == in_files(folder / "clip")
    (folder / "words/tokenizer_2").symlink_to(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"the user's own")
    folder.write("y.toml", f'{RECIPE.replace("x/", "y/")}tokenizer = "words"\n')
    said = folder("build", "y.toml")
    assert said.code == 3 and "a link leads out" in said.err, said.err


@pytest.mark.filterwarnings("ignore")
def test_the_only_tokenizer_may_be_given_by_itself(tmp_path: Path) -> None:
    folder = published(tmp_path, "Z-Image")
    assert folder("convert", "model", "-o", "one.safetensors").code == 0
    tokenizers(folder / "model", LAYOUTS["Z-Image"])
    said = folder("convert", "one.safetensors", "-o", "a", "--tokenizer", "model/tokenizer")
    assert said.code == 0 and "tokenizer" not in said.err
    assert in_files(folder / "a/tokenizer") == in_files(folder / "model/tokenizer")
    said = folder("convert", "one.safetensors", "-o", "b", "--tokenizer", "model/vae")
    assert said.code == 2 and "`model/vae` holds no `tokenizer.json`" in said.err


@pytest.mark.filterwarnings("ignore")
def test_where_there_is_no_tokenizer_none_is_taken(tmp_path: Path) -> None:
    folder = published(tmp_path, "FLUX2")
    assert folder("convert", "model", "-o", "one.safetensors").code == 0
    said = folder("convert", "one.safetensors", "-o", "a", "--tokenizer", "model")
    assert said.code == 2 and "a folder of FLUX2 is written without its tokenizer" in said.err
    folder.write("x.toml", f'{RECIPE}tokenizer = "model"\n')
    said = folder("build", "x.toml")
    assert said.code == 3 and "a folder of FLUX2 is written without its tokenizer" in said.err


@pytest.mark.filterwarnings("ignore")
def test_a_second_denoiser_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, "Wan")
    index = json.loads((folder / "model/model_index.json").read_text())
    models("Wan")["transformer"].save_pretrained(folder / "model/transformer_2")
    folder.write("model/model_index.json", json.dumps({**index, "transformer_2": index["transformer"]}))
    said = folder("convert", "model", "-o", "one.safetensors")
    assert said.code == 0
    assert "not carried over: entries that are no tensors of the model: `transformer_2`" in said.err
    assert folder("convert", "model/transformer_2", "-o", "two.safetensors").code == 0
    one, two = content(folder / "one.safetensors"), content(folder / "two.safetensors")
    assert two == {n.removeprefix(DENOISER): t for n, t in one.items() if n.startswith(DENOISER)}


# ── what LoRAs mean by diffusers' names ──


@pytest.mark.parametrize(
    ("cls", "name", "target"),
    [
        (
            "DIT-FLUX",
            "transformer_blocks.3.attn.add_k_proj",
            ("double_blocks.3.txt_attn.qkv.weight", 3072, 3072),
        ),
        (
            "DIT-FLUX",
            "single_transformer_blocks.37.proj_mlp",
            ("single_blocks.37.linear1.weight", 9216, 12288),
        ),
        (
            "DIT-Chroma",
            "single_transformer_blocks.0.attn.to_v",
            ("single_blocks.0.linear1.weight", 6144, 3072),
        ),
        ("DIT-FLUX2", "transformer_blocks.7.attn.to_q", ("double_blocks.7.img_attn.qkv.weight", 0, 6144)),
        (
            "DIT-FLUX2-Klein-4B",
            "transformer_blocks.4.attn.to_v",
            ("double_blocks.4.img_attn.qkv.weight", 6144, 3072),
        ),
        ("DIT-Lumina2", "layers.25.attn.to_k", ("layers.25.attention.qkv.weight", 2304, 768)),
        ("DIT-Lumina2", "context_refiner.1.attn.to_v", ("context_refiner.1.attention.qkv.weight", 3072, 768)),
        ("DIT-ZImage", "layers.0.attention.to_v", ("layers.0.attention.qkv.weight", 7680, 3840)),
        (
            "MMDIT-v35-Large",
            "transformer_blocks.37.norm1_context.linear",
            ("joint_blocks.37.context_block.adaLN_modulation.1.weight", 0, None, False, True),
        ),
        (
            "MMDIT-v35-Medium",
            "transformer_blocks.12.attn2.to_q",
            ("joint_blocks.12.x_block.attn2.qkv.weight", 0, 1536),
        ),
        ("DIT-Wan-14B", "blocks.39.attn2.add_k_proj", ("blocks.39.cross_attn.k_img.weight",)),
        (
            "DIT-QwenImage",
            "transformer_blocks.59.attn.to_out.0",
            ("transformer_blocks.59.attn.to_out.0.weight",),
        ),
    ],
)
def test_adapters_in_diffusers_names_find_their_rows(cls: str, name: str, target: tuple[Any, ...]) -> None:
    tensors = {
        n: Shaped(rule.shape)
        for c in CATALOG.classes[cls]
        for n, rule in c.tensors.items()
        if -1 not in rule.shape
    }
    adapters = CATALOG.traits[cls].adapters
    assert adapters is not None
    known = targets(tensors, adapters, CATALOG.rules[adapters.rules] if adapters.rules else None)
    assert known[f"transformer.{name}"]["weight"] == Target(*target)
    assert known[f"lora_unet_{name.replace('.', '_')}"]["weight"] == Target(*target)
