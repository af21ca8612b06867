"""The recipes that are shipped, and those in the reference: all of them are valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import tomli

from builder.base.errors import RecipeError, render
from builder.base.kinds import Choice, Key, Struct
from builder.models.catalog import load_catalog
from builder.operations import OPERATIONS
from builder.operations.fixes import FIXES
from builder.operations.registry import Operation
from builder.recipe import load_recipe, parse_recipe
from builder.recipe.language import Vocabulary, step_keys
from tests.help.recipe_words import golden

ROOT = Path(__file__).parents[2]
CATALOG = load_catalog(())
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))
REFERENCE = ROOT / "docs" / "recipes.md"
LANGUAGE = Vocabulary(CATALOG, OPERATIONS, FIXES).language
SCHEMA = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#:schema recipe.schema.json\n#\n# ")
    jsonschema.Draft202012Validator(SCHEMA).validate(tomli.loads(text))
    recipe = load_recipe(path, CATALOG)
    assert not recipe.notes
    assert all(s.sha256 or s.recipe for s in recipe.sources.values()), "a source without a pin"


def test_shipped_recipes_agree_on_pins_and_write_different_files() -> None:
    recipes = [load_recipe(p, CATALOG) for p in SHIPPED]
    pins = {(s.file, s.sha256, s.urls) for r in recipes for s in r.sources.values() if s.file}
    assert len({file for file, _, _ in pins}) == len(pins)
    files = [o.file for r in recipes for o in r.outputs]
    assert len(files) == len(set(files))


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", REFERENCE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("text", [b for b in _blocks("toml") if "format = 1" in b])
def test_recipes_in_the_reference_are_valid(text: str) -> None:
    parse_recipe(text, "docs/recipes.md", CATALOG)
    jsonschema.Draft202012Validator(SCHEMA).validate(tomli.loads(text))


@pytest.mark.parametrize("text", [b for b in _blocks("toml") if "format = 1" not in b])
def test_fragments_in_the_reference_are_toml(text: str) -> None:
    assert tomli.loads(text)


def test_messages_in_the_reference_are_what_is_said() -> None:
    (wrong,) = _blocks("toml wrong")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(wrong, "anime.toml", CATALOG)
    said = "\n\n".join(render(p) for p in caught.value.problems)
    assert said in REFERENCE.read_text(encoding="utf-8")


def _row(name: str, key: Key) -> str:
    without = key.otherwise or ("required" if key.required else _literal(key.default))
    return f"| `{name}` | {key.kind.label} | {without} | {key.doc} |"


def _literal(value: object) -> str:
    if value in (None, (), {}, ""):
        return "–"
    return f"`{json.dumps(value)}`"


def _keys(struct: Struct) -> str:
    head = "| key | value | without it | meaning |\n|---|---|---|---|\n"
    return head + "".join(f"{_row(n, k)}\n" for n, k in struct.keys.items())


def _words(words: dict[str, str]) -> str:
    return "".join(f"- `{name}`: {doc}\n" for name, doc in words.items())


def _operation(operation: Operation) -> str:
    many = f", {operation.many} = …" if operation.many else ""
    inputs = ", ".join(f"{i} = …" for i in operation.inputs)
    head = f"**`{operation.name}`** ({f'{inputs}{many}'.removeprefix(', ')}): {operation.doc}\n"
    params = [(n, p) for n, p in operation.params.items()]
    return head + "".join(f"- `{n}`: {p.doc} Without it {_literal(p.default)}.\n" for n, p in params) + "\n"


STEP = Struct("step", "[steps.NAME]", step_keys(CATALOG))


def _structs(struct: Struct) -> dict[str, Struct]:
    found = {struct.name: struct}
    stack = [k.kind for k in struct.keys.values()]
    while stack:
        kind = stack.pop()
        if isinstance(kind, Struct):
            found |= _structs(kind)
        stack += [v for v in (getattr(kind, "of", None), *getattr(kind, "kinds", ())) if v is not None]
    return found


def test_the_reference_lists_every_key_and_fix() -> None:
    made = {name: _keys(struct) for name, struct in _structs(LANGUAGE).items()}
    made["step"] = _keys(STEP)
    made["operations"] = "".join(map(_operation, OPERATIONS.values()))
    made["fixes"] = _words({n: f.doc for n, f in FIXES.items()})
    output = _structs(LANGUAGE)["output"].keys
    for key in ("precision", "overflow", "non_finite", "unknown", "profile"):
        kind = output[key].kind
        assert isinstance(kind, Choice)
        made[key] = _words(dict(kind.words))
    text = REFERENCE.read_text(encoding="utf-8")
    generated = re.compile(r"(?<=<!-- made: )(\S+) -->\n.*?(?=<!-- end -->)", re.S)
    assert sorted(m[1] for m in generated.finditer(text)) == sorted(made)
    expected = generated.sub(lambda m: f"{m[1]} -->\n\n{made[m[1]]}\n", text)
    assert expected == golden(REFERENCE, expected)
