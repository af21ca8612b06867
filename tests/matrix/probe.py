"""Builds every recipe of a folder, and prints what was made as JSON; needs no more than the package itself.

Outputs and the store go to a folder of their own, which is gone in the end. With `--flush`, subnormal numbers
are flushed to zero in the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "safetensors", "tomli", "networkx", "xxhash", "blake3", "click")
CATALOG = Path(__file__).parents[1] / "help" / "tiny"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.probe", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flush", action="store_true")
    parser.add_argument("--recipes", default="*", metavar="GLOB")
    parser.add_argument("--umask", type=lambda text: int(text, 8))
    args = parser.parse_args()
    if args.umask is not None:
        os.umask(args.umask)
    with tempfile.TemporaryDirectory() as temp:
        json.dump(report(args.folder, args.recipes, Path(temp), args.threads, args.flush), sys.stdout)


def report(folder: Path, recipes: str, temp: Path, threads: int, flush: bool) -> dict[str, Any]:
    """What the recipes of `folder` make in a copy below `temp`: digests by output and tensor."""
    from ckpt_build import CkptError, Workspace

    if flush:
        import torch

        assert torch.set_flush_denormal(True), "this processor does not flush subnormal numbers"
    here = Path(shutil.copytree(folder, temp / "work"))
    work = Workspace(store=temp / "store", models=[], components=[CATALOG], offline=True, environment={})
    outputs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for recipe in sorted(here.glob(f"{recipes}.toml")):
        try:
            made = work.build(work.load(recipe), threads=threads)
        except CkptError as error:
            failed[recipe.name] = str(error)
            continue
        for output in made.outputs:
            with work.open(output.path) as checkpoint:
                tensors = {n: _digest(t) for n, t in checkpoint.items()}
            named = {"sha256": output.sha256, "metric": output.metric, "tensors": tensors}
            outputs[f"{recipe.stem} {output.name}"] = named
    return {"outputs": outputs, "failed": failed, "versions": _versions()}


def _digest(tensor: Any) -> str:
    said = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return blake2b(said + bytes(tensor.tobytes()), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    import torch

    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"python": platform.python_version(), "machine": machine, **{n: version(n) for n in PACKAGES}}


if __name__ == "__main__":
    main()
