"""The store: what it keeps, what it notices, and what others can do to it meanwhile."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from builder.base.disk import scratch_folder, sweep
from builder.base.errors import OutputError, Problem, UsageError
from builder.base.progress import Reporter
from builder.cli import run
from builder.formats.write_safetensors import write
from builder.store import DamagedEntry, Made, Store, default_root
from builder.store.entries import PLACES, At, Entry, Stored, VerifiedTensor, identity
from builder.store.memory import FINE, RACY, SECOND
from builder.store.records import read_record, write_record
from builder.store.upkeep import check, collect, items
from builder.tensors.digests import Row, component_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor

ROOT = Path(__file__).parents[2]
A, B, C = "a" * 64, "b" * 64, "c" * 64


class Listener(Reporter):
    def __init__(self) -> None:
        self.warnings: list[Problem] = []

    def warn(self, problem: Problem) -> None:
        self.warnings.append(problem)


def model(seed: int = 0, size: int = 300) -> dict[str, LazyTensor]:
    data = random.Random(seed)
    return {
        "conv.weight": MemoryTensor(DType.F16, (size,), data.randbytes(2 * size)),
        "position_ids": MemoryTensor(DType.I64, (1, 7), data.randbytes(56)),
        "scalar": MemoryTensor(DType.F32, (), data.randbytes(4)),
        "empty": MemoryTensor(DType.F16, (0, 4), b""),
    }


def content(tensors: object) -> dict[str, tuple[DType, tuple[int, ...], bytes]]:
    assert hasattr(tensors, "items")
    return {n: (t.dtype, t.shape, bytes(t.tobytes())) for n, t in tensors.items()}


def files(root: Path, suffix: str = "") -> list[Path]:
    return sorted(p for p in root.rglob(f"*{suffix}") if p.is_file())


def put(store: Store, action: str = A, seed: int = 0, size: int = 300) -> Made:
    """A component kept in a blob, and known as what an action makes."""
    made = store.save("UNET-v1-SD", "UNET-v1", model(seed, size), source="a.ckpt")
    store.record(action, made)
    return made


def blob(store: Store, made: Made) -> Path:
    return store.blob_path(made.digest)


def opened(store: Store, made: Made) -> Stored:
    found = store.open(made.digest)
    assert found is not None
    return found


def read(store: Store, digest: str) -> dict[str, tuple[DType, tuple[int, ...], bytes]] | None:
    """All of a component as a build reads it: what is damaged is taken out of use, and is not there."""
    found = store.open(digest)
    if found is None:
        return None
    try:
        return content(found.tensors)
    except DamagedEntry as damaged:
        store.set_aside(damaged)
        return None
    finally:
        found.close()


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change a file in place, as a failing disk does."""
    data = bytearray(path.read_bytes())
    change(data)
    path.chmod(0o644)
    path.write_bytes(data)


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", reporter=Listener())


# What is kept.


def test_a_component_comes_back(store: Store) -> None:
    made = put(store)
    assert made.component == "UNET-v1-SD"
    assert (made.tensors, made.bytes) == (4, 660)
    assert store.lookup(A, "UNET-v1") == made
    assert store.lookup(B, "UNET-v1") is None
    assert store.holds(made.digest)
    assert read(store, made.digest) == content(model())
    entry = store.entry(made.digest)
    assert entry is not None
    assert component_digest(entry.rows) == made.digest
    assert (entry.component, entry.cls, entry.source) == ("UNET-v1-SD", "UNET-v1", "a.ckpt")
    assert (entry.nbytes, entry.places) == (660, ())


def test_a_blob_is_a_safetensors_file_named_by_its_content(store: Store) -> None:
    made = put(store)
    [path] = files(store.root, ".safetensors")
    assert path == blob(store, made)
    assert path.stat().st_mode & 0o777 == 0o444
    assert path.stat().st_nlink == 1
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(model())


def test_bytes_do_not_depend_on_threads_or_on_what_was_there(store: Store, tmp_path: Path) -> None:
    put(store, seed=1)
    first = put(store)
    other = Store(tmp_path / "other")
    reordered = dict(reversed(model().items()))
    second = other.save("UNET-v1-SD", "UNET-v1", reordered, threads=4)
    assert first == second
    assert blob(store, first).read_bytes() == blob(other, first).read_bytes()


def test_actions_that_make_the_same_share_it(store: Store) -> None:
    assert put(store, A) == put(store, B)
    assert len(files(store.root, ".safetensors")) == 1
    store.record(C, put(store, A))
    assert store.lookup(C, "UNET-v1") == store.lookup(A, "UNET-v1")


def test_nothing_is_created_before_the_first_write(store: Store) -> None:
    assert store.lookup(A, "UNET-v1") is None
    for digest in ("0" * 64, "../" * 20, ""):
        assert store.open(digest) is None
        assert store.entry(digest) is None
        assert not store.holds(digest)
    assert store.remembered_sha256(Path(__file__).stat()) is None
    assert items(store) == []
    assert check(store) == []
    assert not store.download_path(A).exists()
    assert not store.root.exists()


def test_a_put_leaves_nothing_but_the_entry(store: Store) -> None:
    put(store)
    assert {p.suffix for p in files(store.root)} == {".safetensors", ".json"}
    assert list((store.root / "tmp").iterdir()) == []


def test_a_put_that_fails_leaves_nothing(store: Store) -> None:
    class Unreadable(MemoryTensor):
        def read_into(self, start: int, out: memoryview) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save("X", "X", model() | {"z": Unreadable(DType.F16, (1,), b"xx")})
    assert files(store.root) == []
    assert store.lookup(A, "UNET-v1") is None


def test_what_a_check_refuses_is_not_kept(store: Store) -> None:
    def refuse() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        store.save("X", "X", model(), check=refuse)
    assert files(store.root) == []


def test_a_component_may_be_recorded_later(store: Store) -> None:
    made = store.save("UNET-v1-SD", "UNET-v1", model())
    assert len(files(store.root)) == 2
    changes = ("clip-position-ids: 3 values repaired",)
    store.record(A, replace(made, changes=changes))
    found = store.lookup(A, "UNET-v1")
    assert found is not None and found.changes == changes


def test_facts_are_kept_and_may_be_forgotten(store: Store) -> None:
    assert store.recall("metric", "ab12", dict) is None
    store.note("metric", "ab12", {"UNET-v1": "0123"})
    store.note("metric", "ab12", {"UNET-v1": "0124"})
    assert store.recall("metric", "ab12", dict) == {"UNET-v1": "0124"}
    assert store.recall("output", "ab12", dict) is None
    [path] = files(store.root)
    rewrite(path, flip(5))
    assert store.recall("metric", "ab12", dict) is None
    assert [p.fact for p in check(store)] == ["a record is damaged, or another's"]
    store.note("metric", "ab12", {"UNET-v1": "0124"})
    assert [i.kind for i in collect(store, 0).removed] == ["fact"]
    assert store.recall("metric", "ab12", dict) is None


FULL = """
import resource, sys
from pathlib import Path
from builder.base.errors import OutputError, render
from builder.store import Store
from tests.store.test_store import A, put
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    put(Store(Path(sys.argv[1])), size=10_000)
except OutputError as error:
    print(render(error.problems[0]))
"""


@pytest.mark.parametrize("limit", [0, 50, 1000, 20_000])
def test_a_full_disk_leaves_nothing(store: Store, limit: int) -> None:
    assert finish(script(FULL, store.root, limit)).startswith("error: cannot write ")
    assert files(store.root) == []
    assert store.lookup(A, "UNET-v1") is None


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CKPT_STORE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "ckpt-build"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_root() == tmp_path / "home/.cache/ckpt-build"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_root() == tmp_path / "home/Library/Caches/ckpt-build"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_root() == tmp_path / "local/ckpt-build"
    monkeypatch.setenv("CKPT_STORE", "~/mine")
    assert default_root() == tmp_path / "home/mine"
    monkeypatch.setenv("CKPT_STORE", "~no-such-user/mine")
    with pytest.raises(UsageError, match="no home folder"):
        default_root()


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    store = Store(tmp_path / "store")
    assert store.lookup(A, "UNET-v1") is None
    with pytest.raises(OutputError, match="cannot write to the store"):
        put(store)


# What is noticed.


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(store: Store) -> None:
    made = put(store)
    path = blob(store, made)
    sound = path.read_bytes()
    noticed = 0
    for at in range(0, len(sound), 7):
        rewrite(path, flip(at))
        found = read(store, made.digest)
        if found is None:
            noticed += 1
            assert not path.exists()
            assert not store.holds(made.digest)
            assert put(store) == made
        else:  # in white space
            assert at < len(sound) - made.bytes
            assert found == content(model())
        assert read(store, made.digest) == content(model())
        path.chmod(0o644)
        path.write_bytes(sound)
    assert noticed > len(sound) / 7 * 0.9
    assert isinstance(store.reporter, Listener)
    assert len(store.reporter.warnings) == noticed
    assert "is damaged" in store.reporter.warnings[0].fact
    assert len(files(store.root / "quarantine")) == noticed


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_blob_is_not_there(store: Store, length: int) -> None:
    made = put(store)
    rewrite(blob(store, made), lambda data: data.__delitem__(slice(length, None)))
    assert store.open(made.digest) is None
    assert not store.holds(made.digest)
    assert len(files(store.root / "quarantine")) == 1
    assert put(store) == made
    assert read(store, made.digest) == content(model())


def test_what_was_made_is_known_also_where_its_bytes_are_nowhere(store: Store) -> None:
    made = put(store)
    blob(store, made).unlink()
    assert store.lookup(A, "UNET-v1") == made
    assert store.entry(made.digest) is not None
    assert store.open(made.digest) is None
    assert not store.holds(made.digest)


def test_a_component_without_its_action_can_be_opened(store: Store) -> None:
    made = put(store)
    store.action_path(A).unlink()
    assert store.lookup(A, "UNET-v1") is None
    assert read(store, made.digest) == content(model())


@pytest.mark.parametrize("kind", ["action", "entry"])
def test_a_damaged_record_is_none(store: Store, kind: str) -> None:
    made = put(store)

    def recall() -> object:
        return store.lookup(A, "UNET-v1") if kind == "action" else store.entry(made.digest)

    path = store.action_path(A) if kind == "action" else store.entry_path(made.digest)
    sound, known = path.read_bytes(), recall()
    for at in range(len(sound)):
        rewrite(path, flip(at))
        assert recall() in (None, known)  # a final newline may become another space
        path.write_bytes(sound)
    for text in (b"", b"[]", b"[" * 100_000, b"{}", b'{"seal": 1}', sound[:-10], b"\xff"):
        path.write_bytes(text)
        assert recall() is None
    if kind == "entry":  # without it nothing is known of the blob
        assert store.open(made.digest) is None
        assert put(store) == made
        assert read(store, made.digest) == content(model())


def test_a_record_of_another_version_is_none(store: Store) -> None:
    write_record(store.action_path(A), {"component": "X"})
    assert store.lookup(A, "UNET-v1") is None
    write_record(store.entry_path(B), {"component": "X"})
    assert store.entry(B) is None


def test_a_table_is_the_one_that_its_name_is_of(store: Store) -> None:
    """A seal is no proof, anyone can make one: who may write to the store cannot change a component."""
    made, other = put(store), put(store, B, seed=1)
    record = read_record(store.entry_path(other.digest))
    assert record is not None
    write_record(store.entry_path(made.digest), record)
    blob(store, made).chmod(0o644)
    blob(store, made).write_bytes(blob(store, other).read_bytes())
    assert store.entry(made.digest) is None
    assert store.open(made.digest) is None
    assert put(store) == made
    assert read(store, made.digest) == content(model())
    rewrite(blob(store, made), lambda data: data.__setitem__(slice(None), blob(store, other).read_bytes()))
    assert read(store, made.digest) is None


# Reading without trust.


def damaged_weight(store: Store, size: int = 300) -> tuple[Made, VerifiedTensor]:
    made = put(store, size=size)
    rewrite(blob(store, made), flip(-1))
    return made, opened(store, made).tensors["conv.weight"]


def test_the_last_piece_of_damaged_bytes_is_never_given_out(store: Store) -> None:
    made, tensor = damaged_weight(store)
    seen = 0
    with pytest.raises(DamagedEntry) as caught:
        for piece in tensor.windows(256):
            seen += len(piece)
    assert 0 < seen < tensor.nbytes
    assert "tensor `conv.weight`" in caught.value.problems[0].evidence[0]
    assert caught.value.digest == made.digest
    assert caught.value.path == str(blob(store, made))
    store.set_aside(caught.value)
    assert not store.holds(made.digest)
    assert store.open(made.digest) is None


@pytest.mark.parametrize("order", [[0, 200, 400], [400, 200, 0], [200, 0, 400], [400]])
def test_bytes_read_in_any_order_are_verified(store: Store, order: list[int]) -> None:
    made, tensor = damaged_weight(store)
    with pytest.raises(DamagedEntry):
        for start in order:
            tensor.read_into(start, memoryview(bytearray(200)))
    put(store)
    found = opened(store, made)
    data = bytearray(600)
    for start in order:
        found.tensors["conv.weight"].read_into(start, memoryview(data)[start : start + 200])
    expected = model()["conv.weight"].tobytes()
    assert all(data[start : start + 200] == expected[start : start + 200] for start in order)
    found.close()


def test_many_threads_may_read_one_tensor(store: Store) -> None:
    found = opened(store, put(store, size=20_000))
    data = bytearray(40_000)

    def work(first: int) -> None:
        for start in range(first, 40_000, 800):
            found.tensors["conv.weight"].read_into(start, memoryview(data)[start : start + 200])

    threads = [threading.Thread(target=work, args=(n * 200,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data == model(size=20_000)["conv.weight"].tobytes()
    found.close()


def test_a_blob_that_shrinks_while_it_is_read_is_damaged(store: Store) -> None:
    made = put(store)
    found = opened(store, made)
    path = blob(store, made)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(DamagedEntry) as caught:
        content(found.tensors)
    for tensor in found.tensors.values():
        if tensor.nbytes == 600:
            with pytest.raises(DamagedEntry):
                tensor.unchecked.tobytes()
        else:
            assert tensor.unchecked.tobytes() == tensor.tobytes()
    found.close()
    store.set_aside(caught.value)
    assert not path.exists()


def test_a_blob_made_anew_meanwhile_is_not_set_aside(store: Store) -> None:
    made, tensor = damaged_weight(store)
    with pytest.raises(DamagedEntry) as caught:
        tensor.tobytes()
    put(Store(store.root))  # as another process does
    store.set_aside(caught.value)
    assert read(store, made.digest) == content(model())
    assert files(store.root / "quarantine") == []


def test_an_assembly_of_damaged_parts_is_not_put_in_place(store: Store, tmp_path: Path) -> None:
    size = 5_000_000  # several windows, which threads read out of turn
    made = put(store, size=size)
    target = tmp_path / "out.safetensors"
    for threads in (1, 4):
        found = opened(store, made)
        write(target, found.tensors, threads=threads, durable=False)
        found.close()
        with safe_open(target, "np") as file:
            assert file.get_tensor("conv.weight").tobytes() == model(size=size)["conv.weight"].tobytes()
    before = target.read_bytes()
    rewrite(blob(store, made), flip(-1))
    for threads in (1, 4):
        found = opened(store, made)
        with pytest.raises(DamagedEntry) as caught:
            write(target, found.tensors, threads=threads, durable=False)
        found.close()
        assert target.read_bytes() == before
    store.set_aside(caught.value)
    assert not store.holds(made.digest)


# Places: components inside files that were built.


def built(store: Store, path: Path, seed: int = 0, size: int = 300) -> Entry:
    """A file as a build makes it, with a component under a prefix and something beside; it is remembered."""
    tensors = model(seed, size)
    beside: dict[str, LazyTensor] = {"beside": MemoryTensor(DType.F32, (2,), b"12345678")}
    named = {f"unet.{n}": t for n, t in tensors.items()}
    written = write(path, {**named, **beside}, digests=True, sha256=False, durable=False)
    rows = {n: Row(t.dtype, t.shape, written.digests[f"unet.{n}"]) for n, t in tensors.items()}
    entry = Entry(component_digest(rows), "UNET-v1-SD", "UNET-v1", "a.ckpt", rows)
    offsets = tuple(written.offsets[f"unet.{n}"] for n in sorted(tensors))
    store.place(entry, At(str(path), identity(path.stat()), offsets))
    known = store.entry(entry.digest)
    return known if known is not None else entry


def at_once(store: Store, entry: Entry, path: Path) -> None:
    """Have a place taken for unchanged, as where bytes rot and the file's times stay."""
    store.place(entry, At(str(path), identity(path.stat()), entry.places[0].offsets))


def test_a_place_serves_as_a_blob_does(store: Store, tmp_path: Path) -> None:
    product = tmp_path / "out.safetensors"
    entry = built(store, product)
    assert store.holds(entry.digest)
    found = store.open(entry.digest)
    assert found is not None and found.blob.name == str(product)
    found.close()
    assert read(store, entry.digest) == content(model())
    assert read(Store(store.root), entry.digest) == content(model())
    assert [p.suffix for p in files(store.root)] == [".json"], "no byte of it is in the store"
    assert sum(p.stat().st_size for p in files(store.root)) < 2000


def test_a_file_may_be_linked_to_but_not_moved(store: Store, tmp_path: Path) -> None:
    product, moved = tmp_path / "out.safetensors", tmp_path / "moved.safetensors"
    entry = built(store, product)
    product.rename(moved)
    assert not store.holds(entry.digest)
    assert store.open(entry.digest) is None
    assert store.entry(entry.digest) is not None, "what it is stays known"
    assert moved.exists()
    at_once(store, entry, moved)
    assert read(store, entry.digest) == content(model())
    known = store.entry(entry.digest)
    assert known is not None and [p.path for p in known.places] == [str(moved)], "the other is forgotten"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.write_bytes(p.read_bytes()),
        lambda p: os.utime(p, ns=(1, p.stat().st_mtime_ns + 1)),
        lambda p: os.truncate(p, p.stat().st_size - 1),
        lambda p: (p.unlink(), p.mkdir()),
        lambda p: (p.unlink(), os.mkfifo(p)),
        lambda p: (p.unlink(), p.symlink_to(p)),
        lambda p: p.unlink(),
    ],
    ids=["written again", "touched", "cut off", "a folder", "a pipe", "a loop", "gone"],
)
def test_a_file_that_changed_is_no_place(
    store: Store, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    product = tmp_path / "out.safetensors"
    entry = built(store, product)
    change(product)
    assert not store.holds(entry.digest)
    assert store.open(entry.digest) is None
    assert isinstance(store.reporter, Listener) and store.reporter.warnings == [], (
        "nothing is wrong with that"
    )
    assert check(store) == []


def test_a_file_that_was_replaced_serves_what_it_holds_now(store: Store, tmp_path: Path) -> None:
    product = tmp_path / "out.safetensors"
    before = built(store, product)
    found = store.open(before.digest)
    assert found is not None
    after = built(store, product, seed=1)
    assert content(found.tensors) == content(model()), "what was opened stays readable"
    found.close()
    assert read(store, before.digest) is None
    assert read(store, after.digest) == content(model(1))


def test_damaged_bytes_of_a_place_are_noticed(store: Store, tmp_path: Path) -> None:
    product, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    entry = built(store, product)
    rewrite(product, flip(-1))
    at_once(store, entry, product)
    damaged = product.read_bytes()
    assert store.holds(entry.digest), "nobody has looked yet"
    assert read(store, entry.digest) is None
    assert isinstance(store.reporter, Listener)
    [warning] = store.reporter.warnings
    assert warning.place is not None and warning.place.path == str(product)
    for again in (store, Store(store.root)):
        assert not again.holds(entry.digest)
        assert again.open(entry.digest) is None
    assert product.read_bytes() == damaged and files(store.root / "quarantine") == [], (
        "it is not ours to move"
    )
    built(store, other)
    assert read(store, entry.digest) == content(model())


def test_a_sound_place_takes_over_from_a_damaged_one(store: Store, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    built(store, one)
    entry = built(store, two)
    rewrite(two, flip(-1))
    at_once(store, entry, two)
    assert read(store, entry.digest) is None
    assert read(store, entry.digest) == content(model())
    known = store.entry(entry.digest)
    assert known is not None and [p.path for p in known.places] == [str(one)]


def test_a_file_made_anew_meanwhile_stays_a_place(store: Store, tmp_path: Path) -> None:
    product = tmp_path / "out.safetensors"
    entry = built(store, product)
    rewrite(product, flip(-1))
    at_once(store, entry, product)
    found = store.open(entry.digest)
    assert found is not None
    with pytest.raises(DamagedEntry) as caught:
        content(found.tensors)
    built(Store(store.root), product)  # as another process does
    store.set_aside(caught.value)
    found.close()
    assert read(store, entry.digest) == content(model())


def test_a_blob_comes_before_places(store: Store, tmp_path: Path) -> None:
    entry = built(store, tmp_path / "out.safetensors")
    made = put(store)
    assert made.digest == entry.digest
    found = opened(store, made)
    assert found.blob.name == str(blob(store, made))
    found.close()
    rewrite(blob(store, made), flip(-1))
    assert read(store, made.digest) is None
    assert read(store, made.digest) == content(model()), "from the file that was built"


def test_the_newest_places_are_kept(store: Store, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(PLACES + 2)]
    for path in paths:
        entry = built(store, path)
    assert [p.path for p in entry.places] == [str(p) for p in paths[:1:-1]]
    paths[-1].unlink()
    found = store.open(entry.digest)
    assert found is not None and found.blob.name == str(paths[-2])
    found.close()


@pytest.mark.parametrize(
    "offsets",
    [(-1, 0, 0, 0), (1 << 40,) * 4, (0, 0), (), (0, 0, 0, 0)],
    ids=["negative", "past the end", "too few", "none", "elsewhere"],
)
def test_a_place_that_cannot_be_is_none(store: Store, tmp_path: Path, offsets: tuple[int, ...]) -> None:
    product = tmp_path / "out.safetensors"
    entry = built(store, product)
    record = read_record(store.entry_path(entry.digest))
    assert record is not None
    record["places"] = [[str(product), list(identity(product.stat())), list(offsets)]]
    write_record(store.entry_path(entry.digest), record)
    assert read(store, entry.digest) is None


@pytest.mark.parametrize("path", ["nul\0", "x" * 5000, "/dev/zero", "/dev/stdin", ""])
def test_a_place_that_no_file_has_is_none(store: Store, tmp_path: Path, path: str) -> None:
    entry = built(store, tmp_path / "out.safetensors")
    record = read_record(store.entry_path(entry.digest))
    assert record is not None
    record["places"][0][0] = path
    write_record(store.entry_path(entry.digest), record)
    assert not store.holds(entry.digest)
    assert store.open(entry.digest) is None


def test_a_store_restored_elsewhere_serves(store: Store, tmp_path: Path) -> None:
    """By tar, as the cache of a CI: paths, inodes and times are others, and bytes decide."""
    made = put(store)
    with tarfile.open(tmp_path / "store.tar", "w") as archive:
        for path in files(store.root):
            info = archive.gettarinfo(path, str(path.relative_to(store.root)))
            info.mtime, info.mode = 1, 0o600
            with path.open("rb") as file:
                archive.addfile(info, file)
    restored = Store(tmp_path / "restored")
    with tarfile.open(tmp_path / "store.tar") as archive:
        archive.extractall(restored.root, filter="data")
    assert restored.lookup(A, "UNET-v1") == made
    assert blob(restored, made).stat().st_mtime == 1
    assert read(restored, made.digest) == content(model())
    assert check(restored) == []
    rewrite(blob(restored, made), flip(-1))
    assert read(restored, made.digest) is None


# Others at work.


def script(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


RACER = """
import sys, time
from pathlib import Path
from builder.store import Store
from tests.store.test_store import A, content, model, read
store = Store(Path(sys.argv[1]))
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
for _ in range(20):
    made = store.save("UNET-v1-SD", "UNET-v1", model(size=50_000), threads=2)
    store.record(A, made)
    assert read(store, store.lookup(A, "UNET-v1").digest) == content(model(size=50_000))
print(made)
"""


def test_builds_that_race_on_one_entry_all_succeed(store: Store, tmp_path: Path) -> None:
    ready = [tmp_path / f"ready{n}" for n in range(4)]
    racers = [script(RACER, store.root, r, tmp_path / "go") for r in ready]
    while not all(r.exists() for r in ready):
        assert all(p.poll() is None for p in racers), finish(racers[0])
        time.sleep(0.01)
    (tmp_path / "go").touch()
    outs = {finish(p) for p in racers}
    assert outs == {f"{store.lookup(A, 'UNET-v1')}\n"}
    assert len(files(store.root)) == 3
    assert check(store) == []


SLOW = """
import sys, time
from pathlib import Path
from builder.store import Store
from builder.tensors.lazy import DType, MemoryTensor
from tests.store.test_store import A, model
class Slow(MemoryTensor):
    def read_into(self, start, out):
        time.sleep(0.002)
        super().read_into(start, out)
store = Store(Path(sys.argv[1]))
tensors = {n: Slow(t.dtype, t.shape, bytes(t.tobytes())) for n, t in model(size=50_000).items()}
print("begin", flush=True)
while True:
    store.record(A, store.save("UNET-v1-SD", "UNET-v1", tensors))
"""


def test_a_killed_put_leaves_nothing_that_confuses(store: Store) -> None:
    moments = random.Random(5)
    for _ in range(6):
        process = script(SLOW, store.root)
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        made = store.lookup(A, "UNET-v1")
        if made is not None:
            assert read(store, made.digest) == content(model(size=50_000))
        assert check(store) == []
    made = put(Store(store.root), size=50_000)
    assert store.lookup(A, "UNET-v1") == made
    assert list((store.root / "tmp").iterdir()) == []
    assert len(files(store.root)) == 3


def test_what_a_living_process_stages_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_folder(store.root / "tmp") as mine:
        (mine / "half").write_bytes(b"x" * 100)
        age(mine, 3600)
        assert sweep(store.root / "tmp") == 0
        assert (mine / "half").exists()
        age(mine, 100_000)
        assert sweep(store.root / "tmp") == 0
        monkeypatch.setattr("builder.base.disk.fcntl", None)  # where nothing is ever locked, only age tells
        assert sweep(store.root / "tmp") == 100
        monkeypatch.undo()
    dead = store.root / "tmp" / "dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"x" * 100)
    assert sweep(store.root / "tmp") == 100
    assert not dead.exists()


@pytest.mark.parametrize("moment", [(Path, "mkdir"), (os, "open")])
def test_a_folder_swept_before_it_is_locked_is_made_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: tuple[object, str]
) -> None:
    module, name = moment
    original = getattr(module, name)
    swept = []

    def and_then_sweep(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if not swept and any((store.root / "tmp").glob("*")):
            swept.append(True)
            sweep(store.root / "tmp")
        return result

    monkeypatch.setattr(module, name, and_then_sweep)
    with scratch_folder(store.root / "tmp") as mine:
        (mine / "half").touch()
    assert swept
    assert list((store.root / "tmp").iterdir()) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            for path in (folder, *folder.rglob("*")):
                if path.is_dir():
                    path.chmod(0o755)


READER = """
import sys, os
from pathlib import Path
from tests.store.test_store import A, B, Listener, built, content, model, put, read
from builder.store import Store
from builder.store.upkeep import check, items
if os.geteuid() == 0:
    os.setuid(65534)  # after the imports, which another user may have no right to
listener = Listener()
with Store(Path(sys.argv[1]), reporter=listener) as store:
    try:
        (store.root / "probe").touch()
    except OSError:
        pass
    else:
        sys.exit("the store can be written to")
    made = store.lookup(A, "UNET-v1")
    assert read(store, made.digest) == content(model())
    store.record(B, made)
    built(store, Path(os.environ["TMPDIR"], "out"), seed=3)
    assert store.memory.remember(os.stat(__import__("builder").__file__), "0" * 64, None) is False
    assert [i.kind for i in items(store)].count("component") == 2
    assert not listener.warnings, listener.warnings

    other = put(store, B, seed=1)
    assert len(listener.warnings) == 1 and "cannot be written to" in listener.warnings[0].fact
    assert read(store, other.digest) == content(model(1))
    partial = store.partial_path("https://example.org/x")
    partial.write_bytes(b"abc")
    assert store.keep_download(partial, "d" * 64) == store.download_path("d" * 64)
    assert store.lookup(A, "UNET-v1") == made
    assert len(listener.warnings) == 1
    assert store.grown == 0, "nothing of this is in the store"

    assert read(store, sys.argv[2]) is None and store.open(sys.argv[2]) is None
    assert len(listener.warnings) == 2
    again = put(store, "e" * 64, seed=2)
    assert again.digest == sys.argv[2]
    assert read(store, again.digest) == content(model(2))
os.unlink(os.path.join(os.environ["TMPDIR"], "out"))
print(os.listdir(os.environ["TMPDIR"]))
"""


def test_a_store_that_cannot_be_written_to_serves_and_stays_as_it_is(public: Path) -> None:
    root, temporary = public / "store", public / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    store = Store(root)
    put(store)
    broken = put(store, C, seed=2)
    rewrite(blob(store, broken), flip(-1))
    store.action_path(C).unlink()
    before = {p: p.read_bytes() for p in files(root)}
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = finish(script(READER, root, broken.digest, env={"TMPDIR": str(temporary)}))
    assert out == "[]\n"
    assert {p: p.read_bytes() for p in files(root)} == before


# Digests of files.


def settled(path: Path) -> int:
    """A time at which the file's own times have aged enough."""
    return max(path.stat().st_ctime_ns, path.stat().st_mtime_ns) + FINE


def test_a_digest_is_remembered_for_as_long_as_the_file_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"abc")
    assert store.remembered_sha256(path.stat()) is None
    assert store.memory.remember(path.stat(), A, settled(path))
    assert Store(store.root).remembered_sha256(path.stat()) == A
    before = path.stat()
    path.rename(tmp_path / "elsewhere.ckpt")
    path = tmp_path / "elsewhere.ckpt"
    assert store.memory.remember(path.stat(), A, settled(path))
    assert store.remembered_sha256(path.stat()) == A
    path.write_bytes(b"abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size and the mtime lie
    assert store.remembered_sha256(path.stat()) is None
    assert store.memory.remember(path.stat(), B, settled(path))
    assert store.remembered_sha256(path.stat()) == B
    assert len(files(store.root / "files")) == 1  # what it was before is forgotten


def test_a_digest_is_not_remembered_when_a_change_could_hide(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"abc")
    assert not store.memory.remember(path.stat(), A, settled(path) - 1)
    os.utime(path, (0, 0))  # an old mtime does not make the contents old
    assert not store.memory.remember(path.stat(), A, settled(path) - 1)
    assert files(store.root) == []
    assert store.memory.remember(path.stat(), A, settled(path))


def test_a_file_system_that_counts_in_seconds_gets_more_time(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    whole = (tmp_path / "x").stat().st_mtime_ns // SECOND * SECOND
    fields = {"st_mtime_ns": whole, "st_ctime_ns": whole}
    stat = os.stat_result(tuple((tmp_path / "x").stat()), fields)
    assert not store.memory.remember(stat, A, whole + RACY - 1)
    assert store.memory.remember(stat, A, whole + RACY)


def test_a_file_is_hashed_once_however_new_it_is(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"abc")
    digest = store.sha256(path)
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.remembered_sha256(path.stat()) == digest
    read = Watcher()
    assert store.sha256(path, read) == digest
    assert read.bytes == 0
    path.write_bytes(b"ab")
    assert store.sha256(path, read) != digest
    assert read.bytes == 2


def test_a_file_of_the_future_is_neither_waited_for_nor_remembered(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"abc")
    age(path, -3600)
    seen = store.memory.settle(path.stat())
    assert seen < path.stat().st_mtime_ns
    store.sha256(path)
    assert files(store.root) == []


def test_waiting_can_be_stopped(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    now = (time.time_ns() // SECOND + 1) * SECOND  # so that whole seconds are to be waited for
    stat = os.stat_result(tuple((tmp_path / "x").stat()), {"st_mtime_ns": now, "st_ctime_ns": now})
    stop = threading.Event()
    stop.set()
    assert not store.memory.remember(stat, A, store.memory.settle(stat, stop))


class Watcher(Reporter):
    def __init__(self) -> None:
        self.bytes = 0

    def advance(self, task: str, count: int) -> None:
        self.bytes += count


def test_a_download_is_remembered_at_once(store: Store) -> None:
    partial = store.partial_path("https://example.org/../x")
    assert partial.parent == store.root / "downloads" / "partial"
    partial.write_bytes(b"abc")
    kept = store.keep_download(partial, A)
    assert kept == store.download_path(A)
    assert kept.stat().st_mode & 0o777 == 0o444
    assert store.remembered_sha256(kept.stat()) == A
    assert not partial.exists()


# Upkeep.


def three(store: Store) -> list[Made]:
    """Three entries of nearly one size, the first used last."""
    made = [put(store, action, seed, 100_000) for seed, action in enumerate((A, B, C))]
    for back, (action, m) in enumerate(zip((A, B, C), made, strict=True)):
        age(blob(store, m), 9000)
        age(store.action_path(action), 1000 + 1000 * back)
        age(store.entry_path(m.digest), 1000 + 1000 * back)
    return made


def components(store: Store) -> list[str]:
    """The digests of components whose bytes a store keeps, the least recently used first."""
    return [i.digest for i in items(store) if i.kind == "component" and i.size]


def test_the_least_recently_used_goes_first(store: Store) -> None:
    made = three(store)
    size = blob(store, made[0]).stat().st_size
    assert components(store) == [m.digest for m in reversed(made)]
    assert store.lookup(C, "UNET-v1") is not None  # which is a use
    assert components(store) == [m.digest for m in (made[1], made[0], made[2])]
    limit = 2 * size + 10_000
    done = collect(store, limit)
    assert [i.digest for i in done.removed if i.kind == "component"] == [made[1].digest]
    assert 2 * size <= sum(i.size for i in done.kept) <= limit
    assert not store.holds(made[1].digest) and store.entry(made[1].digest) is None
    assert read(store, made[0].digest) == content(model(0, 100_000))
    assert collect(store, limit).removed == []
    assert collect(store, None).removed == []
    assert len([i for i in collect(store, 0).removed if i.kind == "component"]) == 2
    assert files(store.root) == []


def test_what_is_open_stays_readable(store: Store) -> None:
    made = put(store)
    found = opened(store, made)
    assert "component" in [i.kind for i in collect(store, 0).removed]
    assert content(found.tensors) == content(model())
    found.close()
    assert store.lookup(A, "UNET-v1") is None
    assert put(store) == made


def test_only_folders_are_swept(store: Store) -> None:
    """A pipe would be waited for, and what a link leads to is not ours."""
    tmp, other = store.root / "tmp", store.root / "other"
    tmp.mkdir(parents=True)
    other.mkdir()
    os.mkfifo(tmp / "pipe")
    (tmp / "link").symlink_to(other)
    (tmp / "dead").mkdir()
    sweep(tmp)
    assert sorted(p.name for p in tmp.iterdir()) == ["link", "pipe"] and other.is_dir()


def test_litter_goes_in_any_case(store: Store) -> None:
    made = three(store)
    blob(store, made[0]).unlink()
    size = blob(store, made[1]).stat().st_size
    rewrite(blob(store, made[1]), flip(-1))
    assert read(store, made[1].digest) is None
    (store.root / "tmp" / "dead").mkdir()
    (store.root / "tmp" / "dead" / "half").write_bytes(b"x" * 100)
    done = collect(store)
    assert done.removed == []
    assert done.litter == size + 100
    assert len(files(store.root, ".safetensors")) == 1
    assert all(store.entry(m.digest) is not None for m in made), "what was made stays known"


def test_a_download_in_the_making_is_left_alone(store: Store) -> None:
    partial = store.partial_path("x")
    lock = partial.with_name(f"{partial.name}.lock")
    lock.touch()
    age(lock, 4000)
    partial.write_bytes(b"abc")
    assert collect(store, 0).removed == []
    age(partial, 4000)
    assert [(i.kind, i.size) for i in collect(store, 0).removed] == [("partial", 3)]
    assert files(store.root) == []


def test_a_download_used_is_kept_longer(store: Store) -> None:
    for digest in (A, B):
        partial = store.partial_path(digest)
        partial.write_bytes(b"abc")
        age(partial, 9000)
        kept = store.keep_download(partial, digest)
        age(store.memory.path(kept.stat()), 8000)
    assert store.remembered_sha256(store.download_path(A).stat()) == A
    order = [i.digest for i in items(store) if i.kind == "download"]
    assert order == [B, A]


def test_a_check_sets_aside_what_is_damaged(store: Store, tmp_path: Path) -> None:
    made = three(store)
    partial = store.partial_path("x")
    partial.write_bytes(b"abc")
    store.keep_download(partial, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    partial.write_bytes(b"abc")
    store.keep_download(partial, A)
    rewrite(blob(store, made[0]), flip(-1))
    rewrite(blob(store, made[1]), flip(20))
    rewrite(store.action_path(C), flip(20))
    product = tmp_path / "out.safetensors"
    placed = built(store, product, seed=9)
    rewrite(product, flip(-1))
    at_once(store, placed, product)
    facts = [p.fact for p in check(store, threads=2)]
    assert sorted(facts) == sorted(
        [
            f"the stored component `{made[0].digest[:12]}` is damaged",
            f"the stored component `{made[1].digest[:12]}` is damaged",
            f"the stored component `{placed.digest[:12]}` is damaged",
            f"the download `{A[:12]}` is damaged",
            "a record is damaged, or another's",
        ]
    )
    assert len(files(store.root / "quarantine")) == 4
    assert product.exists(), "what lies outside is not touched"
    assert check(store) == []
    assert components(store) == [made[2].digest]
    assert not store.holds(placed.digest)


# The command.


@pytest.fixture
def at(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("CKPT_STORE", str(store.root))
    return store


def test_store_path(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "path"]) == 0
    assert capsys.readouterr().out == f"{at.root}\n"


def test_store_list(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "list"]) == 0
    assert capsys.readouterr().out == f"0 stored, 0 B, in {at.root}\n"
    three(at)
    assert run(["store", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "COMPONENT"
    rows = [re.split(r"\s{2,}", line) for line in lines[1:4]]
    assert [row[3:] for row in rows] == [
        ["16 minutes ago", "a.ckpt", "the store"],
        ["33 minutes ago", "a.ckpt", "the store"],
        ["50 minutes ago", "a.ckpt", "the store"],
    ]
    assert lines[4].startswith("3 stored, ")
    assert run(["store", "list", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert [i["component"] for i in answer["items"]] == ["UNET-v1-SD"] * 3
    assert [(i["source"], i["places"]) for i in answer["items"]] == [("a.ckpt", [])] * 3
    assert answer["bytes"] == sum(i["size"] for i in answer["items"])


def test_store_gc(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made = three(at)
    assert run(["store", "gc", "--max-size", "1GB"]) == 0
    assert capsys.readouterr().out.startswith("freed 0 B, kept ")
    assert run(["store", "gc", "--max-size", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["removed", "UNET-v1-SD", f"{m.digest[:12]},"] for m in reversed(made)
    ]
    assert lines[3].endswith("kept 0 B")
    assert run(["store", "gc", "--max-size", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1", 1),
        ("2b", 2),
        ("10GB", 10**10),
        ("1.5 k", 1500),
        ("500MB", 5 * 10**8),
        ("2GiB", 2 << 30),
    ],
)
def test_sizes(text: str, count: int) -> None:
    from click import Context, Option

    from builder.cli.sizes import parse_size
    from builder.cli.store import command

    assert parse_size(Context(command), Option(["--max-size"]), text) == count


def test_what_is_no_size_is_refused(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "many", "-1", "10 QB", "1e9", "1,000", "9" * 400):
        assert run(["store", "gc", f"--max-size={text}"]) == 2
        assert "is no size" in capsys.readouterr().err


def test_store_check(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made = put(at)
    assert run(["store", "check"]) == 0
    assert capsys.readouterr().out.endswith("all sound\n")
    rewrite(blob(at, made), flip(-1))
    assert run(["store", "check", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["checked"] == 1
    assert answer["damaged"][0]["fact"].endswith("is damaged")
    put(at)
    rewrite(blob(at, made), flip(-1))
    assert run(["store", "check"]) == 1
    out, err = capsys.readouterr()
    assert "1 damaged, set aside" in out
    assert err.startswith("error: the stored component")
    assert run(["store", "check"]) == 0
