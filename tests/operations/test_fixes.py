"""Fixes: each where it changes something and where it does not, alone and in a build."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generate import Dirt
from builder.operations.fixes import FIXES, POSITION_IDS, Fixed, exact_position_ids, truncated_position_ids
from builder.tensors.cast import UnfitError
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from tests.help.building import CLIP, IDS, VAE, Folder, catalog, content, model, save, values

RECIPE = 'format = 1\nname = "m"\nbase = "a"\nsources.a.file = "a.safetensors"\n'
EXACT = ("I64", (1, 77), np.arange(77, dtype="<i8").tobytes())
RANGE = np.arange(77.0).reshape(1, 77)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path)


def make(folder: Folder, tensors: Mapping[str, LazyTensor], *fixes: str) -> list[str]:
    """Build a model with fixes; what is said of it."""
    save(folder / "a.safetensors", tensors)
    folder.write("m.toml", RECIPE + f"fixes = {list(fixes)!r}\n")
    changes: Mapping[str, list[str]] = folder.build("m.toml")["changes"]
    return [c for said in changes.values() for c in said]


def damaged(last: float, dtype: str = "<f4") -> LazyTensor:
    ids = RANGE.copy()
    ids[0, 76] = last
    return values(ids, dtype)


def bare(cls: str, **by_name: LazyTensor) -> dict[str, LazyTensor]:
    return {**model(cls), **by_name}


def plain(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[DType, tuple[int, ...], bytes]]:
    return {n: (t.dtype, t.shape, bytes(t.tobytes())) for n, t in tensors.items()}


def test_every_fix_says_what_it_is_for() -> None:
    for name, fix in FIXES.items():
        assert fix.name == name and fix.version >= 1 and fix.doc.endswith(".")
        assert any(catalog().applies(name, cls) for cls in catalog().classes)
        assert all(name in FIXES[other].excludes for other in fix.excludes)


@pytest.mark.parametrize("name", sorted(FIXES))
def test_a_fix_changes_nothing_twice(name: str) -> None:
    fix = FIXES[name]
    cls = next(c for c in catalog().classes if c.endswith("-tiny") and catalog().applies(name, c))
    once = fix.apply(bare(cls))
    again = fix.apply(once.tensors)
    assert again.changes == () and plain(again.tensors) == plain(once.tensors)


# -- position ids


@pytest.mark.parametrize(
    ("ids", "changed"),
    [
        (damaged(75.9975), True),
        (damaged(76.0), True),
        (damaged(76.0, "<f2"), True),
        (values(RANGE, "<i8"), False),
        (values(RANGE[:, ::-1], "<i8"), True),
        (values(RANGE[0], "<i8"), True),
    ],
    ids=["damaged", "float", "half", "exact", "reversed", "flat"],
)
def test_clip_position_ids(ids: LazyTensor, changed: bool) -> None:
    given = bare("CLIP-tiny", **{POSITION_IDS: ids})
    made, changes = FIXES["clip-position-ids"].apply(given)
    assert plain(made)[POSITION_IDS] == plain({"": exact_position_ids()})[""]
    assert changes == (("made exact: int64 0..76",) if changed else ())
    assert [n for n in given if made[n] is not given[n]] in ([], [POSITION_IDS])


def test_clip_position_ids_adds_none() -> None:
    given = bare("CLIP-tiny")
    del given[POSITION_IDS]
    assert FIXES["clip-position-ids"].apply(given) == Fixed(given, ())


def test_exact_ids_are_what_training_used() -> None:
    exact = exact_position_ids()
    assert (exact.dtype.code, exact.shape, bytes(exact.tobytes())) == EXACT


@pytest.mark.parametrize(
    ("ids", "made", "wrong"),
    [
        (damaged(75.9975), 75, ", 1 of them wrong"),
        (damaged(76.9), 76, ""),
        (damaged(-0.5), 0, ", 1 of them wrong"),
    ],
)
def test_floats_are_truncated_as_loaders_do(ids: LazyTensor, made: int, wrong: str) -> None:
    fixed = truncated_position_ids(bare("CLIP-tiny", **{POSITION_IDS: ids}), "it")
    whole = np.frombuffer(fixed.tensors[POSITION_IDS].tobytes(), "<i8")
    assert (whole[:76] == range(76)).all() and whole[76] == made
    assert fixed.tensors[POSITION_IDS].shape == (1, 77)
    assert fixed.changes == (f"float position_ids truncated to int64{wrong}",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -9.3e18])
def test_what_no_int64_can_hold_is_refused_with_the_fix(value: float, folder: Folder) -> None:
    """One processor makes the least int64 of it, another the greatest."""
    with pytest.raises(UnfitError, match=re.escape(f"`it` hold {value:g}, which is no position")):
        truncated_position_ids(bare("CLIP-tiny", **{POSITION_IDS: damaged(value)}), "it")
    make(folder, {**model(), IDS: damaged(value)}, "clip-position-ids")
    folder.write("bad.toml", RECIPE)
    said = folder("build", "bad.toml")
    assert said.code == 7 and "hint: the fix `clip-position-ids`" in said.err
    assert content(folder / "m.safetensors")[IDS] == EXACT


def test_what_is_of_many_positions_is_refused_unread(folder: Folder) -> None:
    class Unread(MemoryTensor):
        def tobytes(self) -> bytearray:
            raise AssertionError("read")

    ids = Unread(DType.F16, (78, 2), bytes(78 * 2 * 2))
    with pytest.raises(UnfitError, match=re.escape("`it` have the shape [78, 2]; there are 77 positions")):
        truncated_position_ids(bare("CLIP-tiny", **{POSITION_IDS: ids}), "it")
    save(folder / "a.safetensors", {**model(), IDS: values(np.zeros((1, 78)), "<f4")})
    folder.write("bad.toml", RECIPE)
    said = folder("build", "bad.toml")
    assert said.code == 7 and "hint: the fix `clip-position-ids`" in said.err


def test_integers_are_not_truncated() -> None:
    given = bare("CLIP-tiny")
    assert truncated_position_ids(given, "it") == Fixed(given, ())
    del given[POSITION_IDS]
    assert truncated_position_ids(given, "it") == Fixed(given, ())


def test_present_and_absent() -> None:
    given = bare("CLIP-tiny")
    assert FIXES["position-ids-present"].apply(given) == Fixed(given, ())
    without, changes = FIXES["position-ids-absent"].apply(given)
    assert set(given) - set(without) == {POSITION_IDS} and changes == ("position_ids removed",)
    assert FIXES["position-ids-absent"].apply(without) == Fixed(without, ())
    again, changes = FIXES["position-ids-present"].apply(without)
    assert plain(again) == plain(given) and changes == ("position_ids added",)


def test_position_ids_in_a_build(folder: Folder) -> None:
    broken = {**model(), IDS: damaged(75.9975)}
    said = make(folder, broken, "clip-position-ids")
    assert "clip-position-ids: made exact: int64 0..76" in said
    assert content(folder / "m.safetensors")[IDS] == EXACT
    said = make(folder, broken)
    assert "float position_ids truncated to int64, 1 of them wrong" in said
    assert content(folder / "m.safetensors")[IDS][2][-8:] == (75).to_bytes(8, "little")
    said = make(folder, broken, "position-ids-absent")
    assert "position-ids-absent: position_ids removed" in said
    assert IDS not in content(folder / "m.safetensors")
    none = {n: t for n, t in model().items() if n != IDS}
    said = make(folder, none, "position-ids-present", "clip-position-ids")
    assert "position-ids-present: position_ids added" in said
    assert "clip-position-ids: nothing to change" in said
    assert content(folder / "m.safetensors")[IDS] == EXACT
    said = make(folder, none, "clip-position-ids")
    assert said == ["clip-position-ids: nothing to change"]
    assert IDS not in content(folder / "m.safetensors")


def test_a_fix_that_changes_nothing_says_so(folder: Folder) -> None:
    nothing = [
        f"{fix}: nothing to change" for fix in ("clip-names", "clip-position-ids", "vae-attention-shape")
    ]
    assert sorted(make(folder, model(), "clip-position-ids", "vae-attention-shape", "clip-names")) == nothing
    # Of what was made before the same is said.
    assert sorted(make(folder, model(), "clip-position-ids", "vae-attention-shape", "clip-names")) == nothing


# -- names


@pytest.mark.parametrize("fixes", [(), ("clip-names",)], ids=["by itself", "asked for"])
def test_names_of_nai(folder: Folder, fixes: tuple[str, ...]) -> None:
    nai = model("SD-mini", dirt=Dirt(nai_names=True))
    assert not any(n.startswith(CLIP) for n in nai)
    said = make(folder, nai, *fixes)
    assert said == ["clip-names: 197 tensors get the names that loaders expect"]
    made = content(folder / "m.safetensors")
    assert made.keys() == model("SD-mini").keys()
    lengths = {n.removeprefix("cond_stage_model.transformer."): t for n, t in nai.items() if "cond" in n}
    assert {n for n in made if n.startswith(CLIP)} == {CLIP + n for n in lengths}


# -- attention of the VAE


def as_diffusers(tensors: Mapping[str, LazyTensor], *, rename: bool, reshape: bool) -> dict[str, LazyTensor]:
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
    made = {}
    for name, tensor in tensors.items():
        if ".attn_1." in name:
            if reshape and len(tensor.shape) == 4:
                tensor = MemoryTensor(tensor.dtype, tensor.shape[:2], bytes(tensor.tobytes()))
            for ours, theirs in names.items() if rename else ():
                name = name.replace(ours, theirs)
        made[name] = tensor
    return made


@pytest.mark.parametrize(
    ("rename", "reshape", "words"),
    [
        (True, True, "16 renamed, 8 reshaped to [n, n, 1, 1]"),
        (True, False, "16 renamed"),
        (False, True, "8 reshaped to [n, n, 1, 1]"),
        (False, False, "nothing to change"),
    ],
)
@pytest.mark.parametrize("fixes", [(), ("vae-attention-shape",)], ids=["by itself", "asked for"])
def test_attention_as_diffusers_has_it(
    folder: Folder, rename: bool, reshape: bool, words: str, fixes: tuple[str, ...]
) -> None:
    theirs = as_diffusers(model("SD-mini"), rename=rename, reshape=reshape)
    said = make(folder, theirs, *fixes)
    assert said == [f"vae-attention-shape: {words}"] * bool(fixes or rename or reshape)
    mended = content(folder / "m.safetensors")
    assert mended[VAE + "encoder.mid.attn_1.q.weight"][1] == (16, 16, 1, 1)
    make(folder, model("SD-mini"))
    assert mended == content(folder / "m.safetensors")


# -- in recipes


def test_fixes_that_contradict_each_other(folder: Folder) -> None:
    save(folder / "a.safetensors", model())
    folder.write("m.toml", RECIPE + 'fixes = ["position-ids-present", "position-ids-absent"]\n')
    said = folder("build", "m.toml")
    assert said.code == 3
    assert "the fixes `position-ids-present` and `position-ids-absent` contradict each other" in said.err


def test_the_order_in_a_recipe_means_nothing(folder: Folder) -> None:
    broken = {**model(), IDS: damaged(75.9975)}
    said = make(folder, broken, "clip-position-ids", "vae-attention-shape")
    before = (folder / "m.safetensors").stat()
    assert make(folder, broken, "vae-attention-shape", "clip-position-ids") == said
    assert folder.build("m.toml")["made"] == []
    assert (folder / "m.safetensors").stat().st_ino == before.st_ino
