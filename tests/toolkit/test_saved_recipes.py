"""Recipes that the program writes are recipes that it reads, whatever files are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from builder.base.errors import OutputError, RecipeError
from builder.recipe import Pick, parse_recipe
from builder.recipe.names import SUFFIXES, UNSEEN, recipe_name, stem
from builder.toolkit.command_recipe import CommandRecipe
from tests.help.building import Folder, catalog, content, files, model, save

ODD = ['a:b"c?d<e>f|g*h', "~home", "C:x", "a\\b", " lead", "tail ", "..", "NEW x", "-o", "é\u202ef", "İ" * 80]

letters = st.sampled_from("abA.:?*\"'<>|\\~ -_#[]{}=%éßİ\u202e\u0301\U0001f600") | st.characters()
names = st.text(letters, min_size=1, max_size=100).filter(lambda n: not re.search("[/\0]", n))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with a component alone."""
    made = Folder.below(tmp_path)
    save(made / "vae.safetensors", model("VAE-tiny"))
    return made


@settings(max_examples=300)
@given(source=names, target=names, place=st.sampled_from(["", "out", "odd: out", ".."]))
def test_every_saved_recipe_is_read(source: str, target: str, place: str) -> None:
    file = Path("/models") / f"{source}.ckpt"
    name = recipe_name(file)
    goal = Path("/models") / place / f"{target}.safetensors"
    picks = {"VAE-tiny": Pick("VAE-tiny", name)}
    recipe = CommandRecipe(f"{name}.vae", {name: file}, new="VAE-tiny", components=picks)
    try:
        text = recipe.saved(Path("/models/r.toml"), goal, catalog()).decode()
    except OutputError as error:
        assert re.search("[\x00-\x1f\x7f\ud800-\udfff]", source), error
        return
    read = parse_recipe(text, "r.toml", catalog())
    assert read.sources[name].file == file.name
    written = read.outputs[0].file
    below = goal.relative_to("/models").as_posix() if ".." not in goal.parts else goal.name
    if re.search(rf'^~|[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff{UNSEEN}]', below):
        assert re.fullmatch(rf'[^/\x00-\x1f\x7f\\:*?"<>|{UNSEEN}]+\.safetensors', written)
    else:
        assert written == below


@pytest.mark.parametrize("end", SUFFIXES)
def test_names_of_every_ending(end: str) -> None:
    """Of all of them that a name has; within it where nothing of a word follows."""
    for file in (f"a.b{end}", f"a.b{end}{end.upper()}", f"a.b{end}.index.json", f"a{end}-b.ckpt"):
        assert recipe_name(Path(file)) in ("a.b", "a-b")
    assert stem(Path(f"a\nb.vae{end}")) == "a\nb.vae"
    assert recipe_name(Path(f"a{end}x.ckpt")) == f"a{end}x"
    with pytest.raises(RecipeError, match="`name` ends as the name of a file does"):
        parse_recipe(f'format = 1\nname = "a{end}"\nbase = "a"\nsources.a.file = "a.pt"', "r", catalog())


def test_a_namesake_is_no_source() -> None:
    """Where `A` and `a` are one file, the recipe must not replace what it reads."""
    for source, target in (("a-b", "a:b"), ("model", "Model")):
        file = Path(f"/models/{source}.safetensors")
        recipe = CommandRecipe("r", {source: file}, base=source, components={})
        text = recipe.saved(Path("/models/r.toml"), Path(f"/models/{target}.safetensors"), catalog())
        named = parse_recipe(text.decode(), "r.toml", catalog()).outputs[0].file
        assert named == f"{target.replace(':', '-')}(1).safetensors"


@pytest.mark.parametrize("name", ODD)
def test_a_saved_recipe_makes_the_same_bytes(folder: Folder, name: str) -> None:
    (folder / "vae.safetensors").rename(folder / f"{name}.safetensors")
    (folder / "out").mkdir()
    target = f"out/{name}.safetensors"
    said = folder("extract", f"./{name}.safetensors", "VAE", "-o", target, "--save-recipe", "r.toml")
    assert said.code == 0, said.err
    first = (folder / target).read_bytes()
    before = files(folder.path)
    assert folder("build", "r.toml").code == 0
    made = {f for f in files(folder.path) - before if f.endswith(".safetensors")}
    assert [(folder / m).read_bytes() for m in made or {target}] == [first]
    assert ("no recipe can call it" in said.err) == bool(made)
    assert folder("build", "r.toml", "--locked").code == 0


def test_a_name_that_is_none_is_said_before_anything_is_made(folder: Folder) -> None:
    (folder / "vae.safetensors").rename(folder / "a\nb.safetensors")
    said = folder("extract", "a\nb.safetensors", "VAE", "-o", "x.safetensors", "--save-recipe", "r.toml")
    assert said.code == 7
    assert said.err == (
        "error: no recipe can name this file\n"
        "  --> a\\nb.safetensors\n"
        "   = its name has a control character, or what is not valid Unicode\n"
        "hint: rename it, or leave `--save-recipe` out\n"
    )
    assert files(folder.path) == {"a\nb.safetensors"}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
def test_every_new_recipe_is_read(folder: Folder, name: str) -> None:
    path = folder / f"{name}.safetensors"
    try:
        path.write_bytes((folder / "vae.safetensors").read_bytes())
    except (OSError, UnicodeEncodeError):  # too long, or no name at all
        assume(False)
    try:
        said = folder("new", "-q", str(path), "-o", "n.toml", "--force")
        assert (said.code, said.err) == (0, "")
        text = (folder / "n.toml").read_text(encoding="utf-8")
        assert parse_recipe(text, "n.toml", catalog()).outputs
    finally:
        path.unlink()


@pytest.mark.parametrize("name", [*ODD, "MODEL"])
def test_a_new_recipe_makes_the_same_tensors(folder: Folder, name: str) -> None:
    (folder / "vae.safetensors").rename(folder / f"{name}.safetensors")
    assert folder("new", "-q", f"./{name}.safetensors", "-o", "n.toml").code == 0
    assert folder("build", "n.toml", "-o", "x.safetensors").code == 0
    assert content(folder / "x.safetensors") == content(folder / f"{name}.safetensors")


VAE_OUT = ("extract", "vae.safetensors", "VAE", "-o", "x.safetensors", "--save-recipe")
COMMANDS = [
    VAE_OUT,
    ("extract", "vae.safetensors", "VAE", "--save-recipe"),
    ("convert", "vae.safetensors", "-o", "x.ckpt", "--save-recipe"),
    ("prune", "vae.safetensors", "-o", "x.safetensors", "--save-recipe"),
    ("replace", "tiny.safetensors", "VAE-tiny=vae.safetensors", "-o", "x.safetensors", "--save-recipe"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c[0]}-{len(c)}")
def test_nothing_is_replaced_by_a_recipe_but_itself(folder: Folder, command: tuple[str, ...]) -> None:
    save(folder / "tiny.safetensors", model())
    for name in ("demo.lock.toml", "other.toml", "text.toml", "nodir/a.toml"):
        if "/" not in name:
            folder.write(name, "format = 1" if name == "other.toml" else "[project]")
        before = files(folder.path)
        said = folder(*command, name)
        assert said.code in (2, 7) and "hint: " in said.err, said.err
        assert files(folder.path) == before
    first = folder(*command, "r.toml")
    assert first.code == 0, first.err
    commented = "# mine\n" + (folder / "r.toml").read_text()
    folder.write("r.toml", commented)
    again = folder(*command, "r.toml")
    assert again.code == 0, again.err
    assert (folder / "r.toml").read_text() == commented


def test_an_output_is_named_without_what_drives_a_terminal(folder: Folder) -> None:
    said = folder("convert", "vae.safetensors", "-o", "x\x1b[31m.safetensors")
    assert said.code == 0 and "\x1b" not in said.out and "x\\x1b[31m.safetensors" in said.out
    assert "made  x" in said.out


@pytest.mark.parametrize(
    "command", [("convert", "r.toml", "-o", "x.ckpt"), ("inspect", "r.toml"), ("new", "r.toml")]
)
def test_a_recipe_is_no_checkpoint_but_what_builds_one(folder: Folder, command: tuple[str, ...]) -> None:
    folder.write("r.toml", "format = 1\n")
    said = folder(*command)
    assert said.code in (1, 6) and "`ckpt build RECIPE`" in said.err


@pytest.mark.parametrize("command", [("convert",), ("extract", "VAE"), ("prune",), ("new",)])
def test_an_empty_name_is_none(folder: Folder, command: tuple[str, ...]) -> None:
    before = files(folder.path)
    said = folder(command[0], "vae.safetensors", *command[1:], "-o", "")
    assert said.code == 2 and "name one" in said.err and files(folder.path) == before
