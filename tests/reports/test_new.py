"""What `ckpt new` writes, and that it builds what it describes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tomli

from builder.base.progress import Reporter
from builder.formats.write_safetensors import write as write_tensors
from builder.reports.new import Draft, describe
from builder.reports.new.recipe_text import merged, place
from builder.tensors.cast import Faults, cast_all
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import CLIP, IDS, TINY, UNET, VAE, Folder, files, model, save, save_dirty, values
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden" / "new"
Tensors = Mapping[str, LazyTensor]


def half(tensors: Tensors) -> Tensors:
    return cast_all(tensors, "fp16", faults=Faults())


def mixed(**origins: int) -> Tensors:
    """A model whose components come from models of other seeds."""
    prefixes = {"unet": UNET, "vae": VAE, "clip": CLIP}
    found = dict(model())
    for part, seed in origins.items():
        found |= {n: t for n, t in model(seed=seed).items() if n.startswith(prefixes[part])}
    return found


def bare(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def averaged(tensors: Tensors, average: Tensors) -> Tensors:
    name = "model_ema.diffusion_model{}".format
    return {**tensors, **{name(n.replace(".", "")): t for n, t in bare(average, UNET).items()}}


def schedule(seed: int) -> Tensors:
    """Optional tensors of a full checkpoint."""
    random = np.random.RandomState(seed)
    return {n: values(random.standard_normal(1000).astype("<f4")) for n in ("betas", "alphas_cumprod")}


def nai(tensors: Tensors) -> Tensors:
    return {n.replace("transformer.text_model.", "transformer."): t for n, t in tensors.items()}


MARKER = MemoryTensor(DType.F32, (0,), b"")
BROKEN = values([[*range(76), 75.9975]])

# By name: the model, and whether what its recipe makes has the very same tensors.
CASES: dict[str, tuple[Callable[[], Tensors], bool]] = {
    "rounded": (lambda: half(model()), True),
    "exact": (model, True),
    "from-two": (lambda: half(mixed(vae=2)), True),
    "average": (lambda: half(mixed(unet=9)), True),
    "in-part": (lambda: {**half(mixed(unet=77)), "v_pred": MARKER}, True),
    "strange": (lambda: half(mixed(unet=77, vae=77, clip=77)), True),
    "unet-alone": (lambda: bare(model(), UNET), True),
    "unet-of-a-model": (lambda: {n: t for n, t in model().items() if n.startswith(UNET)}, True),
    "extras": (lambda: {**half(model()), "betas": schedule(1)["betas"]}, True),
    "extras-of-nobody": (lambda: {**half(model()), **schedule(5)}, False),
    "no-ids": (lambda: {n: t for n, t in half(model()).items() if n != IDS}, True),
    "broken-ids": (lambda: {**half(model()), IDS: BROKEN}, False),
    "ids-of-others-broken": (lambda: half(mixed(clip=4)), True),
    "nai-names": (lambda: nai(half(model())), False),
    "mixed-types": (lambda: {**half(model()), **{n: t for n, t in model().items() if VAE in n}}, True),
    "brain": (lambda: cast_all(model(), "bf16", faults=Faults()), True),
    "nan": (
        lambda: {**half(model()), VAE + "decoder.conv_out.bias": values([np.nan, 1, 2, 3, 4], "<f2")},
        True,
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with a library of four files, one of them no checkpoint."""
    path = tmp_path / "here"
    library = path / "library"
    save(library / "sd-one.ckpt", {**averaged(model(), model(seed=9)), **schedule(1)})
    save(library / "vaes" / "kl.vae.pt", bare(model(seed=2), VAE))
    save(library / "text.safetensors", {**mixed(clip=4, unet=8, vae=8), IDS: BROKEN})
    (library / "notes.bin").write_bytes(b"not a checkpoint")
    return Folder(path, tmp_path / "store")


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_builds_the_model_that_it_describes(case: str, folder: Folder) -> None:
    make, same = CASES[case]
    save(folder / "mine.safetensors", make())
    said = folder("new", "-q", "mine.safetensors", "--library", "library", "-o", "mine.toml")
    assert said == (0, "", "")
    text = (folder / "mine.toml").read_text(encoding="utf-8")
    assert text == golden(GOLDEN / f"{case}.toml", text)
    assert folder("build", "-q", "mine.toml").code == 0
    compared = folder("diff", "mine.safetensors", "mine-built.safetensors")
    assert compared.code == (0 if same else 1), compared.out


def test_a_training_checkpoint_and_a_vae(folder: Folder) -> None:
    save_dirty(folder / "Anything-V3.0.ckpt")
    said = folder("new", "-q", "Anything-V3.0.ckpt", "library/vaes/kl.vae.pt")
    assert (said.code, said.err) == (0, "")
    assert said.out == golden(GOLDEN / "training.toml", said.out)
    folder.write("any.toml", said.out)
    assert folder("build", "-q", "any.toml").code == 0


def test_further_models_are_looked_through_like_a_library(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(mixed(vae=8)))
    said = folder("new", "mine.safetensors", "library/sd-one.ckpt", "library/text.safetensors")
    recipe = tomli.loads(said.out)
    assert recipe["components"] == {"UNET-tiny": "sd-one", "VAE-tiny": "text", "CLIP-tiny": "sd-one"}
    assert "VAE-tiny is that of `library/text.safetensors`, after rounding" in said.err
    save(folder / "other.safetensors", mixed(vae=30, clip=30, unet=30))
    said = folder("new", "mine.safetensors", "other.safetensors")
    assert "`other.safetensors` has no component in common with the model: it is left out" in said.err
    assert tomli.loads(said.out)["base"] == "mine"


def test_nothing_is_overwritten_without_being_told_to(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(model()))
    folder.write("mine.toml", "format = 1 # mine")
    said = folder("new", "mine.safetensors", "-o", "mine.toml")
    assert (said.code, said.out) == (2, "") and "already" in said.err
    assert (folder / "mine.toml").read_text() == "format = 1 # mine"
    assert folder("new", "mine.safetensors", "-o", "mine.toml", "--force").code == 0
    assert (folder / "mine.toml").read_text() == folder("new", "-q", "mine.safetensors").out


def test_where_no_recipe_can_be_is_told_before_anything_is_read(folder: Folder) -> None:
    said = folder("new", "none.safetensors", "-o", "none/mine.toml")
    assert said.code == 7 and said.err.startswith("error: cannot write `none/mine.toml`\n")
    said = folder("new", "none.safetensors", "-o", "library/")
    assert said.code == 2 and "hint: `-o library/recipe.toml`" in said.err


def test_a_model_of_the_library_is_an_input_too(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(mixed(vae=8)))
    victim = folder / "library" / "text.safetensors"
    before = victim.read_bytes()
    for output in ("library/text.safetensors", "link.toml"):
        if output == "link.toml":
            (folder / output).hardlink_to(victim)
        said = folder("new", "mine.safetensors", "-l", "library", "-o", output, "--force")
        assert (said.code, victim.read_bytes()) == (7 if output == "link.toml" else 2, before), said.err


def test_only_a_recipe_is_overwritten_and_only_a_recipes_name_written(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(model()))
    for name, code in (
        ("other.ckpt", 2),
        ("r.txt", 2),
        ("mine.lock.toml", 2),
        ("model.toml", 7),
        ("pyproject.toml", 7),
        ("folder.toml", 7),
        ("", 2),
    ):
        if name == "folder.toml":
            (folder / name).mkdir()
        elif name:
            folder.write(name, "\x80\x02}" if name == "model.toml" else "[project]")
        before = files(folder.path)
        said = folder("new", "mine.safetensors", "-o", name, "--force")
        assert (said.code, files(folder.path)) == (code, before), (name, said.err)
        assert "hint: " in said.err
        if (folder / name).is_file():
            assert (folder / name).read_text() in ("\x80\x02}", "[project]")


def test_published_files_come_with_their_addresses(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(model()))
    sha256 = hashlib.sha256((folder / "library/sd-one.ckpt").read_bytes()).hexdigest()
    folder.write(
        "own/known/files.toml",
        f'[[file]]\nname = "first.ckpt"\nsha256 = "{sha256}"\n'
        'hf = "them/first/first.ckpt"\ncivitai_version = 7\n',
    )
    save(folder / "library" / "a-copy.safetensors", model())  # which nobody knows
    known = Folder(folder.path, folder.store, {"CKPT_COMPONENTS": f"{TINY}{os.pathsep}{folder / 'own'}"})
    said = known("new", "-q", "mine.safetensors", "-l", "library")
    assert (said.code, said.err) == (0, "")
    recipe = tomli.loads(said.out)
    assert recipe["base"] == "sd-one"
    assert recipe["sources"]["sd-one"] == {
        "file": "library/sd-one.ckpt",
        "size": (folder / "library/sd-one.ckpt").stat().st_size,
        "sha256": sha256,
        "urls": ["hf://them/first/first.ckpt", "civitai:7"],
    }
    assert "published as first.ckpt" in said.out


def test_metadata_for_people_is_carried_over_and_a_merge_is_told(folder: Folder) -> None:
    merge = {"interp_method": "Weighted sum", "multiplier": 0.3}
    metadata = {
        "modelspec.title": "Mine",
        "modelspec.hash_sha256": "0x00",
        "modelspec.author": 'me "\\\n\x1b[31m',
        "sd_merge_recipe": json.dumps(json.dumps(merge)),
        "sd_merge_models": json.dumps({"ab" * 32: {"name": "one\n[evil]"}}),
    }
    write_tensors(folder / "mine.safetensors", half(model()), metadata, sha256=False)
    said = folder("new", "-q", "mine.safetensors", "-l", "library")
    recipe = tomli.loads(said.out)
    assert recipe["output"]["metadata"] == {
        "modelspec": {"title": "Mine", "author": 'me "\\\n\x1b[31m'}
    } or recipe["output"]["metadata"] == {"modelspec.title": "Mine", "modelspec.author": 'me "\\\n\x1b[31m'}
    assert "# A merge, its metadata says: Weighted sum, 0.3\n" in said.out
    assert f"# - of one\\n[evil], sha256 {'ab' * 32}\n" in said.out and "evil" not in recipe


@pytest.mark.parametrize("text", ["", "[", "{}", '"x"', "[[[", '{"type": 3}', "1e999", "null"])
def test_odd_merge_metadata_is_no_trouble(text: str) -> None:
    assert isinstance(list(merged({"sd_merge_recipe": text, "sd_merge_models": text})), list)


@pytest.mark.parametrize(
    "name", ["we ird.safetensors", 'a"b.ckpt', "ünï.safetensors", "a\\b.ckpt", "..x.ckpt", "1.pt"]
)
def test_odd_names_make_valid_recipes(name: str, folder: Folder) -> None:
    save(folder / name, half(model()))
    said = folder("new", "-q", name, "-o", "odd.toml")
    assert (said.code, said.err) == (0, "")
    folder.know(name)
    again = Folder(folder.path, folder.store, {"CKPT_MODELS": str(folder.path)})
    assert again("build", "-q", "odd.toml", "-o", "built.safetensors").code == 0
    assert folder("diff", name, "built.safetensors").code == 0


def test_a_recipe_tells_nobody_how_folders_are_called(tmp_path: Path) -> None:
    assert place(tmp_path / "a" / "m.ckpt", tmp_path / "a") == "m.ckpt"
    assert place(tmp_path / "a" / "b" / "m.ckpt", tmp_path / "a") == "b/m.ckpt"
    assert place(tmp_path / "m.ckpt", tmp_path / "a") == "../m.ckpt"
    assert place(tmp_path / "m.ckpt", tmp_path / "a" / "b") == "m.ckpt"


def test_what_cannot_be_described(folder: Folder) -> None:
    (folder / "text.safetensors").write_text("hello")
    save(folder / "strange.safetensors", {"x": values([1.0])})
    save(
        folder / "broken.safetensors", {n: t for n, t in model().items() if not n.endswith("conv_in.weight")}
    )
    save(folder / "mine.safetensors", half(model()))
    save(folder / "empty.safetensors", {})
    lora = save(folder / "other.safetensors", bare(model("EMA-tiny"), ""))
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("text.safetensors",), 6, "this is no checkpoint but text"),
        (("missing.ckpt",), 6, "cannot open"),
        (("library",), 6, "is a folder that does not hold one sharded set"),
        (("strange.safetensors",), 6, "is no model that the catalog knows"),
        (("empty.safetensors",), 6, "is no model that the catalog knows"),
        (("mine.safetensors", "strange.safetensors"), 2, "has nothing that SD-tiny has a slot for"),
        (("mine.safetensors", lora.name), 2, "has nothing that SD-tiny has a slot for"),
        (("mine.safetensors", "-l", "nowhere"), 2, "`nowhere` is not a folder"),
        (("mine.safetensors", "--name", "a/b"), 3, "error: "),
        (("mine.safetensors", "-o", "no/such/folder/r.toml"), 7, "error: "),
        ((), 2, "Missing argument"),
    ]
    for args, code, fact in cases:
        said = folder("new", "-q", *args)
        assert (said.code, said.out) == (code, ""), (args, said)
        assert fact in said.err and "Traceback" not in said.err, said.err


class Heard(Reporter):
    """Remembers which files were read."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def start(self, task: str, total: int) -> None:
        if total:
            self.tasks.append(task)


def described(folder: Folder, heard: Reporter) -> Draft:
    with folder.workspace() as workspace, workspace.sources() as sources:
        return describe([folder / "mine.safetensors"], [folder / "library"], sources, reporter=heard)


def test_only_what_looks_alike_is_read_and_only_once(folder: Folder) -> None:
    save(folder / "mine.safetensors", half(mixed(vae=2)))
    folder.know("library/sd-one.ckpt", "library/vaes/kl.vae.pt", "mine.safetensors")
    first, second = Heard(), Heard()
    one = described(folder, first)
    assert [t.file.path.name for t in one.taken.values()] == ["sd-one.ckpt", "kl.vae.pt", "sd-one.ckpt"]
    assert set(first.tasks) == {"reading mine.safetensors", "reading sd-one.ckpt", "reading kl.vae.pt"}
    two = described(folder, second)
    assert second.tasks == ["reading mine.safetensors"]
    assert [t.how for t in one.taken.values()] == [t.how for t in two.taken.values()] == ["rounded"] * 3


def test_what_looks_alike_but_is_not_explains_nothing(folder: Folder) -> None:
    tensors = dict(half(model()))
    name = max((n for n in tensors if n.startswith(UNET)), key=lambda n: tensors[n].nbytes)
    data = tensors[name].tobytes()
    data[-2] ^= 1
    tensors[name] = MemoryTensor(DType.F16, tensors[name].shape, bytes(data))
    save(folder / "mine.safetensors", tensors)
    assert described(folder, Reporter()).unexplained == ("UNET-tiny",)
