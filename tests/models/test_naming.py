"""Components under the names that files have: prefixes, wrappers, diffusers', those of lone files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.models.catalog import load_catalog
from builder.models.cut import choose, cut, joined
from builder.models.identify import identify
from builder.models.identity import Identity
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.moves import Reshaped
from tests.help.building import CLIP, UNET, VAE, Folder, catalog, content, model, save
from tests.models.test_identify import Unread, tensors

CATALOG = load_catalog([])
TEXT = "text_model."


def lone(name: str, prefix: str = "") -> dict[str, LazyTensor]:
    """What a file of a component alone holds, under a prefix."""
    component = CATALOG.components[name]
    return {
        prefix + component.alone.name(n): Unread(DType.F16, rule.shape)
        for n, rule in component.tensors.items()
    }


def in_diffusers(*components: str, layout: str) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of components by diffusers' folder and name."""
    made, _ = CATALOG.layouts[layout].to_diffusers(tensors(*components))
    return made


def said(identity: Identity) -> tuple[str | None, list[str]]:
    return identity.architecture, [m.component.name for m in identity.matches]


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "transformer."])
@pytest.mark.parametrize("extra", ["", "logit_scale", "text_projection.weight"])
@pytest.mark.parametrize("ids", [True, False])
def test_a_lone_text_encoder_fills_every_slot_that_it_fits(prefix: str, extra: str, ids: bool) -> None:
    held = lone("CLIP-v1-SD", prefix)
    if not ids:
        del held[f"{prefix}text_model.embeddings.position_ids"]
    if extra:
        held[prefix + extra] = Unread(DType.F16, () if extra == "logit_scale" else (768, 768))
    found = identify(held, CATALOG)
    assert found.intact and not found.unknown
    for cls, names in (("CLIP-v1", 197), ("CLIP-XL-AUX", 197), ("CLIP-L-v3", 196), ("CLIP-L-FLUX", 196)):
        match = choose(held, found, cls, None, CATALOG)
        assert match is not None, cls
        made = cut(held, found, match, cls).tensors
        standard = CATALOG.classes[cls][0].tensors
        assert made.keys() <= standard.keys()
        assert {n for n, rule in standard.items() if not rule.optional} <= made.keys()
        projected = extra == "text_projection.weight" and cls == "CLIP-L-v3"
        scaled = extra == "logit_scale" and cls == "CLIP-L-v3" and prefix != "transformer."
        assert len(made) == names - (not ids and names == 197) + projected + scaled


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("vae.", "VAE-v1-SD"),
        ("unet.", "UNET-v1-SD"),
        ("diffusion_model.", "UNET-XL-SD"),
        ("model.diffusion_model.module.", "UNET-v2-SD"),
        ("", "UNET-XL-Inpainting"),
        ("", "UNET-XL-Pix2Pix"),
    ],
)
def test_prefixes_that_programs_write(prefix: str, component: str) -> None:
    found = identify(tensors(component, bare=True) if not prefix else lone(component, prefix), CATALOG)
    assert said(found) == (CATALOG.components[component].cls, [component])
    assert found.intact and not found.unknown


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ("SD-v1", ("UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD")),
        ("SD-v2", ("UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-WD")),
        ("SD-XL", ("UNET-XL-SD", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD")),
        ("SD-XL-Refiner", ("UNET-XL-Refiner", "VAE-v1-SD", "CLIP-XL-Refiner")),
    ],
)
def test_each_part_of_a_diffusers_folder_is_known_alone(layout: str, parts: tuple[str, ...]) -> None:
    folders = in_diffusers(*parts, layout=layout)
    classes = {CATALOG.components[name].cls for name in parts}
    for held in folders.values():
        if not held:
            continue
        found = identify(held, CATALOG)
        assert found.intact and not found.unknown, found.rejected[:1]
        (match,) = found.matches
        (cls,) = [c for c in classes if choose(held, found, c, None, CATALOG) is not None]
        chosen = choose(held, found, cls, None, CATALOG)
        assert chosen is not None and set(match.full) == set(held)
        made = cut(held, found, chosen, cls).tensors
        (source,) = (n for n in parts if CATALOG.components[n].cls == cls)
        rules = CATALOG.components[source].tensors
        needed = {n: r.shape for n, r in rules.items() if not r.optional}
        assert needed.items() <= {n: t.shape for n, t in made.items()}.items()
        assert made.keys() <= rules.keys()


def test_a_mixed_file_is_what_its_unet_says() -> None:
    vae = in_diffusers("VAE-v1-SD", layout="SD-v1")["vae"]
    held = {
        **tensors("UNET-v1-SD"),
        **lone("CLIP-v1-SD", "text_encoders.clip_l.transformer."),
        **{f"vae.{n}": t for n, t in vae.items()},
    }
    found = identify(held, CATALOG)
    assert said(found) == ("SD-v1", ["UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD"])
    assert not found.unknown


def test_attention_biases_with_dimensions_of_one_are_biases() -> None:
    held = tensors("VAE-v1-SD")
    odd = [n for n in held if ".attn_1." in n and n.endswith(".bias") and ".norm." not in n]
    for name in odd:
        held[name] = Unread(DType.F16, (512, 1, 1))
    found = identify(held, CATALOG)
    (match,) = found.matches
    assert len(match.reshaped) == len(odd) == 8
    made = cut(held, found, match, "VAE-v1")
    assert {n: t.shape for n, t in made.tensors.items()} == {
        n: r.shape for n, r in CATALOG.components["VAE-v1-SD"].tensors.items()
    }
    assert made.changes == ("vae-attention-shape: 8 to [n]",)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    plain = model("SD-mini")
    for name, wrap in (
        ("outside", lambda n: f"module._orig_mod.{n}"),
        ("inside", lambda n: n.replace(UNET, f"{UNET}_orig_mod.").replace(".0.0.", ".0._orig_mod.0.")),
        ("one", lambda n: n.replace(UNET, f"{UNET}module.")),
    ):
        path = save(tmp_path / f"{name}.safetensors", {wrap(n): t for n, t in plain.items()})
        with open_checkpoint(path, catalog().layouts) as checkpoint:
            found = identify(checkpoint, catalog())
            assert said(found)[0] == "SD-mini" and not found.unknown
            match = choose(checkpoint, found, "UNET-mini", None, catalog())
            assert match is not None
            made = cut(checkpoint, found, match, "UNET-mini").tensors
            assert {UNET + n for n in made} == {n for n in plain if n.startswith(UNET)}


def diffusers(folder: Folder) -> Path:
    """The miniature model as a diffusers folder."""
    save(folder / "mini.safetensors", model("SD-mini"))
    assert folder("convert", "mini.safetensors", "-o", "out/").code == 0
    return folder / "out"


def parts(plain: Mapping[str, tuple[str, tuple[int, ...], bytes]], prefix: str) -> dict[str, object]:
    return {n.removeprefix(prefix): v for n, v in plain.items() if n.startswith(prefix)}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def test_parts_of_our_own_folders_come_back_as_they_were(folder: Folder) -> None:
    out = diffusers(folder)
    plain = content(folder / "mini.safetensors")
    for source, cls, prefix in (
        ("unet", "UNET-mini", UNET),
        ("vae/diffusion_pytorch_model.safetensors", "VAE-mini", VAE),
        ("text_encoder/model.safetensors", "CLIP-mini", CLIP),
    ):
        made = folder("extract", f"out/{source}", cls, "-o", f"{cls}.safetensors", "--precision", "keep")
        assert made.code == 0, made.err
        wanted = parts(plain, prefix)
        if cls == "CLIP-mini":
            wanted = {TEXT + n: v for n, v in wanted.items() if n != "embeddings.position_ids"}
        assert content(folder / f"{cls}.safetensors") == wanted
        known = folder("inspect", f"{cls}.safetensors", "--json").json["files"][0]
        assert known["architecture"] == cls and not known["unknown"]
    assert out.is_dir()


def test_mixed_names_are_replaced_pruned_and_converted(folder: Folder) -> None:
    out = diffusers(folder)
    plain = content(folder / "mini.safetensors")
    inside = f"text_encoders.clip_l.transformer.{TEXT}"
    held = {n.replace(CLIP, inside): t for n, t in model("SD-mini").items() if not n.startswith(VAE)}
    with open_checkpoint(out / "vae/diffusion_pytorch_model.safetensors") as vae:
        held |= {f"vae.{n}": MemoryTensor(t.dtype, t.shape, bytes(t.tobytes())) for n, t in vae.items()}
    save(folder / "mixed.safetensors", held)
    made = folder("prune", "mixed.safetensors", "-o", "pruned.safetensors", "--precision", "fp32")
    assert made.code == 0, made.err
    assert content(folder / "pruned.safetensors") == plain
    made = folder("convert", "mixed.safetensors", "-o", "again/")
    assert made.code == 0, made.err
    assert content(folder / "again") == content(out)
    save(folder / "bare.safetensors", {n.removeprefix("vae."): t for n, t in held.items() if n[:4] == "vae."})
    made = folder(
        "replace", "mini.safetensors", "VAE=bare.safetensors", "-o", "new.safetensors", "--precision", "keep"
    )
    assert made.code == 0, made.err
    assert content(folder / "new.safetensors") == plain


def test_a_component_alone_is_converted_to_the_names_that_it_is_published_under(folder: Folder) -> None:
    diffusers(folder)
    plain = content(folder / "mini.safetensors")
    made = folder("convert", "out/vae", "-o", "vae.safetensors")
    assert made.code == 0 and "VAE-mini-SD: 248 tensors get their usual names" in made.err
    assert content(folder / "vae.safetensors") == parts(plain, VAE)
    save(
        folder / "clip.safetensors",
        {n.removeprefix(CLIP): t for n, t in model("SD-mini").items() if CLIP in n},
    )
    assert folder("convert", "clip.safetensors", "-o", "clip_l.ckpt").code == 0
    assert {n for n in content(folder / "clip_l.ckpt") if not n.startswith(TEXT)} == set()
    # What has its usual names already is left as it is.
    assert folder("convert", "clip_l.ckpt", "-o", "again.safetensors").err.count("usual names") == 0
    saved = folder("convert", "out/vae", "-o", "x.safetensors", "--save-recipe", "x.toml")
    assert saved.code == 0, saved.err
    first = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").unlink()
    folder.build("x.toml")
    assert (folder / "x.safetensors").read_bytes() == first


def test_what_is_written_alone_is_tidy(folder: Folder) -> None:
    diffusers(folder)
    for source in ("out/vae", "out/text_encoder/model.safetensors", "out/unet"):
        made = folder("prune", source, "-o", "one.safetensors", "--precision", "fp32")
        assert made.code == 0, made.err
        again = folder("prune", "one.safetensors", "--precision", "fp32", "--json").json["files"][0]
        assert again["state"] == "tidy"
        (folder / "one.safetensors").unlink()


def test_a_tensor_in_another_shape_is_never_called_missing(folder: Folder) -> None:
    held = dict(model("SD-mini"))
    name = f"{UNET}input_blocks.0.0.weight"
    held[name] = Reshaped(held[name], (held[name].shape[0], held[name].shape[1] * 9, 1, 1))
    save(folder / "odd.safetensors", held)
    shapes = (
        f"`input_blocks.0.0.weight` is {list(held[name].shape)}, not {list(model('SD-mini')[name].shape)}"
    )
    for words in (
        ("extract", "odd.safetensors", "UNET-mini", "-o", "x.safetensors"),
        ("inspect", "odd.safetensors"),
        ("replace", "mini.safetensors", "UNET=odd.safetensors", "-o", "x.safetensors"),
    ):
        save(folder / "mini.safetensors", model("SD-mini"))
        made = folder(*words)
        text = " ".join((made.out + made.err).split())
        assert shapes in text and "ckpt components learn" in text and "missing" not in text, text
    other = folder("diff", "mini.safetensors", "odd.safetensors")
    assert "UNET-mini differs in 1 of 686 tensors: `input_blocks.0.0.weight`" in other.out
    assert "(no component)" not in other.out and "without" not in other.out


def test_a_diff_says_that_only_shapes_are_other(folder: Folder) -> None:
    held = dict(model("SD-mini"))
    for name in [n for n in held if ".attn_1." in n and n.endswith(".bias") and ".norm." not in n]:
        held[name] = Reshaped(held[name], (*held[name].shape, 1, 1))
    save(folder / "a.safetensors", model("SD-mini"))
    save(folder / "b.safetensors", held)
    assert "B is A with some tensors in other shapes" in folder("diff", "a.safetensors", "b.safetensors").out
    fixed = folder("prune", "b.safetensors", "-o", "c.safetensors", "--precision", "fp32")
    assert fixed.code == 0 and content(folder / "c.safetensors") == content(folder / "a.safetensors")


def test_a_slot_that_two_components_fit_is_not_guessed(folder: Folder) -> None:
    held = {**lone("CLIP-v1-SD", "text_encoders.clip_l.transformer."), **lone("CLIP-v1-SD", "text_encoder.")}
    found = identify(held, CATALOG)
    assert len(found.matches) == 2
    assert choose(held, found, "CLIP-XL-AUX", None, CATALOG) is None


def test_what_diffusers_splits_is_compared_as_one() -> None:
    component = CATALOG.components["CLIP-v2-WD"]
    split = CATALOG.layouts["SD-v2"].to_diffusers(tensors("CLIP-v2-WD"))[0]["text_encoder"]
    whole, identity = joined(split, identify(split, CATALOG))
    (match,) = identity.matches
    assert match.names.keys() == component.tensors.keys() and not match.made
    assert {bare: whole[full].shape for bare, full in match.names.items()} == {
        n: r.shape for n, r in component.tensors.items()
    }
    assert len(whole) == component.keys


def test_parts_with_scales_of_their_own_are_not_joined() -> None:
    split = CATALOG.layouts["SD-v2"].to_diffusers(tensors("CLIP-v2-WD"))[0]["text_encoder"]
    split["text_model.encoder.layers.3.self_attn.q_proj.weight_scale"] = Unread(DType.F32, ())
    found = identify(split, CATALOG)
    with pytest.raises(SourceError, match="is packed, and split"):
        cut(split, found, found.matches[0], "CLIP-v2")


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_companions_are_found_whatever_names_the_layers_have(prefix: str) -> None:
    weight = "time_embed.0.weight"
    scale = MemoryTensor(DType.F32, (1,), b"\0\0\x80\x3f")
    by_diffusers, _ = CATALOG.layouts["SD-v1"].to_diffusers(
        {UNET + weight: tensors("UNET-v1-SD")[UNET + weight]}
    )
    (theirs,) = by_diffusers["unet"]
    unet = in_diffusers("UNET-v1-SD", layout="SD-v1")["unet"]
    for held, name in ((lone("UNET-v1-SD"), weight), (unet, theirs)):
        side = prefix + name.replace("weight", "weight_scale")
        more = {side: scale, prefix + "nowhere.weight_scale": scale}
        found = identify({**{prefix + n: t for n, t in held.items()}, **more}, CATALOG)
        (match,) = found.matches
        assert match.companions["time_embed.0.weight_scale"] == side
        assert side in match.full and match.full.count(side) == 1 and side in found.scales
        # What no layer of the table answers to has another name only where the others do not.
        assert (prefix + "nowhere.weight_scale" in match.full) == (not match.diffusers)


def test_companions_of_a_lone_text_encoder_follow_it_to_another_class() -> None:
    scale = MemoryTensor(DType.F32, (1,), b"\0\0\x80\x3f")
    held: dict[str, LazyTensor] = {**lone("CLIP-v1-SD")}
    side = "text_model.encoder.layers.0.mlp.fc1.weight_scale"
    held[side] = scale
    found = identify(held, CATALOG)
    for cls, name in (
        ("CLIP-v1", "encoder.layers.0.mlp.fc1.weight_scale"),
        ("CLIP-L-v3", "transformer.text_model.encoder.layers.0.mlp.fc1.weight_scale"),
    ):
        match = choose(held, found, cls, None, CATALOG)
        assert match is not None and match.companions == {name: side}
        assert cut(held, found, match, cls).tensors[name] is scale


def test_wrapped_layers_have_their_descriptions(tmp_path: Path) -> None:
    from builder.formats.write_safetensors import write

    weight, said = UNET + "out.2.weight", '{"layers": {"LAYER": {"format": "int8_tensorwise"}}}'
    for wrapper, layer in (("module.", "module." + UNET + "out.2"), ("_orig_mod.", UNET + "out.2")):
        path = tmp_path / "a.safetensors"
        held = {wrapper + n: t for n, t in model("SD-mini").items()}
        write(path, held, {"_quantization_metadata": said.replace("LAYER", layer)})
        with open_checkpoint(path) as checkpoint:
            assert weight in checkpoint and UNET + "out.2.comfy_quant" in checkpoint
            assert not checkpoint.metadata
