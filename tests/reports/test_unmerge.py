"""Merges that `ckpt new` finds by the weights alone, held to the recipes that made them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli
import torch

from builder.formats import open_checkpoint
from builder.operations import OPERATIONS
from builder.operations.registry import Setting
from builder.reports.new.unmerge import Origin, find
from builder.reports.new.unmerge.least_squares import fit, products_of
from builder.reports.new.unmerge.numbers import numbers_near
from builder.reports.new.unmerge.parents import NOTHING, choose
from builder.tensors.cast import Faults, Precision, cast_all
from builder.tensors.digests import Row, tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.merged import ELEMENTS
from builder.tensors.torch_threads import lone_torch
from tests.help.building import UNET, Folder, catalog, content, model, save, values

Tensors = Mapping[str, LazyTensor]


@cache
def tuned(seed: int, precision: Precision = "fp16", family: str = "tiny") -> Tensors:
    """A model as training leaves it: near to the one that it began with, in every tensor."""
    random, made = np.random.RandomState(seed), {}
    for name, tensor in model(f"SD-{family}").items():
        made[name] = tensor
        if tensor.dtype.floating:
            array = np.frombuffer(bytes(tensor.tobytes()), "<f4")
            step = 0.02 * float(np.abs(array).mean())
            moved = array + step * random.standard_normal(array.shape).astype("<f4")
            made[name] = MemoryTensor(DType.F32, tensor.shape, moved.astype("<f4").tobytes())
    return cast_all(made, precision, faults=Faults())


def library(tmp_path: Path, names: str, precision: Precision = "fp16", family: str = "tiny") -> Folder:
    """A folder with models `a`, `b` and so on in a library."""
    folder = Folder.below(tmp_path)
    for name in names:
        save(folder / f"library/{name}.safetensors", tuned(ord(name), precision, family))
    return folder


def merge(folder: Folder, step: str, precision: str = "fp16") -> None:
    """Build `mix.safetensors`, of the library, by a step."""
    said = tomli.loads(f"s = {step}")["s"]
    inputs = [v for k, v in said.items() if k in "abc"] + [*said.get("of", [])]
    sources = "".join(f'sources.{n}.file = "library/{n}.safetensors"\n' for n in dict.fromkeys(inputs))
    head = f'format = 1\nname = "mix"\nbase = "step"\n{sources}'
    folder.write("made.toml", f'{head}steps.step = {step}\noutput.precision = "{precision}"\n')
    assert folder("build", "-q", "made.toml").code == 0


def found(folder: Folder, *options: object, file: str = "mix.safetensors") -> dict[str, Any]:
    """What is found of a file: as data, and the recipe that was written of it."""
    said = folder("new", file, "-l", "library", "-o", "new.toml", "--force", "--json", *options).json
    assert said["recipe"] == (folder / "new.toml").read_text(encoding="utf-8")
    return {**said, "toml": tomli.loads(said["recipe"])}


def built(folder: Folder, file: str = "mix.safetensors") -> bool:
    """Whether a build of the new recipe makes the very tensors of a file."""
    assert folder("build", "-q", "new.toml", "-o", "again.safetensors").code == 0
    return content(folder / file) == content(folder / "again.safetensors")


WEIGHTED = "op = 'weighted-sum', a = 'a', b = 'b'"
ADDED = "op = 'add-difference', a = 'a', b = 'b', c = 'c'"

BLOCKS = "{ op = 'weighted-sum', a = 'a', b = 'b', alpha = { %s } }"
FILES = BLOCKS.removesuffix("}") + ", arithmetic = 'file' }"

CASES = {
    "weighted": f"{{ {WEIGHTED}, alpha = 0.3 }}",
    "weighted-little": f"{{ {WEIGHTED}, alpha = 0.05 }}",
    "weighted-file": f"{{ {WEIGHTED}, alpha = 0.35, arithmetic = 'file' }}",
    "added": f"{{ {ADDED}, alpha = 0.6 }}",
    "added-file": f"{{ {ADDED}, alpha = 1.0, arithmetic = 'file' }}",
    "negative": f"{{ {ADDED}, alpha = -0.25 }}",
    "thirds": "{ op = 'triple-sum', a = 'a', b = 'b', c = 'c' }",
    "three": "{ op = 'triple-sum', a = 'a', b = 'b', c = 'c', alpha = 0.3, beta = 0.2 }",
    "twice-file": "{ op = 'sum-twice', a = 'a', b = 'b', c = 'c', beta = 0.25, alpha = 0.4, "
    "arithmetic = 'file' }",
    "linear": "{ op = 'linear', of = { a = 0.4, b = 0.3, c = 0.2, d = 0.1 } }",
    "more-than-one": "{ op = 'linear', of = { a = 0.6, b = 0.6 }, normalize = false }",
    "blocks": BLOCKS % "UNET-tiny = { base = 0.7, OUT11 = 0.25 }, CLIP-tiny = 0.15",
    "copied-block": BLOCKS % "UNET-tiny = { base = 0.0, OUT11 = 1.0 }, CLIP-tiny = 0.1",
    "vae-file": FILES % "UNET-tiny = 0.3, VAE-tiny = 0.3, CLIP-tiny = 0.3",
}


IN_FP32 = ("weighted", "added-file", "twice-file", "linear", "more-than-one", "blocks")


@pytest.mark.parametrize(
    ("case", "precision"), [*((c, "fp16") for c in CASES), *((c, "fp32") for c in IN_FP32)]
)
def test_the_recipe_of_a_merge_is_found(case: str, precision: Precision, tmp_path: Path) -> None:
    step = CASES[case]
    folder = library(tmp_path, "abcd", precision)
    merge(folder, step, precision)
    said = found(folder)
    assert built(folder)
    merges = {c["class"]: c for c in said["components"] if c["merge"]}
    assert merges and {c["how"] for c in merges.values()} == {"merged"}
    assert {c["merge"]["found"] for c in merges.values()} == {"exact"}
    assert said["toml"]["expect"]["tensor_digest"] == said["tensor_digest"] and said["same"]
    wanted = tomli.loads(f"s = {step}")["s"]
    (got,) = said["toml"]["steps"].values()
    if precision == "fp32":  # which rounds to nothing: both arithmetics are one, and formulas may be
        assert effective(got) == pytest.approx(effective(wanted), abs=1e-6)
    elif case == "negative":
        assert got == {"op": "add-difference", "a": "a", "b": "c", "c": "b", "alpha": 0.25}
    elif case == "thirds":
        assert got == {**wanted, "alpha": 1 / 3, "beta": 1 / 3}
    else:
        assert got == wanted


def effective(step: Mapping[str, Any]) -> dict[str, float]:
    """How much of each input a step makes a UNET's base of."""

    def number(key: str, default: float) -> float:
        value = step.get(key, default)
        value = value.get("UNET-tiny", 0.0) if isinstance(value, dict) else value
        return float(value["base"] if isinstance(value, dict) else value)

    alpha, beta = number("alpha", 1 / 3), number("beta", 1 / 3)
    a, b, c = step.get("a"), step.get("b"), step.get("c")
    shares: list[tuple[Any, float]] = {
        "weighted-sum": [(a, 1 - alpha), (b, alpha)],
        "add-difference": [(a, 1.0), (b, alpha), (c, -alpha)],
        "triple-sum": [(a, 1 - alpha - beta), (b, alpha), (c, beta)],
        "sum-twice": [(a, (1 - alpha) * (1 - beta)), (b, alpha * (1 - beta)), (c, beta)],
        "linear": [*step.get("of", {}).items()],
    }[step["op"]]
    made: dict[str, float] = {}
    for name, share in shares:
        made[name] = made.get(name, 0.0) + share
    return {n: s for n, s in made.items() if s}


def test_every_block_of_a_preset_and_weights_of_tensors(tmp_path: Path) -> None:
    """As many blocks and tensors as SD v1 has."""
    folder = library(tmp_path, "abc", family="mini")
    alpha = "{ UNET = 'GRAD_V', CLIP = 0.1, tensors = { 'encoder.layers.1?.mlp*' = 0.6 } }"
    merge(folder, f"{{ {WEIGHTED}, alpha = {alpha} }}")
    said = found(folder)
    assert built(folder) and said["same"]
    unet, clip = (c["merge"] for c in said["components"] if c["merge"])
    shares = {b["block"]: b["weights"][1] for b in unet["blocks"]}
    assert shares["IN00"] == 1.0 and shares["IN06"] == 0.5 and shares["M00"] == 0.0
    own = {b["block"]: b["weights"] for b in clip["blocks"]}
    assert own.pop("base") == [0.9, 0.1]
    assert len(own) == 8 and all("mlp" in n and w == [0.4, 0.6] for n, w in own.items())


def test_parents_are_found_among_many_that_are_like_them(tmp_path: Path) -> None:
    """Copies, other merges of the same parents, models in another type and of another kind."""
    folder = library(tmp_path, "abcdefgh")
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.5 }}")
    (folder / "mix.safetensors").rename(folder / "library/half.safetensors")
    save(folder / "library/a-wide.safetensors", tuned(ord("a"), "fp32"))
    save(folder / "library/copy.safetensors", tuned(ord("b")))
    save(folder / "library/other.safetensors", model("SD-mini"))
    merge(folder, f"{{ {ADDED}, alpha = 0.6 }}")
    said = found(folder)
    (step,) = said["toml"]["steps"].values()
    assert step == {"op": "add-difference", "a": "a", "b": "b", "c": "c", "alpha": 0.6}
    assert built(folder)


def test_the_answer_does_not_depend_on_threads(tmp_path: Path) -> None:
    folder = library(tmp_path, "abc")
    merge(folder, "{ op = 'slerp', a = 'a', b = 'b', alpha = 0.3 }")
    assert found(folder, "--threads", 1) == found(folder, "--threads", 5)


def test_a_missing_parent_is_told_by_what_is_left(tmp_path: Path) -> None:
    """Of models that have nothing in common the weights of those that are there are right all the same."""
    folder = Folder.below(tmp_path)
    for seed, name in enumerate("abc", 1):
        save(folder / f"library/{name}.safetensors", cast_all(model(seed=seed), "fp16", faults=Faults()))
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.3 }}")
    (folder / "library/b.safetensors").unlink()
    said = found(folder)
    assert said["toml"]["components"]["UNET-tiny"] == "mix"  # the file itself
    assert "steps" not in said["toml"]
    assert "# UNET-tiny: no sum of the library's files was found. The nearest, by block:\n" in said["recipe"]
    unet = next(c for c in said["components"] if c["class"] == "UNET-tiny")
    assert (unet["how"], unet["merge"]["found"], unet["merge"]["op"]) == (None, "part", None)
    assert [Path(p).name for p in unet["merge"]["parents"]] == ["a.safetensors"]
    large = max(unet["merge"]["blocks"], key=lambda b: b["elements"])
    assert large["weights"] == [pytest.approx(0.7, abs=0.01)]
    assert large["residual"] == pytest.approx(0.3 / np.hypot(0.7, 0.3), rel=0.02)
    assert built(folder)


def test_what_is_trained_on_is_no_merge_of_what_it_began_with(tmp_path: Path) -> None:
    folder = library(tmp_path, "ab")
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.5 }}")
    tensors = {n: MemoryTensor(t.dtype, t.shape, bytes(t.tobytes())) for n, t in tuned(ord("a")).items()}
    name = UNET + "out.2.weight"
    array = np.frombuffer(tensors[name].tobytes(), "<f2")
    array = array + (0.1 * np.random.RandomState(1).standard_normal(array.shape)).astype("<f2")
    tensors[name] = MemoryTensor(DType.F16, tensors[name].shape, array.tobytes())
    save(folder / "mix.safetensors", tensors)
    said = found(folder)
    unet = next(c for c in said["components"] if c["class"] == "UNET-tiny")
    assert unet["how"] is None and unet["merge"]["found"] == "part"
    off = {b["block"]: b["residual"] > 8 * b["rounding"] for b in unet["merge"]["blocks"]}
    assert off == {"M00": False, "OUT11": True}
    assert built(folder)


def test_a_merge_of_wider_parents_is_right_but_for_rounding(tmp_path: Path) -> None:
    """What was merged in FP32 cannot be made anew of the same models in half precision."""
    folder = library(tmp_path, "ab", "fp32")
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.3 }}")
    for name in "ab":
        save(folder / f"library/{name}.safetensors", tuned(ord(name)))
    said = found(folder)
    unet = next(c for c in said["components"] if c["class"] == "UNET-tiny")
    assert (unet["how"], unet["merge"]["found"]) == ("near", "rounding")
    assert unet["merge"]["equal"] < unet["merge"]["tensors"] == 4
    for block in unet["merge"]["blocks"]:
        assert block["weights"] == pytest.approx([0.7, 0.3], abs=2e-3)
        assert 0 < block["residual"] < 3 * block["rounding"]
    assert "# UNET-tiny: the same but for rounding. To the last bit are " in said["recipe"]
    assert "expect" not in said["toml"] and not said["same"] and said["tensor_digest"] is None
    assert not built(folder)
    compared = json.loads(folder("diff", "mix.safetensors", "again.safetensors", "--json").out)
    assert not compared["same"] and not compared["only_a"] and not compared["only_b"]


def test_what_goes_around_the_components_is_that_of_the_first_parent(tmp_path: Path) -> None:
    """As the WebUI leaves a merge: with the schedule of its first model."""
    folder = library(tmp_path, "ab")
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.3, arithmetic = 'file' }}")
    schedule = {"betas": values(np.linspace(0, 1, 1000))}
    with open_checkpoint(folder / "mix.safetensors", catalog().layouts) as mix:
        save(folder / "merged.safetensors", {**mix, **schedule})
    save(folder / "library/a.safetensors", {**tuned(ord("a")), **schedule})
    said = found(folder, file="merged.safetensors")
    assert said["same"] and said["toml"]["base"] == "a"
    assert said["toml"]["components"] == {"UNET-tiny": "mix", "CLIP-tiny": "mix"}
    assert built(folder, "merged.safetensors")


def test_a_lora_that_was_baked_in_is_no_merge(tmp_path: Path) -> None:
    """The block that it is in says so; the others are those of the model."""
    folder = library(tmp_path, "abc")
    tensors = dict(tuned(ord("a")))
    name = UNET + "middle_block.0.in_layers.2.weight"
    random = np.random.RandomState(1)
    low = random.standard_normal((192, 4)) @ random.standard_normal((4, 192 * 9))
    array = np.frombuffer(tensors[name].tobytes(), "<f2").astype("f4").reshape(192, -1)
    array += (0.05 * np.abs(array).mean() * low).astype("f4")
    tensors[name] = MemoryTensor(DType.F16, tensors[name].shape, array.astype("<f2").tobytes())
    save(folder / "mix.safetensors", tensors)
    said = found(folder)
    unet = next(c for c in said["components"] if c["class"] == "UNET-tiny")
    assert unet["how"] is None and unet["merge"]["found"] == "part"
    left = {b["block"]: b["residual"] for b in unet["merge"]["blocks"]}
    assert left["M00"] > 0.05 > left["OUT11"] == 0.0
    assert built(folder)


def test_parents_of_one_name_and_sums_in_another_order(tmp_path: Path) -> None:
    """A step sums its inputs by name: files get names that are sorted as the sum was made."""
    folder = library(tmp_path, "abcd")
    merge(folder, "{ op = 'linear', of = { a = 0.4, b = 0.3, c = 0.2, d = 0.1 } }")
    for old, new in zip("abcd", ("m/1", "l/x", "k/1", "j/0"), strict=True):
        (folder / f"library/{new}.safetensors").parent.mkdir(exist_ok=True)
        (folder / f"library/{old}.safetensors").rename(folder / f"library/{new}.safetensors")
    said = found(folder)
    assert built(folder) and said["same"]
    assert said["toml"]["steps"]["mix"]["of"] == {"1-1": 0.4, "2-x": 0.3, "3-1": 0.2, "4-0": 0.1}
    files = {name: source["file"] for name, source in said["toml"]["sources"].items()}
    assert files["1-1"] == "library/m/1.safetensors" and files["3-1"] == "library/k/1.safetensors"


def test_a_recipe_is_built_although_a_parent_holds_what_is_no_number(tmp_path: Path) -> None:
    folder = library(tmp_path, "ab")
    merge(folder, f"{{ {WEIGHTED}, alpha = 0.3 }}")
    name = UNET + "middle_block.0.in_layers.2.weight"
    array = np.frombuffer(tuned(ord("b"))[name].tobytes(), "<f2").copy()
    array[3] = np.inf
    broken = MemoryTensor(DType.F16, tuned(ord("b"))[name].shape, array.tobytes())
    save(folder / "library/b.safetensors", {**tuned(ord("b")), name: broken})
    said = found(folder)
    unet = next(c for c in said["components"] if c["class"] == "UNET-tiny")
    assert (unet["how"], unet["merge"]["found"], unet["merge"]["uncompared"]) == (None, "part", 1)
    assert "UNET-tiny: of 1 tensor a parent holds NaN or infinity" in said["recipe"]
    assert built(folder)


def test_what_a_person_is_told(tmp_path: Path) -> None:
    folder = library(tmp_path, "abc")
    merge(folder, f"{{ {ADDED}, alpha = 0.6 }}")
    said = folder("new", "mix.safetensors", "-l", "library")
    assert (
        "UNET-tiny is 1 `library/a.safetensors` + 0.6 `library/b.safetensors` - 0.6 `library/c.safetensors`, "
        "made by add-difference, the same to the last bit"
    ) in said.err
    said = folder("new", "mix.safetensors", *(f"library/{n}.safetensors" for n in "abc"))
    assert said.out and "it is left out" not in said.err
    few = 6
    for number in range(few):
        save(folder / f"library/{number}.safetensors", tuned(ord("c")))
        (folder / f"library/{number}-again.CKPT").symlink_to(f"{number}.safetensors")
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for more, code in ((few + 20, 0), (few, 6)):
        highest = os.open(os.devnull, os.O_RDONLY)
        os.close(highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, limits[1]))
        try:
            said = folder("new", "mix.safetensors", "-l", "library")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert said.code == code, said.err
    assert "Too many open files" in said.err and "ulimit" in said.err


# -- the search itself


def rows(tensors: Tensors) -> dict[str, Row]:
    return {n: Row(t.dtype, t.shape, tensor_digest(t)) for n, t in tensors.items()}


def search(target: Tensors, candidates: Sequence[Tensors], **more: Any) -> Origin | None:
    setting = Setting("UNET-tiny", lambda name: name.partition(".")[0].upper())
    return find(target, candidates, rows(target), setting, "fp16", **more)


def some(seed: int, **shapes: tuple[int, ...]) -> dict[str, LazyTensor]:
    random = np.random.RandomState(seed)
    made = {n.replace("_", "."): random.standard_normal(s).astype("<f2") for n, s in shapes.items()}
    return {n: MemoryTensor(DType.F16, a.shape, a.tobytes()) for n, a in made.items()}


def made_by(op: str, inputs: Mapping[str, Tensors], **params: Any) -> Tensors:
    applied = OPERATIONS[op].apply(inputs, params, Setting("UNET-tiny"))
    tensors = cast_all(applied.tensors, "fp16", faults=Faults())
    return {n: MemoryTensor(t.dtype, t.shape, bytes(t.tobytes())) for n, t in tensors.items()}


def test_torchs_threads_are_as_they_were_beside_other_work() -> None:
    found: list[int] = []

    def work() -> None:
        torch.set_num_threads(3)
        search(some(1, in_w=(40, 40)), [some(2, in_w=(40, 40))])
        found.append(torch.get_num_threads())

    with lone_torch():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [3]


def halves(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {
        n: MemoryTensor(DType.F16, tuple(t.shape), t.contiguous().numpy().tobytes())
        for n, t in tensors.items()
    }


def near(base: int, seed: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A model that differs from others of the same base as finetunes do; its last tensor is a small one."""
    first, own = (torch.Generator().manual_seed(s) for s in (base, 1000 + seed))
    shapes = {"x.w": (60, 50), "x.b": (60,), "y.w": (40, 30), "y.b": (4,)}
    return {
        n: (torch.randn(s, generator=first) + 0.05 * torch.randn(s, generator=own)).to(dtype)
        for n, s in shapes.items()
    }


Model = Mapping[str, torch.Tensor]
A, B, C, D = (near(0, seed) for seed in range(4))


def webui(a: Model, b: Model, c: Model | None = None, m: float = 0.3) -> dict[str, torch.Tensor]:
    """As the WebUI's checkpoint merger computes: each product and sum in the files' own type, then halves."""
    if c is None:
        return {n: ((1 - m) * a[n] + m * b[n]).half() for n in a}
    return {n: (a[n] + m * (b[n] - c[n])).half() for n in a}


def each(formula: Callable[..., torch.Tensor], *models: Model) -> dict[str, torch.Tensor]:
    return {n: formula(*(m[n].float() for m in models)).half() for n in models[0]}


def pruned(x: torch.Tensor, share: float) -> torch.Tensor:
    """The largest of a difference, as ties does."""
    return torch.where(x.abs() >= x.abs().flatten().quantile(1 - share), x, torch.zeros(()))


# What was made of A, B, C, D by others' code: what is found, the operation, and how much of each it has.
TRUTH: dict[str, tuple[Callable[[], Model], str, str, tuple[float, ...]]] = {
    "sum": (lambda: webui(A, B), "exact", "weighted-sum", (0.7, 0.3)),
    "odd": (lambda: webui(A, B, m=0.137), "exact", "weighted-sum", (0.863, 0.137)),
    "beyond": (lambda: webui(A, B, m=1.3), "exact", "weighted-sum", (-0.3, 1.3)),
    "below": (lambda: webui(A, B, m=-0.2), "exact", "weighted-sum", (1.2, -0.2)),
    "all-of-b": (lambda: webui(A, B, m=1.0) | {"x.w": webui(A, B)["x.w"]}, "exact", "weighted-sum", ()),
    "difference": (lambda: webui(A, B, C, 0.8), "exact", "add-difference", (1.0, 0.8, -0.8)),
    "float": (lambda: each(lambda a, b: a * 0.7 + b * 0.3, A, B), "exact", "weighted-sum", (0.7, 0.3)),
    "chain": (lambda: webui(webui(A, B, m=0.5), C), "exact", "sum-twice", (0.35, 0.35, 0.3)),
    "chain-of-four": (
        lambda: webui(webui(A, B, m=0.4), C, D, 0.5),
        "rounding",
        "linear",
        (0.6, 0.4, 0.5, -0.5),
    ),
    "backwards": (
        lambda: each(lambda a, b, c, d: d * 0.1 + c * 0.2 + b * 0.3 + a * 0.4, A, B, C, D),
        "exact",
        "linear",
        (0.4, 0.3, 0.2, 0.1),
    ),
    "scaled": (lambda: each(lambda a: a * 0.9, A), "exact", "linear", (0.9,)),
    "one-of-another": (lambda: webui(A, B) | {"y.w": C["y.w"]}, "exact", "triple-sum", ()),
    "small-one-of-another": (lambda: webui(A, B) | {"y.b": C["y.b"]}, "part", "", ()),
    "a-bit": (lambda: flipped(webui(A, B)), "rounding", "weighted-sum", (0.7, 0.3)),
    "ties": (
        lambda: each(lambda a, b, c: c + pruned(a - c, 0.3) + pruned(b - c, 0.3), A, B, C),
        "part",
        "",
        (),
    ),
    "trained": (lambda: each(lambda a: a + 0.01 * torch.randn(a.shape), A), "part", "", (1.0,)),
    "unrelated": (lambda: near(7, 7), "", "", ()),
    "zeros": (lambda: each(lambda a: a * 0, A), "", "", ()),
    "baked-lora": (
        lambda: (
            webui(A, B) | {"x.w": (webui(A, B)["x.w"] + 0.05 * torch.ones(60, 1) @ torch.randn(1, 50)).half()}
        ),
        "part",
        "",
        (),
    ),
}


def flipped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["x.w"].view(torch.int16).view(-1)[5] ^= 1
    return tensors


def test_sums_of_several_classes_have_their_parents_in_one_order() -> None:
    """A second class is summed as the first was, or it is not the same to the last bit."""
    models = [halves(m) for m in (A, B, C, D)]
    target = halves(each(lambda a, b, c, d: d * 0.1 + c * 0.2 + b * 0.3 + a * 0.4, A, B, C, D))
    right = search(target, models, settled=[3, 2, 1])
    assert right is not None and right.found == "exact"
    assert [i for i in right.inputs if i] == [3, 2, 1]
    wrong = search(target, models, settled=[0, 1])
    assert wrong is not None and wrong.found == "rounding"
    assert [i for i in wrong.inputs if i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("case", TRUTH)
def test_what_other_programs_made(case: str) -> None:
    """What is said is true, and the same to the last bit only where it is."""
    made, how, op, weights = TRUTH[case]
    torch.manual_seed(99)
    target = halves(made())
    origin = search(target, [halves(m) for m in (A, B, C, D)])
    if origin is None:
        assert not how
        return
    assert (origin.found, origin.op) == (how, op)
    big = max(origin.shares, key=lambda s: s.elements)
    if weights:
        assert big.weights[: len(weights)] == pytest.approx(weights, abs=1e-12 if how == "exact" else 0.01)
    off = any(s.residual > 3 * s.rounding for s in origin.shares)
    assert off == (how == "part")
    if op:  # what was claimed is what the step makes
        inputs = [halves((A, B, C, D)[origin.parents[i]]) for i in origin.inputs]
        operation = OPERATIONS[op]
        keys = operation.inputs or [f"of.{i}" for i in range(len(inputs))]
        setting = Setting("UNET-tiny", lambda n: n.partition(".")[0].upper(), arithmetic=origin.arithmetic)
        applied = operation.apply(dict(zip(keys, inputs, strict=True)), origin.params or {}, setting)
        again = rows(cast_all(applied.tensors, "fp16", faults=Faults()))
        assert sum(again[n] == row for n, row in rows(target).items()) == origin.equal
        assert (origin.equal == origin.tensors) == (how == "exact")


def test_an_inpainting_model_keeps_its_further_channels() -> None:
    narrow = {"in_w": (6, 4, 3, 3), "out_w": (40, 30)}
    a, b, c = some(1, **narrow | {"in_w": (6, 9, 3, 3)}), some(2, **narrow), some(3, **narrow)
    target = made_by("add-difference", {"a": a, "b": b, "c": c}, alpha=1.0)
    origin = search(target, [c, b, a, some(4, **narrow)])
    assert origin is not None and (origin.found, origin.op) == ("exact", "add-difference")
    assert [origin.parents[i] for i in origin.inputs] == [2, 1, 0]


def test_what_is_no_number_explains_nothing_and_hinders_nothing() -> None:
    shapes = {"x_w": (50, 40), "y_w": (50,)}
    a, b, c = (some(seed, **shapes) for seed in (1, 2, 3))
    c["x.w"] = MemoryTensor(DType.F16, (50, 40), np.full((50, 40), np.nan, "<f2").tobytes())
    target = made_by("weighted-sum", {"a": a, "b": b}, alpha=0.25)
    origin = search(target, [c, a, b])
    assert origin is not None and origin.found == "exact" and origin.parents == (1, 2)
    assert search(target, [c]) is None and search(target, []) is None


def test_a_block_that_all_parents_share_has_the_weights_of_the_others() -> None:
    shapes = {"x_w": (50, 40), "y_w": (50, 30)}
    a, b = some(1, **shapes), some(2, **shapes)
    b["y.w"] = a["y.w"]
    origin = search(made_by("weighted-sum", {"a": a, "b": b}, alpha=0.3), [a, b])
    assert origin is not None and origin.found == "exact"
    assert {s.weights for s in origin.shares} == {(0.7, 0.3)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_parents_that_differ_by_few_last_places(precision: Precision) -> None:
    """Where rounding hangs on the difference, least squares are off, and the bits themselves lead on."""

    def near(seed: int) -> Tensors:
        base, other = np.random.RandomState(0), np.random.RandomState(seed)
        arrays = {n: base.standard_normal((300, 300)).astype("<f4") for n in ("x.w", "y.w", "z.w")}
        last = 0.003 if precision == "fp16" else 0.02
        moved = {n: a + last * other.standard_normal(a.shape).astype("<f4") for n, a in arrays.items()}
        wide = {n: MemoryTensor(DType.F32, a.shape, a.tobytes()) for n, a in moved.items()}
        return cast_all(wide, precision, faults=Faults())

    a, b, c = (near(seed) for seed in (1, 2, 3))
    made = OPERATIONS["weighted-sum"].apply({"a": a, "b": b}, {"alpha": 0.3125}, Setting("UNET-tiny"))
    target = cast_all(made.tensors, precision, faults=Faults())
    setting = Setting("UNET-tiny", lambda name: name.partition(".")[0].upper())
    origin = find(target, [c, b, a], rows(target), setting, precision)
    assert origin is not None and origin.found == "exact"
    shares = {origin.parents[i]: w for s in origin.shares for i, w in enumerate(s.weights)}
    assert shares == {1: pytest.approx(0.3125), 2: pytest.approx(0.6875)}


class Watched(LazyTensor):
    """A tensor that remembers the longest range that was read of it at once."""

    def __init__(self, inner: LazyTensor) -> None:
        super().__init__(inner.dtype, inner.shape)
        self.inner, self.longest = inner, 0

    def read_into(self, start: int, out: memoryview) -> None:
        self.longest = max(self.longest, len(out))
        self.inner.read_into(start, out)


def test_sums_are_those_of_numpy_and_read_window_by_window() -> None:
    size = 2 * ELEMENTS + 77
    a, b, t = (Watched(some(seed, w=(size,))["w"]) for seed in (1, 2, 3))
    assert isinstance(t.inner, MemoryTensor)
    t.inner = MemoryTensor(DType.F16, (size,), bytes(2000) + bytes(t.inner.tobytes())[2000:])  # zeros too
    got = products_of(t, [a, b, None])
    x, y, z = (np.frombuffer(w.tobytes(), "<f2").astype("f8") for w in (a.inner, b.inner, t.inner))
    apart = np.stack([x - z, y - z, -z])
    assert np.allclose(got.gram, apart @ apart.T, rtol=1e-12)
    assert (got.count, got.energy) == (size, pytest.approx(float(z @ z), rel=1e-12))
    last = np.spacing(np.abs(z).astype("<f2")).astype("f8")  # of 0 that of the least number
    assert got.rounding == pytest.approx(float((last**2).sum() / 12), rel=1e-12)
    assert max(w.longest for w in (a, b, t)) <= 4 * ELEMENTS
    want = np.linalg.lstsq(np.stack([x - y], 1), z - y, rcond=None)[0]
    assert fit(got, 1, [(0, 1)]).factors == pytest.approx([*want], rel=1e-9)


@pytest.mark.parametrize(
    ("value", "error", "first"),
    [
        (0.30004, 2e-5, 0.3),
        (0.33331, 1e-5, 1 / 3),
        (0.08335, 1e-5, 1 / 12),
        (0.3, 1e-9, 0.3),
        (0.123456, 1e-9, 0.123456),
        (0.146447, 1e-7, 0.146446609407),  # of a preset
        (-0.25001, 1e-5, -0.25),
        (1.00003, 1e-5, 1.0),
    ],
)
def test_the_simplest_number_comes_first(value: float, error: float, first: float) -> None:
    assert next(numbers_near(value, error)) == pytest.approx(first, abs=1e-12)
    assert all(abs(n - value) <= 5 * error + 3e-7 for n in numbers_near(value, error))


def test_a_wide_error_gives_few_numbers() -> None:
    assert len([*numbers_near(0.4, 0.5)]) <= 12


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_best_of_many_is_chosen(count: int) -> None:
    """Parents of weights of their own in each of three blocks, among twelve."""
    random = np.random.RandomState(count)
    parents = tuple(sorted(random.permutation(12)[:count].tolist()))
    grams = []
    for _ in range(3):
        vectors = random.standard_normal((12, 400)) + 5 * random.standard_normal(400)
        weights = random.uniform(0.2, 1.0, count)
        target = (weights / weights.sum()) @ vectors[[*parents]] + 1e-4 * random.standard_normal(400)
        apart = np.concatenate([vectors - target, -target[None]])
        grams.append(apart @ apart.T)
    assert choose(np.stack(grams), 3 * 400 * 1e-8) == parents


def test_what_is_missing_is_nothing() -> None:
    random = np.random.RandomState(5)
    vectors = random.standard_normal((4, 900))
    target = 0.7 * vectors[1] + 0.3 * random.standard_normal(900)
    apart = np.concatenate([vectors - target, -target[None]])
    assert choose((apart @ apart.T)[None], 1e-9) == (1, NOTHING)
