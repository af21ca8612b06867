"""What the tests of the network through the command line share: hosts, their files, and machines without."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from builder.tensors.lazy import LazyTensor
from tests.help.building import Folder, model, save, save_dirty, values
from tests.help.servers import Server

TOKEN = "hf_aSecretThatNobodyMaySee"

# A whole miniature model, of which all comes from the network.
RECIPE = """\
format = 1
name = "tiny"
base = "NEW SD-tiny"

[sources.dirty]
{dirty}
[sources.vae]
{vae}
[components]
UNET-tiny = "dirty"
CLIP-tiny = "dirty"
VAE-tiny = "vae"
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
    return saved(model("VAE-tiny", seed=seed))


@cache
def bulky(seed: int = 3) -> bytes:
    """The bytes of a miniature model with much beside it that nobody wants, as safetensors."""
    return saved({**model("SD-tiny", seed=seed), "bulk": values(np.zeros(2_000_000))})


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

    def write(self, dirty: str, vae: str, name: str = "tiny.toml") -> Path:
        """A recipe of two sources, by what is said of each."""
        return self.folder.write(name, RECIPE.format(dirty=dirty, vae=vae))

    def machine(self, name: str, **environment: str) -> Folder:
        """Another machine that has the same recipe (and lock, if there is one) and nothing else."""
        path = self.folder.path.parent / name / "work"
        path.mkdir(parents=True)
        for file in self.folder.path.glob("*.toml"):
            (path / file.name).write_bytes(file.read_bytes())
        return replace(
            self.folder,
            path=path,
            store=path.parent / "store",
            environment={**self.folder.environment, **environment},
        )

    @property
    def requests(self) -> int:
        """How often any host was asked."""
        return sum(len(s.seen) for s in (self.hub, self.civitai, self.storage))


@contextmanager
def hosts(root: Path) -> Iterator[Net]:
    """A hub, a site of models and a storage, and a folder below `root`."""
    path = root / "first" / "work"
    path.mkdir(parents=True)
    with Server() as hub, Server() as civitai, Server() as storage:
        environment = {
            "CKPT_ALLOW_PRIVATE": "1",
            "HF_ENDPOINT": hub.url(),
            "CIVITAI_ENDPOINT": civitai.url(),
            **dict.fromkeys(("HF_TOKEN", "HF_HUB_OFFLINE", "CIVITAI_TOKEN", "CIVITAI_API_TOKEN"), ""),
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), ""),
        }
        yield Net(Folder(path, path.parent / "store", environment), hub, civitai, storage)


def downloads(folder: Folder) -> set[str]:
    """What a folder's store has downloaded, finished or not."""
    root = folder.store / "downloads"
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
