"""The plain way: load the whole file with torch, work on the dict, save it with the safetensors library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.contenders import CLIP, UNET, VAE


def load(path: str) -> dict[str, Any]:
    """A checkpoint's tensors by `torch.load`, which has to run what the pickle names."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {})  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        sys.modules[name] = ModuleType(name)
    sys.modules[module.__name__] = module
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    tensors: dict[str, Any] = loaded.get("state_dict", loaded)
    return tensors


def metric(path: str) -> None:
    """The three sums of the published definition."""
    tensors = load(path)
    counted: dict[str, Callable[[str], bool]] = {
        "UNET": lambda n: n.startswith(UNET),
        "VAE": lambda n: n.startswith(VAE) and ("encoder." in n or "decoder." in n),
        "CLIP": lambda n: n.startswith(CLIP) and "mlp." in n and ".23." not in n,
    }
    for part, counts in counted.items():
        sums = [(torch.sigmoid(t.half().float()) - 0.5).sum() for n, t in tensors.items() if counts(n)]
        print(part, float(sum(sums)))


def build(path: str, vae: str, output: str) -> None:
    """UNET and CLIP of one file and the VAE of another, in FP16."""
    tensors = load(path)
    kept = {n: t for n, t in tensors.items() if n.startswith((UNET, CLIP))}
    kept |= {VAE + n: t for n, t in load(vae).items()}
    ids = next(n for n in kept if n.endswith("position_ids"))
    kept[ids] = torch.arange(77).unsqueeze(0)
    save_file({n: t.half().contiguous() if t.is_floating_point() else t for n, t in kept.items()}, output)


def prune(path: str, output: str) -> None:
    """What belongs to the model, in FP16."""
    kept = {n: t for n, t in load(path).items() if n.startswith((UNET, VAE, CLIP))}
    save_file({n: t.half().contiguous() if t.is_floating_point() else t for n, t in kept.items()}, output)


def extract(path: str, output: str) -> None:
    """The VAE with bare names, in FP16."""
    kept = {n.removeprefix(VAE): t.half() for n, t in load(path).items() if n.startswith(VAE)}
    save_file(kept, output)


def folder(output: str, *paths: str) -> None:
    """Each file in FP16, one after the other."""
    for path in paths:
        save_file({n: t.half() for n, t in load(path).items()}, output)


def diff(first: str, second: str) -> None:
    """How many values of two files differ, and by how much."""
    a, b = load_file(first), load_file(second)
    for name in a.keys() & b.keys():
        apart = (a[name].float() - b[name].float()).abs()
        if count := int((a[name] != b[name]).sum()):
            print(name, count, float(apart.max()))


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"metric": metric, "build": build, "prune": prune}
    commands |= {"extract": extract, "folder": folder, "diff": diff}
    commands[sys.argv[1]](*sys.argv[2:])
