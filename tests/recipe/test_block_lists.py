"""Lists of numbers that weigh a merge: of whole models, and of one class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.base.errors import RecipeError
from builder.models.catalog import Catalog, load_catalog
from builder.recipe import parse_recipe

CATALOG = load_catalog(())


def alpha(value: str, catalog: Catalog = CATALOG) -> Any:
    """What a recipe's weights are read as."""
    recipe = f"""
format = 1
name = "x"
base = "m"
[sources.a]
file = "a.safetensors"
[sources.b]
file = "b.safetensors"
[steps.m]
op = "weighted-sum"
a = "a"
b = "b"
alpha = {value}
[output]
file = "x.safetensors"
"""
    return parse_recipe(recipe, "x.toml", catalog).steps["m"].params["alpha"]


def numbers(count: int) -> list[float]:
    return [round(0.01 * n, 2) for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("cls", "first"),
    [("UNET-v1", 0), ("UNET-XL", 0), ("DIT-FLUX2", 0), ("DIT-FLUX3-Klein", 1), ("MMDIT-v3", 1)],
)
def test_under_its_class_a_list_is_of_the_blocks_that_it_has(cls: str, first: int) -> None:
    blocks = CATALOG.traits[cls].blocks
    said = alpha(f"{{ base = 0.0, {cls} = {numbers(first + len(blocks))} }}")
    base = numbers(1)[0] if first else 0.0
    held = dict(zip(blocks, numbers(first + len(blocks))[first:], strict=True))
    assert said["parts"][cls] == {"base": base, "blocks": {b: w for b, w in held.items() if w != base}}


def test_classes_with_as_many_blocks_need_not_call_them_alike(tmp_path: Path) -> None:
    count = len(CATALOG.traits["DIT-QwenImage21"].blocks)
    (tmp_path / "DIT-Own.toml").write_text(
        f'name = "DIT-Own"\nclass = "DIT-Own"\nprefix = "own."\nkeys = {count}\nparameters = {count}\n'
        f'[tensors]\n"x.{{0..{count - 1}}}.w" = [1]\n'
    )
    (tmp_path / "classes.toml").write_text(
        f'[DIT-Own.blocks]\n"x.{{0..{count - 1}}}." = "X{{0..{count - 1}}}"\n'
    )
    catalog = load_catalog([tmp_path])
    said = alpha(f"{{ base = 0.0, DIT-Own = {numbers(count)} }}", catalog)
    assert list(said["parts"]["DIT-Own"]["blocks"]) == [f"X{n}" for n in range(count)]
    with pytest.raises(RecipeError) as caught:
        alpha(f"{{ base = 0.0, DIT = {numbers(count)} }}", catalog)
    (problem,) = caught.value.problems
    assert f"{count} numbers, and classes of that name have other blocks" in problem.fact
    assert problem.hint == "name the class in full"


@pytest.mark.parametrize(("count", "cls"), [(26, "UNET-v1"), (20, "UNET-XL"), (61, "DIT-FLUX")])
def test_lists_of_whole_models_are_those_that_the_field_has(count: int, cls: str) -> None:
    traits = CATALOG.traits[cls]
    said = alpha(str(numbers(count)))
    assert list(said["blocks"]) == list(traits.blocks)
    if len(traits.lists) > 1:
        assert said["parts"] == dict(zip(traits.lists, numbers(count), strict=False))
    with pytest.raises(RecipeError) as caught:
        alpha(str(numbers(60)))
    assert "60 numbers, and lists have 61, 26, 20" in caught.value.problems[0].fact


def test_a_list_of_sd_v1_weighs_any_unet() -> None:
    said = alpha(f"{{ base = 0.0, UNET-XL = {numbers(26)} }}")["parts"]["UNET-XL"]
    assert list(said["blocks"]) == list(CATALOG.traits["UNET-v1"].blocks)
