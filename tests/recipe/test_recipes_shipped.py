"""The recipes that are shipped, and those in the reference: all of them are valid."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import tomli

from builder.base.errors import RecipeError, render
from builder.base.kinds import Choice, Key, Struct
from builder.formats.write_safetensors import plan_layout
from builder.models.catalog import load_catalog
from builder.operations import OPERATIONS
from builder.operations.fixes import FIXES
from builder.operations.registry import Operation, Param
from builder.recipe import load_recipe, parse_recipe
from builder.recipe.language import Vocabulary, step_keys
from builder.tensors.lazy import DType
from tests.help.building import Folder
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
    bare = {s.name for s in recipe.sources.values() if not (s.sha256 or s.recipe)}
    assert not bare or recipe.steps, "a source without a pin, in a recipe of published files"


def test_shipped_recipes_agree_on_pins_and_write_different_files() -> None:
    recipes = [load_recipe(p, CATALOG) for p in SHIPPED]
    pins = {(s.file, s.sha256, s.urls) for r in recipes for s in r.sources.values() if s.file}
    assert len({file for file, _, _ in pins}) == len(pins)
    files = [o.file for r in recipes for o in r.outputs]
    assert len(files) == len(set(files))


MERGING = [p for p in SHIPPED if load_recipe(p, CATALOG).steps]


@cache
def _header(kind: str) -> bytes:
    """The head of a file of the real size, FP16, whose data are a hole."""
    tables = {
        "lora": ["LoRA-v1-UNET", "LoRA-v1-CLIP"],
        "vae": ["VAE-v1-SD"],
        "inpainting": ["UNET-v1-Inpainting", "VAE-v1-SD", "CLIP-v1-SD"],
    }.get(kind, ["UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD", *(["UNET-v1-EMA"] if kind == "ema" else [])])
    specs = {}
    for name in tables:
        component = CATALOG.component(name)
        for bare, rule in component.tensors.items():
            shape = tuple(4 if extent < 0 else extent for extent in rule.shape)
            if not rule.optional:
                specs[component.prefix + bare] = (DType.F16, shape)
    return plan_layout(specs).head + plan_layout(specs).size.to_bytes(8, "little")


def _sparse(path: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    head = _header(kind)
    with path.open("wb") as file:
        file.write(head[:-8])
        file.truncate(int.from_bytes(head[-8:], "little"))


@pytest.mark.parametrize("path", MERGING, ids=lambda p: p.stem)
def test_merging_recipes_plan_offline(path: Path, tmp_path: Path) -> None:
    """Missing sources are said; with files of the right kinds there is a plan, which reads no weight."""
    folder = Folder.below(tmp_path)
    folder.write(path.name, path.read_text(encoding="utf-8"))
    recipe = load_recipe(path, CATALOG)
    said = folder("plan", "--offline", path.name)
    bare = [n for n, s in recipe.sources.items() if not s.urls]
    assert said.code == (5 if bare else 0)
    assert "not on this machine" in said.out or any(f"the source `{n}` is nowhere" in said.err for n in bare)
    adapters = {v for s in recipe.steps.values() for k, v in s.inputs.items() if k.startswith("loras.")}
    for name, source in recipe.sources.items():
        vae = "vae" in name or name == "ft-mse"
        averaged = "ema" if name == "anything" else "whole"
        kind = "lora" if name in adapters else "vae" if vae else name if name == "inpainting" else averaged
        _sparse(folder / str(source.file), kind)
    text = re.sub(r"^(sha256|urls) = .*\n", "", path.read_text(encoding="utf-8"), flags=re.M)
    folder.write(path.name, text)
    said = folder("plan", "--offline", "--json", path.name)
    assert said.code == 0, said.err
    done = {s["label"].split()[1].rstrip(":") for s in said.json["steps"] if s["kind"] == "step"}
    assert done >= recipe.steps.keys(), done


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
    inputs = ", ".join(f"{i} = …" for i in (*operation.inputs, *operation.optional_inputs))
    name = f"{operation.name}:NAME" if operation.of_methods else operation.name
    head = f"**`{name}`** ({f'{inputs}{many}'.removeprefix(', ')}): {operation.doc}\n"
    lines = (f"- `{n}`: {p.doc}{_without(p)}\n" for n, p in operation.params.items() if n != "method")
    return f"{head}{''.join(lines)}\n"


def _without(param: Param) -> str:
    if param.default is not None:
        return f" Without it {_literal(param.default)}."
    return "" if param.optional else " It must be given."


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
    for key in ("precision", "quantize", "overflow", "non_finite", "unknown", "profile"):
        kind = output[key].kind
        assert isinstance(kind, Choice)
        made[key] = _words(dict(kind.words))
    text = REFERENCE.read_text(encoding="utf-8")
    generated = re.compile(r"(?<=<!-- made: )(\S+) -->\n.*?(?=<!-- end -->)", re.S)
    assert sorted(m[1] for m in generated.finditer(text)) == sorted(made)
    expected = generated.sub(lambda m: f"{m[1]} -->\n\n{made[m[1]]}\n", text)
    assert expected == golden(REFERENCE, expected)


def test_the_reference_lists_every_recipe_that_is_shipped() -> None:
    named = re.findall(r"\]\(\.\./recipes/([^)]+)\)", REFERENCE.read_text(encoding="utf-8"))
    assert sorted(named) == [p.name for p in SHIPPED]
