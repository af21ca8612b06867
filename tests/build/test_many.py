"""Several recipes built as one: what they share is read once, and each is as if it had been built alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.help.building import RECIPE, Folder, model, save

MERGE = """\
format = 1
name = "{name}"
base = "half"
[sources]
a.file = "a.safetensors"
b.file = "b.safetensors"
[steps]
half = {{ op = "weighted-sum", a = "a", b = "b", alpha = {alpha} }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save(made / "a.safetensors", model(seed=1))
    save(made / "b.safetensors", model(seed=2))
    made.know("a.safetensors", "b.safetensors")
    return made


def merges(folder: Folder, count: int) -> list[str]:
    """Recipes of the same two sources."""
    names = [f"m{n}" for n in range(count)]
    for n, name in enumerate(names):
        folder.write(f"{name}.toml", MERGE.format(name=name, alpha=(n + 1) / (count + 1)))
    return [f"{name}.toml" for name in names]


def made(folder: Folder) -> dict[str, bytes]:
    """What was built, and the locks."""
    found = [p for pattern in ("m*.safetensors", "*.lock.toml") for p in folder.path.glob(pattern)]
    return {p.name: p.read_bytes() for p in found}


def test_each_is_as_if_built_alone(folder: Folder) -> None:
    recipes = merges(folder, 4)
    folder.write(
        "m9.toml",
        MERGE.format(name="m9", alpha=0.5).replace('a.file = "a', 'x.file = "a').replace('a = "a"', 'a = "x"')
        + '[output]\nprecision = "fp32"\nfile = "m9.safetensors"\n',
    )
    alone = folder.beside("alone", store="other")
    for recipe in [*recipes, "m9.toml"]:
        alone.build(recipe)
    said = folder("build", *recipes, "m9.toml")
    assert said.code == 0, said.err
    assert said.out.endswith("5 recipes: 5 built\n")
    assert said.err.count("the VAE is that of `a`") == 1 == said.err.count("the VAE is that of `x`")
    assert made(folder) == made(alone) and len(made(folder)) == 10


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_order_change_no_byte(folder: Folder, threads: int) -> None:
    recipes = merges(folder, 3)
    other = folder.beside("other", store="other")
    assert folder("build", *recipes).code == 0
    assert other("build", *reversed(recipes), "--threads", threads).code == 0
    assert made(folder) == made(other)


COUNT = """
import atexit
def count():
    with open('/proc/self/io') as said:
        print(dict(line.split(': ') for line in said)['rchar'].strip(), file=sys.stderr)
import torch, numpy, networkx, builder.build.many, builder.operations.merges
count()
atexit.register(count)
"""


def read(folder: Folder, *args: object) -> int:
    """The bytes that a command read, by the kernel's count, less what starting takes."""
    said = folder.process(*args, "--quiet", before=COUNT)
    assert said.code == 0, said.err
    before, after = [int(line) for line in said.err.split()]
    return after - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account")
def test_shared_sources_are_read_once(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        save(folder / f"{name}.safetensors", model("SD-mini", seed=seed))
    folder.know("a.safetensors", "b.safetensors")
    recipes = merges(folder, 8)
    forms = ["m1.ckpt", "m2.ckpt", "m3.safetensors.index.json", "m4.safetensors.index.json", "m5/"]
    for name in forms:
        recipe = f"{name[:2]}.toml"
        folder.write(recipe, (folder / recipe).read_text() + f'[output]\nfile = "{name}"\n')
    size = sum(p.stat().st_size for p in folder.path.glob("?.safetensors"))
    alone = folder.beside("alone", store="other")
    alone.know("a.safetensors", "b.safetensors")
    one = read(alone, "build", recipes[0])
    plan = folder("plan", *recipes, "--json").json
    all_ = read(folder, "build", *recipes)
    # A folder's tensors are in an order of their own: it is written alone.
    assert size < plan["reads"] <= 2 * size and 2 * one > plan["reads"]
    # What else is read for each: its text and the headers, less than a tenth of its sources. A PyTorch file
    # is read for its SHA-256, as what stands before a tensor follows from it.
    again = sum(p.stat().st_size for p in folder.path.glob("m*.ckpt"))
    assert all_ - 2 * one - again < 6 * 0.1 * size, (all_, one, size)


def test_what_is_not_written_at_once_is_read_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = merges(folder, 4)
    once = folder("plan", *recipes, "--json").json["reads"]
    monkeypatch.setattr("builder.plan.at_once.files_at_once", lambda: 2)
    assert folder("plan", *recipes, "--json").json["reads"] == 2 * once
    assert folder("plan", *recipes[:2], "--json").json["reads"] == once
    assert folder("build", *recipes).code == 0


def test_where_few_files_may_be_open(folder: Folder) -> None:
    resource = pytest.importorskip("resource")
    recipes = merges(folder, 8)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 14, limits[1]))
    try:
        said = folder("build", *recipes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert said.code == 0, said.err
    assert said.out.endswith("8 recipes: 8 built\n")


def test_one_plan(folder: Folder) -> None:
    recipes = merges(folder, 3)
    plan = folder("plan", *recipes, "--json").json
    assert plan["recipes"] == ["m0", "m1", "m2"]
    kinds = [s["kind"] for s in plan["steps"]]
    assert kinds.count("source") == 2 and kinds.count("output") == 3
    keys = [s["key"] for s in plan["steps"]]
    assert len(set(keys)) == len(keys) and len({s["label"] for s in plan["steps"]}) == len(keys)
    # The VAE, which no merge touches, is one component of all.
    shared = [s for s in plan["steps"] if s["kind"] == "component" and "VAE" in s["label"]]
    assert len(shared) == 1
    assert folder("plan", *recipes, "--mermaid").out.count("output m") == 3


def test_shared_components_are_made_once(folder: Folder) -> None:
    found = folder("build", *merges(folder, 3), "--json").json
    fresh: list[str] = [label for r in found["recipes"] for label in r["made"]]
    assert len({o["sha256"] for r in found["recipes"] for o in r["outputs"]}) == 3
    assert [r["state"] for r in found["recipes"]] == ["built"] * 3 and fresh
    assert {s["state"] for s in folder("plan", *merges(folder, 3), "--json").json["steps"]} <= {
        "unchanged",
        "known",
        "stored",
        "stream",
    }


def test_failures_are_told_together_and_nothing_is_made(folder: Folder) -> None:
    recipes = merges(folder, 2)
    folder.write("wrong.toml", 'format = 1\nnmae = "x"\n')
    folder.write("gone.toml", MERGE.format(name="gone", alpha=0.5).replace("b.safetensors", "c.safetensors"))
    said = folder("build", *recipes, "wrong.toml", "gone.toml")
    assert said.code == 3, "as the first that fails"
    assert "unknown key `nmae`" in said.err and "`b` is nowhere to be found" in said.err
    assert "wrong.toml:2" in said.err and "gone.toml" in said.err
    assert not made(folder) and said.out.endswith("4 recipes: 2 failed, 2 not begun\n")
    junit = folder("build", *recipes, "wrong.toml", "gone.toml", "--output-format", "junit").out
    assert 'tests="4" failures="2" errors="0" skipped="2"' in junit and junit.count("<skipped/>") == 2


def test_what_can_be_built_is_built(folder: Folder) -> None:
    recipes = merges(folder, 2)
    folder.write("gone.toml", MERGE.format(name="gone", alpha=0.5).replace("b.safetensors", "c.safetensors"))
    said = folder("build", "gone.toml", *recipes, "--keep-going", "--json")
    found = json.loads(said.out)
    assert said.code == 5 and [r["state"] for r in found["recipes"]] == ["failed", "built", "built"]
    assert found["errors"] == found["recipes"][0]["errors"] and len(made(folder)) == 4


def test_a_failure_in_the_pass_fails_its_own_recipe(folder: Folder) -> None:
    recipes = merges(folder, 3)
    text = (folder / "m1.toml").read_text()
    folder.write("m1.toml", text + '[expect]\nmetric = "0001/0001/0001"\n')
    said = folder("build", *recipes, "--json", "--keep-going")
    assert said.code == 7
    assert [r["state"] for r in json.loads(said.out)["recipes"]] == ["built", "failed", "built"]
    assert sorted(made(folder)) == ["m0.lock.toml", "m0.safetensors", "m2.lock.toml", "m2.safetensors"]


def test_folders_of_what_was_not_built_are_gone(folder: Folder) -> None:
    wrong = '[output]\nfile = "{}/m.safetensors"\n[expect]\nmetric = "0001/0001/0001"\n'
    recipes = merges(folder, 3)
    for name, place in zip(recipes, ("out", "out/sub", "out/sub/sub"), strict=True):
        folder.write(name, (folder / name).read_text() + wrong.format(place))
    assert folder("build", *recipes, "--keep-going").code == 7
    assert not (folder / "out").exists()
    folder.write(recipes[2], (folder / recipes[2]).read_text().replace("out/sub/sub", "m0.toml"))
    said = folder("build", *recipes)
    assert said.out.endswith("3 recipes: 1 failed, 2 not begun\n") and not (folder / "out").exists()
    assert "cannot write `m0.toml`" in said.err and "Not a directory" in said.err


def test_what_is_not_begun_leaves_no_folder(folder: Folder) -> None:
    merges(folder, 1)
    folder.write("m0.toml", (folder / "m0.toml").read_text() + '[expect]\nmetric = "0001/0001/0001"\n')
    save(folder / "c.safetensors", model(seed=3))
    text = 'format = 1\nname = "n"\nbase = "c"\nsources.c.file = "c.safetensors"\n'
    folder.write("n.toml", text + '[output]\nfile = "sub/deep/n.safetensors"\n')
    said = folder("build", "m0.toml", "n.toml")
    assert said.code == 7 and said.out.endswith("2 recipes: 1 failed, 1 not begun\n")
    assert not (folder / "sub").exists() and not made(folder)


@pytest.mark.skipif(not hasattr(os, "fstatvfs"), reason="asks otherwise what is free")
def test_a_store_that_is_emptied_meanwhile_changes_no_lock(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe,) = merges(folder, 1)
    folder.build(recipe)
    folder.write("m9.toml", MERGE.format(name="m9", alpha=0.5))
    alone = folder.beside("alone", store="other")
    alone.build("m9.toml")
    ask = os.fstatvfs

    def emptied(fd: int) -> os.statvfs_result:  # which is asked just before anything is written
        shutil.rmtree(folder.store / "facts", ignore_errors=True)
        return ask(fd)

    monkeypatch.setattr(os, "fstatvfs", emptied)
    folder.build("m9.toml")
    assert made(folder) == made(alone)


def test_two_recipes_that_write_one_file_are_refused(folder: Folder) -> None:
    merges(folder, 2)
    folder.write("m1.toml", (folder / "m0.toml").read_text())
    said = folder("build", "m0.toml", "m1.toml")
    assert said.code == 3 and "two recipes write the same file" in said.err and not made(folder)


def test_a_namesake_of_what_several_pin_is_passed_over_once(folder: Folder, tmp_path: Path) -> None:
    merges(folder, 2)
    right = (folder / "b.safetensors").rename(save(tmp_path / "second" / "b.safetensors", model(seed=2)))
    save(tmp_path / "first" / "b.safetensors", model(seed=7))
    pinned = f'b = {{ file = "b.safetensors", sha256 = "{sha256(right.read_bytes()).hexdigest()}" }}'
    for name in ("m0.toml", "m1.toml"):
        folder.write(name, (folder / name).read_text().replace('b.file = "b.safetensors"', pinned))
    models = os.pathsep.join(str(tmp_path / name) for name in ("first", "second"))
    found = replace(folder, store=tmp_path / "new", environment={"CKPT_MODELS": models})
    said = found("build", "m0.toml", "m1.toml", "--offline")
    assert said.code == 0 and said.out.endswith("2 recipes: 2 built\n"), said.err


def test_what_another_recipe_writes_is_made_first(folder: Folder) -> None:
    merges(folder, 1)
    folder.write("first.toml", 'format = 1\nname = "n"\nbase = "a"\nsources.a.file = "m0.safetensors"\n')
    said = folder("plan", "first.toml", "m0.toml")
    assert said.code == 5 and "hint: `ckpt build m0.toml` makes it" in said.err
    said = folder("build", "first.toml", "m0.toml")
    assert said.code == 0, said.err
    assert (folder / "n.safetensors").exists()
    # Where that fails, neither what reads it nor what reads that in turn is made of what was there before.
    folder.write("last.toml", 'format = 1\nname = "p"\nbase = "n"\nsources.n.file = "n.safetensors"\n')
    broken = MERGE.format(name="m0", alpha=0.5).replace("b.saf", "gone.saf")
    folder.write("m0.toml", broken)
    said = folder("build", "last.toml", "first.toml", "m0.toml", "--keep-going")
    assert said.code == 5 and said.out.endswith("3 recipes: 1 failed, 2 not begun\n")
    folder.write("m0.toml", broken.replace("gone.saf", "n.saf"))
    said = folder("build", "first.toml", "m0.toml")
    assert said.code == 3 and "in a circle" in said.err


def test_locks_in_a_pattern_are_passed_over_and_folders_searched(folder: Folder) -> None:
    recipes = merges(folder, 2)
    folder("build", *recipes)
    folder.write("other.toml", "[tool]\nx = 1\n")
    again = folder("build", *recipes, "m0.lock.toml", "m1.lock.toml")
    assert again.code == 0 and again.out.count("unchanged") == 2
    assert folder("build", ".").out.endswith("2 recipes: 2 built\n")
    (folder / "empty").mkdir()
    assert folder("build", "empty").code == 2


def test_options_of_one_recipe(folder: Folder) -> None:
    recipes = merges(folder, 2)
    said = folder("build", *recipes, "--lock", "x.lock.toml")
    assert said.code == 2 and "is for one recipe" in said.err
    for command in ("build", "plan", "lock", "verify"):
        said = folder(command, ".", "--lock", "x.lock.toml")
        assert said.code == 2 and "`.` is a folder of them" in said.err
    said = folder("build", *recipes, "-o", "x.safetensors")
    assert said.code == 2 and "`-o x.safetensors/` is one" in said.err
    assert folder("build", *recipes, "-o", "out/").code == 0
    assert {p.name for p in (folder / "out").iterdir()} == {"m0.safetensors", "m1.safetensors"}
    assert set(made(folder)) == {"m0.lock.toml", "m1.lock.toml"}


def test_two_builds_locked_and_checked(folder: Folder) -> None:
    recipes = merges(folder, 2)
    said = folder("build", *recipes, "--frozen")
    assert said.code == 4 and said.err.count("there is no lock") == 2
    assert folder("build", *recipes, "--check").code == 0
    assert folder("build", *recipes, "--frozen").code == 0


def test_a_lock_is_checked_without_its_sources(folder: Folder) -> None:
    recipes = merges(folder, 3)
    folder("build", *recipes)
    for name in "ab":
        (folder / f"{name}.safetensors").unlink()
    assert folder("lock", "--check", ".").code == 0
    assert folder("lock", "--check", "m0.toml").out == "fresh  m0.lock.toml\n"
    folder.write("m1.toml", MERGE.format(name="m1", alpha=0.1))
    (folder / "m2.lock.toml").unlink()
    before = made(folder)
    said = folder("lock", "--check", *recipes, "--json")
    errors = json.loads(said.out)["errors"]
    assert said.code == 4 and [e["fact"] for e in errors] == [
        "the lock is stale",
        "there is no lock `m2.lock.toml`",
    ]
    assert made(folder) == before


def test_locks_of_several(folder: Folder) -> None:
    recipes = merges(folder, 2)
    said = folder("lock", *recipes)
    assert said.out.split() == ["written", "m0.lock.toml", "written", "m1.lock.toml"]
    text = (folder / "m0.lock.toml").read_text()
    folder.write("m0.lock.toml", text.replace("[sources.b]", "[sources.c]"))
    said = folder("lock", "--check", "m0.toml")
    assert said.code == 4 and "source `b`" in said.err and "source `c`" in said.err
    # One that does not have the source to be upgraded stays as it is.
    other = (folder / "m1.toml").read_text().replace("b.file", "c.file").replace('b = "b"', 'b = "c"')
    folder.write("m1.toml", other)
    assert folder("lock", *recipes, "--upgrade", "b").code == 0
    said = folder("lock", *recipes, "--upgrade", "d")
    assert said.code == 2 and "no recipe has a source `d`" in said.err


def test_verify_several(folder: Folder) -> None:
    recipes = merges(folder, 2)
    folder("build", *recipes)
    assert folder("verify", ".").out.count("verified") == 2
    (folder / "m0.safetensors").write_bytes((folder / "m1.safetensors").read_bytes())
    said = folder("verify", *recipes)
    assert said.code == 7 and "m0.safetensors" in said.err and said.out.count("verified") == 1


def test_editions_of_one_recipe_read_their_source_once(folder: Folder) -> None:
    text = RECIPE.replace("dirty.ckpt", "a.safetensors").partition("sources.vae")[0]
    both = "".join(f'[[output]]\nname = "{p}"\nprecision = "{p}"\n' for p in ("fp16", "fp32"))
    folder.write("e.toml", text + both)
    plan: dict[str, Any] = folder("plan", "e.toml", "--json").json
    steps = {s["label"]: s for s in plan["steps"] if s["kind"] == "component"}
    assert plan["reads"] * 2 == sum(s["reads"] for s in steps.values())
    assert folder("build", "e.toml").code == 0


def test_each_has_its_statement(folder: Folder) -> None:
    recipes = merges(folder, 2)
    said = folder("build", *recipes, "--statement", "--json")
    assert said.code == 0, said.err
    for n, recipe in enumerate(json.loads(said.out)["recipes"]):
        (output,) = recipe["outputs"]
        assert output["statement"] == f"m{n}.safetensors.intoto.json"
        assert folder("verify", recipes[n], "--statement", output["statement"]).code == 0
    said = folder("verify", *recipes, "--statement", "m0.safetensors.intoto.json")
    assert said.code == 2 and "is for one recipe" in said.err
    assert folder("verify", recipes[1], "--statement", "m0.safetensors.intoto.json").code == 7


def test_a_statement_replaces_nothing_of_others(folder: Folder) -> None:
    recipes = merges(folder, 2)
    folder.write("m1.safetensors.intoto.json", "mine")
    said = folder("build", *recipes, "--statement")
    assert said.code == 7 and "is no statement" in said.err and not made(folder)
    assert folder("build", *recipes, "--statement", "--keep-going").code == 7
    assert set(made(folder)) == {"m0.safetensors", "m0.lock.toml"}
    assert (folder / "m1.safetensors.intoto.json").read_text() == "mine"


def test_a_file_to_verify_may_be_a_folder(folder: Folder) -> None:
    (recipe,) = merges(folder, 1)
    folder("build", recipe)
    (folder / "empty").mkdir()
    said = folder("verify", recipe, "empty")
    assert said.code in (6, 7) and "there is no recipe" not in said.err
    assert folder("verify", recipe, ".").code == 0, "a folder of recipes"


def test_recipes_that_are_made_after_each_other_write_no_file_twice(folder: Folder) -> None:
    merges(folder, 1)
    text = 'format = 1\nname = "n"\nbase = "x"\nsources.x.file = "{}.safetensors"\n'
    folder.write("first.toml", text.format("a"))
    folder.write("second.toml", text.format("m0"))
    said = folder("build", "first.toml", "second.toml", "m0.toml")
    assert said.code == 3 and "two recipes write the same file" in said.err
