"""Whole commands on recipes, locks, catalogs, records and models broken at random: each ends in words."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.models import catalog
from tests.help.building import RECIPE, Folder, model, save, save_dirty
from tests.whole.test_fuzz import cut, flip, number, splice
from tests.whole.test_fuzz_texts import mutant

TIMES = float(os.environ.get("CKPT_FUZZ", "0.5"))  # of so many rounds: all of them in `make test-slow`
SEED = 20221006
SECONDS = 5  # of processor time that a command may take

SECRET = "s3cr3t-s3cr3t"
INNER = """\
format = 1
name = "inner"
base = "NEW VAE-tiny"
sources.v.file = "vae.safetensors"
components.VAE-tiny = "v"
"""
OUTER = """\
format = 1
name = "outer"
description = "é"
base = "tiny"
sources.tiny.file = "tiny.safetensors"
sources.inner.recipe = "inner.toml"
components.VAE-tiny = "inner"
[output]
precision = "fp16"
config = "c.yaml"
metadata.author = "a"
[expect]
metric = "0362/0232/1089"
"""
TABLE = (
    'name = "A"\nclass = "C"\nprefix = "m."\nkeys = 2\nparameters = 5\n[tensors]\n"x.{a,b}" = [[1], [2, 2]]\n'
)

COMMANDS: tuple[tuple[str, ...], ...] = (
    *(("plan", r) for r in ("tiny.toml", "outer.toml")),
    *(("build", r) for r in ("tiny.toml", "outer.toml", "inner.toml")),
    *(("build", r, "--locked") for r in ("tiny.toml", "outer.toml")),
    ("build", "outer.toml", "--explain", "--json"),
    ("lock", "outer.toml"),
    ("build", "tiny.toml", "--statement"),
    ("verify", "tiny.toml"),
    ("verify", "--statement", "tiny.safetensors.intoto.json"),
    ("verify", "tiny.toml", "--statement", "tiny.safetensors.intoto.json"),
    ("inspect", "tiny.safetensors", "--full"),
    ("inspect", "dirty.ckpt", "--json"),
    ("prune", "dirty.ckpt", "--dry-run"),
    ("prune", "tiny.safetensors", "--force"),
    ("extract", "tiny.safetensors", "VAE"),
    ("replace", "tiny.safetensors", "VAE=vae.safetensors", "-o", "r.safetensors"),
    ("convert", "tiny.safetensors", "-o", "c.ckpt"),
    ("convert", "dirty.ckpt", "-o", "d.safetensors"),
    ("inspect", "unet.gguf", "--full"),
    ("convert", "unet.gguf", "-o", "u.safetensors"),
    ("replace", "tiny.safetensors", "UNET=unet.gguf", "-o", "s.safetensors"),
    ("extract", "dirty.ckpt", "UNET", "-o", "e.gguf", "--quantize", "q8_0"),
    ("diff", "tiny.safetensors", "vae.safetensors"),
    ("new", "tiny.safetensors", "-l", "."),
    ("components", "list"),
    ("store", "list"),
    ("store", "check"),
    ("store", "gc"),
)

Mutate = Callable[[random.Random, bytes], bytes]


def _text(chance: random.Random, data: bytes) -> bytes:
    return mutant(chance, data.decode()).encode("utf-8", "surrogatepass")


def _bytes(chance: random.Random, data: bytes) -> bytes:
    """Mostly of the beginning or the end, where a file says what is in it."""
    size = min(len(data), 4096)
    front, rest = (bytearray(data[:size]), data[size:])
    if chance.random() < 0.3:
        front, rest = bytearray(data[-size:]), data[:-size]
        changed = bytes(chance.choice([flip, cut, splice, number])(chance, front) or front)
        return rest + changed
    changed = bytes(chance.choice([flip, cut, splice, number])(chance, front) or front)
    return changed + rest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder in which everything is sound and has been built once; beside it what is the user's own."""
    root = tmp_path_factory.mktemp("fuzz")
    folder = Folder.below(root)
    save_dirty(folder / "dirty.ckpt")
    save(folder / "vae.safetensors", model("VAE-tiny", seed=2))
    for name, text in {
        "tiny.toml": RECIPE,
        "inner.toml": INNER,
        "outer.toml": OUTER,
        "c.yaml": "model: 1\n",
        ".env": f"TOKEN={SECRET}\n",
        "../own/secret.toml": f"TOKEN={SECRET}\n",
        "../own/id_rsa": SECRET,
        "catalog/a.toml": TABLE,
    }.items():
        folder.write(name, text)
    for recipe in ("tiny.toml", "inner.toml", "outer.toml"):
        folder.build(recipe, "--statement")
    assert folder("extract", "tiny.safetensors", "UNET", "-o", "unet.gguf", "--quantize", "q8_0").code == 0
    return folder


def _victims(folder: Folder) -> Iterator[tuple[Path, Mutate]]:
    for path in (
        *folder.path.glob("*.toml"),
        *folder.path.glob("catalog/*.toml"),
        *folder.path.glob("*.json"),
    ):
        yield path, _text
    for path in sorted(folder.store.rglob("*.json")):
        yield path, _text
    for name in ("tiny.safetensors", "dirty.ckpt", "vae.safetensors", "unet.gguf"):
        yield folder / name, _bytes


def _strange(chance: random.Random, path: Path) -> None:
    """Something else in a file's place: a link to what is the user's, a folder, a pipe."""
    path.unlink()
    match chance.randrange(5):
        case 0:
            path.symlink_to(path.parent / ".env" if path.suffix == ".toml" else "/dev/zero")
        case 1:
            path.symlink_to(next(p for p in path.parents if (p / "own").is_dir()) / "own" / "secret.toml")
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.name)


def _same(a: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(a.rglob("*")) if p.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="has no pipes")
def test_broken_inputs_of_every_command(
    whole: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback, no mistake of ours, no secret, no control character, nothing of the user's changed."""
    monkeypatch.setattr(catalog, "_load", catalog._load.__wrapped__)  # no catalog is remembered
    chance = random.Random(SEED)
    ended: set[int] = set()
    rounds, commands = int(80 * TIMES), list(COMMANDS)
    for index in range(rounds):
        root = tmp_path / str(index)
        shutil.copytree(whole.path.parent, root, symlinks=True)
        own = index % 6 == 0  # reading a catalog anew takes longer than most commands
        environment = {"CKPT_COMPONENTS": str(root / "work" / "catalog")} if own else {}
        folder = Folder(root / "work", root / "store", environment)
        before = _same(root / "own")
        said_of = []
        victims = list(_victims(folder))
        for _ in range(chance.choice([1, 1, 2, 5])):
            path, mutate = chance.choice(victims)
            if chance.random() < 0.1 and path.is_file() and not path.is_symlink():
                _strange(chance, path)
            elif path.is_file() and not path.is_symlink():
                path.write_bytes(mutate(chance, path.read_bytes()))
            said_of.append(path.relative_to(root).as_posix())
        for words in chance.sample(commands, 2 if not own else 1):
            began = time.process_time()
            said = folder(*words)
            what = f"round {index}, {said_of}, {words}: {said.code}\n{said.out}{said.err}"
            assert said.code in range(9), what
            assert "Traceback" not in said.out + said.err and SECRET not in said.out + said.err, what
            assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", said.out + said.err), what
            assert time.process_time() - began < SECONDS, what
            ended.add(said.code)
        assert _same(root / "own") == before
        copied = [p for p in folder.path.glob("*.y*ml") if SECRET in p.read_text("utf-8", "replace")]
        assert not copied, f"round {index}, {said_of}: {copied}"
        shutil.rmtree(root)
    assert {0, 3, 4, 6} <= ended or rounds < 80, "the mutations are too mild or too rough to tell"
