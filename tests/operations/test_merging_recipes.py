"""Recipes that merge, from their text to the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from builder.formats import open_checkpoint
from tests.help.building import UNET, Folder, content, model, save

HEAD = """\
format = 1
name = "mix"
"""
SOURCES = "".join(f'sources.{n}.file = "{n}.safetensors"\n' for n in "abcd")
CHAIN = """\
[steps]
b1 = { op = "weighted-sum", a = "a", b = "b", alpha = 0.05 }
b2 = { op = "add-difference", a = "b1", b = "c", c = "b" }
b3 = { op = "weighted-sum", a = "b2", b = "d", alpha = 0.25 }
"""
NAME = UNET + "out.2.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    for seed, name in enumerate("abcd", 1):
        save(made / f"{name}.safetensors", model(seed=seed))
    return made


def weights(seed: int, name: str) -> torch.Tensor:
    tensor = model(seed=seed)[name]
    return torch.frombuffer(tensor.tobytes(), dtype=tensor.dtype.torch)


def made(folder: Folder, name: str, file: str = "mix.safetensors") -> torch.Tensor:
    return torch.frombuffer(bytearray(content(folder / file)[name][2]), dtype=torch.float16)


def build(folder: Folder, text: str, *options: object) -> dict[str, object]:
    folder.write("mix.toml", HEAD + text)
    return folder.build("mix.toml", *options)


def test_a_chain_is_computed_at_once(folder: Folder) -> None:
    build(folder, 'base = "b3"\n' + SOURCES + CHAIN)
    a, b, c, d = (weights(seed, NAME) for seed in (1, 2, 3, 4))
    expected = (((a * 0.95 + b * 0.05) + (c - b)) * 0.75 + d * 0.25).half()
    assert torch.equal(made(folder, NAME), expected)
    vae = next(n for n in model() if n.startswith("first_stage_model."))
    assert torch.equal(made(folder, vae), weights(1, vae).half())


def test_the_files_arithmetic_rounds_as_saved_files_do(folder: Folder) -> None:
    """A chain in one recipe is the same as one file after the other."""
    half = 'base = "{}"\n[output]\nfile = "{}16.safetensors"\n[sources]\n{}.file = "{}.safetensors"\n'
    for name in "abcd":
        build(folder, half.format(name, name, name, name))
    sources = SOURCES.replace(".safetensors", "16.safetensors")
    build(folder, 'arithmetic = "file"\nbase = "b3"\n' + sources + CHAIN)
    a, b, c, d = (weights(seed, NAME).half() for seed in (1, 2, 3, 4))
    one = a * 0.95 + b * 0.05
    two = one + (c - b) * 1.0
    assert torch.equal(made(folder, NAME), two * 0.75 + d * 0.25)
    whole = (folder / "mix.safetensors").read_bytes()

    steps = CHAIN.splitlines()
    text = (
        'arithmetic = "file"\nbase = "{}"\n[output]\nfile = "{}.safetensors"\nprecision = "keep"\n[sources]\n'
    )
    known = {n: f"{n}16" for n in "abcd"}
    for step, inputs in (("b1", "ab"), ("b2", ["b1", "c", "b"]), ("b3", ["b2", "d"])):
        lines = "".join(f'{n}.file = "{known[n]}.safetensors"\n' for n in dict.fromkeys(inputs))
        line = next(x for x in steps if x.startswith(step))
        build(folder, text.format(step, step) + lines + "[steps]\n" + line + "\n")
        known[step] = step
    assert content(folder / "b3.safetensors") == content(folder / "mix.safetensors")
    assert len(whole) == (folder / "mix.safetensors").stat().st_size


def test_same_bytes_on_any_threads_and_in_any_order(folder: Folder) -> None:
    step = '[steps.m]\nop = "linear"\nof = {}\n'
    found = set()
    for threads, of in (
        (1, "{ a = 0.2, b = 0.3, c = { UNET = 0.5, CLIP = 0.1 } }"),
        (2, "{ c = { CLIP = 0.1, UNET = 0.5 }, b = 0.3, a = 0.2 }"),
        (8, "{ b = 0.3, c = { UNET = 0.5, CLIP = 0.1 }, a = 0.2 }"),
    ):
        text = 'base = "m"\n' + SOURCES.replace('sources.d.file = "d.safetensors"\n', "")
        build(folder, text + step.format(of), "--threads", threads, "--check")
        found.add((folder / "mix.safetensors").read_bytes())
        (folder / "mix.safetensors").unlink()
    assert len(found) == 1


def test_steps_that_mean_the_same_make_the_same(folder: Folder) -> None:
    sources = SOURCES.replace('sources.d.file = "d.safetensors"\n', "")
    build(folder, 'base = "m"\n' + sources + '[steps.m]\nop = "sum-twice"\na = "a"\nb = "b"\nc = "c"\n')
    one = content(folder / "mix.safetensors")
    steps = '[steps]\nx = { op = "weighted-sum", a = "a", b = "b" }\n'
    steps += 'y = { op = "weighted-sum", a = "x", b = "c" }\n'
    build(folder, 'base = "y"\n' + sources + steps)
    assert content(folder / "mix.safetensors") == one


def test_a_step_that_is_used_twice(folder: Folder) -> None:
    steps = """\
[steps]
x = { op = "weighted-sum", a = "a", b = "b" }
y = { op = "add-difference", a = "x", b = "c", c = "x" }
"""
    build(folder, 'base = "y"\n' + SOURCES.replace('sources.d.file = "d.safetensors"\n', "") + steps)
    a, b, c = (weights(seed, NAME) for seed in (1, 2, 3))
    x = a * 0.5 + b * 0.5
    assert torch.equal(made(folder, NAME), (x + (c - x)).half())


def test_the_plan_knows_what_is_read_and_written(folder: Folder) -> None:
    folder.write("mix.toml", HEAD + 'base = "b3"\n' + SOURCES + CHAIN)
    folder.know(*(f"{n}.safetensors" for n in "abcd"))
    (output,) = [s for s in folder.plan("mix.toml")["steps"] if s["kind"] == "output"]
    build(folder, 'base = "b3"\n' + SOURCES + CHAIN)
    assert output["writes"] == sum(len(data) for _, _, data in content(folder / "mix.safetensors").values())


def test_weights_by_class_block_and_pattern(folder: Folder) -> None:
    alpha = '{ UNET = { base = 0, M00 = 1, "OUT*" = 0.5 }, tensors = { "*.bias" = 0.25 } }'
    text = f'[steps.m]\nop = "weighted-sum"\na = "a"\nb = "b"\nalpha = {alpha}\n'
    sources = 'sources.a.file = "a.safetensors"\nsources.b.file = "b.safetensors"\n'
    build(folder, 'base = "m"\n' + sources + text)
    for name, alpha in (
        (UNET + "middle_block.0.in_layers.2.weight", 1.0),
        (NAME, 0.5),
        (next(n for n in model() if n.endswith("mlp.fc1.weight")), 0.0),
        (UNET + "out.2.bias", 0.25),
    ):
        a, b = weights(1, name), weights(2, name)
        expected = a * (1 - alpha) + b * alpha if 0 < alpha < 1 else (a, b)[int(alpha)]
        assert torch.equal(made(folder, name), expected.half()), name


def test_the_vae_is_merged_when_it_is_asked_for(folder: Folder) -> None:
    vae = next(n for n in model() if n.startswith("first_stage_model."))
    sources = 'sources.a.file = "a.safetensors"\nsources.b.file = "b.safetensors"\n'
    step = '[steps.m]\nop = "weighted-sum"\na = "a"\nb = "b"\n'
    a, b = weights(1, vae), weights(2, vae)
    for more, expected in (("", a), ("VAE = true\n", a * 0.5 + b * 0.5), ("alpha = { VAE = 1 }\n", b)):
        folder.write("mix.toml", HEAD + 'base = "m"\n' + sources + step + more)
        said = folder("build", "mix.toml")
        assert said.code == 0
        assert ("the VAE is that of `a`, as merged ones break colours" in said.err) is (not more)
        assert torch.equal(made(folder, vae), expected.half())


def test_what_is_not_finite_names_tensor_step_and_inputs(folder: Folder) -> None:
    text = 'base = "m"\n' + SOURCES.partition("sources.c")[0]
    text += '[steps.m]\nop = "linear"\nof = { a = 1e9, b = 1 }\nnormalize = false\n'
    folder.write("mix.toml", HEAD + text)
    said = folder("build", "mix.toml")
    assert said.code == 7
    assert f"tensor `{NAME.removeprefix(UNET)}`" in said.err
    assert "step `m`: linear of `source a`, `source b`" in said.err


def test_steps_that_lie_too_deep_are_refused(folder: Folder) -> None:
    steps = [f'[steps.s{i}]\nop = "weighted-sum"\na = "s{i + 1}"\nb = "b"\nalpha = 0.5\n' for i in range(900)]
    text = 'base = "s0"\n' + SOURCES.partition("sources.c")[0] + "".join(steps)
    folder.write("mix.toml", HEAD + text.replace('a = "s900"', 'a = "a"'))
    said = folder("build", "mix.toml")
    assert said.code == 3
    assert "steps are made of each other too deeply" in said.err


def test_a_long_chain_is_built(folder: Folder) -> None:
    steps = [f'[steps.s{i}]\nop = "weighted-sum"\na = "s{i + 1}"\nb = "b"\nalpha = 0.5\n' for i in range(64)]
    text = 'base = "s0"\n' + SOURCES.partition("sources.c")[0] + "".join(steps)
    build(folder, text.replace('a = "s64"', 'a = "a"'))


def test_the_file_says_what_it_was_merged_of(folder: Folder) -> None:
    pin = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    sources = (
        f'sources.a.sha256 = "{pin}"\nsources.a.file = "a.safetensors"\nsources.b.file = "b.safetensors"\n'
    )
    build(folder, 'base = "m"\n' + sources + '[steps.m]\nop = "weighted-sum"\na = "a"\nb = "b"\n')
    with open_checkpoint(folder / "mix.safetensors") as checkpoint:
        said = dict(checkpoint.metadata)
    assert said["modelspec.merged_from"] == "a, b"
    assert json.loads(said["sd_merge_models"]).keys() == {pin}
    steps = json.loads(said["sd_merge_recipe"])["steps"]
    assert steps == {
        "m": {
            "op": "weighted-sum",
            "inputs": {"a": "a", "b": "b"},
            "params": {"alpha": 0.5},
            "components": [],
        }
    }
