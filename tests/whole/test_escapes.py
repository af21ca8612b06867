"""Nothing that a stranger writes drives a terminal: a marker in every field comes out escaped."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.help.building import Folder, model, save

# Escape sequences of both kinds, text that runs backwards, what has no width, and another line.
MARK = "\x1b[31mX\x9b31m\u202e\u200b\r\nERROR\x07"
CARRIED = "\x1b[31mX\x9b31m\u202e\u200bE\x07"  # of what has to be one line


def _strange(path: Path) -> None:
    """A safetensors file whose names and metadata hold the marker, beside a model's own tensors."""
    tensors = {**model("VAE-tiny", seed=1)}
    save(path, tensors)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    size = len(raw) - 8 - length
    header["__metadata__"] = {MARK: MARK, "modelspec.title": MARK, "modelspec.architecture": MARK}
    header[MARK] = {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}
    header["loss." + MARK] = {"dtype": "F32", "shape": [1], "data_offsets": [size + 4, size + 8]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + bytes(8))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    path = tmp_path / "work"
    path.mkdir()
    own = tmp_path / "own"
    own.mkdir()
    said = json.dumps(CARRIED)
    (own / "a.toml").write_text(
        f"name = {said}\nclass = {said}\nnote = {said}\nkeys = 1\nparameters = 1\n[tensors]\n{said} = [1]\n"
    )
    made = Folder(path, tmp_path / "store")
    _strange(path / "x.safetensors")
    _strange(path / f"{CARRIED}.safetensors")
    return made


RECIPE = (
    'format = 1\nname = "r"\ndescription = {mark}\nbase = "NEW VAE-tiny"\n'
    "components.VAE-tiny = {name}\nsources.{name}.file = {file}\n"
    "[output.metadata]\nauthor = {mark}\n{name} = {mark}\n"
)


def test_no_field_of_any_input_drives_a_terminal(folder: Folder) -> None:
    strange = f"{CARRIED}.safetensors"
    mark, name, file = (json.dumps(t) for t in (CARRIED, CARRIED, strange))
    recipe = RECIPE.format(mark=mark, name=name, file=file)
    folder.write("r.toml", recipe)
    folder.write(
        "plain.toml", recipe.replace(f"sources.{name}", "sources.s").replace(f"= {name}\n", '= "s"\n', 1)
    )
    folder.write("wrong.toml", recipe.replace("format = 1", f"{name} = 1\nformat = 1") + f"[{name}]\n")
    folder.write("missing.toml", recipe.replace(file, json.dumps("no" + strange)))
    folder.write(
        "wrong.lock.toml", f"version = 1\nrecipe = {mark}\nprofile = 1\n[sources.{name}]\nsha256 = {mark}\n"
    )
    folder.write("missing.lock.toml", f"version = {mark}\n{name} = {mark}\n")
    catalog = Folder(folder.path, folder.store, {"CKPT_COMPONENTS": str(folder.path.parent / "own")})
    commands: list[tuple[Folder, tuple[object, ...]]] = []
    ways = [("plan",), *(("plan", o) for o in ("--json", "--dot", "--mermaid")), ("lock",), ("verify",)]
    ways += [("build",), ("build", "--explain"), ("build", "--json")]
    recipes = ("r.toml", "plain.toml", "wrong.toml", "missing.toml", f"{CARRIED}.toml")
    commands += [(folder, (way[0], recipe, *way[1:])) for recipe in recipes for way in ways]
    for path in ("x.safetensors", strange, f"no{strange}"):
        told: list[tuple[object, ...]] = [
            *(("inspect", path, *o) for o in ((), ("--full",), ("--json",), ("--hashes",))),
            *(
                ("prune", path, *o)
                for o in (("--dry-run",), ("--dry-run", "--names"), ("--json",), ("--force",))
            ),
            ("extract", path, "VAE"),
            ("extract", path, CARRIED),
            ("replace", path, f"VAE={strange}", "-o", "y.safetensors"),
            ("convert", path, "-o", "c.ckpt"),
            ("diff", path, "y.safetensors", "--full"),
            ("diff", path, strange, "--json"),
            ("new", path),
            ("new", path, "-l", "."),
        ]
        commands += [(folder, words) for words in told]
    commands += [(folder, ("store", "list")), (folder, ("store", "check")), (folder, (CARRIED,))]
    commands += [
        (catalog, words)
        for words in (
            ("components", "list"),
            ("components", "show", CARRIED),
            ("inspect", "x.safetensors", "--full"),
        )
    ]
    wrong = []
    for where, words in commands:
        said = where(*words)
        text = said.out + said.err
        bad = {c for c in text if not c.isprintable() and c != "\n"}
        if bad or "\nERROR" in text or "Traceback" in text or said.code == 70:
            wrong.append((words, sorted(map(repr, bad)), text[:300]))
    assert not wrong, "\n\n".join(f"{w}: {b}\n{t!r}" for w, b, t in wrong)
