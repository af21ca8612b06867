"""The store: what it keeps, what it notices, and what others can do to it meanwhile."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from builder.base.errors import OutputError, Problem, UsageError
from builder.base.progress import Reporter
from builder.base.staging import staging, sweep
from builder.cli import run
from builder.formats.write_safetensors import write
from builder.store import DamagedEntry, Made, Store, default_root
from builder.store.entries import VerifiedTensor
from builder.store.memory import RACY
from builder.store.upkeep import check, collect, items
from builder.tensors.digests import component_digest
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
    return store.put(action, "UNET-v1-SD", "UNET-v1", model(seed, size))


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
    assert store.lookup(A) == made
    assert store.lookup(B) is None
    for verify in (True, False):
        opened = store.open(made, verify=verify)
        assert opened is not None
        with opened:
            assert content(opened) == content(model())
    rows = store.rows(made)
    assert rows is not None
    assert component_digest(rows) == made.digest


def test_a_component_is_a_safetensors_file_named_by_its_content(store: Store) -> None:
    made = put(store)
    [path] = files(store.root, ".safetensors")
    assert path == store.component_path(made.digest.xxh3)
    assert path.stat().st_mode & 0o777 == 0o444
    assert path.stat().st_nlink == 1
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(model())
        assert file.metadata()["ckpt.component"] == "UNET-v1-SD"
        assert file.metadata()["ckpt.class"] == "UNET-v1"
        assert file.metadata()["ckpt.sha256"] == made.digest.sha256


def test_bytes_do_not_depend_on_threads_or_on_what_was_there(store: Store, tmp_path: Path) -> None:
    put(store, seed=1)
    first = put(store)
    other = Store(tmp_path / "other")
    reordered = dict(reversed(model().items()))
    second = other.put(B, "UNET-v1-SD", "UNET-v1", reordered, threads=4)
    assert first == second
    digest = first.digest.xxh3
    assert store.component_path(digest).read_bytes() == other.component_path(digest).read_bytes()


def test_actions_that_make_the_same_share_it(store: Store) -> None:
    assert put(store, A) == put(store, B)
    assert len(files(store.root, ".safetensors")) == 1
    store.record(C, put(store, A))
    assert store.lookup(C) == store.lookup(A)


def test_nothing_is_created_before_the_first_write(store: Store) -> None:
    assert store.lookup(A) is None
    assert store.open("0" * 32) is None
    assert store.rows("0" * 32) is None
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
        store.put(A, "X", "X", model() | {"z": Unreadable(DType.F16, (1,), b"xx")})
    assert files(store.root) == []
    assert store.lookup(A) is None


def test_what_a_check_refuses_is_not_kept(store: Store) -> None:
    def refuse() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        store.put(A, "X", "X", model(), check=refuse)
    assert files(store.root) == []


def test_a_component_may_be_recorded_later(store: Store) -> None:
    made = store.put(None, "UNET-v1-SD", "UNET-v1", model())
    assert len(files(store.root)) == 1
    store.record(A, made)
    assert store.lookup(A) == made


def test_facts_are_kept_and_may_be_forgotten(store: Store) -> None:
    assert store.recall("metric", "ab12") is None
    store.note("metric", "ab12", {"UNET-v1": "0123"})
    store.note("metric", "ab12", {"UNET-v1": "0124"})
    assert store.recall("metric", "ab12") == {"UNET-v1": "0124"}
    assert store.recall("output", "ab12") is None
    [path] = files(store.root)
    rewrite(path, flip(5))
    assert store.recall("metric", "ab12") is None
    assert [p.fact for p in check(store)] == ["a record is damaged"]
    store.note("metric", "ab12", {"UNET-v1": "0124"})
    assert [i.kind for i in collect(store, 0).removed] == ["fact"]
    assert store.recall("metric", "ab12") is None


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
    assert store.lookup(A) is None


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
    assert store.lookup(A) is None
    with pytest.raises(OutputError, match="cannot write to the store"):
        put(store)


# What is noticed.


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(store: Store) -> None:
    made = put(store)
    path = store.component_path(made.digest.xxh3)
    sound = path.read_bytes()
    noticed = 0
    for at in range(0, len(sound), 7):
        rewrite(path, flip(at))
        opened = store.open(made)
        if opened is None:
            noticed += 1
            assert not path.exists()
            assert store.lookup(A) is None
            assert put(store) == made
        else:  # in the name of the component, or in white space
            assert at < len(sound) - made.bytes
            assert content(opened) == content(model())
            opened.close()
        path.chmod(0o644)
        path.write_bytes(sound)
    assert noticed > len(sound) / 7 * 0.9
    assert isinstance(store.reporter, Listener)
    assert len(store.reporter.warnings) == noticed
    assert "is damaged" in store.reporter.warnings[0].fact
    assert len(files(store.root / "quarantine")) == noticed


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_entry_is_not_there(store: Store, length: int) -> None:
    made = put(store)
    rewrite(store.component_path(made.digest.xxh3), lambda data: data.__delitem__(slice(length, None)))
    assert store.lookup(A) is None
    assert store.open(made) is None
    assert len(files(store.root / "quarantine")) == 1
    assert put(store) == made
    opened = store.open(made)
    assert opened is not None
    opened.close()


def test_a_record_without_its_component_is_none(store: Store) -> None:
    made = put(store)
    store.component_path(made.digest.xxh3).unlink()
    assert store.lookup(A) is None
    assert store.open(made) is None


def test_a_component_without_its_record_can_be_opened(store: Store) -> None:
    made = put(store)
    store.action_path(A).unlink()
    assert store.lookup(A) is None
    opened = store.open(made.digest.xxh3)
    assert opened is not None
    opened.close()


def test_a_damaged_record_is_none(store: Store) -> None:
    made = put(store)
    path = store.action_path(A)
    sound = path.read_bytes()
    for at in range(len(sound)):
        rewrite(path, flip(at))
        assert store.lookup(A) in (None, made)  # a final newline may become another space
        path.write_bytes(sound)
    for text in (b"", b"[]", b"[" * 100_000, b"{}", b'{"seal": 1}', sound[:-10], b"\xff"):
        path.write_bytes(text)
        assert store.lookup(A) is None


def test_a_record_of_another_version_is_none(store: Store) -> None:
    from builder.store.records import write_record

    write_record(store.action_path(A), {"component": "X"})
    assert store.lookup(A) is None


# Reading without trust.


def damaged_weight(store: Store, size: int = 300) -> tuple[Made, LazyTensor]:
    made = put(store, size=size)
    rewrite(store.component_path(made.digest.xxh3), flip(-1))
    opened = store.open(made, verify=False)
    assert opened is not None
    [tensor] = [t for n, t in opened.items() if n == "conv.weight"]
    return made, tensor


def test_the_last_piece_of_damaged_bytes_is_never_given_out(store: Store) -> None:
    made, tensor = damaged_weight(store)
    seen = 0
    with pytest.raises(DamagedEntry) as caught:
        for piece in tensor.windows(256):
            seen += len(piece)
    assert 0 < seen < tensor.nbytes
    assert "tensor `conv.weight`" in caught.value.problems[0].evidence[0]
    assert caught.value.digest == made.digest.xxh3
    store.set_aside(caught.value)
    assert store.lookup(A) is None
    assert store.open(made) is None


@pytest.mark.parametrize("order", [[0, 200, 400], [400, 200, 0], [200, 0, 400], [400]])
def test_bytes_read_in_any_order_are_verified(store: Store, order: list[int]) -> None:
    made, tensor = damaged_weight(store)
    with pytest.raises(DamagedEntry):
        for start in order:
            tensor.read_into(start, memoryview(bytearray(200)))
    put(store)
    opened = store.open(made, verify=False)
    assert opened is not None
    data = bytearray(600)
    for start in order:
        opened["conv.weight"].read_into(start, memoryview(data)[start : start + 200])
    expected = model()["conv.weight"].tobytes()
    assert all(data[start : start + 200] == expected[start : start + 200] for start in order)
    opened.close()


def test_many_threads_may_read_one_tensor(store: Store) -> None:
    made = put(store, size=20_000)
    opened = store.open(made, verify=False)
    assert opened is not None
    data = bytearray(40_000)

    def read(first: int) -> None:
        for start in range(first, 40_000, 800):
            opened["conv.weight"].read_into(start, memoryview(data)[start : start + 200])

    threads = [threading.Thread(target=read, args=(n * 200,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data == model(size=20_000)["conv.weight"].tobytes()
    opened.close()


def test_an_entry_that_shrinks_while_it_is_read_is_damaged(store: Store) -> None:
    made = put(store)
    opened = store.open(made, verify=False)
    assert opened is not None
    path = store.component_path(made.digest.xxh3)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(DamagedEntry):
        content(opened)
    for tensor in opened.values():
        assert isinstance(tensor, VerifiedTensor)
        if tensor.nbytes == 600:
            with pytest.raises(DamagedEntry):
                tensor.unchecked.tobytes()
        else:
            assert tensor.unchecked.tobytes() == tensor.tobytes()
    opened.close()


def test_an_entry_made_anew_meanwhile_is_not_set_aside(store: Store) -> None:
    made, tensor = damaged_weight(store)
    with pytest.raises(DamagedEntry) as caught:
        tensor.tobytes()
    put(store)
    store.set_aside(caught.value)
    assert store.lookup(A) == made


def test_an_assembly_of_damaged_parts_is_not_put_in_place(store: Store, tmp_path: Path) -> None:
    size = 5_000_000  # several windows, which threads read out of turn
    made = put(store, size=size)
    target = tmp_path / "out.safetensors"
    for threads in (1, 4):
        opened = store.open(made, verify=False)
        assert opened is not None
        with opened:
            write(target, opened, threads=threads, durable=False)
        with safe_open(target, "np") as file:
            assert file.get_tensor("conv.weight").tobytes() == model(size=size)["conv.weight"].tobytes()
    before = target.read_bytes()
    rewrite(store.component_path(made.digest.xxh3), flip(-1))
    for threads in (1, 4):
        opened = store.open(made, verify=False)
        assert opened is not None
        with opened, pytest.raises(DamagedEntry) as caught:
            write(target, opened, threads=threads, durable=False)
        assert target.read_bytes() == before
    store.set_aside(caught.value)
    assert store.lookup(A) is None


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
from tests.store.test_store import A, model
store = Store(Path(sys.argv[1]))
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
for _ in range(20):
    made = store.put(A, "UNET-v1-SD", "UNET-v1", model(size=50_000), threads=2)
    opened = store.open(store.lookup(A))
    assert opened is not None and len(opened) == 4
    opened.close()
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
    assert outs == {f"{store.lookup(A)}\n"}
    assert len(files(store.root)) == 2
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
    store.put(A, "UNET-v1-SD", "UNET-v1", tensors)
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
        made = store.lookup(A)
        if made is not None:
            opened = store.open(made)
            assert opened is not None
            assert content(opened) == content(model(size=50_000))
            opened.close()
        assert check(store) == []
    made = put(Store(store.root), size=50_000)
    assert store.lookup(A) == made
    assert list((store.root / "tmp").iterdir()) == []
    assert len(files(store.root)) == 2


def test_what_a_living_process_stages_is_left_alone(store: Store) -> None:
    with staging(store.root / "tmp") as mine:
        (mine / "half").write_bytes(b"x" * 100)
        age(mine, 3600)
        assert sweep(store.root / "tmp") == 0
        assert (mine / "half").exists()
        age(mine, 100_000)  # where locks do not work, only this tells
        assert sweep(store.root / "tmp") == 100
    dead = store.root / "tmp" / "dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"x" * 100)
    assert sweep(store.root / "tmp") == 100
    assert not dead.exists()


@pytest.mark.parametrize("moment", [(tempfile, "mkdtemp"), (os, "open")])
def test_a_folder_swept_before_it_is_locked_is_made_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: tuple[object, str]
) -> None:
    module, name = moment
    original = getattr(module, name)
    swept = []

    def and_then_sweep(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if not swept:
            swept.append(True)
            sweep(store.root / "tmp")
        return result

    monkeypatch.setattr(module, name, and_then_sweep)
    with staging(store.root / "tmp") as mine:
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
from tests.store.test_store import A, B, Listener, content, model, put
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
    made = store.lookup(A)
    with store.open(made) as opened:
        assert content(opened) == content(model())
    with store.open(made, verify=False) as opened:
        assert content(opened) == content(model())
    store.record(B, made)
    assert store.memory.remember(os.stat(__import__("builder").__file__), "0" * 64, None) is False
    assert len(items(store)) == 2
    assert not listener.warnings, listener.warnings

    other = put(store, B, seed=1)
    assert len(listener.warnings) == 1 and "cannot be written to" in listener.warnings[0].fact
    assert store.lookup(B) == other
    with store.open(other) as opened:
        assert content(opened) == content(model(1))
    partial = store.partial_path("https://example.org/x")
    partial.write_bytes(b"abc")
    assert store.keep_download(partial, "d" * 64) == store.download_path("d" * 64)
    assert store.lookup(A) == made
    assert len(listener.warnings) == 1

    broken = store.open(sys.argv[2])
    assert broken is None and store.open(sys.argv[2]) is None and len(listener.warnings) == 2
    again = put(store, "e" * 64, seed=2)
    assert again.digest.xxh3 == sys.argv[2]
    with store.open(again) as opened:
        assert content(opened) == content(model(2))
    assert len(check(store)) == 1
print(os.listdir(os.environ["TMPDIR"]))
"""


def test_a_store_that_cannot_be_written_to_serves_and_stays_as_it_is(public: Path) -> None:
    root, temporary = public / "store", public / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    store = Store(root)
    put(store)
    broken = put(store, C, seed=2)
    rewrite(store.component_path(broken.digest.xxh3), flip(-1))
    store.action_path(C).unlink()
    before = {p: p.read_bytes() for p in files(root)}
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = finish(script(READER, root, broken.digest.xxh3, env={"TMPDIR": str(temporary)}))
    assert out == "[]\n"
    assert {p: p.read_bytes() for p in files(root)} == before


# Digests of files.


def settled(path: Path) -> int:
    """A time at which the file's own times have aged enough."""
    return max(path.stat().st_ctime_ns, path.stat().st_mtime_ns) + RACY


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
    assert not store.memory.remember(path.stat(), A, time.time_ns())
    assert store.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files(store.root) == []


def test_a_file_is_hashed_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"abc")
    now = settled(path)
    monkeypatch.setattr(time, "time_ns", lambda: now)
    digest = store.sha256(path)
    read = Watcher()
    assert store.sha256(path, read) == digest
    assert read.bytes == 0
    path.write_bytes(b"ab")
    assert store.sha256(path, read) != digest
    assert read.bytes == 2


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
    made = [put(store, action, seed) for seed, action in enumerate((A, B, C))]
    for back, (action, m) in enumerate(zip((A, B, C), made, strict=True)):
        age(store.component_path(m.digest.xxh3), 5000)
        age(store.action_path(action), 1000 + 1000 * back)
    return made


def test_the_least_recently_used_goes_first(store: Store) -> None:
    made = three(store)
    size = store.component_path(made[0].digest.xxh3).stat().st_size
    assert [i.digest for i in items(store)] == [m.digest.xxh3 for m in reversed(made)]
    assert store.lookup(C) is not None  # which is a use
    done = collect(store, 2 * size)
    assert [i.digest for i in done.removed] == [made[1].digest.xxh3]
    assert sum(i.size for i in done.kept) == 2 * size
    assert store.lookup(B) is None
    assert store.lookup(A) == made[0]
    assert not store.action_path(B).exists()
    assert collect(store, 2 * size).removed == []
    assert collect(store, None).removed == []
    assert len(collect(store, 0).removed) == 2
    assert files(store.root) == []


def test_what_is_open_stays_readable(store: Store) -> None:
    made = put(store)
    opened = store.open(made, verify=False)
    assert opened is not None
    assert len(collect(store, 0).removed) == 1
    assert content(opened) == content(model())
    opened.close()
    assert store.lookup(A) is None
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
    store.component_path(made[0].digest.xxh3).unlink()
    rewrite(store.component_path(made[1].digest.xxh3), flip(-1))
    assert store.open(made[1]) is None
    (store.root / "tmp" / "dead").mkdir()
    (store.root / "tmp" / "dead" / "half").write_bytes(b"x" * 100)
    size = store.component_path(made[2].digest.xxh3).stat().st_size
    done = collect(store)
    assert done.removed == []
    assert done.records == 2
    assert done.litter == size + 100
    assert len(files(store.root)) == 2


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


def test_a_check_sets_aside_what_is_damaged(store: Store) -> None:
    made = three(store)
    partial = store.partial_path("x")
    partial.write_bytes(b"abc")
    store.keep_download(partial, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    partial.write_bytes(b"abc")
    store.keep_download(partial, A)
    rewrite(store.component_path(made[0].digest.xxh3), flip(-1))
    rewrite(store.component_path(made[1].digest.xxh3), flip(20))
    rewrite(store.action_path(C), flip(20))
    facts = [p.fact for p in check(store, threads=2)]
    assert sorted(facts) == sorted(
        [
            f"the stored component `{made[0].digest.xxh3[:12]}` is damaged",
            f"the stored component `{made[1].digest.xxh3[:12]}` is damaged",
            f"the download `{A[:12]}` is damaged",
            "a record is damaged",
        ]
    )
    assert len(files(store.root / "quarantine")) == 4
    assert check(store) == []
    assert [i.kind for i in items(store)].count("component") == 1


def test_a_check_compares_the_shared_digest_too(store: Store) -> None:
    made = put(store)
    wrong = "0" * 64
    rows = store.rows(made)
    assert rows is not None
    path = store.component_path(made.digest.xxh3)
    right = rows["scalar"].digest.sha256
    assert right is not None
    lying = {
        n: r._replace(digest=type(r.digest)(r.digest.xxh3, wrong)) if n == "scalar" else r
        for n, r in rows.items()
    }
    total = component_digest(lying).sha256
    assert total is not None
    assert made.digest.sha256 is not None
    text = path.read_bytes()
    text = text.replace(right.encode(), wrong.encode()).replace(made.digest.sha256.encode(), total.encode())
    rewrite(path, lambda data: data.__setitem__(slice(None), text))
    assert store.rows(made) is not None
    assert len(check(store)) == 1


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
    assert [re.split(r"\s{2,}", line)[-1] for line in lines[1:4]] == [
        "16 minutes ago",
        "33 minutes ago",
        "50 minutes ago",
    ]
    assert lines[4].startswith("3 stored, ")
    assert run(["store", "list", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert [i["component"] for i in answer["items"]] == ["UNET-v1-SD"] * 3
    assert answer["bytes"] == sum(i["size"] for i in answer["items"])


def test_store_gc(at: Store, capsys: pytest.CaptureFixture[str]) -> None:
    three(at)
    assert run(["store", "gc", "--max-size", "1GB"]) == 0
    assert capsys.readouterr().out.startswith("freed 0 B, kept ")
    assert run(["store", "gc", "--max-size", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [["removed", "UNET-v1-SD", "UNET-v1"]] * 3
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
    rewrite(at.component_path(made.digest.xxh3), flip(-1))
    assert run(["store", "check", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["checked"] == 1
    assert answer["damaged"][0]["fact"].endswith("is damaged")
    put(at)
    rewrite(at.component_path(made.digest.xxh3), flip(-1))
    assert run(["store", "check"]) == 1
    out, err = capsys.readouterr()
    assert "1 damaged, set aside" in out
    assert err.startswith("error: the stored component")
    assert run(["store", "check"]) == 0
