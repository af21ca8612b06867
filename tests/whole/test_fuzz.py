"""Valid files of every container, broken at random: each opens and reads, or is refused with one error."""

from __future__ import annotations

import io
import json
import os
import pickletools
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from builder.base.errors import SourceError
from builder.formats import gguf, open_checkpoint
from builder.tensors.ggml_blocks import BlockType
from tests.help import gguf_files
from tests.help.torch_forms import records, save, tarred, zipped

TIMES = float(os.environ.get("CKPT_FUZZ", "0.5"))  # of so many files: all of them in `make test-slow`
SECONDS = 120
MEMORY = 128 << 20
LARGEST = 1 << 20  # bytes read of each tensor; expanded ones may be far larger than their file

Mutation = Callable[[random.Random, bytearray], "bytes | bytearray | None"]

INTERESTING = [
    0,
    1,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 64) - 1,
]


def flip(chance: random.Random, data: bytearray) -> None:
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(chance: random.Random, data: bytearray) -> bytes:
    return data[: chance.randrange(len(data))]


def splice(chance: random.Random, data: bytearray) -> None:
    size = chance.randrange(1, 64)
    start, target = chance.randrange(len(data)), chance.randrange(len(data))
    data[target : target + chance.choice([0, size])] = data[start : start + size]


def number(chance: random.Random, data: bytearray) -> None:
    form = chance.choice(["<B", "<H", "<I", "<Q", ">Q"])
    width = struct.calcsize(form)
    at = chance.randrange(max(1, len(data) - width))
    value = chance.choice(INTERESTING) & ((1 << 8 * width) - 1)
    data[at : at + width] = struct.pack(form, value)


def header(chance: random.Random, data: bytearray) -> None:
    """Change a field of one of a zip's headers, or a digit of a tar's or of JSON."""
    starts = [at for at in range(len(data) - 46) if data[at : at + 2] == b"PK"]
    if not starts:
        digits = [at for at, byte in enumerate(data[:4096]) if 48 <= byte < 58]
        data[chance.choice(digits or [0])] = chance.choice(b'0123456789-.eE"[]{},')
        return
    at = chance.choice(starts) + chance.randrange(4, 46, 2)
    width = chance.choice([2, 4])
    data[at : at + width] = (chance.choice(INTERESTING) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def opcode(chance: random.Random, data: bytearray) -> None:
    """Replace, repeat, drop or insert an opcode of a pickle, or change an operand."""
    places = [position for _, _, position in pickletools.genops(bytes(data)) if position is not None]
    for _ in range(chance.choice([1, 1, 2, 4])):
        index = chance.randrange(len(places) - 1)
        start, stop = places[index], places[index + 1]
        match chance.randrange(5):
            case 0:
                data[start : start + 1] = chance.choice(pickletools.opcodes).code.encode("latin-1")
            case 1:
                data[stop:stop] = data[start:stop] * chance.choice([1, 3, 1000])
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = chance.choice(pickletools.opcodes).code.encode("latin-1")
            case 4 if stop - start > 1:
                data[chance.randrange(start + 1, stop)] = chance.choice(INTERESTING) & 0xFF
        places = [p for p in places if p < len(data) - 1]
        if len(places) < 2:
            return


STATE = {
    "state_dict": {
        "a": torch.arange(12.0).reshape(3, 4),
        "t": torch.arange(12).reshape(3, 4).t(),
        "h": torch.ones(5, dtype=torch.bfloat16),
        "e": torch.ones(1).expand(7),
        "n": torch.tensor(3),
        "f": torch.ones(4).to(torch.float8_e4m3fn),
        "p": torch.nn.Parameter(torch.zeros(2)),
        "none": torch.empty(0),
    },
    "epoch": 3,
    "callbacks": [{"best": 0.5, "path": "a/b"}, (1, None, True), b"bytes", {1, 2}],
    "optimizer": {"state": {0: {"step": 1, "average": torch.ones(3)}}},
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One valid file of each container, as bytes."""
    folder = tmp_path_factory.mktemp("seeds")
    path = folder / "file"
    found = {}
    for protocol in (2, 4):
        found[f"zip{protocol}"] = save(path, STATE, protocol=protocol).read_bytes()
        found[f"legacy{protocol}"] = save(path, STATE, legacy=True, protocol=protocol).read_bytes()
    found["plain zip"] = zipped(path, records(save(path, STATE)).items()).read_bytes()
    parts = records(path)
    found["deflated"] = zipped(path, parts.items(), deflate=lambda n: True).read_bytes()
    found["big"] = zipped(path, (parts | {"byteorder": b"big"}).items()).read_bytes()
    found["tar"] = tarred(
        path, {"a": (STATE["state_dict"]["a"], 1), "b": (torch.ones(2), 2)}, {}
    ).read_bytes()
    head = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [], "data_offsets": [24, 26]},
    }
    raw = json.dumps(head).encode()
    found["safetensors"] = struct.pack("<Q", len(raw)) + raw + bytes(26)
    keys = [
        gguf_files.key("general.architecture", 8, gguf_files.text("llama")),
        gguf_files.key("llama.attention.head_count", 4, struct.pack("<I", 2)),
        gguf_files.key("comfy.gguf.orig_shape.c", 9, struct.pack("<IQ3i", 5, 3, 2, 4, 8)),
        gguf_files.key("a", 9, struct.pack("<IQ", 8, 2) + gguf_files.text("b") * 2),
    ]
    infos = [
        gguf_files.info("blk.0.attn_q.weight", (4, 8)),
        gguf_files.info("b", (32, 2), 8, 128),
        gguf_files.info("c", (64,), 1, 224),
    ]
    found["gguf"] = gguf_files.raw(keys, infos, bytes(352))
    keys = [
        gguf_files.key("general.alignment", 4, struct.pack("<I", 64)),
        gguf_files.key("a", 9, struct.pack("<IQIQ2H", 9, 1, 2, 2, 1, 2)),
    ]
    infos, at = [], 0
    for code, kind in ((c, t) for c, t in gguf.TYPES.items() if isinstance(t, BlockType)):
        infos.append(gguf_files.info(kind.name, (kind.elements, 2), code, at))
        at += -(-2 * kind.itemsize // 64) * 64
    front = gguf_files.raw(keys, infos, version=2)
    found["gguf of all blocks"] = front + bytes(-len(front) % 64 + at)
    return found


def mutants(chance: random.Random, seeds: dict[str, bytes]) -> Iterator[bytes]:
    """Broken files without end."""
    general = [flip, cut, splice, number, number, header, header]
    pickles = {n: records_of(d)["data.pkl"] for n, d in seeds.items() if d[:2] == b"PK"}
    parts = {n: records_of(d) for n, d in seeds.items() if d[:2] == b"PK"}
    while True:
        which = chance.choice(list(seeds))
        if which in pickles and chance.random() < 0.6:
            changed = bytearray(pickles[which])
            mutate = chance.choice([opcode, opcode, opcode, flip, splice, number])
            changed = bytearray(mutate(chance, changed) or changed)
            yield packed(parts[which] | {"data.pkl": bytes(changed)}, chance.random() < 0.1)
        else:
            data = bytearray(seeds[which])
            for _ in range(chance.choice([1, 1, 1, 3])):
                data = bytearray(chance.choice(general)(chance, data) or data) or bytearray(b"P")
            yield bytes(data)


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


def packed(contents: dict[str, bytes], deflate: bool) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, archive.compression)
    return out.getvalue()


def attempt(path: Path, data: bytes) -> bool:
    """Open and read a file; whether it could be opened. Anything but a SourceError is a fault."""
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.values():
                try:
                    size = tensor.dtype.itemsize
                    count = min(tensor.nbytes, LARGEST) // size * size
                    out = memoryview(bytearray(count))
                    tensor.read_into(0, out)
                    tensor.read_into(tensor.nbytes - count, out)
                except SourceError as error:
                    assert len(error.problems) == 1
            return True
    except SourceError as error:
        assert len(error.problems) == 1
        assert error.problems[0].fact
        return False


def run(path: Path, seeds: dict[str, bytes], seed: int, count: int) -> int:
    """Try that many broken files; how many could be opened all the same."""
    chance = random.Random(seed)
    opened = 0
    for index, data in zip(range(count), mutants(chance, seeds), strict=False):
        try:
            opened += attempt(path, data)
        except BaseException:
            path.with_name(f"failed-{seed}-{index}").write_bytes(data)
            raise
    return opened


def test_the_seeds_are_whole(tmp_path: Path, seeds: dict[str, bytes]) -> None:
    for name, data in seeds.items():
        assert attempt(tmp_path / "file", data), name


@contextmanager
def bounded(seconds: int, memory: int) -> Iterator[None]:
    """Raise in this process what takes more time in all, or more memory than it has now and `memory`."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{seconds} seconds are over")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know its own size")
def test_broken_files(tmp_path: Path, seeds: dict[str, bytes]) -> None:
    count = int(3000 * TIMES)
    with bounded(int(SECONDS * max(1, TIMES)), MEMORY):
        opened = run(tmp_path / "file", seeds, 20221006, count)
    assert count / 30 < opened < count * 29 / 30, "the mutations are too mild or too rough to tell"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_more_broken_files(tmp_path: Path, seeds: dict[str, bytes], seed: int) -> None:
    assert run(tmp_path / "file", seeds, seed, 20_000)
