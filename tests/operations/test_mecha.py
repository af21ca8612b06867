"""Methods of sd-mecha as operations: what is read and refused without it, and what they give with it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.operations import OPERATIONS
from builder.operations.registry import Setting
from tests.help.building import UNET, Folder, content, model, save, values

RECIPE = """\
format = 1
name = "m"
base = "x"
sources.a.file = "a.safetensors"
sources.b.file = "b.safetensors"
[output]
precision = "fp32"
[steps.x]
"""
NAME = "out.2.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    for seed, name in enumerate("ab"):
        save(made / f"{name}.safetensors", model(seed=seed))
    return made


def refused(folder: Folder, step: str) -> str:
    folder.write("m.toml", RECIPE + step)
    said = folder("plan", "m.toml")
    assert said.code == 3
    return said.err


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ('op = "mecha:"\na = "a"\n', "must be `mecha:` and the name of a method"),
        ('op = "mecha"\na = "a"\n', "unknown operation `mecha`"),
        ('op = "mecha:rotate"\n', "`a` is missing"),
        ('op = "mecha:rotate"\na = "a"\nd = "b"\n', "unknown key `d`"),
        ('op = "mecha:rotate"\na = "a"\nb = "b"\nparams = { alpha = [1] }\n', "must be"),
    ],
)
def test_what_is_read_without_it(folder: Folder, step: str, said: str) -> None:
    assert said in refused(folder, step)


def test_without_it_the_plan_says_how_to_have_it(folder: Folder) -> None:
    try:
        importlib.metadata.version("sd-mecha")
    except importlib.metadata.PackageNotFoundError:
        said = refused(folder, 'op = "mecha:rotate"\na = "a"\nb = "b"\nparams = { no-such = 1.0 }\n')
        assert "`mecha:rotate` needs sd-mecha 1.1.8, which is not installed" in said
        assert "pip install sd-mecha==1.1.8" in said
        assert "m.toml:8" in said
    else:
        pytest.skip("sd-mecha is installed")


# ── with it ──

# Each that runs tensor by tensor, how many models it takes, and whether it takes differences.
METHODS = {
    "add_cosine_a": 2,
    "add_cosine_b": 2,
    "add_opposite_mask": 3,
    "add_strict_opposite_mask": 3,
    "cast": 1,
    "clamp": 3,
    "crossover": 2,
    "geometric_median": 3,
    "geometric_sum": 2,
    "multiply_quotient": 3,
    "n_average": 3,
    "omit_non_finite": 1,
    "perpendicular_component": 2,
    "rotate": 2,
    "slerp": 2,
    "tensor_sum": 2,
    "top_k_tensor_sum": 2,
    "train_difference_mask": 3,
    "weighted_sum": 2,
}
DIFFERENCES = {
    "dropout": 3,
    "model_stock": 3,
    "scale": 1,
    "ties_sum": 3,
    "ties_sum_extended": 3,
    "ties_sum_with_dropout": 3,
    "truncate_kronecker": 1,
    "truncate_rank": 1,
}
SEEDS = {"dropout": "seed", "ties_sum_with_dropout": "seed"}
SEEDS |= dict.fromkeys(("truncate_kronecker", "truncate_rank"), "approximate_basis_seed")


def theirs(name: str, tensors: list[torch.Tensor], **params: Any) -> torch.Tensor:
    """What the package itself makes of them."""
    methods = pytest.importorskip("sd_mecha.extensions.merge_methods")
    found = methods.resolve(name)
    types, names, defaults = found.get_input_types(), found.get_param_names(), found.get_default_args().args
    for key, kind, default in zip(names.args[::-1], types.args[::-1], defaults[::-1], strict=False):
        params.setdefault(key, torch.tensor(default) if kind is torch.Tensor else default)
    tables = "StateDict" in str([types.args[:1], types.vararg])
    args = [{"k": t.clone()} if tables else t.clone() for t in tensors]
    more = {"key": "k", "cache": found.create_cache()} if found.has_varkwargs else {}
    call = found.instantiate() if found.wrapped_is_class else found.__wrapped__
    made: torch.Tensor = call(*args, **params, **more)
    return made


def ours(name: str, tensors: Mapping[str, torch.Tensor], **params: Any) -> torch.Tensor:
    held = {k: {NAME: values(t.numpy())} for k, t in tensors.items()}
    said = {"method": name, "params": params}
    made = OPERATIONS["mecha"].apply(held, said, Setting("UNET-v1")).tensors[NAME]
    return torch.frombuffer(bytearray(made.tobytes()), dtype=torch.float32).view(made.shape)


def some(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(6, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_models(name: str) -> None:
    pytest.importorskip("sd_mecha")
    tensors = some(METHODS[name])
    held = [t.clone() for t in tensors]
    found = ours(name, dict(zip("abc", tensors, strict=False)))
    assert found.shape == (6, 8)
    assert all(torch.equal(t, h) for t, h in zip(tensors, held, strict=True))
    assert torch.allclose(found, theirs(name, held), atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_methods_of_differences_get_those_from_a_base(name: str) -> None:
    pytest.importorskip("sd_mecha")
    base, *tensors = some(1 + DIFFERENCES[name])
    named = dict(zip("abc", tensors, strict=False)) | {"base": base}
    seed = {SEEDS[name]: 0} if name in SEEDS else {}
    found = ours(name, named)
    expected = base + theirs(name, [t - base for t in tensors], **seed)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found, ours(name, named))  # draws are the same every time


def test_a_difference_beside_a_model() -> None:
    pytest.importorskip("sd_mecha")
    a, b, base = some(3)
    named = {"a": a, "b": b, "base": base}
    assert torch.allclose(ours("add_difference", named, alpha=0.5), a + 0.5 * (b - base), atol=1e-6)
    assert torch.allclose(ours("subtract", named), base + (a - b), atol=1e-6)


def test_a_number_has_the_shape_of_what_it_is_of() -> None:
    pytest.importorskip("sd_mecha")
    base, a, b = (t[0, 0] for t in some(3))
    assert ours("model_stock", {"a": a, "b": b, "base": base}).shape == ()
    assert ours("rotate", {"a": a, "b": b}, alignment=1.0).shape == ()


def test_a_recipe_with_a_method(folder: Folder) -> None:
    pytest.importorskip("sd_mecha")
    step = 'op = "mecha:weighted_sum"\na = "a"\nb = "b"\nparams = { alpha = 0.25 }\n'
    folder.write("m.toml", RECIPE + step)
    folder.build("m.toml")
    first = (folder / "m.safetensors").read_bytes()
    a, b = (
        torch.frombuffer(bytearray(model(seed=s)[UNET + NAME].tobytes()), dtype=torch.float32) for s in (0, 1)
    )
    data = content(folder / "m.safetensors")[UNET + NAME][2]
    made = torch.frombuffer(bytearray(data), dtype=torch.float32)
    assert torch.allclose(made, torch.lerp(a, b, 0.25), atol=1e-6)
    (folder / "m.safetensors").unlink()
    folder.build("m.toml", "--threads", 1)
    assert (folder / "m.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ('op = "mecha:rotat"\na = "a"\nb = "b"\n', "did you mean `rotate`?"),
        ('op = "mecha:rebasin"\na = "a"\nb = "b"\n', "it cannot run tensor by tensor"),
        (
            'op = "mecha:rotate"\na = "a"\nb = "b"\nc = "b"\n',
            "`mecha:rotate` takes 2 models, not 3",
        ),
        ('op = "mecha:rotate"\na = "a"\nb = "b"\nparams = { alignmen = 1 }\n', "did you mean `alignment`?"),
        (
            'op = "mecha:rotate"\na = "a"\nb = "b"\nparams = { stiefel_max_iters = 0.5 }\n',
            "must be an integer",
        ),
        ('op = "mecha:ties_sum"\na = "a"\nof = ["b"]\n', 'add `base = "…"`'),
    ],
)
def test_what_is_refused_when_it_is_planned(folder: Folder, step: str, said: str) -> None:
    pytest.importorskip("sd_mecha")
    assert said in refused(folder, step)


def test_a_method_that_fails_names_the_tensor(folder: Folder) -> None:
    pytest.importorskip("sd_mecha")
    folder.write("m.toml", RECIPE + 'op = "mecha:stack"\na = "a"\nb = "b"\n')
    said = folder("build", "m.toml")
    assert said.code == 7 and "mecha:stack fails on `" in said.err
