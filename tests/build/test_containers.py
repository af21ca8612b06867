"""Outputs of several files, and outputs with all of their base: planned, built and verified as any other."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch

from builder.formats import open_checkpoint
from builder.recipe.lock import read_lock
from tests.help.building import RECIPE as TINY
from tests.help.building import (
    Folder,
    catalog,
    content,
    files,
    model,
    save,
    save_dirty,
    values,
)

RECIPE = TINY.replace("tiny", "mini")  # diffusers has a layout for it
SET = "mini.safetensors.index.json"
PARTS = {
    "set": f'[output]\nfile = "{SET}"\nshard_size = "500kB"\n',
    "folder": '[output]\nfile = "model/"\nshard_size = 500_000\ntokenizer = "words"\n',
}
VERBATIM = (
    'format = 1\nname = "v"\nbase = "m"\nsources.m.file = "{}"\n[output]\nfile = "{}"\nverbatim = true\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path).mini()
    made.write("words/vocab.json", "{}")
    made.write("words/merges.txt", "#version: 0.2\n")
    made.write("one.toml", RECIPE.replace('"mini"', '"one"'))
    for name, output in PARTS.items():
        made.write(f"{name}.toml", RECIPE + output)
    return made


def only(made: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    (output,) = made["outputs"]
    return output


@pytest.mark.parametrize("kind", PARTS)
def test_several_files_are_built_once(folder: Folder, kind: str) -> None:
    """They hold what one file does, stay where nothing has changed, and are all verified."""
    one = only(folder.build("one.toml"))
    before = files(folder.path)
    first = only(folder.build(f"{kind}.toml"))
    place = folder / first["path"]
    assert (first["state"], first["metric"]) == ("written", one["metric"])
    assert content(place) == content(folder / "one.safetensors")
    assert first["tensor_digest"] == one["tensor_digest"]
    new = {n for n in files(folder.path) - before if (folder / n).is_file() and ".lock." not in n}
    assert first["size"] == sum((folder / n).stat().st_size for n in new)
    locked = read_lock(folder / f"{kind}.lock.toml")
    assert locked is not None and asdict(locked.outputs["mini"]) == {
        "file": {"folder": "model/", "set": SET}[kind],
        **{key: first[key] for key in ("sha256", "tensor_digest", "size", "metric")},
        "date": "",
    }
    stamps = {n: (folder / n).stat().st_mtime_ns for n in new}
    with open_checkpoint(place, catalog().layouts) as held:
        assert held.metadata["ckpt.recipe"] == "mini"

    assert only(folder.build(f"{kind}.toml", "--locked")) == {**first, "state": "unchanged"}
    assert folder.states(f"{kind}.toml")[f"output {'model/' if kind == 'folder' else SET}"] == "unchanged"
    assert only(folder.build(f"{kind}.toml", "--check"))["state"] == "unchanged"
    said = folder("verify", f"{kind}.toml")
    assert said.code == 0 and first["sha256"] in said.out

    # Another store knows nothing: what is made is compared with what is there, which the lock names.
    other = folder.beside("other", store="other-store")
    again = only(other.build(f"{kind}.toml"))
    assert (again["state"], again["sha256"]) == ("unchanged", first["sha256"])
    assert {n: (folder / n).stat().st_mtime_ns for n in new} == stamps
    assert not [n for n in files(other.path) if ".ckpt-" in n]


@pytest.mark.parametrize("kind", PARTS)
def test_the_digest_is_that_of_a_source(folder: Folder, kind: str) -> None:
    made = only(folder.build(f"{kind}.toml"))
    name = Path(made["path"]).name
    folder.write(
        "next.toml",
        f'format = 1\nname = "next"\nbase = "m"\nsources.m.file = "{name}"\n'
        f'sources.m.sha256 = "{made["sha256"]}"\n',
    )
    folder.build("next.toml")
    assert content(folder / "next.safetensors") == content(folder / name)


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_there_is_not_replaced(folder: Folder, kind: str) -> None:
    """Not by other contents, and not where a file was changed, which `verify` names."""
    made = folder / only(folder.build(f"{kind}.toml"))["path"]
    recipe = (folder / f"{kind}.toml").read_text()
    folder.write(f"{kind}.toml", recipe.replace("[output]", '[output]\nprecision = "fp32"'))
    before = {n: (folder / n).stat().st_mtime_ns for n in files(folder.path)}
    said = folder("build", f"{kind}.toml")
    assert said.code == 7 and f"`{made.name}` exists already" in said.err
    assert {n: (folder / n).stat().st_mtime_ns for n in files(folder.path)} == before
    folder.write(f"{kind}.toml", recipe)
    (shard,) = sorted((made if kind == "folder" else folder.path).rglob("*-00001-of-*.safetensors"))[:1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    said = folder("verify", f"{kind}.toml")
    assert said.code == 7 and "is not the file that the lock names" in said.err
    said = folder("build", f"{kind}.toml")
    assert said.code == 7 and "exists already" in said.err and shard.read_bytes() == data


def test_a_changed_configuration_is_noticed(folder: Folder) -> None:
    folder.build("folder.toml")
    config = folder / "model/unet/config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    said = folder("build", "folder.toml")
    assert said.code == 7 and "exists already" in said.err
    shutil.rmtree(folder / "model")
    assert only(folder.build("folder.toml"))["state"] == "written"
    assert "silu" in config.read_text()


@pytest.mark.parametrize("kind", PARTS)
def test_killed_midway_nothing_looks_whole(folder: Folder, kind: str) -> None:
    before = files(folder.path)
    kill = "import os, pathlib\npathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
    assert folder.process("build", f"{kind}.toml", before=kill).code == -signal.SIGKILL
    left = files(folder.path) - before
    assert left and all(n.startswith(".ckpt-") for n in left)
    assert only(folder.build(f"{kind}.toml"))["state"] == "written"
    assert not [n for n in files(folder.path) if n.startswith(".ckpt-")]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("calls", [1, 2])
def test_killed_at_the_end_the_next_build_takes_what_is_there(folder: Folder, kind: str, calls: int) -> None:
    """What got its name, all of it or a first shard, although nothing is known of it, no lock either."""
    kill = (
        "import os, pathlib\nrename, calls = pathlib.Path.rename, []\n"
        "def last(*paths):\n rename(*paths)\n calls.append(paths)\n"
        f" if len(calls) == {calls} or {kind == 'folder'}: os.kill(os.getpid(), 9)\n"
        "pathlib.Path.rename = last\n"
    )
    assert folder.process("build", f"{kind}.toml", before=kill).code == -signal.SIGKILL
    assert [n for n in files(folder.path) if n.startswith(("model", "mini-", SET))]
    said = folder("build", f"{kind}.toml", "--check")
    assert said.code == 0, said.err
    assert folder("verify", f"{kind}.toml").code == 0
    assert not [n for n in files(folder.path) if n.startswith(".ckpt-")]


def test_other_programs_load_the_set(folder: Folder) -> None:
    folder.build("set.toml")
    index = json.loads((folder / SET).read_text())
    held = content(folder / SET)
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"mini-00001-of-{len(shards):05}.safetensors"
    found = {}
    for shard in shards:
        found |= safetensors.torch.load_file(folder / shard)
    assert {n: t.numpy().tobytes() for n, t in found.items()} == {n: data for n, (*_, data) in held.items()}


def test_a_folder_loads_in_diffusers(folder: Folder) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder.write("plain.toml", RECIPE + '[output]\nfile = "model/"\nprecision = "fp32"\n')
    said = folder("build", "plain.toml")
    assert said.code == 0 and "without a tokenizer" in said.err and "remainder.safetensors" in said.err
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet")
    parts, _ = catalog().layouts["SD-v1"].to_diffusers(model("SD-mini"))
    assert unet.state_dict().keys() == parts["unet"].keys()


def test_the_bytes_do_not_hang_on_threads_or_the_store(folder: Folder) -> None:
    """A second build takes components from where they lie, the first has made them."""
    other = folder.beside("other", store="other-store")
    other.build("one.toml")
    for kind in PARTS:
        folder.build(f"{kind}.toml", "--threads", 1)
        other.build(f"{kind}.toml", "--threads", 8)
    made = {n for n in files(folder.path) if n.startswith(("model/", "mini-", "mini.safe"))}
    for name in made:
        assert (folder / name).is_dir() or (other / name).read_bytes() == (folder / name).read_bytes()


def test_another_form_by_the_name_that_is_given(folder: Folder) -> None:
    folder.build("one.toml", "-o", "as-set.safetensors.index.json")
    folder.build("one.toml", "-o", "as-folder")
    folder.build("one.toml")
    assert content(folder / "as-folder") == content(folder / "as-set.safetensors.index.json")
    assert content(folder / "as-folder") == content(folder / "one.safetensors")
    assert not (folder / "as-set.lock.toml").exists()


# -- verbatim


@pytest.mark.parametrize("name", ["v.safetensors", "v.pt", "v.safetensors.index.json", "v/"])
def test_verbatim_keeps_every_tensor(folder: Folder, name: str) -> None:
    """Under its name, cast by the precision alone, and with no word added to its metadata."""
    tensors = {**model("SD-mini"), "what.is.this": values([1.0]), "loss.logvar": values(0.0)}
    save(folder / "m.safetensors", tensors)
    folder.write("v.toml", VERBATIM.format("m.safetensors", name) + 'precision = "keep"\n')
    made = only(folder.build("v.toml"))
    assert content(folder / made["path"]) == content(folder / "m.safetensors")
    with (
        open_checkpoint(folder / made["path"], catalog().layouts) as held,
        open_checkpoint(folder / "m.safetensors") as base,
    ):
        assert held.metadata == base.metadata or name == "v.pt"
    assert only(folder.build("v.toml"))["state"] == "unchanged"
    assert folder("verify", "v.toml").code == 0
    steps = folder.plan("v.toml")["steps"]
    assert [s["kind"] for s in steps] == ["source", "component", "output"]


def test_verbatim_casts_weights_alone(folder: Folder) -> None:
    save_dirty(folder / "m.safetensors", "mini")
    folder.write("v.toml", VERBATIM.format("m.safetensors", "v.safetensors"))
    folder.build("v.toml")
    assert content(folder / "v.safetensors") == content(folder / "m.safetensors")  # it is asked for
    folder.write("v.toml", VERBATIM.format("m.safetensors", "v.safetensors") + 'precision = "fp16"\n')
    folder.build("v.toml")
    before, after = content(folder / "m.safetensors"), content(folder / "v.safetensors")
    assert before.keys() == after.keys()
    assert after["alphas_cumprod"] == before["alphas_cumprod"]  # a noise schedule is no weight
    ids = next(n for n in before if n.endswith("position_ids"))
    assert (before[ids][0], after[ids][0]) == ("F32", "F16")  # as broken as it is
    # Touched, it is read again, found to be the same, and nothing is written.
    (folder / "m.safetensors").touch()
    assert only(folder.build("v.toml"))["state"] == "unchanged"


def test_a_component_of_a_verbatim_output(folder: Folder) -> None:
    folder.write("v.toml", VERBATIM.format("dirty.ckpt", "v.safetensors"))
    folder.write(
        "next.toml",
        'format = 1\nname = "next"\nbase = "NEW VAE-mini"\nsources.v.recipe = "v.toml"\n'
        'components.VAE-mini = "v"\n',
    )
    folder.build("next.toml")
    assert len(content(folder / "next.safetensors")) == len(model("VAE-mini"))


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (
            'file = "x.safetensors"\nshard_size = 5',
            3,
            "`shard_size` is for a sharded set or a diffusers folder",
        ),
        ('file = "x.safetensors.index.json"\nprediction = "v"', 3, "`prediction` is for a diffusers folder"),
        ('file = "x.ckpt"\ntokenizer = "words"', 3, "`tokenizer` is for a diffusers folder"),
        ('file = "x/"\nconfig = "x.yaml"', 3, "`config` is for one file, and `x/` is a diffusers folder"),
        ('file = "x/"\ntokenizer = "../words"', 3, "`tokenizer` leaves the recipe's folder"),
        ('file = "x/"\ntokenizer = "link"', 3, "a link leads out of it"),
        ('file = "x/"\ntokenizer = "empty"', 3, "cannot read `vocab.json` of `empty`"),
        ('file = "x/"\nshard_size = "much"', 3, "`shard_size` is no size"),
        ('file = "x/"\nshard_size = "0.1B"', 3, "`shard_size`"),
        ('file = "./"', 3, "`file` must end in"),
        ('file = "dirty.ckpt/"', 3, "the output would replace the source `dirty`"),
        ('file = "words/"', 7, "exists already"),
        ("verbatim = true", 3, "`components` cannot go with `verbatim`"),
    ],
)
def test_mistakes(folder: Folder, text: str, code: int, said: str) -> None:
    (folder / "empty").mkdir()
    (folder.path.parent / "elsewhere").mkdir()
    (folder.path.parent / "elsewhere/vocab.json").write_text("{}")
    (folder / "link").symlink_to("../elsewhere")
    folder.write("r.toml", RECIPE + f"[output]\n{text}\n")
    before = files(folder.path)
    found = folder("build", "r.toml")
    assert (found.code, said in found.err) == (code, True), found.err
    assert files(folder.path) == before


def test_outputs_share_no_files(folder: Folder) -> None:
    for first, second in (
        ("x/", "x/unet/y.safetensors"),
        ("a.safetensors.index.json", "a-00001-of-00003.safetensors"),
        ("x/", "X/"),
    ):
        folder.write(
            "r.toml",
            RECIPE + f'[[output]]\nname = "a"\nfile = "{first}"\n[[output]]\nname = "b"\nfile = "{second}"\n',
        )
        said = folder("build", "r.toml")
        assert said.code == 3, said.err
        assert "would hold another file" in said.err or "two outputs write" in said.err


def test_verbatim_is_of_a_file(folder: Folder) -> None:
    for base in ("NEW VAE-mini", "inner"):
        folder.write(
            "r.toml",
            f'format = 1\nname = "r"\nbase = "{base}"\noutput.verbatim = true\n'
            + 'sources.inner.recipe = "mini.toml"\n' * (base == "inner"),
        )
        said = folder("build", "r.toml")
        assert said.code == 3 and "only a file has tensors to be carried over verbatim" in said.err
    save(folder / "vae.safetensors", model("VAE-mini"))
    folder.write("r.toml", VERBATIM.format("vae.safetensors", "x/"))
    said = folder("build", "r.toml")
    assert said.code == 6 and "no model that diffusers' layout is known for" in said.err
