"""The JSON Schema of recipes, held against the reader that it is the schema of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import RecipeError
from builder.cli.schema import command
from builder.models.catalog import load_catalog
from builder.recipe import parse_recipe
from builder.recipe.schema import recipe_schema, schema_text
from tests.help.recipe_words import GOLDEN, OPERATIONS, golden

CATALOG = load_catalog(())
ROOT = Path(__file__).parents[2]
SCHEMA = recipe_schema(CATALOG, operations=OPERATIONS)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VALID = [tomli.loads(p.read_text(encoding="utf-8")) for p in sorted((GOLDEN / "valid").glob("*.toml"))]
WRONG_SHAPE = sorted((GOLDEN / "shape").glob("*.toml"))


def test_the_schema_that_is_checked_in_is_that_of_the_language() -> None:
    text = schema_text(CATALOG)
    held = golden(ROOT / "recipes" / "recipe.schema.json", text)
    assert text == held, "run `ckpt schema > recipes/recipe.schema.json`"


def test_schema_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_COMPONENTS", raising=False)
    result = CliRunner().invoke(command)
    assert result.exit_code == 0
    assert result.output == schema_text(CATALOG)


@pytest.mark.parametrize("operations", [{}, OPERATIONS], ids=["none", "some"])
def test_the_schema_is_a_schema(operations: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema(CATALOG, operations=operations))


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_valid_recipes_fit(data: dict[str, Any]) -> None:
    assert [e.message for e in VALIDATOR.iter_errors(data)] == []


@pytest.mark.parametrize("path", WRONG_SHAPE, ids=lambda p: p.stem)
def test_recipes_of_a_wrong_shape_do_not_fit(path: Path) -> None:
    assert list(VALIDATOR.iter_errors(tomli.loads(path.read_text(encoding="utf-8"))))


# -- what the reader takes fits the schema, whatever it is


def _paths(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [above, *(p for k, v in inner for p in _paths(v, (*above, k)))]


def _toml(data: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(k)} = {_value(v)}\n" for k, v in data.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


WORDS = sorted(
    {str(p[-1]) for data in VALID for p in _paths(data) if p}
    | {"", "a", "b", "NEW SDv1", "fp16", "/a", "..", "a.safetensors", "https://a/b", "0" * 64, "0,1"}
)
VALUES = st.recursive(
    st.sampled_from(WORDS) | st.integers(-1, 3) | st.booleans() | st.sampled_from([0.5, -2.5]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def _mutants(draw: st.DrawFn) -> dict[str, Any]:
    data: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        paths = [p for p in _paths(data) if p]
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        held: Any = data
        for key in above:
            held = held[key]
        if draw(st.booleans()):
            held[last] = draw(VALUES)
        elif draw(st.booleans()):
            del held[last]
        elif isinstance(held, dict):
            held[draw(st.sampled_from(WORDS))] = draw(VALUES)
    return data


@settings(max_examples=400)
@given(_mutants())
def test_what_the_reader_takes_fits(data: dict[str, Any]) -> None:
    try:
        parse_recipe(_toml(data), "mix.toml", CATALOG, operations=OPERATIONS)
    except RecipeError:
        return
    assert [e.message for e in VALIDATOR.iter_errors(data)] == []


@settings(max_examples=400)
@given(_mutants())
def test_what_does_not_fit_is_refused(data: dict[str, Any]) -> None:
    if VALIDATOR.is_valid(data):
        return
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_toml(data), "mix.toml", CATALOG, operations=OPERATIONS)
    assert all(p.place is not None for p in caught.value.problems)
