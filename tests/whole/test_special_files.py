"""Pipes, devices, sockets and endless files where a small file is due: one clear message, at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.base.errors import CatalogError, CkptError, LockError, RecipeError, SourceError
from builder.formats import open_checkpoint
from builder.models.catalog import load_catalog
from builder.recipe.lock import read_lock
from builder.recipe.read import load_recipe
from builder.store.records import read_record
from tests.help.special_files import pipe, socket, zeros

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such files")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL = [pipe, zeros, socket, _huge, _loop]


@pytest.fixture(params=SPECIAL, ids=lambda make: make.__name__.strip("_"))
def special(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return request.param  # type: ignore[no-any-return]


def refused(kind: type[CkptError], read: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        read()
    assert len(caught.value.problems) == 1


def test_recipes(tmp_path: Path, special: Callable[[Path], None]) -> None:
    special(tmp_path / "a.toml")
    refused(RecipeError, lambda: load_recipe(tmp_path / "a.toml", load_catalog([])))


def test_locks(tmp_path: Path, special: Callable[[Path], None]) -> None:
    special(tmp_path / "a.lock.toml")
    refused(LockError, lambda: read_lock(tmp_path / "a.lock.toml"))


@pytest.mark.parametrize("name", ["a.toml", "optional.toml", "architectures/a.toml", "known/a.toml"])
def test_catalogs(tmp_path: Path, special: Callable[[Path], None], name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    special(tmp_path / name)
    refused(CatalogError, lambda: load_catalog([tmp_path]))


def test_records(tmp_path: Path, special: Callable[[Path], None]) -> None:
    special(tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") is None


def test_models(tmp_path: Path, special: Callable[[Path], None]) -> None:
    special(tmp_path / "a.safetensors")
    refused(SourceError, lambda: open_checkpoint(tmp_path / "a.safetensors"))


def test_shards(tmp_path: Path, special: Callable[[Path], None]) -> None:
    (tmp_path / "a.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    special(tmp_path / "a.safetensors")
    refused(SourceError, lambda: open_checkpoint(tmp_path / "a.index.json"))


@pytest.mark.parametrize("name", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
def test_folders(tmp_path: Path, special: Callable[[Path], None], name: str) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    special(tmp_path / name)
    refused(SourceError, lambda: open_checkpoint(tmp_path))
