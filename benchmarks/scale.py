"""What many recipes cost together: seconds to plan them, bytes read, written and sent (miniature models)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.generate import make, write
from builder.build.spread import tasks_of
from builder.models.catalog import load_catalog
from builder.plan import ComponentJob, joined
from builder.tensors.lazy import DType
from builder.workspace import Settings, Workspace

PARENTS = 10  # files that recipes merge, two of them each
RECIPE = """\
format = 1
name = "r{n}"
base = "a"
sources.a.file = "p{a}.safetensors"
sources.b.file = "p{b}.safetensors"
sources.vae.file = "vae.safetensors"
components.VAE-mini = "vae"
components.CLIP-mini = "a"
components.UNET-mini = "half"
output.precision = "fp16"
[steps.half]
op = "weighted-sum"
a = "a"
b = "b"
alpha = {alpha}
"""


def lay_out(folder: Path, count: int) -> None:
    """Write a family of models, and recipes that merge two of them each, with one VAE for all."""
    catalog = load_catalog()
    for n in range(PARENTS):
        write(
            make("SD-mini", precision=DType.F32, seed=n, catalog=catalog),
            folder / f"p{n}.safetensors",
            "safetensors",
        )
    write(
        make("VAE-mini", precision=DType.F32, seed=99, catalog=catalog),
        folder / "vae.safetensors",
        "safetensors",
    )
    for n in range(count):
        a, b = n % PARENTS, (n // PARENTS + n + 1) % PARENTS
        alpha = (n + 1) / (count + 1)
        text = RECIPE.format(n=n, a=a, b=b if b != a else (b + 1) % PARENTS, alpha=round(alpha, 6))
        (folder / f"r{n}.toml").write_text(text, encoding="utf-8")


def planned(folder: Path, count: int) -> dict[str, object]:
    """Seconds to read and plan all recipes as one, and what the plan has."""
    began = time.perf_counter()
    with Workspace(Settings(folder / "store"), offline=True) as workspace, workspace.sources() as sources:
        recipes = [workspace.recipe(folder / f"r{n}.toml") for n in range(count)]
        plan = joined([workspace.plan(recipe, sources) for recipe in recipes])
        seconds = time.perf_counter() - began
        tasks = tasks_of(plan, [n.key for n in plan.outputs()])
        split = time.perf_counter() - began - seconds
        kinds = Counter(node.kind for node in plan)
        made = [plan.nodes[k] for k in tasks if isinstance(plan.nodes[k].job, ComponentJob)]
        return {
            "recipes": count,
            "seconds to plan": round(seconds, 2),
            "seconds to make tasks": round(split, 2),
            "nodes": dict(kinds),
            "tasks": len(tasks),
            "bytes of components": sum(n.writes or 0 for n in made),
        }


def built(folder: Path, count: int, shared: bool) -> dict[str, object]:
    """Bytes that a process reads and writes to build all recipes, and that lie in the shared store then."""
    command = [sys.executable, "-m", "builder", "build", *(f"r{n}.toml" for n in range(count)), "--quiet"]
    if shared:
        command += ["--store", str(folder / "far"), "--store-write"]
    environment = {**os.environ, "CKPT_STORE": str(folder / f"store-{shared}"), "CKPT_MODELS": ""}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    code = (
        "import sys, runpy\ntry:\n runpy.run_module('builder', run_name='__main__')\n"
        "finally:\n open(sys.argv.pop(0) and 'io', 'w').write(open('/proc/self/io').read())"
    )

    def run() -> tuple[float, int, int]:
        began = time.perf_counter()
        whole = [sys.executable, "-c", code, *command[3:]]
        subprocess.run(whole, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        io = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
        return time.perf_counter() - began, int(io["rchar"]), int(io["wchar"])

    seconds, read, written = run()
    _, idle, _ = run()  # what the program itself reads, where there is nothing to do
    outputs = list(folder.glob("r*.safetensors"))
    result: dict[str, object] = {
        "seconds to build": round(seconds, 1),
        "read": read - idle,
        "written": written,
        "outputs": sum(p.stat().st_size for p in outputs),
    }
    if shared:
        far = folder / "far"
        result["blobs in the shared store"] = sum(p.stat().st_size for p in far.glob("cas/*"))
        result["records in the shared store"] = sum(p.stat().st_size for p in far.glob("ac/*"))
    for path in outputs:
        path.unlink()
    for path in folder.glob("*.lock.toml"):
        path.unlink()
    return result


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Measure families of so many recipes, and print one JSON object for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--plan-only", action="store_true", help="build nothing")
    options = parser.parse_args(arguments)
    results = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            lay_out(folder, count)
            result = planned(folder, count)
            if not options.plan_only:
                result["alone"] = built(folder, count, shared=False)
                result["shared"] = built(folder, count, shared=True)
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


if __name__ == "__main__":
    main()
