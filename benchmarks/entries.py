"""What is measured: one function a benchmark."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from benchmarks.contenders import CLIP, UNET, VAE
from benchmarks.generate import DIRTY, Model, make, write, write_lora
from benchmarks.harness import Benchmark, Contender, Target
from builder.formats import open_checkpoint
from builder.formats.blob import BlobTensor
from builder.formats.hashes import sha256_file
from builder.models.catalog import load_catalog
from builder.models.samples import Repeated
from builder.store import Store
from builder.tensors.lazy import DType

MB = 1e6
MEMORY = Target("ours", at_most=400 * MB, unit="bytes")
FAMILIES = {"small": "mini", "full": "v1"}


def _python(module: str, *words: object) -> Contender:
    return Contender([sys.executable, "-m", module, *map(str, words)])


def _naive(*words: object) -> Contender:
    return _python("benchmarks.contenders.naive", *words)


def _floor(*words: object) -> Contender:
    return _python("benchmarks.contenders.floor", *words)


class Bench:
    """The folder that a run works in; its files are made when a benchmark asks for them."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        self.family = FAMILIES[size]
        self.store = folder / "store"
        self.out = folder / "out"
        self.product = self.out / "anything.safetensors"
        self.pins: dict[Path, str] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """The standard case: FP32 with EMA, broken position_ids, junk and Lightning entries."""
        return self._dirty("anything-v3.ckpt")

    @cached_property
    def safetensors(self) -> Path:
        """The same tensors as safetensors."""
        return self._dirty("anything-v3.safetensors")

    def _dirty(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            model = make(f"SD-{self.family}", precision=DType.F32, dirt=DIRTY)
            write(model, path, "ckpt" if path.suffix == ".ckpt" else "safetensors")
        return path

    def vae(self, seed: int) -> Path:
        """A VAE in a file of its own, FP32."""
        path = self.folder / f"vae-{seed}.vae.pt"
        if not path.exists():
            model = make(f"VAE-{self.family}", precision=DType.F32, seed=seed)
            write(replace(model, nesting="state_dict"), path, "ckpt")
        return path

    def half(self, seed: int) -> Path:
        """A whole model in FP16, as merges are made of."""
        path = self.folder / f"half-{seed}.safetensors"
        if not path.exists():
            write(make(f"SD-{self.family}", seed=seed), path, "safetensors")
        return path

    @cached_property
    def whole_xl(self) -> Path:
        """A whole SD XL in FP16; in small runs, a model of the family that stands for it."""
        name = "SD-XL" if self.family == "v1" else f"SD-{self.family}"
        path = self.folder / "whole.safetensors"
        if not path.exists():
            write(make(name), path, "safetensors")
        return path

    def lora_xl(self, seed: int) -> Path:
        """A LoRA of rank 32 for all matrices of that model's UNET."""
        path = self.folder / f"lora-{seed}.safetensors"
        if not path.exists():
            write_lora(self.whole_xl, path, seed=seed)
        return path

    def recipe(self, vae: Path) -> Path:
        """The standard recipe: UNET and CLIP of the checkpoint, the VAE of another file."""
        sources = {"model": self.checkpoint, "vae": vae}
        slots = {"UNET": "model", "CLIP": "model", "VAE": "vae"}
        lines = ["format = 1", 'name = "anything"', f'base = "NEW SD-{self.family}"']
        lines += ['fixes = ["clip-position-ids"]', "[components]"]
        lines += [f'{slot}-{self.family} = "{source}"' for slot, source in slots.items()]
        for name, path in sources.items():
            if path not in self.pins:
                self.pins[path] = sha256_file(path).sha256
            lines += [f"[sources.{name}]", f'file = "{path.name}"', f'sha256 = "{self.pins[path]}"']
        written = self.folder / "anything.toml"
        written.write_text("\n".join(lines) + "\n")
        return written

    def ckpt(self, *words: object, prepare: Callable[[], object] = lambda: None) -> Contender:
        """Our command line, with the folder's store."""
        return replace(_python("builder", *words), prepare=prepare, env={"CKPT_STORE": str(self.store)})

    def build(self, prepare: Callable[[], object]) -> Contender:
        """Our build of the recipe in the folder."""
        return self.ckpt("build", self.folder / "anything.toml", "-o", self.product, prepare=prepare)

    def start_over(self, *remembered: Path) -> None:
        """Nothing built and nothing stored but the digests of some files."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        (self.folder / "anything.lock.toml").unlink(missing_ok=True)
        shutil.rmtree(self.store, ignore_errors=True)
        if not remembered:
            return
        digests = self.folder / f"digests-{'-'.join(p.stem for p in remembered[:2])}-{len(remembered)}"
        if not digests.exists():
            with Store(digests) as store:
                for path in remembered:
                    store.sha256(path)
        shutil.copytree(digests, self.store)

    def ranges(self, name: str, wanted: Mapping[Path, Callable[[str], bool]]) -> Path:
        """A JSON list `[file, offset, length]` of the FP32 tensors wanted, for the floor to read."""
        plan = []
        for path, wants in wanted.items():
            with open_checkpoint(path) as checkpoint:
                found = [t for n, t in checkpoint.items() if wants(n) and t.dtype is DType.F32]
                plan += [[str(path), t.offset, t.nbytes] for t in found if isinstance(t, BlobTensor)]
        written = self.folder / f"{name}.json"
        written.write_text(json.dumps(plan))
        return written


def inspect(bench: Bench) -> Benchmark:
    """The table of contents only."""
    return Benchmark(
        "what is in the checkpoint",
        {"python": Contender([sys.executable, "-c", "pass"]), "ours": _table_of_contents(bench)},
        [Target("ours", at_most=0.4), Target("ours", at_most=60 * MB, unit="bytes")],
    )


def _table_of_contents(bench: Bench) -> Contender:
    return bench.ckpt("inspect", "--no-metric", bench.checkpoint)


def inspect_large(bench: Bench) -> Benchmark:
    """The table of contents of FLUX.2, whose 64 GB are zeros that take no space."""
    name = "SD-mini" if bench.family == "mini" else "FLUX2"
    path = bench.folder / "large.safetensors"
    if not path.exists():
        write(make(name, precision=DType.BF16, content="sparse"), path, "safetensors")
    return Benchmark(
        "what is in FLUX.2 dev",
        {
            "python": Contender([sys.executable, "-c", "pass"]),
            "ours": bench.ckpt("inspect", "--no-metric", path),
        },
        [Target("ours", at_most=0.5), Target("ours", at_most=100 * MB, unit="bytes")],
    )


# The parts of a model as they are published, each in a file and a type of its own.
PARTS = {
    "mini": {"UNET-mini": DType.F16, "CLIP-mini": DType.F32, "VAE-mini": DType.F32},
    "v1": {
        "DIT-FLUX": DType.F8_E4M3,
        "T5-XXL-FLUX": DType.BF16,
        "CLIP-L-FLUX": DType.F16,
        "VAE-v3": DType.F32,
    },
}


def all_in_one(bench: Bench) -> Benchmark:
    """FLUX.1 put together from four files whose zeros take no space, each part in its type, digests known."""
    parts = PARTS[bench.family]
    files = {cls: bench.folder / f"{cls}.safetensors" for cls in parts}
    for cls, path in files.items():
        if not path.exists():
            write(make(cls, precision=parts[cls], content="sparse"), path, "safetensors")
    architecture = "SD-mini" if bench.family == "mini" else "FLUX"
    lines = ["format = 1", 'name = "anything"', f'base = "NEW {architecture}"', 'output.precision = "keep"']
    lines += [f'components.{cls} = "{cls}"' for cls in parts]
    lines += [f'sources.{cls}.file = "{path.name}"' for cls, path in files.items()]
    recipe = bench.folder / "anything.toml"

    def prepare() -> None:
        recipe.write_text("\n".join(lines) + "\n")
        bench.start_over(*files.values())

    size = sum(path.stat().st_size for path in files.values())
    return Benchmark(
        "four parts of FLUX.1 made one",
        {
            "floor": _floor("join", bench.folder / "floor.bin", *files.values()),
            "ours": bench.build(prepare),
        },
        [
            Target("ours", "floor", at_most=1.6),
            Target("ours", at_most=1.05, unit="read", per=size, called="parts"),
            Target("ours", at_most=1.01, unit="written", per=size, called="product"),
            MEMORY,
        ],
        list(files.values()),
    )


def metric(bench: Bench) -> Benchmark:
    """The definition as it stands, against `ckpt inspect` (which digests the components as well)."""

    scales = load_catalog().scales

    def counts(name: str) -> bool:
        parts = {UNET: "UNET", VAE: "VAE", CLIP: "CLIP"}
        found = next(((p, c) for p, c in parts.items() if name.startswith(p)), None)
        if found is None:
            return False
        prefix, kind = found
        return scales[f"{kind}-{bench.family}"].counts(name.removeprefix(prefix))

    plan = bench.ranges("metric", {bench.checkpoint: counts})
    return Benchmark(
        "metric of the checkpoint",
        {
            "naive": _naive("metric", bench.checkpoint),
            "floor": _floor("ranges", plan),
            "ours": bench.ckpt("inspect", "--quiet", bench.checkpoint),
        },
        [Target("naive", "ours", at_least=4), MEMORY],
        [bench.checkpoint],
    )


def _reading(title: str, path: Path) -> Benchmark:
    return Benchmark(
        f"reading every tensor, {title}",
        {"floor": _floor("read", path), "ours": _python("benchmarks.contenders.ours", path)},
        [Target("floor", "ours", at_least=0.8), MEMORY],
        [path],
    )


def read_zip(bench: Bench) -> Benchmark:
    """Every tensor of a PyTorch file through the mapping, against plain positioned reads of the file."""
    return _reading("PyTorch zip", bench.checkpoint)


def read_safetensors(bench: Bench) -> Benchmark:
    """The same of a safetensors file."""
    return _reading("safetensors", bench.safetensors)


def _moved(sources: int, kept: int) -> list[Target]:
    """Bounds on bytes moved: `sources` are to be hashed, `kept` FP32 bytes to be written as FP16."""
    product = kept / 2
    least = sources + kept + product
    hashed = "sources, kept bytes and product" if sources else "kept bytes and product"
    return [
        Target("ours", at_most=1.05, unit="read", per=least, called=hashed),
        Target("ours", at_most=1.01, unit="written", per=product, called="product"),
    ]


def _hash(bench: Bench, *files: Path) -> Contender:
    """One pass of OpenSSL's SHA-256 over files, and nothing else."""
    return _floor("sha256", *files)


def _built(
    bench: Bench, title: str, prepare: Callable[[], object], first: bool, targets: list[Target]
) -> Benchmark:
    """A build, against the plain way, and the least: kept bytes read, cast, written and synced."""
    vae = bench.vae(1)
    bench.recipe(vae)
    kept: dict[Path, Callable[[str], bool]] = {
        bench.checkpoint: lambda n: n.startswith((UNET, CLIP)),
        vae: lambda n: True,
    }
    plan = bench.ranges("build", kept)
    size = sum(length for _, _, length in json.loads(plan.read_text()))
    sources = [bench.checkpoint, vae]
    contenders = {
        "naive": _naive("build", *sources, bench.folder / "naive.safetensors"),
        "floor": _floor("cast", plan, bench.folder / "floor.bin"),
        "sha256": _hash(bench, *sources),
        "ours": bench.build(prepare),
    }
    hashed = sum(s.stat().st_size for s in sources) if first else 0
    return Benchmark(title, contenders, [*targets, *_moved(hashed, size), MEMORY], sources)


def build_cold(bench: Bench) -> Benchmark:
    """An empty store that remembers the sources' digests."""
    targets = [Target("naive", "ours", at_least=5), Target("ours", "floor", at_most=1.6)]
    remembered = (bench.checkpoint, bench.vae(1))
    return _built(bench, "build, digests remembered", lambda: bench.start_over(*remembered), False, targets)


def build_first(bench: Bench) -> Benchmark:
    """Sources never seen: all their bytes are hashed."""
    targets = [Target("naive", "ours", at_least=2.5), Target("ours", "sha256", at_most=1.6)]
    return _built(bench, "build, first time", bench.start_over, True, targets)


def build_unchanged(bench: Bench) -> Benchmark:
    """Nothing to do."""
    bench.recipe(bench.vae(1))
    bench.start_over(bench.checkpoint, bench.vae(1))
    _run(bench.build(lambda: None))
    return Benchmark(
        "build, nothing changed",
        {"python": Contender([sys.executable, "-c", "pass"]), "ours": bench.build(lambda: None)},
        [Target("ours", at_most=0.35), Target("ours", at_most=100 * MB, unit="bytes")],
    )


def vae_swapped(bench: Bench) -> Benchmark:
    """Another VAE, never seen before, in a model that is built already; against copying the output."""
    seeds = itertools.count(2)
    bench.recipe(bench.vae(1))
    bench.start_over(bench.checkpoint, bench.vae(1))
    _run(bench.build(lambda: None))

    def swap() -> None:
        seed = next(seeds)
        bench.recipe(bench.vae(seed))
        if seed > 2:
            bench.vae(seed - 1).unlink()

    return Benchmark(
        "build, VAE swapped",
        {"floor": _floor("copy", bench.product, bench.folder / "floor.bin"), "ours": bench.build(swap)},
        [Target("ours", "floor", at_most=1.3), MEMORY],
        [bench.product],
    )


def _compared(bench: Bench, title: str, other: Callable[[str], bool]) -> Benchmark:
    """Two FP16 checkpoints, the second with other weights in some tensors; naive loads both."""
    a, b = (bench.folder / f"{name}.safetensors" for name in ("a", title.replace(" ", "-")))
    tensors, others = (make(f"SD-{bench.family}", seed=seed).tensors for seed in (0, 1))
    for path, held in ((a, tensors), (b, {n: others[n] if other(n) else t for n, t in tensors.items()})):
        if not path.exists():
            write(Model(held), path, "safetensors")
    plan = bench.folder / "diff.json"
    plan.write_text(json.dumps([[str(p), 0, p.stat().st_size] for p in (a, b)]))
    return Benchmark(
        f"diff, {title}",
        {
            "naive": _naive("diff", a, b),
            "floor": _floor("ranges", plan),
            "ours": replace(bench.ckpt("diff", "--quiet", a, b), code=1),
        },
        [Target("naive", "ours", at_least=1), MEMORY],
        [a, b],
    )


# Programs that merge: what names an interpreter that has one, and how it is run.
PEERS = {"mecha": ("SD_MECHA_PYTHON", "mecha.py"), "mergekit": ("MERGEKIT_PYTHON", "linear.py")}


def _merge(bench: Bench, title: str, count: int) -> Benchmark:
    """Weighted sums of `count` FP16 models in a row; the peers are run by interpreters that have them."""
    models = [bench.half(seed) for seed in range(count)]
    names = [f"m{seed}" for seed in range(count)]
    steps, last = [], names[0]
    for number, name in enumerate(names[1:], 1):
        steps.append(f's{number} = {{ op = "weighted-sum", a = "{last}", b = "{name}", alpha = 0.3 }}')
        last = f"s{number}"
    lines = ["format = 1", 'name = "anything"', f'base = "{last}"']
    lines += [f'sources.{n}.file = "{p.name}"' for n, p in zip(names, models, strict=True)]
    recipe = bench.folder / "anything.toml"

    def prepare() -> None:
        recipe.write_text("\n".join([*lines, "[steps]", *steps]) + "\n")
        bench.start_over(*models)

    contenders = {
        "floor": _floor("merge", bench.folder / "floor.bin", 0.3, *models),
        "ours": bench.build(prepare),
    }
    targets = [Target("ours", "floor", at_most=2), MEMORY]
    size = models[0].stat().st_size
    targets += [
        Target("ours", at_most=1.05, unit="read", per=(count + 1) * size, called="sources and product"),
        Target("ours", at_most=1.01, unit="written", per=size, called="product"),
    ]
    for peer, (variable, file) in PEERS.items():
        if (python := os.environ.get(variable)) is not None:
            script = Path(__file__).parent / "contenders" / file
            words = [python, str(script), str(bench.folder / f"{peer}.safetensors"), "0.3", *map(str, models)]
            contenders[peer] = Contender(words)
            targets.insert(0, Target(peer, "ours", at_least=8))
    return Benchmark(f"merge, {title}", contenders, targets, models)


def merge_two(bench: Bench) -> Benchmark:
    """A weighted sum of two models."""
    return _merge(bench, "two models", 2)


def merge_nine(bench: Bench) -> Benchmark:
    """A chain of eight weighted sums of nine models."""
    return _merge(bench, "nine models in a chain", 9)


def apply_loras(bench: Bench) -> Benchmark:
    """Four LoRAs of rank 32 baked into SD XL, digests known."""
    model = bench.whole_xl
    loras = [bench.lora_xl(seed) for seed in range(4)]
    recipe = bench.folder / "anything.toml"
    lines = ["format = 1", 'name = "anything"', 'base = "baked"', f'sources.model.file = "{model.name}"']
    lines += [f'sources.l{n}.file = "{p.name}"' for n, p in enumerate(loras)]
    shares = ", ".join(f"l{n} = 0.5" for n in range(len(loras)))
    lines += ["[steps]", f'baked = {{ op = "apply-lora", a = "model", loras = {{ {shares} }} }}']

    def prepare() -> None:
        recipe.write_text("\n".join(lines) + "\n")
        bench.start_over(model, *loras)

    contenders = {"copy": _floor("copy", model, bench.folder / "floor.bin"), "ours": bench.build(prepare)}
    targets = [Target("ours", "copy", at_most=3), MEMORY]
    return Benchmark("four LoRAs into SD XL", contenders, targets, [model, *loras])


def diff_vae(bench: Bench) -> Benchmark:
    """Checkpoints whose VAEs differ."""
    return _compared(bench, "another VAE", lambda name: name.startswith(VAE))


def diff_all(bench: Bench) -> Benchmark:
    """Checkpoints of which everything differs."""
    return _compared(bench, "all weights differ", lambda _: True)


def prune(bench: Bench) -> Benchmark:
    """EMA, junk and wasted precision taken out of the standard case; ours hashes the original as well."""
    return Benchmark(
        "prune",
        {
            "naive": _naive("prune", bench.checkpoint, bench.folder / "naive.safetensors"),
            "sha256": _hash(bench, bench.checkpoint),
            "ours": bench.ckpt(
                "prune", "-q", bench.checkpoint, "-o", bench.product, prepare=bench.start_over
            ),
        },
        [Target("naive", "ours", at_least=2.5), Target("ours", "sha256", at_most=1.6), MEMORY],
        [bench.checkpoint],
    )


def replace_vae(bench: Bench) -> Benchmark:
    """Another VAE in the standard case, by the command of one line."""
    vae = bench.vae(1)
    return Benchmark(
        "replace the VAE",
        {
            "naive": _naive("build", bench.checkpoint, vae, bench.folder / "naive.safetensors"),
            "sha256": _hash(bench, bench.checkpoint, vae),
            "ours": bench.ckpt(
                *("replace", "-q", bench.checkpoint, f"VAE={vae}", "-o", bench.product),
                prepare=bench.start_over,
            ),
        },
        [Target("naive", "ours", at_least=2.5), Target("ours", "sha256", at_most=1.6), MEMORY],
        [bench.checkpoint, vae],
    )


def growth(bench: Bench) -> Benchmark:
    """A quarter, once and four times 1 GB of FP32 weights: what a byte costs does not hang on how many."""
    sizes = {"quarter": 0.25, "one": 1.0, "four": 4.0}
    scale = 1 if bench.family == "v1" else 1000
    files, contenders = [], {}
    for name, size in sizes.items():
        recipe, source = _grown(bench, name, int(size * 1e9 / scale))
        files.append(source)
        words = ("build", "-q", recipe, "-o", bench.product)
        ours = bench.ckpt(*words, prepare=bench.start_over)
        contenders[name] = replace(ours, env={**ours.env, "CKPT_COMPONENTS": str(bench.folder / "grown")})
    return Benchmark(
        "growth",
        contenders,
        [Target("four", "one", at_most=4.4), Target("four", at_most=400 * MB, unit="bytes")],
        files,
    )


def planning(bench: Bench) -> Benchmark:
    """The plan of a model of 10,000 tensors, beside one of ten: what each further tensor costs."""
    few, _ = _grown(bench, "few", 10 * 4096, tensors=10)
    many, _ = _grown(bench, "many", 10_000 * 4096, tensors=10_000)
    env = {"CKPT_COMPONENTS": str(bench.folder / "grown")}
    contenders = {}
    for name, recipe in (("ten", few), ("ten thousand", many)):
        ours = bench.ckpt("plan", recipe)
        contenders[name] = replace(ours, env={**ours.env, **env})
    return Benchmark("planning", contenders, [Target("ten thousand", at_most=0.6)])


def _grown(bench: Bench, name: str, size: int, tensors: int = 64) -> tuple[Path, Path]:
    """A recipe over a component of its own, and its source: `size` bytes in so many FP32 tensors."""
    catalog = bench.folder / "grown"
    catalog.mkdir(exist_ok=True)
    width = max(1, size // tensors // 4)
    table = f'name = "Grown-{name}"\nclass = "Grown-{name}"\nkeys = {tensors}\n'
    table += f'parameters = {tensors * width}\n[tensors]\n"w.{{0..{tensors - 1}}}" = [{width}]\n'
    (catalog / f"Grown-{name}.toml").write_text(table)
    source = bench.folder / f"weights-{name}.safetensors"
    if not source.exists():
        block = memoryview(make("VAE-mini").tensors["decoder.conv_in.weight"].tobytes())
        held = {f"w.{i}": Repeated(DType.F32, (width,), block, 0) for i in range(tensors)}
        write(Model(dict(held)), source, "safetensors")
    recipe = bench.folder / f"grown-{name}.toml"
    recipe.write_text(
        f'format = 1\nname = "grown-{name}"\nbase = "NEW Grown-{name}"\n[components]\n'
        f'Grown-{name} = "s"\n[sources.s]\nfile = "{source.name}"\n[output]\noverflow = "keep"\n'
        'non_finite = "keep"\n'
    )
    return recipe, source


def extract(bench: Bench) -> Benchmark:
    """The VAE taken out of the standard case."""
    return Benchmark(
        "extract the VAE",
        {
            "naive": _naive("extract", bench.checkpoint, bench.folder / "naive.safetensors"),
            "ours": bench.ckpt(
                *("extract", "-q", bench.checkpoint, f"VAE-{bench.family}", "-o", bench.product),
                prepare=bench.start_over,
            ),
        },
        [Target("naive", "ours", at_least=1), MEMORY],
        [bench.checkpoint],
    )


def watch(bench: Bench) -> Benchmark:
    """Twenty FP32 VAEs in a folder, pruned and sorted; naive only halves and saves each."""
    kept = [bench.vae(seed) for seed in range(100, 120)]
    folder, into = bench.folder / "arrived", bench.out / "models"

    def arrive() -> None:
        bench.start_over()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        into.mkdir()
        for path in kept:
            os.link(path, folder / path.name)

    return Benchmark(
        "a folder of twenty VAEs",
        {
            "naive": _naive("folder", bench.folder / "naive.safetensors", *kept),
            "ours": bench.ckpt(
                *("prune", "-q", "--watch", folder, "--into", into, "--layout", "a1111"),
                *("--once", "--settle", "0"),
                prepare=arrive,
            ),
        },
        [Target("naive", "ours", at_least=1), MEMORY],
        kept,
    )


def _run(contender: Contender) -> None:
    subprocess.run(contender.argv, env=contender.environment(), check=True, capture_output=True)


BENCHMARKS: dict[str, Callable[[Bench], Benchmark]] = {
    "inspect": inspect,
    "inspect-large": inspect_large,
    "metric": metric,
    "read-zip": read_zip,
    "read-safetensors": read_safetensors,
    "build-cold": build_cold,
    "build-first": build_first,
    "build-unchanged": build_unchanged,
    "vae-swapped": vae_swapped,
    "prune": prune,
    "replace": replace_vae,
    "growth": growth,
    "planning": planning,
    "extract": extract,
    "watch": watch,
    "merge-two": merge_two,
    "merge-nine": merge_nine,
    "apply-loras": apply_loras,
    "all-in-one": all_in_one,
    "diff-vae": diff_vae,
    "diff-all": diff_all,
}
