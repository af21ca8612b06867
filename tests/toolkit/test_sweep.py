"""Variants of a recipe: which there are, that each stands alone, and what cannot be varied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli

from builder.base.errors import UsageError
from builder.toolkit.sweep import parse_axis
from tests.help.building import Folder, model, save

MIX = """\
# A mix of two.
format = 1
name = "mix"
base = "half"
[sources]
a.file = "a.safetensors"
b.file = "b.safetensors"
[steps]
half = { op = "weighted-sum", a = "a", b = "b", alpha = 0.5 }
[output]
file = "out/mix.safetensors"
[expect]
size = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save(made / "a.safetensors", model(seed=1))
    save(made / "b.safetensors", model(seed=2))
    made.know("a.safetensors", "b.safetensors")
    made.write("mix.toml", MIX)
    return made


@pytest.mark.parametrize(
    ("said", "values"),
    [
        ("steps.half.alpha=0.1:0.9:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
        ("steps.half.alpha=1:0:-0.5", (1.0, 0.5, 0.0)),
        ("x=1:7:3", (1, 4, 7)),
        ("x=0:1:0.4", (0.0, 0.4, 0.8)),
        ("output.precision=fp16,bf16", ("fp16", "bf16")),
        ("x=true,0.25,3", (True, 0.25, 3)),
        ('steps."a.b".alpha=1', (1,)),
    ],
)
def test_values(said: str, values: tuple[Any, ...]) -> None:
    assert repr(parse_axis(said).values) == repr(values)


@pytest.mark.parametrize(
    "said",
    ["alpha", "=1", "a=", "a b=1", "a=1:2", "a=1:2:0", "a=2:1:1", "a=0:1:nan", "a=0:1e9:1", "a=1,1", "a\n=1"],
)
def test_what_is_no_axis(said: str) -> None:
    with pytest.raises(UsageError):
        parse_axis(said)


def test_each_variant_builds_alone_to_the_same_bytes(folder: Folder) -> None:
    said = folder("sweep", "mix.toml", "steps.half.alpha=0.25:0.75:0.25")
    assert said.code == 0, said.err
    assert said.out.endswith("3 recipes: 3 built\n")
    names = [f"mix-half-alpha-{v}" for v in ("0.25", "0.5", "0.75")]
    alone = folder.beside("alone", store="other")
    for name in names:
        product = Path("out", f"{name}.safetensors")
        (alone.path / product).unlink()
        (alone / f"{name}.lock.toml").unlink()
        alone.build(f"{name}.toml")
        for file in (product, f"{name}.lock.toml"):
            assert (alone.path / file).read_bytes() == (folder.path / file).read_bytes()
        recipe = tomli.loads((folder / f"{name}.toml").read_text())
        assert recipe["name"] == name and "expect" not in recipe
        assert recipe["steps"]["half"]["alpha"] == float(name.rpartition("-")[2])
    assert len({(folder / "out" / f"{n}.safetensors").read_bytes() for n in names}) == 3
    assert folder("sweep", "mix.toml", "steps.half.alpha=0.25:0.75:0.25").out.count("unchanged") == 3


def test_every_combination(folder: Folder) -> None:
    said = folder(
        "sweep", "mix.toml", "steps.half.alpha=0,1", "output.precision=fp16,fp32", "--no-build", "--json"
    )
    found = [r["recipe"] for r in json.loads(said.out)["recipes"]]
    assert found == [f"mix-half-alpha-{a}-precision-{p}.toml" for a in (0, 1) for p in ("fp16", "fp32")]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("axis", "code", "words"),
    [
        ("steps.hafl.alpha=1", 2, "did you mean `half`?"),
        ("steps.half.alpha=x", 3, "alpha"),
        ("steps.half.alhpa=1", 3, "did you mean `alpha`?"),
        ("name.x=1", 2, "is no table"),
        ("alpha=0.1,0.2", 2, "hint: as in `steps.half.alpha`"),
        ("steps.half.alpha=0.1,0.2 steps.half.alpha=0.3", 2, "`steps.half.alpha` is given twice"),
    ],
)
def test_what_cannot_be_varied(folder: Folder, axis: str, code: int, words: str) -> None:
    said = folder("sweep", "mix.toml", *axis.split())
    assert said.code == code and words in said.err
    assert not list(folder.path.glob("mix-*"))


def test_where_outputs_go(folder: Folder) -> None:
    assert folder("sweep", "mix.toml", "output.precision=fp16,bf16", "-o", "new/").code == 0
    names = {f"mix-precision-{p}" for p in ("fp16", "bf16")}
    assert {p.name for p in (folder / "new").iterdir()} == {f"{n}.safetensors" for n in names}
    assert {p.stem for p in folder.path.glob("mix-*.toml")} == names | {f"{n}.lock" for n in names}
    said = folder("sweep", "mix.toml", "output.precision=fp16", "-o", "x.ckpt")
    assert said.code == 2 and "`-o x.ckpt/` is one" in said.err


def test_what_is_not_there_to_vary(folder: Folder) -> None:
    folder.write("plain.toml", 'format = 1\nname = "p"\nbase = "a"\nsources.a.file = "a.safetensors"\n')
    said = folder("sweep", "plain.toml", "steps.half.alpha=0.1,0.2")
    assert said.code == 2 and "the recipe has no `steps`" in said.err and "it has `sources`" in said.err
    assert "hint: " in said.err
    said = folder("sweep", "https://example.org/x.toml", "steps.half.alpha=0.1,0.2")
    assert said.code == 2 and "does not take a recipe's address" in said.err


def test_a_recipe_that_is_there_stays(folder: Folder) -> None:
    mine = folder.write("mix-half-alpha-0.5.toml", MIX)
    said = folder("sweep", "mix.toml", "steps.half.alpha=0.5")
    assert said.code == 7 and "another recipe" in said.err and mine.read_text() == MIX


def test_pins_of_the_lock_go_along(folder: Folder) -> None:
    text = MIX.replace('b.file = "b.safetensors"', 'b = { urls = ["file:b.safetensors"] }')
    folder.write("mix.toml", text.partition("[expect]")[0])
    assert folder("build", "mix.toml").code == 0
    lock = tomli.loads((folder / "mix.lock.toml").read_text())
    assert folder("sweep", "mix.toml", "steps.half.alpha=0.1", "--no-build").code == 0
    variant = tomli.loads((folder / "mix-half-alpha-0.1.toml").read_text())
    assert variant["sources"]["b"]["sha256"] == lock["sources"]["b"]["sha256"]
    assert "sha256" not in variant["sources"]["a"]
