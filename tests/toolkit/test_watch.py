"""`ckpt prune --watch`: files go where they belong, and whatever happens nothing is lost."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from builder.base.errors import OutputError, UsageError
from builder.cli import run
from builder.cli.watching import _say
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write as write_safetensors
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.toolkit import watch as module
from builder.toolkit.demo import write_sources
from builder.toolkit.prune import Options
from builder.toolkit.watch import Event, Watch, layout_of
from builder.toolkit.whole_files import move
from tests.help.building import IDS, ROOT, Folder, catalog, content, model, save, save_dirty
from tests.help.building import like as filled

DOCS = ROOT / "docs" / "commands.md"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`in` is watched, `models` is what it is sorted into."""
    made = Folder.below(tmp_path)
    (made / "in").mkdir()
    (made / "models").mkdir()
    return made


@pytest.fixture
def watch(folder: Folder) -> Iterator[Watch]:
    with folder.workspace() as workspace:
        yield Watch(folder / "in", folder / "models", "a1111", Options(), workspace, settle=0)


def tree(folder: Folder) -> list[str]:
    return sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if not p.is_dir())


def states(events: Iterator[Event]) -> dict[str, str]:
    return {e.path.name: e.state for e in events}


def like(count: int) -> LazyTensor:
    return MemoryTensor(DType.F32, (count,), bytes(4 * count))


def some_of_each(folder: Folder) -> None:
    save_dirty(folder / "in/NAI.ckpt")
    save(folder / "in/nai.vae.pt", model("VAE-tiny", DType.F32))
    save(folder / "in/style.safetensors", model("LoRA-v1-CLIP", DType.F16))
    save(folder / "in/unet.safetensors", model("UNET-tiny-SD", DType.F32))
    save(folder / "in/clip.safetensors", model("CLIP-tiny-SD", DType.F16))
    save(folder / "in/strange.safetensors", {"x": like(3)})
    (folder / "in/page.ckpt").write_text("<!doctype html><html>401 no token</html>")


@pytest.mark.parametrize("layout", ["a1111", "comfyui"])
def test_everything_goes_where_it_belongs(folder: Folder, layout: str) -> None:
    some_of_each(folder)
    args = ("--into", "models", "--layout", layout, "--once", "--settle", "0")
    said = folder("prune", "--watch", "in", *args)
    assert said.code == 6, said.err
    at = catalog().programs[layout]
    assert tree(folder) == sorted(
        [
            "in/Failed/page.ckpt",
            "in/Failed/page.txt",
            "in/strange.safetensors",
            f"models/{at['checkpoint']}/NAI.safetensors",
            f"models/{at['VAE']}/nai.vae.safetensors",
            f"models/{at['LoRA']}/style.safetensors",
            f"models/{at.get('UNET', at['other'])}/unet.safetensors",
            f"models/{at['CLIP']}/clip.safetensors",
        ]
    )
    assert "an HTML or XML page" in (folder / "in/Failed/page.txt").read_text()
    stays = "stays    strange.safetensors  not pruned: nothing in the catalog matches these tensors\n"
    assert stays in said.out
    for event in ("pruned   NAI.ckpt → models/", "moved    style.safetensors → ", "failed   page.ckpt → "):
        assert event in said.out
    model_ = folder / f"models/{at['checkpoint']}/NAI.safetensors"
    assert folder("inspect", model_, "--json").json["files"][0]["ema"]["keys"] == 0
    with open_checkpoint(model_) as checkpoint:
        assert json.loads(checkpoint.metadata["pruned_from"])["file"] == "NAI.ckpt"
    again = folder("prune", "--watch", "in", *args)
    assert (again.code, again.out) == (0, stays)


def test_the_example_in_the_docs(folder: Folder) -> None:
    """The demo's files, and one that is damaged."""
    write_sources(folder / "inbox")
    (folder / "inbox/demo.toml").unlink()
    whole = (folder / "inbox/good.vae.safetensors").read_bytes()
    (folder / "inbox/broken.safetensors").write_bytes(whole[:-1])
    said = folder("prune", "--watch", "inbox", "--into", "models", "--once", "--settle", "0", "-q")
    docs = DOCS.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n\$ ckpt prune --watch [^\n]*\n(.*?)^```$", docs, re.M | re.S)
    if os.environ.get("UPDATE_GOLDEN"):
        DOCS.write_text(docs.replace(block, said.out), encoding="utf-8")
    else:
        assert said.out == block


def test_what_is_tidy_keeps_its_bytes(folder: Folder, watch: Watch) -> None:
    path = save(folder / "in/style.safetensors", model("LoRA-v1-CLIP", DType.F16))
    data, inode = path.read_bytes(), path.stat().st_ino
    assert states(watch.poll()) == {"style.safetensors": "moved"}
    moved = folder / "models/Lora/style.safetensors"
    assert moved.read_bytes() == data and moved.stat().st_ino == inode and moved.stat().st_nlink == 1


MODULE = "lora_te2_text_model_encoder_layers_0_mlp_fc1"


def half(*shape: int) -> LazyTensor:
    return MemoryTensor(DType.F16, shape, bytes(2 * prod(shape)))


def named(*names: str) -> dict[str, LazyTensor]:
    return {name: half(2, 2) for name in names}


KINDS: dict[str, tuple[str, dict[str, LazyTensor]]] = {  # name of a file: its kind, what is in it
    "xl.safetensors": (
        "LoRA",
        {f"{MODULE}.lora_down.weight": half(4, 8), f"{MODULE}.lora_up.weight": half(8, 4)},
    ),
    "loha.safetensors": ("LoRA", named("lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b")),
    "lokr.safetensors": ("LoRA", named("lycoris_x.lokr_w1", "lycoris_x.lokr_w2")),
    "bad-hands.pt": ("embedding", {"string_to_param.*": half(2, 768)}),
    "xl-words.safetensors": ("embedding", {"clip_l": half(1, 768), "clip_g": half(1, 1280)}),
    "params.safetensors": ("embedding", {"emb_params": half(1, 768)}),
    "learned_embeds.bin": ("embedding", {"<cat>": half(768)}),
    "hyper.pt": ("hypernetwork", named("768.0.linear.0.weight", "768.1.linear.0.weight")),
    "clip_l.safetensors": ("CLIP", named("text_model.encoder.layers.0.self_attn.q_proj.weight")),
    "vae.pt": ("VAE", named("decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up_blocks.0.x")),
    "qwen.safetensors": ("LLM", named("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")),
    "flux.safetensors": ("DIT", named("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight")),
    "4x.pth": ("upscaler", named("RRDB_trunk.0.RDB1.conv1.weight", "conv_first.weight")),
}


@pytest.mark.parametrize("layout", ["a1111", "comfyui"])
def test_files_go_by_what_they_say_of_themselves(folder: Folder, layout: str) -> None:
    """As they are: no table says what of them could go. The name keeps its suffix, which programs go by."""
    at = catalog().programs[layout]
    expected = set()
    for name, (kind, tensors) in KINDS.items():
        form = ".safetensors" if name.endswith(".safetensors") else ".pt"
        save(folder / f"new{form}", tensors).rename(folder / "in" / name)
        expected.add(f"models/{at.get(kind, at['other']).removeprefix('../')}/{name}")
    before = {name: (folder / "in" / name).read_bytes() for name in KINDS}
    said = folder("prune", "--watch", "in", "--into", "models", "--layout", layout, "--once", "--settle", "0")
    assert (said.code, said.err) == (0, "")
    assert set(tree(folder)) == expected
    for path in map(folder.path.joinpath, expected):
        assert path.read_bytes() == before[path.name]
    assert re.search(r"moved +xl.safetensors → \S+ +\S+ .?B  a LoRA of SD XL, rank 4\n", said.out), said.out


def test_embeddings_lie_beside_the_models_of_a_webui(folder: Folder, watch: Watch) -> None:
    (folder / "embeddings").mkdir()
    save(folder / "in/a.pt", {"string_to_param.*": half(2, 768)})
    assert states(watch.poll()) == {"a.pt": "moved"}
    assert tree(folder) == ["embeddings/a.pt"]


def test_what_is_not_broken_does_not_fail(folder: Folder, watch: Watch) -> None:
    """What is unknown, nearly known, or does not fit the precision stays, and is told once."""
    save(folder / "in/strange.safetensors", {"x": like(3)})
    near = dict(model("VAE-mini", DType.F16))
    del near["quant_conv.weight"]
    save(folder / "in/near.safetensors", near)
    big = dict(model("SD-mini", DType.F32))
    name = "first_stage_model.decoder.conv_out.bias"
    big[name] = filled(big[name], 1e6)
    save(folder / "in/big.safetensors", big)
    found = list(watch.poll())
    assert {e.path.name: e.state for e in found} == dict.fromkeys(
        ("strange.safetensors", "near.safetensors", "big.safetensors"), "stays"
    )
    assert "`--overflow clamp`" in {e.path.name: e for e in found}["big.safetensors"].problems[0].fact
    assert list(watch.poll()) == []
    assert tree(folder) == ["in/big.safetensors", "in/near.safetensors", "in/strange.safetensors"]
    save(folder / "in/strange.safetensors", {"x": like(5)})
    assert states(watch.poll()) == {"strange.safetensors": "stays"}
    said = folder(
        "prune", "--watch", "in", "--into", "models", "--once", "--settle", "0", "--overflow", "clamp"
    )
    assert said.code == 0 and "pruned   big.safetensors" in said.out


def test_fixes_while_watching(folder: Folder) -> None:
    tensors = dict(model("SD-mini", DType.F16))
    whole = bytes(tensors[IDS].tobytes())
    tensors[IDS] = MemoryTensor(DType.I64, (1, 77), b"\1" + whole[1:])
    save(folder / "in/a.safetensors", tensors)
    args = ("--into", "models", "--once", "--settle", "0", "--fix", "clip-position-ids")
    said = folder("prune", "--watch", "in", *args)
    assert said.code == 0 and "pruned   a.safetensors" in said.out
    assert content(folder / "models/Stable-diffusion/a.safetensors")[IDS][2] == whole


def test_twins_are_put_there_once(folder: Folder, watch: Watch) -> None:
    """Under whatever name; a file that says something else of itself is another one."""
    save_dirty(folder / "in/a.ckpt")
    shutil.copy(folder / "in/a.ckpt", folder / "in/b.ckpt")
    save(folder / "in/vae.safetensors", model("VAE-mini", DType.F16))
    shutil.copy(folder / "in/vae.safetensors", folder / "in/twin.safetensors")
    save(folder / "in/words.pt", {"emb_params": half(1, 768)})
    shutil.copy(folder / "in/words.pt", folder / "in/twin.pt")
    found = list(watch.poll())
    assert sorted(e.state for e in found) == ["known", "known", "known", "moved", "moved", "pruned"]
    assert [p for p in tree(folder) if p.startswith("in/")] == [] and len(tree(folder)) == 3
    known = next(e for e in found if e.path.name == "b.ckpt")
    assert known.target == folder / "models/Stable-diffusion/a.safetensors"
    save_dirty(folder / "in/c.ckpt", seed=1)
    assert states(watch.poll()) == {"c.ckpt": "pruned"}
    deep = {"pruned_from": "[" * 2000}  # by a stranger
    write_safetensors(folder / "models/Stable-diffusion/deep.safetensors", model("SD-mini", DType.F16), deep)
    tensors = {**model("SD-mini", DType.F32), "loss.x": like(2)}
    for name, said in (("d", {"author": "x"}), ("e", {"author": "y"}), ("f", {"author": "x"})):
        write_safetensors(folder / f"in/{name}.safetensors", tensors, said)
    assert states(watch.poll()) == {
        "d.safetensors": "pruned", "e.safetensors": "pruned", "f.safetensors": "known",
    }  # fmt: skip
    write_safetensors(folder / "in/g.safetensors", tensors, {"author": "x"})
    folder.write("in/g.yaml", "model: its own")
    assert states(watch.poll()) == {"g.safetensors": "pruned"}
    assert (folder / "models/Stable-diffusion/g.yaml").exists()
    for name, text, state in (("h", "model: its own", "known"), ("i", "model: another", "pruned")):
        write_safetensors(folder / f"in/{name}.safetensors", tensors, {"author": "x"})
        folder.write(f"in/{name}.yaml", text)
        before = tree(folder)
        (event,) = watch.poll()
        assert event.state == state and not (folder / f"in/{name}.yaml").exists()
        assert state == "pruned" or event.target == folder / "models/Stable-diffusion/g.safetensors"
        assert len(tree(folder)) == len(before) - 2 * (state == "known")


def test_subfolders(folder: Folder) -> None:
    """With -r only; folders that are models, hidden ones, links and those that files are put in stay."""
    lora = KINDS["xl.safetensors"][1]
    for place in ("deep/er", ".hidden", "model", "Failed", "Lora", "link-to"):
        save(folder / f"in/{place}/xl.safetensors", {**lora, f"{place}.lora_up.weight": half(8, 4)})
    folder.write("in/model/model_index.json", "{}")
    folder.write("in/deep/page.pt", "<html>")
    (folder / "in/link-to").rename(folder / "elsewhere")
    (folder / "in/link").symlink_to(folder / "elsewhere")
    before = tree(folder)
    assert folder("prune", "--watch", "in", "--once", "--settle", "0").out == ""
    assert tree(folder) == before
    said = folder("prune", "--watch", "in", "--once", "--settle", "0", "-r")
    assert said.code == 6
    assert "moved    deep/er/xl.safetensors → in/Lora/xl(1).safetensors" in said.out
    assert "failed   deep/page.pt → in/Failed/page.pt" in said.out
    changed = {"in/deep/er/xl.safetensors", "in/deep/page.pt"}
    new = {"in/Lora/xl(1).safetensors", "in/Failed/page.pt", "in/Failed/page.txt"}
    assert set(tree(folder)) == set(before) - changed | new
    assert folder("prune", "--watch", "in", "--once", "--settle", "0", "-r").out == ""


def test_names_that_are_taken(folder: Folder, watch: Watch) -> None:
    for seed in range(3):
        save_dirty(folder / "in/NAI.ckpt", seed=seed)
        assert states(watch.poll()) == {"NAI.ckpt": "pruned"}
        save(folder / "in/vae.safetensors", model("VAE-tiny", DType.F16, seed=seed))
        assert states(watch.poll()) == {"vae.safetensors": "moved"}
        (folder / "in/bad.pt").write_text(f"<html>{seed}")
        assert states(watch.poll()) == {"bad.pt": "failed"}
    names = ["NAI(1).safetensors", "NAI(2).safetensors", "NAI.safetensors"]
    assert sorted(p.name for p in (folder / "models/Stable-diffusion").iterdir()) == names
    assert sorted(p.name for p in (folder / "models/VAE").iterdir()) == [
        "vae(1).safetensors",
        "vae(2).safetensors",
        "vae.safetensors",
    ]
    failed = sorted(p.name for p in (folder / "in/Failed").iterdir())
    assert failed == ["bad(1).pt", "bad(1).txt", "bad(2).pt", "bad(2).txt", "bad.pt", "bad.txt"]
    for number in range(3):
        name = f"bad({number})" if number else "bad"
        assert (folder / f"in/Failed/{name}.pt").read_text() == f"<html>{number}"


def test_what_is_there_already_is_known_by_its_content(folder: Folder, watch: Watch) -> None:
    save_dirty(folder / "in/NAI.ckpt")
    save(folder / "in/vae.safetensors", model("VAE-tiny", DType.F16))
    assert set(states(watch.poll()).values()) == {"pruned", "moved"}
    before = tree(folder)
    save_dirty(folder / "in/NAI.ckpt")
    save(folder / "in/other name.safetensors", model("VAE-tiny", DType.F16))
    assert states(watch.poll()) == {"NAI.ckpt": "known", "other name.safetensors": "known"}
    assert tree(folder) == before


def test_what_is_left_alone(folder: Folder, watch: Watch, tmp_path: Path) -> None:
    outside = save_dirty(tmp_path / "outside.ckpt")
    (folder / "in/link.ckpt").symlink_to(outside)
    (folder / "in/dangling.ckpt").symlink_to("nowhere")
    (folder / "in/sub.ckpt").mkdir()
    save_dirty(folder / "in/sub.ckpt/deep.ckpt")
    os.mkfifo(folder / "in/pipe.ckpt")
    whole = save_dirty(folder / "in/.hidden.ckpt")
    for name in ("a.ckpt.part", "b.ckpt.crdownload", "c.tmp", "d.ckpt~", "e.txt"):
        shutil.copy(whole, folder / f"in/{name}")
    for name, beside in (("f.ckpt", "f.ckpt.part"), ("g.ckpt", "g.ckpt.aria2")):
        shutil.copy(whole, folder / f"in/{name}")
        (folder / f"in/{beside}").touch()
    save(folder / "in/set-00001-of-00002.safetensors", model("VAE-tiny"))
    before = tree(folder)
    assert list(watch.poll()) == [] and watch.waiting == [] and tree(folder) == before
    (folder / "in/f.ckpt.part").unlink()
    assert states(watch.poll()) == {"f.ckpt": "pruned"}


def test_what_is_taken_away_at_once_has_no_size(
    folder: Folder, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder / "in/a.safetensors", model("SD-tiny", DType.F16))
    (event,) = watch.poll()
    assert event.target is not None
    event.target.unlink()
    assert _say(event, watch.folder) == 0
    assert capsys.readouterr().out.startswith(f"moved    a.safetensors → {event.target}")


def test_a_half_copied_file_waits(folder: Folder, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save_dirty(folder / "whole.ckpt").read_bytes()
    path = folder / "in/a.ckpt"
    path.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(module, "PATIENCE", float("inf"))
    watch.settle = 1e-9
    assert list(watch.poll()) == []  # it does not open
    watch.settle = 3600
    path.write_bytes(data)
    assert list(watch.poll()) == [] and watch.waiting == [path]  # it has just changed
    watch.settle = 0
    with path.open("ab"):
        assert list(watch.poll()) == [] and watch.waiting == [path]  # somebody is writing to it
    assert states(watch.poll()) == {"a.ckpt": "pruned"}


def test_what_never_becomes_whole_is_given_up(folder: Folder, watch: Watch) -> None:
    data = save_dirty(folder / "whole.ckpt").read_bytes()
    (folder / "in/a.ckpt").write_bytes(data[: len(data) // 2])
    (folder / "in/empty.safetensors").touch()
    assert states(watch.poll()) == {"a.ckpt": "failed", "empty.safetensors": "failed"}
    assert (folder / "in/Failed/a.ckpt").read_bytes() == data[: len(data) // 2]


def test_a_file_that_changes_meanwhile_is_not_removed(
    folder: Folder, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_dirty(folder / "in/a.ckpt")
    real = module.verify_on_disk

    def changing(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        save_dirty(path, seed=4)

    monkeypatch.setattr(module, "verify_on_disk", changing)
    assert list(watch.poll()) == [] and watch.waiting == [path] and path.exists()
    monkeypatch.undo()
    assert states(watch.poll()) == {"a.ckpt": "pruned"}
    assert len(list((folder / "models/Stable-diffusion").iterdir())) == 2


@pytest.mark.parametrize("doing", ["same_file", "same_content", "move", "_fail"])
def test_a_file_that_takes_its_place_meanwhile_is_not_removed(
    folder: Folder, watch: Watch, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    """While it is compared with its twin, as it is or pruned, while it is moved, or given up."""
    path = folder / "in/b.safetensors"
    for name in ("a", "b") if doing.startswith("same") else ("b",):
        if doing == "_fail":
            path.write_bytes(b"none")
        elif doing == "same_content":
            save_dirty(folder / f"in/{name}.safetensors")
        else:
            save(folder / f"in/{name}.safetensors", model("SD-tiny", DType.F16))
        if name == "a":
            assert len(list(watch.poll())) == 1
    place: object = Watch if doing == "_fail" else module
    real = getattr(place, doing)

    def slow(*args: object) -> object:
        (folder / "new").write_bytes(b"what nobody has read")
        (folder / "new").replace(path)
        return real(*args)

    monkeypatch.setattr(place, doing, slow)
    assert list(watch.poll()) == [] and watch.waiting == [path]
    assert path.read_bytes() == b"what nobody has read"


def test_the_original_stays_unless_the_product_is_right(
    folder: Folder, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_dirty(folder / "in/a.ckpt")
    real = module.prune

    def failing_disk(*args: object, **options: object) -> object:
        made = real(*args, **options)  # type: ignore[arg-type]
        target = made.outputs[0].path
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
        return made

    monkeypatch.setattr(module, "prune", failing_disk)
    (event,) = watch.poll()
    assert event.state == "kept" and path.exists()
    assert event.problems[0].fact == "what is on the disk is not what was written"
    assert list(watch.poll()) == []  # not at once again


def test_values_that_are_none_fail_and_a_full_disk_does_not(
    folder: Folder, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dict(model("SD-tiny", DType.F32))
    name = "decoder.conv_out.bias"
    tensors[f"first_stage_model.{name}"] = MemoryTensor(DType.F32, (5,), b"\0\0\xc0\x7f" * 5)
    save(folder / "in/nan.ckpt", tensors)
    save_dirty(folder / "in/whole.ckpt")
    from builder.base.errors import Problem

    def full(*args: object, **options: object) -> object:
        raise OutputError(Problem("cannot write", evidence=("No space left on device",)))

    assert states(watch.poll()) == {"nan.ckpt": "failed", "whole.ckpt": "pruned"}
    assert name in (folder / "in/Failed/nan.txt").read_text()
    save_dirty(folder / "in/more.ckpt", seed=2)
    monkeypatch.setattr(module, "prune", full)
    assert states(watch.poll()) == {"more.ckpt": "kept"}
    assert (folder / "in/more.ckpt").exists()


def test_the_configuration_goes_along(folder: Folder, watch: Watch) -> None:
    save_dirty(folder / "in/a.ckpt")
    save(folder / "in/b.safetensors", model("SD-tiny", DType.F16))
    for name in "ab":
        folder.write(f"in/{name}.yaml", f"model: {name}\n")
    assert states(watch.poll()) == {"a.ckpt": "pruned", "b.safetensors": "moved"}
    names = ("a.safetensors", "a.yaml", "b.safetensors", "b.yaml")
    assert tree(folder) == [f"models/Stable-diffusion/{n}" for n in names]
    assert (folder / "models/Stable-diffusion/b.yaml").read_text() == "model: b\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes of a name")
def test_a_pipe_where_its_yaml_would_go_holds_nothing_up(folder: Folder, watch: Watch) -> None:
    save_dirty(folder / "in/a.ckpt")
    folder.write("in/a.yaml", "model: a\n")
    (folder / "models/Stable-diffusion").mkdir()
    os.mkfifo(folder / "models/Stable-diffusion/a.yaml")
    assert states(watch.poll()) == {"a.ckpt": "pruned"}
    assert (folder / "in/a.yaml").read_text() == "model: a\n"


def test_why_a_yaml_stays_is_said_once(folder: Folder) -> None:
    for name, put in (
        ("a", lambda p: p.symlink_to("x")),
        ("b", lambda p: p.mkdir()),
        ("c", _large),
        ("d", _other),
    ):
        save(folder / f"in/{name}.safetensors", {**model("SD-tiny", DType.F16), name: like(1)})
        save(folder / f"{name}.safetensors", {**model("SD-tiny", DType.F32), "model_ema.decay": like(1)})
        for place in (folder / f"in/{name}.yaml", folder / f"{name}.yaml"):
            put(place)
    (folder / "models/Stable-diffusion").mkdir(parents=True)
    folder.write("models/Stable-diffusion/d.yaml", "another")
    folder.write("d-pruned.yaml", "another")
    said = folder("prune", "--watch", "in", "--into", "models", "--once", "--settle", "0")
    assert said.code == 0, said.err
    for name in "abcd":
        assert said.err.count(f"`{name}.yaml` does not go with it: ") == 1, said.err
        told = folder("prune", f"{name}.safetensors")
        assert told.code == 0 and told.err.count(f"`{name}.yaml` does not go with it: ") == 1, told.err


def _large(path: Path) -> None:
    path.write_bytes(b" " * (64 << 20))


def _other(path: Path) -> None:
    path.write_text("one")


def test_a_link_where_what_is_broken_would_go(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "in/Failed").symlink_to(tmp_path / "elsewhere")
    (folder / "in/page.ckpt").write_text("<!doctype html><html></html>")
    said = folder("prune", "--watch", "in", "--into", "models", "--once", "--settle", "0")
    assert said.code == 2 and "Failed` is a link to elsewhere" in said.err
    assert not list((tmp_path / "elsewhere").iterdir()) and (folder / "in/page.ckpt").exists()


def test_moving_never_replaces_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    one, place = tmp_path / "a.x", tmp_path / "to/a.x"
    place.parent.mkdir()
    one.write_text("one")
    place.write_text("two")
    assert move(one, place, one.stat()) == tmp_path / "to/a(1).x" and not one.exists()
    assert (place.read_text(), (tmp_path / "to/a(1).x").read_text()) == ("two", "one")
    os.link(tmp_path / "to/a(1).x", one)  # as after a kill between the two names
    assert move(one, place, one.stat()) == tmp_path / "to/a(1).x" and not one.exists()
    assert sorted(p.name for p in place.parent.iterdir()) == ["a(1).x", "a.x"]


@pytest.mark.parametrize("error", ["EXDEV", "EPERM"])
def test_moving_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """To another file system, or on one that knows no hard links."""
    import errno

    def refuse(*args: object, **options: object) -> None:
        raise OSError(getattr(errno, error), error)

    one, place = tmp_path / "a.x", tmp_path / "to/a.x"
    place.parent.mkdir()
    one.write_bytes(bytes(range(256)) * 1000)
    place.write_text("two")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        patch.setattr("builder.base.disk.NAMELESS", False)
        assert move(one, place, one.stat()) == tmp_path / "to/a(1).x"
    assert not one.exists() and (tmp_path / "to/a(1).x").read_bytes() == bytes(range(256)) * 1000
    assert place.read_text() == "two"


def test_another_file_system_for_real(folder: Folder, watch: Watch) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == folder.path.stat().st_dev or not os.access(shm, os.W_OK):
        pytest.skip("no second file system at hand")
    import tempfile

    with tempfile.TemporaryDirectory(dir=shm) as other:
        watch.into = Path(other)
        data = save(folder / "in/style.safetensors", model("LoRA-v1-CLIP", DType.F16)).read_bytes()
        save_dirty(folder / "in/a.ckpt")
        assert states(watch.poll()) == {"a.ckpt": "pruned", "style.safetensors": "moved"}
        assert (Path(other) / "Lora/style.safetensors").read_bytes() == data


def test_kinds_and_layouts(tmp_path: Path) -> None:
    from builder.models.identify import identify
    from builder.models.kinds_of_file import kind_of_file

    for name, expected in (
        ("SD-tiny", "checkpoint"),
        ("VAE-tiny", "VAE"),
        ("LoRA-v1-UNET", "LoRA"),
        ("LoRA-v1", "LoRA"),
        ("UNET-tiny-EMA", "EMA"),
        ("ControlNet-v1", "ControlNet"),
        ("T5-XXL", "T5"),
    ):
        from benchmarks.generate import make

        tensors = make(name, content="sparse", catalog=catalog()).tensors
        found = kind_of_file(tensors, {}, identify(tensors, catalog()), catalog())
        assert found is not None and found.kind == expected
    assert layout_of(tmp_path, catalog()) == "a1111"
    (tmp_path / "checkpoints").mkdir()
    assert layout_of(tmp_path, catalog()) == "comfyui"
    (tmp_path / "Stable-diffusion").mkdir()
    assert layout_of(tmp_path, catalog()) == "a1111"


def test_usage(folder: Folder, watch: Watch) -> None:
    (folder / "models/VAE").mkdir()
    for args, code in (
        (["--watch", "nowhere", "--once"], 2),
        (["--watch", "in", "--into", "nowhere", "--once"], 2),
        (["--watch", "models/VAE", "--into", "models", "--once"], 2),
        (["--watch", "in", "x.ckpt"], 2),
        (["--once", "x.ckpt"], 2),
        (["--watch", "in", "--json"], 2),
        (["--watch", "in", "--once"], 0),
    ):
        said = folder("prune", *args)
        assert said.code == code and "Traceback" not in said.err, said
    with watch.alone(), pytest.raises(UsageError, match="watched already"), watch.alone():
        pass
    fd = os.open(folder / "in", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    busy = folder("prune", "--watch", "in", "--once")
    os.close(fd)
    assert busy.code == 2 and "watched already" in busy.err


# Every process begins with what takes longest to import, so that a test can start and kill many.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "builder.cli.prune"])


def _run(path: Path, variables: dict[str, str], args: list[str]) -> None:
    os.environ.update(variables)
    os.chdir(path)
    with open("out.txt", "w") as out, open("err.txt", "w") as err:  # noqa: PTH123
        sys.stdout, sys.stderr = out, err
        code = run(["prune", "--watch", "in", "--into", "models", "--settle", "0", *args])
    os._exit(code)


def start(folder: Folder, *args: str) -> BaseProcess:
    """`ckpt prune --watch` as a process of its own."""
    process = PROCESSES.Process(target=_run, args=(folder.path, folder.variables, list(args)))
    process.start()
    return process


def until(met: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until a condition is met; fail when the process ends before."""
    while not met():
        assert process.is_alive()
        time.sleep(0.02)


def test_files_that_arrive_and_a_clean_interrupt(folder: Folder) -> None:
    def pruned(count: int) -> bool:
        said = folder / "out.txt"
        return said.exists() and said.read_text().count("pruned") == count

    save_dirty(folder / "in/a.ckpt")
    process = start(folder)
    until(lambda: pruned(1), process)
    save_dirty(folder / "later.ckpt", seed=3)
    (folder / "later.ckpt").rename(folder / "in/later.ckpt")
    until(lambda: pruned(2), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    said = (folder / "err.txt").read_text()
    assert process.exitcode == 0 and "Traceback" not in said and "stopped" in said
    for name in ("out.txt", "err.txt"):
        (folder / name).unlink()
    assert tree(folder) == [f"models/Stable-diffusion/{n}.safetensors" for n in ("a", "later")]


def test_killed_at_any_moment_nothing_is_lost(folder: Folder, tmp_path: Path) -> None:
    """Until its product is whole each original is there; in the end there is one product each."""
    sources, expected = {}, {}
    for seed in range(2):
        path = save_dirty(tmp_path / f"m{seed}.ckpt", seed=seed)
        sources[path.name] = path.read_bytes()
        reference = Folder(tmp_path, tmp_path / "reference-store")
        assert reference("prune", path.name).code == 0
        expected[path.stem] = content(tmp_path / f"m{seed}-pruned.safetensors")
    vae = save(tmp_path / "v.safetensors", model("VAE-tiny", DType.F16))
    sources[vae.name], expected["v"] = vae.read_bytes(), content(vae)
    (tmp_path / "bad.ckpt").write_text("<html>")
    sources["bad.ckpt"] = b"<html>"
    for name, data in sources.items():
        (folder / f"in/{name}").write_bytes(data)

    def product(name: str) -> Path:
        if name == "bad.ckpt":
            return folder / "in/Failed/bad.ckpt"
        place = "VAE" if name.startswith("v") else "Stable-diffusion"
        return folder / f"models/{place}/{Path(name).stem}.safetensors"

    def check() -> None:
        for name, data in sources.items():
            if (folder / f"in/{name}").exists():
                assert (folder / f"in/{name}").read_bytes() == data
            elif name == "bad.ckpt":
                assert product(name).read_bytes() == data
            else:
                assert content(product(name)) == expected[Path(name).stem]

    kills = 0
    while any((folder / f"in/{name}").exists() for name in sources):
        process = start(folder, "--once")
        process.join(0.04 * kills if kills < 12 else None)  # a little later each time
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        check()
    assert kills
    for name in ("out.txt", "err.txt"):
        (folder / name).unlink()
    extra = {"in/Failed/bad.txt"}
    assert set(tree(folder)) - extra == {str(product(n).relative_to(folder.path)) for n in sources}
