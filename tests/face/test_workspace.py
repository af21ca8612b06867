"""What Python is given: the same facts as the command line, as typed values."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from builder.tensors.lazy import DType, MemoryTensor
from ckpt_build import (
    CkptError,
    LockError,
    OutputError,
    Plan,
    RecipeError,
    Result,
    SourceError,
    UsageError,
    Workspace,
)
from tests.help import keys
from tests.help.building import VAE, Folder, content, files, model, save, values


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def work(folder: Folder) -> Workspace:
    return Workspace(environment=folder.variables, offline=True)


# -- files


def test_a_checkpoint_is_a_mapping(folder: Folder, work: Workspace) -> None:
    held = content(folder / "dirty.ckpt")
    with work.open(folder / "dirty.ckpt") as checkpoint:
        assert set(checkpoint) == held.keys() and len(checkpoint) == len(held) and "nothing" not in checkpoint
        assert checkpoint.container == "torch-zip" and checkpoint.metadata == {}
        assert "epoch" in checkpoint.others
        assert checkpoint.size == (folder / "dirty.ckpt").stat().st_size
        for name, tensor in checkpoint.items():
            assert (tensor.dtype, tensor.shape, tensor.tobytes()) == held[name]
            assert (tensor.name, tensor.nbytes) == (name, len(held[name][2]))
            array = tensor.numpy()
            assert array.shape == tensor.shape and array.tobytes() == held[name][2]
            assert torch.equal(tensor.torch(), torch.from_numpy(array))
        with pytest.raises(KeyError):
            checkpoint["nothing"]
    with pytest.raises(SourceError):
        tensor.tobytes()


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        (torch.float16, "float16"),
        (torch.bfloat16, None),
        (torch.float8_e4m3fn, None),
        (torch.float64, "float64"),
        (torch.int64, "int64"),
        (torch.uint8, "uint8"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
    ],
    ids=str,
)
def test_tensors_of_every_type(
    tmp_path: Path, work: Workspace, dtype: torch.dtype, array: str | None
) -> None:
    from safetensors.torch import save_file

    held = {"t": torch.arange(6).reshape(2, 3).to(dtype), "one": torch.ones((), dtype=dtype)}
    held["none"] = torch.zeros((0, 3), dtype=dtype)
    save_file(held, tmp_path / "x.safetensors")
    with work.open(tmp_path / "x.safetensors") as checkpoint:
        for name, tensor in checkpoint.items():
            found = tensor.torch()
            assert found.dtype is dtype and found.shape == held[name].shape
            assert found.reshape(-1).view(torch.uint8).equal(held[name].reshape(-1).view(torch.uint8))
            found.zero_()  # its memory is its own
            if array is None:
                with pytest.raises(TypeError, match=r"numpy has no .*`torch\(\)`"):
                    tensor.numpy()
            else:
                assert tensor.numpy().dtype == np.dtype(array) and tensor.numpy().flags.writeable


def test_elements_of_less_than_a_byte(tmp_path: Path, work: Workspace) -> None:
    held = {"f4": MemoryTensor(DType.F4, (2, 4), b"\x21\x43\x65\x87")}
    held["f6"] = MemoryTensor(DType.F6_E2M3, (4,), b"abc")
    with work.open(save(tmp_path / "x.safetensors", held)) as checkpoint:
        packed = checkpoint["f4"]
        assert (packed.shape, packed.numel, packed.nbytes) == ((2, 4), 8, 4)
        if hasattr(torch, "float4_e2m1fn_x2"):
            found = packed.torch()
            assert (
                found.shape == (2, 2)
                and bytes(found.view(torch.uint8).flatten().tolist()) == b"\x21\x43\x65\x87"
            )
        for tensor in checkpoint.values():
            with pytest.raises(TypeError):
                tensor.numpy()
        with pytest.raises(TypeError, match=r"has no F6_E2M3: `tobytes\(\)`"):
            checkpoint["f6"].torch()
        assert checkpoint["f6"].tobytes() == b"abc"


def test_an_inspection_says_what_the_command_does(folder: Folder, work: Workspace) -> None:
    report = work.inspect(folder / "dirty.ckpt", hashes=True)
    assert report.json == folder("inspect", folder / "dirty.ckpt", "--hashes", "--json").json["files"][0]
    assert f"{report}\n" == folder("inspect", folder / "dirty.ckpt", "--hashes").out
    assert (report.architecture, report.intact, report.sound) == ("SD-tiny", True, True)
    assert report.metric == report.json["metric"] and report.hashes == report.json["hashes"]
    assert [c.name for c in report.components] == [c["component"] for c in report.json["components"]]
    vae = report.component("VAE-tiny")
    assert vae is not None and vae.prefix == VAE and report.component("VAE-v1") is None
    assert f"blake3:{vae.digest}" in [c["digest"] for c in report.json["components"]]
    assert (report.ema.keys, report.ema.bytes) == (report.json["ema"]["keys"], report.json["ema"]["bytes"])
    assert [p.fact for p in report.faults] == [f["fact"] for f in report.json["faults"]] != []
    assert work.inspect(folder / "dirty.ckpt", metric=False).metric is None
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_difference_says_what_the_command_does(folder: Folder, work: Workspace) -> None:
    held = dict(model("VAE-tiny", seed=2))
    name = next(iter(held))
    del held[next(reversed(held))]
    held |= {name: values(np.zeros(held[name].shape)), "x": held[name]}
    other = save(folder / "other.safetensors", held)
    found = work.diff(folder / "vae.safetensors", other, full=True)
    said = folder("diff", folder / "vae.safetensors", other, "--full")
    assert said.code == 1 and f"{found}\n" == said.out
    assert not found.same and found.causes and found.only_b == ("x",) and found.changed == (name,)
    assert work.diff(other, other).same


# -- recipes


def test_a_recipe_of_a_file_a_text_and_of_values_is_the_same(folder: Folder, work: Workspace) -> None:
    loaded = work.load(folder / "tiny.toml")
    parsed = work.parse((folder / "tiny.toml").read_text(), folder.path)
    composed = work.compose(
        folder.path,
        name="tiny",
        base="dirty",
        fixes=["clip-position-ids"],
        description=None,
        sources={"dirty": "dirty.ckpt", "vae": Path("vae.safetensors")},
        components={"VAE-tiny": "vae"},
    )
    assert loaded.digest == parsed.digest == composed.digest
    assert loaded.sources == {"dirty": "dirty.ckpt", "vae": "vae.safetensors"} == composed.sources
    assert loaded.outputs == ("tiny.safetensors",) == composed.outputs
    assert (loaded.file, parsed.file, composed.folder) == (folder / "tiny.toml", None, folder.path)
    made = {work.build(r, check=True).output.sha256 for r in (loaded, parsed, composed)}
    assert len(made) == 1
    saved = work.load(composed.save(folder / "again.toml"))
    assert saved.digest == composed.digest


def test_all_that_is_wrong_comes_at_once_and_reads_well(work: Workspace) -> None:
    with pytest.raises(RecipeError) as caught:
        work.compose(name="x", base="NEW SD-tiny", fixs=[], sorces={})
    facts = [p.fact for p in caught.value.problems]
    assert len(facts) == 3 and facts[1:] == ["unknown key `fixs`", "unknown key `sorces`"]
    assert caught.value.exit_code == 3
    shown = "  --> <recipe>:4:1\n  |\n4 | fixs = []\n  | ^^^^\nhint: did you mean `fixes`?"
    assert shown in str(caught.value)
    with pytest.raises(TypeError):
        work.compose(name="x", base=object())


def test_a_text_is_a_strangers_and_what_is_composed_the_callers_own(folder: Folder, work: Workspace) -> None:
    elsewhere = save(folder.path.parent / "elsewhere.safetensors", model())
    said = {"name": "x", "base": "e", "sources": {"e": elsewhere}}
    own = work.compose(folder.path, **said)
    assert work.build(own).output.path == folder / "x.safetensors"
    with pytest.raises(RecipeError, match="outside the recipe's folder"):
        work.build(work.parse(own.text, folder.path))
    trusting = Workspace(environment=folder.variables, outside=True)
    assert trusting.build(trusting.parse(own.text, folder.path)).output.state == "unchanged"
    # What a recipe includes is a stranger's, whoever includes it.
    inner = folder.write("inner.toml", own.text)
    with pytest.raises(RecipeError, match="outside the recipe's folder"):
        work.build(work.compose(folder.path, name="y", base="i", sources={"i": {"recipe": inner.name}}))


def test_recipes_include_recipes(folder: Folder, work: Workspace) -> None:
    made = work.build(work.compose(folder.path, name="y", base="i", sources={"i": {"recipe": "tiny.toml"}}))
    whole = content(work.build(work.load(folder / "tiny.toml")).output.path)
    assert content(made.output.path).items() <= whole.items()


def test_a_plan_can_be_looked_at(folder: Folder, work: Workspace) -> None:
    recipe = work.load(folder / "tiny.toml")
    plan = work.plan(recipe)
    assert (
        plan.json.items() <= folder.plan(folder / "tiny.toml").items()
        and f"{plan}\n" == folder("plan", "tiny.toml").out
    )
    assert [n.label for n in plan.nodes] == [s["label"] for s in plan.json["steps"]] and not plan.done
    graph = plan.graph
    assert set(graph.edges) == set(plan.edges) and graph.number_of_nodes() == len(plan.nodes)
    (output,) = [n for n in plan.nodes if n.kind == "output"]
    assert output.path == folder / "tiny.safetensors" and graph.nodes[output.key]["node"] is output
    sources = {n.label: n.path for n in plan.nodes if n.kind == "source"}
    assert sources == {"source dirty": folder / "dirty.ckpt", "source vae": folder / "vae.safetensors"}
    made = work.build(recipe)
    again: Plan = pickle.loads(pickle.dumps(work.plan(recipe)))
    assert again.done and {n.sha256 for n in again.nodes if n.kind == "source"} == {*made.sources.values()}


def test_a_build_says_what_the_command_does(folder: Folder, work: Workspace) -> None:
    recipe = work.load(folder / "tiny.toml")
    made = work.build(recipe)
    said = folder.build()
    assert said["outputs"][0] == {
        "name": "tiny",
        "path": said["outputs"][0]["path"],
        "state": "unchanged",
        "size": made.output.size,
        "sha256": made.output.sha256,
        "tensor_digest": made.output.tensor_digest,
        "metric": made.output.metric,
        "statement": made.output.statement,
    }
    assert made.output.sha256 == hashlib.sha256(made.output.path.read_bytes()).hexdigest()
    assert "UNET-tiny of dirty" in made.made
    assert made.changes["CLIP-tiny of dirty"] == ("clip-position-ids: made exact: int64 0..76",)
    assert (folder / "tiny.lock.toml").is_file() and made.sources.keys() == {"dirty", "vae"}
    assert work.build(recipe, locked=True) == work.build(recipe)
    assert work.verify(recipe) == {folder / "tiny.safetensors": made.output.sha256}
    (folder / "tiny.safetensors").write_bytes(b"")
    with pytest.raises(CkptError):
        work.verify(recipe)


def test_a_statement_of_provenance(folder: Folder, work: Workspace) -> None:
    recipe = work.load(folder / "tiny.toml")
    output = work.build(recipe, statement=True).output
    assert output.statement == folder / "tiny.safetensors.intoto.json"
    assert work.verify_statement(output.statement) == {output.path: output.sha256}
    assert work.verify_statement(output.statement, output.path, recipe=recipe) == {output.path: output.sha256}
    with pytest.raises(OutputError):
        work.verify_statement(output.statement, folder / "vae.safetensors")
    pytest.importorskip("cryptography", reason="`cryptography` is what signs, and is not installed")
    assert work.build(recipe, sign=keys.private(folder / "key")).output.statement == output.statement
    assert work.verify_statement(output.statement, key=keys.public(folder / "pub"))
    with pytest.raises(SourceError):
        work.verify_statement(output.statement, key=keys.public(folder / "other", keys.OTHER_POINT))


def test_where_an_output_goes(folder: Folder, work: Workspace) -> None:
    recipe = work.load(folder / "tiny.toml")
    before = files(folder.path)
    made = work.build(recipe, folder / "x.ckpt", lock=False)
    assert made.output.path == folder / "x.ckpt" and files(folder.path) == before | {"x.ckpt"}
    (node,) = [n for n in work.plan(recipe, folder / "y.sft").nodes if n.kind == "output"]
    assert node.path == folder / "y.sft"
    with pytest.raises(OutputError):
        work.build(recipe, folder / "tiny.toml" / "y.safetensors")
    with pytest.raises(LockError):
        work.build(work.parse(recipe.text, folder.path), locked=True)
    several = work.parse(recipe.text + 'output = [{ name = "a" }, { name = "b" }]\n', folder.path)
    with pytest.raises(UsageError, match="there are several outputs"):
        work.build(several, folder / "x.safetensors")
    with pytest.raises(ValueError):
        _ = work.build(several).output


# -- the toolkit

Ways = dict[str, tuple[Callable[[Workspace, Path, Path], Result], tuple[str, ...]]]

WAYS: Ways = {
    "extract": (
        lambda work, folder, to: work.extract(folder / "dirty.ckpt", "vae", to, precision="bf16"),
        ("dirty.ckpt", "vae", "--precision", "bf16"),
    ),
    "replace": (
        lambda work, folder, to: work.replace(
            folder / "dirty.ckpt",
            {"VAE": folder / "vae.safetensors", "UNET": (folder / "dirty.ckpt", "UNET-tiny-EMA")},
            to,
        ),
        ("dirty.ckpt", "VAE=vae.safetensors", "UNET=dirty.ckpt:UNET-tiny-EMA"),
    ),
    "prune": (
        lambda work, folder, to: work.prune(
            folder / "dirty.ckpt", to, keep=["loss.*"], fixes=["clip-position-ids"]
        ),
        ("dirty.ckpt", "--keep", "loss.*", "--fix", "clip-position-ids"),
    ),
    "convert": (
        lambda work, folder, to: work.convert(folder / "dirty.ckpt", to, precision="fp16"),
        ("dirty.ckpt", "--precision", "fp16"),
    ),
}


@pytest.mark.parametrize("command", WAYS)
def test_the_toolkit_makes_what_the_commands_make(folder: Folder, work: Workspace, command: str) -> None:
    way, words = WAYS[command]
    made = way(work, folder.path, folder / "ours.safetensors")
    said = folder(command, *words, "-o", "theirs.safetensors")
    assert said.code == 0, said.err
    assert made.output.path == folder / "ours.safetensors" and made.output.state == "written"
    assert made.output.path.read_bytes() == (folder / "theirs.safetensors").read_bytes()
    if command == "convert":
        assert any(note.startswith("not carried over: ") for note in made.notes)


def test_a_new_model_of_parts_in_a_folder(folder: Folder, work: Workspace) -> None:
    """Folders are made where they are missing, and what goes into one is named after the model."""
    dirty = folder / "dirty.ckpt"
    parts = {"UNET": dirty, "CLIP": dirty, "VAE": folder / "vae.safetensors"}
    made = work.replace("NEW SD-tiny", parts, f"{folder.path}/new/").output
    assert made.path == folder / "new" / "sd-tiny.safetensors"
    assert work.inspect(made.path).architecture == "SD-tiny"
    with pytest.raises(UsageError, match="has slots that nothing fills: `CLIP-tiny`"):
        work.replace("NEW SD-tiny", {n: p for n, p in parts.items() if n != "CLIP"}, folder / "x.safetensors")


def test_what_the_toolkit_refuses(folder: Folder, work: Workspace) -> None:
    dirty, vae = folder / "dirty.ckpt", folder / "vae.safetensors"
    before = files(folder.path)
    with pytest.raises(UsageError, match="there is no `VAE-v1`"):
        work.extract(dirty, "VAE-v1", folder / "x.safetensors")
    with pytest.raises(UsageError, match="has no slot `T5`"):
        work.replace(dirty, {"T5": vae}, folder / "x.safetensors")
    with pytest.raises(UsageError, match="is filled twice"):
        work.replace(dirty, {"VAE": vae, "VAE-tiny": vae}, folder / "x.safetensors")
    with pytest.raises(UsageError, match=r"there is no tensor or component `los\.`"):
        work.prune(dirty, folder / "x.safetensors", keep=["los."])
    with pytest.raises(OutputError):
        work.prune(dirty, dirty)
    assert files(folder.path) == before


def test_an_extracted_file_is_named_after_what_it_is(folder: Folder, work: Workspace) -> None:
    (name,) = {work.extract(folder / "dirty.ckpt", "vae").output.path.name for _ in range(2)}
    assert name.startswith("dirty-") and name.endswith(".vae.safetensors")


def test_a_recipe_for_a_file_that_exists(folder: Folder, work: Workspace) -> None:
    recipe = work.new(folder / "dirty.ckpt", folder / "vae.safetensors", folder=folder.path, name="n")
    assert folder("new", "dirty.ckpt", "vae.safetensors", "--name", "n").out == recipe.text
    assert work.build(recipe).output.path == folder / "n.safetensors"


@pytest.mark.parametrize("what", ["nothing", "folder", "garbage", "empty", "pipe"])
def test_whatever_is_named_the_error_is_one_for_people(folder: Folder, work: Workspace, what: str) -> None:
    """Nothing but a CkptError, which says something, comes of a file that is none of what is wanted."""
    path, new = folder / f"{what}.safetensors", folder / "new.safetensors"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "nothing":
        path.write_bytes(b"\x80garbage\xff" * (what == "garbage"))
    recipe = work.load(folder / "tiny.toml")
    calls: list[Callable[[], object]] = [
        lambda: work.open(path),
        lambda: work.inspect(path),
        lambda: work.diff(folder / "dirty.ckpt", path),
        lambda: work.load(path),
        lambda: work.new(path),
        lambda: work.verify(recipe, path),
        lambda: work.extract(path, "VAE"),
        lambda: work.replace(path, {}, new),
        lambda: work.replace(folder / "dirty.ckpt", {"VAE": path}, new),
        lambda: work.prune(path, new),
        lambda: work.convert(path, new),
        lambda: work.build(work.compose(name="x", base="s", sources={"s": path}), new),
        lambda: recipe.save(path / "no" / "recipe.toml"),
    ]
    for call in calls:
        with pytest.raises(CkptError) as caught:
            call()
        assert caught.value.problems and str(caught.value).strip() and caught.value.exit_code
    assert not new.exists()


# -- the store


def test_the_store(folder: Folder, work: Workspace) -> None:
    work.build(work.compose(folder.path, name="x", base="half", sources={"d": "dirty.ckpt"}, steps=STEPS))
    assert work.store.path == folder.store
    kept = {(i.component, i.cls): i for i in work.store.items() if i.kind == "component"}
    unet = kept["UNET-tiny-SD", "UNET-tiny"]
    assert unet.places == (folder / "x.safetensors",)
    assert work.store.check() == ()
    (blob, *_) = folder.blobs().values()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert [p.place.path for p in work.store.check() if p.place] == [str(blob)]
    done = work.store.gc(0)
    assert done.freed > 0 and done.removed and not done.kept and work.store.items() == ()


STEPS = {"half": {"op": "weighted-sum", "a": "d", "b": "d", "alpha": 0.5, "store": True}}


# -- several recipes


@pytest.fixture
def three(folder: Folder) -> list[str]:
    """Recipes of the same sources, of which the last builds on the first."""
    text = (folder / "tiny.toml").read_text()
    for name in ("one", "two"):
        precision = {"one": "fp16", "two": "bf16"}[name]
        folder.write(
            f"{name}.toml",
            text.replace('name = "tiny"', f'name = "{name}"') + f'[output]\nprecision = "{precision}"\n',
        )
    folder.write("zero.toml", 'format = 1\nname = "zero"\nbase = "a"\nsources.a.file = "one.safetensors"\n')
    return ["zero", "one", "two"]


def test_several_recipes_are_built_as_one(folder: Folder, work: Workspace, three: list[str]) -> None:
    recipes = [work.load(folder / f"{name}.toml") for name in three[1:]]
    plan = work.plan_all(recipes)
    assert plan.recipe == "one, two" and plan.json["recipes"] == ["one", "two"]
    assert sum(n.kind == "source" for n in plan.nodes) == 2
    made = work.build_all([work.load(folder / "zero.toml"), *recipes])
    assert [o.state for o in made.outcomes] == ["built"] * 3 and not made.failed
    assert str(made).endswith("3 recipes: 3 built") and pickle.loads(pickle.dumps(made)) == made
    said = folder("build", *(folder / f"{name}.toml" for name in three), "--json").json
    for outcome, recipe in zip(made.outcomes, said["recipes"], strict=True):
        assert outcome.result is not None and outcome.recipe == recipe["recipe"]
        assert recipe["outputs"] == [{**o, "state": "unchanged"} for o in outcome.result.json["outputs"]]
    assert work.build(recipes[0]).json["outputs"] == said["recipes"][1]["outputs"]


def test_several_into_a_folder(folder: Folder, work: Workspace, three: list[str]) -> None:
    recipes = [work.load(folder / f"{name}.toml") for name in three[1:]]
    work.build_all(recipes, folder / "out", lock=False)
    assert files(folder / "out") == {"one.safetensors", "two.safetensors"}
    assert not list(folder.path.glob("*.lock.toml"))


def test_failures_of_several(folder: Folder, work: Workspace, three: list[str]) -> None:
    """They come together, and nothing is made; with `keep_going` what waits for none of them is."""
    recipes = [work.load(folder / f"{name}.toml") for name in three]
    broken = work.compose(folder.path, name="broken", base="x", sources={"x": "nowhere.safetensors"})
    wrong = work.parse(
        (folder / "one.toml").read_text() + '[expect]\nmetric = "0001/0001/0001"\n', folder.path
    )
    with pytest.raises(CkptError) as caught:
        work.build_all([broken, recipes[2], replace(broken, name="again")])
    assert caught.value.exit_code == 5 and {p.fact for p in caught.value.problems}
    assert not (folder / "two.safetensors").exists()
    made = work.build_all([recipes[0], wrong, recipes[2]], keep_going=True)
    assert [o.state for o in made.outcomes] == ["not begun", "failed", "built"]
    assert made.failed[0].problems and made.json["recipes"][1]["state"] == "failed"


def test_variants(folder: Folder, work: Workspace) -> None:
    made = work.variants(work.load(folder / "tiny.toml"), {"output.precision": ["fp16", "bf16"]})
    assert [v.name for v in made] == ["tiny-precision-fp16", "tiny-precision-bf16"]
    assert folder("sweep", "tiny.toml", "output.precision=fp16,bf16", "--no-build").code == 0
    assert [v.text for v in made] == [(folder / f"{v.name}.toml").read_text() for v in made]
    digests = {o.result.output.sha256 for o in work.build_all(made).outcomes if o.result is not None}
    assert len(digests) == 2 and not list(folder.path.glob("*.lock.toml"))
    own = work.compose(folder.path, name="own", base="x", sources={"x": folder / "dirty.ckpt"})
    assert len(work.variants(own, {"output.precision": ["fp16", "bf16"], "name": ["y"]})) == 2
    for axes in ({"steps.x.alpha": [1]}, {"a b": [1]}, {"output.precision": []}, {"name": ["x", "x"]}):
        with pytest.raises(UsageError):
            work.variants(own, axes)
