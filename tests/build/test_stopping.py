"""A build that is stopped, or fails in one place, ends soon everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.base.progress import Reporter
from builder.build.context import Context
from builder.build.measure import Metrics
from builder.build.schedule import Cancelled
from builder.plan import Plan, make_plan
from builder.recipe import load_recipe
from builder.store import Store
from builder.tensors.lazy import WINDOW
from tests.help.building import RECIPE, catalog, model, save


class _Heard(Reporter):
    def __init__(self) -> None:
        self.started: list[str] = []
        self.bytes = 0

    def start(self, task: str, total: int) -> None:
        self.started.append(task)

    def advance(self, task: str, count: int) -> None:
        self.bytes += count


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _context(folder: Path, store: Store, reporter: Reporter) -> tuple[Context, Plan]:
    save(folder / "dirty.ckpt", model())
    save(folder / "vae.safetensors", model("VAE-mini", seed=1))
    (folder / "mini.toml").write_text(RECIPE)
    recipe = load_recipe(folder / "mini.toml", catalog())
    plan = make_plan(recipe, catalog=catalog(), store=store, folders=())
    return Context(plan, catalog(), store, 2, reporter), plan


def test_hashing_ends_when_the_build_is_stopped(tmp_path: Path, store: Store) -> None:
    heard = _Heard()
    context, plan = _context(tmp_path, store, heard)
    with plan:
        context.cancel()
        with pytest.raises(Cancelled):
            context.digest(plan.node("source dirty"))
    assert (tmp_path / "dirty.ckpt").stat().st_size > 2 * WINDOW >= heard.bytes


def test_measuring_ends_when_the_build_is_stopped(tmp_path: Path, store: Store) -> None:
    heard = _Heard()
    context, plan = _context(tmp_path, store, heard)
    with plan:
        made = store.put(None, "UNET-mini-SD", "UNET-mini", model("UNET-mini"))
        context.cancel()
        with pytest.raises(Cancelled):
            Metrics(context).digits("UNET-mini", made)
    assert heard.bytes == 0


def test_a_component_is_measured_once(tmp_path: Path, store: Store) -> None:
    heard = _Heard()
    context, plan = _context(tmp_path, store, heard)
    with plan:
        made = store.put(None, "UNET-mini-SD", "UNET-mini", model("UNET-mini"))
        first, again = Metrics(context), Metrics(context)
        assert first.digits("UNET-mini", made) == first.digits("UNET-mini", made)
        assert again.text({"UNET-mini": made}) == f"{first.digits('UNET-mini', made)}/----/----"
    assert heard.started == ["metric of UNET-mini"]
