"""Operations as steps: parsed, planned and built without the parser or the plan knowing any of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.base.errors import RecipeError
from builder.build import Build, build
from builder.operations.registry import Operation, Param
from builder.plan import Plan
from builder.recipe import Recipe, load_recipe
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import UNET, Folder, catalog, content, model, save

MODELS = """\
format = 1
name = "m"
sources.a.file = "a.safetensors"
sources.b.file = "b.safetensors"
"""


class Weighted(LazyTensor):
    """The sum of tensors, each times a number, in FP32 and in the order given."""

    def __init__(self, *terms: tuple[LazyTensor, float]) -> None:
        super().__init__(DType.F32, terms[0][0].shape)
        self.terms = terms

    def read_into(self, start: int, out: memoryview) -> None:
        total = torch.frombuffer(out, dtype=torch.float32)
        total.zero_()
        for tensor, share in self.terms:
            data = bytearray(len(out) // 4 * tensor.dtype.itemsize)
            tensor.read_into(start // 4 * tensor.dtype.itemsize, memoryview(data))
            total += torch.frombuffer(data, dtype=tensor.dtype.torch).float() * share


Inputs = Mapping[str, Mapping[str, LazyTensor]]


def _sum(inputs: Inputs, params: Mapping[str, Any]) -> Mapping[str, LazyTensor]:
    a, b, share = inputs["a"], inputs["b"], params["share"]
    return {n: Weighted((t, 1 - share), (b[n], share)) if t.dtype.floating else t for n, t in a.items()}


def _scale(inputs: Inputs, params: Mapping[str, Any]) -> Mapping[str, LazyTensor]:
    return {n: Weighted((t, params["by"])) if t.dtype.floating else t for n, t in inputs["model"].items()}


SUM = Operation(
    "sum", 1, "A·(1−share) + B·share.", ("a", "b"), _sum, params={"share": Param("number", "B's.")}
)
SCALE = Operation(
    "scale", 1, "All times a number.", ("model",), _scale, params={"by": Param("number", "It.")}
)
OPERATIONS = {o.name: o for o in (SUM, SCALE)}


class Works:
    """A folder with two models, and building in it with the test's operations."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        save(folder / "a.safetensors", model(seed=1))
        save(folder / "b.safetensors", model(seed=2))
        folder.know("a.safetensors", "b.safetensors")

    def plan(self, text: str, operations: Mapping[str, Operation] = OPERATIONS) -> Plan:
        with self.folder.workspace() as workspace, workspace.sources() as sources:
            return workspace.plan(self._recipe(text, operations), sources, operations=operations)

    def build(self, text: str, operations: Mapping[str, Operation] = OPERATIONS, threads: int = 2) -> Build:
        with self.folder.workspace() as workspace, workspace.sources() as sources:
            plan = workspace.plan(self._recipe(text, operations), sources, operations=operations)
            return build(plan, sources, operations=operations, threads=threads)

    def actions(self, text: str, operations: Mapping[str, Operation] = OPERATIONS) -> dict[str, str | None]:
        return {n.label: n.action for n in self.plan(text, operations)}

    def _recipe(self, text: str, operations: Mapping[str, Operation]) -> Recipe:
        return load_recipe(self.folder.write("m.toml", MODELS + text), catalog(), operations=operations)

    def made(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return content(self.folder / "m.safetensors")


@pytest.fixture
def works(tmp_path: Path) -> Works:
    return Works(Folder.below(tmp_path))


def value(seed: int, name: str) -> torch.Tensor:
    tensor = model(seed=seed)[name]
    return torch.frombuffer(tensor.tobytes(), dtype=tensor.dtype.torch)


def half(values: torch.Tensor) -> bytes:
    return bytes(values.half().view(torch.uint8).numpy().tobytes())


HALF = '[steps.half]\nop = "sum"\na = "a"\nb = "b"\nshare = 0.25\n'
TWICE = '[steps.twice]\nop = "scale"\nmodel = "half"\nby = 2.0\n'
NAME = UNET + "out.2.weight"


def test_a_step_as_base(works: Works) -> None:
    made = works.build('base = "half"\n' + HALF)
    assert sorted(made.made) == ["CLIP-tiny of half", "UNET-tiny of half", "VAE-tiny of half"]
    for name, (dtype, shape, data) in works.made().items():
        tensor = model(seed=1)[name]
        if not tensor.dtype.floating:
            assert (dtype, data) == ("I64", bytes(tensor.tobytes()))
            continue
        expected = value(1, name) * 0.75 + value(2, name) * 0.25
        assert (dtype, shape, data) == ("F16", tensor.shape, half(expected)), name


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_step_predicts_what_its_first_input_does(works: Works, first: str) -> None:
    marker = MemoryTensor(DType.F16, (1,), b"\0\x3c")
    save(works.folder / "a.safetensors", {**model(seed=1), "v_pred": marker})
    other = "ab".replace(first, "")
    works.build(
        'base = "twice"\n' + HALF.replace('a = "a"\nb = "b"', f'a = "{first}"\nb = "{other}"') + TWICE
    )
    assert works.made().get("v_pred") == (("F16", (1,), b"\0\x3c") if first == "a" else None)


def test_steps_in_a_chain(works: Works) -> None:
    """Values go from step to step in FP32, and are rounded once."""
    works.build('base = "twice"\n' + HALF + TWICE)
    expected = (value(1, NAME) * 0.75 + value(2, NAME) * 0.25) * 2
    assert works.made()[NAME][2] == half(expected)


def test_a_step_as_the_source_of_a_component(works: Works) -> None:
    works.build('base = "a"\n[components]\nUNET-tiny = "half"\n' + HALF)
    made = works.made()
    assert made[NAME][2] == half(value(1, NAME) * 0.75 + value(2, NAME) * 0.25)
    other = "first_stage_model.encoder.conv_in.weight"
    assert made[other][2] == half(value(1, other))


def test_a_step_of_some_components(works: Works) -> None:
    """Those it leaves out are those of its first input."""
    works.build('base = "half"\n' + HALF + 'components = ["VAE-tiny"]\n')
    made = works.made()
    assert made[NAME][2] == half(value(1, NAME))
    other = "first_stage_model.encoder.conv_in.weight"
    assert made[other][2] == half(value(1, other) * 0.75 + value(2, other) * 0.25)


def test_a_step_used_twice(works: Works) -> None:
    text = 'base = "all"\n' + HALF + TWICE + '[steps.all]\nop = "sum"\na = "half"\nb = "twice"\nshare = 0.5\n'
    works.build(text)
    first = value(1, NAME) * 0.75 + value(2, NAME) * 0.25
    assert works.made()[NAME][2] == half(first * 0.5 + first * 2 * 0.5)


def test_the_same_bytes_with_any_threads(works: Works) -> None:
    made = set()
    for threads in (1, 8):
        works.folder = Folder(works.folder.path, works.folder.path.parent / f"store-{threads}")
        works.build('base = "twice"\n' + HALF + TWICE, threads=threads)
        made.add((works.folder / "m.safetensors").read_bytes())
        (works.folder / "m.safetensors").unlink()
    assert len(made) == 1


def test_a_step_stays_in_the_store_when_it_says_so(works: Works) -> None:
    """Else its values only stream through."""
    text = 'base = "twice"\n' + HALF + "{}" + TWICE
    made = works.build(text.format("store = true\n"))
    assert len(works.folder.components()) == 6
    assert len(works.folder.blobs()) == 3, "the output's lie in the output"
    assert {m for m in made.made if "step half" in m} == {
        "UNET-tiny of step half",
        "VAE-tiny of step half",
        "CLIP-tiny of step half",
    }
    expected = works.made()
    # What is stored is used: changing what comes after does not compute it again.
    again = works.build(text.format("store = true\n").replace("by = 2.0", "by = 3.0"))
    assert not [m for m in again.made if "step half" in m]
    assert works.made()[NAME][2] == half((value(1, NAME) * 0.75 + value(2, NAME) * 0.25) * 3)
    # That it is stored has no part in what is made.
    works.folder = Folder(works.folder.path, works.folder.path.parent / "another")
    made = works.build(text.format(""))
    assert works.made() == expected
    assert len(works.folder.components()) == 3 and not works.folder.blobs()


def test_a_stored_step_that_is_damaged_is_made_again(works: Works) -> None:
    text = 'base = "twice"\n' + HALF + "store = true\n" + TWICE
    made = works.build(text)
    step = max(works.folder.blobs().values(), key=lambda p: p.stat().st_size)
    data = step.read_bytes()
    step.chmod(0o644)
    step.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = works.build(text.replace("by = 2.0", "by = 3.0"))
    assert len(again.made) == 4 and len(made.made) == 6
    assert len(set(again.made) & set(made.made) - {m for m in made.made if "twice" in m}) == 1
    assert step.read_bytes() == data
    assert works.made()[NAME][2] == half((value(1, NAME) * 0.75 + value(2, NAME) * 0.25) * 3)


def test_keys_follow_what_decides(works: Works) -> None:
    text = 'base = "half"\n' + HALF
    step = "step half UNET-tiny"
    first = works.actions(text)[step]
    assert first is not None and first == works.actions(text)[step]
    assert works.actions(text.replace("0.25", "0.5"))[step] != first
    assert works.actions(text.replace('a = "a"\nb = "b"', 'a = "b"\nb = "a"'))[step] != first
    newer = Operation(SUM.name, 2, SUM.doc, SUM.inputs, SUM.apply, params=SUM.params)
    assert works.actions(text, {**OPERATIONS, "sum": newer})[step] != first
    save(works.folder / "b.safetensors", model(seed=3))
    works.folder.know("b.safetensors")
    assert works.actions(text)[step] != first


def test_keys_do_not_follow_names(works: Works) -> None:
    text = 'base = "half"\n' + HALF
    first = works.actions(text)
    other = works.actions(text.replace("half", "mix").replace("share = 0.25", "share = 0.250"))
    assert other["step mix UNET-tiny"] == first["step half UNET-tiny"]
    assert other["UNET-tiny of mix"] == first["UNET-tiny of half"]
    stored = works.actions(text + "store = true\n")
    assert stored["step half UNET-tiny"] == first["step half UNET-tiny"]


def test_nothing_is_computed_twice(works: Works) -> None:
    text = 'base = "half"\n' + HALF
    works.build(text)
    assert works.build(text.replace("half", "mix")).made == []


def test_the_plan_shows_steps(works: Works) -> None:
    plan = works.plan('base = "twice"\n' + HALF + TWICE)
    shown = {n.label: (n.kind, n.state, [i.label for i in plan.inputs(n.key)]) for n in plan}
    assert shown["step half UNET-tiny"] == ("step", "stream", ["source a", "source b"])
    assert shown["step twice UNET-tiny"] == ("step", "stream", ["step half UNET-tiny"])
    assert shown["UNET-tiny of twice"] == ("component", "make", ["step twice UNET-tiny"])


def test_an_input_that_lacks_the_component(works: Works) -> None:
    save(works.folder / "b.safetensors", model("VAE-tiny", seed=2))
    with pytest.raises(RecipeError, match="`b` has no UNET-tiny"):
        works.build('base = "half"\n' + HALF)


def test_numbers_that_overflow_in_a_step_are_errors(works: Works) -> None:
    text = 'base = "big"\ncomponents.VAE-tiny = "b"\n[steps.big]\nop = "scale"\nmodel = "a"\nby = 1e10\n'
    with pytest.raises(Exception, match="would not survive"):
        works.build(text)
    works.build(text + '[output]\noverflow = "clamp"\n')
    assert {abs(v) for v in struct.unpack("<8e", works.made()[NAME][2][:16])} == {65504.0}
