"""Checkpoints of full size: built in bounded memory, and compared with plain torch value by value."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.generate import DIRTY, Model, make, write
from builder.tensors.lazy import DType, LazyTensor
from tests.help.building import CLIP, IDS, VAE, Folder, catalog

pytestmark = pytest.mark.slow

MEMORY = 500_000_000  # bytes that a build may ever hold resident


@pytest.fixture
def folder(tmp_path: Path) -> Iterable[Folder]:
    made = Folder.below(tmp_path)
    yield made
    for file in (*made.path.rglob("*"), *made.store.rglob("*")):
        if file.is_file():
            file.unlink()  # at once, and not when the next run makes room: they are large


# The peak that the system reports for a child begins with that of its parent: the process is asked itself.
PEAK = """
import atexit, resource, sys
def peak():
    try:
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
atexit.register(lambda: print(peak(), file=sys.stderr))
"""


def build(folder: Folder, recipe: str) -> int:
    """Build in a process of its own; the most memory it held, in bytes."""
    said = folder.process("build", recipe, "-q", before=PEAK)
    assert said.code == 0, said.err
    return int(said.err.splitlines()[-1])


def same(file: Path, name: str, source: LazyTensor, dtype: torch.dtype | None) -> None:
    """That a tensor of a file is what torch makes of its source."""
    read = torch.frombuffer(source.tobytes(), dtype=source.dtype.torch).reshape(source.shape)
    with safe_open(file, "pt") as opened:
        made = opened.get_tensor(name)
    expected = read if dtype is None or not read.is_floating_point() else read.to(dtype)
    assert made.dtype == expected.dtype and made.shape == expected.shape, name
    assert torch.equal(made.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_sd_v1(folder: Folder) -> None:
    """7.7 GB of training checkpoint, with another VAE, become 2.1 GB."""
    dirty = make("SD-v1", precision=DType.F32, dirt=DIRTY, catalog=catalog())
    vae = make("VAE-v1", precision=DType.F32, seed=1, catalog=catalog())
    write(dirty, folder / "dirty.ckpt", "ckpt")
    write(Model(vae.tensors, "state_dict"), folder / "vae.pt", "ckpt")
    assert (folder / "dirty.ckpt").stat().st_size > 7_500_000_000
    folder.write(
        "sd.toml",
        'format = 1\nname = "sd"\nbase = "dirty"\nfixes = ["clip-position-ids"]\n'
        'sources.dirty.file = "dirty.ckpt"\nsources.vae.file = "vae.pt"\ncomponents.VAE-v1 = "vae"\n',
    )
    assert build(folder, "sd.toml") < MEMORY
    made = folder / "sd.safetensors"
    expected = {n: t for n, t in dirty.tensors.items() if n.startswith(("model.", CLIP)) and n != IDS}
    expected |= {VAE + n: t for n, t in vae.tensors.items()}
    assert 2_100_000_000 < made.stat().st_size < 2_150_000_000
    beside = names(made) - expected.keys() - {IDS}
    assert beside and beside <= set(catalog().optional)
    for name, tensor in expected.items():
        same(made, name, tensor, torch.float16)
    for name in beside:
        same(made, name, dirty.tensors[name], None)
    with safe_open(made, "pt") as opened:
        assert torch.equal(opened.get_tensor(IDS), torch.arange(77).reshape(1, 77))


def test_sdxl(folder: Folder) -> None:
    """3.5 GB in 8 bits, each bit kept; and of its text encoder what half precision makes of it."""
    whole = make("SD-XL", precision=DType.F8_E4M3, catalog=catalog())
    write(whole, folder / "xl.safetensors", "safetensors")
    assert (folder / "xl.safetensors").stat().st_size > 3_400_000_000
    folder.write(
        "xl.toml",
        'format = 1\nname = "xl"\nbase = "xl"\nsources.xl.file = "xl.safetensors"\n'
        '[[output]]\nname = "whole"\nprecision = "keep"\nfile = "whole.safetensors"\n'
        '[[output]]\nname = "encoder"\nbase = "NEW CLIP-XL"\nfile = "encoder.safetensors"\n'
        'precision = "fp16"\n'
        'components.CLIP-XL = "xl"\n',
    )
    assert build(folder, "xl.toml") < MEMORY
    assert names(folder / "whole.safetensors") == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        same(folder / "whole.safetensors", name, tensor, None)
    component = catalog().classes["CLIP-XL"][0]
    assert names(folder / "encoder.safetensors") == component.tensors.keys()
    for bare in component.tensors:
        cast = None if bare in component.traits.kept else torch.float16
        same(folder / "encoder.safetensors", bare, whole.tensors[component.prefix + bare], cast)
