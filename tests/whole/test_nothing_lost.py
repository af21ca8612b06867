"""Whatever befalls a build, the old output stays until the new one is whole, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from builder.base.errors import CkptError, OutputError, SourceError, render
from builder.base.progress import Reporter
from builder.build import Build, build
from builder.store import Store
from builder.store.entries import At, identity
from builder.workspace import Settings, Workspace, find_lock
from tests.help.building import RECIPE, Folder, files, model, save, save_dirty

NOBODY = 65534
TEMPORARY = re.compile(r"\.ckpt-[0-9a-f]{16}\.tmp")

# Processes that are killed are forked from one that has imported torch: a kill takes them at their work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "builder.cli.build", "builder.build", "tests.help.building"])


def prepared(root: Path, seed: int = 0) -> Folder:
    save(root / "work" / "dirty.safetensors", model(seed=seed))
    save(root / "work" / "vae.safetensors", model("VAE-tiny", seed=2))
    made = Folder(root / "work", root / "store")
    made.write("tiny.toml", RECIPE.replace("dirty.ckpt", "dirty.safetensors"))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return prepared(tmp_path)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """What builds make that nothing befalls, by the seed of their base."""
    made = {}
    for seed in (0, 7):
        folder = prepared(tmp_path_factory.mktemp("product"), seed)
        folder.build()
        made[seed] = (folder / "tiny.safetensors").read_bytes()
    return made


@pytest.fixture
def product(products: dict[int, bytes]) -> bytes:
    """What the build makes when nothing befalls it."""
    return products[0]


def started(target: Callable[..., None], *args: object) -> BaseProcess:
    process = FORKS.Process(target=target, args=args)
    process.start()
    return process


def _build(folder: Folder, *options: str) -> None:
    raise SystemExit(folder("build", "tiny.toml", "-q", *options).code)


CALLS = ("pwrite", "link", "rename", "replace", "fsync", "unlink", "mkdir", "chmod", "utime", "open")


def _build_until(folder: Folder, last: int, count: Path) -> None:
    """Build, and be killed at the call number `last` that changes files; write how many there were."""
    done = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    code = folder("build", "tiny.toml", "-q").code
    count.write_text(str(done))
    raise SystemExit(code)


def intact(folder: Folder, old: bytes, new: bytes) -> bool:
    """Whether the output is already the new one; it must be one of the two, and alone."""
    now = (folder / "tiny.safetensors").read_bytes()
    assert now in (old, new)
    expected = {"dirty.safetensors", "vae.safetensors", "tiny.toml", "tiny.safetensors"}
    extra = files(folder.path) - expected - {"tiny.lock.toml"}
    # A file that replaces another has a name of its own for the length of one call.
    assert len(extra) <= 1 and all(TEMPORARY.fullmatch(n) for n in extra), extra
    return now == new


def recovers(folder: Folder, new: bytes) -> None:
    """The next build is right, and the folder and the store are as after any other."""
    assert folder("build", "tiny.toml").code == 0
    assert (folder / "tiny.safetensors").read_bytes() == new
    assert files(folder.path) == {
        "dirty.safetensors",
        "vae.safetensors",
        "tiny.toml",
        "tiny.safetensors",
        "tiny.lock.toml",
    }
    assert len(folder.components()) == 3
    assert not list(folder.store.glob("quarantine/*"))
    assert folder("store", "check").code == 0


def test_killed_at_random_moments(folder: Folder, product: bytes) -> None:
    old = b"what was there before"
    began = time.monotonic()
    first = started(_build, folder)
    first.join()
    length = time.monotonic() - began
    assert first.exitcode == 0 and (folder / "tiny.safetensors").read_bytes() == product
    chance = random.Random(1)
    killed = 0
    for _ in range(10):
        if chance.random() < 0.5:
            shutil.rmtree(folder.store, ignore_errors=True)
        (folder / "tiny.safetensors").write_bytes(old)
        process = started(_build, folder)
        time.sleep(chance.uniform(0, length))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        intact(folder, old, product)
    assert killed
    recovers(folder, product)


def test_killed_at_any_call_that_changes_files(folder: Folder, product: bytes, tmp_path: Path) -> None:
    old = b"what was there before"
    (folder / "tiny.safetensors").write_bytes(old)
    count = tmp_path / "count"
    process = started(_build_until, folder, 0, count)
    process.join()
    assert process.exitcode == 0 and intact(folder, old, product)
    calls = int(count.read_text())
    assert calls > 60, "of the output, and of each record of the store"
    # The output comes first, then what is remembered of it, then the lock.
    moments = range(1, calls + 2, 5)
    early = 0
    for moment in moments:
        shutil.rmtree(folder.store, ignore_errors=True)
        (folder / "tiny.safetensors").write_bytes(old)
        process = started(_build_until, folder, moment, count)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)  # a few calls more or less: threads meet or not
        early += not intact(folder, old, product)
        if moment % 4 == 0:
            recovers(folder, product)
    assert 6 <= early <= len(moments) - 6
    recovers(folder, product)


def test_killed_while_it_checks(folder: Folder, product: bytes) -> None:
    """What is built a second time to compare is not left beside the output either."""
    folder.build()
    process = started(_build, folder, "--check")
    until = time.monotonic() + 60
    while not list(folder.store.glob("tmp/*/*")) and process.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert intact(folder, b"", product)
    assert "tiny.lock.toml" in files(folder.path)
    # The next that makes something removes what the dead one left in the store.
    (folder / "tiny.toml").write_text(
        RECIPE.replace("dirty.ckpt", "dirty.safetensors") + 'output.precision="bf16"\n'
    )
    assert folder("build", "tiny.toml").code == 0
    assert not list(folder.store.glob("tmp/*"))


def test_interrupted(folder: Folder, product: bytes) -> None:
    """Ctrl-C ends with 130, and leaves no more than a kill does."""
    folder("build", "tiny.toml", "-o", "other.safetensors")
    (folder / "other.safetensors").unlink()
    shutil.rmtree(folder.store)
    began = _Signal(folder.store / "files")  # the first digest is known
    process = started(_build, folder)
    began.wait(process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode in (0, 130)
    assert files(folder.path) - {"tiny.safetensors", "tiny.lock.toml"} == {
        "dirty.safetensors",
        "vae.safetensors",
        "tiny.toml",
    }
    recovers(folder, product)


class _Signal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def wait(self, process: BaseProcess) -> None:
        until = time.monotonic() + 60
        while not self.path.exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.001)


# -- no room


def _with_limit(folder: Folder, limit: int, log: Path, *options: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    said = folder("build", "tiny.toml", *options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.write_text(said.err)
    raise SystemExit(said.code)


@pytest.mark.parametrize("limit", [100, 300_000, 650_000])
def test_no_room_for_a_file(folder: Folder, product: bytes, limit: int, tmp_path: Path) -> None:
    """At its beginning, in its midst, and near its end."""
    old = b"what was there before"
    (folder / "tiny.safetensors").write_bytes(old)
    process = started(_with_limit, folder, limit, tmp_path / "log")
    process.join()
    assert process.exitcode == 7, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "cannot write" in said and "Traceback" not in said
    assert not intact(folder, old, product) and "tiny.lock.toml" not in files(folder.path)
    assert not list(folder.store.glob("tmp/*/*"))
    recovers(folder, product)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_under_the_output(folder: Folder, product: bytes, small_disk: Path) -> None:
    target = small_disk / "out.safetensors"
    target.write_bytes(b"what was there before")
    said = folder("build", "tiny.toml", "-o", target)
    assert said.code == 7
    assert "there is no room to write" in said.err and "are free" in said.err
    assert target.read_bytes() == b"what was there before"
    assert files(small_disk) == {"out.safetensors"}
    recovers(folder, product)


def test_a_full_disk_under_the_store(folder: Folder, product: bytes, small_disk: Path) -> None:
    """What is to be kept there has no room; a table of digests has."""
    small = Folder(folder.path, small_disk / "store", {"CKPT_STORE_KEEP": "all"})
    said = small("build", "tiny.toml")
    assert said.code == 7
    assert "no room" in said.err or "No space left" in said.err
    assert "tiny.lock.toml" not in files(folder.path)
    assert (folder / "tiny.safetensors").read_bytes() == product, "it was finished before"
    assert not list(small.store.glob("tmp/*/*"))
    shutil.rmtree(small.store)
    recovers(Folder(folder.path, small_disk / "store"), product)


def test_a_disk_without_room_for_anything_under_the_store(
    folder: Folder, product: bytes, small_disk: Path
) -> None:
    """What was made stays, and what it is becomes known another time."""
    (small_disk / "ballast").write_bytes(bytes(400_000))
    fd = os.open(small_disk / "more", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4096)):
            pass
    os.close(fd)
    said = Folder(folder.path, small_disk / "store")("build", "tiny.toml")
    assert said.code in (0, 7) and "Traceback" not in said.err
    if said.code == 0:
        assert (folder / "tiny.safetensors").read_bytes() == product
    else:
        assert "cannot write to the store" in said.err and "CKPT_STORE" in said.err
    recovers(folder, product)


# -- sources that change


class When(Reporter):
    """Does something once, when a task has come to its first bytes."""

    def __init__(self, task: str, action: Callable[[], object]) -> None:
        self.task, self.action, self.done = task, action, False

    def advance(self, task: str, count: int) -> None:
        if task == self.task and not self.done:
            self.done = True
            self.action()


def built(folder: Folder, reporter: When) -> Build:
    """Build with a reporter of the test's own."""
    settings = Settings.from_environment(folder.variables)
    with (
        Workspace(settings, offline=True, reporter=reporter) as workspace,
        workspace.sources() as sources,
    ):
        recipe = workspace.recipe(folder / "tiny.toml")
        plan = workspace.plan(recipe, sources, find_lock(recipe))
        if reporter.task == "":
            reporter.advance("", 0)
        return build(plan, sources, threads=2, reporter=reporter)


def rewrite(path: Path) -> None:
    """Other weights in the same file, as another program writes them."""
    save(path, model(seed=7))


def replace(path: Path) -> None:
    """Other weights in another file of the same name."""
    save(path.with_name("new.safetensors"), model(seed=7)).replace(path)


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize(
    ("task", "known"),
    [
        pytest.param("", False, id="planned"),
        pytest.param("", True, id="planned-known"),
        pytest.param("hashing dirty.safetensors", False, id="hashed"),
        pytest.param("tiny.safetensors", False, id="read"),
        pytest.param("tiny.safetensors", True, id="read-known"),
    ],
)
def test_a_source_that_changes(
    folder: Folder,
    task: str,
    change: Callable[[Path], None],
    known: bool,
    products: dict[int, bytes],
) -> None:
    """After the plan, while it is hashed, while it is read: nothing made of it is remembered."""
    old = b"what was there before"
    source = folder / "dirty.safetensors"
    (folder / "tiny.safetensors").write_bytes(old)
    if known:
        folder.know("dirty.safetensors", "vae.safetensors")
    before = source.read_bytes()
    with pytest.raises(SourceError) as caught:
        built(folder, When(task, lambda: change(source)))
    assert caught.value.exit_code == 6
    said = "\n".join(render(p) for p in caught.value.problems)
    assert "changed while it was read" in said  # or it may be, where it ends too early
    assert (folder / "tiny.safetensors").read_bytes() == old
    recorded = {json.loads(p.read_text())["class"] for p in folder.store.glob("actions/*/*.json")}
    assert "UNET-tiny" not in recorded
    folder.build()
    assert (folder / "tiny.safetensors").read_bytes() == products[7]
    source.write_bytes(before)
    folder.build()
    assert (folder / "tiny.safetensors").read_bytes() == products[0]


def test_a_base_that_changes_beside_its_components(folder: Folder) -> None:
    """What lies beside the components comes from the file that the metadata names, too."""
    save_dirty(folder / "dirty.safetensors")
    folder.build()
    (folder / "tiny.safetensors").unlink()
    folder.know("dirty.safetensors", "vae.safetensors")
    with pytest.raises(SourceError, match="changed while it was read"):
        built(folder, When("", lambda: save_dirty(folder / "dirty.safetensors", seed=3)))
    assert not (folder / "tiny.safetensors").exists()


# -- several at once


def test_two_builds_at_once(folder: Folder, product: bytes) -> None:
    for _ in range(3):
        both = [started(_build, folder) for _ in range(2)]
        for process in both:
            process.join()
        assert [p.exitcode for p in both] == [0, 0]
        recovers(folder, product)
        shutil.rmtree(folder.store)
        (folder / "tiny.safetensors").unlink()


def test_builds_of_two_recipes_into_one_file(folder: Folder, product: bytes) -> None:
    """One of them wins; the file is never taken for what the other one made."""
    folder.write("tiny.toml", (folder / "tiny.toml").read_text())
    other = folder / "other.toml"
    other.write_text(
        (folder / "tiny.toml").read_text() + 'output.precision = "bf16"\noutput.file = "tiny.safetensors"\n'
    )
    folder.build("other.toml")
    rival = (folder / "tiny.safetensors").read_bytes()
    assert rival != product
    for _ in range(2):
        both = [started(_build, folder), started(_build_other, folder)]
        for process in both:
            process.join()
        assert [p.exitcode for p in both] == [0, 0]
        assert (folder / "tiny.safetensors").read_bytes() in (rival, product)
        folder.build("tiny.toml")
        assert (folder / "tiny.safetensors").read_bytes() == product
        folder.build("other.toml")
        assert (folder / "tiny.safetensors").read_bytes() == rival


def _build_other(folder: Folder) -> None:
    raise SystemExit(folder("build", "other.toml", "-q").code)


# -- damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    times = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def of_class(folder: Folder, cls: str) -> str:
    """The digest of the one component of a class that the store knows."""
    entries = folder.store.glob("components/*/*.json")
    (digest,) = [e.stem for e in entries if json.loads(e.read_text())["class"] == cls]
    return digest


@pytest.mark.parametrize("where", ["data", "last byte", "header", "length"])
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_flipped_bit_in_a_component_that_is_kept(folder: Folder, where: str, form: str) -> None:
    folder = Folder(folder.path, folder.store, {"CKPT_STORE_KEEP": "all"})
    folder.build()
    target = folder / f"out.{form}"
    assert folder("build", "tiny.toml", "-o", target).code == 0
    expected = target.read_bytes()
    target.unlink()
    path = folder.blobs()[of_class(folder, "VAE-tiny")]
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    at = {
        "data": 8 + header + 12_345,
        "last byte": -1,
        "header": data.index(b"encoder.conv_in"),
        "length": 1,
    }[where]
    flip(path, at)
    said = folder("build", "tiny.toml", "-o", target)
    assert said.code == 0, said.err
    assert target.read_bytes() == expected
    assert path.read_bytes() == data, "made again as it was"
    assert "is damaged" in said.err
    assert folder("store", "check").code == 0


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_flipped_bit_in_a_component_where_it_lies(folder: Folder, product: bytes, form: str) -> None:
    """Also where the file tells nothing: a disk that forgets changes no times."""
    folder.build()
    target = folder / f"out.{form}"
    assert folder("build", "tiny.toml", "-o", target).code == 0
    expected = target.read_bytes()
    target.unlink()
    digest = of_class(folder, "VAE-tiny")
    path = folder / "tiny.safetensors"
    with Store(folder.store) as store:
        entry = store.entry(digest)
        assert entry is not None
        (at,) = [at for at in entry.places if at.path == str(path)]
        flip(path, at.offsets[-1] + 1)
        store.place(entry, At(str(path), identity(path.stat()), at.offsets))
    said = folder("build", "tiny.toml", "-o", target)
    assert said.code == 0, said.err
    assert "is damaged" in said.err and str(path) in said.err
    assert target.read_bytes() == expected
    assert path.read_bytes() != product, "it is nobody's to mend but that build's"
    assert folder("build", "tiny.toml").code == 0
    assert path.read_bytes() == product
    assert folder("store", "check").code == 0


@pytest.mark.parametrize("kind", ["actions", "components", "files", "facts/output", "facts/metric"])
def test_a_flipped_bit_in_a_record(folder: Folder, kind: str) -> None:
    folder.know("dirty.safetensors", "vae.safetensors")
    folder.build()
    expected = (folder / "tiny.safetensors").read_bytes()
    records = sorted(folder.store.glob(f"{kind}/*/*.json"))
    assert records
    chance = random.Random(3)
    for record in records:
        flip(record, chance.randrange(record.stat().st_size))
    assert folder("build", "tiny.toml").code == 0
    assert (folder / "tiny.safetensors").read_bytes() == expected
    (folder / "tiny.safetensors").unlink()
    assert folder("build", "tiny.toml").code == 0
    assert (folder / "tiny.safetensors").read_bytes() == expected


@pytest.mark.parametrize("gone", ["entries", "all of them", "another's"])
def test_a_record_that_leads_nowhere_is_none(folder: Folder, gone: str) -> None:
    """What an action made is known, but not what that consists of, or where it lies."""
    folder.build()
    expected = (folder / "tiny.safetensors").read_bytes()
    entries = sorted(folder.store.glob("components/*/*.json"))
    if gone == "another's":  # sealed, but not the table that its name is the digest of
        for path, other in zip(entries, [entry.read_bytes() for entry in reversed(entries)], strict=True):
            path.write_bytes(other)
        entries = [entries[0], entries[2]]
    else:
        for path in entries:
            path.unlink()
    if gone == "all of them":
        (folder / "tiny.safetensors").unlink()
    made = folder.build("tiny.toml", "-o", "again.safetensors")
    assert len(made["made"]) == len(entries)
    assert (folder / "again.safetensors").read_bytes() == expected
    assert len(folder.build()["made"]) == 0
    assert (folder / "tiny.safetensors").read_bytes() == expected


def test_a_flipped_bit_in_the_output(folder: Folder, product: bytes) -> None:
    folder.build()
    flip(folder / "tiny.safetensors", 500_000)
    assert folder.build()["outputs"][0]["state"] == "written"
    assert (folder / "tiny.safetensors").read_bytes() == product


# -- what cannot be read or written


def _as_nobody(folder: Folder, log: Path, *args: str) -> None:
    folder("plan", "tiny.toml")  # imports what nobody may have no right to
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    said = folder(*args)
    log.write_text(said.err)
    raise SystemExit(said.code)


@pytest.fixture
def public(folder: Folder) -> Iterator[Folder]:
    """The folder where anyone may come, and belongs to nobody."""
    root = Path(tempfile.mkdtemp(prefix="ckpt-test-"))
    root.chmod(0o755)
    shutil.move(folder.path, root / "work")
    made = Folder(root / "work", root / "store")
    yield made
    shutil.rmtree(root)


def give_away(root: Path) -> None:
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def test_an_unreadable_source(public: Folder) -> None:
    (public / "tiny.safetensors").write_bytes(b"old")
    give_away(public.path.parent)
    (public / "vae.safetensors").chmod(0)
    log = public / "log"
    process = started(_as_nobody, public, log, "build", "tiny.toml")
    process.join()
    assert process.exitcode == 6
    assert "cannot open" in log.read_text() and "Permission denied" in log.read_text()
    assert (public / "tiny.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("data", "code"),
    [(None, 5), (b"", 6), (b"<!DOCTYPE html>", 6), (b"\x00" * 64, 6)],
    ids=["absent", "empty", "web page", "zeros"],
)
def test_a_source_that_is_none(folder: Folder, data: bytes | None, code: int) -> None:
    (folder / "tiny.safetensors").write_bytes(b"old")
    (folder / "vae.safetensors").unlink()
    if data is not None:
        (folder / "vae.safetensors").write_bytes(data)
    said = folder("build", "tiny.toml", "--offline")
    assert said.code == code
    assert "vae" in said.err and "Traceback" not in said.err
    assert (folder / "tiny.safetensors").read_bytes() == b"old"


def test_a_truncated_source(folder: Folder) -> None:
    data = (folder / "vae.safetensors").read_bytes()
    (folder / "vae.safetensors").write_bytes(data[:-100])
    assert folder("build", "tiny.toml").code == 6
    assert "tiny.safetensors" not in files(folder.path)


@pytest.mark.parametrize("keep", ["", "all"])
def test_a_complete_store_that_cannot_be_written_to(public: Folder, product: bytes, keep: str) -> None:
    public = Folder(public.path, public.store, {"CKPT_STORE_KEEP": keep})
    public.know("dirty.safetensors", "vae.safetensors")
    public.build()
    (public / "tiny.safetensors").unlink()
    for path in (public.store, *public.store.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(public.store)
    give_away(public.path)
    log = public / "log"
    process = started(_as_nobody, public, log, "build", "tiny.toml")
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert (public / "tiny.safetensors").read_bytes() == product
    assert files(public.store) == before


def test_an_output_folder_that_cannot_be_written_to(public: Folder) -> None:
    give_away(public.path.parent)
    (public.path.parent / "shut").mkdir()
    log = public / "log"
    target = public.path.parent / "shut" / "out.safetensors"
    process = started(_as_nobody, public, log, "build", "tiny.toml", "-o", str(target))
    process.join()
    assert process.exitcode == (7 if os.geteuid() == 0 else 0)
    assert not target.exists() or os.geteuid()


@pytest.mark.parametrize("way", ["path", "link", "hard link"])
def test_an_input_is_never_overwritten(folder: Folder, way: str) -> None:
    source = folder / "vae.safetensors"
    before = source.read_bytes()
    target = folder / "target.safetensors"
    if way == "path":
        target = source
    elif way == "link":
        target.symlink_to(source)
    else:
        target.hardlink_to(source)
    for _ in range(2):  # also when the components are stored, and the source need not be read
        said = folder("build", "tiny.toml", "-o", target)
        assert said.code == 7
        assert "is one of the inputs" in said.err
        assert source.read_bytes() == before
        assert folder("build", "tiny.toml").code == 0


@pytest.mark.parametrize("name", ["tiny.toml", "tiny.lock.toml"])
def test_the_recipe_and_its_lock_are_not_overwritten(folder: Folder, name: str) -> None:
    folder.build()
    before = (folder / name).read_bytes()
    assert folder("build", "tiny.toml", "-o", name).code == 2
    assert (folder / name).read_bytes() == before


def test_errors_are_of_the_kinds_that_are_documented() -> None:
    assert issubclass(OutputError, CkptError) and OutputError.exit_code == 7
