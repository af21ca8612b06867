"""Text encoders with a tokenizer beside them: it goes where programs look for it, and stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import UNET, Folder, content, save, values

# as the catalog has Gemma 2 and UMT5, in a few tensors
CATALOG = {
    "DIT-small.toml": """\
name = "DIT-small"
class = "DIT-small"
prefix = "model.diffusion_model."
keys = 2
parameters = 16
[tensors]
"layers.{0,1}.out.weight" = [4, 2]
""",
    "LLM-small.toml": """\
name = "LLM-small"
class = "LLM-small"
prefix = "text_encoders."
alone = { without = "small.transformer." }
keys = 3
parameters = 9
[tensors]
"spiece_model" = { shape = [-1], dtype = "U8", optional = true }
"small.logit_scale" = { shape = [], optional = true }
"small.transformer.shared.weight" = [4, 2]
""",
    "architectures.toml": '[Small]\nslots = ["DIT-small", "LLM-small"]\n',
    "classes.toml": '[DIT-small]\nprecision = "bf16"\n[LLM-small]\nprecision = "bf16"\n',
}
DIT = {f"layers.{n}.out.weight": values([[n, 1]] * 4) for n in (0, 1)}
TEXT = {"shared.weight": values([[1, 2]] * 4)}


def tokenizer(word: bytes) -> LazyTensor:
    return MemoryTensor(DType.U8, (len(word),), word)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder.below(tmp_path)
    for name, text in CATALOG.items():
        folder.write(f"families/{name}", text)
    inside = {
        **{UNET + n: t for n, t in DIT.items()},
        "text_encoders.small.transformer.shared.weight": TEXT["shared.weight"],
        "text_encoders.small.logit_scale": values(4.6),
        "text_encoders.spiece_model": tokenizer(b"one"),
    }
    save(folder / "all.safetensors", inside)
    save(folder / "dit.safetensors", DIT)
    save(folder / "text.safetensors", {**TEXT, "spiece_model": tokenizer(b"another")})
    return replace(folder, environment={"CKPT_COMPONENTS": str(folder / "families")})


def spiece(path: Path) -> dict[str, bytes]:
    return {name: raw for name, (code, _, raw) in content(path).items() if code == "U8"}


def test_both_forms_are_known_whole(folder: Folder) -> None:
    for name, architecture in (("all", "Small"), ("text", "LLM-small")):
        (one,) = folder("inspect", f"{name}.safetensors", "--json").json["files"]
        assert (one["architecture"], one["intact"]) == (architecture, True)


def test_pruned_and_extracted_and_put_into_another(folder: Folder) -> None:
    assert folder("prune", "all.safetensors", "-o", "pruned.safetensors").code == 0
    assert spiece(folder / "pruned.safetensors") == {"text_encoders.spiece_model": b"one"}
    assert content(folder / "pruned.safetensors").keys() == content(folder / "all.safetensors").keys()
    assert folder("extract", "all.safetensors", "LLM-small", "-o", "llm.safetensors").code == 0
    assert spiece(folder / "llm.safetensors") == {"spiece_model": b"one"}
    assert "shared.weight" in content(folder / "llm.safetensors")
    assert folder("replace", "all.safetensors", "LLM=text.safetensors", "-o", "new.safetensors").code == 0
    assert spiece(folder / "new.safetensors") == {"text_encoders.spiece_model": b"another"}


def test_built_of_parts(folder: Folder) -> None:
    folder.write(
        "small.toml",
        'format = 1\nname = "small"\nbase = "NEW Small"\nsources.d.file = "dit.safetensors"\n'
        'sources.t.file = "text.safetensors"\ncomponents = { DIT-small = "d", LLM-small = "t" }\n',
    )
    folder.build("small.toml")
    assert spiece(folder / "small.safetensors") == {"text_encoders.spiece_model": b"another"}
    found = content(folder / "small.safetensors")
    assert found["text_encoders.small.transformer.shared.weight"][0] == "BF16"
