"""A page about a model: recipe, lock, card and the fields that Civitai asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from builder.formats.hashes import file_hashes
from builder.models.catalog import load_catalog
from builder.recipe.names import FORMS
from builder.tensors.lazy import LazyTensor
from builder.toolkit.licences import LICENCES, Terms, contradictions, terms_of
from builder.toolkit.share import _CONTAINERS, _beside
from tests.help.building import IDS, Folder, files, model, save
from tests.help.network import Net, dirty, hosts, sha256, vae
from tests.help.servers import COMMIT, File, civitai, hugging_face, says

RECIPE = """\
format = 1
name = "tiny"
description = "A dirty one, made tidy"
base = "dirty"
metadata.license = "MIT"
metadata.tags = "anime, a | b"
sources.dirty.file = "dirty.ckpt"
sources.dirty.urls = ["hf://org/dirty/dirty.ckpt"]
sources.vae.file = "vae.safetensors"
sources.vae.urls = ["hf://org/vae/vae.safetensors"]
components.VAE-tiny = "vae"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with a recipe that was built."""
    made = Folder.below(tmp_path).tiny()
    made.write("tiny.toml", RECIPE)
    made.build()
    return made


def share(folder: Folder, *options: object) -> dict[str, Any]:
    return folder("share", "tiny.toml", "--offline", "--json", *options).json


def tell(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with metadata."""
    data = {n: np.frombuffer(t.tobytes(), "<f4").reshape(t.shape) for n, t in tensors.items() if n != IDS}
    save_file(data, path, metadata=metadata)


def card(folder: Folder) -> tuple[dict[str, Any], str]:
    """The front matter as YAML has it, and the page below."""
    yaml = pytest.importorskip("yaml")
    text = (folder / "tiny-page" / "README.md").read_text(encoding="utf-8")
    _, front, page = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found, page


def test_what_is_written(folder: Folder) -> None:
    said = share(folder)
    assert said["folder"] == "tiny-page"
    assert set(said["files"]) == {"tiny.toml", "tiny.lock.toml", "README.md", "civitai.json"}
    assert files(folder / "tiny-page") == set(said["files"])
    for name in ("tiny.toml", "tiny.lock.toml"):
        assert (folder / "tiny-page" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((folder / "tiny-page" / "civitai.json").read_text()) == said["page"]


def test_the_model_card(folder: Folder) -> None:
    share(folder)
    front, page = card(folder)
    assert front == {
        "license": "mit",
        "base_model": ["org/dirty", "org/vae"],
        "base_model_relation": "merge",
        "tags": ["anime", "a | b", "merge", "ckpt-build"],
    }
    assert "# tiny\n" in page and "A dirty one, made tidy" in page
    assert file_hashes(folder / "tiny.safetensors")["SHA256"] in page


def test_the_card_is_one_to_hugging_face(folder: Folder) -> None:
    hub = pytest.importorskip("huggingface_hub")
    share(folder)
    data = hub.ModelCard.load(folder / "tiny-page" / "README.md").data
    assert (data.license, data.base_model) == ("mit", ["org/dirty", "org/vae"])


def test_the_fields_of_civitai(folder: Folder) -> None:
    page = share(folder)["page"]
    (made,) = page["files"]
    hashes = file_hashes(folder / "tiny.safetensors")
    expected = {k: str(hashes[k]).upper() for k in made["hashes"]}
    assert made["hashes"] == expected and {"SHA256", "AutoV2", "AutoV3", "CRC32", "BLAKE3"} <= expected.keys()
    assert made["bytes"] == (folder / "tiny.safetensors").stat().st_size
    assert made["metadata"] == {"format": "SafeTensor", "size": "pruned", "fp": "fp16"}
    assert [(p["name"], p["file"]) for p in page["lineage"]] == [
        ("dirty", "dirty.ckpt"),
        ("vae", "vae.safetensors"),
    ]
    assert page["lineage"][0]["sha256"] == sha256((folder / "dirty.ckpt").read_bytes())
    assert page["type"] == "Checkpoint"


def test_another_licence(folder: Folder) -> None:
    for said, front in (
        ("My own [++] licence.", {"license": "other", "license_name": "my-own-licence"}),
        (
            "Fair AI Public License 1.0-SD",
            {
                "license": "other",
                "license_name": "fair-ai-public-license-1.0-sd",
                "license_link": "https://freedevproject.org/faipl-1.0-sd/",
            },
        ),
        ("CreativeML Open RAIL++-M License", {"license": "openrail++"}),
    ):
        folder.write("tiny.toml", RECIPE.replace("MIT", said))
        folder.build()
        share(folder)
        found = card(folder)[0]
        assert {k: v for k, v in found.items() if k.startswith("license")} == front
        for path in (folder / "tiny-page").iterdir():
            path.unlink()


def test_strange_words_stay_words(folder: Folder) -> None:
    strange = 'metadata.tags = "x\\"y: z, ---, \\u001b[2J, # no, no, Null, [a](javascript:b)"'
    text = RECIPE.replace('metadata.tags = "anime, a | b"', strange)
    folder.write("tiny.toml", text.replace("A dirty one, made tidy", "<script>x</script> [a](b) | `c`"))
    folder.build()
    share(folder)
    front, page = card(folder)
    assert front["tags"][:6] == ['x"y: z', "---", "\\x1b[2J", "# no", "no", "Null"]
    assert "<script>" not in page.replace("\\<", "") and "\x1b" not in page and "\\[a\\](b)" in page


def test_nothing_is_replaced(folder: Folder) -> None:
    share(folder)
    before = (folder / "tiny-page" / "README.md").read_bytes()
    said = folder("share", "tiny.toml", "--offline")
    assert said.code == 7 and "`tiny-page` exists already" in said.err
    said = folder("share", "tiny.toml", "-o", "none/page")
    assert said.code == 7 and said.err.startswith("error: cannot write `none/page`\n"), "before all else"
    assert (folder / "tiny-page" / "README.md").read_bytes() == before
    assert share(folder, "-o", "other")["folder"] == "other"


def test_what_was_not_built_is_not_shared(folder: Folder) -> None:
    (folder / "tiny.safetensors").unlink()
    said = folder("share", "tiny.toml", "--offline")
    assert said.code == 0 and "`tiny.safetensors` is not here" in said.err
    page = json.loads((folder / "tiny-page" / "civitai.json").read_text())
    assert page["files"][0]["hashes"].keys() == {"SHA256", "AutoV2"}
    save(folder / "tiny.safetensors", model("VAE-tiny", seed=5))
    said = folder("share", "tiny.toml", "--offline", "-o", "b")
    assert said.code == 7 and "is not what the lock says" in said.err and not (folder / "b").exists()
    folder.write("tiny.toml", RECIPE.replace('"vae"\n', '"dirty"\n').replace("sources.vae", "# sources.vae"))
    said = folder("share", "tiny.toml", "--offline", "-o", "b")
    assert said.code == 4 and "`ckpt build tiny.toml`" in said.err
    (folder / "tiny.lock.toml").unlink()
    assert folder("share", "tiny.toml", "--offline", "-o", "b").code == 4
    assert folder("share", "https://example.org/tiny.toml").code == 2


def test_a_source_that_others_cannot_have(folder: Folder) -> None:
    folder.write("tiny.toml", RECIPE.replace('sources.vae.urls = ["hf://org/vae/vae.safetensors"]\n', ""))
    folder.build()
    said = folder("share", "tiny.toml", "--offline")
    assert (
        said.code == 0
        and "others cannot have every source" in said.err
        and "vae: vae.safetensors" in said.err
    )


def test_what_the_recipe_needs_goes_along(folder: Folder) -> None:
    folder.write("parts/tiny.toml", RECIPE.replace('"dirty.c', '"../dirty.c').replace('"vae.s', '"../vae.s'))
    folder.write("parts/model.yaml", "model: {}\n")
    text = 'format = 1\nname = "tiny"\nbase = "inner"\nsources.inner.recipe = "parts/tiny.toml"\n'
    folder.write("tiny.toml", text + 'output.config = "parts/model.yaml"\n')
    folder.build()
    said = share(folder)
    assert {"parts/tiny.toml", "parts/model.yaml"} <= set(said["files"])
    assert [p["name"] for p in said["page"]["lineage"]] == ["inner/dirty", "inner/vae"]
    other = replace(folder, path=folder / "tiny-page", store=folder.path.parent / "cold")
    for name in ("dirty.ckpt", "vae.safetensors"):
        (other / name).write_bytes((folder / name).read_bytes())
    assert other("build", "tiny.toml", "--locked").code == 0


def test_the_files_of_a_tokenizer_go_along(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    text = 'format = 1\nname = "x"\nbase = "s"\nsources.s.file = "s.safetensors"\n'
    folder.write("x.toml", text + 'output.file = "x/"\noutput.tokenizer = "words"\n')
    for name in ("words/merges.txt", "words/tokenizer_2/vocab.json", "words/tokenizer_2/notes.txt"):
        folder.write(name, name)
    (folder / "words" / "vocab.json").symlink_to(folder.write("../secret", "mine"))
    with folder.workspace() as workspace:
        found = dict(_beside(workspace.recipe(folder / "x.toml"), folder.path, workspace.catalog))
    assert found == {n: n.encode() for n in ("words/merges.txt", "words/tokenizer_2/vocab.json")}


# -- licences


def test_licences_that_files_tell_of(folder: Folder) -> None:
    told = {"modelspec.license": "CC-BY-NC-4.0"}
    (folder / "tiny.lock.toml").unlink()
    tell(folder / "vae.safetensors", model("VAE-tiny", seed=2), told)
    folder.build()
    said = folder("share", "tiny.toml", "--offline")
    assert "warning: the licence `mit` allows commercial use: that of `vae` is against it" in said.err
    assert "vae: cc-by-nc-4.0 (no commercial use)" in said.err
    page = json.loads((folder / "tiny-page" / "civitai.json").read_text())
    assert [p["license"] for p in page["lineage"]] == [None, "CC-BY-NC-4.0"]


def test_without_a_licence(folder: Folder) -> None:
    told = {"modelspec.license": "openrail++"}
    (folder / "tiny.lock.toml").unlink()
    for name, kind in (("vae.safetensors", "VAE-tiny"), ("dirty.safetensors", "SD-tiny")):
        tell(folder / name, model(kind, seed=2), told)
    text = RECIPE.replace('metadata.license = "MIT"\n', "").replace('"dirty.ckpt"', '"dirty.safetensors"')
    folder.write("tiny.toml", text)
    folder.build()
    said = folder("share", "tiny.toml", "--offline")
    assert "no licence is said of `tiny`" in said.err and "that of every source is openrail++" in said.err
    assert "license" not in card(folder)[0]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with hosts(tmp_path) as running:
        yield running


def test_licences_that_hosts_state(net: Net) -> None:
    hugging_face(net.hub, net.storage, "org/dirty", "dirty.ckpt", dirty())
    about = {
        "id": "org/dirty",
        "cardData": {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
    }
    net.hub.routes["/api/models/org/dirty"] = says(200, json.dumps(about))
    civitai(net.civitai, net.storage, 42, 99, vae())
    allowed = {
        "id": 7,
        "allowCommercialUse": ["Image"],
        "allowDerivatives": False,
        "allowDifferentLicense": True,
    }
    net.civitai.routes["/api/v1/models/7"] = says(200, json.dumps(allowed))
    text = RECIPE.replace('sources.vae.file = "vae.safetensors"\n', "").replace(
        "hf://org/vae/vae.safetensors", "civitai:42@99"
    )
    net.folder.write("tiny.toml", text.replace('sources.dirty.file = "dirty.ckpt"\n', ""))
    net.folder.build()
    said = net.folder("share", "tiny.toml")
    assert said.code == 0, said.err
    assert "the licence `mit` allows commercial use: that of `dirty` is against it" in said.err
    assert "the licence `mit` passes on no restrictions of use: that of `dirty`" in said.err
    assert "nothing that is made of `vae` may be shared, by its licence" in said.err
    assert "the licence `mit` allows any commercial use: that of `vae` is against it" in said.err
    assert card(net.folder)[0]["base_model"] == ["org/dirty"]
    asked = net.requests
    assert net.folder("share", "tiny.toml", "--offline", "-o", "b").code == 0 and net.requests == asked


def test_a_host_that_does_not_answer_is_told_of(net: Net) -> None:
    """And asked for one source alone."""
    hugging_face(net.hub, net.storage, "org/dirty", "dirty.ckpt", dirty())
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    net.folder.write("tiny.toml", RECIPE)
    net.folder.build()
    said = net.folder("share", "tiny.toml", "--offline")
    assert f"dirty: hf://org/dirty@{COMMIT}/dirty.ckpt was not asked: the network is off" in said.err
    for repo in ("dirty", "vae"):
        net.hub.routes[f"/api/models/org/{repo}"] = says(501, "closed")
    said = net.folder("share", "tiny.toml", "-o", "a")
    assert (
        said.code == 0 and f"dirty: hf://org/dirty@{COMMIT}/dirty.ckpt: `127.0.0.1` answers 501" in said.err
    )
    for repo in ("dirty", "vae"):
        net.hub.routes[f"/api/models/org/{repo}"] = says(503, "busy", Retry_After="3600")
    said = net.folder("share", "tiny.toml", "-o", "b")
    assert said.code == 0 and f"vae: hf://org/vae@{COMMIT}/vae.safetensors was not asked: " in said.err


@pytest.mark.parametrize("body", ["{}", '{"cardData": 3}', '{"cardData": {"license": ["mit"]}}'])
def test_what_hosts_may_state(net: Net, body: str) -> None:
    net.storage.routes["/dirty.ckpt"] = File(dirty())
    hugging_face(net.hub, net.storage, "org/dirty", "dirty.ckpt", dirty())
    hugging_face(net.hub, net.storage, "org/vae", "vae.safetensors", vae())
    net.hub.routes["/api/models/org/dirty"] = says(200, body)
    net.folder.write("tiny.toml", RECIPE)
    net.folder.build()
    said = net.folder("share", "tiny.toml", "--json")
    assert said.code == 0 and said.json["page"]["lineage"][0]["license"] is None


def test_the_page_builds_by_its_address(net: Net) -> None:
    for name, data in (("dirty", dirty()), ("vae", vae())):
        file = {"dirty": "dirty.ckpt", "vae": "vae.safetensors"}[name]
        hugging_face(net.hub, net.storage, f"org/{name}", file, data)
        (net.folder / file).write_bytes(data)
    net.folder.write("tiny.toml", RECIPE)
    net.folder.build()
    page = net.folder("share", "tiny.toml", "--offline", "--json").json
    for name in page["files"]:
        net.storage.routes[f"/page/{name}"] = says(200, (net.folder / "tiny-page" / name).read_bytes())
    here = net.machine("reader")
    (here / "tiny.toml").unlink()
    (here / "tiny.lock.toml").unlink()
    assert here("build", net.storage.url("/page/tiny.toml")).code == 0
    assert (
        sha256((here / "tiny.safetensors").read_bytes()).upper()
        == page["page"]["files"][0]["hashes"]["SHA256"]
    )


NC, ND, SA = LICENCES["cc-by-nc-4.0"], LICENCES["cc-by-nd-4.0"], LICENCES["cc-by-sa-4.0"]
GPL, RAIL, MIT = LICENCES["gpl-3.0"], LICENCES["openrail++"], LICENCES["mit"]
GPL2, FAIR, SAI = (
    LICENCES["gpl-2.0"],
    LICENCES["fair-ai-public-license-1.0-sd"],
    terms_of("Stability AI Community"),
)
FLUX, PAGE = LICENCES["flux-1-dev-non-commercial-license"], Terms("the permissions on its page", alike=True)


@pytest.mark.parametrize(
    ("product", "sources", "facts"),
    [
        (MIT, [MIT], []),
        (RAIL, [MIT, RAIL, LICENCES["creativeml-openrail-m"]], []),
        (NC, [MIT, NC], []),
        (GPL, [MIT, GPL], []),
        (None, [RAIL, NC], []),
        (None, [ND], ["nothing that is made of `a` may be shared, by its licence"]),
        (RAIL, [SAI], ["the licence `openrail++` allows any commercial use: that of `a` is against it"]),
        (SAI, [SAI, RAIL, MIT], []),
        (
            NC,
            [SAI],
            ["the licence `cc-by-nc-4.0` passes on no restrictions of use: that of `a` is against it"],
        ),
        (FAIR, [FAIR, RAIL], []),
        (None, [FAIR, SAI], ["the licences of `a` and `b` exclude each other"]),
        (FLUX, [FLUX, MIT, RAIL], []),
        (None, [FLUX, FAIR], ["the licences of `a` and `b` exclude each other"]),
        (MIT, [PAGE], ["the licence `mit` is another one: that of `a` is against it"]),
        (GPL, [SA, LICENCES["cc-by-sa-3.0"], LICENCES["lgpl-3.0"]], []),
        (SA, [GPL], ["the licence `cc-by-sa-4.0` is another one: that of `a` is against it"]),
        (MIT, [RAIL], ["the licence `mit` passes on no restrictions of use: that of `a` is against it"]),
        (RAIL, [NC], ["the licence `openrail++` allows commercial use: that of `a` is against it"]),
        (MIT, [SA], ["the licence `mit` is another one: that of `a` is against it"]),
        (None, [GPL2, SA], ["the licences of `a` and `b` exclude each other"]),
        (None, [GPL, SA], []),
        (None, [GPL, RAIL], ["the licences of `a` and `b` exclude each other"]),
        (None, [NC, SA], ["the licences of `a` and `b` exclude each other"]),
        (None, [LICENCES["cc-by-nc-sa-4.0"], NC], []),
    ],
)
def test_contradictions(product: Terms | None, sources: list[Terms], facts: list[str]) -> None:
    named = dict(zip("abc", sources, strict=False))
    assert [p.fact for p in contradictions(product, named)] == facts


def test_licences_by_any_spelling() -> None:
    assert terms_of("Apache License 2.0") is LICENCES["apache-2.0"]
    assert terms_of("CreativeML OpenRAIL-M") is LICENCES["creativeml-openrail-m"]
    assert terms_of("creativeml open rail m license") is LICENCES["creativeml-openrail-m"]
    assert terms_of("My own") is None and terms_of("") is None
    assert terms_of("FLUX.1 [dev] Non-Commercial License") is FLUX and terms_of("faipl-1.0-sd") is FAIR
    assert SAI is not None and SAI.limited and not FLUX.commercial
    assert all(t.other or not t.link for t in LICENCES.values())


def test_every_form_of_output_has_a_name_at_civitai() -> None:
    assert _CONTAINERS.keys() == {*FORMS.values(), "diffusers"} and _CONTAINERS["gguf"] == "GGUF"


def test_names_of_civitai_are_of_what_the_catalog_knows() -> None:
    catalog = load_catalog(())
    models = {m for c in catalog.components.values() for m in c.models}
    site = catalog.sites["civitai"]
    assert not site["models"].keys() - catalog.architectures.keys() - models
    kinds = {c.partition("-")[0] for c in catalog.classes} | {k.kind for k in catalog.kinds}
    assert not site["kinds"].keys() - kinds
