"""Small inputs that are long work, and what reading one costs a process."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MB = 1 << 20

Read = Callable[[Path], None]


class Cost(NamedTuple):
    """Processor time in seconds and memory in bytes beyond the program's own; the problem's fact, or ""."""

    seconds: float
    memory: int
    fact: str


class Reader:
    """A process that has what a reader needs in memory, and forks for each input."""

    def __init__(self, name: str, seconds: int, memory: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.help.budgets", name, str(seconds), str(memory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cost(self, path: Path) -> Cost:
        """What an input takes; reading is ended at the processor time and address space given before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        return Cost(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main(reader: str, seconds: str, memory: str) -> None:
    """Read every input whose path comes in, each in a process of its own, and say what it took."""
    read = READERS[reader]()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _measure(read, Path(line.rstrip("\n")), int(seconds), int(memory))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps([float(seconds), int(memory), f"ended with status {status}"]), flush=True)


def _measure(read: Read, path: Path, seconds: int, memory: int) -> None:
    import resource

    from builder.base.errors import CkptError, render

    before, own = time.process_time(), _peak()
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fact = ""
    try:
        read(path)
    except CkptError as error:
        "\n".join(map(render, error.problems))
        fact = error.problems[0].fact[:200]
    print(json.dumps([time.process_time() - before, _peak() - own, fact]), flush=True)


def _peak() -> int:
    """The most memory that this process had; the kernel's other figure counts that of its parent too."""
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _model() -> Read:
    from builder.formats import open_checkpoint

    def read(path: Path) -> None:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.values():
                for _ in tensor.windows():
                    pass

    return read


def _recipe() -> Read:
    from builder.models.catalog import load_catalog
    from builder.recipe.read import load_recipe

    catalog = load_catalog([])

    def read(path: Path) -> None:
        load_recipe(path, catalog)

    return read


def _lock() -> Read:
    from builder.recipe.lock import read_lock

    def read(path: Path) -> None:
        lock = read_lock(path)
        assert lock is not None
        dict(lock.facts())

    return read


def _catalog() -> Read:
    from builder.models.catalog import load_catalog

    load_catalog([])

    def read(path: Path) -> None:
        load_catalog([path])

    return read


def _record() -> Read:
    from builder.store.records import read_record

    def read(path: Path) -> None:
        read_record(path)

    return read


def _journal() -> Read:
    from builder.sources.net.download import _read_journal

    def read(path: Path) -> None:
        path.with_name("part").touch()
        path.rename(path.with_name("part.journal"))
        _read_journal(path.with_name("part"), "https://example.com/x", 1 << 20)

    return read


READERS: dict[str, Callable[[], Read]] = {
    "model": _model,
    "recipe": _recipe,
    "lock": _lock,
    "catalog": _catalog,
    "record": _record,
    "journal": _journal,
}


# Zip archives, made here since the standard library takes its time for so many records.


def archive(records: list[tuple[str, bytes]], *, deflate: bool = False) -> bytes:
    """A zip of records under `archive/`, with a wide end where there are many."""
    out, directory = io.BytesIO(), io.BytesIO()
    for name, data in records:
        raw = f"archive/{name}".encode()
        packed, method = _deflated(data) if deflate else data, 8 if deflate else 0
        sizes = (zlib.crc32(data), len(packed), len(data), len(raw))
        directory.write(
            struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, method, 0, 33, *sizes, 0, 0, 0, 0, 0, out.tell())
        )
        directory.write(raw)
        out.write(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, method, 0, 33, *sizes, 0) + raw + packed)
    start, size, count = out.tell(), directory.tell(), len(records)
    out.write(directory.getvalue())
    if count > 0xFFFE:
        at = out.tell()
        out.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
        out.write(struct.pack("<4sIQI", b"PK\6\7", 0, at, 1))
    few = min(count, 0xFFFF)
    out.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, size, start, 0))
    return out.getvalue()


def _deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(6, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


def model(pickle: bytes, data: bytes = b"", *, deflate: bool = False) -> bytes:
    """A zip as PyTorch writes it: a pickle, and one storage `0`."""
    return archive([("data.pkl", pickle), ("version", b"3\n"), ("data/0", data)], deflate=deflate)


def views(numel: int, each: list[tuple[int, tuple[int, ...], tuple[int, ...]]], kind: str = "Byte") -> bytes:
    """A pickle of a state dict of views, by offset, shape and strides, of one storage `0` of `numel`."""
    out = [b"\x80\x02"]
    out.append(b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(X\x07\0\0\0storage")
    out.append(b"ctorch\n" + kind.encode() + b"Storage\nX\x01\0\0\x000X\x03\0\0\0cpu")
    out.append(_int(numel) + b"tQq\x01")
    out.append(b"}(")
    for index, (offset, shape, strides) in enumerate(each):
        name = str(index).encode()
        out.append(b"X" + struct.pack("<I", len(name)) + name + b"h\x00(h\x01" + _int(offset))
        out.append(_tuple(shape) + _tuple(strides) + b"\x89NtR")
    out.append(b"u.")
    return b"".join(out)


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x09" + struct.pack("<Qx", value)


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def tar(storages: bytes, tensors: bytes = b"I0\n.", main: bytes = b"N.") -> bytes:
    """A tar as the first versions of PyTorch wrote it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in {"pickle": main, "storages": storages, "tensors": tensors}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def repeated(piece: str, size: int, start: str = "", end: str = "") -> str:
    """A piece as often as it fits, with `{}` standing for its number."""
    count, found, total = 0, [start], 0
    while total < size:
        found.append(piece.replace("{}", str(count)))
        total += len(found[-1])
        count += 1
    return "".join(found) + end


if __name__ == "__main__":
    main(*sys.argv[1:])
