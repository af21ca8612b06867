"""The writer: the official layout, the same bytes by any number of threads, whole files or none."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import CkptError, OutputError, Problem, SourceError
from builder.base.progress import Reporter
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import Written, plan_layout, write, writing
from builder.tensors.digests import tensor_digest
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.tensors.scan import carry_out, scan, side_by_side

DTYPES = [d for d in DType if d.torch_name and hasattr(torch, d.torch_name)]
# Names of wrapped modules are read without the wrapper.
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda name: "module." not in name and "_orig_mod." not in name)


def tensor(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> MemoryTensor:
    size = dtype.bits
    for extent in shape:
        size *= extent
    return MemoryTensor(dtype, shape, random.Random(seed).randbytes(size // 8))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, LazyTensor]:
    names = draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True, min_size=1, max_size=8))
    found: dict[str, LazyTensor] = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        if dtype is DType.F4:  # torch holds them in pairs
            shape = (*shape, 2)
        found[name] = tensor(dtype, shape, draw(st.integers(0, 99)))
    return found


def official(named: dict[str, LazyTensor], metadata: dict[str, str] | None) -> bytes:
    """The same tensors as the reference implementation writes them."""
    held = {}
    for name, t in named.items():
        shape = (*t.shape[:-1], t.shape[-1] // 2) if t.dtype is DType.F4 else t.shape
        flat = torch.frombuffer(t.tobytes() or bytearray(1), dtype=torch.uint8)[: t.nbytes].clone()
        held[name] = flat.view(t.dtype.torch).reshape(shape)
    return safetensors.torch.save(held, metadata)


@settings(max_examples=150)
@given(tensors(), st.none() | st.dictionaries(NAMES, st.text(max_size=20), min_size=1, max_size=1))
def test_the_layout_is_the_official_one(
    named: dict[str, LazyTensor], metadata: dict[str, str] | None
) -> None:
    layout = plan_layout({n: (t.dtype, t.shape) for n, t in named.items()}, metadata)
    data = b"".join(bytes(named[n].tobytes()) for n in layout.tensors)
    assert layout.head + data == official(named, metadata)
    assert layout.size == len(layout.head) + len(data)


@settings(max_examples=60)
@given(tensors(), st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([1, 64, 100, 1 << 20]))
def test_bytes_and_digests_do_not_depend_on_the_way(
    tmp_path_factory: pytest.TempPathFactory,
    named: dict[str, LazyTensor],
    threads: int,
    digests: bool,
    sha256: bool,
    max_memory: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "out.safetensors"
    written = write(
        path,
        named,
        {"a": "b"},
        digests=digests,
        sha256=sha256,
        threads=threads,
        max_memory=max_memory,
        durable=False,
    )
    data = path.read_bytes()
    assert data == official(named, {"a": "b"})
    assert written.size == len(data)
    assert written.sha256 == (hashlib.sha256(data).hexdigest() if sha256 else None)
    assert written.digests == ({n: tensor_digest(t) for n, t in named.items()} if digests else {})
    with open_checkpoint(path) as back:
        assert {n: (t.dtype, t.shape, t.tobytes()) for n, t in back.items()} == {
            n: (t.dtype, t.shape, t.tobytes()) for n, t in named.items()
        }
        assert list(back) == list(plan_layout({n: (t.dtype, t.shape) for n, t in named.items()}).tensors)


def test_the_order_of_element_types_is_the_official_one() -> None:
    named: dict[str, LazyTensor] = {d.code: tensor(d, (2,)) for d in DTYPES}
    head = json.loads(official(named, None)[8:].split(b"}}")[0] + b"}}")
    assert list(head) == [d.code for d in reversed(DType) if d in DTYPES]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("sha256", [True, False])
def test_tensors_of_many_windows(tmp_path: Path, threads: int, sha256: bool) -> None:
    """Sizes beside those of a window, and many small tensors between large ones."""
    named: dict[str, LazyTensor] = {
        f"{n}.{size}": tensor(DType.F16, (size,), n)
        for n, size in enumerate([0, 1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 5 << 20, *[7] * 50])
    }
    path = tmp_path / "out.safetensors"
    written = write(path, named, digests=True, sha256=sha256, threads=threads, durable=False)
    assert path.read_bytes() == official(named, None)
    assert written.digests == {n: tensor_digest(t) for n, t in named.items()}
    assert list(written.digests) == list(
        plan_layout({n: (t.dtype, t.shape) for n, t in named.items()}).tensors
    )


def test_metadata_is_sorted_whatever_order_it_comes_in(tmp_path: Path) -> None:
    pairs = [(f"k{n}", str(n)) for n in range(20)]
    seen = set()
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        seen.add(write(tmp_path / "x", {}, dict(pairs), durable=False).sha256)
    assert len(seen) == 1
    with open_checkpoint(tmp_path / "x") as back:
        assert list(back.metadata) == sorted(dict(pairs))


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "fact"),
    [
        ("__metadata__", DType.F32, (1,), "a tensor cannot be named `__metadata__` in a safetensors file"),
        ("a\0b", DType.F32, (1,), "a tensor cannot be named `a\0b` in a safetensors file"),
        ("half a byte", DType.F4, (3,), "tensor `half a byte` is not a whole number of bytes"),
        ("\ud800", DType.F32, (1,), "a name is not valid Unicode and cannot be written"),
        ("n" * 100_000_000, DType.F32, (1,), "names and metadata are too long for a safetensors file"),
    ],
    ids=["metadata", "nul", "half a byte", "surrogate", "too long"],
)
def test_what_the_format_cannot_hold(name: str, dtype: DType, shape: tuple[int, ...], fact: str) -> None:
    with pytest.raises(OutputError) as caught:
        plan_layout({name: (dtype, shape)})
    assert caught.value.problems[0].fact == fact


class Counter(Reporter):
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.total = self.done = 0
        self.lock = threading.Lock()

    def start(self, task: str, total: int) -> None:
        self.calls.append(("start", task))
        self.total = total

    def advance(self, task: str, count: int) -> None:
        with self.lock:
            self.done += count

    def finish(self, task: str) -> None:
        self.calls.append(("finish", task))


@pytest.mark.parametrize("sha256", [True, False])
def test_the_reporter_hears_of_every_byte(tmp_path: Path, sha256: bool) -> None:
    heard = Counter()
    named: dict[str, LazyTensor] = {str(n): tensor(DType.F32, (n * 1000,)) for n in range(50)}
    write(tmp_path / "x", named, reporter=heard, task="t", sha256=sha256, durable=False)
    assert heard.calls == [("start", "t"), ("finish", "t")]
    assert heard.total == heard.done == sum(t.nbytes for t in named.values())


class Failing(LazyTensor):
    """A tensor that cannot be read from byte `at` on."""

    __slots__ = ("at", "error")

    def __init__(self, size: int, error: BaseException, at: int = 0) -> None:
        super().__init__(DType.U8, (size,))
        self.at, self.error = at, error

    def read_into(self, start: int, out: memoryview) -> None:
        if start >= self.at:
            raise self.error
        out[:] = bytes(len(out))


def litter(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("sha256", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("error", "evidence"),
    [
        (SourceError(Problem("bad")), ("tensor `3`",)),
        (SourceError(Problem("bad", evidence=("tensor `3`",))), ("tensor `3`",)),
        (OSError(5, "ignored"), ("Input/output error", "tensor `3`")),
    ],
)
def test_a_tensor_that_cannot_be_read(
    tmp_path: Path, sha256: bool, threads: int, error: BaseException, evidence: tuple[str, ...]
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    named: dict[str, LazyTensor] = {str(n): tensor(DType.U8, (1 << 20,)) for n in range(10)}
    named["3"] = Failing(9 << 20, error, at=5 << 20)
    heard = Counter()
    with pytest.raises(SourceError) as caught:
        write(path, named, sha256=sha256, threads=threads, reporter=heard)
    assert caught.value.problems[0].evidence == evidence
    assert heard.calls[-1] == ("finish", "")
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == ["x"]


@pytest.mark.parametrize("sha256", [True, False])
def test_of_several_failures_the_first_is_raised(tmp_path: Path, sha256: bool) -> None:
    class Slow(Failing):
        def read_into(self, start: int, out: memoryview) -> None:
            time.sleep(0.03)
            super().read_into(start, out)

    for _ in range(5):
        named: dict[str, LazyTensor] = {
            f"{n}": (Slow if n == 0 else Failing)(4 << 20, SourceError(Problem("bad"))) for n in range(4)
        }
        with pytest.raises(SourceError) as caught:
            write(tmp_path / "x", named, sha256=sha256, threads=4)
        assert caught.value.problems[0].evidence == ("tensor `0`",)
    assert litter(tmp_path) == []


def test_an_interrupt_in_a_tensor_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", {"a": Failing(10, KeyboardInterrupt())})
    assert litter(tmp_path) == []
    assert not [t for t in threading.enumerate() if t.name.startswith(("window", "in-order"))]


def test_what_is_not_accepted_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def refuse(written: Written) -> None:
        raise OutputError(Problem(f"{written.size} bytes are not wanted"))

    with pytest.raises(OutputError, match="69 bytes are not wanted"):
        write(path, {"a": tensor(DType.U8, (5,))}, accept=refuse)
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == ["x"]


def test_what_is_accepted_may_go_elsewhere_or_nowhere(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    path.write_bytes(b"old")
    named: dict[str, LazyTensor] = {"a": tensor(DType.U8, (5,))}
    assert write(path, named, accept=lambda written: None).path is None
    assert litter(tmp_path) == ["x"]
    assert write(path, named, accept=lambda written: other).path == other
    assert path.read_bytes() == b"old"
    assert other.read_bytes() == official(named, None)
    assert litter(tmp_path) == ["other", "x"]


@pytest.mark.parametrize("threads", [1, 3])
def test_where_each_tensor_lies_is_said(tmp_path: Path, threads: int) -> None:
    named: dict[str, LazyTensor] = {d.code: tensor(d, (6,), n) for n, d in enumerate(DTYPES)}
    written = write(tmp_path / "x", named, {"a": "b"}, threads=threads, durable=False)
    data = (tmp_path / "x").read_bytes()
    assert written.offsets.keys() == named.keys()
    for name, offset in written.offsets.items():
        assert data[offset : offset + named[name].nbytes] == named[name].tobytes()
    assert os.path.samestat(written.stat, (tmp_path / "x").stat())
    assert written.stat.st_size == written.size


def test_what_is_measured_on_the_way_is_what_a_scan_finds(tmp_path: Path) -> None:
    named: dict[str, LazyTensor] = {
        "a": tensor(DType.F16, (70_000,)),
        "b": tensor(DType.F32, (30_000,), 1),
        "ids": tensor(DType.I64, (7,)),
    }
    groups = {"a": "one", "b": "two", "ids": "two"}
    written = write(tmp_path / "x", named, groups=groups, threads=3, durable=False)
    found = scan(named, groups=groups, numbers=False).histograms
    assert written.histograms.keys() == found.keys() == {"one", "two"}
    assert all((written.histograms[g] == found[g]).all() for g in found)
    assert not write(tmp_path / "x", named, durable=False).histograms


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, {"a": tensor(DType.F32, (3,))})
    before = source.read_bytes()
    (tmp_path / "soft").symlink_to("source")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "folder").symlink_to(".")
    with open_checkpoint(source) as opened:
        for output in ("source", "soft", "hard", "folder/source", "folder/folder/soft"):
            for given_as in (source, source.stat(), tmp_path / "soft"):
                with pytest.raises(OutputError, match="is one of the inputs"):
                    write(tmp_path / output, opened, inputs=[tmp_path / "gone", given_as])
    assert source.read_bytes() == before
    assert litter(tmp_path) == ["folder", "hard", "soft", "source"]


def test_room_is_looked_for_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "x", {"a": Failing(1 << 60, AssertionError("read"))})
    problem = caught.value.problems[0]
    assert problem.fact == f"there is no room to write `{tmp_path / 'x'}`"
    assert problem.evidence[0].startswith("it needs 1,152,921,504,606,847,")
    assert litter(tmp_path) == []


def run(script: str, *args: object, **kwargs: object) -> subprocess.Popen[str]:
    """A Python process in which `write`, `tensor`s and `disk` are at hand; it imports no torch."""
    head = """
        import sys, time
        from pathlib import Path
        from builder.base.errors import CkptError, render
        from builder.base import disk
        from builder.formats.write_safetensors import write
        from builder.tensors.lazy import DType, LazyTensor

        class Slow(LazyTensor):
            def read_into(self, start, out):
                time.sleep(0.002)
                out[:] = bytes(len(out))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        **kwargs,  # type: ignore[call-overload]
    )


WRITE_FOREVER = """
    path, nameless, sha256 = Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1"
    disk.NAMELESS = disk.NAMELESS and nameless
    print("ready", flush=True)
    while True:
        write(path, {str(n): Slow(DType.U8, (100_000,)) for n in range(20)}, sha256=sha256)
"""


@pytest.mark.parametrize("nameless", [True, False])
def test_a_killed_writer_leaves_a_whole_file_and_nothing_else(tmp_path: Path, nameless: bool) -> None:
    path = tmp_path / "out.safetensors"
    whole = write(path, {str(n): MemoryTensor(DType.U8, (100_000,), bytes(100_000)) for n in range(20)})
    rng = random.Random(nameless)
    for turn in range(10):
        process = run(WRITE_FOREVER, path, int(nameless), turn % 2)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.15)
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        assert hashlib.sha256(path.read_bytes()).hexdigest() == whole.sha256
        others = [name for name in litter(tmp_path) if name.endswith(".tmp")]
        # At most the one that had a name, which is so for a moment even where files need none.
        assert len(others) <= 1
        write(tmp_path / "next", {}, durable=False)
        assert litter(tmp_path) == ["next", path.name]


def test_an_interrupted_writer_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
        try:
            print("ready", flush=True)
            many = {str(n): Slow(DType.U8, (1000,)) for n in range(10**5)}
            write(Path(sys.argv[1]), many, sha256=False)
        except KeyboardInterrupt:
            print("interrupted")
    """
    process = run(script, tmp_path / "x")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert litter(tmp_path) == []


FULL = """
    import resource
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    big = {str(n): Slow(DType.U8, (1_000_000,)) for n in range(10)}
    disk.NAMELESS = disk.NAMELESS and "named" not in sys.argv
    disk.NewFile.reserve = lambda *_: None  # as when another process takes the room meanwhile
    for sha256 in (True, False):
        try:
            write(Path(sys.argv[1]), big, sha256=sha256)
        except CkptError as error:
            print(render(error.problems[0]))
"""


@pytest.mark.parametrize("how", [[], ["named"]])
def test_a_file_that_grows_beyond_what_is_allowed(tmp_path: Path, how: list[str]) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    said = run(FULL, path, 4_000_000, *how).communicate()[0]
    assert said.splitlines()[:2] == [f"error: cannot write `{path}`", "   = File too large"]
    assert said.count("File too large") == 2
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == ["x"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = tmp_path / "x"
        path.write_bytes(b"old")
        said = run(FULL, path).communicate()[0]
        assert said.splitlines()[:3] == [
            f"error: cannot write `{path}`",
            "   = No space left on device",
            "hint: make room there, or write to another folder",
        ]
        assert said.count("No space left") == 2
        assert path.read_bytes() == b"old"
        assert litter(tmp_path) == ["x"]
        with pytest.raises(OutputError, match="there is no room to write"):
            write(path, {"a": tensor(DType.U8, (5_000_000,))})
        half = {"a": Failing(2_500_000, AssertionError("read"))}
        with pytest.raises(OutputError) as caught:
            carry_out(side_by_side([writing(tmp_path / name, half) for name in "yz"]))
        assert "of which what is written beside it takes 2,49" in caught.value.problems[0].evidence[0]
        assert litter(tmp_path) == ["x"]
        write(path, {"a": tensor(DType.U8, (2_500_000,))})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    wholes = set()
    failures: list[CkptError] = []

    def work(seed: int) -> None:
        for turn in range(10):
            try:
                wholes.add(
                    write(path, {"a": tensor(DType.U8, (50_000,), seed * 100 + turn)}, durable=False).sha256
                )
            except CkptError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hashlib.sha256(path.read_bytes()).hexdigest() in wholes
    assert litter(tmp_path) == ["x"]


def test_writing_imports_no_torch() -> None:
    script = "print(sorted({'torch', 'numpy', 'safetensors'} & sys.modules.keys()))"
    assert run(script).communicate()[0] == "[]\n"
