"""What each view shows and does, over HTTP, on real files."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from builder.base.errors import CkptError
from builder.base.parallel import Cancelled
from builder.base.words import command_line
from builder.build import build_recipe
from builder.toolkit.prune import Options
from builder.toolkit.watch import Watch
from builder.web import server as module
from builder.web.html import tag
from builder.web.jobs import Job, Outcome, Task
from builder.web.server import HOST
from builder.web.views.merge import MERGES
from builder.workspace import Settings, Workspace
from tests.help.building import Folder, content, files, like, model, save, save_dirty
from tests.help.pages import Answer, Client, served


def data(said: Mapping[str, Any]) -> dict[str, Any]:
    """What an object says, without how the command that printed it fared."""
    return {k: v for k, v in said.items() if k not in {"notes", "warnings", "errors", "code"}}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def client(folder: Folder) -> Iterator[Client]:
    with served(folder) as client:
        yield client


def commands(page: Answer) -> list[str]:
    """The command line that a page shows, as words."""

    shown = re.search(r'<pre[^>]*class="command">(.*?)</pre>', page.text, re.DOTALL)
    assert shown is not None
    words = shlex.split(html.unescape(shown[1]))
    assert words[0] == "ckpt"
    return words[1:]


# -- the library


def test_the_library_says_what_each_file_is(client: Client, folder: Folder) -> None:
    (folder / "broken.safetensors").write_bytes(b"nothing")
    page = client.get("")
    assert page.status == 200
    assert "dirty.ckpt" in page.text and "SD-tiny" in page.text and "fp32" in page.text
    assert "refused: " in page.read and "broken.safetensors" in page.text
    rows = {f["file"]: f for f in client.get("api/library").json["files"]}
    said = folder("inspect", "--no-metric", "dirty.ckpt", "--json").json["files"][0]
    dirty = rows["work/dirty.ckpt"]
    assert dirty["architecture"] == said["architecture"] == "SD-tiny"
    assert dirty["size"] == said["size"]
    assert dirty["junk"] == said["junk"]["bytes"] > 0 and dirty["ema"] == said["ema"]["bytes"] > 0
    assert rows["work/broken.safetensors"]["error"]


def test_the_library_can_be_searched(client: Client) -> None:
    page = client.get("", q="VAE")
    assert "vae.safetensors" in page.text and "dirty.ckpt" not in page.text
    assert "Nothing fits" in client.get("", q="nothing like it").text


def test_twins_are_told_by_what_files_hold(folder: Folder) -> None:
    save(folder / "sub" / "again.safetensors", model("VAE-tiny", seed=2))
    save(folder / "other.safetensors", model("VAE-tiny", seed=3))
    (folder / "same.ckpt").hardlink_to(folder / "dirty.ckpt")
    with served(folder) as client:
        before = {f["file"]: f["twins"] for f in client.get("api/library").json["files"]}
        assert before["work/vae.safetensors"] == [], "nothing is guessed"
        assert before["work/same.ckpt"] == [
            {"file": "work/dirty.ckpt", "same": "the same file under two names"}
        ]
        done, page = client.job("read")
        assert done["state"] == "done" and "files read" in page.read
        after = {f["file"]: f["twins"] for f in client.get("api/library").json["files"]}
        assert after["work/vae.safetensors"] == [
            {"file": "work/sub/again.safetensors", "same": "the same components"}
        ]
        assert after["work/other.safetensors"] == []
        assert "the same components" in client.get("report", file="work/vae.safetensors").read


def test_a_file_that_changes_is_looked_at_again(client: Client, folder: Folder) -> None:
    assert "SD-tiny" in client.get("report", file="work/dirty.ckpt").text
    save(folder / "dirty.ckpt", model("VAE-tiny"))
    page = client.get("report", file="work/dirty.ckpt")
    assert "VAE-tiny-SD" in page.text and "EMA" not in page.read


# -- one file


def test_a_report_is_that_of_inspect(client: Client, folder: Folder) -> None:
    page = client.get("report", file="work/dirty.ckpt")
    said = folder("inspect", "--no-metric", "dirty.ckpt", "--json").json
    shown = client.get("api/inspect", file="work/dirty.ckpt").json
    assert shown["files"][0].pop("path") == str(folder / "dirty.ckpt")
    said["files"][0].pop("path")
    assert data(shown) == data(said)
    for part in ("UNET-tiny-SD", "VAE-tiny-SD", "UNET-tiny-EMA"):
        assert part in page.text
    assert "Junk: " in page.read and "loss.logvar" in page.text and "none of them run" in page.read
    assert folder(*commands(page)).code in (0, 1)


def test_a_report_says_what_was_rejected_and_what_is_unknown(client: Client, folder: Folder) -> None:
    tensors = dict(model("SD-tiny"))
    lost = next(n for n in tensors if n.startswith("first_stage_model."))
    del tensors[lost]
    save(folder / "torn.safetensors", tensors | {"strange.weight": tensors[next(iter(tensors))]})
    page = client.get("report", file="work/torn.safetensors")
    assert "Not in this file, though some of it is" in page.text
    assert lost.removeprefix("first_stage_model.") in page.text and "is missing" in page.read
    assert "strange.weight" in page.text


def test_the_weights_are_read_on_request(client: Client, folder: Folder) -> None:
    assert "not read" in client.get("report", file="work/dirty.ckpt").read
    done, page = client.job("report", file="work/dirty.ckpt", full="1", hashes="1")
    said = folder("inspect", "--full", "--hashes", "dirty.ckpt", "--json").json
    assert done["state"] == "done"
    assert done["result"]["files"][0]["hashes"] == said["files"][0]["hashes"]
    assert done["result"]["files"][0]["metric"] == said["files"][0]["metric"]
    assert said["files"][0]["hashes"]["SHA256"] in page.text
    again = client.get("report", file="work/dirty.ckpt")
    assert said["files"][0]["hashes"]["SHA256"] in again.text, "what was found out stays known"


# -- pruning


def test_pruning_is_shown_before_it_is_done(client: Client, folder: Folder) -> None:
    before = files(folder.path)
    page = client.get("prune", file="work/dirty.ckpt")
    said = folder("prune", "--dry-run", "dirty.ckpt", "--json").json
    shown = client.get("api/prune", file="work/dirty.ckpt").json
    shown["files"][0].pop("path"), said["files"][0].pop("path")
    assert data(shown) == data(said)
    for words in ("What goes", "EMA", "junk", "rounded to FP16", "What stays", "UNET-tiny-SD", "after"):
        assert words in page.read, words
    assert files(folder.path) == before
    kept = client.get("prune", file="work/dirty.ckpt", keep_ema="1", keep="loss.*", precision="fp32")
    assert "rounded" not in kept.read
    assert "--keep-ema" in commands(kept) and "loss.*" in commands(kept)


def test_a_whole_prune(client: Client, folder: Folder) -> None:
    done, page = client.job(
        "prune", file="work/dirty.ckpt", folder="work", name="clean.safetensors", save="clean.toml"
    )
    assert done["state"] == "done" and done["code"] == 0, done
    output = done["result"]["files"][0]["output"]
    assert output["path"] == str(folder / "clean.safetensors") and output["sha256"] in page.text
    # The command line that is shown, and the recipe that was saved, make the very same file.
    words = commands(page)
    made = (folder / "clean.safetensors").read_bytes()
    (folder / "clean.safetensors").unlink()
    assert folder(*words).code == 0
    assert (folder / "clean.safetensors").read_bytes() == made
    (folder / "clean.safetensors").unlink()
    assert folder("build", "clean.toml").code == 0
    assert (folder / "clean.safetensors").read_bytes() == made


def test_nothing_is_replaced_unless_that_is_said(client: Client, folder: Folder) -> None:
    held = (folder / "vae.safetensors").read_bytes()
    fields = {"file": "work/dirty.ckpt", "folder": "work", "name": "vae.safetensors"}
    refused = client.post("prune", **fields)
    assert refused.status == 422 and "is there already" in refused.read
    assert (folder / "vae.safetensors").read_bytes() == held
    done, _ = client.job("prune", **fields, replace="1")
    assert done["state"] == "done"
    assert (folder / "vae.safetensors").read_bytes() != held
    itself = client.job("prune", **fields | {"name": "dirty.ckpt"}, replace="1")[0]
    assert itself["state"] == "failed" and "one of the inputs" in itself["error"][0]["fact"]


def test_what_should_not_be_pruned_is_refused(client: Client, folder: Folder) -> None:
    tensors = dict(model("SD-tiny"))
    del tensors[next(iter(tensors))]
    save(folder / "torn.safetensors", tensors)
    page = client.get("prune", file="work/torn.safetensors")
    assert "not pruned: broken" in page.read and "Prune it" not in page.text
    fields = {"file": "work/torn.safetensors", "folder": "work", "name": "x.safetensors"}
    assert client.post("prune", **fields).status == 422
    assert "Prune it" in client.get("prune", file="work/torn.safetensors", force="1").text
    unmatched = client.post("prune", **fields | {"file": "work/dirty.ckpt"}, keep="nothing")
    assert unmatched.status == 422 and "no tensor or component" in unmatched.read


# -- slots


def test_a_component_is_replaced(client: Client, folder: Folder) -> None:
    slots = client.get("replace", base="work/dirty.ckpt")
    assert "Slots of SD-tiny" in slots.read and "work/vae.safetensors · VAE-tiny-SD" in slots.read
    fields = {
        "base": "work/dirty.ckpt",
        "slot.VAE-tiny": "|work/vae.safetensors",
        "folder": "work",
        "name": "made.safetensors",
    }
    preview = client.get("replace", **fields)
    assert "output made.safetensors" in preview.read and "<svg" in preview.text
    assert not (folder / "made.safetensors").exists()
    done, page = client.job("replace", **fields)
    assert done["state"] == "done", done
    made = (folder / "made.safetensors").read_bytes()
    assert folder("replace", "dirty.ckpt", "VAE-tiny=vae.safetensors", "-o", "b.safetensors").code == 0
    assert (folder / "b.safetensors").read_bytes() == made
    (folder / "made.safetensors").unlink()
    assert folder(*commands(page)).code == 0
    assert (folder / "made.safetensors").read_bytes() == made


def test_an_average_takes_the_place_of_a_model(client: Client, folder: Folder) -> None:
    fields = {"base": "work/dirty.ckpt", "slot.UNET-tiny": "UNET-tiny-EMA|work/dirty.ckpt", "folder": "work"}
    assert client.job("replace", **fields, name="made.safetensors")[0]["state"] == "done"
    assert folder("replace", "dirty.ckpt", "UNET=dirty.ckpt:UNET-tiny-EMA", "-o", "b.safetensors").code == 0
    assert (folder / "b.safetensors").read_bytes() == (folder / "made.safetensors").read_bytes()


def test_a_new_model_of_parts(client: Client, folder: Folder) -> None:
    slots = client.get("replace", base="NEW SD-tiny")
    assert "NEW SD-tiny (every slot empty)" in slots.read and "nothing" in slots.read
    parts = {
        "slot.UNET-tiny": "|work/dirty.ckpt",
        "slot.CLIP-tiny": "|work/dirty.ckpt",
        "slot.VAE-tiny": "|work/vae.safetensors",
    }
    fields = {"base": "NEW SD-tiny", "folder": "work", "name": "made.safetensors", "save": "made.toml"}
    done, page = client.job("replace", **fields, **parts)
    assert done["state"] == "done", done
    made = content(folder / "made.safetensors")
    assert folder("replace", "dirty.ckpt", "VAE-tiny=vae.safetensors", "-o", "b.safetensors").code == 0
    whole = content(folder / "b.safetensors")
    assert all(whole[name] == tensor for name, tensor in made.items()), "but for what lies beside components"
    assert 'base = "NEW SD-tiny"' in (folder / "made.toml").read_text()
    del parts["slot.VAE-tiny"]
    empty = client.get("replace", **fields, **parts)
    assert "has slots that nothing fills: VAE-tiny" in empty.read
    assert commands(page)[:2] == ["replace", "NEW SD-tiny"]


def test_a_component_is_extracted(client: Client, folder: Folder) -> None:
    page = client.get("extract", file="work/dirty.ckpt")
    assert "VAE-tiny-SD" in page.text and "UNET-tiny-EMA" in page.text
    fields = {"file": "work/dirty.ckpt", "component": "VAE-tiny-SD", "folder": "work", "form": "pt"}
    done, page = client.job("extract", **fields, save="part.toml")
    assert done["state"] == "done", done
    made = Path(done["result"]["outputs"][0]["path"])
    assert made.parent == folder.path and made.name.endswith(".vae.pt")
    assert (folder / "part.toml").exists()
    said = folder(*commands(page), "--json").json
    assert said["outputs"][0]["sha256"] == done["result"]["outputs"][0]["sha256"]


# -- merging


@pytest.fixture
def pair(folder: Folder) -> Folder:
    save(folder / "a.safetensors", model("SD-mini", seed=4))
    save(folder / "b.safetensors", model("SD-mini", seed=5))
    return folder


def test_models_are_merged_by_blocks(client: Client, pair: Folder) -> None:
    inputs = {"op": "weighted-sum", "in.a": "work/a.safetensors", "in.b": "work/b.safetensors"}
    page = client.get("merge", **inputs)
    assert page.text.count('type="range"') == 25 and "OUT11" in page.text
    fields = {**inputs, "folder": "work", "name": "m.safetensors", "save": "m.toml", "p.alpha": "0.5"}
    fields |= {f"b.alpha.{block}": "0.5" for block in ("IN00", "M00")} | {"b.alpha.OUT03": "0.25"}
    preview = client.get("merge", **fields, preview="1")
    assert "step merged UNET-mini" in preview.read and "OUT03 = 0.25" in preview.read
    done, page = client.job("merge", **fields)
    assert done["state"] == "done", done
    recipe = (pair / "m.toml").read_text()
    assert "OUT03 = 0.25" in recipe and "IN00" not in recipe, "what is as the base says nothing"
    made = (pair / "m.safetensors").read_bytes()
    (pair / "m.safetensors").unlink()
    assert pair(*commands(page)).code == 0
    assert (pair / "m.safetensors").read_bytes() == made


def test_no_line_of_a_drawn_plan_runs_behind_a_box(client: Client, pair: Folder) -> None:
    """What is used further on goes around what lies between."""
    inputs = {"in.a": "work/a.safetensors", "in.b": "work/b.safetensors", "preview": "1", "p.alpha": "0.5"}
    text = client.get("merge", **inputs).text
    found = re.findall(r'<rect x="(.+?)" y="(.+?)" width="210" height="46"', text)
    boxes = [(float(x), float(y)) for x, y in found]
    ways = [list(map(float, re.findall(r"[\d.]+", d))) for d in re.findall(r'<path d="(.+?)"', text)]
    assert len(boxes) == 8 and len(ways) > 8
    for x, y, *_, u, v in (way for way in ways if len(way) > 3):
        assert any(x == left + 210 and y == top + 23 for left, top in boxes) or [x - 210, y, x] in ways
        assert any(u == left and v == top + 23 for left, top in boxes) or [u, v, u + 210] in ways
        assert not any(left + 210 > x and left < u for left, _ in boxes), "from one layer to the next alone"
    for x, y, _ in (way for way in ways if len(way) == 3):
        assert not any(left == x and top <= y <= top + 46 for left, top in boxes)


def test_a_preset_sets_the_sliders(client: Client, pair: Folder) -> None:
    fields = {"op": "weighted-sum", "in.a": "work/a.safetensors", "in.b": "work/b.safetensors"}
    page = client.get("merge", **fields, **{"preset.alpha": "GRAD_V", "apply": "1"})
    assert 'value="0.916667" id="b.alpha.IN01"' in page.text


def test_every_operation_has_its_form(client: Client, pair: Folder) -> None:
    for name, operation in MERGES.items():
        page = client.get("merge", op=name)
        assert page.status == 200
        assert all(f'name="in.{i}"' in page.text for i in operation.inputs)
        assert all(f'name="p.{p}"' in page.text for p in operation.params)


def test_a_merge_of_many(client: Client, pair: Folder) -> None:
    fields = {"op": "linear", "many.file.0": "work/a.safetensors", "many.weight.0": "0.25",
              "many.file.1": "work/b.safetensors", "many.weight.1": "0.75", "p.normalize": "true",
              "folder": "work", "name": "m.safetensors", "save": "m.toml"}  # fmt: skip
    done, page = client.job("merge", **fields)
    assert done["state"] == "done", done
    assert commands(page)[:3] == ["merge", f"{pair / 'a.safetensors'}=0.25", f"{pair / 'b.safetensors'}=0.75"]
    assert "a = 0.25" in (pair / "m.toml").read_text() and "b = 0.75" in (pair / "m.toml").read_text()


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"in.b": ""}, "the model `b` is not chosen"),
        ({"p.alpha": "much"}, "`alpha` has to be a number"),
        ({"p.alpha": "nan"}, "alpha"),
        ({"name": "a.safetensors"}, "is there already"),
        ({"name": "m.txt"}, "cannot write"),
        ({"name": "m.safetensors", "save": "m.lock.toml"}, ""),
        ({"in.b": "work/dirty.ckpt"}, ""),
    ],
)
def test_a_merge_that_cannot_be_is_said_at_once(
    client: Client, pair: Folder, changed: dict[str, str], fact: str
) -> None:
    fields = {"op": "weighted-sum", "in.a": "work/a.safetensors", "in.b": "work/b.safetensors",
              "p.alpha": "0.5", "folder": "work", "name": "m.safetensors"}  # fmt: skip
    answer = client.post("merge", **fields | changed)
    assert answer.status == 422 and fact.replace("`", "") in answer.read
    assert not (pair / "m.safetensors").exists()


# -- diff


def test_two_files_are_compared_block_by_block(client: Client, pair: Folder) -> None:
    tensors = dict(model("SD-mini", seed=4))
    name = next(n for n in tensors if ".output_blocks.3." in n and n.endswith("weight"))
    tensors[name] = like(tensors[name], fill=1.0)
    save(pair / "c.safetensors", tensors)
    done, page = client.job("diff", a="work/a.safetensors", b="work/c.safetensors")
    assert done["code"] == 1 and done["result"]["same"] is False
    said = json.loads(pair("diff", "a.safetensors", "c.safetensors", "--json").out)
    for side in "ab":
        assert Path(done["result"][side].pop("path")).name == Path(said[side].pop("path")).name
    assert data(done["result"]) == data(said)
    assert "They differ." in page.read and "Change in each block" in page.read
    rows = page.read.partition("UNET-mini Block")[2]
    assert "OUT03" in rows and "IN00" in rows
    unchanged = client.job("diff", a="work/a.safetensors", b="work/a.safetensors")[1]
    assert "The tensors are the same." in unchanged.read and "nothing changes" in unchanged.read


# -- recipes


def test_problems_of_a_recipe_with_their_lines(client: Client) -> None:
    text = (
        'format = 1\nname = "x"\nbase = "NEW SD-tiny"\nfixs = []\n[sources]\n[components]\nVAE-tiny = "v"\n'
    )
    found = client.post("check", text=text, file="")
    assert found.status == 200
    assert "unknown key fixs" in found.read.replace("`", "") and "did you mean" in found.read
    assert 'data-line="4"' in found.text and 'data-line="7"' in found.text
    assert "things are wrong" in found.read
    syntax = client.post("check", text='format = 1\nname = "\n', file="")
    assert 'data-line="2"' in syntax.text


def test_a_recipe_that_is_right_is_planned(client: Client, folder: Folder) -> None:
    page = client.get("recipe", file="work/tiny.toml")
    assert "Nothing is wrong with it." in page.text and "<svg" in page.text
    for step in folder.plan()["steps"]:
        assert f"<title>{step['label']}: {step['state']}." in page.text
    shown = client.get("api/plan", recipe="work/tiny.toml").json
    assert data(shown) == data(folder.plan(str(folder / "tiny.toml")))
    # A text that is not saved is planned as if it were.
    other = (folder / "tiny.toml").read_text().replace('name = "tiny"', 'name = "other"')
    planned = client.post("check", text=other, file="work/tiny.toml")
    assert "output other.safetensors" in planned.read
    assert "tiny" in (folder / "tiny.toml").read_text(), "checking writes nothing"


def test_a_recipe_is_saved_and_built(client: Client, folder: Folder) -> None:
    text = (folder / "tiny.toml").read_text()
    sent = client.post("save", folder="work", name="new.toml", text=text.replace("\n", "\r\n"), file="")
    assert sent.status == 303 and sent.headers["Location"] == "recipe?saved=1&file=work%2Fnew.toml"
    assert (folder / "new.toml").read_text() == text
    done, page = client.job("build", file="work/new.toml")
    assert done["state"] == "done", done
    assert folder.build("tiny.toml")["outputs"][0]["sha256"] == done["result"]["outputs"][0]["sha256"]
    assert done["result"]["outputs"][0]["sha256"] in page.text
    assert (folder / "new.lock.toml").exists()
    assert folder(*commands(page)).code == 0
    again, _ = client.job("build", file="work/new.toml", locked="1", offline="1", check="1")
    assert again["result"]["outputs"][0]["state"] == "unchanged"


def test_recipes_are_built_as_one(client: Client, folder: Folder) -> None:
    text = (folder / "tiny.toml").read_text()
    folder.write("other.toml", text.replace('name = "tiny"', 'name = "other"'))
    folder.write(
        "wrong.toml", text.replace("vae.safetensors", "gone.safetensors").replace("tiny", "wrong", 1)
    )
    both = ["work/tiny.toml", "work/other.toml"]
    assert client.get("recipe").text.count('type="checkbox" name="file"') == 3
    done, page = client.job("build", file=both)
    assert done["state"] == "done", done
    assert [r["state"] for r in done["result"]["recipes"]] == ["built", "built"]
    assert folder(*commands(page)).out.endswith("2 recipes: 2 built\n")
    done, page = client.job("build", file=[*both, "work/wrong.toml"])
    assert done["state"] == "failed" and "nowhere to be found" in page.read
    done, page = client.job("build", file=[*both, "work/wrong.toml"], keep_going="1", offline="1")
    assert [r["state"] for r in done["result"]["recipes"]] == ["built", "built", "failed"]
    assert "nowhere to be found" in page.read and "other.safetensors" in page.read
    refused = client.post("build", address="somewhere", folder="work")
    assert refused.status == 422 and "is no address of a recipe" in refused.read


def test_a_recipe_that_changed_meanwhile_stays(client: Client, folder: Folder) -> None:

    page = client.get("recipe", file="work/tiny.toml")
    seen = re.search(r'name="seen" value="([0-9a-f]{64})"', page.text)
    assert seen is not None
    text = (folder / "tiny.toml").read_text()
    (folder / "tiny.toml").write_text(text + "# mine\n")
    refused = client.post("save", file="work/tiny.toml", text="lost", seen=seen[1])
    assert refused.status == 422 and "changed since" in refused.read
    assert (folder / "tiny.toml").read_text() == text + "# mine\n"
    assert client.post("save", folder="work", name="tiny.toml", text="lost", file="").status == 422


def test_a_build_that_fails_says_why(client: Client, folder: Folder) -> None:
    (folder / "vae.safetensors").unlink()
    done, page = client.job("build", file="work/tiny.toml", offline="1")
    assert done["state"] == "failed" and done["code"] == 5
    assert "nowhere to be found" in page.read and "hint:" in page.read
    assert not (folder / "tiny.safetensors").exists()


# -- work


def test_progress_comes_as_events(client: Client) -> None:
    seen = threading.Event()
    go = threading.Event()

    def work(job: Job) -> Outcome:
        job.start("reading <x>", 100)
        job.advance("reading <x>", 40)
        seen.set()
        go.wait(30)
        job.finish("reading <x>")
        return Outcome(tag("p", "made"), {"schema": 1})

    job = client.server.site.jobs.add("Work", work)
    assert seen.wait(30)
    connection = HTTPConnection(HOST, client.server.port, timeout=30)
    headers = {"Cookie": f"ckpt={client.server.session.token}"}
    connection.request("GET", f"{client.server.session.path}events?job={job.number}", headers=headers)
    stream = connection.getresponse()
    assert stream.headers["Content-Type"] == "text/event-stream"
    assert stream.readline() == b"event: progress\n"
    data = json.loads(stream.readline().removeprefix(b"data: "))
    assert data["tasks"][0].pop("told").startswith("40 B of 100 B")
    assert data == {"state": "running", "tasks": [{"task": "reading <x>", "done": 40, "total": 100}]}
    page = client.get("job", id=str(job.number))
    assert "reading &lt;x&gt;" in page.text and 'http-equiv="refresh"' in page.text, "without script, too"
    assert 'role="status"' in page.text
    go.set()
    rest = stream.read()
    assert b"event: over" in rest
    connection.close()
    assert client.ask("GET", f"{client.server.session.path}events?job=99").status == 404


def test_progress_has_a_rate_and_the_time_left() -> None:
    assert Task(100, 5.0, 40).told(5.5) == "40 B of 100 B", "no rate of a moment"
    assert Task(10**9, 5.0, 10**8).told(15.0) == "100 MB of 1.0 GB, 10.0 MB/s, 90 s left"
    assert Task(10**9, 5.0, 2 * 10**7).told(15.0) == "20.0 MB of 1.0 GB, 2.0 MB/s, 8 min left"
    assert Task(0, 5.0, 10**7).told(15.0) == "10.0 MB, 1.0 MB/s"


def test_work_is_cancelled(client: Client) -> None:
    """What is under way, when it next tells of itself; and what waits, at once."""
    begun = threading.Event()

    def work(job: Job) -> Outcome:
        job.start("reading", 0)
        while True:
            job.advance("reading", 1)
            begun.set()
            time.sleep(0.001)

    first = client.server.site.jobs.add("Endless", work)
    second = client.server.site.jobs.add("Waiting", work)
    assert begun.wait(30)
    assert second.state == "waiting"
    assert client.post("cancel", id="2").status == 303
    assert second.state == "cancelled" and "nothing half made is left" in client.get("job", id="2").read
    assert "Cancel" in client.get("jobs").read
    client.post("cancel", id="1")
    deadline = time.monotonic() + 30
    while not first.over and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.to_json()["state"] == "cancelled" and first.code == 130
    assert "Cancel" not in client.get("jobs").text
    assert client.job("store-check")[0]["state"] == "done", "the next is done"


def test_a_mistake_of_ours_ends_one_job_alone(folder: Folder) -> None:
    def work(job: Job) -> Outcome:
        raise AssertionError("a mistake")

    with served(folder) as client:
        job = client.server.site.jobs.add("Wrong", work)
        deadline = time.monotonic() + 30
        while not job.over and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("api/job", id="1").json["code"] == 70
        assert "a mistake in ckpt itself" in client.get("job", id="1").read
        assert client.job("store-check")[0]["state"] == "done"
        assert [str(f) for f in client.faults] == ["a mistake"]
        client.faults.clear()


def test_what_is_stopped_while_it_reads_leaves_nothing(folder: Folder) -> None:
    """Each time that work tells of its progress it can be stopped: the first, the second, and so on."""
    before = files(folder.path)
    for count in (1, 2, 3):
        job = _Stopping(1, "Build", lambda job: Outcome(tag("p"), {}))
        job.left = count
        with (
            Workspace(Settings.from_environment(folder.variables), offline=True, reporter=job) as workspace,
            workspace.sources() as sources,
            pytest.raises(CkptError),
        ):
            build_recipe(workspace, workspace.recipe(folder / "tiny.toml"), sources)
        assert files(folder.path) == before, count


class _Stopping(Job):
    """Is stopped when it is told of progress for so many times."""

    left = 0

    def advance(self, task: str, count: int) -> None:
        self.left -= 1
        if self.left <= 0:
            self.stop.set()
        super().advance(task, count)


def test_work_is_done_one_after_the_other_and_listed(client: Client) -> None:
    for view in ("jobs", "store"):
        assert client.get(view).status == 200
    client.job("prune", file="work/dirty.ckpt", folder="work", name="one.safetensors")
    client.job("prune", file="work/dirty.ckpt", folder="work", name="two.safetensors")
    page = client.get("jobs")
    assert page.read.index("Prune dirty.ckpt") and page.text.count("job?id=") == 2
    assert client.get("job", id="3").status == 422
    assert client.get("job", id="x").status == 422
    assert client.get("api/job", id="-1").json["code"] == 2


# -- the inbox and the store


def test_the_inbox_is_sorted(folder: Folder) -> None:

    inbox, models = folder / "inbox", folder / "models"
    inbox.mkdir()
    (models / "Stable-diffusion").mkdir(parents=True)
    (models / "VAE").mkdir()
    save_dirty(inbox / "new.ckpt")
    save(inbox / "some.vae.pt", model("VAE-tiny"))
    (inbox / "broken.ckpt").write_bytes(b"nothing")
    past = time.time() - 3600
    for path in inbox.iterdir():
        os.utime(path, (past, past))
    with served(folder) as client:
        page = client.get("inbox", inbox="work/inbox")
        assert "3 files in it" in page.read and "new.ckpt" in page.text
        done, page = client.job("inbox", inbox="work/inbox", into="work/models", layout="a1111")
        assert done["state"] == "done", done
        states = {Path(e["path"]).name: e["state"] for e in done["result"]["events"]}
        assert states["new.ckpt"] == "pruned"
        assert (models / "Stable-diffusion" / "new.safetensors").exists()
        assert "pruned, and moved" in page.read
        words = commands(page)
        assert words[:3] == ["prune", "--watch", str(inbox)] and "--once" in words
        assert folder(*words, "--settle", "0").code in (0, 6, 7)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_inbox_that_is_stopped_stays_as_it_is(folder: Folder, count: int) -> None:
    """Nothing is wrong with its files: none of them goes to Failed."""
    inbox = folder / "inbox"
    inbox.mkdir()
    for name in ("one.ckpt", "two.ckpt"):
        save_dirty(inbox / name)
        os.utime(inbox / name, (1, 1))
    job = _Stopping(1, "Sort", lambda job: Outcome(tag("p"), {}))
    job.left = count
    with (
        Workspace(Settings.from_environment(folder.variables), offline=True, reporter=job) as workspace,
        pytest.raises(Cancelled),
    ):
        found = list(Watch(inbox, inbox, "a1111", Options(), workspace, settle=0).poll())
        assert not found, found
    assert sorted(p.name for p in inbox.rglob("*") if p.is_file()) == ["one.ckpt", "two.ckpt"]
    assert not (inbox / "Failed").exists()


def test_the_store_is_shown_trimmed_and_checked(client: Client, folder: Folder) -> None:
    assert client.job("build", file="work/tiny.toml")[0]["state"] == "done"
    page = client.get("store")
    assert "UNET-tiny-SD" in page.text and "tiny.safetensors" in page.text
    assert data(client.get("api/store").json) == data(folder("store", "list", "--json").json)
    done, page = client.job("store-check")
    assert done["code"] == 0 and "all sound" in page.read
    done, _ = client.job("gc", size="1B")
    assert done["state"] == "done" and done["result"]["schema"] == 1
    assert client.post("gc", size="many").status == 422


# -- the frame


def test_every_view_can_be_used_without_seeing_it(client: Client) -> None:
    """A title, a language, one heading of the first order, a way past the navigation, a name for all."""

    for view, fields in {
        "": {}, "report": {"file": "work/dirty.ckpt"}, "prune": {"file": "work/dirty.ckpt"}, "diff": {},
        "replace": {"base": "work/dirty.ckpt"}, "extract": {"file": "work/dirty.ckpt"},
        "merge": {"in.a": "work/dirty.ckpt"}, "recipe": {"file": "work/tiny.toml"}, "inbox": {},
        "store": {}, "jobs": {},
    }.items():  # fmt: skip
        text = client.get(view, **fields).text
        assert '<html lang="en">' in text and re.search(r"<title>.+ – ckpt</title>", text), view
        assert text.count("<h1>") == 1 and 'href="#content"' in text and 'id="content"' in text
        for control in re.findall(r"<(?:input|select|textarea)\b[^>]*>", text):
            if 'type="hidden"' in control:
                continue
            own = re.search(r' id="([^"]+)"', control)
            inside = re.search(rf"<label>(?:(?!</label>).)*{re.escape(control)}", text, re.DOTALL)
            labelled = own is not None and f'for="{own[1]}"' in text
            assert inside or labelled or "aria-label=" in control, (view, control)
        for drawing in re.findall(r"<svg\b[^>]*>", text):
            assert 'role="img" aria-labelledby=' in drawing or 'aria-hidden="true"' in drawing, view
        assert set(re.findall(r' id="([^"]+)"', text)).__len__() == len(re.findall(r' id="([^"]+)"', text))


def test_a_command_line_can_be_pasted() -> None:
    assert command_line("prune", Path("a b.ckpt"), "it's") == "ckpt prune 'a b.ckpt' 'it'\"'\"'s'"
    hostile = command_line("inspect", "a\n\u202e'\\\udcff")
    assert hostile == r"ckpt inspect $'a\U0000000a\U0000202e\'\\\xff'"

    said = subprocess.run(["bash", "-c", f"ckpt() {{ printf %s \"$2\"; }}; {hostile}"], capture_output=True,
                          check=True, env={"LC_ALL": "C.UTF-8"})  # fmt: skip
    assert said.stdout == "a\n\u202e'\\".encode() + b"\xff"


def test_colours_can_be_told_apart() -> None:
    """4.5 to 1 between text and what is behind it, light and dark, as WCAG has it."""
    css = (Path(module.__file__).parent / "static" / "page.css").read_text()
    for palette in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", palette))
        for ink in ("ink", "soft", "accent", "good", "bad", "caution"):
            for paper in ("paper", "tint"):
                assert _contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert _contrast(colours["on-accent"], colours["accent"]) >= 4.5


def _contrast(a: str, b: str) -> float:
    light, dark = sorted(map(_luminance, (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_a_folder_whose_name_begins_as_a_new_model_does(folder: Folder) -> None:
    (folder / "NEW models").mkdir()
    (folder / "dirty.ckpt").rename(folder / "NEW models" / "a.ckpt")
    with served(folder, folder / "NEW models") as client:
        slots = client.get("replace", base="NEW models/a.ckpt")
    assert slots.status == 200 and "Slots of SD-tiny" in slots.read


@pytest.mark.parametrize("view", ["replace", "merge"])
def test_a_preview_is_of_a_file_in_the_folders(client: Client, folder: Folder, view: str) -> None:
    fields = {
        "replace": {"base": "work/dirty.ckpt", "slot.VAE-tiny": "|work/vae.safetensors"},
        "merge": {"in.a": "work/dirty.ckpt", "in.b": "work/dirty.ckpt", "p.alpha": "0.5"},
    }
    page = client.get(view, **fields[view], folder="work", name="../store/x.safetensors", preview="1")
    assert "../store/x.safetensors cannot be the name of a file" in page.read
