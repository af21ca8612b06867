"""What `ckpt diff` finds, and what it says of it."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.cli import run
from builder.formats.write_safetensors import write as write_tensors
from builder.reports.diff.values import Comparer, Rounding
from builder.tensors.cast import Faults, cast_all
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import CLIP, IDS, TINY, UNET, VAE, model, save, save_dirty, values
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden" / "diff"
Tensors = Mapping[str, LazyTensor]
BIAS = VAE + "decoder.conv_out.bias"


def mini() -> Tensors:
    """A model of as many tensors as SD-v1, of kinds that a LoRA changes and of others."""
    return model("SD-mini")


def half(tensors: Tensors) -> Tensors:
    return cast_all(tensors, "fp16", faults=Faults())


def turned(tensors: Tensors, factor: float, chosen: Callable[[str], bool] = lambda _: True) -> Tensors:
    """FP32 tensors multiplied by about `factor`."""

    def turn(name: str, tensor: LazyTensor) -> LazyTensor:
        if tensor.dtype is not DType.F32 or not chosen(name):
            return tensor
        held = np.frombuffer(bytes(tensor.tobytes()), "<f4").reshape(tensor.shape)
        noise = np.random.RandomState(1).uniform(0.5, 1.5, held.shape)
        return values((held * (1 + (factor - 1) * noise)).astype("<f4"))

    return {name: turn(name, tensor) for name, tensor in tensors.items()}


def alone() -> Tensors:
    return {n.removeprefix(VAE): t for n, t in model().items() if n.startswith(VAE)}


def nai(tensors: Tensors) -> Tensors:
    return {n.replace("transformer.text_model.", "transformer."): t for n, t in tensors.items()}


def diffusers_attention(tensors: Tensors) -> Tensors:
    from builder.operations.fixes import Reshaped

    named = {}
    for name, tensor in tensors.items():
        if ".attn_1." in name and ".norm." not in name:
            for old, new in (("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("proj_out.", "to_out.0.")):
                name = name.replace(f".attn_1.{old}", f".attn_1.{new}")
            if len(tensor.shape) == 4:
                tensor = Reshaped(tensor, tensor.shape[:2])
        named[name] = tensor
    return named


def with_average(tensors: Tensors, average: Tensors) -> Tensors:
    """Tensors, and another model's UNET as their average."""
    found = {
        "model_ema.diffusion_model" + n.removeprefix(UNET).replace(".", ""): t
        for n, t in average.items()
        if n.startswith(UNET)
    }
    return {**tensors, **found}


def lora_layer(name: str) -> bool:
    return name.startswith(UNET) and name.endswith("weight") and ("attn" in name or ".ff.net." in name)


def swapped(tensors: Tensors, prefix: str, other: Tensors) -> Tensors:
    return {n: other[n] if n.startswith(prefix) else t for n, t in tensors.items()}


def one_value(tensors: Tensors, *first: float) -> Tensors:
    return {**tensors, BIAS: values([*first, 1.0, 1.0, 1.0][:3])}


# By name: two checkpoints, and the first cause.
CASES: dict[str, tuple[Callable[[], Tensors], Callable[[], Tensors], str]] = {
    "identical": (model, model, "identical tensors"),
    "rounded": (model, lambda: half(model()), "B is A rounded to FP16"),
    "rounded-in-a": (lambda: half(model()), model, "A is B rounded to FP16"),
    "widened": (
        lambda: half(model()),
        lambda: cast_all(half(model()), "fp32", faults=Faults()),
        "B is A in FP32, the same values",
    ),
    "rounded-on-the-way": (
        model,
        lambda: cast_all(half(model()), "fp32", faults=Faults()),
        "B is A rounded to FP16, and stored as FP32",
    ),
    "half-and-brain": (
        lambda: half(model()),
        lambda: cast_all(model(), "bf16", faults=Faults()),
        "UNET-tiny may be the same, rounded to FP16 in A and to BF16 in B from something finer",
    ),
    "position-ids": (
        lambda: {**model(), IDS: values([[*range(76), 75.9975]])},
        model,
        "only position_ids differ: 1 of 77, position 76 is 75.9975 in A and 76 in B, "
        "as F32 [1, 77] and I64 [1, 77]",
    ),
    "no-position-ids": (
        model,
        lambda: {n: t for n, t in model().items() if n != IDS},
        "B is A without position_ids",
    ),
    "average-dropped": (
        lambda: with_average(model(), model(seed=3)),
        model,
        "B is A without its EMA (1.3 MB)",
    ),
    "average-promoted": (
        lambda: with_average(model(), model(seed=3)),
        lambda: half(swapped(model(), UNET, model(seed=3))),
        "UNET-tiny of B is the EMA of A",
    ),
    "nai-names": (
        lambda: nai(model()),
        model,
        "the same tensors under other names: CLIP-tiny names are NAI's in A",
    ),
    "diffusers-attention": (
        lambda: diffusers_attention(mini()),
        mini,
        "the same tensors under other names: VAE-mini has its attention as diffusers names it in A",
    ),
    "one-component": (model, alone, "B is A's VAE-tiny alone"),
    "without-one": (
        model,
        lambda: {n: t for n, t in model().items() if not n.startswith(CLIP)},
        "B is A without its CLIP-tiny",
    ),
    "other-vae": (
        model,
        lambda: swapped(model(), VAE, model(seed=5)),
        "VAE-tiny holds other weights altogether",
    ),
    "tuned": (
        mini,
        lambda: turned(mini(), 1.02, lambda n: n.startswith(UNET)),
        "UNET-mini differs everywhere by small amounts, half of the values by less than 3.1%: "
        "a merge or a fine-tune",
    ),
    "lora": (
        mini,
        lambda: turned(mini(), 1.02, lora_layer),
        "UNET-mini differs in layers that a LoRA changes, and in no others: as if one was baked in",
    ),
    "a-hair": (
        mini,
        lambda: turned(mini(), 1 + 2**-24),
        "UNET-mini differs by at most 1 ULP: the same, computed or rounded in another way",
    ),
    "one-value": (
        lambda: one_value(mini(), 1.0),
        lambda: one_value(mini(), 1.5),
        "VAE-mini differs in 1 of 248 tensors: `decoder.conv_out.bias`",
    ),
    "nan": (
        mini,
        lambda: one_value(mini(), math.nan, math.inf),
        "VAE-mini has NaN on one side where the other has a number: 1 value",
    ),
    "strangers": (
        lambda: {"a.weight": values([[1, 2], [3, 4]]), "b": values([1]), "c": values([1])},
        lambda: {"a.weight": values([[1, 2], [3, 5]]), "b": values([[1, 2]]), "\x1b[31m": values([1])},
        "the model differs in 2 of 2 tensors: `a.weight`, `b`",
    ),
    "empty": (dict, dict, "identical tensors"),
    "nothing-in-common": (model, lambda: {"x": values([1])}, "the two have no tensor in common"),
}
SAME = {"identical", "empty"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_COMPONENTS", str(TINY))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = run(["diff", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("case", CASES)
def test_likely_causes(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, cause = CASES[case]
    save(here / "a.safetensors", a())
    save(here / "b.safetensors", b())
    code, out, err = said(capsys, "a.safetensors", "b.safetensors")
    assert (code, err) == (0 if case in SAME else 1, "")
    assert out == golden(GOLDEN / f"{case}.txt", out)
    found = json.loads(said(capsys, "a.safetensors", "b.safetensors", "--json")[1])
    assert found["causes"][0] == cause
    assert found["same"] is (case in SAME)


def test_a_training_checkpoint_against_its_pruned_form(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dirty(here / "dirty.ckpt", "mini")
    save(here / "pruned.safetensors", half(mini()))
    code, out, err = said(capsys, "dirty.ckpt", "pruned.safetensors")
    assert (code, err) == (1, "")
    assert out == golden(GOLDEN / "pruned.txt", out)
    full = said(capsys, "--full", "dirty.ckpt", "pruned.safetensors")[1]
    assert full == golden(GOLDEN / "pruned-full.txt", full)
    data = said(capsys, "--json", "dirty.ckpt", "pruned.safetensors")[1]
    assert data == golden(GOLDEN / "pruned.json", data)


def test_only_the_header_differs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(here / "a.ckpt", model())
    write_tensors(here / "b.safetensors", model(), {"title": "b"}, sha256=False)
    code, out, _ = said(capsys, "a.ckpt", "b.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["causes"] == ["identical tensors: only the header differs"]
    assert found["same"] and not found["header"]["same"]
    assert found["header"]["metadata"] == {"only_a": [], "only_b": ["title"], "differ": []}


def test_a_sharded_set_is_a_checkpoint_like_any_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = model()
    names = sorted(tensors)
    (here / "set").mkdir()
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held in shards.items():
        save(here / "set" / shard, {n: tensors[n] for n in held})
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (here / "set" / "model.safetensors.index.json").write_text(json.dumps(index))
    save(here / "whole.safetensors", tensors)
    code, out, _ = said(capsys, "set", "whole.safetensors")
    assert code == 0 and "identical tensors: only the header differs" in out


def test_weights_that_are_known_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(here / "a.safetensors", model())
    save(here / "b.safetensors", swapped(model(), VAE, model(seed=5)))
    run(["inspect", "--json", "a.safetensors"])
    parts = json.loads(capsys.readouterr().out)["files"][0]["components"]
    digest = next(p["digest"] for p in parts if p["class"] == "VAE-tiny").removeprefix("blake3:")
    own = here / "own" / "known"
    own.mkdir(parents=True)
    named = '[[component]]\nname = "Mine"\nclass = "VAE-tiny"\n'
    (own / "parts.toml").write_text(f'{named}blake3 = "{digest}"\n')
    monkeypatch.setenv("CKPT_COMPONENTS", f"{TINY}{os.pathsep}{here / 'own'}")
    _, out, _ = said(capsys, "a.safetensors", "b.safetensors")
    assert "VAE-tiny differs: A has Mine's" in out


@pytest.mark.parametrize(
    ("name", "data"),
    [("text", b"hello"), ("empty", b""), ("page", b"<!DOCTYPE html><html>404</html>")],
)
def test_refused_files(name: str, data: bytes, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(here / "a.safetensors", model("VAE-tiny"))
    (here / name).write_bytes(data)
    for files in (("a.safetensors", name), (name, "a.safetensors"), ("a.safetensors", "missing")):
        code, out, err = said(capsys, *files)
        assert (code, out) == (6, "") and err.startswith("error: ") and "Traceback" not in err


def test_a_file_that_ends_too_early_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = save(here / "a.ckpt", model("VAE-tiny"))
    (here / "b.ckpt").write_bytes(whole.read_bytes()[:-2000])
    code, _, err = said(capsys, "a.ckpt", "b.ckpt")
    assert code == 6 and err.startswith("error: ")


def test_threads_change_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(here / "a.safetensors", model())
    save(here / "b.safetensors", turned(model(), 1.02))
    answers = {said(capsys, "a.safetensors", "b.safetensors", "--json", "--threads", n)[1] for n in (1, 2, 5)}
    assert len(answers) == 1


def test_a_file_against_itself_turned_round(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(here / "a.safetensors", model())
    save(here / "b.safetensors", turned(model(), 1.02))
    one, other = (
        json.loads(said(capsys, *files, "--json")[1])["values"]
        for files in (("a.safetensors", "b.safetensors"), ("b.safetensors", "a.safetensors"))
    )
    assert one["ulp"] == other["ulp"] and one["differing"] == other["differing"]
    assert one["largest"]["a"] == other["largest"]["b"]


# -- values, against plain arithmetic


def tensor(dtype: DType, data: bytes) -> LazyTensor:
    return MemoryTensor(dtype, (len(data) // dtype.itemsize,), data)


def order(bits: int, size: int) -> int:
    """The place of a floating number among all of its type, zeros told apart."""
    sign = 1 << 8 * size - 1
    return -(bits ^ sign) - 1 if bits & sign else bits


FLOATS = {DType.F16: "e", DType.F32: "f", DType.F64: "d"}
pairs_of_bytes = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.binary(min_size=8 * n, max_size=8 * n), st.binary(min_size=8 * n, max_size=8 * n))
)


@settings(max_examples=60)
@given(pairs_of_bytes, st.sampled_from(list(FLOATS)), st.booleans())
def test_distances_are_those_of_the_definition(both: tuple[bytes, bytes], dtype: DType, near: bool) -> None:
    size, code = dtype.itemsize, FLOATS[dtype]
    a, b = both
    if near:  # so that distances are small, and some elements equal
        b = bytes(y & 1 if i % size == 0 else x for i, (x, y) in enumerate(zip(a, b, strict=True)))
    x, y = ([int.from_bytes(r[i : i + size], "little") for i in range(0, len(r), size)] for r in (a, b))
    p, q = ([v for (v,) in struct.iter_unpack(f"<{code}", r)] for r in (a, b))
    found = Comparer().compare(tensor(dtype, a), tensor(dtype, b))
    differing = [i for i in range(len(x)) if x[i] != y[i]]
    numbers = [i for i in differing if not (math.isnan(p[i]) or math.isnan(q[i]))]
    steps = {i: abs(order(x[i], size) - order(y[i], size)) for i in numbers}
    histogram = [0] * 65
    for i in numbers:
        histogram[steps[i].bit_length()] += 1
    while histogram and not histogram[-1]:
        histogram.pop()
    assert found.differing == len(differing)
    assert found.not_numbers == len(differing) - len(numbers)
    assert list(found.distances) == histogram
    assert found.steps == max(steps.values(), default=0)
    assert (found.first.at if found.first else None) == min(differing, default=None)
    finite = [i for i in numbers if math.isfinite(p[i] - q[i])]
    largest = max((abs(p[i] - q[i]) for i in finite), default=0.0)
    if largest and dtype is not DType.F32:  # which is subtracted as FP32
        assert found.largest is not None and found.largest.difference == pytest.approx(largest)


@settings(max_examples=40)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_rounding_is_told_from_change(numbers: list[float]) -> None:
    import torch

    wide = torch.tensor(numbers, dtype=torch.float32)
    for name in ("float16", "bfloat16"):
        narrow = wide.to(getattr(torch, name))
        dtype = DType.F16 if name == "float16" else DType.BF16
        a = tensor(DType.F32, wide.numpy().tobytes())
        b = tensor(dtype, narrow.view(torch.int16).numpy().tobytes())
        assert Rounding("a") in Comparer().compare(a, b).rounding
        assert Rounding("b") in Comparer().compare(b, a).rounding
        flipped = tensor(dtype, (narrow.view(torch.int16) ^ 1).numpy().tobytes())
        there = Comparer().compare(a, flipped)
        assert there.differing == len(numbers) or not np.isfinite(numbers).all() or there.not_numbers
        assert Rounding("a") not in there.rounding


def test_nan_equals_the_same_nan_and_no_other() -> None:
    quiet, other, zero, minus = 0x7E00, 0x7E01, 0x0000, 0x8000
    a, b = (struct.pack("<4H", *bits) for bits in ((quiet, quiet, zero, zero), (quiet, other, zero, minus)))
    found = Comparer().compare(tensor(DType.F16, a), tensor(DType.F16, b))
    assert (found.differing, found.not_numbers, found.steps) == (2, 1, 1)
    assert found.first is not None and found.first.at == 1


@pytest.mark.parametrize("dtype", [d for d in DType if d.bits >= 8], ids=lambda d: d.code)
def test_every_type_can_be_compared(dtype: DType) -> None:
    data = bytes(range(1, 65))
    other = bytearray(data)
    other[dtype.itemsize * 3] ^= 1
    assert not Comparer().compare(tensor(dtype, data), tensor(dtype, data)).differing
    found = Comparer().compare(tensor(dtype, data), tensor(dtype, bytes(other)))
    assert found.differing == 1 and not found.alike
    assert found.first is not None and found.first.at == 3


def test_types_that_no_cast_can_read_differ() -> None:
    packed = MemoryTensor(DType.F4, (16,), bytes(8))
    assert not Comparer().compare(packed, packed).differing
    assert not Comparer().compare(packed, MemoryTensor(DType.F16, (16,), bytes(32))).alike


def test_what_is_equal_in_part_was_not_rounded() -> None:
    """A window that is equal but could not be so after rounding speaks against it."""
    fine = np.full(3 << 20, 1 + 2**-20, "<f4")
    coarse = fine.copy()
    coarse[-5:] = 1.0
    found = Comparer().compare(tensor(DType.F32, fine.tobytes()), tensor(DType.F32, coarse.tobytes()))
    assert found.differing == 5 and not found.rounding


def test_memory_stays_bounded_by_windows() -> None:
    heard: list[int] = []
    big = MemoryTensor(DType.F16, (5 << 20,), bytes(10 << 20))
    Comparer(heard.append).compare(big, big)
    assert sum(heard) == 20 << 20 and max(heard) <= 8 << 20
