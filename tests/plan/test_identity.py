"""A node is what it is made of: names never decide which one is meant."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.build import build_recipe
from builder.plan import ComponentJob, Plan
from builder.recipe import load_recipe
from builder.workspace import Settings, Workspace
from tests.help.building import TINY, Folder, catalog, content, model, save, save_dirty

VAE = "first_stage_model."


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    for seed in (1, 2, 3):
        save(made / f"vae{seed}.safetensors", model("VAE-tiny", seed=seed))
    return made


def plan_of(folder: Folder, recipe: str) -> Plan:
    with folder.workspace() as workspace, workspace.sources() as sources:
        return workspace.plan(workspace.recipe(folder / recipe), sources)


def vae(path: Path) -> dict[str, object]:
    return dict(content(path).items())


def test_names_that_look_like_labels(folder: Folder) -> None:
    """Three outputs of two sources, one of them called as the second node of the other would be."""
    folder.write(
        "m.toml",
        'format = 1\nname = "m"\nbase = "NEW VAE-tiny"\n'
        'sources.a.file = "vae1.safetensors"\nsources."a #2".file = "vae2.safetensors"\n'
        '[[output]]\nname = "one"\ncomponents.VAE-tiny = "a"\n'
        '[[output]]\nname = "two"\nprecision = "fp32"\ncomponents.VAE-tiny = "a #2"\n'
        '[[output]]\nname = "three"\nprecision = "fp32"\ncomponents.VAE-tiny = "a"\n',
    )
    folder.build("m.toml")
    one, two, three = (vae(folder / f"m-{n}.safetensors") for n in ("one", "two", "three"))
    values = {n: bytes(t.tobytes()) for n, t in model("VAE-tiny", seed=1).items()}
    assert {n: v[2] for n, v in three.items()} == values
    assert three != two and one.keys() == three.keys()
    lock = (folder / "m.lock.toml").read_text(encoding="utf-8")
    assert lock.count('source = "a"\n') == 2


_NAMES = st.text(st.sampled_from('a/# 2%".'), min_size=1, max_size=4).filter(lambda n: n.strip() == n)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(_NAMES, min_size=2, max_size=3, unique=True), data=st.data())
def test_no_two_jobs_share_a_node(folder: Folder, names: list[str], data: st.DataObject) -> None:
    """Whatever sources are called, each output is made of what it names, and of nothing else."""
    wanted = [
        (data.draw(st.sampled_from(range(len(names)))), data.draw(st.sampled_from(["fp16", "fp32"])))
        for _ in range(3)
    ]
    text = 'format = 1\nname = "m"\nbase = "NEW VAE-tiny"\n'
    for number, name in enumerate(names, 1):
        text += f'sources.{json.dumps(name)}.file = "vae{number}.safetensors"\n'
    for number, (index, precision) in enumerate(wanted):
        text += f'[[output]]\nname = "o{number}"\nprecision = "{precision}"\n'
        text += f"components.VAE-tiny = {json.dumps(names[index])}\n"
    unused = set(range(len(names))) - {i for i, _ in wanted}
    if unused:
        return
    folder.write("m.toml", text)
    plan = plan_of(folder, "m.toml")
    jobs = [n.job for n in plan if isinstance(n.job, ComponentJob)]
    files = {n.key: n.job.file for n in plan if n.kind == "source"}  # type: ignore[union-attr]
    made = {(files[j.origin.node], j.precision) for j in jobs}
    assert made == {(f"vae{index + 1}.safetensors", precision) for index, precision in wanted}
    assert len(jobs) == len(made) == len({n.label for n in plan if n.kind == "component"})
    for (index, precision), node in zip(wanted, plan.outputs(), strict=True):
        (_, key) = node.job.slots["VAE-tiny"]  # type: ignore[union-attr]
        job = plan.nodes[key].job
        assert isinstance(job, ComponentJob)
        assert (files[job.origin.node], job.precision) == (f"vae{index + 1}.safetensors", precision)


def test_the_plan_is_plain_data(folder: Folder) -> None:
    folder.tiny()
    plan = plan_of(folder, "tiny.toml")
    again = pickle.loads(pickle.dumps(plan))
    assert again.nodes == plan.nodes and again == plan_of(folder, "tiny.toml")
    assert all(n.job.key == n.key for n in again)


INNER = 'format = 1\nname = "inner"\nbase = "dirty"\nsources.dirty.file = "dirty.ckpt"\n'
EMA = INNER + 'components.EMA-UNET-tiny = "dirty"\n'
OUTER = 'format = 1\nname = "outer"\nbase = "NEW UNET-tiny"\nsources.m.recipe = "inner.toml"\n'


def test_a_component_of_an_included_recipe(folder: Folder) -> None:
    """An average that the inner model holds can take the place of what it averages; another is an error."""
    save_dirty(folder / "dirty.ckpt")
    folder.write("inner.toml", EMA)
    pick = 'components.UNET-tiny = { from = "m", component = "UNET-tiny-EMA" }\n'
    folder.write("outer.toml", OUTER + pick)
    folder.build("outer.toml")
    direct = OUTER.replace('m.recipe = "inner.toml"', 'm.file = "dirty.ckpt"')
    folder.write("direct.toml", direct.replace('"outer"', '"direct"') + pick)
    folder.build("direct.toml")
    assert content(folder / "outer.safetensors") == content(folder / "direct.safetensors")
    folder.write("inner.toml", INNER)
    said = folder("build", "outer.toml")
    assert said.code == 3 and "`m` has no UNET-tiny-EMA" in said.err and "outer.toml:5" in said.err


def test_a_class_that_an_included_recipe_lacks(folder: Folder) -> None:
    folder.write(
        "inner.toml",
        'format = 1\nname = "inner"\nbase = "NEW VAE-tiny"\nsources.v.file = "vae1.safetensors"\n'
        'components.VAE-tiny = "v"\n',
    )
    folder.write("outer.toml", OUTER + 'components.UNET-tiny = "m"\n')
    said = folder("build", "outer.toml")
    assert said.code == 3 and "`m` has no UNET-tiny" in said.err and "it holds `VAE-tiny`" in said.err


def test_an_included_recipe_with_an_average_as_base(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    folder.write("inner.toml", EMA)
    folder.write("outer.toml", 'format = 1\nname = "outer"\nbase = "m"\nsources.m.recipe = "inner.toml"\n')
    folder.build("outer.toml")
    assert set(content(folder / "outer.safetensors")) >= {n for n in model() if n.startswith(VAE)}


def test_what_nobody_needs_is_not_made(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    folder.write("inner.toml", INNER)
    folder.write(
        "outer.toml",
        'format = 1\nname = "outer"\nbase = "NEW VAE-tiny"\nsources.m.recipe = "inner.toml"\n'
        'components.VAE-tiny = "m"\n',
    )
    made = folder.build("outer.toml")
    assert made["made"] == ["VAE-tiny of dirty"]


def test_a_source_that_two_recipes_share_is_one(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    for name in ("left", "right"):
        folder.write(f"{name}.toml", INNER.replace('"inner"', f'"{name}"'))
    folder.write(
        "outer.toml",
        'format = 1\nname = "outer"\nbase = "l"\nsources.l.recipe = "left.toml"\n'
        'sources.r.recipe = "right.toml"\ncomponents.VAE-tiny = "r"\n',
    )
    plan = folder.plan("outer.toml")
    assert [s["kind"] for s in plan["steps"]].count("source") == 1
    assert plan["reads"] < 1.5 * (folder / "dirty.ckpt").stat().st_size
    folder.build("outer.toml")
    lock = (folder / "outer.lock.toml").read_text(encoding="utf-8")
    assert '[sources."l/dirty"]' in lock and '[sources."r/dirty"]' in lock


def test_names_in_the_lock_are_unlike(folder: Folder) -> None:
    """A source `a/b`, and `b` of the recipe that the source `a` is."""
    folder.write(
        "inner.toml",
        'format = 1\nname = "inner"\nbase = "NEW VAE-tiny"\nsources.b.file = "vae1.safetensors"\n'
        'components.VAE-tiny = "b"\n',
    )
    folder.write(
        "outer.toml",
        'format = 1\nname = "outer"\nbase = "NEW VAE-tiny"\n'
        'sources.a.recipe = "inner.toml"\nsources."a/b".file = "vae2.safetensors"\n'
        '[[output]]\nname = "one"\ncomponents.VAE-tiny = "a"\n'
        '[[output]]\nname = "two"\ncomponents.VAE-tiny = "a/b"\n',
    )
    folder.build("outer.toml")
    lock = (folder / "outer.lock.toml").read_text(encoding="utf-8")
    assert '[sources."a/b"]' in lock and '[sources."a%2Fb"]' in lock
    assert folder("build", "outer.toml", "--locked").code == 0


def test_what_is_left_out_of_each_output_is_told(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    folder.write(
        "m.toml",
        INNER.replace('"inner"', '"m"') + '[[output]]\nname = "a"\nkeep = []\n[[output]]\nname = "b"\n',
    )
    said = folder("build", "m.toml")
    assert said.code == 0
    notes = [line for line in said.err.splitlines() if "left out" in line]
    assert any("for `m-a.safetensors`: extra" in n for n in notes)
    assert not any("for `m-b.safetensors`: extra" in n for n in notes)
    assert sum("junk" in n for n in notes) == 2


def test_another_output_leaves_the_bytes_of_the_first(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    one = INNER.replace('"inner"', '"m"') + '[[output]]\nname = "a"\nfile = "m-a.safetensors"\n'
    folder.write("m.toml", one)
    folder.build("m.toml")
    before = (folder / "m-a.safetensors").read_bytes()
    folder.write(
        "m.toml",
        one + '[[output]]\nname = "b"\nbase = "NEW VAE-tiny"\ncomponents.VAE-tiny = "v"\n'
        '[sources.v]\nfile = "vae1.safetensors"\n',
    )
    made = folder.build("m.toml")
    assert (folder / "m-a.safetensors").read_bytes() == before
    assert made["outputs"][0]["state"] == "unchanged"


def test_the_name_given_on_the_command_line_is_no_part_of_the_bytes(folder: Folder) -> None:
    folder.tiny()
    folder.build("tiny.toml", "-o", "x.safetensors")
    folder.build("tiny.toml", "-o", "y.safetensors")
    assert (folder / "x.safetensors").read_bytes() == (folder / "y.safetensors").read_bytes()
    part = "VAE=vae.safetensors"
    for name in ("p", "q"):
        assert folder("replace", "x.safetensors", part, "-o", f"{name}.safetensors").code == 0
    assert (folder / "p.safetensors").read_bytes() == (folder / "q.safetensors").read_bytes()


def test_a_build_needs_no_command_line(folder: Folder) -> None:
    """The library plans, builds and writes the lock; the folder of the process does not matter."""
    folder.tiny()
    with Workspace(Settings(folder.store, components=(TINY,))) as workspace, workspace.sources() as sources:
        recipe = load_recipe(folder / "tiny.toml", catalog())
        made = build_recipe(workspace, recipe, sources)
    assert [b.state for b in made.outputs] == ["written"] and (folder / "tiny.lock.toml").exists()
