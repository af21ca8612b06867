"""A family of models lives in a folder of the catalog, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.models.catalog import Catalog, load_catalog
from builder.models.samples import CLEAN, Dirt, make
from builder.tensors.lazy import DType
from tests.help.building import Folder, catalog, content, save

ROOT = Path(__file__).parents[2] / "builder"

TINY = {
    "UNET-tiny-A.toml": """\
name = "UNET-tiny-A"
class = "DENOISER-tiny"
prefix = "net."
keys = 4
parameters = 96
[tensors]
"block.{0,1}.{weight,bias}" = [[8, 5], [8]]
""",
    "UNET-tiny-EMA.toml": """\
name = "UNET-tiny-EMA"
class = "SMOOTH-tiny"
extends = "UNET-tiny-A"
prefix = "model_ema.net"
naming = "without-dots"
average = true
keys = 4
parameters = 96
""",
    "TEXT-tiny-A.toml": """\
name = "TEXT-tiny-A"
class = "TEXT-tiny"
prefix = "text.model."
keys = 2
parameters = 84
[tensors]
"embed.weight" = [1, 7]
"embeddings.position_ids" = { shape = [1, 77], dtype = "I64", optional = true }
""",
    "TEXT-tiny-OLD.toml": """\
name = "TEXT-tiny-OLD"
extends = "TEXT-tiny-A"
prefix = "text."
mislabelled = true
keys = 2
parameters = 84
""",
    "architectures.toml": """\
[Tiny-v9]
slots = ["DENOISER-tiny", "TEXT-tiny"]
aliases = ["T9"]
diffusers = "Tiny"
modelspec = { architecture = "tiny-v9", resolution = 64, v = "tiny-v9-v", resolution_v = 96 }
sidecars_v = { a1111 = "tiny-v.yaml" }
""",
    "classes.toml": """\
[DENOISER-tiny]
precision = "bf16"
metric = { part = "unet", base = 1.0, k = 100, having = ["block.0."] }
blocks = { "block.{0..2}." = "A{0..2}" }
[TEXT-tiny]
metric = { part = "clip", base = 1.0, k = 100, lacking = ["position"] }
fixes = ["clip-position-ids", "position-ids-absent"]
""",
    "programs.toml": """\
[a1111]
TEXT = "Tiny texts"
[tiny-program]
checkpoint = "whole"
DENOISER = "nets"
other = "rest"
""",
    "diffusers.toml": """\
[layouts.Tiny]
has = ["net/layers."]
pipeline = "TinyPipeline"
pixels = 64
scheduler = { _class_name = "TinyScheduler" }
[layouts.Tiny.parts.net]
model = "TinyModel"
library = "diffusers"
prefix = "net."
rules = "DENOISER-tiny"
config = { width = 8 }
[layouts.Tiny.parts.text]
model = "CLIPTiny"
library = "transformers"
prefix = "text.model."
rules = "TEXT-tiny"
[rules.DENOISER-tiny.names]
"block.{0,1}" = "layers.{0,1}"
[rules.TEXT-tiny]
without = ["embeddings.position_ids"]
[rules.TEXT-tiny.names]
"embed.weight" = "transposed table.weight"
""",
    "tiny-v.yaml": "parameterization: v\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    family = tmp_path / "tiny"
    family.mkdir()
    for name, text in TINY.items():
        (family / name).write_text(text)
    (tmp_path / "work").mkdir()
    made = Folder(tmp_path / "work", tmp_path / "store", {"CKPT_COMPONENTS": str(family)})
    for name, seed, dirt in (("a", 0, Dirt(ema=True)), ("b", 1, CLEAN), ("old", 0, Dirt(nai_names=True))):
        sample = make("Tiny-v9", precision=DType.F32, seed=seed, dirt=dirt, catalog=load_catalog([family]))
        save(made / f"{name}.safetensors", sample.tensors)
    return made


def test_inspect(folder: Folder) -> None:
    found = folder("inspect", "a.safetensors", "--json").json["files"][0]
    assert found["architecture"] == "Tiny-v9"
    assert re.fullmatch(r"\d{4}/----/\d{4}", found["metric"])
    assert (found["ema"]["keys"], found["ema"]["component"]) == (4, "UNET-tiny-EMA")


def test_prune(folder: Folder) -> None:
    assert folder("prune", "a.safetensors", "-o", "p.safetensors").code == 0
    held = content(folder / "p.safetensors")
    assert not any("ema" in n for n in held)
    assert held["net.block.0.weight"][0] == "BF16"
    assert held["text.model.embeddings.position_ids"][0] == "I64"


def test_extract_and_replace(folder: Folder) -> None:
    assert folder("extract", "a.safetensors", "SMOOTH-tiny", "--precision", "keep").code == 0
    (average,) = folder.path.glob("a-ema-[0-9]*.denoiser.safetensors")
    assert set(content(average)) == {f"block.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    assert folder("extract", "b.safetensors", "text", "-o", "text.safetensors").code == 0
    done = folder("replace", "a.safetensors", "TEXT-tiny=text.safetensors", "-o", "r.safetensors")
    assert done.code == 0, done.err
    ours, theirs = content(folder / "r.safetensors"), content(folder / "text.safetensors")
    assert ours["text.model.embed.weight"] == theirs["embed.weight"]


def test_build(folder: Folder) -> None:
    folder.write(
        "r.toml",
        'format = 1\nname = "r"\nbase = "old"\nfixes = ["position-ids-absent", "vae-attention-shape"]\n'
        'sources.old.file = "old.safetensors"\nsources.a.file = "a.safetensors"\n'
        'components.DENOISER-tiny = { from = "a", component = "UNET-tiny-EMA" }\n'
        'output = { profile = "a1111", markers = ["v_pred"] }\n',
    )
    said = folder("build", "r.toml", "--json")
    assert any("get the names that loaders expect" in c for c in said.json["changes"]["TEXT-tiny of old"])
    held, before = content(folder / "r.safetensors"), content(folder / "old.safetensors")
    assert set(held) == {"v_pred", *(f"net.block.{n}.{k}" for n in (0, 1) for k in ("weight", "bias"))} | {
        "text.model.embed.weight"
    }
    assert "text.embed.weight" in before
    assert (folder / "r.yaml").read_text() == TINY["tiny-v.yaml"]
    told = folder("inspect", "r.safetensors", "--json").json["files"][0]["metadata"]
    assert told["modelspec.architecture"] == "tiny-v9-v"
    assert told["modelspec.resolution"] == "96x96"


def test_diffusers_both_ways(folder: Folder) -> None:
    done = folder("convert", "b.safetensors", "-o", "model")
    assert done.code == 0, done.err
    assert content(folder / "model/net/diffusion_pytorch_model.safetensors").keys() == {
        f"layers.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    }
    assert content(folder / "model/text/model.safetensors")["table.weight"][1] == (7, 1)
    assert folder("convert", "model", "-o", "back.safetensors").code == 0
    assert content(folder / "back.safetensors") == content(folder / "b.safetensors")


def test_watch(folder: Folder) -> None:
    save(folder / "in/text.safetensors", make("TEXT-tiny", catalog=_own(folder)).tensors)
    save(folder / "in/net.safetensors", make("DENOISER-tiny", catalog=_own(folder)).tensors)
    for layout, places in (
        ("a1111", {"Components/net.safetensors", "Tiny texts/text.safetensors"}),
        ("tiny-program", {"nets/net.safetensors", "rest/text.safetensors"}),
    ):
        here = folder.beside(layout)
        (here / "models").mkdir()
        done = here(
            "prune", "--watch", "in", "--into", "models", "--layout", layout, "--once", "--settle", "0"
        )
        assert done.code == 0, done.err
        found = {str(p.relative_to(here / "models")) for p in (here / "models").rglob("*.safetensors")}
        assert found == places
    done = folder("prune", "--watch", "in", "--layout", "tiny-progam", "--once")
    assert (done.code, "did you mean `tiny-program`?" in done.err) == (2, True)


def _own(folder: Folder) -> Catalog:
    return load_catalog([Path(folder.environment["CKPT_COMPONENTS"])])


# ── no module speaks of a family ──

# The demonstration is of the miniatures.
DEMO = ROOT / "toolkit" / "demo.py"


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module that it works with: no docstrings, and no examples and hints for people."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg in ("hint", "help")):
            told |= set(ast.walk(node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Key":
            told |= {n for arg in node.args[1:] for n in ast.walk(arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
            yield node.lineno, node.value


def test_no_module_names_a_family() -> None:
    known = catalog()
    names = {*known.classes, *known.components, *known.architectures, *known.layouts}
    named = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])|EMA-|-NAI\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]!r}"
        for path in sorted(ROOT.rglob("*.py"))
        if path != DEMO
        for line, text in _strings(path)
        if named.search(text)
    ]
    assert not wrong, "\n".join(wrong)
