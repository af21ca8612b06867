"""`ckpt merge` and `ckpt lora`: a recipe of one step in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomli

from builder.toolkit.merge import parse_value
from tests.help.building import Folder, content, model, save, values

STEPS = """format = 1
name = "a-b"
base = "merged"
sources = {{ {sources} }}
[steps]
merged = {{ {step} }}
"""
SUM = 'op = "weighted-sum", a = "a", b = "b", alpha ='


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    for seed, name in enumerate("abc"):
        save(made / f"{name}.safetensors", model(seed=seed))
    return made


def recipe(folder: Folder, names: str, step: str, file: str = "r") -> Path:
    sources = ", ".join(f'{n} = {{ file = "{n}.safetensors" }}' for n in names)
    folder.write(f"{file}.toml", STEPS.format(sources=sources, step=step))
    said = folder("build", f"{file}.toml")
    assert said.code == 0, said.err
    return folder / "a-b.safetensors"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("1", 1),
        (".5", 0.5),
        ("0,0.5,1", [0, 0.5, 1]),
        ("GRAD_V", "GRAD_V"),
        ("true", True),
        ('"1"', "1"),
        ("[1, 2]", [1, 2]),
        ("{ UNET = 0.3 }", {"UNET": 0.3}),
        ("UNET=0.3,CLIP=GRAD_V", {"UNET": 0.3, "CLIP": "GRAD_V"}),
        ("base=0,IN00-IN03=0.1, OUT*=0.4", {"base": 0, "IN00-IN03": 0.1, "OUT*": 0.4}),
        ("a=,b", "a=,b"),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("a b --alpha 0.3", f"{SUM} 0.3"),
        (
            "a b --alpha UNET=0.3,CLIP=0",
            SUM + " { UNET = 0.3, CLIP = 0 }",
        ),
        ("a b --alpha 0.3 --vae", f"{SUM} 0.3, VAE = true"),
        (
            "a b c --op add-difference --alpha 1",
            'op = "add-difference", a = "a", b = "b", c = "c", alpha = 1',
        ),
        ("a=0.4 b=0.6", 'op = "linear", of = { a = 0.4, b = 0.6 }'),
        ("a=UNET=0.4,CLIP=1 b=0.6", 'op = "linear", of = { a = { UNET = 0.4, CLIP = 1 }, b = 0.6 }'),
        (
            "a b=0.5 c=0.5 --op dare --set density=0.5 --set seed=7",
            'op = "dare", base = "a", of = { b = 0.5, c = 0.5 }, density = 0.5, seed = 7',
        ),
        ("a b c --op model-stock", 'op = "model-stock", base = "a", of = ["b", "c"]'),
    ],
)
def test_a_line_makes_what_its_recipe_makes(folder: Folder, words: str, step: str) -> None:
    files, *options = re.split(r" (?=--)", words, maxsplit=1)
    named = [f"{word[0]}.safetensors{word[1:]}" for word in files.split()]
    said = folder(
        "merge", *named, *"".join(options).split(), "-o", "m.safetensors", "--save-recipe", "m.toml"
    )
    assert said.code == 0, said.err
    wanted = recipe(folder, "".join(n[0] for n in named), step)
    assert content(folder / "m.safetensors") == content(wanted)
    saved = tomli.loads((folder / "m.toml").read_text())
    assert saved["steps"]["merged"] == tomli.loads(f"s = {{ {step} }}")["s"]
    made = (folder / "m.safetensors").read_bytes()
    assert folder("build", "m.toml", "-o", "again.safetensors").code == 0
    assert (folder / "again.safetensors").read_bytes() == made


def test_the_name_that_is_written_is_no_part_of_the_bytes(folder: Folder) -> None:
    for name in ("m.safetensors", "n.safetensors"):
        line = ("merge", "a.safetensors", "b.safetensors", "--alpha", "0.5", "-o", name)
        said = folder(*line)
        assert said.code == 0 and "`--vae` merges it" in said.err
    assert (folder / "m.safetensors").read_bytes() == (folder / "n.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("a.safetensors b.safetensors --op weigted-sum", 2, "did you mean `weighted-sum`?"),
        ("a.safetensors --alpha 1", 2, "`weighted-sum` is of 2 files, not of 1"),
        ("a.safetensors b.safetensors c.safetensors --alpha 1", 2, "`--op add-difference`, "),
        ("a.safetensors b.safetensors --op soup", 2, "known: `weighted-sum`, `add-difference`, "),
        ("a.safetensors b.safetensors --alpha 0,5", 2, "a number has a point, as `0.5`"),
        ("a.safetensors b.safetensors --alpha 0.3 --set alpha=0.5", 2, "`alpha` is given twice"),
        ("a.safetensors b.safetensors --set beta=0.3 --set beta=1", 2, "`beta` is given twice"),
        ("a.safetensors=1 b.safetensors --op slerp", 2, "no weight goes with this input of `slerp`"),
        ("a.safetensors=0.5 a.safetensors=0.5", 2, "is given twice"),
        ("a.safetensors b.safetensors --set a=c", 2, "`a` is `a` already"),
        ("a.safetensors b.safetensors --set alpha", 2, "not of the form KEY=VALUE"),
        ("a.safetensors b.safetensors --alpha 0.5 --beta 1", 2, "unknown key `beta`"),
        ("a.safetensors b.safetensors --alpha NONE_SUCH", 2, "NONE_SUCH"),
        ("a.safetensors d.safetensors --alpha 1", 6, "cannot open `d.safetensors`"),
        ("a.safetensors b.safetensors --op extract-lora --alpha 1", 2, "no merge is called `extract-lora`"),
    ],
)
def test_refusals(folder: Folder, words: str, code: int, told: str) -> None:
    before = sorted(p.name for p in folder.path.iterdir())
    said = folder("merge", *words.split(), "-o", "m.safetensors")
    assert said.code == code and told in said.err, said.err
    assert sorted(p.name for p in folder.path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("lora a.safetensors l.safetensors", "`--ignore-unmatched`"),
        ("merge a.safetensors l.safetensors --op apply-lora", "`--set unmatched=ignore`"),
    ],
)
def test_hints_are_in_the_words_of_the_command_line(folder: Folder, words: str, option: str) -> None:
    save(folder / "a.safetensors", model("SD-mini"))
    save(folder / "l.safetensors", {f"{'x' * 40}.lora_{n}.weight": values([[1.0]]) for n in ("up", "down")})
    said = folder(*words.split(), "-o", "x.safetensors")
    assert said.code == 6 and f"; {option} leaves them out" in said.err
    assert folder(*words.split(), "-o", "x.safetensors", "--json").code == 6


@pytest.mark.parametrize(
    "args",
    [
        ("merge", "aa.safetensors", "a.safetensors", "x.ckpt"),
        ("lora", "aa.safetensors", "x.ckpt=0.5"),
        ("replace", "aa.safetensors", "VAE=x.ckpt"),
        ("replace", "NEW SD-tiny", "UNET=aa.safetensors", "VAE=x.ckpt"),
        ("new", "new sd-tiny", "UNET=aa.safetensors", "VAE=x.ckpt"),
        ("new", "aa.safetensors", "x.ckpt"),
    ],
)
def test_all_files_that_are_missing_are_told_at_once(folder: Folder, args: tuple[str, ...]) -> None:
    said = folder(*args, "-o", "o.toml" if args[0] == "new" else "o.safetensors")
    assert (said.code, said.err.split("\n\n")) == (
        6,
        [
            "error: cannot open `aa.safetensors`\n   = No such file or directory\n"
            "hint: did you mean `a.safetensors`?",
            "error: cannot open `x.ckpt`\n   = No such file or directory\n",
        ],
    )


def test_a_wrong_strength_is_told_without_a_recipe_that_nobody_wrote(folder: Folder) -> None:
    said = folder("lora", "a.safetensors", "b.safetensors=abc", "-o", "o.safetensors")
    hint = "write numbers with commas between, the base first"
    assert (said.code, said.err) == (2, f"error: unknown preset `abc`\nhint: {hint}\n")
