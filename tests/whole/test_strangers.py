"""What a stranger's recipe can do: cost time and disk, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from builder.tensors.digests import PROFILE
from tests.help.building import ROOT, Folder, model, save, save_dirty

SECRET = "machine example.com login me password s3cr3t-s3cr3t"
HEAD = 'format = 1\nname = "x"\nbase = "NEW VAE-tiny"\ncomponents.VAE-tiny = "s"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A stranger's folder, beside it what is the user's own."""
    path = tmp_path / "stranger"
    path.mkdir()
    made = Folder(path, tmp_path / "store")
    save(path / "vae.safetensors", model("VAE-tiny", seed=1))
    own = tmp_path / "own"
    own.mkdir()
    (own / ".netrc").write_text(SECRET + "\n")
    (own / "id_rsa").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n")
    save(own / "precious.safetensors", model("VAE-tiny", seed=9))
    (own / "precious.yaml").write_text("model: mine\n")
    return made


def own(folder: Folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder.path.parent / "own").iterdir()}


COMMANDS = (("plan",), ("build",), ("lock",))


@pytest.mark.parametrize(
    "named", ["../own/.netrc", "{own}/.netrc", "link", "linked/.netrc", "/proc/self/environ"]
)
@pytest.mark.parametrize("key", ["file", "urls", "recipe"])
def test_nothing_outside_is_read_or_shown(folder: Folder, named: str, key: str) -> None:
    there = folder.path.parent / "own"
    (folder / "link").symlink_to(there / ".netrc")
    (folder / "linked").symlink_to(there)
    os.environ["A_TOKEN"] = SECRET
    named = named.format(own=there)
    value = f'["file:{named}"]' if key == "urls" else f'"{named}"'
    folder.write("x.toml", HEAD + f"sources.s.{key} = {value}\n")
    for command in COMMANDS:
        said = folder(*command, "x.toml")
        assert said.code == 3, said.err
        assert "s3cr3t" not in said.out + said.err and "PRIVATE" not in said.out + said.err
        assert "outside the recipe's folder" in said.err or "no recipe" in said.err
    os.environ.pop("A_TOKEN")


def test_no_part_of_a_source_lies_outside(folder: Folder) -> None:
    """A sharded set in the recipe's folder, whose shard is a link to a model of the user's."""
    own = folder.path.parent / "own" / "precious.safetensors"
    (folder / "shard.safetensors").symlink_to(own)
    names = dict.fromkeys(model("VAE-tiny"), "shard.safetensors")
    folder.write("m.safetensors.index.json", json.dumps({"weight_map": names}))
    folder.write("x.toml", HEAD + 'sources.s.file = "m.safetensors.index.json"\n')
    for command in COMMANDS[:2]:
        said = folder(*command, "x.toml")
        assert said.code == 3 and "`shard.safetensors` is outside the recipe's folder" in said.err
    assert not (folder / "x.safetensors").exists()
    assert folder("build", "x.toml", "--allow-outside").code == 0
    assert folder("inspect", "m.safetensors.index.json").code == 0, "what a person names is read"


@pytest.mark.parametrize("part", ["shard", "model_index.json", "scheduler/scheduler_config.json", "weights"])
def test_a_part_is_not_opened_before_its_place_is_known(folder: Folder, part: str) -> None:
    """Not even its first bytes are shown, as a number or in any other way."""
    own = folder.path.parent / "own" / "notes.txt"
    own.write_text("my secret is 42\n" * 9)
    file, name = "m/", "model_index.json"
    folder.write("m/model_index.json", json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
    save(folder / "m" / "vae" / "model.safetensors", model("VAE-tiny"))
    if part == "shard":
        file, name = "m.safetensors.index.json", "shard.safetensors"
        folder.write(file, json.dumps({"weight_map": {"a": name}}))
        (folder / name).symlink_to(own)
    else:
        name = "unet/model.safetensors" if part == "weights" else part
        (folder / "m" / name).parent.mkdir(exist_ok=True)
        (folder / "m" / name).unlink(missing_ok=True)
        (folder / "m" / name).symlink_to(own)
    folder.write("x.toml", HEAD + f'sources.s.file = "{file}"\n')
    said = folder("plan", "x.toml")
    assert said.code == 3, said.err
    assert f"`{Path(name).name}` is outside the recipe's folder" in said.err, said.err


def test_what_is_allowed_outside(folder: Folder) -> None:
    """A folder of models is the user's own word; so is `--allow-outside`."""
    save(folder.path.parent / "models" / "v.safetensors", model("VAE-tiny", seed=2))
    (folder / "v.safetensors").symlink_to(folder.path.parent / "models" / "v.safetensors")
    folder.write("x.toml", HEAD + 'sources.s.file = "v.safetensors"\n')
    assert folder("build", "x.toml").code == 3
    assert folder("build", "x.toml", "--allow-outside").code == 0
    (folder / "x.safetensors").unlink()
    models = Folder(folder.path, folder.store, {"CKPT_MODELS": str(folder.path.parent / "models")})
    assert models("build", "x.toml").code == 0


@pytest.mark.parametrize("command", ["build", "inspect", "new", "extract", "prune"])
def test_what_is_not_recognised_is_not_quoted(folder: Folder, command: str) -> None:
    for name in (".netrc", "id_rsa"):
        file = folder.path.parent / "own" / name
        words = [command, file, *(["VAE"] if command == "extract" else [])]
        if command == "build":
            save_dirty(folder / "d.ckpt")
            folder.write("x.toml", HEAD + f'sources.s.file = "{file}"\n')
            words = ["build", "x.toml", "--allow-outside"]
        said = folder(*words)
        assert said.code in (3, 6)
        assert "s3cr3t" not in said.out + said.err and "PRIVATE" not in said.out + said.err


# What may lie beside a stranger's recipe and is the user's own: each would be quoted as a line that is wrong.
OWN = {
    "no TOML": f"export TOKEN={SECRET}\n",
    "TOML": f'TOKEN = "{SECRET}"\n',
    "a recipe's keys": f'name = "{SECRET}"\nbase = 3\n',
    "no text": f"TOKEN={SECRET}\n\xff".encode("latin-1"),
}


@pytest.mark.parametrize("text", OWN.values(), ids=OWN)
@pytest.mark.parametrize(
    "way", ["lock", "link to a lock", "recipe", "link to a recipe", "a link that is named"]
)
def test_what_lies_in_the_folder_is_not_quoted(folder: Folder, way: str, text: str | bytes) -> None:
    secret = folder / ("other.toml" if way == "recipe" else ".env")
    secret.write_bytes(text if isinstance(text, bytes) else text.encode())
    good = HEAD + 'sources.s.file = "vae.safetensors"\n'
    folder.write("x.toml", good)
    if way == "lock":
        (folder / "x.lock.toml").symlink_to(".env")
    elif way == "link to a lock":
        (folder / "l").symlink_to(".env")
        (folder / "x.lock.toml").symlink_to("l")
    elif way == "a link that is named":
        (folder / "x.toml").unlink()
        (folder / "x.toml").symlink_to(".env")
    else:
        folder.write("x.toml", HEAD + 'sources.s.recipe = "other.toml"\n')
        if way != "recipe":
            (folder / "other.toml").symlink_to(".env")
    commands = [("plan",), ("plan", "--json"), ("build",), ("build", "--locked"), ("verify",), ("lock",)]
    for command in commands:
        said = folder(command[0], "x.toml", *command[1:])
        if not way.endswith("lock"):
            assert said.code == 3
        else:  # a lock that cannot be read is written anew, and the link's file is left alone
            assert said.code == (0 if command == ("lock",) else 4)
        assert "s3cr3t" not in said.out + said.err and "TOKEN" not in said.out + said.err
    assert secret.read_bytes() == (text if isinstance(text, bytes) else text.encode())


def test_a_recipe_is_quoted_where_it_is_one(folder: Folder) -> None:
    """A line that is wrong is shown of what the user names, and of what is a recipe."""
    folder.write("x.toml", "format = 1\nname = oops\n")
    assert "2 | name = oops" in folder("plan", "x.toml").err
    folder.write("inner.toml", HEAD + "oops = 1\n")
    folder.write("x.toml", HEAD + 'sources.s.recipe = "inner.toml"\n')
    assert "| oops = 1" in folder("plan", "x.toml").err
    folder.write("inner.toml", "format = 1\noops\n")
    said = folder("plan", "x.toml").err
    assert "oops" not in said and "`ckpt plan inner.toml` says what is wrong" in said


def test_a_link_is_no_configuration(folder: Folder) -> None:
    """Else what it leads to would be copied beside a model that is given away."""
    (folder / ".env").write_text(SECRET)
    (folder / "c.yaml").symlink_to(".env")
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n[output]\nconfig = "c.yaml"\n')
    said = folder("build", "x.toml")
    assert said.code == 3 and "s3cr3t" not in said.err and not (folder / "x.yaml").exists()


def test_a_catalog_follows_no_link(folder: Folder) -> None:
    """Neither for its tables, which messages quote, nor for what it has put beside a model."""
    (folder / ".env").write_text(f"TOKEN={SECRET}\n")
    catalog = Folder(folder.path, folder.store, {"CKPT_COMPONENTS": "own"})
    (folder / "own" / "architectures").mkdir(parents=True)
    (folder / "own" / "a.toml").symlink_to("../.env")
    said = catalog("components", "list")
    assert said.code == 2 and "s3cr3t" not in said.err and "is a link" in said.err
    (folder / "own" / "a.toml").unlink()
    for name in ("a.yaml", ".env"):
        (folder / "own" / "architectures" / name).symlink_to("../../.env")
        folder.write("own/architectures/a.toml", f'[X]\nslots = ["VAE-tiny"]\nsidecars_v.a1111 = "{name}"\n')
        said = catalog("components", "list")
        assert said.code == 2 and f"no configuration `{name}`" in said.err, said.err


def test_outputs_stay_in_the_folder(folder: Folder) -> None:
    """A link to a folder or to a file in the place of an output leads nowhere."""
    before = own(folder)
    (folder / "out").symlink_to(folder.path.parent / "own")
    (folder / "x.safetensors").symlink_to(folder.path.parent / "own" / "precious.safetensors")
    text = HEAD + 'sources.s.file = "vae.safetensors"\n'
    folder.write("x.toml", text + 'output.file = "out/precious.safetensors"\n')
    said = folder("build", "x.toml")
    assert said.code == 3 and "outside the recipe's folder" in said.err
    folder.write("x.toml", text)
    assert folder("build", "x.toml").code == 0
    assert own(folder) == before and not (folder / "x.safetensors").is_symlink()


def test_configurations_stay_in_the_folder(folder: Folder) -> None:
    before = own(folder)
    text = HEAD + 'sources.s.file = "vae.safetensors"\n[output]\nconfig = "c.yaml"\n'
    for target in ("id_rsa", ".netrc"):
        (folder / "c.yaml").unlink(missing_ok=True)
        (folder / "c.yaml").symlink_to(folder.path.parent / "own" / target)
        folder.write("x.toml", text)
        said = folder("build", "x.toml")
        assert said.code == 3 and "s3cr3t" not in said.err and not (folder / "x.yaml").exists()
    (folder / "c.yaml").unlink()
    (folder / "c.yaml").write_text("model: theirs\n")
    (folder / "x.yaml").symlink_to(folder.path.parent / "own" / "precious.yaml")
    said = folder("build", "x.toml")
    assert said.code == 0 and "stays as it is" in said.err
    assert own(folder) == before


def test_a_configuration_that_is_not_ours_stays(folder: Folder) -> None:
    (folder / "c.yaml").write_text("model: one\n")
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n[output]\nconfig = "c.yaml"\n')
    (folder / "x.yaml").write_text("the user's own\n")
    assert "stays as it is" in folder("build", "x.toml").err
    assert (folder / "x.yaml").read_text() == "the user's own\n"
    (folder / "x.yaml").unlink()
    folder.build("x.toml")
    (folder / "c.yaml").write_text("model: two\n")
    folder.build("x.toml")
    assert (folder / "x.yaml").read_text() == "model: two\n"
    folder.write(
        "two.toml",
        HEAD.replace('"x"', '"two"') + 'sources.s.file = "vae.safetensors"\n'
        '[[output]]\nname = "a"\nfile = "y.safetensors"\nconfig = "c.yaml"\n'
        '[[output]]\nname = "b"\nfile = "y.ckpt"\nconfig = "x.yaml"\n',
    )
    said = folder("build", "two.toml")
    assert said.code == 3 and "two outputs share `y.yaml`" in said.err


def test_prune_takes_no_link_along(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    (folder / "dirty.yaml").symlink_to(folder.path.parent / "own" / "id_rsa")
    assert folder("prune", "dirty.ckpt").code == 0
    assert (folder / "dirty-pruned.safetensors").exists() and not (folder / "dirty-pruned.yaml").exists()


def test_a_lock_is_a_claim(folder: Folder) -> None:
    """Lines taken out of a lock, or emptied, make it stale; digests that are none are refused."""
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    lock = folder / "x.lock.toml"
    good = lock.read_text(encoding="utf-8")
    assert folder("build", "x.toml", "--locked").code == 0
    parts = good.split("\n\n")
    for part in [p for p in parts if p.startswith("[") and not p.startswith("[tool]")]:
        lock.write_text(good.replace(part, ""), encoding="utf-8")
        said = folder("build", "x.toml", "--locked")
        assert said.code == 4, part
    sha256 = next(line for line in good.splitlines() if line.startswith("sha256"))
    lock.write_text(good.replace(sha256, 'sha256 = "../../own/precious"'), encoding="utf-8")
    said = folder("build", "x.toml")
    assert said.code == 4 and "Traceback" not in said.err


ADDRESSES = (
    *("file:../own/precious.safetensors", "file:{own}/precious.safetensors", "file:link", "ftp://x"),
    *("http://192.168.1.1/reboot", "https://me:secret@example.com/x", "https://example.com/x?token=abc"),
    *("\\u001b[31m", "/etc/passwd", "../own/precious.safetensors"),
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_lock_leads_nowhere_that_a_recipe_may_not(folder: Folder, address: str) -> None:
    """The address that it gives is asked before the recipe's own."""
    own = folder.path.parent / "own"
    (folder / "link").symlink_to(own / "precious.safetensors")
    sha256 = hashlib.sha256((own / "precious.safetensors").read_bytes()).hexdigest()
    folder.write("x.toml", HEAD + 'sources.s.urls = ["https://example.invalid/x.safetensors"]\n')
    lock = (
        f'version = 1\nprofile = {PROFILE}\nrecipe = "{"a" * 64}"\n[sources.s]\n'
        f'requested = "https://example.invalid/x.safetensors"\nsha256 = "{sha256}"\n'
        f'size = {(own / "precious.safetensors").stat().st_size}\nresolved = "{address}"\n'
    )
    folder.write("x.lock.toml", lock.replace("{own}", str(own)))
    for command in (("plan",), ("build",), ("build", "--locked"), ("verify",)):
        said = folder(command[0], "x.toml", *command[1:])
        assert said.code in (3, 4), said.err
    assert not (folder / "x.safetensors").exists()


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "version = 1\n", "version = 1\nprofile = 1\n"])
def test_a_lock_that_was_emptied_is_none(folder: Folder, text: str) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    for command in (("plan",), ("build",), ("build", "--locked"), ("verify",)):
        folder.write("x.lock.toml", text)
        assert folder(command[0], "x.toml", *command[1:]).code == 4
    assert not (folder / "x.safetensors").exists()


def test_every_line_of_a_lock_counts(folder: Folder) -> None:
    """Without any of its lines but those about the tool, it is stale or refused."""
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    lines = (folder / "x.lock.toml").read_text(encoding="utf-8").split("\n")
    for index, line in enumerate(lines):
        if line and not line.startswith(("#", "[tool]", "ckpt-build =")):
            folder.write("x.lock.toml", "\n".join(lines[:index] + lines[index + 1 :]))
            assert folder("build", "x.toml", "--locked").code == 4, line


def test_a_lock_of_thousands_says_no_more_than_a_person_reads(folder: Folder) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    with (folder / "x.lock.toml").open("a", encoding="utf-8") as lock:
        for n in range(10_000):
            lock.write(f'\n[sources.s{n}]\nrequested = "a"\nsha256 = "{"a" * 64}"\nsize = 3\n')
    said = folder("build", "x.toml", "--locked")
    assert said.code == 4 and said.err.count("\n") < 60 and "and 29,950 more" in said.err


@pytest.mark.parametrize("digest", ["../x", "A" * 64, "a" * 63, "a" * 65, "\u0661" * 64, "a" * 63 + "\\n"])
def test_a_digest_is_64_hex_digits(folder: Folder, digest: str) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    lock = (folder / "x.lock.toml").read_text(encoding="utf-8")
    for key in ("sha256", "blake3", "tensor_digest"):
        folder.write("x.lock.toml", re.sub(f'{key} = "[0-9a-f]+"', lambda _: f'{key} = "{digest}"', lock))  # noqa: B023
        for command in (("plan",), ("build",), ("build", "--locked"), ("verify",)):
            said = folder(command[0], "x.toml", *command[1:])
            assert said.code == 4 and f"`{key}` is no digest" in said.err
    folder.write("y.toml", HEAD + f'sources.s.file = "vae.safetensors"\nsources.s.sha256 = "{digest}"\n')
    said = folder("build", "y.toml")
    if digest == "A" * 64:  # people write both cases: it pins another file
        assert said.code == 6
    else:
        assert said.code == 3 and "y.toml:6" in said.err


@pytest.mark.parametrize("name", ["a\u202eb", "a\u200bb", "\u2066", "a\ufeffb", "x\u2028"])
def test_a_file_is_named_as_it_reads(folder: Folder, name: str) -> None:
    source = 'sources.s.file = "vae.safetensors"\n'
    folder.write("x.toml", HEAD.replace('"x"', json.dumps(name)) + source)
    assert folder("build", "x.toml").code == 3
    folder.write("x.toml", HEAD + source + f"output.file = {json.dumps(name + '.safetensors')}\n")
    assert folder("build", "x.toml").code == 3
    assert {p.name for p in folder.path.iterdir()} == {"vae.safetensors", "x.toml"}


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "..", "a\\u0000b", "-x", "~", "x" * 400])
def test_a_catalog_names_no_files(folder: Folder, name: str) -> None:
    """A component's name becomes part of that of a file that it is extracted to."""
    table = "keys = 1\nparameters = 1\ntensors.a = [1]\n"
    catalog = Folder(folder.path, folder.store, {"CKPT_COMPONENTS": str(folder / "own")})
    for key, other in (("name", "class"), ("class", "name")):
        folder.write("own/a.toml", f'{key} = "{name}"\n{other} = "plain"\n{table}')
        said = catalog("components", "list")
        assert said.code == 2 and f"`{key}` is " in said.err
    (folder / "own" / "a.toml").unlink()
    folder.write("own/architectures/a.toml", f'["{name}"]\nslots = ["VAE-tiny"]\n')
    assert catalog("components", "list").code == 2


def test_a_model_that_becomes_a_link(folder: Folder) -> None:
    """Between the plan, or a build that has seen it, and the next: nothing of its old digest is believed."""
    save(folder / "v.safetensors", model("VAE-tiny", seed=3))
    folder.write("x.toml", HEAD + 'sources.s.file = "v.safetensors"\n')
    folder.build("x.toml")
    (folder / "v.safetensors").unlink()
    (folder / "v.safetensors").symlink_to(folder.path.parent / "own" / "precious.safetensors")
    before = (folder / "x.safetensors").read_bytes()
    for command in (("plan",), ("build",), ("build", "--locked")):
        assert folder(command[0], "x.toml", *command[1:]).code == 3
    assert (folder / "x.safetensors").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
def test_a_store_that_others_may_write_to_is_not_believed(folder: Folder) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    folder.store.chmod(0o777)
    assert "others may write to the store" in folder("plan", "x.toml").err
    said = folder("plan", "x.toml", "-q")
    assert said.code == 0 and "seen for the first time" in said.out
    assert folder.build("x.toml")["outputs"][0]["state"] == "unchanged"


def test_times_are_not_believed_where_that_is_asked_for(folder: Folder) -> None:
    """Bytes that change below the file system leave times as they were."""
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    path = folder / "vae.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    wary = Folder(folder.path, folder.store, {"CKPT_TRUST_STAT": "0"})
    said = wary("build", "x.toml", "--locked")
    assert said.code == 4


def test_inputs_are_never_outputs(folder: Folder) -> None:
    before = (folder / "vae.safetensors").read_bytes()
    said = folder("new", "vae.safetensors", "-o", "vae.safetensors", "--force")
    assert said.code == 2 and (folder / "vae.safetensors").read_bytes() == before


# Where a signal comes: while a recipe is read, and while torch is imported, whose compiled code drops what a
# handler raises, as finalizers and callbacks of weak references do.
COMES = {
    "recipe": """
        from builder.workspace import Workspace
        old = Workspace.recipe
        def recipe(self, *asked):
            kill()
            return old(self, *asked)
        Workspace.recipe = recipe
    """,
    "compiled code": """
        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "torch":
                    try:
                        kill()
                    except BaseException:
                        pass
        sys.meta_path.insert(0, Finder)
    """,
    "finalizer": """
        class Dies:
            def __del__(self):
                kill()
        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "torch":
                    Dies()
        sys.meta_path.insert(0, Finder)
    """,
    "an import that is broken off": """
        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "torch":
                    try:
                        kill()
                    except BaseException:
                        raise ImportError("cannot load module more than once per process")
        sys.meta_path.insert(0, Finder)
    """,
    "command line": """
        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "click":
                    kill()
        sys.meta_path.insert(0, Finder)
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    ("number", "where"),
    [
        *((signal.SIGTERM, w) for w in COMES),
        *((signal.SIGINT, w) for w in ("recipe", "command line", "an import that is broken off")),
    ],
)
def test_being_terminated_is_as_clean_as_ctrl_c(folder: Folder, number: signal.Signals, where: str) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    before = {p.name for p in folder.path.iterdir()}
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def kill():\n    os.kill(os.getpid(), {int(number)})\n"
        f"{dedent(COMES[where])}\nsys.argv[1:] = ['build', 'x.toml']\n"
        "from builder.__main__ import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **folder.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert (done.returncode, done.stderr.strip()) == (128 + number, f"error: {word}")
    assert {p.name for p in folder.path.iterdir()} == before
