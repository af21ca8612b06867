"""Recipes, locks, catalogs, records and headers, broken at random: each is read, or refused in words."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.base.errors import CkptError, render
from builder.formats import open_checkpoint
from builder.models import catalog
from builder.models.catalog import load_catalog
from builder.recipe.lock import Lock, LockedComponent, LockedOutput, LockedSource, read_lock, write_lock
from builder.recipe.read import load_recipe
from builder.store.records import read_record, write_record

ROOT = Path(__file__).parents[2]
SEED = 20221006
TIMES = float(
    os.environ.get("CKPT_FUZZ", "0.5")
)  # of so many rounds, whose seeds follow each other; all of them in `make test-slow`

# What a value may be replaced by.
VALUES = (
    *(
        "0",
        "-1",
        "1e999",
        "nan",
        "inf",
        "true",
        '""',
        "[]",
        "{}",
        "[[]]",
        "[{}]",
        "{a={}}",
        '"a"',
        "1979-05-27",
    ),
    *("9223372036854775807", "-9223372036854775808", "18446744073709551616", "0x" + "f" * 600, "1" * 5000),
    *(
        '"\\u0000"',
        '"\\u001b[2J"',
        '"\\u202e"',
        '"../../x"',
        '"/etc/hostname"',
        '"a\\nb"',
        "07:32:00",
        '["a", 1]',
    ),
    *(
        '"' + "x" * 5000 + '"',
        "[" * 50 + "]" * 50,
        '"{a,b}"',
        '"{0..99999}"',
        '"*"',
        "null",
        '"\\ud800"',
        "1.5",
    ),
)
_VALUE = re.compile(r'"(?:\\.|[^"\\\n])*"|[-+0-9.][-+0-9.eE_]*|true|false|\[[^\[\]\n]*\]|\{[^{}\n]*\}')
_WORD = re.compile(r"[A-Za-z0-9_-]+")


def _swap(chance: random.Random, text: str, pattern: re.Pattern[str], others: list[str]) -> str:
    """One match in the place of another, or replaced."""
    found = list(pattern.finditer(text))
    if not found:
        return text
    at = chance.choice(found)
    return text[: at.start()] + chance.choice(others or [m[0] for m in found]) + text[at.end() :]


def _lines(chance: random.Random, text: str) -> str:
    lines = text.split("\n")
    first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(4):
        case 0:
            del lines[first]
        case 1:
            lines.insert(second, lines[first])
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case 3:
            lines[first:first] = [lines[second]] * chance.choice([2, 200])
    return "\n".join(lines)


def _characters(chance: random.Random, text: str) -> str:
    at = chance.randrange(len(text) + 1)
    new = chance.choice(
        ['"', "'", "[", "]", "{", "}", ".", ",", "=", "\n", "\\", "#", "\0", "\x85", "\ufeff", "é"]
    )
    return text[:at] + new + text[at + chance.randrange(3) :]


def _cut(chance: random.Random, text: str) -> str:
    at, size = chance.randrange(len(text) + 1), chance.choice([1, 10, 100, len(text)])
    return text[:at] + text[at + size :]


def mutant(chance: random.Random, text: str) -> str:
    """The text with one to four things wrong."""
    for _ in range(chance.choice([1, 1, 2, 4])):
        match chance.randrange(6):
            case 0 | 1:
                text = _swap(chance, text, _VALUE, list(VALUES))
            case 2:
                text = _swap(chance, text, chance.choice([_VALUE, _WORD]), [])
            case 3:
                text = _lines(chance, text)
            case 4:
                text = _characters(chance, text)
            case 5:
                text = _cut(chance, text)
    return text


def _try(path: Path, seeds: list[str], rounds: int, read: Callable[[Path], object]) -> None:
    """Read so many mutants; anything but a CkptError is a fault, which is left beside `path`."""
    for seed in seeds:
        path.write_text(seed)
        read(path)
    chance = random.Random(SEED)
    done = 0
    for index in range(int(rounds * TIMES)):
        text = mutant(chance, chance.choice(seeds))
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if data and chance.random() < 0.05:
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read(path)
            done += 1
        except CkptError as error:
            assert error.problems
            for problem in error.problems:
                assert problem.fact
                shown = render(problem)
                shown.encode()
                assert not re.search(r"[^\n\x20-\x7e\x80-\U0010ffff]", shown), "control characters"
        except BaseException:
            path.with_name(f"failed-{index}").write_bytes(data)
            raise
    assert done or rounds < 100, "the mutations are too rough to tell"


def test_recipes(tmp_path: Path) -> None:
    known = load_catalog([])
    recipes = {p.name: p.read_text() for p in sorted((ROOT / "recipes").glob("*.toml"))}
    for name, text in recipes.items():  # some include others
        (tmp_path / name).write_text(text)

    def read(path: Path) -> None:
        recipe = load_recipe(path, known)
        assert len(recipe.digest) == 64

    _try(tmp_path / "a.toml", list(recipes.values()), 3000, read)


def test_locks(tmp_path: Path) -> None:
    lock = Lock(
        "a" * 64,
        {n: LockedSource("a.ckpt", "b" * 64, 5, "https://x/y") for n in "ab"},
        (LockedComponent("o", "UNET-v1", "UNET-v1-SD", "a", "c" * 64, 686),),
        {"o": LockedOutput("o.safetensors", "e" * 64, "f" * 64, 9, "2020/2982/0130")},
    )
    path = tmp_path / "a.lock.toml"
    write_lock(path, lock)
    seed = path.read_text()

    def read(path: Path) -> None:
        found = read_lock(path)
        assert found is not None
        dict(found.facts())

    _try(path, [seed], 4000, read)


TABLES = {
    "a.toml": 'name = "A"\nclass = "C"\nprefix = "m."\nnote = "é"\nkeys = 5\nparameters = 11\n'
    '[tensors]\n"out.{a,b}" = [2, 2]\n[tensors.in]\n"{0..1}.w" = { shape = [1], dtype = "F32" }\n'
    '"x.y" = [1]\n',
    "b.toml": 'name = "B"\nextends = "A"\nkeys = 13\nparameters = 18\nwithout = ["out.*"]\n[tensors]\n'
    '"{a,b}.{0..3}" = { shape = [1], dtype = "F32", optional = true }\n"c{1,2}" = [[1], [2, 3]]\n',
    "optional.toml": 'a = [1, 2]\nb = "any"\n',
    "architectures/a.toml": '[Own]\nslots = ["VAE-v1"]\naliases = ["own"]\nonly = []\nmay_lack = []\n',
    "known/a.toml": f'[[file]]\nname = "a"\nsha256 = "{"0" * 64}"\ncivitai_version = 3\n'
    '[[metric]]\nname = "b"\nvalue = "2020/2982/0130"\n[[component]]\nname = "c"\nclass = "d"\n'
    f'blake3 = "{"1" * 64}"\n',
    "classes.toml": '[C]\nprecision = "fp32"\nfixes = ["a"]\n'
    'blocks = { "a{0..3}." = "IN{0..3}", "m." = "M" }\n'
    '[C.metric]\npart = "unet"\nbase = 0.5\nk = 12\nhaving = ["a"]\n',
    "kinds.toml": '[[kind]]\nkind = "a"\ncalled = "an é"\nany = ["*.x", "y"]\nlast = [7, 8]\nrows = 75\n'
    '[[model]]\nname = "b"\nof = ["a"]\nsaid = ["c"]\nsizes = { "*d*" = 768 }\n',
    "sites.toml": '[a.models]\n"é" = "b"\n[a.kinds]\nVAE = "c"\n',
    "programs.toml": '[a]\ncheckpoint = "models/x"\nother = "models"\nVAE = "é"\n',
    "diffusers.toml": (ROOT / "components_db" / "v1" / "diffusers.toml").read_text()
    + '[layouts.other]\nextends = "SD-v1"\npixels = 64\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_catalogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "own"
    for other, text in TABLES.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        if other in {"a.toml", name}:
            (folder / other).write_text(text)
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(catalog, "BUILT_IN", tmp_path / "none")  # which takes a hundred times as long to read
    if name == "architectures/a.toml":
        (folder / "vae.toml").write_text('name="V"\nclass="VAE-v1"\nkeys=1\nparameters=1\ntensors.a=[1]\n')

    def read(_: Path) -> None:
        catalog._load.cache_clear()
        catalog.load_catalog([folder])

    _try(folder / name, [TABLES[name]], 800, read)
    catalog._load.cache_clear()


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(path, {"component": "a", "tensors": 3, "inner": {"b": [1, 2.5, None, "é"]}})
    _try(path, [path.read_text()], 2000, read_record)


HEADER = {
    "__metadata__": {"format": "pt", "é\n": "\U0001f600"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"data_offsets": [24, 26], "dtype": "F16", "shape": []},
    "c": {"dtype": "F32", "shape": [0], "data_offsets": [26, 26]},
}


LAYOUTS = load_catalog([]).layouts


def _open(path: Path) -> None:
    with open_checkpoint(path, LAYOUTS) as checkpoint:
        "".join((*checkpoint, *checkpoint.metadata, *checkpoint.metadata.values())).encode()
        for tensor in checkpoint.values():
            for _ in tensor.windows():
                pass


def test_headers(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raw = path.read_bytes()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(26))
        _open(path)

    _try(tmp_path / "a", [json.dumps(HEADER), json.dumps(HEADER, separators=(",", ":"))], 4000, read)


def test_indices(tmp_path: Path) -> None:
    raw = json.dumps(HEADER).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(26))
    seed = {"metadata": {"total_size": 26, "x": "y"}, "weight_map": dict.fromkeys("abc", "m.safetensors")}
    _try(tmp_path / "m.index.json", [json.dumps(seed)], 2000, _open)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_folders(tmp_path: Path, name: str) -> None:
    def file(tensors: dict[str, list[int]]) -> bytes:
        held = {
            n: {"dtype": "F32", "shape": shape, "data_offsets": [4 * i, 4 * i + 4]}
            for i, (n, shape) in enumerate(tensors.items())
        }
        raw = json.dumps(held).encode()
        return struct.pack("<Q", len(raw)) + raw + bytes(4 * len(held))

    # By what a folder is told to be SD v1.
    unet = {"down_blocks.0.attentions.0.proj_in.weight": [1, 1, 1, 1], "down_blocks.3.x": [1]}
    files = {
        "model_index.json": '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2D"]}',
        "scheduler/scheduler_config.json": '{"prediction_type": "v_prediction", '
        '"rescale_betas_zero_snr": true}',
        "unet/diffusion_pytorch_model.safetensors": file(unet),
        "vae/diffusion_pytorch_model.safetensors": file({"a": [1]}),
        "text_encoder/model.safetensors": file({"a": [1]}),
    }
    for other, data in files.items():
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(data if isinstance(data, bytes) else data.encode())
    seed = files[name]
    assert isinstance(seed, str)

    def read(_: Path) -> None:
        _open(tmp_path)

    _try(tmp_path / name, [seed], 90, read)
