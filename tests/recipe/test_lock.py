"""The lock: its form, when it is written, and what --locked holds a build to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import LockError
from builder.recipe.lock import (
    Lock,
    LockedComponent,
    LockedOutput,
    LockedSource,
    differences,
    read_lock,
    write_lock,
)
from tests.help.building import RECIPE, Folder, model, save, save_dirty
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden" / "lock"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path).tiny()
    made.know("dirty.ckpt", "vae.safetensors")
    return made


@pytest.fixture
def locked(folder: Folder) -> Folder:
    folder.build()
    return folder


def test_its_form(locked: Folder) -> None:
    text = (locked / "tiny.lock.toml").read_text()
    assert golden(GOLDEN / "tiny.lock.toml", text) == text
    assert str(locked.path) not in text and "202" not in re.sub(r"[0-9a-f]{32,64}", "", text)


def test_it_is_written_only_when_its_meaning_changes(locked: Folder) -> None:
    path = locked / "tiny.lock.toml"
    text = path.read_text()
    path.write_text("# kept\n" + text.replace('ckpt-build = "', 'ckpt-build = "9.'))
    before = path.stat()
    (locked / "tiny.safetensors").unlink()
    locked.build()
    assert path.stat().st_mtime_ns == before.st_mtime_ns, "tool versions and comments mean nothing"
    assert locked("build", "tiny.toml", "--locked").code == 0
    locked.write("tiny.toml", RECIPE.replace("fixes = ", "# fixed\nfixes = "))
    locked.build()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    locked.write("tiny.toml", RECIPE + 'output.precision = "bf16"\n')
    locked.build()
    assert path.stat().st_mtime_ns != before.st_mtime_ns and "# kept" not in path.read_text()


names = st.text(min_size=1, max_size=12)
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.integers(0, 2**53)
addresses = st.sampled_from(["", "https://example.com/x?y=z", "civitai:1@2", "hf://a/b/c.ckpt", "file:a/b"])
locks = st.builds(
    Lock,
    recipe=hexes,
    sources=st.dictionaries(names, st.builds(LockedSource, names, hexes, sizes, addresses), max_size=3),
    components=st.lists(st.builds(LockedComponent, names, names, names, names, hexes, sizes), max_size=3).map(
        lambda c: tuple(sorted(c, key=lambda c: (c.output, c.cls)))
    ),
    outputs=st.dictionaries(names, st.builds(LockedOutput, names, hexes, hexes, sizes), max_size=2),
)


@settings(max_examples=60)
@given(lock=locks)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lock: Lock) -> None:
    path = tmp_path_factory.mktemp("lock") / "x.lock.toml"
    assert write_lock(path, lock)
    assert read_lock(path) == lock
    assert not write_lock(path, lock)
    assert differences(lock, lock) == []


CHANGES: dict[str, Callable[[Folder], object]] = {
    "a fix less": lambda f: f.write("tiny.toml", RECIPE.replace('["clip-position-ids"]', "[]")),
    "another precision": lambda f: f.write("tiny.toml", RECIPE + 'output.precision = "bf16"\n'),
    "metadata": lambda f: f.write("tiny.toml", RECIPE + 'output.metadata.author = "x"\n'),
    "another vae": lambda f: save(f / "vae.safetensors", model("VAE-tiny", seed=3)),
    "another base": lambda f: save_dirty(f / "dirty.ckpt", seed=4),
    "a name": lambda f: f.write("tiny.toml", RECIPE.replace('"tiny"', '"tiny2"', 1)),
    "the name of the file": lambda f: f.write("tiny.toml", RECIPE + 'output.file = "x.safetensors"\n'),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_locked_shows_what_changed(locked: Folder, change: str) -> None:
    before, lock = (locked / "tiny.safetensors").read_bytes(), (locked / "tiny.lock.toml").read_bytes()
    CHANGES[change](locked)
    files = {p.name for p in locked.path.iterdir()}
    said = locked("build", "tiny.toml", "--locked")
    assert said.code == 4
    text = said.err[said.err.index("error:") :]
    assert golden(GOLDEN / f"locked-{change.replace(' ', '-')}.txt", text) == text
    assert (locked / "tiny.safetensors").read_bytes() == before
    assert (locked / "tiny.lock.toml").read_bytes() == lock
    assert {p.name for p in locked.path.iterdir()} == files
    # Without the flag the change is taken, and said where something was otherwise before.
    said = locked("build", "tiny.toml")
    assert said.code == 0
    assert (locked / "tiny.lock.toml").read_bytes() != lock
    assert locked("build", "tiny.toml", "--locked").code == 0


def test_frozen_is_locked_and_offline(locked: Folder) -> None:
    assert locked("build", "tiny.toml", "--frozen").code == 0
    CHANGES["another vae"](locked)
    assert locked("build", "tiny.toml", "--frozen").code == 4


def test_locked_needs_a_lock(folder: Folder) -> None:
    said = folder("build", "tiny.toml", "--locked")
    assert said.code == 4 and "there is no lock `tiny.lock.toml`\n  --> tiny.toml\n" in said.err
    assert not (folder / "tiny.safetensors").exists()


def test_locked_builds_elsewhere(locked: Folder) -> None:
    """With the lock and the sources alone, in another place and another store."""
    other = locked.beside("other", store="cold")
    (other / "tiny.safetensors").unlink()
    assert other("build", "tiny.toml", "--frozen").code == 0
    assert (other / "tiny.safetensors").read_bytes() == (locked / "tiny.safetensors").read_bytes()


BROKEN = {
    "no-toml": "version = ",
    "no-version": "profile = 1\n",
    "newer": "version = 99\n",
    "no-recipe": "version = 1\nprofile = 1\n",
    "wrong-type": 'version = 1\nprofile = 1\nrecipe = "x"\n[sources.a]\nrequested = 1\n',
    "unknown-key": 'version = 1\nprofile = 1\nrecipe = "x"\n[sources.a]\nfoo = 1\n',
    "no-table": 'version = 1\nprofile = 1\nrecipe = "x"\nsources = 3\n',
    "profile": 'version = 1\nprofile = "one"\nrecipe = "x"\n',
}


def test_a_lock_that_cannot_be_read(locked: Folder) -> None:
    good = (locked / "tiny.lock.toml").read_bytes()
    for name, text in BROKEN.items():
        locked.write("tiny.lock.toml", text)
        said = locked("plan", "tiny.toml")
        assert said.code == 4
        assert golden(GOLDEN / f"lock-{name}.txt", said.err) == said.err
        assert locked("lock", "tiny.toml").code == 0, "what the hint says does help"
    locked.write("tiny.lock.toml", text)
    for options in ((), ("--locked",)):
        assert locked("build", "tiny.toml", *options).code == 4
    assert (locked / "tiny.lock.toml").read_text() == text
    locked("lock", "tiny.toml")
    locked.build()
    assert (locked / "tiny.lock.toml").read_bytes() == good


def test_a_lock_of_strange_bytes(locked: Folder) -> None:
    (locked / "tiny.lock.toml").write_bytes(b"\xff\xfe")
    assert locked("build", "tiny.toml").code == 4
    with pytest.raises(LockError):
        read_lock(locked.path)


def test_lock_pins_without_building(folder: Folder) -> None:
    said = folder("lock", "tiny.toml")
    assert said.code == 0 and said.out == "written  tiny.lock.toml\n"
    lock = read_lock(folder / "tiny.lock.toml")
    assert lock is not None and set(lock.sources) == {"dirty", "vae"} and not lock.outputs
    assert not folder.components() and not (folder / "tiny.safetensors").exists()
    assert folder("lock", "tiny.toml").out == "unchanged  tiny.lock.toml\n"
    folder.build()
    full = (folder / "tiny.lock.toml").read_bytes()
    assert folder("lock", "tiny.toml").out == "unchanged  tiny.lock.toml\n"
    assert (folder / "tiny.lock.toml").read_bytes() == full, "what the build pinned stays"


def test_lock_takes_what_changed(locked: Folder) -> None:
    save(locked / "vae.safetensors", model("VAE-tiny", seed=3))
    said = locked("lock", "tiny.toml")
    assert said.code == 0 and said.out.startswith("written  tiny.lock.toml\n")
    assert re.search(r"source `vae`: sha256: [0-9a-f]{12}… became [0-9a-f]{12}…", said.out)
    lock = read_lock(locked / "tiny.lock.toml")
    assert lock is not None and not lock.outputs, "what was made of the other is not what will be"
    said = locked("lock", "tiny.toml", "--upgrade", "vea")
    assert said.code == 2 and "did you mean `vae`?" in said.err


def test_another_container_does_not_change_the_lock(locked: Folder) -> None:
    before = (locked / "tiny.lock.toml").read_bytes()
    assert locked("build", "tiny.toml", "-o", "x.ckpt").code == 0
    assert (locked / "tiny.lock.toml").read_bytes() == before


LOCKED_ZERO = """
[[components]]
output = "tiny"
class = "VAE-tiny"
component = "VAE-tiny-SD"
source = "vae"
blake3 = "0000000000000000000000000000000000000000000000000000000000000000"
tensors = 1

"""
EXTRA = {
    "an output": '\n[outputs.more]\nfile = "x.pt"\nsha256 = "{0}"\ntensor_digest = "{0}"\nsize = 1\n',
    "a component of another output": LOCKED_ZERO.replace('"tiny"', '"more"'),
    "a component said twice": LOCKED_ZERO,
}


@pytest.mark.parametrize("extra", EXTRA)
def test_what_the_recipe_does_not_make_is_stale(locked: Folder, extra: str) -> None:
    text, more = (locked / "tiny.lock.toml").read_text(), EXTRA[extra].replace("{0}", "0" * 64)
    text = (
        text.replace("[[components]]", more.lstrip() + "[[components]]", 1) if "[[" in more else text + more
    )
    locked.write("tiny.lock.toml", text)
    said = locked("build", "tiny.toml", "--locked")
    assert said.code == 4 and "the lock is stale" in said.err, said.err


def test_the_hint_for_what_no_lock_can_replace(locked: Folder) -> None:
    (locked / "tiny.lock.toml").unlink()
    (locked / "tiny.lock.toml").mkdir()
    said = locked("build", "tiny.toml", "--locked")
    assert said.code == 4 and "hint: remove it, and `ckpt lock` writes a lock" in said.err


def test_where_the_lock_lies(folder: Folder) -> None:
    folder.tiny()
    assert folder("build", "tiny.toml", "--no-lock").code == 0
    assert not (folder / "tiny.lock.toml").exists()
    assert folder("build", "tiny.toml", "--lock", "other.toml").code == 0
    assert not (folder / "tiny.lock.toml").exists() and (folder / "other.toml").exists()
    assert folder("build", "tiny.toml", "--locked").code == 4
    for command in ("build", "verify", "plan", "lock"):
        locked = ["--locked"] if command == "build" else []
        assert folder(command, "tiny.toml", "--lock", "other.toml", *locked).code == 0
    assert folder("build", "tiny.toml", "--lock", "tiny.toml").code != 0
    assert folder("build", "tiny.toml", "--no-lock", "--locked").code == 2
    assert folder("build", "tiny.toml", "--no-lock", "--lock", "x.toml").code == 2
    said = folder("build", "other.toml")
    assert said.code == 3 and "this is a lock, not a recipe" in said.err and said.err.count("error") == 1


def test_a_lock_that_could_not_be_written_is_said_first(folder: Folder) -> None:
    said = folder("build", "tiny.toml", "--lock", "none/tiny.lock.toml")
    assert said.code == 7 and "`--lock FILE` writes the lock of one recipe elsewhere" in said.err, said.err
    assert not (folder / "tiny.safetensors").exists()
