"""What the tests of building share: miniature sources, a folder to build in, and the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from benchmarks.generate import CLEAN, DIRTY, Dirt, Format, Model, make, write
from builder.cli import run
from builder.formats import open_checkpoint
from builder.models.catalog import Catalog, load_catalog
from builder.tensors.lazy import DType, LazyTensor, MemoryTensor
from builder.workspace import Settings, Workspace

ROOT = Path(__file__).parents[2]
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
TINY = Path(__file__).with_name("tiny")
IDS = CLIP + "embeddings.position_ids"

# A whole model from a dirty training checkpoint, with another VAE.
RECIPE = """\
format = 1
name = "tiny"
base = "dirty"
fixes = ["clip-position-ids"]
sources.dirty.file = "dirty.ckpt"
sources.vae.file = "vae.safetensors"
components.VAE-tiny = "vae"
"""


@cache
def catalog() -> Catalog:
    """The catalog as it is shipped, with the tests' own family of a dozen tensors."""
    return load_catalog((TINY,))


@cache
def model(
    name: str = "SD-tiny", precision: DType = DType.F32, seed: int = 0, dirt: Dirt = CLEAN
) -> Mapping[str, LazyTensor]:
    """The tensors of a generated model."""
    return make(name, precision=precision, seed=seed, dirt=dirt, catalog=catalog()).tensors


def values(data: object, dtype: str = "<f4") -> LazyTensor:
    """A tensor of these values."""
    array = np.asarray(data, dtype)
    kinds = {"<f2": DType.F16, "<f4": DType.F32, "<f8": DType.F64, "<i8": DType.I64}
    return MemoryTensor(kinds[dtype], array.shape, array.tobytes())


def like(tensor: LazyTensor, *first: float, fill: float = 0.0) -> LazyTensor:
    """A tensor of the same shape, FP32, that begins with these values."""
    array = np.full(tensor.numel, fill, "<f4")
    array[: len(first)] = first
    return MemoryTensor(DType.F32, tensor.shape, array.tobytes())


def save(path: Path, tensors: Mapping[str, LazyTensor], **extras: Any) -> Path:
    """Write tensors in the container that the suffix asks for."""
    form: Format = "ckpt" if path.suffix in {".ckpt", ".pt"} else "safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(Model(dict(tensors), **extras), path, form)
    return path


def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file: dtype, shape and bytes."""
    with open_checkpoint(path, catalog().layouts) as checkpoint:
        return {n: (t.dtype.code, t.shape, bytes(t.tobytes())) for n, t in checkpoint.items()}


def files(root: Path) -> set[str]:
    """Every file and folder below a folder, by relative path."""
    return {str(p.relative_to(root)) for p in root.rglob("*")}


class Said(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on stdout."""
        assert self.code == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass(frozen=True)
class Folder:
    """A folder with recipes and sources, a store of its own, and `ckpt` run in it."""

    path: Path
    store: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def below(cls, path: Path) -> Folder:
        """A new folder `work` below a path, with its store beside it."""
        (path / "work").mkdir()
        return cls(path / "work", path / "store")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> Path:
        """Write a text file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def tiny(self, family: str = "tiny") -> Folder:
        """With the recipe and its sources, of a family of a dozen tensors."""
        save_dirty(self.path / "dirty.ckpt", family)
        save(self.path / "vae.safetensors", model(f"VAE-{family}", seed=2))
        self.write(f"{family}.toml", RECIPE.replace("tiny", family))
        return self

    def mini(self) -> Folder:
        """The same of the miniature family, which has as many tensors as SD-v1."""
        return self.tiny("mini")

    def built(self) -> Folder:
        """With the recipe, its sources known by their digests, and the product."""
        self.tiny().know("dirty.ckpt", "vae.safetensors")
        self.build()
        return self

    def beside(self, name: str, *, store: str | None = None) -> Folder:
        """A copy of the folder elsewhere, with the same store or another."""
        path = self.path.parent / name
        shutil.copytree(self.path, path)
        return replace(self, path=path, store=self.path.parent / store if store else self.store)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of every run: nothing of this machine's own."""
        own = {
            "CKPT_STORE": str(self.store),
            "CKPT_MODELS": "",
            "CKPT_COMPONENTS": str(TINY),
            "CKPT_SHARED_STORE": "",
            "HF_HUB_CACHE": str(self.path.parent / "no-cache"),
        }
        return {**own, **self.environment}

    def __call__(self, *args: object) -> Said:
        """Run `ckpt` in this process, in the folder."""
        out, err = io.StringIO(), io.StringIO()
        code = self._run(args, out, err)
        return Said(code, out.getvalue(), err.getvalue())

    def shown(self, *args: object) -> str:
        """What `ckpt` says in this process where both streams lead to one place, as on a terminal."""
        both = io.StringIO()
        self._run(args, both, both)
        return both.getvalue()

    def _run(self, args: Sequence[object], out: TextIO, err: TextIO) -> int:
        said = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with _environment(self.variables), _folder(self.path), said[0], said[1]:
            return run([str(a) for a in args])

    def process(self, *args: object, before: str = "", **environment: str) -> Said:
        """Run `ckpt` as a process of its own, after the Python statements `before`."""
        code = f"import sys\nfrom builder.cli import run\n{before}\nsys.exit(run(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, args)],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.variables, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def build(self, recipe: str = "tiny.toml", *options: object) -> dict[str, Any]:
        """Build, and what is said of it as data."""
        return self("build", recipe, "--json", *options).json

    def plan(self, recipe: str | Path = "tiny.toml") -> dict[str, Any]:
        """The plan as data."""
        return self("plan", recipe, "--json").json

    def states(self, recipe: str = "tiny.toml") -> dict[str, str]:
        """The state of every step of the plan."""
        return {s["label"]: s["state"] for s in self.plan(recipe)["steps"]}

    def know(self, *names: str) -> None:
        """Have the digests of files remembered although they were made a moment ago."""
        import hashlib

        from builder.store import Store

        with Store(self.store) as store:
            for name in names:
                path = self.path / name
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert store.memory.remember(path.stat(), digest, seen=None)

    def workspace(self) -> Workspace:
        """A workspace as every run has it."""
        return Workspace(Settings.from_environment(self.variables), offline=True)

    def components(self) -> set[str]:
        """The digests of all components that the store knows."""
        return {p.stem for p in self.store.glob("components/*/*.json")}

    def blobs(self) -> dict[str, Path]:
        """The components whose bytes the store keeps itself, by digest."""
        return {p.stem: p for p in self.store.glob("blobs/*/*.safetensors")}


def save_dirty(path: Path, family: str = "tiny", *, seed: int = 0) -> Path:
    """A small training checkpoint: FP32, with EMA, junk and damaged position ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_dirty(family, path.suffix, seed))
    return path


@cache
def _dirty(family: str, suffix: str, seed: int) -> bytes:
    made = make(f"SD-{family}", precision=DType.F32, seed=seed, dirt=DIRTY, catalog=catalog())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"dirty{suffix}")
        write(made, path, "ckpt" if suffix == ".ckpt" else "safetensors")
        return path.read_bytes()


def changed(tensors: Mapping[str, LazyTensor], **by_name: Callable[[LazyTensor], LazyTensor]) -> Any:
    """Tensors of which some are replaced by what a function makes of them."""
    return {n: by_name[n](t) if n in by_name else t for n, t in tensors.items()}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Any:
    before = {k: os.environ.get(k) for k in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _folder(path: Path) -> Any:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
