"""`ckpt verify`: files that are what their recipe's lock says, and files that are not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.help.building import RECIPE, Folder, files, model, save
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).built()


def test_the_right_file(folder: Folder) -> None:
    digest = hashlib.sha256((folder / "tiny.safetensors").read_bytes()).hexdigest()
    said = folder("verify", "tiny.toml")
    assert said.code == 0
    assert said.out == f"verified  tiny.safetensors\n  sha256 {digest}\n"
    (folder / "tiny.safetensors").rename(folder / "elsewhere.safetensors")
    assert folder("verify", "tiny.toml", "elsewhere.safetensors").code == 0


def test_without_sources_and_store(folder: Folder) -> None:
    """The recipe, its lock and the file are enough."""
    bare = Folder(folder.path.parent / "bare", folder.path.parent / "empty")
    bare.path.mkdir()
    for name in ("tiny.toml", "tiny.lock.toml", "tiny.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    before = files(bare.path)
    assert bare("verify", "tiny.toml").code == 0
    assert files(bare.path) == before


def test_a_wrong_component(folder: Folder) -> None:
    save(folder / "vae.safetensors", model("VAE-tiny", seed=3))
    other = folder.beside("other")
    assert other("build", "tiny.toml").code == 0
    said = folder("verify", "tiny.toml", other / "tiny.safetensors")
    assert said.code == 7
    text = said.err.replace(str(other.path), "…")
    assert golden(GOLDEN / "verify-component.txt", text) == text
    assert "VAE-tiny: expected" in text and "UNET-tiny" not in text and "CLIP-tiny" not in text


def test_a_wrong_header_only(folder: Folder) -> None:
    path = folder / "tiny.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["ckpt.recipe"] = "forged"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    said = folder("verify", "tiny.toml")
    assert said.code == 7
    assert "every tensor is as it should be: only the header differs" in said.err
    told = [line for line in said.err.splitlines() if "= expected " in line or "= found " in line]
    assert [len(line) for line in told] == [78, 78], "one line each on a terminal of 80 columns"


def test_without_a_lock(folder: Folder) -> None:
    (folder / "tiny.lock.toml").unlink()
    said = folder("verify", "tiny.toml")
    assert said.code == 4
    assert golden(GOLDEN / "verify-no-lock.txt", said.err) == said.err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("tiny.safetensors", "`ckpt verify RECIPE tiny.safetensors` holds it to one recipe"),
        (
            "tiny.toml . tiny.safetensors",
            "`ckpt verify RECIPE tiny.safetensors` holds it to one recipe",
        ),
        ("x.intoto.json", "`ckpt verify --statement x.intoto.json` holds its files to it"),
    ],
)
def test_what_is_no_recipe_is_told_how_to_verify(folder: Folder, line: str, hint: str) -> None:
    folder.write("x.intoto.json", "{}")
    said = folder("verify", *line.split())
    assert said.code == 2 and f"hint: {hint}\n" in said.err


def test_expectations_without_a_lock(folder: Folder) -> None:
    (folder / "tiny.lock.toml").unlink()
    digest = hashlib.sha256((folder / "tiny.safetensors").read_bytes()).hexdigest()
    folder.write("tiny.toml", RECIPE + f'expect.sha256 = "{digest}"\n')
    assert folder("verify", "tiny.toml").code == 0
    folder.write("tiny.toml", RECIPE + 'expect.metric = "1111/2222/3333"\n')
    said = folder("verify", "tiny.toml")
    assert said.code == 7 and "expected 1111/2222/3333" in said.err


@pytest.mark.parametrize(("data", "code"), [(None, 6), (b"nonsense", 6), (b"", 6)])
def test_what_is_no_checkpoint(folder: Folder, data: bytes | None, code: int) -> None:
    (folder / "tiny.safetensors").unlink()
    if data is not None:
        (folder / "tiny.safetensors").write_bytes(data)
    said = folder("verify", "tiny.toml")
    assert said.code == code and "tiny.safetensors" in said.err and "Traceback" not in said.err


def test_a_truncated_file(folder: Folder) -> None:
    path = folder / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert folder("verify", "tiny.toml").code in (6, 7)


def test_one_of_several(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE + '[[output]]\nname = "a"\n[[output]]\nname = "b"\nprecision = "bf16"\n')
    folder.build()
    assert folder("verify", "tiny.toml").out.count("verified") == 2
    assert folder("verify", "tiny.toml", "tiny-b.safetensors").code == 0
    (folder / "tiny-a.safetensors").rename(folder / "tiny-b.safetensors")
    assert folder("verify", "tiny.toml", "tiny-b.safetensors").code == 7
    said = folder("verify", "tiny.toml", "unknown.safetensors")
    assert said.code == 2 and "is none of the recipe's outputs" in said.err
