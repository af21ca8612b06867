"""What ComfyUI documents of itself to nodes, as far as one that loads checkpoints needs it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PREFIXES = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")


class InterruptProcessingException(Exception):
    """The user has pressed the button to cancel."""


class RejectedError(Exception):
    """What is shown of a workflow that is not run."""


@dataclass(frozen=True)
class Linked:
    """What another node gives: it is not known before that one has run."""

    value: object


@dataclass
class Comfy:
    """A folder with models, and modules that say so; `bars` are what progress bars showed.

    `loaded` are the checkpoints that were loaded, in order; `cancel` is asked now and then.
    """

    root: Path
    bars: list[tuple[int, int]] = field(default_factory=list)
    loaded: list[Path] = field(default_factory=list)
    cancel: Callable[[], bool] = lambda: False
    _cached: dict[str, tuple[object, object, tuple[Any, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = ("checkpoints", "vae", "loras", "embeddings")
        self.folders: dict[str, tuple[list[str], set[str]]] = {
            kind: ([str(self.root / "models" / kind)], {".safetensors", ".ckpt", ".pt"}) for kind in kinds
        }
        for kind in kinds:
            (self.root / "models" / kind).mkdir(parents=True)

    def modules(self) -> dict[str, ModuleType]:
        """The modules that a node imports, by name."""
        made = {n: ModuleType(n) for n in MODULES}
        paths = made["folder_paths"]
        paths.models_dir = str(self.root / "models")  # type: ignore[attr-defined]
        paths.folder_names_and_paths = self.folders  # type: ignore[attr-defined]
        paths.get_folder_paths = lambda kind: self.folders[kind][0][:]  # type: ignore[attr-defined]
        paths.get_filename_list = self._list  # type: ignore[attr-defined]
        paths.get_full_path = self._full_path  # type: ignore[attr-defined]
        made["comfy.sd"].load_checkpoint_guess_config = self._load  # type: ignore[attr-defined]
        made["comfy.utils"].ProgressBar = lambda total: _Bar(self)  # type: ignore[attr-defined]
        management = made["comfy.model_management"]
        management.throw_exception_if_processing_interrupted = self._interrupt  # type: ignore[attr-defined]
        for name in ("sd", "utils", "model_management"):
            setattr(made["comfy"], name, made[f"comfy.{name}"])
        return made

    def _list(self, kind: str) -> list[str]:
        folders, suffixes = self.folders[kind]
        found = (p.relative_to(f) for f in map(Path, folders) for p in f.rglob("*") if p.suffix in suffixes)
        return sorted({str(p) for p in found})

    def _full_path(self, kind: str, name: str) -> str | None:
        found = (Path(folder) / name for folder in self.folders[kind][0])
        return next((str(p) for p in found if p.is_file()), None)

    def _interrupt(self) -> None:
        if self.cancel():
            raise InterruptProcessingException

    def _load(
        self,
        path: str,
        output_vae: bool = True,
        output_clip: bool = True,
        embedding_directory: list[str] | None = None,
    ) -> tuple[Any, ...]:
        from safetensors.torch import load_file

        assert output_vae and output_clip and embedding_directory == self.folders["embeddings"][0]
        self.loaded.append(Path(path))
        tensors = load_file(path)
        return (*({n: t for n, t in tensors.items() if n.startswith(p)} for p in PREFIXES), None)

    def run(self, node: Any, **inputs: Any) -> tuple[Any, ...]:
        """What a node gives: as a workflow of this one node is checked, remembered and run."""
        types = node.INPUT_TYPES()
        asked = inspect.signature(node.VALIDATE_INPUTS).parameters
        constant = {n: v for n, v in inputs.items() if not isinstance(v, Linked)}
        inputs = {n: v.value if isinstance(v, Linked) else v for n, v in inputs.items()}
        for name, (kind, *_) in types["required"].items():
            if name not in inputs:
                raise RejectedError(f"Required input is missing: {name}")
            if isinstance(kind, list) and name not in asked and inputs[name] not in kind:
                raise RejectedError(f"Value not in list: {name}")
        valid = node.VALIDATE_INPUTS(**{n: v for n, v in constant.items() if n in asked})
        if valid is not True:
            raise RejectedError(valid)
        with torch.inference_mode():
            key, changed = repr(sorted(inputs.items())), node.IS_CHANGED(**dict.fromkeys(inputs) | constant)
            if key not in self._cached or self._cached[key][1] != changed:
                given = getattr(node(), node.FUNCTION)(**self._defaults(types) | inputs)
                assert isinstance(given, tuple) and len(given) == len(node.RETURN_TYPES)
                self._cached[key] = (node, changed, given)
            return self._cached[key][2]

    @staticmethod
    def _defaults(types: Mapping[str, Any]) -> dict[str, Any]:
        return {name: options["default"] for name, (_, options) in types.get("optional", {}).items()}


MODULES = ("comfy", "comfy.sd", "comfy.utils", "comfy.model_management", "folder_paths")


@dataclass
class _Bar:
    comfy: Comfy

    def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
        assert total is not None and 0 <= value <= total
        self.comfy.bars.append((value, total))


def start(root: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Comfy, Any]:
    """ComfyUI in a folder, and the module of a node of a single file, loaded as it loads those."""
    comfy = Comfy(root)
    for name, module in comfy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("custom_node", node)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(isinstance(n, str) for n in module.NODE_DISPLAY_NAME_MAPPINGS.values())
    return comfy, module
