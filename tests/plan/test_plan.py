"""Plans: what they say, in every form, and what they must not touch to say it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from builder.recipe import load_recipe
from tests.help.building import RECIPE, ROOT, Folder, catalog, files, model, save
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))
PUBLISHED = [p for p in SHIPPED if all(s.sha256 for s in load_recipe(p, catalog()).sources.values())]
# Says which modules came with a command, on the last line of stderr.
IMPORTED = """
import atexit
atexit.register(lambda: print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


def test_text(folder: Folder) -> None:
    """Before the first build, after it, and with another VAE."""
    first = folder("plan", "tiny.toml")
    folder.know("dirty.ckpt", "vae.safetensors")
    known = folder("plan", "tiny.toml")
    folder.build()
    done = folder("plan", "tiny.toml")
    save(folder / "vae.safetensors", model("VAE-tiny", seed=3))
    folder.know("vae.safetensors")
    other = folder("plan", "tiny.toml")
    for name, said in (("first", first), ("known", known), ("done", done), ("other-vae", other)):
        assert said.code == 0 and said.err == ""
        assert golden(GOLDEN / f"plan-{name}.txt", said.out) == said.out
    assert done.out.endswith("\nnothing to do\n")


def test_json(folder: Folder) -> None:
    plan = folder.plan()
    said = {"schema", "recipe", "reads", "writes", "steps", "left_out", "notes", "warnings", "errors", "code"}
    assert plan.keys() == said
    assert plan["schema"] == 1 and plan["recipe"] == "tiny"
    steps = {s["label"]: s for s in plan["steps"]}
    order = [s["key"] for s in plan["steps"]]
    assert len(set(order)) == len(steps) == len(plan["steps"])
    for step in plan["steps"]:
        assert step.keys() >= {"key", "label", "kind", "state", "why", "action", "inputs", "reads", "writes"}
        assert step["kind"] in ("source", "step", "component", "output") and step["why"]
        assert re.fullmatch(r"[0-9a-f]{64}", step["key"])
        assert all(order.index(i) < order.index(step["key"]) for i in step["inputs"])
    inputs = {
        s["label"]: {i["label"] for i in plan["steps"] if i["key"] in s["inputs"]} for s in plan["steps"]
    }
    assert inputs["VAE-tiny of vae"] == {"source vae"} and not inputs["source vae"]
    assert inputs["output tiny.safetensors"] >= {"VAE-tiny of vae", "UNET-tiny of dirty"}
    assert steps["source dirty"]["reads"] == (folder / "dirty.ckpt").stat().st_size
    assert steps["UNET-tiny of dirty"]["reads"] == 332_425 * 4
    assert steps["UNET-tiny of dirty"]["writes"] == 332_425 * 2
    assert steps["VAE-tiny of vae"]["precision"] == "fp16" and steps["VAE-tiny of vae"]["fixes"] == []
    assert steps["CLIP-tiny of dirty"]["fixes"] == [["clip-position-ids", 1]]
    assert steps["output tiny.safetensors"]["architecture"] == "SD-tiny"
    # Each source is hashed, and each component read as it is written into the output.
    read = [s["reads"] for s in plan["steps"] if s["kind"] in ("source", "component")]
    assert plan["reads"] == sum(read) and plan["writes"] == steps["output tiny.safetensors"]["writes"]
    (left,) = plan["left_out"]
    assert (left["base"], left["output"]) == ("dirty", "tiny.safetensors")
    assert left["reasons"]["EMA"] == {"keys": 6, "bytes": 332_425 * 4 + 8}  # and its state
    assert "junk" in left["reasons"]
    # The same again is the same, and a build is what was said.
    assert folder.plan() == plan
    assert not any(s["action"] for s in plan["steps"]), "what is in the sources is not known yet"
    folder.know("dirty.ckpt", "vae.safetensors")
    known = folder.plan()
    assert [s["key"] for s in known["steps"]] == order
    planned = {s["label"]: s["action"] for s in known["steps"] if s["kind"] == "component"}
    made = folder.build()
    assert set(made["made"]) == set(planned)
    assert {s["label"]: s["action"] for s in folder.plan()["steps"] if s["kind"] == "component"} == planned
    recorded = {p.stem for p in folder.store.glob("actions/*/*.json")}
    assert recorded == set(planned.values())


def test_dot(folder: Folder) -> None:
    said = folder("plan", "tiny.toml", "--dot").out
    quoted = r'"(?:[^"\\]|\\.)*"'
    lines = said.splitlines()
    assert lines[0] == "digraph plan {" and lines[1] == "  rankdir=LR;" and lines[-1] == "}"
    nodes, edges = {}, set()
    for line in lines[2:-1]:
        if edge := re.fullmatch(rf"  ({quoted}) -> ({quoted});", line):
            edges.add(edge.groups())
        else:
            node = re.fullmatch(rf"  ({quoted}) \[label=({quoted}), shape=\w+, style=\w+\];", line)
            assert node, line
            nodes[node[1]] = node[2]
    steps = folder.plan()["steps"]
    labels = {json.dumps(s["key"][:12]): s["label"] for s in steps}
    assert nodes == {n: json.dumps(f"{labels[n]}\n{s['state']}") for n, s in zip(labels, steps, strict=True)}
    assert edges == {(json.dumps(i[:12]), json.dumps(s["key"][:12])) for s in steps for i in s["inputs"]}


def test_mermaid(folder: Folder) -> None:
    lines = folder("plan", "tiny.toml", "--mermaid").out.splitlines()
    assert lines[0] == "flowchart LR"
    nodes = {
        m[1]: m[2] for line in lines if (m := re.fullmatch(r'  (n\d+)\["([^"]*)<br/><i>\w+</i>"\]', line))
    }
    edges = [m.groups() for line in lines if (m := re.fullmatch(r"  (n\d+) --> (n\d+)", line))]
    assert len(nodes) + len(edges) + 1 == len(lines)
    steps = folder.plan()["steps"]
    assert set(nodes.values()) == {s["label"] for s in steps}
    labels = {s["key"]: s["label"] for s in steps}
    expected = {(labels[i], s["label"]) for s in steps for i in s["inputs"]}
    assert {(nodes[a], nodes[b]) for a, b in edges} == expected


def test_drawings_of_strange_names(folder: Folder) -> None:
    """Quotes and backslashes of names do not break out of the drawing."""
    name = 'a\\"b]'
    folder.write(
        "tiny.toml",
        RECIPE.replace('"dirty"', json.dumps(name)).replace("sources.dirty", f"sources.{json.dumps(name)}"),
    )
    said = folder("plan", "tiny.toml", "--dot")
    assert said.code in (0, 3)
    if said.code == 0:
        assert all(len(re.findall(r'(?<!\\)(?:\\\\)*"', line)) % 2 == 0 for line in said.out.splitlines())
        drawn = folder("plan", "tiny.toml", "--mermaid").out
        assert "#quot;" in drawn and '"b]' not in drawn.replace("#quot;", "")


# -- what a plan leaves alone


def test_no_tensor_is_read(tmp_path: Path) -> None:
    """Neither before a build nor after it: every read of a source ends before its first tensor."""
    folder = Folder.below(tmp_path).mini()  # whose headers are longer than what tells a container
    save(folder / "whole.safetensors", {**model("SD-mini"), **optional()})
    recipe = folder / "mini.toml"
    recipe.write_text(recipe.read_text().replace("dirty.ckpt", "whole.safetensors"))
    code = """
import os
from pathlib import Path
real = os.preadv
def preadv(fd, buffers, offset, *flags):
    name = os.readlink(f"/proc/self/fd/{fd}")
    if name.endswith(("whole.safetensors", "vae.safetensors")):
        head = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
        assert offset + sum(map(len, buffers)) <= head, (name, offset)
    return real(fd, buffers, offset, *flags)
os.preadv = preadv
"""
    assert folder.process("plan", "mini.toml", before=code).code == 0
    folder.know("whole.safetensors", "vae.safetensors")
    folder.build("mini.toml")
    said = folder.process("plan", "mini.toml", before=code)
    assert said.code == 0 and "nothing to do" in said.out, said.err
    said = folder.process("build", "mini.toml", before=code)
    assert said.code == 0, "nor by a build with nothing to do"
    (folder / "mini.safetensors").unlink()
    said = folder.process("plan", "mini.toml", before=code)
    assert said.code == 0 and "the file is gone" in said.out


def optional() -> Mapping[str, object]:
    from benchmarks.generate import Dirt

    return {n: t for n, t in model(dirt=Dirt(junk=True)).items() if n in ("betas", "alphas_cumprod")}  # type: ignore[return-value]


def test_a_plan_writes_nothing(folder: Folder) -> None:
    before = files(folder.path.parent)
    for form in ((), ("--json",), ("--dot",), ("--mermaid",)):
        assert folder("plan", "tiny.toml", *form).code == 0
    assert files(folder.path.parent) == before


def test_neither_torch_nor_what_draws_is_imported(folder: Folder) -> None:
    def imported(*args: str) -> set[str]:
        said = folder.process(*args, before=IMPORTED)
        assert said.code == 0, said.err
        return set(said.err.splitlines()[-1].split())

    heavy = {"torch", "numpy", "huggingface_hub", "safetensors"}
    assert not heavy & imported("plan", "tiny.toml")
    assert "torch" in imported("build", "tiny.toml")
    assert not heavy & imported("build", "tiny.toml"), "there is nothing to do"
    assert not heavy & imported("plan", "tiny.toml", "--json")


# -- recipes whose files are elsewhere


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_recipes_of_published_files_plan_offline(path: Path, tmp_path: Path) -> None:
    """Without any of their files: pinned sources are to be fetched, where they can be, and are known."""
    folder = Folder(tmp_path, tmp_path / "store")
    plan = folder("plan", path, "--offline", "--json").json
    states = {s["label"]: s["state"] for s in plan["steps"] if s["kind"] == "source"}
    sources = load_recipe(path, catalog()).sources
    assert states == {f"source {n}": "fetch" if s.urls else "missing" for n, s in sources.items()}
    assert {s["state"] for s in plan["steps"] if s["kind"] == "output"} == {"make"}
    classes = {s["class"] for s in plan["steps"] if s["kind"] == "component"}
    assert classes >= (
        {"UNET-XL", "CLIP-XL", "VAE-v1"} if "sdxl" in path.stem else {"UNET-v1", "CLIP-v1", "VAE-v1"}
    )
    assert not files(tmp_path)


def test_what_is_known_by_its_digest_alone_is_not_built(tmp_path: Path) -> None:
    folder = Folder(tmp_path, tmp_path / "store")
    said = folder("build", ROOT / "recipes" / "anything-v3-short.toml", "--offline", "-o", "x.safetensors")
    assert said.code == 5
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_unknown_base_that_is_nowhere(folder: Folder) -> None:
    (folder / "dirty.ckpt").unlink()
    said = folder("plan", "tiny.toml", "--offline")
    assert said.code == 5
    assert "the source `dirty` is nowhere to be found" in said.err
    assert "beside the recipe" in said.err


def test_all_sources_that_are_nowhere_are_told_of_at_once(folder: Folder) -> None:
    (folder / "vae.safetensors").rename(folder / "VAE.safetensors")
    (folder / "dirty.ckpt").rename(folder / "trian.ckpt")
    folder.write("tiny.toml", (folder / "tiny.toml").read_text().replace("dirty.ckpt", "train.ckpt"))
    for command in ("build", "plan", "lock"):
        said = folder(command, "tiny.toml")
        assert said.code == 5, said.err
        assert said.err.count("is nowhere to be found") == 2
        assert "did you mean `trian.ckpt`?" in said.err and "did you mean `VAE.safetensors`?" in said.err


def test_what_is_not_here_has_unknown_sizes(folder: Folder) -> None:
    new = RECIPE.replace('base = "dirty"', 'base = "NEW SD-tiny"')
    new += 'components.UNET-tiny = "dirty"\ncomponents.CLIP-tiny = "dirty"\n'
    for name in ("dirty.ckpt", "vae.safetensors"):
        (folder / name).unlink()
    folder.write("new.toml", new)
    said = folder("plan", "new.toml")
    assert said.code == 0 and said.out.endswith("reads unknown, writes unknown\n")
    plan = folder("plan", "new.toml", "--json").json
    assert plan["reads"] is None and plan["writes"] is None
    assert {s["state"] for s in plan["steps"] if s["kind"] == "source"} == {"missing"}


def test_explain_says_what_the_plan_says(folder: Folder) -> None:
    planned = folder("plan", "tiny.toml").out
    said = folder("build", "tiny.toml", "--explain")
    assert said.err.startswith(planned)
