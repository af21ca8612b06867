"""`ckpt prune`: what goes, what stays, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from benchmarks.generate import make
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import plan_layout
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import IDS, UNET, Folder, catalog, content, model, save, save_dirty, values
from tests.help.building import like as filled
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def metadata(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata


def with_metadata(path: Path, tensors: dict[str, LazyTensor], said: dict[str, str]) -> Path:
    from builder.formats.write_safetensors import write as write_safetensors

    write_safetensors(path, tensors, said)
    return path


def types(path: Path, prefix: str = "") -> set[str]:
    return {dtype for n, (dtype, _, _) in content(path).items() if n.startswith(prefix)}


def test_ema_junk_and_wasted_precision_go(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    said = folder("prune", "a.ckpt", "--json")
    (one,) = said.json["files"]
    before, after = content(folder / "a.ckpt"), content(folder / "a-pruned.safetensors")
    gone = before.keys() - after.keys()
    told = {g["what"]: g["tensors"] for g in one["goes"]}
    assert set(told["EMA"]) | set(told["junk"]) == gone
    assert after.keys() <= before.keys()
    assert all(n.startswith("model_ema.") for n in told["EMA"])
    assert {"loss.logvar", "optimizer_states.0.exp_avg"} < set(told["junk"])
    assert types(folder / "a-pruned.safetensors", UNET) == {"F16"}
    assert after["betas"] == before["betas"]  # what the sampler counts with is not rounded
    assert set(told["precision"]) == {n for n in after if before[n][0] == "F32" != after[n][0] != "I64"}
    assert told["positions"] == [n for n in after if n.endswith("position_ids")]
    assert [g["bytes"] for g in one["goes"]] == sorted((g["bytes"] for g in one["goes"]), reverse=True)
    for share in one["goes"]:
        sizes = [len(before[n][2]) for n in share["tensors"]]
        assert sizes == sorted(sizes, reverse=True)
    assert one["left"] == sum(len(data) for _, _, data in after.values())
    assert folder("inspect", "a.ckpt", "--json").json["files"][0]["pruned"] == one["left"]
    assert one["output"]["path"] == "a-pruned.safetensors" and one["state"] == "written"


def test_what_is_said(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt", "mini")
    texts = []
    for args in (
        ["--dry-run"],
        ["--dry-run", "--keep-ema", "--precision", "keep", "--keep", "loss.*"],
        [],
        [],
        ["-q"],
    ):
        said = folder("prune", "a.ckpt", *args)
        assert said.code == 0, said.err
        texts.append(f"$ ckpt prune a.ckpt {' '.join(args)}\n{said.out}{said.err}")
        if "--dry-run" in args:
            assert [p.name for p in folder.path.iterdir()] == ["a.ckpt"] and not folder.store.exists()
    said = folder("prune", "a-pruned.safetensors", "--names")
    texts.append(f"$ ckpt prune a-pruned.safetensors\n{said.out}")
    text = re.sub(r"[0-9a-f]{64}", "…", "\n".join(texts))
    assert text == golden(GOLDEN / "prune.txt", text)
    assert sorted(p.name for p in folder.path.iterdir()) == ["a-pruned.safetensors", "a.ckpt"]
    named = folder("prune", "a.ckpt", "--dry-run", "--names").out
    assert "  junk: loss.discriminator.main.2.weight\n" in named and named.count("  EMA: ") == 688


def test_keeping(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    before = content(folder / "a.ckpt")
    args = ("--keep", "loss.logvar", "--keep", "optimizer_states.*", "-o", "b.safetensors")
    assert folder("prune", "a.ckpt", *args).code == 0
    after = content(folder / "b.safetensors")
    for name in ("loss.logvar", "optimizer_states.0.exp_avg", "betas"):
        assert after[name] == before[name]
    assert "loss.discriminator.main.0.weight" not in after
    assert folder("prune", "a.ckpt", "--keep-ema", "-o", "c.safetensors").code == 0
    kept = content(folder / "c.safetensors")
    assert {n for n in kept if n.startswith("model_ema.")} == {
        n for n in before if n.startswith("model_ema.")
    }
    assert types(folder / "c.safetensors", "model_ema.diffusion_model") == {"F16"}
    assert folder("inspect", "c.safetensors", "--no-metric", "--json").json["files"][0]["ema"]["keys"] == 4
    wrong = folder("prune", "a.ckpt", "--keep", "loss.logvr")
    assert wrong.code == 2 and "did you mean `loss.logvar`?" in wrong.err


@pytest.mark.parametrize("asked", [None, "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("source", [DType.F16, DType.BF16])
def test_nothing_is_made_wider_nor_unasked_another_type_of_16_bits(
    folder: Folder, source: DType, asked: str | None
) -> None:
    """What was lost does not come back; what is asked for is done."""
    save(folder / "a.safetensors", {**model("SD-tiny", source), "loss.x": like(2)})
    args = () if asked is None else ("--precision", asked)
    assert folder("prune", "a.safetensors", *args).code == 0
    wanted = {"fp16": "F16", "bf16": "BF16"}.get(asked or "", source.code)
    assert types(folder / "a-pruned.safetensors", UNET) == {wanted}
    before, after = content(folder / "a.safetensors"), content(folder / "a-pruned.safetensors")
    assert after.keys() == before.keys() - {"loss.x"}
    if wanted == source.code:
        assert after == {n: t for n, t in before.items() if n != "loss.x"}


def test_another_type_of_16_bits_is_work_to_do_and_may_overflow(folder: Folder) -> None:
    save(folder / "a.safetensors", model("SD-tiny", DType.BF16))
    assert folder("prune", "a.safetensors", "--json").json["files"][0]["state"] == "tidy"
    said = folder("prune", "a.safetensors", "--precision", "fp16")
    assert said.code == 0 and "of BF16 rounded to FP16" in said.out + said.err
    name = UNET + "out.2.bias"
    large = MemoryTensor(DType.BF16, model()[name].shape, b"\x80\x4f" * model()[name].numel)
    save(folder / "b.safetensors", {**model("SD-tiny", DType.BF16), name: large})
    said = folder("prune", "b.safetensors", "--precision", "fp16")
    assert said.code == 7 and "beyond F16" in said.err and name.removeprefix(UNET) in said.err


def like(count: int) -> LazyTensor:
    return MemoryTensor(DType.F32, (count,), bytes(4 * count))


def test_precision_that_is_asked_for(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    for wanted, code in (("bf16", "BF16"), ("fp32", "F32"), ("keep", "F32")):
        assert folder("prune", "a.ckpt", "--precision", wanted, "-o", f"{wanted}.safetensors").code == 0
        assert types(folder / f"{wanted}.safetensors", UNET) == {code}


def test_mixed_types_and_packed_weights(folder: Folder) -> None:
    """FP8 stays as it is, with its scales, while what is wider beside it is rounded."""
    tensors = dict(model("SD-tiny", DType.F16))
    name = UNET + "out.2.weight"
    numel = tensors[name].numel
    tensors[name] = MemoryTensor(DType.F8_E4M3, tensors[name].shape, bytes([56]) * numel)
    tensors[UNET + "out.2.scale_weight"] = MemoryTensor(DType.F32, (), b"\0\0\x80\x3f")
    wide = UNET + "out.0.weight"
    tensors[wide] = MemoryTensor(DType.F32, tensors[wide].shape, b"\0\0\x80\x3f" * tensors[wide].numel)
    save(folder / "a.safetensors", tensors)
    assert folder("prune", "a.safetensors").code == 0
    after = content(folder / "a-pruned.safetensors")
    assert after[name][0] == "F8_E4M3" and after[wide][0] == "F16"
    assert after[UNET + "out.2.scale_weight"][0] == "F32"
    assert after.keys() == tensors.keys()
    alone = folder("extract", "a.safetensors", "unet", "-o", "unet.safetensors")
    assert alone.code == 0 and "out.2.scale_weight" in content(folder / "unet.safetensors")
    cast = folder("extract", "a.safetensors", "unet", "-o", "wide.safetensors", "--precision", "fp16")
    assert cast.code == 0 and "decoded: 1 weight of scaled FP8" in cast.err
    wide_ = content(folder / "wide.safetensors")
    assert wide_["out.2.weight"] == ("F16", tensors[name].shape, b"\0\x3c" * numel)  # ones
    assert "out.2.scale_weight" not in wide_


def test_what_nothing_explains_stays_as_it_is(folder: Folder) -> None:
    tensors = {**model("SD-tiny", DType.F32), "add_on.weight": like(7), "v_pred": like(0), "loss.x": like(1)}
    save(folder / "a.safetensors", tensors)
    said = folder("prune", "a.safetensors", "--json").json["files"][0]
    after = content(folder / "a-pruned.safetensors")
    assert after["add_on.weight"] == ("F32", (7,), bytes(28)) and "v_pred" in after and "loss.x" not in after
    assert {"what": "unknown", "bytes": 28, "tensors": ["add_on.weight"]} in said["stays"]


def test_an_xl_without_position_ids_stays_whole(folder: Folder) -> None:
    """It is what other tools take for a broken VAE, and prune from gigabytes to its autoencoder."""
    tensors = make("SD-XL", content="sparse", catalog=catalog()).tensors
    specs = {n: (t.dtype, t.shape) for n, t in tensors.items() if not n.endswith("position_ids")}
    assert len(specs) < len(tensors)
    layout = plan_layout(specs)
    with (folder / "xl.safetensors").open("wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    said = folder("prune", "xl.safetensors", "--dry-run", "--json").json["files"][0]
    assert (said["architecture"], said["state"], said["goes"]) == ("SD-XL", "tidy", [])
    assert said["left"] == sum(s["bytes"] for s in said["stays"])


@pytest.mark.parametrize("kind", ["<f2", "<f4"])
def test_float_positions_are_not_tidy(folder: Folder, kind: str) -> None:
    """They become int64, which the sizes that are foretold know."""
    ids = values([range(77)], kind)
    save(folder / "a.safetensors", {**model("SD-mini", DType.F16), IDS: ids})
    foretold = folder("prune", "a.safetensors", "--dry-run", "--json").json["files"][0]
    assert foretold["state"] == "to do"
    assert foretold["goes"] == [{"what": "positions", "bytes": ids.nbytes - 616, "tensors": [IDS]}]
    said = folder("prune", "a.safetensors")
    assert said.code == 0, said.err
    assert f"1 tensor of {ids.dtype.code} made int64" in said.err + said.out
    after = content(folder / "a-pruned.safetensors")
    assert after[IDS][0] == "I64"
    assert foretold["left"] == sum(len(data) for *_, data in after.values())
    assert folder("prune", "a-pruned.safetensors", "--json").json["files"][0]["state"] == "tidy"


def test_parts_alone_are_pruned_too(folder: Folder) -> None:
    names = {}
    for name in ("VAE-tiny-SD", "CLIP-tiny-SD", "UNET-tiny-SD", "UNET-tiny-EMA", "LoRA-v1-CLIP"):
        save(folder / f"{name}.safetensors", model(name, DType.F32))
        said = folder("prune", f"{name}.safetensors", "--json").json["files"][0]
        assert said["state"] == "written", said
        names[name] = said["architecture"]
        before, after = (
            content(folder / f"{name}.safetensors"),
            content(folder / f"{name}-pruned.safetensors"),
        )
        prefix = "text_model." if name == "CLIP-mini-SD" else ""  # as it is published alone
        assert {prefix + n for n in before} == after.keys()
        assert types(folder / f"{name}-pruned.safetensors") - {"I64"} == {"F16"}
    assert names["VAE-tiny-SD"] == "VAE-tiny" and names["LoRA-v1-CLIP"] == "LoRA-v1-CLIP"


def test_a_vae_outside_sd_keeps_its_type(folder: Folder) -> None:
    save(folder / "vae.safetensors", {**model("VAE-FLUX", DType.F32), "loss.logvar": values([1.0])})
    assert folder("prune", "vae.safetensors").code == 0
    assert types(folder / "vae-pruned.safetensors") == {"F32"}


def test_metadata_stay_and_the_original_is_named(folder: Folder) -> None:
    said = {
        "ss_network_dim": "8",
        "ss_tag_frequency": '{"a": {"b": 1}}',
        "sshs_model_hash": "a" * 64,
        "sshs_legacy_hash": "abcd1234",
        "modelspec.architecture": "stable-diffusion-v1-inpainting",
        "modelspec.title": "The Title",
        "modelspec.date": "2023-01-01",
        "modelspec.thumbnail": "data:…",
        "modelspec.hash_sha256": "0x" + "b" * 64,
        "my note": "kept",
        "ckpt.recipe": "gone",
    }
    tensors = {**model("SD-tiny", DType.F16), "loss.x": like(100_000)}
    path = with_metadata(folder / "a.safetensors", tensors, said)
    assert folder("prune", "a.safetensors").code == 0
    now = metadata(folder / "a-pruned.safetensors")
    assert {k: v for k, v in said.items() if now.get(k) != v}.keys() == {
        "modelspec.hash_sha256",
        "ckpt.recipe",
    }
    # No digest of data is in a header: what was read is known when it is written already.
    origin = {"file": "a.safetensors", "size": path.stat().st_size}
    assert json.loads(now["pruned_from"]) == origin
    assert hashlib.sha256(path.read_bytes()).hexdigest() not in json.dumps(now)
    assert folder("prune", "a-pruned.safetensors", "-o", "b.safetensors").code == 0
    again = json.loads(metadata(folder / "b.safetensors")["pruned_from"])
    assert again["file"] == "a-pruned.safetensors" and again["pruned_from"] == origin


def test_the_same_again_and_a_namesake(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    first = folder("prune", "a.ckpt", "--json").json["files"][0]
    again = folder("prune", "a.ckpt", "--json").json["files"][0]
    assert again["output"] == first["output"] and again["state"] == "unchanged"
    save_dirty(folder / "other/a.ckpt", seed=7)
    shutil.move(folder / "other/a.ckpt", folder / "a.ckpt")
    other = folder("prune", "a.ckpt", "--json").json["files"][0]
    assert other["output"]["path"] == "a-pruned(1).safetensors"
    assert (
        hashlib.sha256((folder / "a-pruned.safetensors").read_bytes()).hexdigest()
        == first["output"]["sha256"]
    )


def test_the_saved_recipe_makes_the_same_bytes(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    for number, args in enumerate(([], ["--keep-ema"], ["--keep", "loss.*", "--precision", "bf16"])):
        out = f"out-{number}.safetensors"
        said = folder("prune", "a.ckpt", *args, "-o", out, "--save-recipe", f"{number}.toml")
        assert said.code == 0, said.err
        made = (folder / out).read_bytes()
        (folder / out).unlink()
        cold = Folder(folder.path, folder.path.parent / f"store-{number}")
        assert cold("build", f"{number}.toml").code == 0
        assert (folder / out).read_bytes() == made


def test_the_configuration_goes_with_it(folder: Folder) -> None:
    save_dirty(folder / "a.ckpt")
    folder.write("a.yaml", "model: v\n")
    assert folder("prune", "a.ckpt").code == 0
    assert (folder / "a-pruned.yaml").read_text() == "model: v\n"


@pytest.mark.parametrize(("place", "said"), [("in/m", "."), ("in/m/deep", "..")])
def test_a_model_that_is_the_folder_one_is_in(folder: Folder, place: str, said: str) -> None:
    (folder / "in/m/deep").mkdir(parents=True)
    save_dirty(folder / "a.ckpt")
    assert folder("convert", "a.ckpt", "-o", "in/m/a.safetensors.index.json").code == 0
    folder.write("in/m.yaml", "model: v\n")
    inside = replace(folder, path=folder / place)
    for args in ((), ("-o", folder / "out.safetensors")):
        assert inside("prune", said, *args).code == 0
    assert content(folder / "in/m-pruned.safetensors") == content(folder / "out.safetensors")
    assert (folder / "out.yaml").read_text() == "model: v\n"
    assert "# What `m` is made of" in inside("new", said).out


def test_names_that_end_in_sft(folder: Folder) -> None:
    save_dirty(folder / "in/a.sft")
    assert folder("prune", "in").code == 0
    assert [p.name for p in sorted((folder / "in").iterdir())] == ["a-pruned.safetensors", "a.sft"]
    said = folder("prune", "--watch", "in", "--once", "--settle", "0")
    assert said.code == 0 and not (folder / "in/a.sft").exists()


def broken(folder: Folder) -> dict[str, str]:
    """Files that are not to be pruned, and why."""
    whole = model("SD-tiny", DType.F32)
    save(folder / "unet-only.safetensors", {n: t for n, t in whole.items() if n.startswith(UNET)})
    save(folder / "strange.safetensors", {f"x.{i}.weight": like(9) for i in range(30)})
    save(folder / "bare.safetensors", {**model("VAE-tiny", DType.F32), **model("CLIP-tiny", DType.F32)})
    copy = {f"loss.{n}": t for n, t in whole.items()} | {"loss.more": like(99)}
    save(folder / "mostly.safetensors", {**whole, **copy})
    save(folder / "empty.safetensors", {})
    whole_bytes = save(folder / "cut.safetensors", whole).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole_bytes[:-1000])
    folder.write("page.ckpt", "<!doctype html><html>401</html>")
    return {
        "unet-only": "not a whole SD-tiny: VAE-tiny and CLIP-tiny missing",
        "strange": "nothing in the catalog matches",
        "bare": "make no architecture together",
        "mostly": "most of it would go",
        "empty": "no tensors",
        "cut": "cut",
        "page": "HTML",
    }


def test_refusals(folder: Folder) -> None:
    why = broken(folder)
    told = []
    before = sorted(p.name for p in folder.path.iterdir())
    for name in why:
        (path,) = folder.path.glob(f"{name}.*")
        said = folder("prune", path.name)
        assert said.code == 6, said
        told.append(f"$ ckpt prune {path.name}\n{said.out}{said.err}")
    for args in (
        ["missing.ckpt"],
        [],
        ["strange.safetensors", "-o", "strange.safetensors", "--force"],
        ["strange.safetensors", "-o", "x.onnx", "--force"],
        ["strange.safetensors", "bare.safetensors", "-o", "x.safetensors"],
        ["strange.safetensors", "bare.safetensors", "--save-recipe", "x.toml"],
    ):
        said = folder("prune", *args)
        assert said.code in (2, 6, 7)
        told.append(f"$ ckpt prune {' '.join(args)}\n{said.out}{said.err}")
    assert sorted(p.name for p in folder.path.iterdir()) == before
    text = "\n".join(told)
    assert "Traceback" not in text
    assert text == golden(GOLDEN / "prune-refused.txt", text)


def test_force(folder: Folder) -> None:
    """What is broken is pruned as far as it goes; of what is unknown nothing is touched but EMA and junk."""
    broken(folder)
    for name in ("unet-only", "strange", "bare", "mostly"):
        said = folder("prune", f"{name}.safetensors", "--force", "-o", f"{name}.out.safetensors")
        assert said.code == 0, (name, said.err)
    before, after = content(folder / "unet-only.safetensors"), content(folder / "unet-only.out.safetensors")
    assert before.keys() == after.keys() and {t for t, _, _ in after.values()} == {"F16"}
    for name in ("strange", "bare"):
        assert content(folder / f"{name}.safetensors") == content(folder / f"{name}.out.safetensors")
    assert content(folder / "mostly.out.safetensors").keys() == model("SD-tiny", DType.F32).keys()
    whole = {"x.weight": like(9), "model_ema.xweight": like(9), "loss.x": like(1)}
    save(folder / "ema.safetensors", whole)
    assert folder("prune", "ema.safetensors", "--force").code == 0
    assert content(folder / "ema-pruned.safetensors").keys() == {"x.weight"}
    for name in ("empty.safetensors", "cut.safetensors", "page.ckpt"):
        assert folder("prune", name, "--force").code == 6


def test_a_folder(folder: Folder) -> None:
    save_dirty(folder / "in/b.ckpt")
    save(folder / "in/a.safetensors", model("SD-tiny", DType.F16))
    save(folder / "in/bad.safetensors", {"x": like(1)})
    save_dirty(folder / "in/deep/c.safetensors")
    save(folder / "in/.hidden.safetensors", model("VAE-tiny", DType.F32))
    folder.write("in/notes.txt", "x")
    folder.write("in/page.pt", "<html>")
    said = folder("prune", "in", "--quiet")
    assert said.code == 6
    assert said.out == golden(GOLDEN / "prune-folder.txt", said.out)
    made = sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*-pruned*"))
    assert made == ["in/b-pruned.safetensors"]
    assert "`x" not in said.err and said.err.count("error: ") == 2
    (folder / "in/bad.safetensors").unlink()
    (folder / "in/page.pt").unlink()
    (folder / "out").mkdir()
    deep = folder("prune", "in", "-r", "-o", "out", "--json").json["files"]
    states = {Path(f["path"]).name: f["state"] for f in deep}
    assert states == {
        "a.safetensors": "copied",
        "b.ckpt": "unchanged",
        "b-pruned.safetensors": "copied",
        "c.safetensors": "written",
    }
    made = sorted(p.name for p in (folder / "out").iterdir())
    assert made == ["a.safetensors", "b-pruned.safetensors", "c-pruned.safetensors"]
    assert (folder / "out/a.safetensors").read_bytes() == (folder / "in/a.safetensors").read_bytes()
    assert (folder / "out/a.safetensors").stat().st_nlink == 1  # editing it leaves the original alone


def small(*shape: int) -> LazyTensor:
    return MemoryTensor(DType.F16, shape, bytes(2 * prod(shape)))


MODULE = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
LORA = {f"{MODULE}.lora_down.weight": small(4, 8), f"{MODULE}.lora_up.weight": small(8, 4)}


def test_a_folder_with_nothing_in_it(folder: Folder) -> None:
    (folder / "empty").mkdir()
    note = "note: no checkpoint is there to prune; `--recursive` looks in the folders below, too\n"
    assert folder("prune", "empty") == (0, "", note)


def test_out_is_whole(folder: Folder) -> None:
    """What needs no pruning is copied, once, with its configuration; a file of another content stays."""
    (folder / "out").mkdir()
    tidy = save(folder / "in/a.safetensors", model("SD-mini", DType.F16))
    folder.write("in/a.yaml", "model: x")
    save(folder / "in/lora.pt", LORA)
    folder.write("out/lora.pt", "something else")
    for _ in range(2):
        said = folder("prune", "in", "-o", "out")
        assert said.code == 0, said.err
        assert re.search(r"in/a.safetensors +copied +1.6 MB +1.6 MB", said.out), said.out
        made = {p.name for p in (folder / "out").iterdir()}
        assert made == {"a.safetensors", "a.yaml", "lora.pt", "lora(1).pt"}
    assert (folder / "out/a.safetensors").read_bytes() == tidy.read_bytes()
    assert (folder / "out/lora(1).pt").read_bytes() == (folder / "in/lora.pt").read_bytes()
    one = folder("prune", "in/a.safetensors", "-o", "out", "--json").json["files"][0]
    assert one["state"] == "copied" and one["output"]["path"] == "out/a.safetensors"
    assert folder("prune", "in", "-o", "in").out.count("  tidy  ") == 2
    (folder / "other").mkdir()
    dry = folder("prune", "in", "-o", "other", "--dry-run")
    assert dry.code == 0 and list((folder / "other").iterdir()) == []


def test_what_has_no_table_and_is_known_is_tidy(folder: Folder) -> None:
    save(folder / "a.pt", LORA)
    said = folder("prune", "a.pt")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("a.pt: a LoRA of SD XL, rank 4, ") and "tidy       a.pt" in said.out
    save(folder / "b.pt", {**LORA, "optimizer_states.0": like(9)})
    assert folder("prune", "b.pt").code == 0
    assert content(folder / "b-pruned.safetensors") == content(folder / "a.pt")


def test_a_tidy_ckpt_becomes_safetensors(folder: Folder) -> None:
    save(folder / "a.ckpt", model("SD-mini", DType.F16))
    said = folder("prune", "a.ckpt")
    assert said.code == 0, said.err
    assert "  goes   container       PyTorch zip, which becomes safetensors\n" in said.out
    assert content(folder / "a-pruned.safetensors") == content(folder / "a.ckpt")
    assert "tidy " in folder("prune", "a-pruned.safetensors").out


def test_fixes(folder: Folder) -> None:
    """What a fix would change is no longer tidy; where there is nothing to mend, it is."""
    tensors = dict(model("SD-mini", DType.F16))
    save(folder / "whole.safetensors", tensors)
    assert tensors[IDS].dtype is DType.I64
    tensors[IDS] = MemoryTensor(DType.I64, (1, 77), b"\1" + bytes(tensors[IDS].tobytes())[1:])
    save(folder / "a.safetensors", tensors)
    asked = ("--fix", "clip-position-ids")
    assert "tidy " in folder("prune", "a.safetensors").out
    assert "tidy " in folder("prune", "whole.safetensors", *asked).out
    one = folder("prune", "a.safetensors", *asked, "--dry-run", "--json").json["files"][0]
    assert one["state"] == "to do"
    assert one["fixed"] == [{"what": "CLIP-mini-SD", "change": "clip-position-ids: made exact: int64 0..76"}]
    said = folder("prune", "a.safetensors", *asked, "--save-recipe", "a.toml")
    assert said.code == 0, said.err
    assert "  fixed  CLIP-mini-SD    clip-position-ids: made exact: int64 0..76\n" in said.out
    assert content(folder / "a-pruned.safetensors") == content(folder / "whole.safetensors")
    assert '"clip-position-ids"' in (folder / "a.toml").read_text()
    said = folder("prune", "a.safetensors", "--profile", "diffusers", "-o", "b.safetensors")
    assert said.code == 0, said.err
    assert IDS not in content(folder / "b.safetensors")


def test_overflow_and_non_finite(folder: Folder) -> None:
    tensors = dict(model("SD-mini", DType.F32))
    name = f"{UNET}out.2.bias"
    tensors[name] = filled(tensors[name], 1e5)
    save(folder / "big.safetensors", tensors)
    assert folder("prune", "big.safetensors").code == 7
    assert folder("prune", "big.safetensors", "--overflow", "clamp").code == 0
    dtype, _, data = content(folder / "big-pruned.safetensors")[name]
    assert dtype == "F16" and data[:2] == b"\xff\x7b"  # 65504
    tensors[name] = filled(tensors[name], float("nan"))
    save(folder / "nan.safetensors", tensors)
    assert folder("prune", "nan.safetensors").code == 7
    assert folder("prune", "nan.safetensors", "--non-finite", "keep").code == 0


SIDE = """\
name = "Side-small"
class = "Side"
prefix = "side_model."
keys = 2
parameters = 4_160
[tensors]
a.weight = [64, 64]
b.weight = [8, 8]
"""


@pytest.fixture
def stranger(folder: Folder) -> Folder:
    """With a model and a component in it that its architecture has no slot for."""
    folder.write("db/Side.toml", SIDE)
    side = {"side_model.a.weight": values([[1.5] * 64] * 64), "side_model.b.weight": small(8, 8)}
    save(folder / "a.safetensors", {**model("SD-mini", DType.F16), **side, "x.y": small(2)})
    return replace(folder, environment={"CKPT_COMPONENTS": str(folder / "db")})


def test_a_component_without_a_slot_goes_and_is_named(stranger: Folder) -> None:
    said = stranger("prune", "a.safetensors", "-o", "b.safetensors")
    assert said.code == 0, said.err
    row = "Side-small    16.5 kB  2 tensors: SD-mini has no slot for it; `--keep Side` keeps it\n"
    assert f"  goes   {row}" in said.out
    before, after = content(stranger / "a.safetensors"), content(stranger / "b.safetensors")
    assert before.keys() - after.keys() == {"side_model.a.weight", "side_model.b.weight"}
    assert all(after[n] == before[n] for n in after)
    inspected = stranger("inspect", "a.safetensors")
    assert inspected.code == 0 and "SD-mini has no slot for `Side-small`" in inspected.out
    (one,) = stranger("inspect", "a.safetensors", "--json").json["files"]
    (told,) = stranger("prune", "a.safetensors", "--dry-run", "--json").json["files"]
    assert one["pruned"] == told["left"] == sum(len(d) for _, _, d in after.values())


@pytest.mark.parametrize("word", ["Side", "Side-small", "side_model.*"])
def test_keeping_a_component_without_a_slot(stranger: Folder, word: str) -> None:
    saved = ("--save-recipe", "b.toml")
    said = stranger("prune", "a.safetensors", "--keep", word, "-o", "b.safetensors", *saved)
    assert said.code == 0, said.err
    assert content(stranger / "b.safetensors") == content(stranger / "a.safetensors")
    assert '    "Side",\n' in (stranger / "b.toml").read_text()
    again = stranger("build", "b.toml", "-o", "c.safetensors")
    assert again.code == 0, again.err
    assert (stranger / "b.safetensors").read_bytes() == (stranger / "c.safetensors").read_bytes()
    wrong = stranger("prune", "a.safetensors", "--keep", "Sides", "-o", "d.safetensors")
    assert wrong.code == 2 and "did you mean `Side`?" in wrong.err


def test_a_build_names_a_component_without_a_slot(stranger: Folder) -> None:
    recipe = 'format = 1\nname = "r"\nbase = "a"\nsources.a.file = "a.safetensors"\n'
    stranger.write("r.toml", recipe)
    said = stranger("build", "r.toml")
    assert said.code == 0, said.err
    assert "left out of `a`: Side-small, 2 tensors, 16.5 kB" in said.err
    assert "left out of `a`: unknown, 1 tensor, 4 B" in said.err
    stranger.write("r.toml", recipe + 'output.keep = ["Side"]\n')
    said = stranger("build", "r.toml")
    assert said.code == 0 and "Side-small" not in said.err
    kept = content(stranger / "r.safetensors")
    assert {n for n in kept if n.startswith("side_model.")} == {"side_model.a.weight", "side_model.b.weight"}
    stranger.write("r.toml", recipe + 'output.keep = ["Sides"]\n')
    assert "did you mean" in stranger("build", "r.toml").err


def test_most_of_a_file_does_not_go_without_a_slot(stranger: Folder) -> None:
    side = {"side_model.a.weight": small(64, 64), "side_model.b.weight": small(8, 8)}
    big = {f"loss.{n}": small(300, 1000) for n in range(3)}
    save(stranger / "b.safetensors", {**model("SD-mini", DType.F16), **side, **big})
    said = stranger("prune", "b.safetensors")
    assert said.code == 6 and "bytes are taken for junk, or have no slot" in said.err
