"""The catalog's language, its errors, and learning a table from a checkpoint."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder.base.braces import BraceError, escape, expand
from builder.base.errors import CatalogError, UsageError, render
from builder.base.words import fits_pattern
from builder.cli import run
from builder.models.catalog import RANK, TensorRule, load_catalog
from builder.models.catalog.layouts import _LAYOUT, _PART, _RULES
from builder.models.catalog.learn import compress
from builder.models.catalog.reading import (
    _ALONE,
    _ARCHITECTURE,
    _CLASS,
    _COMPONENT,
    _MODELSPEC,
    _PREFIXES,
    _SCALE,
    parse_table,
)
from builder.recipe import parse_recipe

# ── braces ──


@pytest.mark.parametrize(
    ("pattern", "names", "last"),
    [
        ("a.b", ["a.b"], 1),
        ("{a,b}.{c,d}", ["a.c", "a.d", "b.c", "b.d"], 2),
        ("x{9..11}", ["x9", "x10", "x11"], 3),
        ("{0..1,4}", ["0", "1", "4"], 3),
        ("{a,b{1,2}}", ["a", "b1", "b2"], 3),
        ("{,post_}q.{0..0}", ["q.0", "post_q.0"], 1),
        (r"\{a,b\}\\{c,d\,e}", [r"{a,b}\c", r"{a,b}\d,e"], 2),
        ("{a,b}.c,d", ["a.c,d", "b.c,d"], 2),
    ],
)
def test_braces(pattern: str, names: list[str], last: int) -> None:
    assert expand(pattern) == (names, last)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a{b", "`{` without its `}`"),
        ("a{b,{c}", "a brace needs two alternatives"),
        ("a}b", "`}` without its `{`"),
        ("{a}", "a brace needs two alternatives or a range"),
        ("{}", "a brace needs two alternatives or a range"),
        ("{3..1}", "`3..1` is not a range"),
        ("{0..999999999}", "is not a range"),
        ("{0..99}" * 9, "stands for more than 100000 names"),
        ("{a,{0..999}{0..999}}", "stands for more than 100000 names"),
        ("a\\", "ends in a backslash"),
        ("{a," * 5000, "nested too deeply"),
        ("{a," * 9 + "b" + "}" * 9, "nested too deeply"),
        ("{0..99999}" + "a" * 1000, "names of more than 16777216 characters"),
    ],
)
def test_wrong_braces(pattern: str, reason: str) -> None:
    with pytest.raises(BraceError) as caught:
        expand(pattern)
    assert reason in str(caught.value)


@given(st.text("ab{},\\.0*", max_size=12))
def test_an_escaped_name_stands_for_itself(name: str) -> None:
    assert expand(escape(name))[0] == [name]


# ── tables ──


def _table(body: str, **fields: Any) -> str:
    known = {"name": '"T"', "class": '"C"'} | fields
    return "\n".join([*(f"{k} = {v}" for k, v in known.items()), "[tensors]", body]) + "\n"


def _expand(body: str, **fields: Any) -> dict[str, TensorRule]:
    return parse_table(_table(body, **fields), "t.toml").expand({})


def test_headings_join_and_shapes_pair_with_the_last_brace() -> None:
    found = _expand(
        """
"a.{weight,bias}" = [[2, 3], [2]]
s = []
[tensors."b.{0,1}".c]
k = [[4], [5]]
"d.{x,y}" = [6]
[tensors.b]
ids = { shape = [1, 77], dtype = "I64", optional = true }
"r.{x,y}" = { shape = [[-1, 2], [2, -1]], optional = true }
""",
        keys=12,
        parameters=119,
    )
    assert {n: r.shape for n, r in found.items()} == {
        "a.weight": (2, 3),
        "a.bias": (2,),
        "s": (),
        "b.0.c.k": (4,),
        "b.1.c.k": (5,),
        "b.0.c.d.x": (6,),
        "b.0.c.d.y": (6,),
        "b.1.c.d.x": (6,),
        "b.1.c.d.y": (6,),
        "b.ids": (1, 77),
        "b.r.x": (RANK, 2),
        "b.r.y": (2, RANK),
    }
    assert found["b.ids"] == TensorRule((1, 77), "I64", True)
    assert found["b.r.x"] == TensorRule((RANK, 2), None, True)
    assert found["a.weight"] == TensorRule((2, 3), None, False)


GOOD = {"keys": 1, "parameters": 6}


@pytest.mark.parametrize(
    ("text", "line", "shown", "fact"),
    [
        (_table('"a" = [2, 3]\n"a" = [2]', **GOOD), 7, '"a"', "`a` is given twice"),
        (_table('"a.{b,c}" = [3]\n"{a,d}.c" = [3]', **GOOD), 7, '"{a,d}.c"', "`a.c` is declared twice"),
        (_table('"a" = [2, 3]\n[tensors.b]\nc.d = 4', **GOOD), 8, "4", "a shape is a list of numbers"),
        (_table('a = [2, "x"]', **GOOD), 6, '[2, "x"]', "a shape is a list of numbers"),
        (_table("a = [2, -3]", **GOOD), 6, "[2, -3]", "a shape is a list of numbers"),
        (_table("a = [true]", **GOOD), 6, "[true]", "a shape is a list of numbers"),
        (_table("a = [2, 3]", keys=2, parameters=6), 3, "2", "`keys` is 2, but the table has 1 tensors"),
        (
            _table("a = [2, 3]", keys=1, parameters=7),
            4,
            "7",
            "`parameters` is 7, but the table has 6 elements",
        ),
        (_table("a = [2, 3]", keys=1), None, None, "`parameters` is missing"),
        (_table("a = [2, 3]", parameters=6), None, None, "`keys` is missing"),
        (_table("a = [-1, 3]", **GOOD), 4, "parameters", "a table with a rank has no number of `parameters`"),
        (_table('"a.{b,c" = [2, 3]', **GOOD), 6, '"a.{b,c"', "`{` without its `}`"),
        (
            _table('"a.{b,c}" = [[1], [2], [3]]', **GOOD),
            6,
            "[[1], [2], [3]]",
            "3 shapes do not pair with the last brace",
        ),
        (_table('"a" = [[1], [2]]', **GOOD), 6, "[[1], [2]]", "2 shapes do not pair with the last brace"),
        (_table('a = { shape = [6], dtype = "I46" }', **GOOD), 6, '"I46"', "unknown dtype `I46`"),
        (_table("a = { shape = [6], optinal = true }", **GOOD), 6, "optinal", "unknown field `optinal`"),
        (_table("a = { shape = [6], optional = 1 }", **GOOD), 6, "1", "`optional` is not true or false"),
        (_table("a = [6]", **GOOD, prefx='"x."'), 5, "prefx", "unknown field `prefx`"),
        (_table("a = [6]", **GOOD | {"keys": '"1"'}), 3, '"1"', "`keys` is not a number"),
        (_table("a = [6]", **GOOD, without='["a"]'), 5, "without", "`without` needs `extends`"),
        (_table("a = [6]", **GOOD, naming='"without-dots"'), 5, "naming", "`naming` needs `extends`"),
        ('name = "T"\nkeys = 1\n', None, None, "`class` is missing"),
        ('class = "C"\nkeys = 1\n', None, None, "`name` is missing"),
        (_table("a = [6", **GOOD), 6, "", "unclosed array"),
    ],
)
def test_errors_in_a_table(tmp_path: Path, text: str, line: int | None, shown: str | None, fact: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    problem = _problem(tmp_path)
    place = problem.place
    assert problem.fact == fact and place is not None
    assert place.path == f"{tmp_path}/t.toml" and place.line == line
    if shown:
        assert place.text is not None and place.column is not None
        assert place.text[place.column - 1 :][: place.width] == shown


def _problem(folder: Path) -> Any:
    with pytest.raises(CatalogError) as caught:
        load_catalog([folder])
    [problem] = caught.value.problems
    return problem


def _variant(folder: Path, name: str, extends: str, more: str = "") -> None:
    (folder / f"{name}.toml").write_text(f'name = "{name}"\nextends = "{extends}"\nkeys = 1\n{more}')


def test_a_cycle_of_extends(tmp_path: Path) -> None:
    for name, base in ("A", "B"), ("B", "C"), ("C", "A"):
        _variant(tmp_path, name, base)
    problem = _problem(tmp_path)
    assert problem.fact == "`C` extends itself" and problem.place.line == 2
    assert problem.evidence == ("A → B → C → A",)


def test_extending_what_is_not_there(tmp_path: Path) -> None:
    _variant(tmp_path, "A", "UNET-v1-DS")
    problem = _problem(tmp_path)
    assert problem.fact == "unknown component `UNET-v1-DS`" and problem.place.line == 2
    assert problem.hint == "did you mean `UNET-v1-SD`?"


def test_leaving_out_what_is_not_there(tmp_path: Path) -> None:
    _variant(tmp_path, "A", "CLIP-v1-SD", 'without = ["encoder.*",\n  "final_layer_nrm.bias"]\n')
    problem = _problem(tmp_path)
    assert problem.fact == "`CLIP-v1-SD` has no tensor `final_layer_nrm.bias`" and problem.place.line == 5
    assert problem.hint == "did you mean `final_layer_norm.bias`?"


def test_a_naming_that_joins_names(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(_table('"a.b" = [3]\nab = [3]', keys=2, parameters=6))
    _variant(tmp_path, "E", "T", 'naming = "without-dots"\n')
    assert _problem(tmp_path).fact == "two tensors of `T` get the same name"
    _variant(tmp_path, "E", "T", 'naming = "without-dot"\n')
    assert _problem(tmp_path).hint == "did you mean `without-dots`?"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(_table("a = [6]", name='"UNET-v1-SD"', **GOOD))
    problem = _problem(tmp_path)
    assert problem.fact == "component `UNET-v1-SD` is built in already" and problem.place.line == 1
    assert problem.evidence == ("in components_db/v1/UNET-v1-SD.toml",)
    (tmp_path / "mine.toml").unlink()
    for file in "ab":
        (tmp_path / f"{file}.toml").write_text(_table("a = [6]", **GOOD))
    assert _problem(tmp_path).fact == "component `T` is declared already"


PARTLY = "the names of `a` are not those of all its rows, each once"
PART = '[layouts.x]\nextends = "SD-v1"\n[layouts.x.parts.vae]\n'


@pytest.mark.parametrize(
    ("file", "text", "fact"),
    [
        ("architectures/a.toml", '[X]\nslots = ["UNET-v9"]', "unknown class `UNET-v9`"),
        ("architectures/a.toml", '[X]\nslots = ["UNET-v1"]\nonly = ["Y"]', "unknown component `Y`"),
        ("architectures/a.toml", '[SD-v1]\nslots = ["UNET-v1"]', "`SD-v1` already means SD-v1"),
        (
            "architectures/a.toml",
            '[X]\nslots = ["UNET-v1"]\naliases = ["sdXL"]',
            "`sdXL` already means SD-XL",
        ),
        ("architectures/a.toml", "[X]\nslots = []", "`slots` does not name each class once"),
        ("architectures/a.toml", '[X]\nslots = ["A", "A"]', "`slots` does not name each class once"),
        (
            "architectures/a.toml",
            '["\\u001b"]\nslots = ["A"]',
            "an architecture's name is no word that files can be named by",
        ),
        ("mine.toml", 'name = ""\nkeys = 1', "`name` is not a word that can be shown"),
        ("mine.toml", 'name = "a\\u001b[2J"\nkeys = 1', "`name` is not a word that can be shown"),
        ("optional.toml", "a = [-5]", 'a shape is a list of numbers, or "any"'),
        ("architectures/a.toml", "[X]\nslots = [1]", "`slots` is not a list of strings"),
        ("architectures/a.toml", "X = 1", "a table is due here"),
        ("known/k.toml", '[[metrics]]\nname = "x"', "unknown kind `metrics`"),
        ("known/k.toml", '[metric]\nname = "x"', "`metric` is not a list of tables"),
        ("known/k.toml", '[[file]]\nname = "x"\nsha256 = "abc"', "`sha256` is not 64 lower-case hex digits"),
        ("known/k.toml", '[[component]]\nname = "x"\nclass = "VAE-v1"', "`blake3` is missing"),
        (
            "known/k.toml",
            '[[metric]]\nname = "x"\nvalue = "12"',
            "a metric has four digits, or three times four with `/` for a model",
        ),
        ("optional.toml", 'x = "some"', 'a shape is a list of numbers, or "any"'),
        ("mine.toml", 'name = "x"\nclass = "x"\nkeys = 1\naverage = true', "`average` needs `naming`"),
        ("architectures.toml", '[X]\nslots = ["VAE-v1"]\ndiffusers = "SD-v8"', "unknown layout `SD-v8`"),
        (
            "architectures.toml",
            '[X]\nslots = ["VAE-v1"]\nmodelspec = { resolution = 512 }',
            "`architecture` is missing",
        ),
        (
            "architectures.toml",
            '[X]\nslots = ["VAE-v1"]\nsidecars_v = { a1111 = "../x.yaml" }',
            "there is no configuration `../x.yaml` beside this file",
        ),
        (
            "architectures.toml",
            '[X]\nslots = ["VAE-v1"]\nsidecars_v = { a111 = "v.yaml" }',
            "unknown program `a111`",
        ),
        ("classes.toml", '["VAE-v9"]\nfixes = []', "unknown class `VAE-v9`"),
        ("classes.toml", '["VAE-v1"]\nfixes = []', "class `VAE-v1` is described already"),
        ("classes.toml", '["VAE-v3"]\nfixs = []', "unknown field `fixs`"),
        ("classes.toml", '["VAE-v3"]\nprecision = "fp17"', "unknown precision `fp17`"),
        ("classes.toml", '["VAE-v3"]\nkept = ["{a"]', "`{` without its `}`"),
        ("mine.toml", _table("a = [6]", **GOOD, precision='"fp17"'), "unknown precision `fp17`"),
        ("classes.toml", '["VAE-v3"]\nmetric = { base = 1.0, k = 1 }', "`part` is missing"),
        (
            "classes.toml",
            '["VAE-v3"]\nmetric = { part = "x", base = 1.0, k = 1 }',
            "a metric has no part `x`",
        ),
        (
            "classes.toml",
            '["VAE-v3"]\nmetric = { part = "vae", base = 0.0, k = 1 }',
            "`base` is nothing to compare with",
        ),
        (
            "classes.toml",
            '["VAE-v3".blocks]\n"a." = "A"\n"a.b." = "B"',
            "`a.b.` and `a.` may both be of one name",
        ),
        (
            "classes.toml",
            '["VAE-v3".blocks]\n"a." = "base"',
            "`base` is no name of a block",
        ),
        (
            "classes.toml",
            '["VAE-v3".blocks]\n"{a,b,c}." = "{A,B}"',
            "2 blocks do not pair with 3 prefixes",
        ),
        (
            "classes.toml",
            '["VAE-v3"]\nlists = ["base"]\nblocks = { "a{0..18}." = "A{0..18}" }',
            "lists of as many numbers weigh `UNET-XL`, which has other blocks",
        ),
        ("classes.toml", '["VAE-v3"]\nlists = ["base"]', "`lists` needs `blocks`"),
        ("prefixes.toml", 'prefixes = ["a.", ""]', "`prefixes` holds nothing, or more than 100"),
        ("prefixes.toml", 'prefixes = ["a{0..100}."]', "`prefixes` holds nothing, or more than 100"),
        ("mine.toml", 'name = "x"\nclass = "x"\nkeys = 1\nalone = { prefx = "a." }', "unknown field `prefx`"),
        ("sites.toml", "[x.models]\na = 1", "`a` is not a string"),
        ("programs.toml", '[x]\ncheckpoint = "a"', "`other` is missing"),
        ("programs.toml", '[a1111]\nVAE = "a"', "a1111 has a folder for `VAE` already"),
        ("programs.toml", '[a1111]\nX = "../a"', "`X` is no folder below that of all models"),
        ("programs.toml", "[a1111]\nX = 1", "`X` is not a string"),
        ("kinds.toml", '[[kind]]\nkind = "X"\ncalled = "an X"', "nothing tells a file of it from others"),
        ("kinds.toml", '[[kind]]\nkind = "X"\nany = ["x"]', "`called` is missing"),
        ("kinds.toml", '[[kind]]\nkind = "X"\ncalled = "x"\nlast = ["x"]', "`last` is not a list of sizes"),
        ("kinds.toml", '[[model]]\nname = "X"\nof = ["X"]\nsizes = { "x" = "1" }', "`x` is no size"),
        ("kinds.toml", '[[kinds]]\nkind = "X"', "unknown kind `kinds`"),
        (
            "kinds.toml",
            f'[[kind]]\nkind = "X"\ncalled = "x"\nany = {[f"q*z{n}*y" for n in range(500)]}',
            "more than 500 patterns tell kinds of files",
        ),
        (
            "kinds.toml",
            '[[model]]\nname = "x"\nof = ["X"]\nsizes = { "q*y" = 1 }\n' * 500,
            "more than 500 patterns tell kinds of files",
        ),
        ("diffusers.toml", "[layout.x]", "unknown field `layout`"),
        ("diffusers.toml", '[layouts.x]\nextends = "SD-v0"', "no layout `SD-v0` to extend"),
        ("diffusers.toml", '[layouts.x]\nextends = "x"', "no layout `x` to extend"),
        ("diffusers.toml", "[layouts.SD-v1]\npixels = 1", "layout `SD-v1` is declared already"),
        ("diffusers.toml", "[layouts.x]\npixels = 1", "`has` is missing"),
        ("diffusers.toml", "[rules.VAE-v1]", "rules `VAE-v1` are declared already"),
        ("diffusers.toml", '[rules.x.names]\n"{a,b}" = "{a,b,c}"', "3 names do not pair with 2"),
        ("diffusers.toml", '[rules.x.names]\n"a{" = "b"', "`{` without its `}`"),
        ("diffusers.toml", '[rules.x.names]\n"{a,a}" = "b{0,1}"', PARTLY),
        ("diffusers.toml", '[rules.x.names]\n"a" = ["0+1/3 b", "2+1/3 c"]', PARTLY),
        ("diffusers.toml", '[rules.x.names]\n"a" = ["0+2/3 b", "1+2/3 c"]', PARTLY),
        ("diffusers.toml", '[rules.x.read_also]\n"a" = "0+1/3 b"', PARTLY),
        ("diffusers.toml", '[rules.x.names]\n"a" = "2+2/3 b"', "`2+2/3 b` is no name of a module"),
        ("diffusers.toml", '[rules.x.names]\n"a" = "turned b"', "`turned b` is no name of a module"),
        ("diffusers.toml", '[rules.x.names]\na = "b"\n"{a,c}" = "{b,d}"', "`a` has names already"),
        ("diffusers.toml", '[rules.x]\nextends = "y"', "no rules `y` to extend"),
        ("diffusers.toml", "[models.T5EncoderModel]", "model `T5EncoderModel` is declared already"),
        ("diffusers.toml", "[models.X]", "`library` is one of diffusers, transformers"),
        (
            "diffusers.toml",
            '[models.X]\nlibrary = "diffusers"\nsizes = { a = "b" }',
            "`b` tells no size",
        ),
        (
            "diffusers.toml",
            PART + 'model = "X"\nprefix = ""\nrules = "VAE-v1"',
            "which library has `X` is not known",
        ),
        (
            "diffusers.toml",
            PART + 'model = "X"\nprefix = ""\nrules = "VAE-v7"',
            "unknown rules `VAE-v7`",
        ),
        ("diffusers.toml", PART + 'tokenizer = ".."', "`..` is no folder of a model"),
        (
            "diffusers.toml",
            '[layouts.x]\nextends = "SD-v1"\n[layouts.x.parts.".."]',
            "`..` is no folder of a model",
        ),
    ],
)
def test_errors_in_other_files(tmp_path: Path, file: str, text: str, fact: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (tmp_path / "v.yaml").touch()
    problem = _problem(tmp_path)
    assert problem.fact == fact
    assert problem.place.line is not None and problem.place.text == text.split("\n")[problem.place.line - 1]


def test_a_message_shows_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(_table("a = [2, 3]", keys=2, parameters=6))
    message = render(_problem(tmp_path)).replace(str(tmp_path), "mine")
    assert message == (
        "error: `keys` is 2, but the table has 1 tensors\n"
        "  --> mine/t.toml:3:8\n"
        "  |\n"
        "3 | keys = 2\n"
        "  |        ^"
    )


# ── a user's own folder ──


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a class, a variant of a built-in component, an architecture and weights of its own."""
    folder = tmp_path / "own"
    (folder / "architectures").mkdir(parents=True)
    (folder / "known").mkdir()
    (folder / "t.toml").write_text(_table("a = [2, 3]", **GOOD))
    (folder / "VAE-tiny.toml").write_text(
        'name = "VAE-tiny"\nextends = "VAE-v1-SD"\nwithout = ["*.*.*", "*conv.{weight,bias}"]\n'
        'keys = 1\nparameters = 512\n[tensors]\n"latents" = [512]\n'
    )
    (folder / "architectures" / "a.toml").write_text('[Mine]\nslots = ["C", "VAE-v1"]\n')
    (folder / "known" / "k.toml").write_text(
        f'[[component]]\nname = "ours"\nclass = "C"\nblake3 = "{"ab" * 32}"\n'
    )
    return folder


def test_a_folder_of_ones_own_adds_to_the_catalog(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_COMPONENTS", os.pathsep.join([str(own), ""]))
    catalog = load_catalog()
    assert catalog is load_catalog([own])
    assert [c.name for c in catalog.candidates("VAE-v1", "mine")] == ["VAE-v1-SD", "VAE-tiny"]
    assert catalog.component_for("C", "MINE").name == "T"
    assert dict(catalog.components["VAE-tiny"].tensors) == {"latents": TensorRule((512,))}
    assert catalog.components["VAE-tiny"].prefix == "first_stage_model."
    part = catalog.known.part("AB" * 32)
    assert part is not None and part.name == "ours" and catalog.known.part("00" * 32) is None
    assert "T" not in load_catalog(()).components


def test_a_table_that_has_changed_is_read_again(own: Path) -> None:
    before = load_catalog([own])
    (own / "known" / "k.toml").unlink()
    after = load_catalog([own])
    assert before.known.part("ab" * 32) is not None and after.known.part("ab" * 32) is None
    assert after is load_catalog([own])


def test_a_component_of_ones_own_fills_a_slot_by_its_prefix(tmp_path: Path) -> None:
    for name, embedder in ("here", 1), ("elsewhere", 0):
        prefix = f'prefix = "conditioner.embedders.{embedder}.model."'
        without = 'without = ["transformer.*", "*embedding*", "*.*", "text_projection"]'
        _variant(tmp_path, name, "CLIP-XL-SD", f"{prefix}\nparameters = 1\n{without}\n")
    catalog = load_catalog([tmp_path])
    assert [c.name for c in catalog.candidates("CLIP-XL", "SD-XL")] == ["CLIP-XL-SD", "here"]
    assert [c.name for c in catalog.candidates("CLIP-XL", "SD-XL-Refiner")] == [
        "CLIP-XL-Refiner",
        "elsewhere",
    ]


def test_precisions_and_exceptions_are_of_components_and_classes(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(_table("a = [6]", **GOOD, models='["One", "Two"]'))
    (tmp_path / "u.toml").write_text(_table("a = [6]", **GOOD | {"name": '"U"'}, precision='"fp32"'))
    tops = {"name": '"Plain"', "class": '"D"'}
    (tmp_path / "v.toml").write_text(_table("a = [6]", **GOOD | tops))
    (tmp_path / "w.toml").write_text(
        'name = "W"\nclass = "E"\nextends = "T"\nnaming = "without-dots"\nkeys = 1\nparameters = 6\n'
    )
    (tmp_path / "classes.toml").write_text(
        '[C]\nprecision = "bf16"\nkept = ["bn.{mean,var}"]\noverflows = ["*"]\n'
        'unquantized = ["x_in", "*.norm"]\n'
    )
    catalog = load_catalog([tmp_path])
    assert {n: catalog.components[n].precision for n in ("T", "U", "Plain", "W")} == {
        "T": "bf16",
        "U": "fp32",
        "Plain": "keep",
        "W": "bf16",  # it is published as what it extends
    }
    assert catalog.components["T"].models == ("One", "Two") and catalog.components["W"].models == ()
    traits = catalog.traits["C"]
    assert traits.kept.fit("bn.var") and not traits.kept.fit("bn.weight")
    assert traits.overflows.fit("a") and traits.unquantized.fit("a.b.norm")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="is not a folder"):
        load_catalog([tmp_path / "missing"])


# ── learning ──

_word = st.sampled_from(["weight", "bias", "0", "1", "2", "10", "in_0", "in_1", "shape", "a", "b", "", "é"])
_odd = st.text("ab.,{}\\\"'*_01\n\x7f é", max_size=6)
_name = st.lists(_word | _odd, min_size=1, max_size=4).map(".".join)
_shape = st.lists(st.sampled_from([RANK, 0, 1, 4]), max_size=3).map(tuple)
_rule = st.builds(TensorRule, _shape, st.sampled_from([None, None, None, "I64"]), st.booleans())


@given(st.dictionaries(_name, _shape.map(TensorRule) | _rule, max_size=40))
@example({"a": TensorRule((1,)), "a.shape": TensorRule((1,)), ".x": TensorRule(()), "": TensorRule((2,))})
@example({f"{a}.{b}.{w}": TensorRule((a * b,)) for a in range(3) for b in range(3) for w in ("x", "y")})
def test_a_learned_table_expands_to_what_it_was_learned_from(tensors: dict[str, TensorRule]) -> None:
    text = compress(tensors, name="o'dd é", prefix='"\\\n', **{"class": "C"})
    assert parse_table(text, "t.toml").expand({}) == tensors


def test_names_that_are_no_text_cannot_be_learned() -> None:
    with pytest.raises(CatalogError, match="cannot be written in TOML"):
        compress({"a\ud800": TensorRule((1,))}, name="x", **{"class": "C"})
    with pytest.raises(CatalogError, match="cannot be written in TOML"):
        compress({"a": TensorRule((1,))}, name="x", prefix="\udcff", **{"class": "C"})
    with pytest.raises(CatalogError, match="no word that files can be named by"):
        compress({"a": TensorRule((1,))}, name="a/b", **{"class": "C"})


def test_a_learned_table_has_nothing_that_drives_a_terminal() -> None:
    tensors = {"\x1b[2J\u202e\U000e0001.a": TensorRule((1,)), "9" * 5000: TensorRule((2,))}
    text = compress(tensors, name="x", **{"class": "C"})
    assert all(c.isprintable() or c == "\n" for c in text)
    assert parse_table(text, "t.toml").expand({}) == tensors


@pytest.mark.parametrize(("name", "most"), [("CLIP-v1-SD", 20), ("UNET-v1-SD", 180), ("DIT-FLUX-dev", 30)])
def test_a_learned_table_is_short(name: str, most: int) -> None:
    tensors = dict(load_catalog(()).components[name].tensors)
    text = compress(tensors, name=name, **{"class": "C"})
    assert parse_table(text, "t.toml").expand({}) == tensors
    assert text.count("\n") <= most


# ── the command ──

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {"te.position_ids": np.arange(4, dtype=np.int64)}
    for layer in range(3):
        tensors[f"te.layers.{layer}.fc.weight"] = np.zeros((2, 4), dtype=np.float16)
        tensors[f"te.layers.{layer}.fc.bias"] = np.zeros(2, dtype=np.float32)
    tensors["other.x"] = np.zeros(1, dtype=np.float32)
    save_file(tensors, tmp_path / "my model (1).safetensors")
    return tmp_path / "my model (1).safetensors"


LEARNED = """\
name = "my-model-1"
class = "TE"
prefix = "te."
keys = 7
parameters = 34

[tensors]
"layers.{0..2}.fc.{weight,bias}" = [[2, 4], [2]]
"position_ids" = { shape = [4], dtype = "I64" }
"""


def test_learn_writes_a_table_that_the_next_command_knows(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["components", "learn", str(checkpoint), "--prefix", "te.", "--class", "TE"]
    assert run(line) == 0
    assert capsys.readouterr().out == LEARNED
    folder = checkpoint.parent / "new" / "tables"
    assert run([*line, "-o", str(folder)]) == 0
    assert (folder / "my-model-1.toml").read_text() == LEARNED
    assert run([*line, "-o", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setenv("CKPT_COMPONENTS", str(folder))
    assert run(["components", "show", "my-model-1"]) == 0
    assert "layers.{0..2}.fc.{weight,bias}  [[2, 4], [2]]" in capsys.readouterr().out
    assert run([*line, "-o", str(folder)]) == 2
    assert "component `my-model-1` is known already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prefix", "tee."], "did you mean `te.`?"),
        (["--prefix", "unet."], "names begin with `other.`, `te.`"),
        (["--name", "../x"], "`../x` is no name for a component"),
        (["--name", "x" * 101], "is no name for a component"),
        (["--class", "\x1b[2J"], "`\\x1b[2J` is no name for a class"),
        (["--class", "\udcff"], "`\\udcff` is no name for a class"),
        (["-o", os.devnull], f"cannot write `{os.devnull}/my-model-1.toml`"),
    ],
)
def test_learn_refuses(
    checkpoint: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["components", "learn", str(checkpoint), *more]) == 2
    assert message in capsys.readouterr().err


def test_learn_says_when_a_table_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rules = load_catalog(()).components["VAE-mini-SD"].tensors
    save_file({n: np.zeros(r.shape, dtype=np.float16) for n, r in rules.items()}, tmp_path / "v.safetensors")
    assert run(["components", "learn", str(tmp_path / "v.safetensors")]) == 0
    assert capsys.readouterr().err == "note: this is the table of `VAE-mini-SD`\n"


def test_learn_of_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<!doctype html>")
    assert run(["components", "learn", str(tmp_path / "x.safetensors")]) == 6
    assert run(["components", "learn", str(tmp_path / "missing")]) == 6


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (["list"], "list.txt"),
        (["show", "CLIP-v1-SD"], "show.txt"),
        (["show", "UNET-v1-EMA"], "show-ema.txt"),
        (["show", "LoRA-v1A-CLIP", "--full"], "show-full.txt"),
    ],
)
def test_what_is_said(line: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["components", *line]) == 0
    said = capsys.readouterr().out
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / file).write_text(said, encoding="utf-8")
    assert said == (GOLDEN / file).read_text(encoding="utf-8")


def test_list_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["components"]) == 0
    assert capsys.readouterr().out == (GOLDEN / "list.txt").read_text(encoding="utf-8")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["components", "list", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert {c["name"] for c in answer["components"]} == set(load_catalog(()).components)
    by_name = {a["name"]: a for a in answer["architectures"]}
    assert by_name["FLUX"]["slots"] == ["DIT-FLUX", "VAE-v3", "CLIP-L-FLUX", "T5-XXL-FLUX"]
    assert run(["components", "show", "CLIP-v1-NAI", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["class"], shown["extends"]) == (1, "CLIP-v1", "CLIP-v1-SD")
    assert shown["architectures"] == ["SD-v1", "SD-v1-ControlNet", "SD-v1-Pix2Pix"]
    assert len(shown["tensors"]) == shown["keys"] == 197
    ids = shown["tensors"]["embeddings.position_ids"]
    assert ids == {"shape": [1, 77], "dtype": "I64", "optional": True}


def test_show_takes_a_name_of_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["components", "show", "vae-V1-sd"]) == 0
    assert capsys.readouterr().out.startswith("VAE-v1-SD")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("UNET-v1-SDD", "did you mean `UNET-v1-SD`?"),
        ("VAE-v1", "its components: `VAE-v1-SD`"),
        ("vae", "its components: `VAE-v1-SD`, `VAE-v3-SD`, "),
        ("SDv1", "its components: `UNET-v1-SD`, `UNET-v1-Inpainting`, `VAE-v1-SD`, "),
        ("xyz", "`ckpt components` lists what there is"),
    ],
)
def test_show_of_what_is_not_there(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["components", "show", name]) == 2
    assert hint in capsys.readouterr().err


def test_an_unknown_component_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no component `x`"):
        load_catalog(()).component("x")


def test_a_class_with_an_unknown_fix(tmp_path: Path) -> None:
    (tmp_path / "classes.toml").write_text('["VAE-v3"]\nfixes = ["vae-atention-shape"]')
    with pytest.raises(CatalogError) as caught:
        parse_recipe("format = 1", "r.toml", load_catalog([tmp_path]))
    (problem,) = caught.value.problems
    assert problem.fact == "class `VAE-v3` names an unknown fix `vae-atention-shape`"
    assert problem.hint == "did you mean `vae-attention-shape`?"


# ── the documentation ──

DOCS = (Path(__file__).parents[2] / "docs" / "catalog.md").read_text(encoding="utf-8")
EXAMPLES = [block.partition("```")[0] for block in DOCS.split("```toml\n")[1:]]


def test_the_examples_of_the_documentation_are_right(tmp_path: Path) -> None:
    for number, text in enumerate(EXAMPLES):
        heading = DOCS[: DOCS.index(text)].rpartition("\n## ")[2].partition("\n")[0]
        kind = re.search(r"`(\w+)(?:/\*)?\.toml`", heading)
        folder = tmp_path / (kind[1] if kind else "tables")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.toml").write_text(text, encoding="utf-8")
    catalog = load_catalog([tmp_path])
    assert {"CLIP-tiny", "UNET-v1-Twelve"} < catalog.components.keys()
    assert catalog.architecture("sd2 large").only == ("CLIP-v2-SD",)
    assert catalog.scales["CLIP-tiny"].having == ("mlp.",)
    assert catalog.layouts["tiny"].pipeline == "StableDiffusionPipeline"
    assert catalog.programs["my-program"]["VAE"] == "models/vae"
    assert catalog.known.part("0123456789abcdef" * 4) is not None


@pytest.mark.parametrize(
    "fields",
    [_COMPONENT, _ALONE, _PREFIXES, _ARCHITECTURE, _MODELSPEC, _CLASS, _SCALE, _LAYOUT, _PART, _RULES],
)
def test_every_field_is_documented(fields: dict[str, type]) -> None:
    assert all(f"`{name}`" in DOCS or f"{name} = " in DOCS for name in fields if name != "tensors")


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a.*", "a.b", True),
        ("a.*", "b.a.", False),
        ("*.w", "a.b.w", True),
        ("a*b*c", "a-bb-c", True),
        ("a*b*c", "a-c-b", False),
        ("ab*ba", "aba", False),
        ("*a*a*", "a", False),
        ("*", "", True),
        ("a*.*", "a.\n", True),
    ],
)
def test_patterns_with_stars(pattern: str, name: str, fits: bool) -> None:
    assert fits_pattern(pattern, name) is fits


def test_tables_may_extend_each_other_only_so_often(tmp_path: Path) -> None:
    text = 'name = "t0"\nclass = "C"\nkeys = 1\nparameters = 1\n[tensors]\na = [1]\n'
    (tmp_path / "0.toml").write_text(text)
    for n in range(1, 10):
        (tmp_path / f"{n}.toml").write_text(f'name="t{n}"\nextends="t{n - 1}"\nkeys=1\nparameters=1\n')
    with pytest.raises(CatalogError, match="more than 8 tables extend each other"):
        load_catalog([tmp_path])
