"""Recipes by their addresses: fetched with their locks, and treated as a stranger's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.addresses import HuggingFace, Web
from builder.base.errors import CkptError, FetchError, UsageError
from builder.base.recipe_address import Git, beside, is_address, parse_recipe_address
from builder.sources.net import git
from ckpt_build import Workspace
from tests.help.building import Folder, files, save_dirty
from tests.help.network import Net, dirty, hosts, sha256, vae
from tests.help.pages import served
from tests.help.servers import (
    COMMIT,
    Server,
    certificate,
    dribble,
    git_host,
    hugging_face,
    redirects,
    says,
    tls_server_context,
)

OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with hosts(tmp_path) as running:
        yield running


@pytest.fixture
def author(net: Net) -> Folder:
    """The author's folder: the recipe, its sources beside it, what was built and its lock."""
    (net.folder / "dirty.ckpt").write_bytes(dirty())
    (net.folder / "vae.safetensors").write_bytes(vae())
    net.write(f'file = "dirty.ckpt"\nsha256 = "{sha256(dirty())}"', 'file = "vae.safetensors"')
    net.folder.build()
    return net.folder


def reader(net: Net, name: str = "reader") -> Folder:
    """Another machine, whose folder is empty."""
    path = net.folder.path.parent.parent / name / "work"
    path.mkdir(parents=True)
    return replace(net.folder, path=path, store=path.parent / "store")


def serve(net: Net, author: Folder, *without: str) -> str:
    """Put all of a folder but some files on a site; the recipe's address."""
    for name in files(author.path) - {*without, "parts"}:
        net.storage.routes[f"/models/{name}"] = says(200, (author / name).read_bytes())
    return net.storage.url("/models/tiny.toml")


def repository(author: Folder) -> tuple[Path, str]:
    """A bare repository with the author's recipe and lock in a folder of it, and its commit."""
    work, bare = author.path.parent / "clone", author.path.parent / "repo.git"
    run(author.path.parent, "init", "-q", "-b", "main", str(work))
    for name in ("tiny.toml", "tiny.lock.toml"):
        (work / "recipes").mkdir(exist_ok=True)
        (work / "recipes" / name).write_bytes((author / name).read_bytes())
    (work / "large.bin").write_bytes(os.urandom(3_000_000))
    (work / "link.toml").symlink_to("recipes/tiny.toml")
    (work / "folder").symlink_to("recipes")
    commit(work)
    module = f"160000,{OTHER},module.toml"
    run(work, "update-index", "--add", "--cacheinfo", module)
    run(work, "commit", "-q", "-m", "a module")
    run(author.path.parent, "clone", "-q", "--bare", str(work), str(bare))
    return bare, run(bare, "rev-parse", "HEAD")


def run(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", *who, *command], cwd=folder, text=True).strip()


def commit(work: Path) -> None:
    run(work, "add", "-A")
    run(work, "commit", "-q", "-m", "a change")


# -- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://example.org/a/x.toml", Web("https://example.org/a/x.toml")),
        ("https://example.org/a/x.toml?ref=v1", Web("https://example.org/a/x.toml?ref=v1")),
        ("hf://org/name/recipes/x.toml", HuggingFace("org/name", "recipes/x.toml")),
        ("https://huggingface.co/org/name/resolve/v1/x.toml", HuggingFace("org/name", "x.toml", "v1")),
        ("git+https://example.org/r.git#x.toml", Git("https://example.org/r.git", "x.toml")),
        (f"git+https://h/r#a/x.toml@{COMMIT}", Git("https://h/r", "a/x.toml", COMMIT)),
        ("git+https://h/r#a%40b.toml@feature/x", Git("https://h/r", "a@b.toml", "feature/x")),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert is_address(text)
    assert parse_recipe_address(text) == address
    assert parse_recipe_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/model.safetensors",
        "https://example.org/x.lock.toml",
        "https://user:secret@example.org/x.toml",
        "https://example.org/x.toml?token=secret",
        "hf://org/name/x.yaml",
        "git+https://user:secret@example.org/r#x.toml",
        "git+https://example.org/r?token=x#x.toml",
        "git+https://example.org/r",
        "git+https://example.org/r#../x.toml",
        "git+https://example.org/r#x.toml@--upload-pack=evil",
        "git+https://example.org/r#x.toml@a:b",
        "git+https://example.org/r#x.toml@a..b",
        "git+ssh://example.org/r#x.toml",
        "git+ext::sh#x.toml",
        "git+file:///srv/r#x.toml",
        "ftp://user:secret@example.org/x.toml",
        "file:///srv/x.toml",
        "git+https://-oProxyCommand=x/r#x.toml",
        "https://github.com/org/name/blob/main/x.toml",
        "https://huggingface.co/org/name/blob/main/x.toml",
    ],
)
def test_what_is_no_address_of_a_recipe(text: str) -> None:
    with pytest.raises(CkptError) as refused:
        parse_recipe_address(text)
    assert "secret" not in str(refused.value).replace("a secret", "") and "hint" in str(refused.value)


@given(
    st.text(max_size=40)
    | st.from_regex(r"(hf://|https://|git\+https://)[!-~]{0,40}\.toml(@[!-~]{0,10})?", fullmatch=True)
    | st.from_regex(r"git\+https://[a-z\[\]:.]{1,8}/[a-z]#[!-~]{1,20}\.toml", fullmatch=True)
)
@settings(max_examples=400)
def test_any_text_is_an_address_of_a_recipe_or_is_refused(text: str) -> None:
    with suppress(UsageError):
        address = parse_recipe_address(text)
        assert parse_recipe_address(str(address)) == address and is_address(str(address))
        inner = beside(address, "a b/c.toml")
        assert parse_recipe_address(str(inner)) == inner


def test_a_page_of_github_says_where_its_file_is() -> None:
    with pytest.raises(CkptError, match=r"git\+https://github.com/org/name#a/x.toml@main"):
        parse_recipe_address("https://github.com/org/name/blob/main/a/x.toml")


def test_what_lies_beside() -> None:
    web = parse_recipe_address("https://example.org/a/x.toml?ref=v1")
    assert str(beside(web, "b c/y.toml")) == "https://example.org/a/b%20c/y.toml?ref=v1"
    assert (
        str(beside(Git("https://h/r", "a/x.toml", COMMIT), "y.toml")) == f"git+https://h/r#a/y.toml@{COMMIT}"
    )
    assert beside(HuggingFace("o/n", "x.toml"), "y.toml") == HuggingFace("o/n", "y.toml")


# -- from a site


def test_a_recipe_and_its_lock_from_a_site(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    made = here.build(address)["outputs"][0]
    assert made["path"] == "tiny.safetensors" and files(here.path) == {"tiny.safetensors"}
    assert (here / "tiny.safetensors").read_bytes() == (author / "tiny.safetensors").read_bytes()
    assert here.build(address)["outputs"][0]["state"] == "unchanged"
    assert not list((here.store / "tmp").iterdir()), "the recipe itself is not kept"


def test_where_the_output_goes(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    here.build(address, "-o", "other.safetensors")
    assert files(here.path) == {"other.safetensors"}
    text = (
        (author / "tiny.toml")
        .read_text()
        .replace("[sources.dirty]", '[output]\nfile = "a/b/x.ckpt"\n[sources.dirty]')
    )
    net.storage.routes["/models/tiny.toml"] = says(200, text)
    here.build(address, "--no-lock")
    assert files(here.path) == {"other.safetensors", "x.ckpt"}, "no folder of the recipe's choice"


def test_nothing_of_the_users_is_replaced(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    (here / "tiny.safetensors").write_bytes(b"mine")
    said = here("build", address)
    assert said.code == 7 and "`tiny.safetensors` is there already" in said.err and "`-o FILE`" in said.err
    assert (here / "tiny.safetensors").read_bytes() == b"mine"
    for named in ("tiny.safetensors", ".", "./"):
        assert here("build", address, "-o", named).code == 7
        assert (here / "tiny.safetensors").read_bytes() == b"mine"
    here.build(address, "-o", "other.safetensors")
    assert (here / "other.safetensors").read_bytes() == (author / "tiny.safetensors").read_bytes()


def test_several_outputs(net: Net, author: Folder) -> None:
    text = (author / "tiny.toml").read_text(encoding="utf-8")
    author.write("tiny.toml", text + '[[output]]\nname = "a"\n[[output]]\nname = "b"\nprecision = "fp32"\n')
    author.build()
    address, here = serve(net, author), reader(net)
    said = here("build", address, "-o", "x.safetensors")
    assert said.code == 2 and "`-o x.safetensors/` is one" in said.err
    assert here("build", address).code == 0
    assert files(here.path) == {"tiny-a.safetensors", "tiny-b.safetensors"}
    (here / "tiny-b.safetensors").write_bytes(b"mine")
    said = here("build", address)
    assert said.code == 7 and "build it in another folder" in said.err
    assert (here / "tiny-b.safetensors").read_bytes() == b"mine"


def test_several_recipes(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    text, lock = (author / "tiny.toml").read_text(), (author / "tiny.lock.toml").read_text()
    other = address.replace("tiny.toml", "other.toml")
    net.storage.routes["/models/other.toml"] = says(200, text.replace('name = "tiny"', 'name = "other"'))
    net.storage.routes["/models/other.lock.toml"] = says(200, lock)
    said = here("build", address, other, "--json")
    first, second = json.loads(said.out)["recipes"]
    assert said.code == 4 and files(here.path) == {"tiny.safetensors"}, "held to their locks"
    assert (first["state"], second["state"]) == ("built", "failed")
    assert str(here.store) not in said.out and "`--no-lock`" in said.out
    assert here("build", address, other, "--keep-going", "--statement").code == 4
    assert files(here.path) == {"tiny.safetensors", "tiny.safetensors.intoto.json"}
    assert (here / "tiny.safetensors").read_bytes() == (author / "tiny.safetensors").read_bytes()
    assert here("verify", address).code == 0
    said = here("verify", address, "--statement", "tiny.safetensors.intoto.json")
    assert said.code == 2 and "`--statement` does not take a recipe's address" in said.err, "no network"
    (here / "tiny.safetensors").write_bytes(b"mine")
    said = here("build", address, other, "--no-lock")
    assert said.code == 7 and "`tiny.safetensors` is there already" in said.err
    assert (here / "tiny.safetensors").read_bytes() == b"mine"
    assert files(here.path) == {"tiny.safetensors", "tiny.safetensors.intoto.json"}


def test_from_python(net: Net, author: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    address, here = serve(net, author), reader(net)
    monkeypatch.chdir(here.path)
    work = Workspace(environment=here.variables)
    recipe = work.load(address)
    assert (recipe.address, recipe.file, recipe.folder) == (address, None, Path())
    assert recipe.outputs == ("tiny.safetensors",) and not list(here.store.glob("tmp/*"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="does not take a recipe's address"):
        work.build(recipe, executor=pool)
    with pytest.raises(UsageError, match="no variants of a recipe's address"):
        work.variants(recipe, {"output.precision": ["bf16"]})
    assert work.plan(recipe).nodes
    (outcome,) = work.build_all([recipe], keep_going=True).outcomes
    assert (outcome.recipe, outcome.state) == (address, "built")
    assert work.build(recipe).output.state == "unchanged"
    made = (author / "tiny.safetensors").read_bytes()
    assert work.verify(recipe) == {Path("tiny.safetensors"): sha256(made)}
    assert files(here.path) == {"tiny.safetensors"}
    route = net.storage.routes
    route["/models/tiny.toml"] = says(200, b"# changed\n" + (author / "tiny.toml").read_bytes())
    with pytest.raises(FetchError, match="is another recipe than it was"):
        work.build(recipe)
    with pytest.raises(FetchError, match="network is off"):
        Workspace(environment=here.variables, offline=True).load(address)


def test_on_the_page(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    (here / "models").mkdir()
    with served(here) as client:
        done, page = client.job("build", address=address, folder="work/models")
        assert done["state"] == "done", done
        assert f"-o {here / 'models'}/" in page.read
        (here / "models" / "tiny.safetensors").write_bytes(b"mine")
        done, page = client.job("build", address=address, folder="work/models")
        assert done["state"] == "failed" and "is there already" in page.read
        assert client.post("build", address=address, folder="elsewhere").status == 422
    assert files(here.path) == {"models", "models/tiny.safetensors"}


def test_where_others_read_the_recipe_it_is_to_be_here(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    for command in (("plan", "--snakemake"), ("build", "--on", "dask://localhost:1")):
        said = here(*command, address)
        assert said.code == 2 and "does not take a recipe's address" in said.err


@pytest.mark.parametrize(
    "command",
    [
        ("diff", "ADDRESS", "ADDRESS"),
        ("new", "ADDRESS"),
        ("convert", "ADDRESS", "-o", "x.ckpt"),
        ("build", "x.toml", "-o", "ADDRESS"),
        ("build", "x.toml", "--lock", "ADDRESS"),
        ("ui", "ADDRESS"),
    ],
)
def test_where_a_file_is_named_an_address_is_refused(net: Net, command: tuple[str, ...]) -> None:
    address = "https://user:secret@example.org/x.toml"
    here = reader(net)
    said = here(*(address if word == "ADDRESS" else word for word in command))
    assert said.code == 2 and "`https://…` is an address" in said.err and "secret" not in said.err
    assert not files(here.path)


def test_what_is_there_and_is_what_the_lock_says_stays(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    (here / "tiny.safetensors").write_bytes((author / "tiny.safetensors").read_bytes())
    assert here.build(address)["outputs"][0]["state"] == "unchanged"


def test_it_is_held_to_its_lock(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    text = (author / "tiny.toml").read_text().replace('name = "tiny"', 'name = "other"')
    net.storage.routes["/models/tiny.toml"] = says(200, text)
    said = here("build", address)
    assert said.code == 4 and "`--no-lock`" in said.err and not files(here.path)
    assert here("build", address, "--no-lock").code == 0


def test_a_lock_of_sources_alone_pins_them(net: Net, author: Folder) -> None:
    (author / "tiny.lock.toml").unlink()
    assert author("lock", "tiny.toml").code == 0
    address, here = serve(net, author), reader(net)
    assert here("build", address).code == 0
    net.storage.routes["/models/vae.safetensors"] = says(200, vae(9))
    other = reader(net, "other")
    said = other("build", address)
    assert said.code == 6 and "is not what was pinned" in said.err and not files(other.path)
    assert "`ckpt lock" not in said.err and "`--no-lock`" in said.err


def test_a_lock_of_ones_own(net: Net, author: Folder) -> None:
    address, here = serve(net, author, "tiny.lock.toml"), reader(net)
    said = here("build", address)
    assert said.code == 0 and f"there is no lock beside `{address}`" in said.err
    assert files(here.path) == {"tiny.safetensors"}
    assert here("build", address, "--locked").code == 4
    assert here("lock", address).code == 2
    said = here("lock", "--check", address, "--lock", "mine.lock.toml")
    assert said.code == 2 and "`--check` does not take a recipe's address" in said.err
    assert here("lock", address, "--lock", "mine.lock.toml").code == 0
    assert here("build", address, "--lock", "mine.lock.toml").code == 0
    assert here("build", address, "--lock", "mine.lock.toml", "--locked").code == 0
    assert files(here.path) == {"tiny.safetensors", "mine.lock.toml"}


def test_plan_and_verify(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    assert {"output tiny.safetensors": "make"}.items() <= here.states(address).items()
    here.build(address)
    assert here("verify", address).code == 0
    (here / "tiny.safetensors").write_bytes((here / "tiny.safetensors").read_bytes()[:-1] + b"\1")
    assert here("verify", address).code == 7


def test_recipes_that_it_includes_and_configurations(net: Net, author: Folder) -> None:
    author.write(
        "outer.toml",
        'format = 1\nname = "outer"\nbase = "inner"\nsources.inner.recipe = "parts/inner.toml"\n'
        'output.config = "parts/model.yaml"\n',
    )
    author.write("parts/model.yaml", "model: {}\n")
    for name in ("dirty.ckpt", "vae.safetensors"):
        (author / "parts" / name).write_bytes((author / name).read_bytes())
    author.write("parts/inner.toml", (author / "tiny.toml").read_text())
    author.build("outer.toml")
    serve(net, author)
    here = reader(net)
    here.build(net.storage.url("/models/outer.toml"))
    assert files(here.path) == {"outer.safetensors", "outer.yaml"}
    assert (here / "outer.safetensors").read_bytes() == (author / "outer.safetensors").read_bytes()


@pytest.mark.parametrize("named", ["../secret.toml", "/etc/x.toml", "a/../../x.toml", "a\\\\b.toml"])
def test_nothing_is_asked_for_outside_its_folder(net: Net, author: Folder, named: str) -> None:
    text = f'format = 1\nname = "o"\nbase = "i"\nsources.i.recipe = "{named}"\n'
    net.storage.routes["/models/o.toml"] = says(200, text)
    here = reader(net)
    said = here("build", net.storage.url("/models/o.toml"), "--no-lock")
    assert said.code == 3 and not files(here.path)
    assert {s.path for s in net.storage.seen} == {"/models/o.toml"}


def test_a_name_that_not_every_system_has_is_refused(net: Net) -> None:
    net.storage.routes["/o.toml"] = says(200, 'format = 1\nsources.i.recipe = "con.toml"\n')
    said = reader(net)("build", net.storage.url("/o.toml"), "--no-lock")
    assert said.code == 5 and "`con.toml`" in said.err and "no path that every system has" in said.err


@pytest.mark.parametrize("named", ["a/" * 20 + "x.toml", "a" * 300 + ".toml"])
def test_what_would_be_hard_to_be_rid_of_is_not_fetched(net: Net, named: str) -> None:
    """As folders in one another, each recipe some deeper."""
    net.storage.prefixes["/"] = says(200, f'format = 1\nsources.i.recipe = "{named}"\n')
    here = reader(net)
    said = here("build", net.storage.url("/o.toml"), "--no-lock")
    assert said.code == 5 and "no path that every system has" in said.err
    assert len(net.storage.seen) == 1 and not list((here.store / "tmp").iterdir())


def test_what_it_brings_along_is_bounded(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "format = 1\n" + "".join(f'sources.s{n}.recipe = "r{n}.toml"\n' for n in range(4))
    net.storage.prefixes["/r"] = says(200, "format = 1\n" + "#" * 500)
    net.storage.routes["/o.toml"] = says(200, text)
    for name, most, words in (
        ("MAX_FILES", 3, "more than 3 files"),
        ("MAX_BYTES", 1000, "more than 1,000 bytes"),
        ("MAX_TIME", -1.0, "takes more than"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"builder.sources.net.recipes.{name}", most)
            said = reader(net, name)("build", net.storage.url("/o.toml"), "--no-lock")
        assert said.code == 5 and words in said.err, said.err


def test_a_file_that_is_a_folder_too(net: Net) -> None:
    text = 'format = 1\nsources.i.recipe = "q.toml"\nsources.j.recipe = "q.toml/y.toml"\n'
    net.storage.prefixes["/"] = says(200, "format = 1\n")
    net.storage.routes["/o.toml"] = says(200, text)
    said = reader(net)("build", net.storage.url("/o.toml"), "--no-lock")
    assert said.code == 5 and "cannot be put into the store" in said.err


def test_names_that_begin_with_a_dot_are_beside_it(net: Net, author: Folder) -> None:
    """As `./parts//inner.toml` is on the author's machine."""
    text = (author / "tiny.toml").read_text()
    author.write("parts/inner.toml", text.replace('"vae.safetensors"', '"./vae.safetensors"'))
    author.write("o.toml", 'format = 1\nname = "o"\nbase = "i"\nsources.i.recipe = "./parts//inner.toml"\n')
    serve(net, author)
    for name in ("inner.toml", "dirty.ckpt", "vae.safetensors"):
        body = (author / "parts" / name if name == "inner.toml" else author / name).read_bytes()
        net.storage.routes[f"/models/parts/{name}"] = says(200, body)
    here = reader(net)
    assert here("build", net.storage.url("/models/o.toml"), "--no-lock").code == 0
    assert files(here.path) == {"o.safetensors"}


def test_a_set_beside_it_is_not_fetched(net: Net, author: Folder) -> None:
    text = (author / "tiny.toml").read_text().replace('"vae.safetensors"', '"vae.safetensors.index.json"')
    serve(net, author, "vae.safetensors")
    net.storage.routes["/models/tiny.toml"] = says(200, text)
    said = reader(net)("build", net.storage.url("/models/tiny.toml"), "--no-lock")
    assert said.code == 5 and "the source `vae` is nowhere to be found" in said.err
    assert "hint: set `CKPT_MODELS`" in said.err
    assert not net.storage.asked("/models/vae.safetensors.index.json")


def test_the_files_of_a_tokenizer(net: Net, author: Folder) -> None:
    """They are asked for by the names that such files have."""
    save_dirty(author / "mini.safetensors", "mini")
    text = 'format = 1\nname = "mini"\nbase = "s"\nsources.s.file = "mini.safetensors"\n'
    text += 'output.file = "mini/"\noutput.prediction = "epsilon"\noutput.tokenizer = "./words"\n'
    net.storage.routes["/m/mini.toml"] = says(200, text)
    here = replace(reader(net), environment={**author.environment, "CKPT_MODELS": str(author.path)})
    address = net.storage.url("/m/mini.toml")
    said = here("plan", address)
    assert said.code == 3 and "cannot read `vocab.json` of `./words`" in said.err
    for name, body in (("vocab.json", "{}"), ("merges.txt", "#version: 0.2\n")):
        net.storage.routes[f"/m/words/tokenizer/{name}"] = says(200, body)
    assert here("plan", address).code == 0


def test_a_source_outside_is_refused(net: Net, author: Folder) -> None:
    here = reader(net)
    outside = here.path.parent / "private.safetensors"
    outside.write_bytes(vae())
    for named in (str(outside), "../../../work/private.safetensors"):
        net.storage.routes["/models/tiny.toml"] = says(
            200, (author / "tiny.toml").read_text().replace("vae.safetensors", named)
        )
        said = here("build", net.storage.url("/models/tiny.toml"), "--no-lock")
        assert said.code == 3 and "is outside the recipe's folder" in said.err
        assert "--allow-outside" not in said.err and "for its author to mend" in said.err
    said = here("build", net.storage.url("/models/tiny.toml"), "--allow-outside")
    assert said.code == 2 and "`--allow-outside` is for recipes that lie here" in said.err


def test_what_lies_in_the_current_folder_is_not_read(net: Net, author: Folder) -> None:
    address, here = serve(net, author, "vae.safetensors"), reader(net)
    (here / "vae.safetensors").write_bytes(vae())
    assert here("build", address).code == 5


def test_messages_name_the_address(net: Net, author: Folder) -> None:
    here = reader(net)
    net.storage.routes["/models/tiny.toml"] = says(200, (author / "tiny.toml").read_text() + "colour = 1\n")
    said = here("build", net.storage.url("/models/tiny.toml"))
    assert said.code == 3 and f"--> {net.storage.url('/models/tiny.toml')}:" in said.err
    assert str(here.store) not in said.err
    address = serve(net, author)
    net.storage.routes["/models/tiny.lock.toml"] = says(200, "version = 7\n")
    said = here("build", address)
    assert said.code == 4 and f"--> {net.storage.url('/models/tiny.lock.toml')}:1" in said.err


@pytest.mark.parametrize(
    ("route", "code", "words"),
    [
        (says(404, "no"), 5, "there is no such file"),
        (says(403, "no"), 5, "no access"),
        (says(200, "<!doctype html><title>Log in</title>", Content_Type="text/html"), 5, "an HTML page"),
        (says(200, b"\x8b" * 2_000_000), 5, "more than 1,048,576 bytes"),
        (says(200, b"\xff\xfe"), 3, "not UTF-8"),
        (says(200, "x" * 100, Content_Encoding="gzip"), 5, "gzip"),
        (redirects("file:///etc/passwd"), 5, "file"),
    ],
)
def test_what_a_site_may_send(net: Net, route: Callable[..., None], code: int, words: str) -> None:
    net.storage.routes["/x.toml"] = route
    here = reader(net)
    said = here("build", net.storage.url("/x.toml"))
    assert said.code == code and words in said.err, said.err
    assert not files(here.path) and "Traceback" not in said.err


def test_a_lock_that_cannot_be_had_is_not_passed_over(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    net.storage.routes["/models/tiny.lock.toml"] = says(403, "no")
    said = here("build", address)
    assert said.code == 5 and "`--no-lock`" in said.err and not files(here.path)


def test_a_site_that_dribbles(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.sources.net.recipes.MAX_SECONDS", 0.3)
    net.storage.routes["/x.toml"] = dribble
    said = reader(net)("build", net.storage.url("/x.toml"))
    assert said.code == 5 and "takes more than" in said.err


def test_without_the_network(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    for option in ("--offline", "--frozen"):
        said = here("build", address, option)
        assert said.code == 5 and "the network is off" in said.err
    assert not net.requests


def test_what_was_fetched_of_a_commit_needs_no_network(net: Net, author: Folder) -> None:
    bare, at = repository(author)
    git_host(net.hub, "/repo.git", bare)
    for name in ("tiny.toml", "tiny.lock.toml"):
        hugging_face(net.hub, net.storage, "org/name", f"a/{name}", (author / name).read_bytes(), lfs=False)
    models = {"CKPT_MODELS": str(author.path)}
    here = replace(reader(net), environment={**author.environment, **models})
    git_address = f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml"
    for address, commit_ in ((git_address, f"@{at}"), ("hf://org/name/a/tiny.toml", f"@{COMMIT}")):
        exact = address + commit_ if address == git_address else address.replace("/a/", f"{commit_}/a/")
        said = here("plan", exact, "--offline")
        assert said.code == 5 and "the network is off" in said.err
        assert here("plan", address).code == 0, "a branch becomes the commit that is kept"
        asked = net.requests
        assert here("build", exact, "--offline").code == 0 and here("build", exact).code == 0
        assert "there is no lock" not in here("verify", exact).err and net.requests == asked
        assert here("build", address, "--offline").code == 5
        assert here("plan", exact, "--offline", "--no-lock").code == 5, "that is another thing to fetch"
    for kept in here.store.glob("facts/recipe/*/*.json"):
        kept.write_bytes(kept.read_bytes().replace(b"files", b"filez"))
    assert here("build", exact, "--offline").code == 5, "what is damaged is not there"


def test_without_encryption_only_in_the_own_network(net: Net, author: Folder) -> None:
    address, here = serve(net, author), reader(net)
    strict = replace(here, environment={**here.environment, "CKPT_ALLOW_PRIVATE": ""})
    bare, at = repository(author)
    git_host(net.hub, "/repo.git", bare)
    for text in (address, f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml@{at}"):
        said = strict("build", text)
        assert said.code == 5 and "without encryption" in said.err
    assert not net.requests


# -- from Hugging Face


def test_from_hugging_face(net: Net, author: Folder) -> None:
    for name in ("tiny.toml", "tiny.lock.toml", "dirty.ckpt", "vae.safetensors"):
        large = not name.endswith(".toml")
        hugging_face(net.hub, net.storage, "org/name", f"a/{name}", (author / name).read_bytes(), lfs=large)
    here = reader(net)
    said = here("build", "hf://org/name/a/tiny.toml")
    assert said.code == 0, said.err
    assert f"is now `hf://org/name@{COMMIT}/a/tiny.toml`" in said.err
    assert (here / "tiny.safetensors").read_bytes() == (author / "tiny.safetensors").read_bytes()
    assert not net.hub.asked("/org/name/resolve/main/a/tiny.lock.toml"), "the lock is of the same commit"


# -- from a Git repository


def test_from_a_repository(net: Net, author: Folder) -> None:
    bare, at = repository(author)
    git_host(net.hub, "/repo.git", bare)
    address = f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml"
    models = {"CKPT_MODELS": str(author.path)}
    here = replace(reader(net), environment={**author.environment, **models})
    exact = here("build", f"{address}@{at}")
    assert exact.code == 0 and "is now" not in exact.err, exact.err
    assert (here / "tiny.safetensors").read_bytes() == (author / "tiny.safetensors").read_bytes()
    for revision in ("", "@main"):
        said = here("build", address + revision)
        assert said.code == 0 and f"is now `{address}@{at}`, which names it for ever" in said.err
    assert net.hub.sent < 500_000, "no other file of the repository comes along"


def test_a_commit_of_the_past(net: Net, author: Folder) -> None:
    bare, at = repository(author)
    work = author.path.parent / "clone"
    (work / "recipes" / "tiny.toml").write_text("format = 1\n")
    commit(work)
    run(work, "push", "-q", str(bare), "main")
    git_host(net.hub, "/repo.git", bare)
    here = replace(reader(net), environment={**author.environment, "CKPT_MODELS": str(author.path)})
    assert here("build", f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml@{at}").code == 0
    assert here("build", f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml").code == 3


@pytest.mark.parametrize(
    ("path", "revision", "words"),
    [
        ("recipes/none.toml", "main", "there is no such file"),
        ("link.toml", "main", "no file of the repository"),
        ("module.toml", "main", "no file of the repository"),
        ("folder/tiny.toml", "main", "there is no such file"),
        ("recipes/tiny.toml", OTHER, "no such commit"),
        ("recipes/tiny.toml", "nobranch", "no such commit, tag or branch"),
        ("recipes/tiny.toml", "0123456", "40 digits"),
    ],
)
def test_what_a_repository_lacks(net: Net, author: Folder, path: str, revision: str, words: str) -> None:
    bare, _ = repository(author)
    git_host(net.hub, "/repo.git", bare)
    said = reader(net)("build", f"git+{net.hub.url('/repo.git')}#{path}@{revision}")
    assert said.code == 5 and words in said.err, said.err


def test_no_repository(net: Net, author: Folder) -> None:
    here = reader(net)
    net.hub.prefixes["/login"] = says(401, "who?", WWW_Authenticate='Basic realm="x"')
    net.hub.prefixes["/moved"] = redirects(net.storage.url("/elsewhere.git"))
    for path, words in (("/none", "not found"), ("/login", "needs a login"), ("/moved", "moved elsewhere")):
        said = here("build", f"git+{net.hub.url(path)}#x.toml@{COMMIT}")
        assert said.code == 5 and words in said.err, said.err
    assert not net.storage.seen, "no redirect is followed"


def test_nothing_of_a_repository_or_the_user_is_run(
    net: Net, author: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, at = repository(author)
    git_host(net.hub, "/repo.git", bare)
    home = author.path.parent / "home"
    home.mkdir()
    trap = home / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {home}/sprung\nexit 1\n")
    trap.chmod(0o755)
    template = home / "template" / "hooks"
    template.mkdir(parents=True)
    (template / "reference-transaction").write_bytes(trap.read_bytes())
    (template / "reference-transaction").chmod(0o755)
    settings = (
        f"[credential]\nhelper = !{trap}\n[core]\nhooksPath = {template / 'hooks'}\nfsmonitor = {trap}\n"
    )
    settings += f'[init]\ntemplateDir = {template.parent}\n[url "ext::{trap}"]\ninsteadOf = {net.hub.url()}\n'
    (home / ".gitconfig").write_text(settings)
    for name, value in {
        "HOME": home,
        "GIT_CONFIG_GLOBAL": home / ".gitconfig",
        "GIT_TEMPLATE_DIR": template.parent,
        "GIT_ASKPASS": trap,
        "GIT_PROXY_COMMAND": trap,
        "GIT_TRACE": home / "trace",
        "GIT_DIR": home,
    }.items():
        monkeypatch.setenv(name, str(value))
    here = replace(reader(net), environment={**author.environment, "CKPT_MODELS": str(author.path)})
    assert here("build", f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml@{at}").code == 0
    assert files(home) == {
        ".gitconfig",
        "trap",
        "template",
        "template/hooks",
        "template/hooks/reference-transaction",
    }


def test_a_repository_of_a_host_with_a_certificate(net: Net, author: Folder) -> None:
    """By its name, which git resolves to nothing but what was looked at."""
    bare, at = repository(author)
    trusted = certificate(author.path.parent)
    models = {"CKPT_MODELS": str(author.path)}
    with Server(tls=tls_server_context(author.path.parent)) as site:
        git_host(site, "/repo.git", bare)
        address = f"git+{site.url('/repo.git', host='localhost')}#recipes/tiny.toml@{at}"
        here = replace(reader(net), environment={**author.environment, **models})
        assert here("build", address).code == 5
        here = replace(here, environment={**here.environment, "SSL_CERT_FILE": str(trusted)})
        assert here("build", address).code == 0
        strict = {**here.environment, "CKPT_ALLOW_PRIVATE": ""}
        said = replace(reader(net, "strict"), environment=strict)("build", address)
        assert said.code == 5 and "a loopback address" in said.err


def test_a_repository_that_is_too_large(net: Net, author: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, at = repository(author)
    git_host(net.hub, "/repo.git", bare, uploadpack_allowFilter="false")
    monkeypatch.setattr(git, "MAX_BYTES", 1_000_000)
    here = reader(net)
    said = here("build", f"git+{net.hub.url('/repo.git')}#recipes/tiny.toml@{at}")
    assert said.code == 5 and not files(here.path), said.err
    assert not list((here.store / "tmp").iterdir())


def test_a_repository_without_an_end(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "MAX_SECONDS", 0.5)
    net.hub.prefixes["/repo.git"] = dribble
    here = reader(net)
    said = here("build", f"git+{net.hub.url('/repo.git')}#x.toml")
    assert said.code == 5 and "takes more than 0.5 seconds" in said.err
    assert not list((here.store / "tmp").iterdir())


def test_without_git(net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = reader(net)("build", f"git+{net.hub.url('/repo.git')}#x.toml")
    assert said.code == 5 and "`git` is not there" in said.err and "give the address of the file" in said.err


def test_a_recipe_in_a_folder_that_reads_like_an_address(net: Net, author: Folder) -> None:
    del net
    assert not is_address("https.toml") and not is_address("hf/x.toml") and not is_address("C:/x.toml")
    assert author("build", "./tiny.toml").code == 0
