"""How work is heard, stopped and shared by threads, and that it leaves the process as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_build import Cancelled, CkptError, FetchError, Progress, RecipeError, Result, Workspace
from tests.help.building import Folder, content, files
from tests.help.servers import Handler, Server

WAITS = 60.0  # seconds in which what is stopped has to have ended


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


def workspace(folder: Folder, **settings: Any) -> Workspace:
    return Workspace(environment=folder.variables, **settings)


# -- progress


def test_progress_is_told_in_bytes(folder: Folder) -> None:
    heard: list[Progress] = []
    work = workspace(folder)
    work.build(work.load(folder / "tiny.toml"), progress=heard.append)
    tasks = {p.task: p for p in heard}
    assert {"tiny.safetensors"} <= tasks.keys()
    for task, last in tasks.items():
        steps = [p.done for p in heard if p.task == task]
        assert steps == sorted(steps) and last.done == last.total > 0
    told: list[Progress] = []
    work.inspect(folder / "dirty.ckpt", progress=told.append)
    work.diff(folder / "dirty.ckpt", folder / "tiny.safetensors", progress=told.append)
    assert len({p.task for p in told}) >= 2


class Stop(Exception):
    """What a program of its own stops with."""


WORK: dict[str, Callable[[Workspace, Folder, dict[str, Any]], object]] = {
    "build": lambda w, f, how: w.build(w.load(f / "tiny.toml"), **how),
    "inspect": lambda w, f, how: w.inspect(f / "dirty.ckpt", **how),
    "diff": lambda w, f, how: w.diff(f / "dirty.ckpt", f / "dirty.ckpt", **how),
    "extract": lambda w, f, how: w.extract(f / "dirty.ckpt", "UNET", f / "u.safetensors", **how),
    "replace": lambda w, f, how: w.replace(
        f / "dirty.ckpt", {"VAE": f / "vae.safetensors"}, f / "r.ckpt", **how
    ),
    "prune": lambda w, f, how: w.prune(f / "dirty.ckpt", f / "p.safetensors", **how),
    "convert": lambda w, f, how: w.convert(f / "dirty.ckpt", f / "c.safetensors", **how),
    "new": lambda w, f, how: w.new(f / "dirty.ckpt", **how),
}


@pytest.mark.parametrize("what", WORK)
def test_what_progress_raises_ends_the_work_and_is_raised(folder: Folder, what: str) -> None:
    def stop(progress: Progress) -> None:
        raise Stop(progress.task)

    before = files(folder.path)
    with pytest.raises(Stop):
        WORK[what](workspace(folder), folder, {"progress": stop})
    assert files(folder.path) == before and not folder.components()


@pytest.mark.parametrize("what", WORK)
def test_work_is_cancelled_from_without(folder: Folder, what: str) -> None:
    """Before it begins, and while it is under way."""
    cancel, before = threading.Event(), files(folder.path)
    with pytest.raises(Cancelled):
        WORK[what](workspace(folder), folder, {"cancel": cancel, "progress": lambda _: cancel.set()})
    assert cancel.is_set()
    with pytest.raises(Cancelled):
        WORK[what](workspace(folder), folder, {"cancel": cancel})
    assert files(folder.path) == before and not folder.components()
    WORK[what](workspace(folder), folder, {"cancel": threading.Event()})


def test_a_store_that_is_checked_is_left_alone_when_that_is_cancelled(folder: Folder) -> None:
    work = workspace(folder)
    work.build(work.load(folder / "tiny.toml"))
    cancel, before = threading.Event(), files(folder.store)
    with pytest.raises(Cancelled):
        work.store.check(cancel=cancel, progress=lambda _: cancel.set())
    assert files(folder.store) == before and work.store.check() == ()


def test_what_waits_for_a_host_is_cancelled_too(folder: Folder) -> None:
    cancel, over = threading.Event(), threading.Event()

    def silent(handler: Handler) -> None:
        cancel.set()
        over.wait(WAITS)

    with Server() as server:
        server.routes["/m.safetensors"] = silent
        environment = {**folder.variables, "CKPT_ALLOW_PRIVATE": "1"}
        work = Workspace(environment=environment)
        recipe = work.compose(
            folder.path,
            name="x",
            base="NEW VAE-tiny",
            sources={"m": {"urls": [server.url("/m.safetensors")]}},
            components={"VAE-tiny": "m"},
        )
        began = time.monotonic()
        with pytest.raises(Cancelled):
            work.build(recipe, cancel=cancel)
        assert time.monotonic() - began < WAITS
        over.set()
    with pytest.raises(FetchError, match="the network is off"):
        Workspace(environment=environment, offline=True).build(recipe)


def test_ctrl_c_leaves_everything_as_it_was(folder: Folder) -> None:
    main = threading.main_thread().ident
    assert main is not None
    before, handler = files(folder.path), signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed = threading.Event()

    def press(_: Progress) -> None:
        if not pressed.is_set():
            pressed.set()
            signal.pthread_kill(main, signal.SIGINT)

    try:
        work = workspace(folder)
        with pytest.raises(KeyboardInterrupt):
            work.build(work.load(folder / "tiny.toml"), progress=press)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert files(folder.path) == before and not ours()


# -- the process around it


def ours() -> list[threading.Thread]:
    """The threads that are not this one, once those that are about to end have."""
    found = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for thread in found:
        thread.join(WAITS)
    return [t for t in found if t.is_alive()]


def state() -> dict[str, object]:
    """Whatever of a process a library could change for good."""
    fds = Path("/proc/self/fd")
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "threads": ours(),
        "open files": len(list(fds.iterdir())) if fds.exists() else 0,
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def threads() -> Iterator[int]:
    """How many torch may use in this process, which is not what a pass lets it use."""
    found = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(found)


@pytest.mark.parametrize("what", WORK)
def test_a_process_is_left_as_it_was(
    folder: Folder, threads: int, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """After work that was done, that was cancelled and that failed."""
    before = state()
    WORK[what](workspace(folder), folder, {"cancel": threading.Event()})
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CkptError):
        WORK[what](workspace(folder), folder, {"cancel": cancel})
    with pytest.raises(CkptError):
        WORK[what](workspace(folder), Folder(folder.path / "nowhere", folder.store), {})
    assert state() == before and torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")


def test_what_threads_may_open_is_each_ones_own(folder: Folder) -> None:
    """A shard that is a link out is refused to recipes that are confined, while others may follow it."""
    where, index = folder.path / "confined", "x.safetensors.index.json"
    where.mkdir()
    workspace(folder).convert(folder / "dirty.ckpt", where / index)
    for shard in where.glob("*.safetensors"):
        shard.rename(folder / shard.name)
        shard.symlink_to(folder / shard.name)
    text = f'format = 1\nname = "y"\nbase = "s"\nsources.s.file = "{index}"\n'
    barrier = threading.Barrier(8)

    def plan(number: int) -> str | None:
        work = workspace(folder, outside=number % 2 == 0)
        barrier.wait()
        for _ in range(5):
            try:
                work.plan(work.parse(text, where))
            except RecipeError as error:
                said = str(error.problems[0].fact)
            else:
                said = None
            assert (said is None) == (number % 2 == 0)
        return said

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(plan, range(8)))
    assert said[1] is not None and "outside the recipe's folder" in said[1]


def test_threads_share_a_store(folder: Folder, threads: int) -> None:
    """Eight that build different recipes of the same sources, and look into files, at once."""

    def recipe(work: Workspace, number: int) -> Result:
        said = {
            "name": f"m{number}",
            "base": "dirty",
            "sources": {"dirty": "dirty.ckpt", "vae": ("vae.safetensors", "dirty.ckpt")[number % 2]},
            "components": {"VAE-tiny": "vae"},
            "output": {"precision": ("fp16", "bf16", "fp32", "keep")[number % 4]},
            "metadata": {"author": str(number)},
        }
        return work.build(work.compose(folder.path, **said), folder.path / where / f"m{number}.safetensors")

    def at_once(number: int) -> tuple[Result, object, int]:
        started = torch.get_num_threads()
        assert started == threads
        barrier.wait()
        made = recipe(shared, number)
        report = shared.inspect(folder / "dirty.ckpt")
        assert shared.plan(shared.load(folder / "tiny.toml")).nodes
        assert torch.get_num_threads() == started
        return made, report.json, started

    shared, barrier = workspace(folder), threading.Barrier(8)
    where = "together"
    (folder / where).mkdir()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(at_once, range(8)))
    assert torch.get_num_threads() == threads
    where = "alone"
    (folder / where).mkdir()
    alone = workspace(folder, store=folder.path / "another store")
    for number, (made, report, _) in enumerate(together):
        path = folder.path / "together" / f"m{number}.safetensors"
        assert path.read_bytes() == recipe(alone, number).output.path.read_bytes()
        assert made.output.path == path and report == together[0][1]
    assert shared.store.check() == () and not ours()
    assert content(folder / "together/m0.safetensors") != content(folder / "together/m1.safetensors")
