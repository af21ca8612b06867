"""Recipes: what they say, and what is said of wrong ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import ExitCode, RecipeError, render
from builder.models.catalog import load_catalog
from builder.operations.registry import Operation, Param
from builder.recipe import FromBase, NewBase, Pick, Recipe, load_recipe, parse_recipe, slot_problems
from tests.help.recipe_words import GOLDEN, OPERATIONS, golden

CATALOG = load_catalog(())
HEAD = 'format = 1\nname = "mix"\n'
VALID = sorted((GOLDEN / "valid").glob("*.toml"))
WRONG = sorted(p for folder in ("shape", "meaning") for p in (GOLDEN / folder).glob("*.toml"))


def read(text: str) -> Recipe:
    return parse_recipe(text, "mix.toml", CATALOG, operations=OPERATIONS)


def messages(error: RecipeError) -> str:
    return "\n\n".join(render(p) for p in error.problems) + "\n"


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_meaning_of_valid_recipes(path: Path) -> None:
    recipe = read(path.read_text(encoding="utf-8"))
    text = json.dumps(recipe.meaning(), indent=2, ensure_ascii=False) + "\n"
    assert text == golden(path.with_suffix(".json"), text)


@pytest.mark.parametrize("path", WRONG, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_messages_about_wrong_recipes(path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(path.read_text(encoding="utf-8"), path.name, CATALOG, operations=OPERATIONS)
    assert caught.value.exit_code is ExitCode.RECIPE
    assert messages(caught.value) == golden(path.with_suffix(".txt"), messages(caught.value))


def test_spelling_order_and_comments_mean_nothing() -> None:
    plain = read(
        HEAD
        + """base = "NEW SD-v1"
fixes = ["clip-names", "clip-position-ids"]
[sources.a]
file = "one.ckpt"
sha256 = "8712e20a5d65b6acaa743e8a74961eadfdf846a2c9a32160d80a80cba13ad475"
[components]
UNET-v1 = "a"
VAE-v1 = "a"
CLIP-v1 = "a"
"""
    )
    other = read(
        """# a comment
components = { CLIP-v1 = { from = "a" }, unet_v1 = "a", VAEv1 = "a" }
fixes = ["clip-position-ids", "clip-names"]
base = "NEW sdv1"
name = "mix"
description = ""
format = 1
output = { precision = "published", file = "elsewhere/other.safetensors" }
expect.size = 3
[sources]
a.sha256 = "8712E20A5D65B6ACAA743E8A74961EADFDF846A2C9A32160D80A80CBA13AD475"
a.file = "folder/another.ckpt"
a.urls = ["hf://org/name/another.ckpt"]
"""
    )
    assert plain.meaning() == other.meaning()
    assert plain.digest == other.digest


def test_where_an_unpinned_source_lies_is_not_meaning() -> None:
    text = HEAD + 'base = "a"\n[sources.a]\nfile = "a.ckpt"\n'
    assert read(text).digest == read(text.replace("a.ckpt", "folder/c.safetensors")).digest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('name = "mix"', 'name = "mux"'),
        ('name = "mix"', 'name = "mix"\ndescription = "mixed"'),
        ('base = "a"', 'base = "b"'),
        ('UNET-v1 = "b"', 'UNET-v1 = { from = "b", component = "UNET-v1-EMA" }'),
        ('UNET-v1 = "b"', 'VAE-v1 = "b"'),
        ("[sources.a]", 'fixes = ["clip-names"]\n[sources.a]'),
        ('precision = "fp16"', 'precision = "fp32"'),
        ('precision = "fp16"', 'overflow = "clamp"'),
        ('precision = "fp16"', 'non_finite = "keep"'),
        ('precision = "fp16"', 'markers = ["v_pred"]'),
        ('precision = "fp16"', "keep = []"),
        ('precision = "fp16"', 'metadata.author = "me"'),
        ('precision = "fp16"', 'profile = "kohya"'),
        ('precision = "fp16"', 'config = "mix.yaml"'),
    ],
)
def test_what_decides_the_product_is_meaning(before: str, after: str) -> None:
    text = (
        HEAD
        + """base = "a"
[sources.a]
file = "a.ckpt"
[sources.b]
file = "b.ckpt"
[components]
CLIP-v1 = "a"
UNET-v1 = "b"
EMA-UNET-v1 = "b"
[output]
precision = "fp16"
"""
    )
    assert before in text
    assert read(text).digest != read(text.replace(before, after, 1)).digest


def test_outputs_hold_what_the_recipe_says_or_their_own() -> None:
    recipe = read((GOLDEN / "valid" / "several-outputs.toml").read_text(encoding="utf-8"))
    full, fp16, other = recipe.outputs
    assert [o.file for o in recipe.outputs] == [f"mix-{n}.safetensors" for n in ("full", "fp16", "other")]
    assert (full.base, other.base) == (NewBase("SD-v1"), FromBase("b"))
    assert (full.fixes, fp16.fixes) == ((), ("clip-position-ids",))
    assert list(full.components) == ["UNET-v1", "CLIP-v1", "VAE-v1", "EMA-UNET-v1"]
    assert other.components["VAE-v1"] == Pick("VAE-v1", "a")
    assert (full.keep, other.keep) == (None, ())
    assert fp16.expect.size == 10
    assert recipe.output("fp16") is fp16
    assert recipe.output() is None


def test_the_defaults_of_one_output() -> None:
    recipe = read((GOLDEN / "valid" / "minimal.toml").read_text(encoding="utf-8"))
    (output,) = recipe.outputs
    assert (output.name, output.file, output.precision) == ("mix", "mix.safetensors", "published")
    assert recipe.output() is output


def test_places_are_those_of_the_text() -> None:
    recipe = read((GOLDEN / "valid" / "several-outputs.toml").read_text(encoding="utf-8"))
    place = recipe.place(*recipe.outputs[2].components["VAE-v1"].at, value=True)
    assert place.text is not None and place.column is not None
    assert place.text[place.column - 1 :].startswith('"a"')
    assert recipe.place(*recipe.outputs[2].base.at).text == 'base = "b"'


def test_slots_that_a_base_holds_need_no_filling() -> None:
    recipe = read((GOLDEN / "valid" / "minimal.toml").read_text(encoding="utf-8"))
    architecture = CATALOG.architecture("SD-v1")
    (output,) = recipe.outputs
    assert not list(slot_problems(recipe, output, architecture, CATALOG, architecture.slots))
    (problem,) = slot_problems(recipe, output, architecture, CATALOG, ["UNET-v1", "VAE-v1"])
    assert "`CLIP-v1`" in problem.fact


@pytest.mark.parametrize(
    ("slot", "component"),
    [
        ("UNET-v1", "UNET-v1-EMA"),  # the same tensors under other names
        ("UNET-v1", "UNET-v1-Inpainting"),  # another of the class
        ("CLIP-XL-AUX", "CLIP-v1-SD"),  # the same tensors in another class
    ],
)
def test_components_that_can_fill_a_slot(slot: str, component: str) -> None:
    text = HEAD + f'base = "a"\nsources.a.file = "a"\ncomponents.{slot}.from = "a"\n'
    recipe = read(text + f'components.{slot}.component = "{component}"\n')
    assert recipe.components[slot] == Pick(slot, "a", component)


def test_an_operation_is_all_that_a_new_step_needs() -> None:
    kinds = {"word": Param("string", "A word."), "flag": Param("boolean", "A flag.", default=False)}
    operation = Operation("twist", 1, "Twists.", ("model",), lambda i, p: i["model"], params=kinds)
    text = HEAD + 'base = "t"\nsources.a.file = "a"\n[steps.t]\nop = "twist"\nmodel = "a"\nword = "left"\n'
    recipe = parse_recipe(text, "mix.toml", CATALOG, operations={"twist": operation})
    assert recipe.steps["t"].inputs == {"model": "a"}
    assert recipe.steps["t"].params == {"word": "left", "flag": False}


def test_a_path_of_one_machine_is_noted() -> None:
    for path in ("/models/a.ckpt", "C:\\\\models\\\\a.ckpt"):
        recipe = read(HEAD + f'base = "a"\n[sources.a]\nfile = "{path}"\n')
        (note,) = recipe.notes
        assert note.place is not None and note.place.line == 5
        assert "one machine" in note.fact
    assert not read(HEAD + 'base = "a"\n[sources.a]\nfile = "../a.ckpt"\n').notes


@pytest.mark.parametrize("digits", [30, 400, 5000])
@pytest.mark.parametrize("key", ["format", "sources.a.size", "steps.s.alpha"])
def test_numbers_that_are_too_large(key: str, digits: int) -> None:
    text = 'name = "mix"\nbase = "s"\n' + ("" if key == "format" else "format = 1\n")
    step = 'sources.a.file = "a"\nsteps.s.op = "weighted-sum"\nsteps.s.a = "a"\nsteps.s.b = "a"\n'
    with pytest.raises(RecipeError):
        read(f"{text}{step}{key} = {'9' * digits}\n")


def test_more_problems_than_anyone_reads() -> None:
    with pytest.raises(RecipeError) as caught:
        read(HEAD + "".join(f"key{i} = 1\n" for i in range(10_000)))
    assert len(caught.value.problems) == 101
    assert "more problems" in caught.value.problems[-1].fact


def test_a_long_chain_of_steps_is_refused_in_words() -> None:
    steps = [
        f'[steps.s{i}]\nop = "weighted-sum"\na = "s{i + 1}"\nb = "a"\nalpha = 0.5\n' for i in range(1000)
    ]
    text = HEAD + 'base = "s0"\n[sources.a]\nfile = "a"\n' + "".join(steps)
    with pytest.raises(RecipeError, match="steps are made of each other too deeply"):
        read(text.replace('a = "s1000"', 'a = "a"'))
    assert len(read(text.replace('a = "s64"', 'a = "a"').partition("[steps.s64]")[0]).steps) == 64


# -- files


def test_a_file_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    text = HEAD + 'base = "a"\n[sources.a]\nfile = "a"\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_recipe(path, CATALOG) == read(text)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b"#" * (1 << 20) + b"\n"), "too large"),
        (lambda p: p.write_bytes(b'name = "\xff"'), "not UTF-8"),
        (lambda p: p.write_bytes(b""), "empty"),
        (_fifo, "no regular file"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, make: object, fact: str) -> None:
    path = tmp_path / "mix.toml"
    make(path)  # type: ignore[operator]
    with pytest.raises(RecipeError, match=fact):
        load_recipe(path, CATALOG)


def _write(folder: Path, **recipes: str) -> None:
    for name, body in recipes.items():
        (folder / f"{name}.toml").write_text(f'format = 1\nname = "{name}"\n{body}', encoding="utf-8")


def test_a_recipe_builds_on_recipes(tmp_path: Path) -> None:
    _write(
        tmp_path,
        top='base = "left"\nsources.left.recipe = "left.toml"\nsources.right.recipe = "right.toml"\n'
        'sources.right.output = "two"\ncomponents.VAE-v1 = "right"\n',
        left='base = "deep"\nsources.deep.recipe = "deep.toml"\n',
        right='base = "deep"\nsources.deep.recipe = "deep.toml"\n[[output]]\nname = "one"\n'
        '[[output]]\nname = "two"\n',
        deep='base = "a"\nsources.a.file = "a.ckpt"\n',
    )
    top = load_recipe(tmp_path / "top.toml", CATALOG)
    left, right = top.included["left"], top.included["right"]
    assert left.included["deep"] is right.included["deep"]
    assert left.path == tmp_path / "left.toml"
    before = top.digest
    _write(tmp_path, deep='base = "a"\nsources.a.file = "a.ckpt"\noutput.precision = "fp32"\n')
    assert load_recipe(tmp_path / "top.toml", CATALOG).digest != before


def test_recipes_nested_deeper_than_anyone_means(tmp_path: Path) -> None:
    _write(tmp_path, **{f"r{i}": f'base = "a"\nsources.a.recipe = "r{i + 1}.toml"\n' for i in range(40)})
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(tmp_path / "r0.toml", CATALOG)


@pytest.mark.parametrize(
    ("name", "recipes"),
    [
        ("include-itself", {"top": 'base = "a"\nsources.a.recipe = "./top.toml"\n'}),
        (
            "include-each-other",
            {
                "top": 'base = "a"\nsources.a.recipe = "one.toml"\n',
                "one": 'base = "a"\nsources.a.recipe = "two.toml"\n',
                "two": 'base = "a"\nsources.a.recipe = "one.toml"\n',
            },
        ),
        (
            "include-outputs",
            {
                "top": 'base = "a"\nsources.a.recipe = "one.toml"\nsources.b.recipe = "one.toml"\n'
                'sources.b.output = "fp32"\ncomponents.VAE-v1 = "b"\n',
                "one": 'base = "a"\nsources.a.file = "a"\n'
                '[[output]]\nname = "fp16"\n[[output]]\nname = "ft"\n',
            },
        ),
        (
            "include-problems",
            {
                "top": 'base = "a"\nsources.a.recipe = "one.toml"\nsources.b.recipe = "gone.toml"\n'
                'components.VAE-v1 = "b"\n',
                "one": 'base = "b"\nsources.a.file = "a"\n',
            },
        ),
    ],
)
def test_messages_about_included_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipes: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, **recipes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("top.toml"), CATALOG)
    assert messages(caught.value) == golden(GOLDEN / f"{name}.txt", messages(caught.value))


# -- anything at all


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for start in ("", HEAD):
        try:
            read(start + text)
        except RecipeError as error:
            assert messages(error)
