"""What the tests of the network through the command line share: hosts, and a folder that has none of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.tensors import DType, LazyTensor
from tests.building import Folder, like, model, save, save_dirty
from tests.servers import Server

TOKEN = "hf_a-secret-that-nobody-may-see"

# A whole miniature model, of which all comes from the network.
RECIPE = """\
format = 1
name = "mini"
base = "NEW SD-mini"

[sources.dirty]
{dirty}
[sources.vae]
{vae}
[components]
UNET-mini = "dirty"
CLIP-mini = "dirty"
VAE-mini = "vae"
"""


@cache
def dirty() -> bytes:
    """The bytes of a training checkpoint in miniature, a PyTorch file."""
    with TemporaryDirectory() as folder:
        save_dirty(Path(folder) / "dirty.ckpt")
        return (Path(folder) / "dirty.ckpt").read_bytes()


@cache
def vae(seed: int = 2) -> bytes:
    """The bytes of a VAE, as safetensors."""
    return saved(model("VAE-mini", seed=seed))


@cache
def whole(seed: int = 0) -> bytes:
    """The bytes of a whole miniature model, as safetensors."""
    return saved(model("SD-mini", seed=seed))


@cache
def bulky(fill: float = 0.0) -> bytes:
    """The bytes of a miniature model with much beside it that nobody wants, as safetensors."""
    junk = model("VAE-mini")["encoder.conv_in.weight"]
    block = like(_Shape(DType.F32, (2_000_000,)), fill=fill)
    assert junk.dtype is DType.F32
    return saved({**model("SD-mini", seed=3), "control_model.input": block})


class _Shape(LazyTensor):
    """A shape without content."""

    def read_into(self, start: int, out: memoryview) -> None:
        raise AssertionError


def saved(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    with TemporaryDirectory() as folder:
        return save(Path(folder) / "model.safetensors", tensors).read_bytes()


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Net:
    """Hosts on loopback, and a folder whose environment leads to them."""

    folder: Folder
    hub: Server
    civitai: Server
    storage: Server

    def write(self, dirty: str, vae: str, name: str = "mini.toml") -> Path:
        """A recipe of two sources, by what is said of each."""
        return self.folder.write(name, RECIPE.format(dirty=dirty, vae=vae))

    def machine(self, name: str, **environment: str) -> Folder:
        """Another machine that has the same recipe (and lock, if there is one) and nothing else."""
        path = self.folder.path.parent / name / "work"
        path.mkdir(parents=True)
        for file in self.folder.path.glob("*.toml"):
            (path / file.name).write_bytes(file.read_bytes())
        variables = {**self.folder.environment, "HF_HUB_CACHE": str(path.parent / "hub"), **environment}
        return replace(self.folder, path=path, store=path.parent / "store", environment=variables)

    @property
    def sent(self) -> int:
        """Bytes of bodies that all hosts have sent."""
        return self.hub.sent + self.civitai.sent + self.storage.sent


def environment(hub: Server, civitai: Server) -> dict[str, str]:
    """Where the hosts are, and nothing of this machine's own."""
    return {
        "CKPT_ALLOW_PRIVATE": "1",
        "HF_ENDPOINT": hub.url(),
        "CIVITAI_ENDPOINT": civitai.url(),
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "",
        "CIVITAI_TOKEN": "",
        "CIVITAI_API_TOKEN": "",
        "HTTPS_PROXY": "",
        "NO_PROXY": "*",
    }
