"""Beyond one process: tasks of any executor, which hand each other digests through a store that all share."""

from __future__ import annotations

import ast
import os
import pickle
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from builder import __version__
from builder.base.errors import CkptError, OutputError, UsageError
from builder.base.parallel import Cancelled
from builder.base.progress import Reporter
from builder.build import Build, build_recipe, spread
from builder.build.carry_out import build_all
from builder.build.spread import Done, Farm, Task, means_of, tasks_of
from builder.build.statements import Statements
from builder.plan import Plan
from builder.plan.graph import ComponentJob
from builder.workspace import Settings, Workspace, find_lock
from ckpt_build import Workspace as Face
from tests.help.building import ROOT, Folder, _environment, content, model, save

# Two outputs with a merge in common, one of them with a VAE of its own.
RECIPE = """\
format = 1
name = "family"
base = "half"
sources.a.file = "a.safetensors"
sources.b.file = "b.safetensors"
sources.vae.file = "vae.safetensors"
[steps.half]
op = "weighted-sum"
a = "a"
b = "b"
alpha = 0.5
[[output]]
name = "one"
[[output]]
name = "two"
precision = "fp16"
[[output]]
name = "three"
components.VAE-tiny = "vae"
"""
OUTPUTS = ("one", "two", "three")


@pytest.fixture
def work(tmp_path: Path) -> Folder:
    folder = Folder.below(tmp_path)
    for seed, name in enumerate("ab"):
        save(folder / f"{name}.safetensors", model(seed=seed))
    save(folder / "vae.safetensors", model("VAE-tiny", seed=7))
    folder.write("family.toml", RECIPE)
    return folder


@pytest.fixture
def truth(work: Folder) -> dict[str, bytes]:
    """What one process makes."""
    alone = work.beside("alone", store="alone-store")
    alone.build("family.toml")
    return {name: (alone / f"family-{name}.safetensors").read_bytes() for name in OUTPUTS}


def made_in(work: Folder) -> dict[str, bytes]:
    return {name: (work / f"family-{name}.safetensors").read_bytes() for name in OUTPUTS}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@contextmanager
def workspace(work: Folder, reporter: Reporter | None = None) -> Iterator[Workspace]:
    settings = replace(Settings.from_environment(work.variables), shared=str(work.path.parent / "far"))
    with Workspace(settings, offline=True, reporter=reporter or Reporter()) as opened:
        yield opened


def build_on(executor: Executor, work: Folder, reporter: Reporter | None = None, **options: Any) -> Build:
    with workspace(work, reporter) as opened, opened.sources() as sources:
        means = means_of(opened.settings, offline=True, threads=1)
        recipe = opened.recipe(work / "family.toml")
        return build_recipe(opened, recipe, sources, elsewhere=Farm(executor, means), **options)


def plan_of(work: Folder) -> Plan:
    with workspace(work) as opened, opened.sources() as sources:
        recipe = opened.recipe(work / "family.toml")
        return opened.plan(recipe, sources, find_lock(recipe))


def _own_store(base: str) -> None:
    """A worker has a store of its own: what others made reaches it through the shared one alone."""
    os.environ["CKPT_STORE"] = f"{base}/{os.getpid()}"


@contextmanager
def processes(work: Folder, count: int = 2) -> Iterator[ProcessPoolExecutor]:
    base = str(work.path.parent / "workers")
    with (
        _environment(work.variables),
        ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_own_store, initargs=(base,)
        ) as pool,
    ):
        yield pool


def test_what_is_a_task(work: Folder) -> None:
    plan = plan_of(work)
    outputs = [n.key for n in plan.outputs()]
    tasks = tasks_of(plan, outputs)
    labels = [plan.nodes[k].label for k in tasks if isinstance(plan.nodes[k].job, ComponentJob)]
    assert len(labels) == len(set(labels)) and all("half" in label for label in labels)
    assert not any(label == "VAE-tiny of vae" for label in labels), "which one output alone reads"
    for key in outputs:
        assert set(tasks[key]) == set(plan.ancestors(key)) & set(tasks)
    alone = tasks_of(plan, outputs[:1])
    assert set(alone) < set(tasks) and outputs[0] in alone


def test_a_task_is_plain_data_of_its_own_part_alone(work: Folder) -> None:
    plan = plan_of(work)
    for node in plan.outputs():
        part = plan.part(node.key)
        assert set(part.nodes) == {node.key, *plan.ancestors(node.key)}
        assert pickle.loads(pickle.dumps(part)).nodes == part.nodes
    assert len({len(plan.part(n.key).nodes) for n in plan.outputs()}) > 1


def test_processes_make_the_same_bytes(work: Folder, truth: dict[str, bytes]) -> None:
    with processes(work) as pool:
        made = build_on(pool, work)
    assert made_in(work) == truth
    assert {b.name: b.state for b in made.outputs} == dict.fromkeys(OUTPUTS, "written")
    alone = (work.path.parent / "alone" / "family.lock.toml").read_text()
    assert (work / "family.lock.toml").read_text() == alone
    # Shared components were made once, and nothing is left to do here, on the shared store's word.
    assert len(made.made) == len(set(made.made))
    far = ("--store", work.path.parent / "far")
    assert {b["state"] for b in work.build("family.toml", *far)["outputs"]} == {"unchanged"}


def test_threads_do_it_too(work: Folder, truth: dict[str, bytes]) -> None:
    with _environment(work.variables), ThreadPoolExecutor(3) as pool:
        build_on(pool, work)
    assert made_in(work) == truth


def test_several_recipes_share_what_they_have_in_common(work: Folder, truth: dict[str, bytes]) -> None:
    work.write("other.toml", RECIPE.replace('"family"', '"other"').replace('"one"', '"fourth"'))
    with workspace(work) as opened, opened.sources() as sources, _environment(work.variables):
        recipes = [opened.recipe(work / name) for name in ("family.toml", "other.toml")]
        plans = [opened.plan(r, sources, None) for r in recipes[:1]]
        only = recipes[1]
        only = replace(only, outputs=tuple(o for o in only.outputs if o.name == "fourth"))
        plans.append(opened.plan(only, sources, None))
        with ThreadPoolExecutor(2) as pool:
            means = means_of(opened.settings, offline=True)
            found = build_all(plans, sources, elsewhere=Farm(pool, means))
    builds = [b for b in found if isinstance(b, Build)]
    assert len(builds) == 2
    assert made_in(work) == truth
    assert content(work / "other-fourth.safetensors") == content(work / "family-one.safetensors")
    made = [m for b in builds for m in b.made]
    assert len(made) == len(set(made))


def test_statements_of_what_others_made(work: Folder, truth: dict[str, bytes]) -> None:
    text = RECIPE + '[[output]]\nname = "set"\nfile = "set.safetensors.index.json"\nshard_size = "10KB"\n'
    work.write("family.toml", text)
    with processes(work) as pool:
        made = build_on(pool, work, statements=Statements())
    assert made_in(work) == truth
    for output in made.outputs:
        assert output.statement is not None
        assert work("verify", "family.toml", "--statement", output.statement).code == 0


def test_what_fails_there_is_said_here(work: Folder, truth: dict[str, bytes]) -> None:
    text = RECIPE.replace('name = "two"', f'name = "two"\nexpect.sha256 = "{"0" * 64}"')
    work.write("family.toml", text)
    with (
        _environment(work.variables),
        ThreadPoolExecutor(2) as pool,
        pytest.raises(OutputError, match="not what the recipe expects"),
    ):
        build_on(pool, work)
    assert not (work / "family-two.safetensors").exists()


def test_what_is_stale_is_said_here(work: Folder) -> None:
    with _environment(work.variables), ThreadPoolExecutor(2) as pool:
        build_on(pool, work)
        save(work / "a.safetensors", model(seed=9))
        with pytest.raises(CkptError, match="the lock is stale"):
            build_on(pool, work, locked=True)


class Abroad(Executor):
    """A worker in another folder."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        said: Future[Any] = Future()
        here = Path.cwd()
        os.chdir("/")
        try:
            said.set_result(fn(*args, **kwargs))
        finally:
            os.chdir(here)
        return said


def test_from_python(work: Folder, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with _environment(work.variables), ThreadPoolExecutor(2) as pool:
        face = Face(shared=str(work.path.parent / "far"), offline=True)
        monkeypatch.chdir(work.path)
        recipe = face.load("family.toml")
        stop = threading.Event()
        stop.set()
        with pytest.raises(Cancelled):
            face.build(recipe, executor=pool, cancel=stop)
        made = face.build(recipe, executor=Abroad())
        assert {o.path for o in made.outputs} == {work / f"family-{name}.safetensors" for name in OUTPUTS}
        (again,) = face.build_all([recipe], executor=pool).outcomes
        assert again.result is not None and {o.state for o in again.result.outputs} == {"unchanged"}
        with pytest.raises(UsageError, match="share"):
            Face(offline=True).build(recipe, executor=pool)
    assert made_in(work) == truth


class Losing(Executor):
    """Workers of whom some are gone before they answer."""

    def __init__(self, inner: Executor, losses: int) -> None:
        self.inner, self.losses, self.tasks = inner, losses, 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks += 1
        if self.losses:
            self.losses -= 1
            lost: Future[Any] = Future()
            lost.cancel()
            lost.set_running_or_notify_cancel()
            return lost
        return self.inner.submit(fn, *args, **kwargs)


def test_a_lost_worker_is_tried_again(work: Folder, truth: dict[str, bytes]) -> None:
    with _environment(work.variables), ThreadPoolExecutor(2) as pool:
        heard = Notes()
        build_on(Losing(pool, 2), work, heard)
    assert made_in(work) == truth
    assert sum("was lost: it is made again" in note for note in heard.notes) == 2


def test_workers_that_are_all_lost_are_given_up(work: Folder) -> None:
    with _environment(work.variables), ThreadPoolExecutor(2) as pool:
        losing = Losing(pool, 99)
        with pytest.raises(OutputError, match="could not be made elsewhere, 3 times"):
            build_on(losing, work)
    assert losing.tasks < 20


def test_a_pool_whose_process_died(work: Folder) -> None:
    with processes(work, 1) as pool:
        pool.submit(os._exit, 1).exception()
        with pytest.raises(OutputError, match="takes no tasks"):
            build_on(pool, work)


def test_another_version_is_refused(work: Folder) -> None:
    """Before what it sent is looked at."""
    with pytest.raises(OutputError, match="a worker has ckpt-build"):
        spread.make("0", b"of a class that is not here")
    with pytest.raises(OutputError, match=f"a worker on `{socket.gethostname()}` cannot work"):
        spread.make(__version__, b"of a class that is not here")


def something_else(done: Done) -> object:
    return "done"


def of_nothing(done: Done) -> object:
    return Done()


def of_another_file(done: Done) -> object:
    if done.product is None:
        return done
    built = done.product.built._replace(path=Path("/etc/passwd"))
    return replace(done, product=replace(done.product, built=built))


def of_what_is_not_there(done: Done) -> object:
    if done.product is not None:
        done.product.built.path.unlink()
    return done


def of_another_size(done: Done) -> object:
    if done.product is not None:
        done.product.built.path.write_bytes(b"something else")
    return done


class Lying(Executor):
    """Workers who answer with what a function makes of the true answer."""

    def __init__(self, lie: Callable[[Done], object]) -> None:
        self.lie = lie

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        said: Future[Any] = Future()
        said.set_result(self.lie(fn(*args, **kwargs)))
        return said


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (something_else, "answer about `.*` is none"),
        (of_nothing, "is of something else"),
        (of_another_file, "is of something else"),
        (of_what_is_not_there, "is not here as the worker that made it says"),
        (of_another_size, "is not here as the worker that made it says"),
    ],
)
def test_what_a_worker_says_is_looked_at(
    work: Folder, lie: Callable[[Done], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "SEEN", 0.0)
    with _environment(work.variables), pytest.raises(OutputError, match=words):
        build_on(Lying(lie), work)
    assert not (work / "family.lock.toml").exists()


@pytest.mark.parametrize("error", [BrokenExecutor("gone"), TypeError("no pickle"), RuntimeError("over")])
def test_an_executor_that_takes_nothing(work: Folder, error: Exception) -> None:
    class Closed(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise error

    with pytest.raises(OutputError, match=f"takes no tasks\n.*{error}"):
        build_on(Closed(), work)


def test_a_source_that_is_another_there(work: Folder) -> None:
    """What one worker read is what all others are to read."""
    plan = plan_of(work)
    node = plan.outputs()[2]
    told = {n.key: spread.Told("0" * 64, 1) for n in plan.part(node.key) if n.kind == "source" and n.label}
    with workspace(work) as opened, _environment(work.variables):
        task = Task(plan.part(node.key), node.key, means_of(opened.settings), told)
        done = spread.make(__version__, pickle.dumps(task))
    assert done.error is not None and not (work / "family-three.safetensors").exists()


# -- dask


def needs_dask() -> None:
    if find_spec("distributed") is None:
        pytest.skip("distributed is not installed: `pip install -e '.[dev]'`")


@contextmanager
def cluster(work: Folder, count: int = 2) -> Iterator[Any]:
    needs_dask()
    from distributed import LocalCluster

    with _environment({**work.variables, "PYTHONWARNINGS": "ignore"}):
        running = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            host="127.0.0.1",
            silence_logs=50,
        )
        try:
            yield running
        finally:
            running.close()


def _own(base: str) -> None:
    os.environ["CKPT_STORE"] = f"{base}/{os.getpid()}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_dask_cluster(work: Folder, truth: dict[str, bytes]) -> None:
    with cluster(work) as running:
        address = f"dask://{running.scheduler_address.removeprefix('tcp://')}"
        far = work.path.parent / "far"
        said = work("build", "family.toml", "--on", address, "--store", far, "--threads", "1")
        assert said.code == 0, said.err
        assert made_in(work) == truth
        assert len(list((far / "cas").iterdir())) >= 3
        assert work("build", "family.toml", "--on", address).code == 2


@pytest.mark.filterwarnings("ignore")
def test_a_dask_worker_that_is_killed(work: Folder, truth: dict[str, bytes]) -> None:
    """In the middle of its work: another one does it again, and the bytes are the same."""
    needs_dask()
    from distributed import Client

    with cluster(work) as running, Client(running, set_as_default=False) as client:
        killed: list[int] = []

        def kill() -> None:
            pids = client.run(os.getpid)
            until = time.monotonic() + 60
            while time.monotonic() < until and not killed:
                busy = [w for w, tasks in client.processing().items() if tasks]
                if busy:
                    os.kill(pids[busy[0]], signal.SIGKILL)
                    killed.append(pids[busy[0]])

        killer = threading.Thread(target=kill)
        killer.start()
        address = f"dask://{running.scheduler_address.removeprefix('tcp://')}"
        far = work.path.parent / "far"
        said = work("build", "family.toml", "--on", address, "--store", far, "--threads", "1")
        killer.join()
        assert said.code == 0, said.err
        assert killed
    assert made_in(work) == truth


def test_errors_name_files_as_they_were_given(work: Folder) -> None:
    work.write("family.toml", RECIPE.replace("op =", "po ="))
    said = work("plan", "--snakemake", "family.toml")
    assert said.code == 3 and "--> family.toml:" in said.err and str(work.path) not in said.err


@pytest.mark.slow
def test_where_nobody_answers(work: Folder) -> None:
    if find_spec("distributed") is None:
        pytest.skip("distributed is not installed: `pip install -e '.[dev]'`")
    far = work.path.parent / "far"
    assert work("build", "family.toml", "--on", "dask://127.0.0.1:1", "--store", far).code == 5


@pytest.mark.parametrize("address", ["spark://h:1", "dask://", "dask://user@h:1", "tcp://h:1"])
def test_what_is_no_address_of_workers(address: str, work: Folder) -> None:
    far = work.path.parent / "far"
    assert work("build", "family.toml", "--on", address, "--store", far).code == 2


# -- one node


@pytest.mark.parametrize(
    "option", ["--statement", "--check", "--locked", "--frozen", "--partial", "-o x.ckpt"]
)
def test_one_node_is_no_whole_recipe(work: Folder, option: str) -> None:
    said = work("build", "family.toml", "--only", "0", *option.split())
    assert said.code == 2 and "exclude each other" in said.err and "built whole" in said.err


def test_one_node_at_a_time(work: Folder, truth: dict[str, bytes]) -> None:
    """As a workflow of another program does it, with a store for each."""
    plan = plan_of(work)
    far = ("--store", work.path.parent / "far", "--store-write")
    for n, key in enumerate(tasks_of(plan, [o.key for o in plan.outputs()])):
        said = replace(work, store=work.path.parent / f"store-{n}")(
            "build", work / "family.toml", "--only", key, *far
        )
        assert said.code == 0, said.err
    assert made_in(work) == truth
    assert not (work / "family.lock.toml").exists()
    said = work("build", "family.toml", "--only", "zzz")
    assert said.code == 2 and "no key begins" in said.err


def commands(snakefile: str) -> list[list[str]]:
    """The commands of a Snakefile, each rule after those whose marks it has among its inputs."""
    rules = {}
    for text in snakefile.split("\n\nrule ")[1:]:
        said = ast.literal_eval("[" + text.partition("input:")[2].partition("output:")[0] + "]")
        gives = re.search(r"touch\((.*)\),", text)
        shell = text.partition("shell:")[2].strip()
        words = shlex.split(ast.literal_eval(shell).format(threads=2)) if shell else []
        rules[ast.literal_eval(gives[1]) if gives else ""] = (said, words)
    order: list[str] = []

    def visit(mark: str) -> None:
        for needed in rules[mark][0]:
            if needed in rules and needed not in order:
                visit(needed)
        order.append(mark)

    visit("")
    assert len(order) == len(rules)
    return [rules[mark][1] for mark in order if rules[mark][1]]


def test_a_snakefile_whose_commands_are_run_in_order(work: Folder, truth: dict[str, bytes]) -> None:
    """Each as another machine would run it, in another folder and with a store of its own."""
    far = work.path.parent / "far"
    text = work("plan", "family.toml", "--snakemake", "--store", far).out
    run = commands(text)
    assert len(run) == len(tasks_of(plan_of(work), [o.key for o in plan_of(work).outputs()])) + 1
    for n, words in enumerate(run):
        machine = Folder(work.path.parent, work.path.parent / f"store-{n}", work.environment)
        said = machine(*words[1:])
        assert said.code == 0, said.err
    assert made_in(work) == truth and (work / "family.lock.toml").exists()
    done = machine("plan", work / "family.toml", "--snakemake", "--store", far).out
    assert "rule finish" in done and "task_" not in done


@pytest.mark.slow
def test_snakemake_runs_it(work: Folder, truth: dict[str, bytes]) -> None:
    if which("snakemake") is None:
        pytest.skip("snakemake is not installed")
    path = work.path.parent / "a folder {x}"
    work.path.rename(path)
    moved = replace(work, path=path)
    text = moved("plan", "family.toml", "--snakemake").out
    (path / "Snakefile").write_text(text)
    ckpt = path.parent / "bin" / "ckpt"
    ckpt.parent.mkdir()
    ckpt.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m builder "$@"\n')
    ckpt.chmod(0o755)
    environment = {**os.environ, **moved.variables, "PATH": f"{ckpt.parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["snakemake", "--cores", "2"], cwd=path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert made_in(moved) == truth and (path / "family.lock.toml").exists()
