"""A build that is stopped, or fails in one place, ends soon everywhere; what was measured stays known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder.base.parallel import Cancelled
from builder.base.progress import Reporter
from builder.build.context import Context
from builder.build.in_parts import Parts
from builder.build.outputs import Assembly
from builder.sources.job import SourceJob
from builder.tensors.lazy import WINDOW
from tests.help.building import RECIPE, Folder, files, model, save, save_dirty


class _Heard(Reporter):
    def __init__(self) -> None:
        self.bytes = 0

    def advance(self, task: str, count: int) -> None:
        self.bytes += count


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path)
    save_dirty(made / "dirty.ckpt")
    save(made / "vae.safetensors", model("VAE-tiny", seed=1))
    made.write("tiny.toml", RECIPE)
    return made


@contextmanager
def _context(folder: Folder, heard: Reporter) -> Iterator[Context]:
    with folder.workspace() as workspace:
        workspace.reporter = heard
        with workspace.sources() as sources:
            plan = workspace.plan(workspace.recipe(folder / "tiny.toml"), sources)
            context = Context(plan, sources, {}, 2, True, heard)
            yield context
            context.close()


def test_hashing_ends_when_the_build_is_stopped(folder: Folder) -> None:
    heard = _Heard()
    with _context(folder, heard) as context:
        key, job = next((n.key, n.job) for n in context.plan if n.label == "source dirty")
        assert isinstance(job, SourceJob)
        context.cancel()
        with pytest.raises(Cancelled):
            context.settle(key, job)
    assert (folder / "dirty.ckpt").stat().st_size > 2 * WINDOW >= heard.bytes


def test_writing_ends_when_the_build_is_stopped(folder: Folder) -> None:
    heard, before = _Heard(), files(folder.path)
    with _context(folder, heard) as context:
        context.cancel()
        with pytest.raises(Cancelled):
            Assembly(context, context.plan.outputs()[0], Parts(context, False)).make()
    assert files(folder.path) == before and not folder.components()
    assert heard.bytes <= 2 * WINDOW


def test_a_component_is_measured_once(folder: Folder) -> None:
    """What is remembered of it is said again, whatever it is."""
    unet, vae, clip = folder.build()["outputs"][0]["metric"].split("/")
    with folder.workspace() as workspace:
        lock = (folder / "tiny.lock.toml").read_text()
        digest = lock.split('class = "UNET-tiny"')[1].split('blake3 = "')[1][:64]
        assert workspace.store.recall("metric", digest, dict) == {"UNET-tiny": unet}
        workspace.store.note("metric", digest, {"UNET-tiny": "1234"})
    folder.write("tiny.toml", RECIPE + 'output.metadata.author = "someone"\n')
    assert folder.build()["outputs"][0]["metric"] == f"1234/{vae}/{clip}"
    (folder / "tiny.safetensors").unlink()
    made = folder.build()
    assert "UNET-tiny of dirty" in made["made"] and made["outputs"][0]["metric"] == f"1234/{vae}/{clip}"
